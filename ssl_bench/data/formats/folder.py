"""Where images come from: one class a layout on disk (or none). A class lists its images; `store` decodes them.

`pictures` says what becomes of an image file.
"""

import csv
import functools
import hashlib
import logging
import math
import os
import re
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from ssl_bench.data import pictures, synthetic
from ssl_bench.data.pictures import Noticed, Values
from ssl_bench.data.store import LAYOUT, OnError, Split, Store, has_room, open_store
from ssl_bench.errors import UserError
from ssl_bench.fields import BitDepth, Place, ValueRange

log = logging.getLogger(__name__)

VERSION = 2  # of the decoding of image files: raise it when pixels change, so that packed stores are made anew

# What file servers, file managers and notebooks leave in folders; whatever begins with a dot is passed over, too.
SERVICE = {"@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "__pycache__"}
SERVICE |= {"lost+found", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
TRAIN = {"train", "training"}
HELD_OUT = {"val", "valid", "validation", "test", "testing", "eval", "dev", "holdout"}


class Dataset(ABC):
    """Up to three splits: "pretrain" (no labels), "train" and "val".

    `on_error`: "raise" or "skip" images that can't be decoded. `cache`: folder of the packed stores, by default
    $SSL_BENCH_CACHE/stores or ~/.cache/ssl_bench/stores. `workers`: packing processes, by default one a CPU.
    """

    class_names: Sequence[str] = ()  # where the classes have names, in the order of their numbers
    root = "."  # where index files are looked for
    extra: Sequence[str] = ()  # an index file and its label file
    values = Values()  # what the values of its image files mean

    def __init__(
        self, image_size: int, on_error: OnError = "raise", cache: Place | None = None, workers: int | None = None
    ):
        self.image_size, self.on_error, self.cache, self.workers = image_size, on_error, cache, workers
        self._splits: dict[str, Split] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """None when there are no labels. Raises UserError for labels that can't be read."""

    @abstractmethod
    def _list(self, name: str) -> Split: ...

    def split(self, name: Literal["pretrain", "train", "val"]) -> Split:
        """List the images of a split and check its labels; decodes nothing. Raises UserError."""
        if name not in synthetic.SPLITS:
            raise UserError(f"no split '{name}'; choose from {', '.join(synthetic.SPLITS)}")
        if name not in self._splits:
            try:
                self._splits[name] = self._list(name)
            except OSError as error:  # a dangling link, a folder that may not be read
                raise UserError(f"cannot list split '{name}' ({error}); mend that, or set data.root=") from error
        return self._splits[name]

    def open(self, name: Literal["pretrain", "train", "val"]) -> Store:
        """The decoded images of a split, packed first when needed. Raises UserError."""
        return open_store(self.split(name), self.image_size, self.cache, self.workers, self.on_error)

    def has_room(self, name: Literal["pretrain", "train", "val"]) -> bool:
        """Can `open` pack the split, as far as the disk goes?"""
        return has_room(self.split(name), self.image_size, self.cache)

    def requested(self, files: Sequence[str] = ()) -> np.ndarray:
        """int64, ascending: images of "pretrain" that have extra labels, or that index files (one index a line) name.

        files: relative to the root. Raises UserError.
        """
        length = self.split("pretrain").length
        found = [np.empty(0, np.int64)]
        for name in [*self.extra[:1], *files]:
            found.append(_load_indices(_folder(self.root) / name.strip(), "stage.requested= names index files"))
            if len(found[-1]) and found[-1].max() >= length:
                raise UserError(f"{name} names image {found[-1].max()} of {length:,}; does it belong to this data set?")
        return np.unique(np.concatenate(found))

    def _decoder(self, paths) -> "_Decoder":
        return _Decoder(paths, self.image_size, self.values)

    def _split(self, name, images, digests, labels, read, where) -> Split:
        """A Split of the image set `images` ("unlabeled", "train", ...), whose sources have these digests."""
        kind = f"{type(self).__name__.lower()}-{images}"
        # What isn't decoded has the number that all had first: runs of it go on, whatever becomes of the decoding.
        pixels = (VERSION, self.image_size, self.values) if isinstance(read, _Decoder) else (1, self.image_size)
        store_name = f"{kind}-{_digest(LAYOUT, *pixels, digests.files)[:16]}"
        facts = digests.content, b"" if labels is None else labels.tobytes()
        fingerprint = _digest(kind, *pixels, *facts)
        length = len(read)
        if length == 0:
            raise UserError(f"split '{name}' of {type(self).__name__} holds no images")
        return Split(name, length, labels, store_name, fingerprint, _digest(kind, *facts), read, where)


class _Digests(NamedTuple):
    """Of the sources of a split: by their names, sizes and times, and without the times, as a copy has them."""

    files: str
    content: str


def _digests(stats: np.ndarray) -> _Digests:
    """stats: int64 (n, 3), number, size, mtime in ns."""
    return _Digests(_digest(stats.tobytes()), _digest(stats[:, :2].tobytes()))


def _digest(*parts) -> str:
    result = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------


def _folder(root: str, *parts: str) -> Path:
    path = Path(root, *parts)
    if not path.is_dir():
        raise UserError(f"no folder {path}; data.root= sets where the data set is (now {root})")
    return path


class _Paths:
    """Many paths under one root in little memory, shared by worker processes (see `pool`)."""

    def __init__(self, root: Path, text: bytes, ends: array):
        """`text`: the names, one after the other; `ends`: 0, then where each ends."""
        self.root = root
        self.text = np.frombuffer(text, np.uint8)
        self.ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __call__(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes()))


@dataclass(frozen=True)
class _Numbered:
    """ROOT/0.png, ROOT/1.png, ..."""

    root: Path
    length: int

    def __len__(self) -> int:
        return self.length

    def __call__(self, index: int) -> str:
        return os.path.join(self.root, f"{index}.png")


@dataclass(frozen=True)
class _Joined:
    """`first`, then the files of `second` that `chosen` names."""

    first: _Numbered
    second: _Numbered
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.first) + len(self.chosen)

    def __call__(self, index: int) -> str:
        here = len(self.first)
        return self.first(index) if index < here else self.second(int(self.chosen[index - here]))


@dataclass(frozen=True)
class _Decoder:
    """The `read` of image files, which notes what a person may not expect of them."""

    paths: _Paths | _Numbered | _Joined
    image_size: int
    values: Values
    noticed: Noticed = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def __call__(self, index: int) -> np.ndarray:
        kinds: list[str] = []
        image = pictures.decode(self.paths(index), self.image_size, self.values, kinds)
        pictures.note(self.noticed, kinds, index)
        return image


@dataclass(frozen=True)
class _Records:
    """Images of `record` bytes each in binary files, the pixels last, `order` of axes (channel, second, third)."""

    files: tuple[str, ...]
    lengths: tuple[int, ...]
    record: int
    image_size: int
    order: tuple[int, int, int]

    def __len__(self) -> int:
        return sum(self.lengths)

    def _find(self, index: int) -> tuple[str, int]:
        for path, length in zip(self.files, self.lengths, strict=True):
            if index < length:
                return path, index
            index -= length
        raise IndexError(index)

    def __call__(self, index: int) -> np.ndarray:
        path, row = self._find(index)
        pixels = 3 * self.image_size**2
        data = np.fromfile(path, np.uint8, pixels, offset=(row + 1) * self.record - pixels)
        return data.reshape(3, self.image_size, self.image_size).transpose(self.order)

    def where(self, index: int) -> str:
        path, row = self._find(index)
        return f"image {row} of {path}"


def _records(paths: list[Path], record: int, image_size: int, order: tuple[int, int, int]) -> tuple[_Records, _Digests]:
    """The records of these files and their digests. Raises UserError for a size that isn't whole records."""
    lengths, stats = [], []
    for path in paths:
        status = path.stat()
        if status.st_size % record or status.st_size == 0:
            raise UserError(f"{path} has {status.st_size} bytes, not a multiple of {record}; download it again")
        lengths.append(status.st_size // record)
        stats.append((path.name, status.st_size, status.st_mtime_ns))
    digests = _Digests(_digest(*stats), _digest(*((name, size) for name, size, _ in stats)))
    return _Records(tuple(map(str, paths)), tuple(lengths), record, image_size, order), digests


# --- the data sets ----------------------------------------------------------------------------------------------------


def _values(bit_depth: int | None, value_range: list[float] | None) -> Values:
    if value_range is None:
        return Values(bit_depth)
    low, high = value_range
    given = f"data.value_range=[{low:g},{high:g}]"
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{given}: type what is black and what is white, the lower first: data.value_range=[0,4095]")
    if bit_depth is not None:
        raise UserError(f"data.bit_depth={bit_depth} and {given} both say what 16 bits mean: give one of the two")
    return Values(None, (float(low), float(high)))


class DL21(Dataset):
    """Numbered PNG files: ROOT/unlabeled/{i}.png, and ROOT/train, ROOT/val with ROOT/{split}_label_tensor.pt (int64).

    `extra_labels`: "request_NN.csv,label_NN.pt" or a list of the two, relative to ROOT: indices into unlabeled/ (one a
    line) and their labels. These images are appended to the train split.
    """

    def __init__(
        self,
        root: Place,
        image_size: PositiveInt = 96,
        extra_labels: Place | list[Place] | None = None,
        bit_depth: BitDepth | None = None,
        value_range: ValueRange | None = None,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root, self.values = root, _values(bit_depth, value_range)
        self.extra = extra_labels.split(",") if isinstance(extra_labels, str) else list(extra_labels or [])
        if len(self.extra) not in (0, 2):
            raise UserError(
                f"data.extra_labels={extra_labels} names {len(self.extra)} files; "
                "give an index file and a label file: data.extra_labels=[request_18.csv,label_18.pt]"
            )

    @functools.cached_property
    def num_classes(self) -> int | None:
        if not Path(self.root, "train_label_tensor.pt").exists():
            return None
        return int(max(labels.max(initial=0) for labels in self._train_labels)) + 1

    @functools.cached_property
    def _train_labels(self) -> list[np.ndarray]:
        files = ["train_label_tensor.pt", *(name.strip() for name in self.extra[1:])]
        return [_load_labels(_folder(self.root) / name) for name in files]

    def _list(self, name: str) -> Split:
        folder = "unlabeled" if name == "pretrain" else name
        paths, stats = _list_numbered(_folder(self.root, folder))
        if name == "pretrain":
            return self._split(name, folder, _digests(stats), None, self._decoder(paths), paths)
        if name == "val":
            labels = _load_labels(_folder(self.root) / "val_label_tensor.pt")
            if labels.max(initial=0) >= (self.num_classes or math.inf):
                raise UserError(
                    f"val_label_tensor.pt in {self.root} has label {labels.max()} and the train labels end at "
                    f"{self.num_classes - 1}; both must number the classes in the same way"
                )
        else:
            labels = self._train_labels[0]
        if len(labels) != len(paths):
            raise UserError(
                f"{folder}_label_tensor.pt in {self.root} has {len(labels)} labels for {len(paths)} images; "
                "they must be as many"
            )
        if name == "train" and self.extra:
            chosen = _load_indices(
                _folder(self.root) / self.extra[0].strip(), "data.extra_labels= names an index file and a label file"
            )
            if len(chosen) != len(self._train_labels[1]):
                raise UserError(
                    f"{self.extra[0]} has {len(chosen)} indices and {self.extra[1]} has {len(self._train_labels[1])} "
                    "labels; data.extra_labels= needs two files that belong together"
                )
            unlabeled = _Numbered(_folder(self.root, "unlabeled"), 0)
            stats = np.concatenate([stats, _stat_chosen(unlabeled, chosen, self.extra[0])])
            paths = _Joined(paths, unlabeled, chosen)
            labels = np.concatenate(self._train_labels)
        return self._split(name, folder, _digests(stats), labels, self._decoder(paths), paths)


def _list_numbered(folder: Path) -> tuple[_Numbered, np.ndarray]:
    """The files 0.png ... of a folder, and int64 (n, 3): number, size, mtime in ns."""
    number, passed = re.compile(r"(0|[1-9]\d{0,17})\.png").fullmatch, _Passed()

    def numbered(entries: Iterator[os.DirEntry]) -> Iterator[tuple[int, os.stat_result]]:
        for entry in entries:
            if match := number(entry.name):
                yield int(match[1]), entry.stat()
            else:
                hidden = _is_service(entry.name)
                passed.add("hidden or service files" if hidden else "names other than NUMBER.png", entry.name)

    with os.scandir(folder) as entries:
        rows = numbered(entries)
        flat = np.fromiter(
            (value for i, status in rows for value in (i, status.st_size, status.st_mtime_ns)), dtype=np.int64
        )
    passed.tell(folder)
    stats = flat.reshape(-1, 3)
    stats = stats[np.argsort(stats[:, 0])]
    wrong = np.flatnonzero(stats[:, 0] != np.arange(len(stats)))
    if len(wrong):
        raise UserError(
            f"{folder / f'{wrong[0]}.png'} is missing, though the folder goes up to {stats[-1, 0]}.png; "
            "files must be numbered 0, 1, 2, ... without a gap"
        )
    if len(stats) == 0:
        raise UserError(f"no files 0.png, 1.png, ... in {folder}; data.root= sets where the data set is")
    return _Numbered(folder, len(stats)), stats


def _stat_chosen(paths: _Numbered, chosen: np.ndarray, source: str) -> np.ndarray:
    rows = []
    for index in chosen.tolist():
        try:
            status = os.stat(paths(index))
        except OSError:
            raise UserError(
                f"{source} asks for {paths(index)}, which is not there; does it belong to this data set?"
            ) from None
        rows.append((index, status.st_size, status.st_mtime_ns))
    return np.array(rows, np.int64).reshape(-1, 3)


def _load_indices(path: Path, key: str) -> np.ndarray:
    """int64 (n,) from a file with one index a line. key: what names the file."""
    if not path.is_file():
        raise UserError(f"no file {path}; {key} under data.root")
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            if not row[0].strip().isdecimal():
                raise UserError(f"line {line} of {path} is '{','.join(row)[:40]}'; expected one image index a line")
            rows.append(int(row[0]))
    return np.array(rows, np.int64)


def _load_labels(path: Path) -> np.ndarray:
    """int64 (n,) from a tensor file. Raises UserError for anything else, and for negative labels."""
    import torch

    if not path.is_file():
        raise UserError(f"no label file {path}; labelled stages need it, data.root= sets where the data set is")
    try:
        labels = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that isn't one of its own
        raise UserError(
            f"{path} is not a tensor file of torch ({type(error).__name__}); expected int64 labels"
        ) from None
    if not isinstance(labels, torch.Tensor):
        raise UserError(f"{path} holds a {type(labels).__name__}; expected a one-dimensional int64 tensor")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise UserError(f"{path} holds a tensor of {found}; expected a one-dimensional int64 tensor")
    if len(labels) and labels.min() < 0:
        raise UserError(f"{path} has the label {int(labels.min())}; labels count from 0")
    return labels.numpy()


class Folder(Dataset):
    """Any tree of images. With class folders ROOT/train/<class> and ROOT/val/<class> (in upper case, too) it is
    labelled, the classes in sorted order, and "pretrain" is train without its labels; otherwise all images under ROOT
    are "pretrain". Refused where folders at any depth are called after a training and a held-out split.
    """

    def __init__(
        self,
        root: Place,
        image_size: PositiveInt = 96,
        bit_depth: BitDepth | None = None,
        value_range: ValueRange | None = None,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root, self.values = root, _values(bit_depth, value_range)

    @functools.cached_property
    def class_names(self) -> list[str]:
        """Empty when unlabelled."""
        names = _subfolders(self._part("train"))
        return names if _subfolders(self._part("val")) else []

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) or None

    def _part(self, name: str) -> Path:
        """ROOT/train or ROOT/val, as it is written there."""
        root = _folder(self.root)
        found = [folder for folder in _subfolders(root) if folder.casefold() == name]
        if len(found) > 1:
            raise UserError(f"{root} has {found[0]}/ and {found[1]}/: leave one of the two there")
        return root / (found[0] if found else name)

    def _list(self, name: str) -> Split:
        root = _folder(self.root)
        if not self.class_names:
            if name != "pretrain":
                raise UserError(
                    f"{root} has no labels, so no split '{name}', only 'pretrain'; "
                    "labelled data lie in train/<class>/ and val/<class>/"
                )
            paths, digests, _ = _list_tree(root, guarded=0)
            return self._split(name, "all", digests, None, self._decoder(paths), paths)
        folder = self._part("val" if name == "val" else "train")
        if unknown := sorted(set(_subfolders(folder)) - set(self.class_names)):
            raise UserError(f"val/ has the class {unknown[0]!r}, which train/ lacks; both need the same class folders")
        # a class may be called "test"
        paths, digests, counts = _list_tree(folder, guarded=None if name == "val" else 1)
        if counts.pop("", 0):
            raise UserError(f"{folder} has images outside the class folders; move them into one or away")
        if name != "val" and (empty := [name for name in self.class_names if not counts.get(name)]):
            raise UserError(f"no images in {folder / empty[0]}; fill or remove that class folder")
        labels = np.repeat([self.class_names.index(name) for name in counts], list(counts.values())).astype(np.int64)
        labels = None if name == "pretrain" else labels
        images = "val" if name == "val" else "train"
        return self._split(name, images, digests, labels, self._decoder(paths), paths)


class Images(Folder):
    """Every image under ROOT as "pretrain", whatever the folders are called: what stage=predict looks at."""

    class_names = ()

    def _list(self, name: str) -> Split:
        paths, digests, _ = _list_tree(Path(self.root), key="stage.images")
        return self._split(name, "all", digests, None, self._decoder(paths), paths)


def _is_service(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SERVICE


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _is_service(entry.name) and entry.is_dir())


class _Passed:
    """What a listing leaves out, by its kind: how many, and the first."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        count, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = count + 1, min(first, name)

    def tell(self, root: Path) -> None:
        """One line."""
        if self.kinds:
            most = sorted(self.kinds.items(), key=lambda item: (-item[1][0], item[0]))
            shown = ", ".join(f"{kind} ({count:,}, {first} for one)" for kind, (count, first) in most[:12])
            more = f", and {len(most) - 12} kinds more" if len(most) > 12 else ""
            log.info("passed over in %s: %s%s", root, shown, more)


class _Guard:
    """Of an unlabelled tree: are folders called after splits, so that test images would be trained on?"""

    def __init__(self, root: Path, depth: int):
        """depth: of the first folders that aren't classes."""
        self.root, self.depth = root, depth
        self.train = self.held_out = ""  # the first folder of each
        self.count = 0  # images in held-out ones

    def see(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for depth in range(self.depth, len(parts)):
            means = _split_of(parts[depth])
            if means in TRAIN:
                self.train = self.train or "/".join(parts[: depth + 1])
            elif means in HELD_OUT:
                self.held_out = self.held_out or "/".join(parts[: depth + 1])
                self.count += 1
                return

    def check(self) -> None:
        if self.held_out and self.train:
            raise UserError(
                f"{self.root} has {self.train}/ and {self.held_out}/, whose {self.count:,} images would be trained on: "
                f"type data.root={self.root / self.train}, or sort both into train/<class>/ and val/<class>/"
            )
        if self.held_out:
            log.warning("%s images are in folders like %s/ and are trained on, too", f"{self.count:,}", self.held_out)


@functools.cache
def _split_of(folder: str) -> str:
    """The one word of a folder's name, but for what says nothing: train2017 and train_images are "train"."""
    words = [word for word in re.split(r"[\W\d_]+", folder.casefold()) if word]
    words = [word for word in words if word not in ("set", "data", "image", "images", "img", "imgs", "split")]
    return words[0].removesuffix("set") if len(words) == 1 else ""


def _list_tree(
    root: Path, key: str = "data.root", guarded: int | None = None
) -> tuple[_Paths, _Digests, dict[str, int]]:
    """The image files under root in sorted order, their digests, and how many lie in each folder of its first level.

    guarded: from this depth on, UserError for folders that are called after a training and a held-out split.
    """
    text, ends, counts = bytearray(), array("q", [0]), {}
    files, content = hashlib.sha256(), hashlib.sha256()
    passed, guard = _Passed(), None if guarded is None else _Guard(root, guarded)
    for name, size, mtime in _walk(root, "", frozenset(), passed):
        encoded = os.fsencode(name)
        text += encoded
        ends.append(len(text))
        files.update(encoded + f"\0{size}\0{mtime}\n".encode())
        content.update(encoded + f"\0{size}\n".encode())
        first = name.split("/", 1)[0] if "/" in name else ""
        counts[first] = counts.get(first, 0) + 1
        if guard is not None:
            guard.see(name)
    if guard is not None:
        guard.check()
    passed.tell(root)
    if not text:
        known = " ".join(sorted(pictures.extensions()))
        raise UserError(f"no images under {root}; {key}= sets the folder; known extensions are {known}")
    return _Paths(root, bytes(text), ends), _Digests(files.hexdigest(), content.hexdigest()), counts


def _walk(root: Path, below: str, above: frozenset, passed: _Passed) -> Iterator[tuple[str, int, int]]:
    """(path relative to root, size, mtime in ns), sorted folder by folder; follows links, but not in circles."""
    folder = os.path.join(root, below)
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_service(entry.name):  # may not even be read
                passed.add("hidden or service files", below + entry.name)
            else:
                found.append((entry.name, entry.is_dir()))
    for name, is_folder in sorted(found):
        extension = os.path.splitext(name)[1].lower()
        if is_folder:
            yield from _walk(root, f"{below}{name}/", above | {identity}, passed)
        elif extension not in pictures.extensions():
            passed.add(extension or "no extension", below + name)
        else:
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:  # a link to nowhere is told with what can't be decoded
                status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                yield below + name, status.st_size, status.st_mtime_ns
            else:  # reading a pipe would never end
                passed.add("pipes and devices", below + name)


class STL10(Dataset):
    """The binary files of STL-10 (train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin) in ROOT or
    ROOT/stl10_binary: 96x96, 10 classes. "pretrain" is unlabeled, "val" is test. https://cs.stanford.edu/~acoates/stl10
    """

    num_classes = 10

    def __init__(
        self,
        root: Place,
        image_size: Literal[96] = 96,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root = root

    def _list(self, name: str) -> Split:
        part = {"pretrain": "unlabeled", "train": "train", "val": "test"}[name]
        images = self._file(f"{part}_X.bin")
        # columns before rows, as Matlab stores them
        records, digests = _records([images], 3 * 96 * 96, 96, (2, 1, 0))
        labels = None
        if name != "pretrain":
            path = self._file(f"{part}_y.bin")
            labels = np.fromfile(path, np.uint8).astype(np.int64) - 1
            if len(labels) != len(records):
                raise UserError(f"{path} has {len(labels)} labels for {len(records)} images; unpack both files again")
            _check_range(labels, 10, path)
        return self._split(name, part, digests, labels, records, records.where)

    def _file(self, name: str) -> Path:
        root = _folder(self.root)
        for path in (root / "stl10_binary" / name, root / name):
            if path.is_file():
                return path
        raise UserError(
            f"no {name} in {root} or {root / 'stl10_binary'}; unpack stl10_binary.tar.gz there, "
            "or set data.root= to where it is"
        )


class CIFAR(Dataset):
    """CIFAR-10 or CIFAR-100, the *binary* version, unpacked in ROOT: 32x32. "pretrain" is train without its labels.
    https://www.cs.toronto.edu/~kriz/cifar.html
    """

    def __init__(
        self,
        root: Place,
        num_classes: Literal[10, 100],
        image_size: Literal[32] = 32,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root = root
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def _list(self, name: str) -> Split:
        train = name != "val"
        if self.num_classes == 10:
            folder, label_bytes = "cifar-10-batches-bin", 1
            files = [f"data_batch_{batch}.bin" for batch in range(1, 6)] if train else ["test_batch.bin"]
        else:
            folder, label_bytes = "cifar-100-binary", 2  # coarse label, fine label
            files = ["train.bin" if train else "test.bin"]
        paths = [self._file(folder, file) for file in files]
        records, digests = _records(paths, label_bytes + 3 * 32 * 32, 32, (1, 2, 0))
        labels = None
        if name != "pretrain":
            rows = [np.memmap(path, np.uint8, "r").reshape(-1, records.record) for path in paths]
            labels = np.concatenate([row[:, label_bytes - 1] for row in rows]).astype(np.int64)
            _check_range(labels, self.num_classes, paths[0].parent)
        images = f"{self.num_classes}-{'train' if train else 'test'}"
        return self._split(name, images, digests, labels, records, records.where)

    def _file(self, folder: str, name: str) -> Path:
        root = _folder(self.root)
        for path in (root / folder / name, root / name):
            if path.is_file():
                return path
        archive = f"cifar-{self.num_classes}-binary.tar.gz"
        python = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[self.num_classes]
        found = f"{python} is the python version, a pickle, which is not read; " if python.is_dir() else ""
        raise UserError(
            f"no {folder}/{name} in {root}; {found}unpack {archive} (from https://www.cs.toronto.edu/~kriz/cifar.html) "
            "there, or set data.root= to where it is"
        )


def _check_range(labels: np.ndarray, num_classes: int, path: Path) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{path} has labels outside its {num_classes} classes; is it the right file, unpacked whole?")


class Digits(Dataset):
    """The 1797 handwritten digits (8x8) that scikit-learn ships, upsampled. They come in the order of their writers, so
    the last 500, the val split, hardly share a writer with train. "pretrain" is train without its labels.
    """

    num_classes = 10

    def __init__(
        self,
        image_size: PositiveInt = 32,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)

    def _list(self, name: str) -> Split:
        from sklearn.datasets import load_digits

        digits = load_digits()
        part = slice(-500, None) if name == "val" else slice(None, -500)
        images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)  # 0..16 -> 0..255
        labels = None if name == "pretrain" else digits.target[part].astype(np.int64)
        read, images_of = _DigitReader(images, self.image_size), "val" if name == "val" else "train"
        digest = _digest(images.tobytes())
        where = f"{images_of} digit {{}}".format
        return self._split(name, images_of, _Digests(digest, digest), labels, read, where)


@dataclass(frozen=True)
class _DigitReader:
    images: np.ndarray  # uint8 (n, 8, 8)
    image_size: int

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int) -> np.ndarray:
        from PIL import Image

        return pictures.centre_square(Image.fromarray(self.images[index]).convert("RGB"), self.image_size)


class Synthetic(Dataset):
    """Images drawn by `synthetic.render`: the class is a shape. "pretrain" is a set of its own."""

    def __init__(
        self,
        num_unlabeled: PositiveInt,
        num_train: PositiveInt,
        num_val: PositiveInt,
        num_classes: Annotated[int, Field(ge=2, le=len(synthetic.SHAPES))],
        seed: NonNegativeInt,
        image_size: PositiveInt = 96,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.lengths = {"pretrain": num_unlabeled, "train": num_train, "val": num_val}
        self._num_classes, self.seed = num_classes, seed
        self.class_names = list(synthetic.SHAPES)[:num_classes]

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def _list(self, name: str) -> Split:
        length = self.lengths[name]
        labels = None if name == "pretrain" else np.arange(length) % self.num_classes
        read = _Renderer(self.seed, name, length, self.image_size, self.num_classes)
        digest = _digest(synthetic.VERSION, read)
        where = f"synthetic {name} image {{}}".format
        return self._split(name, name, _Digests(digest, digest), labels, read, where)


@dataclass(frozen=True)
class _Renderer:
    seed: int
    split: str
    length: int
    image_size: int
    num_classes: int

    def __len__(self) -> int:
        return self.length

    def __call__(self, index: int) -> np.ndarray:
        return synthetic.render(self.seed, self.split, index, self.image_size, self.num_classes)[0]
