"""Data sets of a user's own, as torch has them: `__len__`, and `__getitem__` with its label."""

import inspect
import json
import logging
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import xxhash
from filelock import FileLock
from PIL import Image
from pydantic import PositiveInt

from ssl_bench import files
from ssl_bench.config.fields import Place
from ssl_bench.data import pictures
from ssl_bench.data.formats.base import Dataset, Digests, hashed
from ssl_bench.data.pool import run_chunks
from ssl_bench.data.store import OnError, Split, cache_folder
from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

SAMPLED = 32  # items that are read at each start, to see whether the data set is the known one
UNLABELLED, UNREAD = -1, -2


class Own(Dataset):
    """What `make(**arguments)` gives: images, or (image, label) pairs, by index.

    If `make` takes `split`, it is given "train" or "val", and "pretrain" too where the annotation
    of `split` is a Literal with that; else "pretrain" is train without its labels. If it takes
    none, all images are "pretrain". `classes`, if it has them, are the names of the classes.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: Mapping[str, Any],
        image_size: PositiveInt = 96,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.make, self.arguments = make, dict(arguments)
        self.title = f"{make.__module__}.{make.__qualname__}"

    @property
    def num_classes(self) -> int | None:
        labels = self.split("train").labels if self._takes_split else None
        return None if labels is None else int(labels.max()) + 1

    @property
    def _takes_split(self) -> bool:
        return "split" in inspect.signature(self.make).parameters

    @property
    def _has_unlabelled(self) -> bool:
        """Is there a split "pretrain" of its own?"""
        made = self.make.__init__ if inspect.isclass(self.make) else self.make
        return "pretrain" in get_args(get_type_hints(made).get("split"))

    def _list(self, name: str) -> Split:
        if not self._takes_split:
            if name != "pretrain":
                raise UserError(
                    f"{self.title} takes no split=, so there is no split '{name}', only "
                    "'pretrain'; let its __init__ take split, and give what is asked for: "
                    "'train' or 'val'"
                )
            source = "all"
        else:
            source = "train" if name == "pretrain" and not self._has_unlabelled else name
        made = self._made(source)
        read = _Reader(made, self.title, self.side)
        facts = self._facts(source, read)
        labels = None if name == "pretrain" else facts.labels
        if labels is not None and (bare := np.flatnonzero(labels < 0)).size:
            why = "can't be read" if labels[bare[0]] == UNREAD else "comes without a label"
            raise UserError(
                f"{read.where(bare[0])} {why}, so split '{name}' has no labels: have all its items "
                "(image, label), or only stage=pretrain can use it"
            )
        if name == "train":
            self.class_names = _names(made, facts.labels)
        last = (self.num_classes or 0) - 1 if name == "val" else None
        if labels is not None and last is not None and labels.max() > last:
            raise UserError(
                f"{read.where(labels.argmax())} of split 'val' has label {labels.max()}, and those "
                f"of 'train' end at {last}"
            )
        digests = Digests(facts.key, facts.content)
        return self._split(name, source, digests, labels, read, read.where)

    def _made(self, source: str) -> Any:
        """The user's object with the images of `source`. UserError where it isn't one."""
        given = {} if source == "all" else {"split": source}
        try:
            made = self.make(**self.arguments, **given)
        except Exception as error:
            shown = [f"{key}={value!r}" for key, value in (self.arguments | given).items()]
            called = ", ".join(shown)
            raise UserError(f"{self.title}({called}): {_said(error)}") from error
        for method in ("__len__", "__getitem__"):
            if not hasattr(made, method):
                raise UserError(
                    f"{self.title} has no {method}: a data set has __len__ and __getitem__"
                )
        return made

    def _facts(self, source: str, read: "_Reader") -> "Facts":
        """What one pass over all items tells, which is kept in the cache.

        Some are read anew each time, so that other images are noticed.
        """
        if (length := len(read)) == 0:
            raise UserError(f"{self.title} holds no images: its __len__ gives 0")
        try:
            pickle.dumps(read, protocol=5, buffer_callback=lambda _: None)
        except Exception as error:
            raise UserError(
                f"{self.title} can't be sent to the processes that read it ({_said(error)}): open "
                "files in __getitem__, not in __init__"
            ) from None
        rows = np.unique(np.linspace(0, length - 1, min(SAMPLED, length)).astype(int))
        look = _Look(read, self.on_error)
        # UserError for a mistake in what is returned, before processes are started
        seen = [part for row in rows for part in look.item(int(row))]
        kind = (self.title, sorted(map(repr, self.arguments.items())), source, self.image_size)
        key = hashed(*kind, length, *seen)
        folder = Path(self.cache) if self.cache else cache_folder("stores")
        path = folder / f"own-{key[:16]}.facts"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # the ranks of a run ask together
                known = Facts.read(path)
                if known is None or known.key != key:
                    known = self._look(look, length, source, key)
                    known.write(path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error}); data.cache= sets the folder") from None
        return known

    def _look(self, look: "_Look", length: int, source: str, key: str) -> "Facts":
        log.info("reading all %s items of %s, for their labels", f"{length:,}", self.title)
        labels, sums = np.zeros(length, np.int64), np.zeros(length, np.uint64)
        with closing(run_chunks(look, length, self.workers, f"reading {source}")) as results:
            for start, stop, (some, digests) in results:
                labels[start:stop], sums[start:stop] = some, digests
        return Facts(key, labels, hashed(sums.tobytes()))


class Facts(NamedTuple):
    """What is known of all items of a data set."""

    key: str
    labels: np.ndarray  # int64 (n,); UNLABELLED for an image alone, UNREAD for none
    content: str  # digest of all pixels

    @property
    def digest(self) -> str:
        return hashed(self.key, self.labels.tobytes(), self.content)

    @classmethod
    def read(cls, path: Path) -> "Facts | None":
        """None: the file isn't there, or is damaged."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            facts = cls(known["key"], np.array(known["labels"], np.int64), known["content"])
            return facts if facts.digest == known["digest"] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def write(self, path: Path) -> None:
        known = {"key": self.key, "content": self.content, "digest": self.digest}
        files.write(path, json.dumps(known | {"labels": self.labels.tolist()}))


@dataclass(frozen=True)
class _Reader:
    """Items of a data set as packed images need them; sent to the processes that read."""

    made: Any
    title: str
    image_size: int

    def __len__(self) -> int:
        try:
            return len(self.made)
        except Exception as error:
            raise UserError(f"{self.title}: its __len__ raised {_said(error)}") from error

    def where(self, index: int) -> str:
        return f"item {index} of {self.title}"

    def __call__(self, index: int) -> np.ndarray:
        return self.item(index)[0]

    def item(self, index: int) -> tuple[np.ndarray, int]:
        """(uint8 (image_size, image_size, 3), label). ValueError for what is neither."""
        try:
            item = self.made[index]
        except Exception as error:
            raise ValueError(f"__getitem__ raised {_said(error)}") from error
        image, label = item, None
        if isinstance(item, tuple | list):
            if len(item) != 2:
                raise ValueError(f"a {type(item).__name__} of {len(item)}: return (image, label)")
            image, label = item
        return pictures.squared(as_picture(image), self.image_size), _class_number(label)


@dataclass(frozen=True)
class _Look:
    """Labels and digests of the pixels of a chunk of items."""

    read: _Reader
    on_error: OnError

    def __call__(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        seen = [self.item(index) for index in range(start, stop)]
        return [label for _, label in seen], [xxhash.xxh3_64_intdigest(data) for data, _ in seen]

    def item(self, index: int) -> tuple[bytes, int]:
        """The bytes of the pixels, and the label. UserError, unless such items are skipped."""
        try:
            pixels, label = self.read.item(index)
        except ValueError as error:
            if self.on_error == "skip":
                return b"", UNREAD
            raise UserError(f"{self.read.where(index)}: {error}") from None
        return pixels.tobytes(), label


def as_picture(image: Any) -> Image.Image:
    """A picture of PIL's of one, or of uint8: a tensor (3, H, W), an array (H, W, 3), grey ones.

    ValueError for anything else.
    """
    if isinstance(image, Image.Image):
        return image
    wanted = "a picture of PIL's, or uint8: an array (H, W, 3) or a tensor (3, H, W)"
    is_tensor = _is_tensor(image)
    if not (is_tensor or isinstance(image, np.ndarray)):
        raise ValueError(f"an image of type {type(image).__name__}: give {wanted}")
    kind = "a tensor" if is_tensor else "an array"
    shown = f"{kind} {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
    array = image
    if is_tensor:
        array = (image.movedim(0, -1) if image.ndim == 3 else image).cpu().numpy()
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype != np.uint8:
        raise ValueError(f"{shown}: give {wanted}; transforms are for augmentation=")
    if not fits or 0 in array.shape:
        raise ValueError(f"{shown}: give {wanted}")
    grey = array.ndim == 3 and array.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if grey else array)).convert("RGB")


def _is_tensor(thing: Any) -> bool:
    """Is it one of torch's? A process that reads doesn't import torch for this question."""
    return "torch" in sys.modules and isinstance(thing, sys.modules["torch"].Tensor)


def _names(made: Any, labels: np.ndarray) -> Sequence[str]:
    """`made.classes`, if it names all the classes: where torchvision's data sets have them."""
    names = getattr(made, "classes", None)
    whole = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if names and whole and len(names) == labels.max() + 1 else ()


def _class_number(label: Any) -> int:
    """The label as a number; UNLABELLED for None. ValueError."""
    if label is None:
        return UNLABELLED
    if (isinstance(label, np.ndarray) or _is_tensor(label)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
        raise ValueError(
            f"a label {str(label)[:40]!r} of type {type(label).__name__}: "
            "give the number of its class, from 0"
        )
    if not 0 <= label < 2**31:
        raise ValueError(f"a label {label}: classes are numbered from 0; None for no label")
    return int(label)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
