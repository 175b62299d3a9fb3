"""Images decoded once into one memory-mapped uint8 array, reused by every later run.

    <cache>/<split.store_name>/
        images.npy     uint8 (N, H, W, 3)
        indices.npy    int64 (N,): the index in the split of each row
        digests.npy    uint64: xxh3_64 of each BLOCK rows
        meta.json      what was left out, what was noticed, digests of the files beside it
        verified       when the digests were last compared, and the files' sizes and times then

Labels stay with the split: two splits with the same pixels (pretrain and train of a labelled set)
share one store.
"""

import errno
import hashlib
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import xxhash

from ssl_bench import files
from ssl_bench.console import Bar
from ssl_bench.data import pictures
from ssl_bench.data.pictures import Noticed
from ssl_bench.data.pool import CHUNK, default_workers, run_chunks
from ssl_bench.errors import FULL, UserError

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
T = TypeVar("T")
LAYOUT = 2  # version of a store's files, part of its name: since 2 it has digests
BLOCK = CHUNK  # rows that a digest covers, and that are moved at once when gaps are closed
THUMBNAIL = 96  # pixels
LATELY = 600  # seconds for which a store is taken as whole after it was verified
SAMPLED = 16  # files that tell a set of images from another of the same names and sizes
SMALL_FILES = ("indices.npy", "digests.npy")  # each has one digest, in meta.json
FILES = ("images.npy", *SMALL_FILES, "meta.json")
JOURNAL = "chunks.jsonl"  # a line for each whole chunk of a packing that isn't finished
LEFT = 7 * 24 * 3600  # seconds for which the beginnings of another store are kept
VERIFIED = "verified"  # the file with the sizes and times of FILES when they were verified


@dataclass(frozen=True)
class Split:
    """A list of images that nobody has decoded yet.

    store_name: a file name with a digest of all that decides the pixels: sources, image size.
    fingerprint: hex digest of the files' names and sizes, the labels and the image size; a copy of
    the files has the same. origin: the same without the image size.
    read: index -> uint8 (image_size, image_size, 3), or (H, W, 3) where images are taken as they
    are; picklable, for worker processes.
    where: index -> the path or name to show a person.
    encoded: index -> the bytes of an image file, picklable; None where images aren't files. nbytes:
    of all these together.
    """

    name: str  # "pretrain" | "train" | "val"
    length: int
    labels: np.ndarray | None  # int64 (length,); None when unlabelled
    store_name: str
    fingerprint: str
    origin: str
    read: Callable[[int], np.ndarray]
    where: Callable[[int], str]
    encoded: Callable[[int], bytes] | None = None
    nbytes: int = 0

    def file(self, index: int) -> bytes:
        """What the file of an image holds."""
        assert self.encoded is not None
        return self.encoded(index)

    def facts(self) -> dict[str, Any]:
        """What tells these images from others, however they are called, wherever they are.

        {"fingerprint": hex digits, "images": their number, "sample": hex digits of what SAMPLED of
        the files hold, "" where images aren't files}.
        """
        some = np.unique(np.linspace(0, self.length - 1, SAMPLED, dtype=int)).tolist()
        held = hashlib.sha256()
        for index in some if self.encoded else ():
            found = try_read(self.file, index)  # of what can't be read, why
            held.update(
                hashlib.sha256(found.encode() if isinstance(found, str) else found).digest()
            )
        sample = held.hexdigest() if self.encoded else ""
        return {"fingerprint": self.fingerprint, "images": self.length, "sample": sample}

    def small(self, index: int) -> np.ndarray:
        """An image to look at: uint8 (h, h, 3); of one that was left as it is, the centre."""
        pixels = self.read(index)
        if self.encoded is None or pixels.shape[0] == pixels.shape[1] <= THUMBNAIL:
            return pixels
        from PIL import Image

        return pictures.centre_square(Image.fromarray(pixels), THUMBNAIL)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """int64, -1 where unlabelled."""
        return np.full(len(indices), -1, np.int64) if self.labels is None else self.labels[indices]


@dataclass(frozen=True)
class Store:
    images: np.memmap  # uint8 (N, H, W, 3), read-only
    labels: np.ndarray  # int64 (N,), -1 where unlabelled
    indices: np.ndarray  # int64 (N,), index in the split of each row
    directory: Path


def cache_folder(kind: str) -> Path:
    """$SSL_BENCH_CACHE/kind or ~/.cache/ssl_bench/kind: for what can be had again."""
    return Path(os.environ.get("SSL_BENCH_CACHE") or "~/.cache/ssl_bench").expanduser() / kind


def open_store(
    split: Split,
    image_size: int,
    cache: str | Path | None = None,
    workers: int | None = None,
    on_error: OnError = "raise",
    verify: bool = True,
) -> Store:
    """The packed images of a split, packed now if they aren't yet.

    Processes that ask together pack once.

    verify: read the whole store and compare it with its digests, unless some process (another rank,
    or member of a sweep) did so in the last LATELY seconds and no file was written since. A damaged
    store is logged and packed again. What a disk loses within these seconds, without a write, shows
    when the store is verified next.

    Raises UserError for an image that can't be decoded (unless on_error="skip": it is left out and
    logged), a file that can't be read, a full disk.
    """
    directory = place(split, cache)
    try:
        if not directory.is_dir() or (verify and not _lately(directory)):
            _ensure(split, image_size, directory, workers, on_error)
        loaded = _load(split, image_size, directory)
    except OSError as error:
        raise UserError(
            f"cannot pack '{split.name}' into {directory.parent} ({error}); "
            "data.cache= sets the folder"
        ) from error
    if loaded is None:
        raise UserError(
            f"the packed images in {directory} are damaged; delete that folder to pack them again"
        )
    store, skipped, noticed = loaded
    tell(split, skipped, noticed, on_error, directory)
    return store


def tell(
    split: Split,
    skipped: dict[int, str],
    noticed: Noticed,
    on_error: OnError,
    directory: Path,
) -> None:
    """Log what was left out and noticed; UserError if nothing was to be left out.

    directory: where that is written, with the reasons as they were then.
    """
    if skipped and on_error == "raise":
        raise UserError(cannot_decode(split, skipped))
    if skipped:
        log.warning(
            "'%s': %d of %d images are left out: %s; delete %s to try them again",
            split.name,
            len(skipped),
            split.length,
            names_of(split, skipped, 10),
            directory,
        )
    pictures.tell(noticed, split.name, split.where, set())


def _ensure(
    split: Split, image_size: int, directory: Path, workers: int | None, on_error: OnError
) -> None:
    """Pack the store if it isn't there, and again if it is damaged."""
    root = directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root, _partial(directory), LEFT)
        lock = lock_of(directory, wait=True)
    except OSError:
        if not directory.is_dir():
            raise
        lock = None  # somebody else's, to be read only
    with lock or nullcontext():
        if directory.is_dir():
            if _lately(directory):  # another process was faster
                return
            stamps = _stamps(directory)  # taken before: a write during the reading isn't verified
            why = damage(directory)
            if why:
                log.warning(
                    "the packed images in %s are damaged: %s; packing %s again",
                    directory,
                    why,
                    split.name,
                )
                if lock is None:
                    raise UserError(
                        f"the packed images in {directory} are damaged ({why}), "
                        "and that folder can't be written: have it deleted, or set data.cache="
                    )
                shutil.rmtree(directory)
        if not directory.is_dir():
            _pack(split, image_size, directory, workers, on_error)
            stamps = _stamps(directory)
        with suppress(OSError):
            files.write(directory / VERIFIED, json.dumps(stamps))


def _lately(directory: Path) -> bool:
    """Was the store verified in the last LATELY seconds, with its files as they are now?"""
    stamp = directory / VERIFIED
    try:
        fresh = 0 <= time.time() - stamp.stat().st_mtime < LATELY
        return fresh and json.loads(stamp.read_text(encoding="utf-8")) == _stamps(directory)
    except (OSError, ValueError):
        return False


def _stamps(directory: Path) -> dict[str, list[int]]:
    """Size and time of the last write (ns) of each of FILES that is there."""
    known = {name: (directory / name).stat() for name in FILES if (directory / name).exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in known.items()}


def damage(directory: Path) -> str:
    """How a store differs from its digests, in words; "" if it doesn't. Reads all of it."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("digest") != digest_of(meta):
            return "meta.json differs from its digest"
        for name in SMALL_FILES:
            if digest_of_file(directory / name) != meta["digests"][name]:
                return f"{name} differs from its digest"
        images = np.load(directory / "images.npy", mmap_mode="r")
        digests = np.load(directory / "digests.npy")
        if len(digests) != _blocks(len(images)):
            return "images.npy has another length than its digests"
        wrong = _wrong_blocks(images, digests, directory)
        if wrong:
            first = wrong[0] * BLOCK
            rows = f"rows {first:,} to {min(first + BLOCK, len(images)) - 1:,}"
            more = f", and {len(wrong) - 1} blocks more" if len(wrong) > 1 else ""
            return f"{rows} of images.npy differ from their digest{more}"
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wrong_blocks(images: np.ndarray, digests: np.ndarray, directory: Path) -> list[int]:
    """The blocks of rows that differ from their digests. Says how far it is."""
    wrong = []
    title = f"verifying {directory}"
    # xxhash and the disk release the interpreter's lock
    with (
        ThreadPoolExecutor(min(8, default_workers())) as threads,
        Bar(len(digests), title, unit="blocks") as progress,
    ):
        found = threads.map(lambda block: _digest_rows(images, block), range(len(digests)))
        for block, digest in enumerate(found):
            if digest != digests[block]:
                wrong.append(block)
            progress.add()
    return wrong


def _blocks(rows: int) -> int:
    """How many blocks so many rows make; the last may be shorter."""
    return -(-rows // BLOCK)


def _digest_rows(images: np.ndarray, block: int) -> int:
    return xxhash.xxh3_64_intdigest(images[block * BLOCK : (block + 1) * BLOCK].data)


def digest_of_file(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def digest_of(meta: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


def lock_of(directory: Path, wait: bool):
    """The right to write this store; filelock.Timeout if another process has it, unless `wait`."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{directory}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
    log.info("waiting for another process to pack %s", directory)
    return lock.acquire()


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


def _remove_leftovers(root: Path, wanted: Path, seconds: float) -> None:
    """Remove half-written stores that nobody has gone on with for so long, but for `wanted`."""
    from filelock import Timeout

    for partial in root.glob("*.partial"):
        if partial == wanted or time.time() - _stat(partial / JOURNAL, "st_mtime") < seconds:
            continue
        try:
            with lock_of(partial.with_suffix(""), wait=False):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            pass  # being written now


def progress(cache: str | Path | None) -> list[str]:
    """What is packed in a cache, and how far what isn't finished: another list as that goes on."""
    return sorted(
        f"{path.name} {_stat(path / JOURNAL, 'st_size')}"
        for path in root_of(cache).glob("*")
        if path.is_dir()
    )


def _stat(path: Path, name: str) -> Any:
    """0 where there is no such file, as of a packing that has ended just now."""
    try:
        return getattr(path.stat(), name)
    except FileNotFoundError:
        return 0


def has_room(split: Split, image_size: int, cache: str | Path | None = None) -> bool:
    """Is the split packed, or is there room to pack it?"""
    root = root_of(cache)
    store = root / split.store_name
    return store.is_dir() or _need(split, image_size, _partial(store)) < free_bytes(root)


def check_room(split: Split, need: int, root: Path) -> None:
    """UserError unless `need` bytes are free where the split is to be packed."""
    if (free := free_bytes(root)) < need:
        raise UserError(
            f"packing {split.name} ({split.length:,} images) needs {size(need)} and "
            f"{root} has {size(free)} free; set data.cache= to a folder on a "
            "larger disk, or source=streamed"
        )


def size(nbytes: int) -> str:
    """As a person reads it."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def place(split: Split, cache: str | Path | None = None) -> Path:
    """The folder of a split's packed images, whether they are there or not."""
    return root_of(cache) / split.store_name


def root_of(cache: str | Path | None) -> Path:
    return Path(cache) if cache else cache_folder("stores")


def _need(split: Split, image_size: int, partial: Path) -> int:
    """Bytes of the packed images and their indices, but for what an earlier packing has left."""
    left = 512 * _stat(partial / "images.npy", "st_blocks")
    return split.length * (image_size * image_size * 3 + 8) - left


def free_bytes(root: Path) -> int:
    """Bytes free on the disk where `root` is or would be made."""
    nearest = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    return shutil.disk_usage(nearest).free


def _pack(
    split: Split, image_size: int, directory: Path, workers: int | None, on_error: OnError
) -> None:
    partial = _partial(directory)
    need = _need(split, image_size, partial)
    if free_bytes(directory.parent) < need:
        _remove_leftovers(directory.parent, partial, 0)
    check_room(split, need, directory.parent)
    log.info("packing %s: %s images into %s", split.name, f"{split.length:,}", directory)
    try:
        partial.mkdir(exist_ok=True)
        shape = (split.length, image_size, image_size, 3)
        header = _reserve(partial / "images.npy", shape)
        task = _Decode(split.read, str(partial / "images.npy"), header, shape[1:])
        skipped: dict[int, str] = {}
        noticed: Noticed = {}
        digests = np.zeros(_blocks(split.length), np.uint64)
        known = _known(partial)
        for line in known.values():
            digests[line["start"] // BLOCK] = line["digest"]
            pictures.merge(noticed, line["noticed"])
        lines = [json.dumps(line) + "\n" for line in known.values()]
        files.write(partial / JOURNAL, "".join(lines))
        title = f"packing {split.name}"
        results = run_chunks(task, split.length, workers, title, known.keys())
        with open(partial / JOURNAL, "a", encoding="utf-8") as journal, closing(results):
            if known:
                there = sum(min(BLOCK, split.length - start) for start in known)
                log.info("%s of them are there already", f"{there:,}")
            for start, _, (bad, more, digest) in results:
                digests[start // BLOCK] = digest
                skipped |= bad
                if bad and on_error == "raise":
                    raise UserError(cannot_decode(split, skipped))
                pictures.merge(noticed, more)
                if not bad:  # what couldn't be decoded is tried again
                    line = {"start": start, "noticed": more, "digest": digest}
                    journal.write(json.dumps(line) + "\n")
                    journal.flush()
        if len(skipped) == split.length:
            shutil.rmtree(partial)
            raise UserError(
                f"none of the {split.length} images of '{split.name}' can be decoded: "
                f"{names_of(split, skipped, 1)}"
            )
        keep = np.arange(split.length)
        if skipped:
            keep = np.setdiff1d(keep, list(skipped))
        _keep_rows(partial / "images.npy", keep)
        np.save(partial / "indices.npy", keep)
        if skipped:  # rows have moved
            images = np.load(partial / "images.npy", mmap_mode="r")
            blocks = range(_blocks(len(images)))
            digests = np.array([_digest_rows(images, block) for block in blocks], np.uint64)
        np.save(partial / "digests.npy", digests)
        reasons = {str(index): skipped[index] for index in sorted(skipped)}
        meta = {"split": split.name, "skipped": reasons, "noticed": noticed}
        meta["digests"] = {name: digest_of_file(partial / name) for name in SMALL_FILES}
        meta["digest"] = digest_of(json.loads(json.dumps(meta)))
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        # a crash of the machine must not leave a complete folder with incomplete files
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        (partial / JOURNAL).unlink()
        partial.rename(directory)
    except OSError as error:  # after what else ends it, the next one goes on
        if error.errno in FULL:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _reserve(path: Path, shape: tuple[int, ...]) -> int:
    """Where row 0 begins in images.npy, which is made unless an earlier packing has left it."""
    wanted = io.BytesIO()
    header = _write_header(wanted, shape)
    if path.exists() and path.stat().st_size == header + math.prod(shape):
        with open(path, "rb") as file:
            if file.read(header) == wanted.getvalue():
                return header
    with open(path, "wb") as file:
        file.write(wanted.getvalue())
        file.truncate(header + math.prod(shape))
    return header


def _known(partial: Path) -> dict[int, dict[str, Any]]:
    """{start: line of the journal} of the chunks that an earlier packing has left whole."""
    if not (journal := partial / JOURNAL).exists():
        return {}
    images = np.load(partial / "images.npy", mmap_mode="r")
    known = {}
    for text in journal.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            whole = _digest_rows(images, line["start"] // BLOCK) == line["digest"]
        except (ValueError, KeyError, TypeError):  # the last line, which a kill has torn
            continue
        if whole:
            known[line["start"]] = line
    return known


def try_read(read: Callable[[int], T], index: int) -> T | str:
    """An image, or why it can't be decoded. UserError for a missing file or a failing disk."""
    try:
        return read(index)
    except Exception as error:  # PIL raises many kinds for a file that isn't whole
        if isinstance(error, OSError) and error.errno is not None:  # PIL's own errors have none
            if error.errno == errno.EACCES:
                return "it may not be read"
            if error.errno == errno.ENOENT and os.path.islink(error.filename or ""):
                return "a link to nowhere"
            raise UserError(
                f"cannot read an image ({error}); did the data change meanwhile?"
            ) from None
        return " ".join(str(error).split())[:200] or type(error).__name__


def take_noticed(read: Callable[[int], np.ndarray]) -> Noticed:
    """The notes of `read` since they were taken last; none if it takes no notes."""
    noticed = getattr(read, "noticed", {})
    taken = dict(noticed)
    noticed.clear()
    return taken


@dataclass(frozen=True)
class DecodeRows:
    """The images of some indices, for streaming.

    Returns (pixels (n, H, W, 3), or None if one can't be decoded; indices; {index: reason} of those
    that can't be decoded; notes). on_error="skip": the next image that can be decoded takes the
    place of one that can't.
    """

    read: Callable[[int], np.ndarray]
    length: int
    on_error: OnError

    def __call__(
        self, wanted: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray, dict[int, str], Noticed]:
        images, rows, bad = [], [], {}
        tries = self.length if self.on_error == "skip" else 1
        for index in wanted.tolist():
            for candidate in range(index, index + tries):
                row = candidate % self.length
                image = try_read(self.read, row)
                if not isinstance(image, str):
                    break
                bad[row] = image
            else:
                return None, wanted, bad, {}
            images.append(image)
            rows.append(row)
        return np.stack(images), np.array(rows), bad, take_noticed(self.read)


@dataclass(frozen=True)
class _Decode:
    """Decode a chunk and write its rows in their place.

    Returns {index: reason} of the images that can't be decoded, the notes on the others, and the
    digest of the rows.
    """

    read: Callable[[int], np.ndarray]
    path: str
    offset: int  # where row 0 begins in the file
    shape: tuple[int, int, int]  # of an image

    def __call__(self, start: int, stop: int) -> tuple[dict[int, str], Noticed, int]:
        rows = np.zeros((stop - start, *self.shape), np.uint8)
        bad = {}
        for index in range(start, stop):
            image = try_read(self.read, index)
            if isinstance(image, str):
                bad[index] = image
                continue
            assert image.shape == self.shape, f"image {index} is {image.shape}, not {self.shape}"
            assert image.dtype == np.uint8, f"image {index} is {image.dtype}"
            rows[index - start] = image
        position = self.offset + start * rows[0].size
        data = memoryview(rows).cast("B")
        with open(self.path, "r+b", buffering=0) as file:
            while data:  # a write may be short
                written = os.pwrite(file.fileno(), data, position)
                position += written
                data = data[written:]
        return bad, take_noticed(self.read), xxhash.xxh3_64_intdigest(rows.data)


def _write_header(file, shape: tuple[int, ...]) -> int:
    """Write the .npy header of a uint8 array at the start of `file`; return its size in bytes."""
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _keep_rows(path: Path, keep: np.ndarray) -> None:
    """Keep only these rows (ascending) of an .npy file, in place."""
    images = np.load(path, mmap_mode="r+")
    if len(keep) == len(images):
        return
    for start in range(0, len(keep), BLOCK):  # never overtakes: keep[i] >= i
        rows = keep[start : start + BLOCK]
        images[start : start + len(rows)] = images[rows]
    shape = (len(keep), *images.shape[1:])
    images.flush()
    with open(path, "r+b") as file:
        # numpy pads the header so that the length may change
        assert _write_header(file, shape) == images.offset
        file.truncate(images.offset + math.prod(shape))


def _load(
    split: Split, image_size: int, directory: Path
) -> tuple[Store, dict[int, str], Noticed] | None:
    """The store, why images were left out, and the notes; None if the files don't fit together."""
    try:
        images = np.load(directory / "images.npy", mmap_mode="r")
        indices = np.load(directory / "indices.npy")
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        skipped = {int(index): why for index, why in meta["skipped"].items()}
        noticed = {kind: (count, first) for kind, (count, first) in meta["noticed"].items()}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    whole = len(indices) + len(skipped) == split.length
    if images.shape != (len(indices), image_size, image_size, 3) or not whole:
        return None
    return Store(images, split.labels_of(indices), indices, directory), skipped, noticed


def names_of(split: Split, bad: dict[int, str], most: int) -> str:
    """The first of these images, each with the reason, and how many more there are."""
    names = [f"{split.where(index)} ({bad[index]})" for index in sorted(bad)[:most]]
    more = f", and {len(bad) - most} more" if len(bad) > most else ""
    return ", ".join(names) + more


def cannot_decode(split: Split, bad: dict[int, str]) -> str:
    """The error for images that can't be decoded."""
    return (
        f"cannot decode {names_of(split, bad, 3)}; mend or remove, or leave such images out with "
        "data.on_error=skip"
    )
