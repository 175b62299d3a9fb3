"""Image files as they are, of any size, behind an index: packed into one file, or where they lie.

    <cache>/<split.store_name>-packed/
        images.bin     the files' own bytes, one after the other, in no order
        entries.npy    ENTRY (N,): where each image is, its size, the digest of its bytes
        indices.npy    int64 (N,): the index in the split of each row
        meta.json      what was left out, what was noticed, digests of the two .npy files
    <cache>/<split.store_name>-index/   the same without images.bin: the bytes stay in their files

Every image is decoded once while the index is made, so that a damaged one is found before a
training begins. Its digest is compared whenever it is read. What a killed process has packed is
kept in NAME.unfinished, from where the next one goes on.
"""

import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
import xxhash

from ssl_bench.data import pictures
from ssl_bench.data.pictures import Noticed, Values
from ssl_bench.data.pool import run_chunks
from ssl_bench.data.store import (
    JOURNAL,
    OnError,
    Split,
    cannot_decode,
    check_room,
    digest_of,
    digest_of_file,
    free_bytes,
    lock_of,
    names_of,
    root_of,
    tell,
    try_read,
)
from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

ENTRY = np.dtype(
    [
        ("offset", "<i8"),  # in images.bin
        ("length", "<i8"),  # bytes
        ("digest", "<u8"),  # xxh3_64 of the bytes
        ("height", "<i4"),  # upright, in pixels
        ("width", "<i4"),
        ("turn", "u1"),  # EXIF orientation that a decoder of its JPEG must apply; else 1
        ("jpeg", "?"),  # decoded by libjpeg-turbo; else by PIL
    ]
)
BYTES, ENTRIES, INDICES, META = "images.bin", "entries.npy", "indices.npy", "meta.json"
SO_FAR = "so_far.npy"  # of a packing that isn't finished, beside its JOURNAL
COLOURS = ("YCbCr", "Gray", "RGB")  # of JPEGs that libjpeg-turbo gives as RGB; the rest is PIL's
# EXIF orientations that exchange top and bottom, left and right; those from 5 on first exchange
# rows and columns
UPSIDE_DOWN, MIRRORED = (3, 4, 7, 8), (2, 3, 6, 7)
QUALITY = 90  # of JPEGs that data.max_side= writes, as FFCV's recipe for ImageNet
STALE = 14 * 86_400  # seconds after which what a killed process had packed is removed


class Encoded:
    """An index of images, and their bytes.

    labels: int64 (N,), -1 where unlabelled. indices: int64 (N,), the index in the split of each.
    """

    def __init__(self, split: Split, directory: Path) -> None:
        self.split, self.directory = split, directory
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        if meta.pop("digest") != digest_of(meta):
            raise ValueError(f"{META} differs from its digest")
        for name, digest in meta["digests"].items():
            if digest_of_file(directory / name) != digest:
                raise ValueError(f"{name} differs from its digest")
        self.entries, self.indices = np.load(directory / ENTRIES), np.load(directory / INDICES)
        self.skipped = {int(index): why for index, why in meta["skipped"].items()}
        self.noticed = {kind: (count, first) for kind, (count, first) in meta["noticed"].items()}
        self.is_packed = meta["packed"]
        if self.is_packed and (directory / BYTES).stat().st_size != self.nbytes:
            raise ValueError(f"{BYTES} has another length")
        self.labels = split.labels_of(self.indices)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def _packed(self) -> np.ndarray:
        """The bytes of images.bin."""
        return np.memmap(self.directory / BYTES, np.uint8, "r")

    @property
    def nbytes(self) -> int:
        return int(self.entries["length"].sum())

    @property
    def sizes(self) -> np.ndarray:
        """int64 (N, 2): heights and widths."""
        return np.stack([self.entries["height"], self.entries["width"]], axis=1).astype(np.int64)

    @property
    def side(self) -> int | None:
        """The side of the images, if all are squares of one size."""
        first = int(self.entries["height"][0])
        alike = (self.entries["height"] == first) & (self.entries["width"] == first)
        return first if alike.all() else None

    def read(self, row: int) -> bytes | memoryview:
        """The bytes of an image. UserError if they aren't those that were indexed."""
        entry = self.entries[row]
        if self.is_packed:
            data = self._packed[entry["offset"] : entry["offset"] + entry["length"]].data
        else:
            data = self._in_file(row)
        if xxhash.xxh3_64_intdigest(data) != entry["digest"]:
            name = self.split.where(int(self.indices[row]))
            if not self.is_packed:
                raise UserError(
                    f"{name} has changed since it was indexed: delete {self.directory} to have all "
                    "images indexed again"
                )
            raise UserError(
                f"the packed images in {self.directory} are damaged ({name} differs from its "
                "digest): delete that folder to have them packed again"
            )
        return data

    def _in_file(self, row: int) -> bytes:
        data = try_read(self.split.file, int(self.indices[row]))
        if isinstance(data, str):
            raise UserError(cannot_decode(self.split, {int(self.indices[row]): data}))
        return data


def open_encoded(
    split: Split,
    values: Values,
    packed: bool,
    cache: str | Path | None = None,
    workers: int | None = None,
    on_error: OnError = "raise",
    max_side: int | None = None,
) -> Encoded:
    """The images of a split behind an index, which is made now if it isn't there yet.

    packed: their bytes are copied into the cache. values: how more than 8 bits are read. max_side:
    pictures of which a side is longer are made smaller and written as JPEGs of QUALITY.

    Processes that ask together index once. Raises UserError for an image that can't be decoded
    (unless on_error="skip": it is left out and logged), a file that can't be read, a full disk.
    """
    directory = place(split, packed, cache)
    try:
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(directory.parent)
            with lock_of(directory, wait=True):
                if not directory.is_dir():
                    task = _Examine(split.file, values, packed, max_side)
                    _index(split, task, directory, workers, on_error)
        store = _load(split, directory)
    except OSError as error:
        raise UserError(
            f"cannot index '{split.name}' in {directory.parent} ({error}); "
            "data.cache= sets the folder"
        ) from error
    tell(split, store.skipped, store.noticed, on_error, directory)
    return store


def _load(split: Split, directory: Path) -> Encoded:
    """UserError for files that aren't whole, or don't belong together."""
    try:
        store = Encoded(split, directory)
        if len(store) + len(store.skipped) != split.length:
            raise ValueError("it is of another number of images")
        return store
    except (FileNotFoundError, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        raise UserError(
            f"the index in {directory} is damaged ({error}); delete that folder to make it anew"
        ) from None


def place(split: Split, packed: bool, cache: str | Path | None = None) -> Path:
    return root_of(cache) / f"{split.store_name}-{'packed' if packed else 'index'}"


def has_room(split: Split, cache: str | Path | None = None, max_side: int | None = None) -> bool:
    """Are the split's files packed, or is there room to copy them?

    How much less those take that are made smaller isn't known beforehand: for them there is.
    """
    directory = place(split, True, cache)
    if directory.is_dir() or max_side is not None:
        return True
    return _need(split, directory) < free_bytes(root_of(cache))


def _need(split: Split, directory: Path) -> int:
    """The bytes that are still to be copied."""
    there = _unfinished(directory) / BYTES
    return split.nbytes - (there.stat().st_size if there.exists() else 0)


def _unfinished(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.unfinished")


def _remove_stale(root: Path) -> None:
    """Remove what was packed by a process that was killed long ago: nobody has gone on with it."""
    from filelock import Timeout

    for unfinished in root.glob("*.unfinished"):
        try:
            if time.time() - unfinished.stat().st_mtime > STALE:
                with lock_of(unfinished.with_suffix(""), wait=False):
                    shutil.rmtree(unfinished, ignore_errors=True)
        except (OSError, Timeout):
            pass  # gone, or being written now


def _index(
    split: Split,
    task: "_Examine",
    directory: Path,
    workers: int | None,
    on_error: OnError,
) -> None:
    if task.packed and task.max_side is None:
        check_room(split, _need(split, directory), directory.parent)
    with _Unfinished(_unfinished(directory), split.length, task.packed) as so_far:
        doing = "packing" if task.packed else "indexing"
        log.info("%s %s: %s images into %s", doing, split.name, f"{split.length:,}", directory)
        if task.max_side:
            log.info(
                "pictures with a side of more than %d pixels are made smaller, as JPEGs of "
                "quality %d",
                *(task.max_side, QUALITY),
            )
        if so_far.count:
            log.info("%d of them are there already", so_far.count)
        missing = so_far.missing()
        results = run_chunks(_Parts(task, missing), len(missing), workers, f"{doing} {split.name}")
        with closing(results):
            for start, _, (entries, data, skipped, noticed) in results:
                if skipped and on_error == "raise":
                    raise UserError(cannot_decode(split, skipped))
                so_far.add(missing[start : start + len(entries)], entries, data, skipped, noticed)
        if len(so_far.skipped) == split.length:
            raise UserError(
                f"none of the {split.length} images of '{split.name}' can be decoded: "
                f"{names_of(split, so_far.skipped, 1)}"
            )
        so_far.finish(split.name, directory)


@dataclass(frozen=True)
class _Parts:
    """A task on chunks of these images."""

    task: Callable[[np.ndarray], Any]
    images: np.ndarray  # int64 (n,)

    def __call__(self, start: int, stop: int) -> Any:
        return self.task(self.images[start:stop])


@dataclass(frozen=True)
class _Examine:
    """Reads and decodes some images.

    Returns their entries, with offsets in the bytes that come next (none unless `packed`), {index:
    reason} of those that can't be decoded, and the notes on the others.
    """

    read: Callable[[int], bytes]
    values: Values
    packed: bool
    max_side: int | None

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, bytes, dict[int, str], Noticed]:
        entries = np.zeros(len(images), ENTRY)
        parts, offset = [], 0
        bad: dict[int, str] = {}
        noticed: Noticed = {}
        for row, index in enumerate(images.tolist()):
            found = try_read(self._examined, index)
            if isinstance(found, str):
                bad[index] = found
                continue
            data, kinds, facts = found
            digest = xxhash.xxh3_64_intdigest(data)
            entries[row] = (offset, len(data), digest, *facts)
            pictures.note(noticed, kinds, index)
            if self.packed:
                parts.append(data)
                offset += len(data)
        return entries, b"".join(parts), bad, noticed

    def _examined(self, index: int) -> tuple[bytes, list[str], tuple[int, int, int, bool]]:
        """The bytes, the notes, and the last four of ENTRY."""
        data = self.read(index)
        kinds: list[str] = []
        pixels, turn = _by_turbo(data, kinds)
        is_jpeg = pixels is not None
        if pixels is None:
            pixels = pictures.decode(io.BytesIO(data), None, self.values, kinds)
        height, width = upright(pixels, turn).shape[:2]
        if self.max_side is not None and max(height, width) > self.max_side:
            data = smaller(upright(pixels, turn), self.max_side)
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            turn, is_jpeg = 1, True
        return data, kinds, (height, width, turn, is_jpeg)


def _by_turbo(data: bytes, kinds: list[str]) -> tuple[np.ndarray | None, int]:
    """(uint8 (H, W, 3) as stored, EXIF orientation) of a JPEG; (None, 1) where PIL is to decide."""
    from PIL import Image

    if data[:2] != b"\xff\xd8":
        return None, 1
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        if colour not in COLOURS or height * width > 2 * (Image.MAX_IMAGE_PIXELS or 0):
            return None, 1
        pixels = simplejpeg.decode_jpeg(data, strict=True)
        pictures.quieten()
        with Image.open(io.BytesIO(data)) as image:
            turn = pictures.orientation(image, kinds)
    except (ValueError, OSError):
        kinds.clear()
        return None, 1
    pictures.note_range(pixels, kinds)
    return pixels, turn


def smaller(pixels: np.ndarray, side: int) -> bytes:
    """A JPEG of a picture uint8 (H, W, 3), its longer side `side` pixels."""
    from PIL import Image

    height, width = pixels.shape[:2]
    longer = max(height, width)
    size = (max(1, round(width * side / longer)), max(1, round(height * side / longer)))
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    return simplejpeg.encode_jpeg(np.array(image), quality=QUALITY, colorsubsampling="420")


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """A picture (H, W, 3), turned as its EXIF orientation says: a view of its memory."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turn in UPSIDE_DOWN:
        pixels = pixels[::-1]
    if turn in MIRRORED:
        pixels = pixels[:, ::-1]
    return pixels


class _Unfinished:
    """What is packed so far: images.bin, SO_FAR with the entries of all, a line for each chunk.

    They stay as they are until the folder has its final name, so that a kill at any time costs no
    more than a chunk.
    """

    def __init__(self, directory: Path, length: int, packed: bool) -> None:
        self.directory, self.length, self.packed = directory, length, packed
        self.done = np.zeros(length, bool)
        self.skipped: dict[int, str] = {}
        self.noticed: Noticed = {}
        self.end = 0  # of what is known in images.bin

    def __enter__(self) -> "_Unfinished":
        self.directory.mkdir(exist_ok=True)
        entries, journal = self.directory / SO_FAR, self.directory / JOURNAL
        lines = []
        if entries.exists() and journal.exists():
            self.entries = np.load(entries, mmap_mode="r+")
            lines = list(self._known(journal))
        else:
            self.entries = np.lib.format.open_memmap(entries, "w+", ENTRY, (self.length,))
        self.journal = open(journal, "w", encoding="utf-8")
        for line in lines:
            self._write(line)
        self.images: BinaryIO | None = None
        if self.packed:
            path = self.directory / BYTES
            self.images = open(path, "r+b" if path.exists() else "w+b")
            self.images.truncate(self.end)
            self.images.seek(self.end)
        return self

    def __exit__(self, *_) -> None:
        self.journal.close()
        if self.images is not None:
            self.images.close()

    def _known(self, journal: Path) -> Iterator[dict]:
        """The chunks that a process before has left whole."""
        path = self.directory / BYTES
        data = np.memmap(path, np.uint8, "r") if path.exists() and path.stat().st_size else b""
        for text in journal.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                rows = np.array(line["rows"], np.int64)
                whole = line["digest"] == _digest(self.entries[rows])
            except (ValueError, KeyError, IndexError):
                return
            entries = self.entries[rows[~np.isin(rows, [*map(int, line["skipped"])])]]
            if not whole or (self.packed and not all(_is_there(data, entry) for entry in entries)):
                return
            self._take(line)
            yield line

    def _take(self, line: dict) -> None:
        self.done[line["rows"]] = True
        self.skipped |= {int(index): why for index, why in line["skipped"].items()}
        pictures.merge(self.noticed, line["noticed"])
        self.end = line["end"]

    def _write(self, line: dict) -> None:
        self.journal.write(json.dumps(line) + "\n")
        self.journal.flush()

    @property
    def count(self) -> int:
        return int(self.done.sum())

    def missing(self) -> np.ndarray:
        """int64 (n,): the images that are still to be read."""
        return np.flatnonzero(~self.done)

    def add(
        self,
        images: np.ndarray,
        entries: np.ndarray,
        data: bytes,
        skipped: dict[int, str],
        noticed: Noticed,
    ) -> None:
        if self.images is not None:
            self.images.write(data)
            self.images.flush()
        entries["offset"] += self.end
        self.entries[images] = entries
        line = {
            "rows": images.tolist(),
            "digest": _digest(entries),
            "skipped": {str(index): why for index, why in skipped.items()},
            "noticed": noticed,
            "end": self.end + len(data),
        }
        self._take(line)
        self._write(line)

    def finish(self, name: str, directory: Path) -> None:
        """Give the folder its final form and name."""
        keep = np.setdiff1d(np.arange(self.length), list(self.skipped))
        np.save(self.directory / ENTRIES, self.entries[keep])
        np.save(self.directory / INDICES, keep)
        meta = {
            "split": name,
            "packed": self.packed,
            "skipped": {str(index): self.skipped[index] for index in sorted(self.skipped)},
            "noticed": self.noticed,
            "digests": {one: digest_of_file(self.directory / one) for one in (ENTRIES, INDICES)},
        }
        meta["digest"] = digest_of(json.loads(json.dumps(meta)))
        (self.directory / META).write_text(json.dumps(meta), encoding="utf-8")
        self.__exit__()
        # a crash of the machine must not leave a complete folder with incomplete files
        for path in self.directory.iterdir():
            _sync(path)
        self.directory.rename(directory)
        _sync(directory.parent)
        for leftover in (SO_FAR, JOURNAL):
            (directory / leftover).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(entries: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(entries.tobytes())


def _is_there(data: np.ndarray | bytes, entry: np.void) -> bool:
    part = memoryview(data)[entry["offset"] : entry["offset"] + entry["length"]]
    return xxhash.xxh3_64_intdigest(part) == entry["digest"]
