"""Tar shards as the webdataset library names what is in them.

Files of one sample lie together in a shard and share their name up to the first dot:
n01440764_10026.jpg, n01440764_10026.cls. The library (1.0) reads shards from end to end and has no
index, and an epoch here is an order of single images. So the members are listed once, by Python's
tarfile, and each image is then read at its place in its shard. The list is kept in the cache.
"""

import json
import logging
import os
import tarfile
import zipfile
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from pydantic import PositiveInt

from ssl_bench import files
from ssl_bench.config.fields import BitDepth, Place, ValueRange
from ssl_bench.console import Bar
from ssl_bench.data import pictures
from ssl_bench.data.formats.base import Digests, ImageFiles, folder_at, hashed
from ssl_bench.data.formats.listing import Passed
from ssl_bench.data.formats.patterns import matching
from ssl_bench.data.pool import default_workers, run_in_order
from ssl_bench.data.store import OnError, Split, root_of
from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1  # of a list in the cache
MEMBER = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the image in its shard
        ("size", "<i8"),  # bytes
        ("label", "<i8"),
    ]
)
UNLABELLED, UNREAD = -1, -2
KEYS = ("label", "cls")  # of a .json, by default
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # what compressed files begin with


class WebDataset(ImageFiles):
    """Images in tar shards, with labels beside them: a .cls (the class number), or in a .json.

    pretrain, train, val: patterns below ROOT (see `patterns`), or lists of them; "pretrain" is
    train without its labels unless it has shards of its own. label: the key of the .json; None: a
    .cls, or else KEYS.
    """

    in_shards = True
    listed_at_once = False

    def __init__(
        self,
        root: Place,
        pretrain: Place | list[Place] | None = None,
        train: Place | list[Place] | None = None,
        val: Place | list[Place] | None = None,
        label: str | None = None,
        image_size: PositiveInt | None = None,
        max_side: PositiveInt | None = None,
        draft: bool = False,
        bit_depth: BitDepth | None = None,
        value_range: ValueRange | None = None,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(
            image_size, max_side, draft, bit_depth, value_range, on_error, cache, workers
        )
        self.root, self.label = root, label
        self.patterns = {"pretrain": pretrain, "train": train, "val": val}
        self._listed: dict[str, tuple[Members, Digests]] = {}

    @property
    def num_classes(self) -> int | None:
        if self.patterns["train"] is None:
            return None
        labels = self.split("train").labels
        assert labels is not None
        return int(labels.max()) + 1

    def _shards(self, name: str) -> list[Path]:
        root, patterns = folder_at(self.root), self.patterns[name]
        if patterns is None:
            example = f"data.{name}='{name}-*.tar'"
            if name == "pretrain":
                example = "data.train='train-*.tar', or data.pretrain='*.tar' without labels"
            raise UserError(
                f"data=webdataset has no shards for '{name}': type which of those in {root} they "
                f"are: {example}"
            )
        return matching(root, patterns, ".tar", f"data.{name}")

    def _list(self, name: str) -> Split:
        source = name
        if name == "pretrain" and self.patterns["pretrain"] is None:
            source = "train" if self.patterns["train"] is not None else name
        shards = self._shards(source)
        trained = self._shards("train") if name == "val" and self.patterns["train"] else []
        if both := sorted({*shards} & {*trained}):
            raise UserError(
                f"{both[0]} is of data.val= and of data.train=: what is measured on must not be "
                "trained on"
            )
        if source not in self._listed:
            self._listed[source] = self._members(source, shards)
        members, digests = self._listed[source]
        labels = None if name == "pretrain" else self._labels(members)
        if labels is not None and trained and labels.max() >= (classes := self.num_classes or 0):
            raise UserError(
                f"{members(int(labels.argmax()))} has label {labels.max()}, and those of "
                f"data.train= end at {classes - 1}"
            )
        return self._split(name, "shards", digests, labels, self._decoder(members), members)

    def _labels(self, members: "Members") -> np.ndarray:
        labels = members.rows["label"].astype(np.int64)
        if (bare := np.flatnonzero(labels < 0)).size:
            first = members(int(bare[0]))
            named = " or ".join(map(repr, (self.label,) if self.label else KEYS))
            beside = f"a .json with {named}"
            if self.label is None:
                beside = f"a .cls, or {beside},"
            if labels[bare[0]] == UNREAD:
                raise UserError(
                    f"{first}: its label is no class number from 0; type data.label= for another "
                    "key of its .json, or only stage=pretrain can use these shards"
                )
            raise UserError(
                f"{first} has no label: {beside} must follow or precede it in the shard; "
                "only stage=pretrain can do without (data.pretrain=)"
            )
        return labels

    def _members(self, name: str, shards: list[Path]) -> tuple["Members", Digests]:
        """The images in these shards, listed now unless the cache has them."""
        root = folder_at(self.root)
        names = [os.path.relpath(shard, root) for shard in shards]
        stats = [shard.stat() for shard in shards]
        known = [(file, s.st_size, s.st_mtime_ns) for file, s in zip(names, stats, strict=True)]
        key = hashed(VERSION, self.label, *known)
        paths = tuple(map(str, shards))
        place = root_of(self.cache) / f"webdataset-{key[:16]}.npz"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):  # the ranks of a run ask together
                members = Members.load(place, paths)
                if members is None:
                    members = self._read(name, paths)
                    partial = place.with_suffix(".partial")
                    with files.replacing(place, partial, "wb") as file:
                        members.save(file)
        except OSError as error:
            raise UserError(
                f"cannot list the shards of '{name}' in {place} ({error}); data.cache= sets the "
                "folder"
            ) from error
        content = hashed(members.text.tobytes(), members.rows["size"].tobytes())
        digests = Digests(hashed(*known), content, int(members.rows["size"].sum()))
        return members, digests

    def _read(self, name: str, shards: tuple[str, ...]) -> "Members":
        nbytes = sum(os.path.getsize(shard) for shard in shards)
        log.info("listing '%s': %d shards, %.1f GB", name, len(shards), nbytes / 1e9)
        task = _List(shards, self.label)
        workers = min(self.workers or default_workers(), len(shards))
        chunks = [(shard,) for shard in range(len(shards))]
        rows, text, ends, passed = [], bytearray(), array("q", [0]), Passed()
        results = run_in_order(task, chunks, workers, lambda seconds, chunk: None)
        with closing(results), Bar(len(shards), f"listing {name}", unit="shards") as progress:
            for found in results:
                rows.append(found.rows)
                ends.extend(len(text) + end for end in found.ends)
                text += found.text
                passed.merge(found.passed)
                progress.add(1)
        passed.tell(folder_at(self.root))
        members = Members(shards, np.concatenate(rows), _bytes(text), np.array(ends, np.int64))
        if len(members) == 0:
            known = " ".join(sorted(pictures.extensions()))
            raise UserError(
                f"no images in {shards[0]}{' and the others' if len(shards) > 1 else ''} of "
                f"data.{name}=; known extensions are {known}"
            )
        return members


class Members:
    """Images in tar files, by their index; in little memory, shared by worker processes."""

    def __init__(
        self, shards: tuple[str, ...], rows: np.ndarray, text: np.ndarray, ends: np.ndarray
    ):
        """rows: MEMBER (N,). text: uint8, the names one after the other; ends: int64 (N + 1,), 0,
        then where each name ends.
        """
        self.shards, self.rows, self.text, self.ends = shards, rows, text, ends

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, index: int) -> str:
        name = self.text[self.ends[index] : self.ends[index + 1]]
        return os.path.join(self.shards[self.rows["shard"][index]], os.fsdecode(name.tobytes()))

    def read(self, index: int) -> bytes:
        shard, offset, size, _ = self.rows[index].tolist()
        # opened for each: shards may be more than the files that a process may have open, and
        # opening takes microseconds of the milliseconds that decoding does
        file = os.open(self.shards[shard], os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
        finally:
            os.close(file)
        if len(data) < size:
            raise ValueError("its shard is shorter than it was when it was listed")
        return data

    def save(self, file) -> None:
        np.savez(file, rows=self.rows, text=self.text, ends=self.ends)

    @classmethod
    def load(cls, path: Path, shards: tuple[str, ...]) -> "Members | None":
        """None: they aren't there, or are damaged."""
        try:
            with np.load(path) as known:  # each array has a checksum
                rows, text, ends = (known[name] for name in ("rows", "text", "ends"))
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return cls(shards, rows, text, ends)


class _Found(NamedTuple):
    """What a shard holds: as in `Members`, and the files that are passed over."""

    rows: np.ndarray
    text: bytes
    ends: list[int]  # without the 0
    passed: Passed


@dataclass(frozen=True)
class _List:
    """Lists the images of a shard, given by its number."""

    shards: tuple[str, ...]
    label: str | None

    def __call__(self, number: int) -> _Found:
        path = self.shards[number]
        with open(path, "rb") as file:
            begins = file.read(4)
            if begins[:2] == GZIP or begins == ZSTD:
                raise UserError(
                    f"{path} is compressed, so that no image can be read at its place: "
                    "decompress the shards"
                )
            try:
                return self._found(number, _Tar(path, file))
            except UserError:
                raise
            except (tarfile.TarError, ValueError, EOFError) as error:  # of a damaged header
                raise UserError(
                    f"{path} is no whole tar file ({error}): copy this shard again"
                ) from None

    def _found(self, number: int, tar: "_Tar") -> _Found:
        rows, text, ends, passed = [], bytearray(), [], Passed()
        sample: dict[str, tarfile.TarInfo] = {}  # {extension: member}
        last = None

        def close() -> None:
            images = [one for kind, one in sample.items() if _is_image(kind)]
            if len(images) > 1:
                raise UserError(
                    f"{tar.path}: {images[0].name} and {images[1].name} are one sample, of two "
                    "images: which is meant? Write shards with one of them"
                )
            if not images:
                for member in sample.values():
                    passed.add("file without an image", member.name)
                return
            text.extend(os.fsencode(images[0].name))
            ends.append(len(text))
            label = self._label(sample, tar.read)
            rows.append((number, images[0].offset_data, images[0].size, label))
            for kind, member in sample.items():
                if not (_is_image(kind) or kind in ("cls", "json")):
                    passed.add(f".{kind}", member.name)

        while (member := tar.next()) is not None:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                passed.add("link, device or sparse file", member.name)
                continue
            if not stem or not extension:  # hidden files; names without an extension
                passed.add("file not named SAMPLE.EXTENSION", member.name)
                continue
            if (folder, stem) != last:
                close()
                sample, last = {}, (folder, stem)
            if extension.lower() in sample:
                raise UserError(f"{tar.path} holds {member.name} twice: write this shard again")
            sample[extension.lower()] = member
        close()
        return _Found(np.array(rows, MEMBER), bytes(text), ends, passed)

    def _label(
        self, sample: dict[str, tarfile.TarInfo], read: Callable[[tarfile.TarInfo], bytes]
    ) -> int:
        try:
            if self.label is None and "cls" in sample:
                return _class_number(int(read(sample["cls"])))
            if "json" in sample:
                known = json.loads(read(sample["json"]))
                for key in (self.label,) if self.label else KEYS:
                    if isinstance(known, dict) and key in known:
                        return _class_number(known[key])
        except ValueError:
            return UNREAD
        return UNLABELLED


class _Tar:
    """The members of a tar file, one after the other.

    Unlike tarfile alone it doesn't take a damaged header for the end. tarfile.TarError.
    """

    def __init__(self, path: str, file) -> None:
        self.path, self.file = path, file
        file.seek(0)
        self.tar = tarfile.TarFile(fileobj=file)

    def next(self) -> tarfile.TarInfo | None:
        if (member := self.tar.next()) is None:
            self.file.seek(self.tar.offset)
            if self.file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"it ends or is damaged at byte {self.tar.offset:,}")
        self.tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        self.file.seek(member.offset_data)
        return self.file.read(member.size)


def _is_image(extension: str) -> bool:
    return f".{extension}" in pictures.extensions()


def _class_number(label: object) -> int:
    is_number = isinstance(label, int) and not isinstance(label, bool)
    return label if is_number and 0 <= label < 2**31 else UNREAD  # type: ignore[operator, return-value]


def _bytes(text: bytearray) -> np.ndarray:
    return np.frombuffer(bytes(text), np.uint8)
