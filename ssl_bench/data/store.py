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
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from ssl_bench import files
from ssl_bench.data import pictures
from ssl_bench.data.pictures import Noticed
from ssl_bench.data.pool import CHUNK, LOG_SECONDS, default_workers, run_chunks
from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
LAYOUT = 2  # of the files of a store, part of its name: since 2 it has digests
BLOCK = CHUNK  # rows of a digest, and moved at once when gaps are closed
LATELY = 600  # seconds for which a store that was verified is taken as whole
FILES = ("images.npy", "indices.npy", "digests.npy", "meta.json")
VERIFIED = "verified"  # FILES as they were then


@dataclass(frozen=True)
class Split:
    """A list of images that nobody has decoded yet."""

    name: str  # "pretrain" | "train" | "val"
    length: int
    labels: np.ndarray | None  # int64 (length,); None when unlabelled
    store_name: str  # a file name with a digest of all that decides the pixels: sources, image size
    # hex digest by names and sizes of the files, and the labels: a copy has the same
    fingerprint: str
    origin: str  # the same, whatever size the images are packed at
    # index -> uint8 (image_size, image_size, 3); picklable, for worker processes
    read: Callable[[int], np.ndarray]
    where: Callable[[int], str]  # index -> the path or name to show a person

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
    """The packed images of a split, packed now if they aren't yet. Processes that ask together pack
    once.

    verify: read all of it and compare it with its digests, unless some process did so in the last
    LATELY seconds, as another rank or member of a sweep, and no file of it was written since; what
    is damaged is named and packed again. What a disk loses within these seconds, without a write,
    shows when it is verified next.

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
    if skipped and on_error == "raise":
        raise UserError(cannot_decode(split, skipped))
    if skipped:
        log.warning(
            "'%s': %d of %d images are left out: %s",
            split.name,
            len(skipped),
            split.length,
            _names(split, skipped, 10),
        )
    pictures.tell(noticed, split.name, split.where, set())
    return store


def _ensure(
    split: Split, image_size: int, directory: Path, workers: int | None, on_error: OnError
) -> None:
    """The store is there and whole."""
    root = directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        lock = _lock(directory, wait=True)
    except OSError:
        if not directory.is_dir():
            raise
        lock = None  # somebody else's, to be read only
    with lock or nullcontext():
        if directory.is_dir():
            if _lately(directory):  # another process was faster
                return
            # of before: what is written while it is read isn't verified
            stamps = _stamps(directory)
            if why := damage(directory):
                log.warning(
                    "the packed images in %s are damaged: %s; packing '%s' again",
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
    """Was it verified in the last seconds, as it is now?"""
    stamp = directory / VERIFIED
    try:
        fresh = 0 <= time.time() - stamp.stat().st_mtime < LATELY
        return fresh and json.loads(stamp.read_text(encoding="utf-8")) == _stamps(directory)
    except (OSError, ValueError):
        return False


def _stamps(directory: Path) -> dict[str, list[int]]:
    """Size and time of the last write (ns) of each file that the digests are of."""
    known = {name: (directory / name).stat() for name in FILES if (directory / name).exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in known.items()}


def damage(directory: Path) -> str:
    """What of a store differs from its digests, in words; "" where nothing does. Reads all of it,
    in threads.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("digest") != _digest_of(meta):
            return "meta.json differs from its digest"
        for name in ("indices.npy", "digests.npy"):
            if xxhash.xxh3_64_hexdigest((directory / name).read_bytes()) != meta["digests"][name]:
                return f"{name} differs from its digest"
        images, digests = (
            np.load(directory / "images.npy", mmap_mode="r"),
            np.load(directory / "digests.npy"),
        )
        if len(digests) != -(-len(images) // BLOCK):
            return "images.npy has another length than its digests"
        began = logged = time.monotonic()
        wrong = []
        with ThreadPoolExecutor(
            min(8, default_workers())
        ) as threads:  # xxhash and the disk leave the interpreter alone
            for block, found in enumerate(
                threads.map(lambda i: _digest_rows(images, i), range(len(digests)))
            ):
                if found != digests[block]:
                    wrong.append(block)
                if (now := time.monotonic()) - logged > LOG_SECONDS:
                    logged, done = now, (block + 1) / len(digests)
                    log.info(
                        "verifying %s: %.0f %%, %.0f s left",
                        directory,
                        100 * done,
                        (now - began) / done - now + began,
                    )
        if wrong:
            first = wrong[0] * BLOCK
            rows = f"rows {first:,} to {min(first + BLOCK, len(images)) - 1:,}"
            return f"{rows} of images.npy differ from their digest" + (
                f", and {len(wrong) - 1} blocks more" * (len(wrong) > 1)
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _digest_rows(images: np.ndarray, block: int) -> int:
    return xxhash.xxh3_64_intdigest(images[block * BLOCK : (block + 1) * BLOCK].data)


def _digest_of(meta: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _lock(directory: Path, wait: bool):
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


def _remove_leftovers(root: Path) -> None:
    """Remove what killed packers left: a half-written store whose lock is free."""
    from filelock import Timeout

    for partial in root.glob("*.partial"):
        try:
            with _lock(partial.with_suffix(""), wait=False):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            pass  # being written now


def has_room(split: Split, image_size: int, cache: str | Path | None = None) -> bool:
    """Is the split packed, or is there room to pack it?"""
    root = _root(cache)
    return (root / split.store_name).is_dir() or _need(split, image_size) < _free(root)


def place(split: Split, cache: str | Path | None = None) -> Path:
    """The folder of its packed images, whether they are there or not."""
    return _root(cache) / split.store_name


def _root(cache: str | Path | None) -> Path:
    return Path(cache) if cache else cache_folder("stores")


def _need(split: Split, image_size: int) -> int:
    return split.length * (image_size * image_size * 3 + 8)


def _free(root: Path) -> int:
    return shutil.disk_usage(
        next(path for path in (root, *root.absolute().parents) if path.is_dir())
    ).free


def _pack(
    split: Split, image_size: int, directory: Path, workers: int | None, on_error: OnError
) -> None:
    need, free = _need(split, image_size), _free(directory.parent)
    if free < need:
        raise UserError(
            f"packing '{split.name}' ({split.length} images) needs {need / 1e9:.1f} GB and "
            f"{directory.parent} has {free / 1e9:.1f} GB free; set data.cache= to a folder on a "
            "larger disk, or source=streamed"
        )
    log.info("packing '%s': %d images into %s", split.name, split.length, directory)
    partial = _partial(directory)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        shape = (split.length, image_size, image_size, 3)
        with open(partial / "images.npy", "wb") as file:
            header = _write_header(file, shape)
            file.truncate(header + math.prod(shape))
        task = _Decode(split.read, str(partial / "images.npy"), header, shape[1:])
        skipped: dict[int, str] = {}
        noticed: Noticed = {}
        digests = np.zeros(-(-split.length // BLOCK), np.uint64)
        results = run_chunks(task, split.length, workers, f"packing {split.name}")
        try:
            for start, _, (bad, more, digest) in results:
                digests[start // BLOCK] = digest
                skipped |= bad
                pictures.merge(noticed, more)
                if bad and on_error == "raise":
                    raise UserError(cannot_decode(split, skipped))
        finally:
            results.close()
        if len(skipped) == split.length:
            raise UserError(
                f"none of the {split.length} images of '{split.name}' can be decoded: "
                f"{_names(split, skipped, 1)}"
            )
        keep = (
            np.setdiff1d(np.arange(split.length), list(skipped))
            if skipped
            else np.arange(split.length)
        )
        _keep_rows(partial / "images.npy", keep)
        np.save(partial / "indices.npy", keep)
        if skipped:  # rows have moved
            images = np.load(partial / "images.npy", mmap_mode="r")
            digests = np.array(
                [_digest_rows(images, i) for i in range(-(-len(images) // BLOCK))], np.uint64
            )
        np.save(partial / "digests.npy", digests)
        reasons = {str(index): skipped[index] for index in sorted(skipped)}
        meta = {"split": split.name, "skipped": reasons, "noticed": noticed}
        sums = {
            name: xxhash.xxh3_64_hexdigest((partial / name).read_bytes())
            for name in ("indices.npy", "digests.npy")
        }
        meta |= {"digests": sums}
        meta |= {"digest": _digest_of(json.loads(json.dumps(meta)))}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        # a crash of the machine must not leave a complete folder with incomplete files
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def try_read(read: Callable[[int], np.ndarray], index: int) -> np.ndarray | str:
    """An image, or why it can't be decoded. UserError for a missing file or a failing disk."""
    try:
        return read(index)
    except Exception as error:  # PIL raises many kinds for a file that isn't whole
        if isinstance(error, OSError) and error.errno is not None:  # PIL's own errors carry none
            if error.errno == errno.EACCES:
                return "it may not be read"
            if error.errno == errno.ENOENT and os.path.islink(error.filename or ""):
                return "a link to nowhere"
            raise UserError(
                f"cannot read an image ({error}); did the data change meanwhile?"
            ) from None
        return " ".join(str(error).split())[:200] or type(error).__name__


def take_noticed(read: Callable[[int], np.ndarray]) -> Noticed:
    """What `read` has noted since it was asked last, if it notes anything."""
    noticed = getattr(read, "noticed", {})
    taken = dict(noticed)
    noticed.clear()
    return taken


@dataclass(frozen=True)
class DecodeRows:
    """Images of these indices, for streaming: (pixels (n, H, W, 3) or None, indices, {index:
    reason}, noticed).

    on_error="skip": in the place of one that can't be decoded comes the next that can.
    """

    read: Callable[[int], np.ndarray]
    length: int
    on_error: OnError

    def __call__(
        self, wanted: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray, dict[int, str], Noticed]:
        images, rows, bad = [], [], {}
        for index in wanted.tolist():
            for candidate in range(index, index + (self.length if self.on_error == "skip" else 1)):
                image = try_read(self.read, candidate % self.length)
                if not isinstance(image, str):
                    break
                bad[candidate % self.length] = image
            else:
                return None, wanted, bad, {}
            images.append(image)
            rows.append(candidate % self.length)
        return np.stack(images), np.array(rows), bad, take_noticed(self.read)


@dataclass(frozen=True)
class _Decode:
    """Decode a chunk and write its rows in their place.

    Returns {index: reason} of the images that can't be decoded, what `read` noticed of the others,
    and the digest of the rows.
    """

    read: Callable[[int], np.ndarray]
    path: str
    offset: int  # of row 0 in the file
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
        position, data = self.offset + start * rows[0].size, memoryview(rows).cast("B")
        with open(self.path, "r+b", buffering=0) as file:
            while data:  # a write may be short
                written = os.pwrite(file.fileno(), data, position)
                position, data = position + written, data[written:]
        return bad, take_noticed(self.read), xxhash.xxh3_64_intdigest(rows.data)


def _write_header(file, shape: tuple[int, ...]) -> int:
    """Write the .npy header of a uint8 array at the start of `file`; return its size in bytes."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.tell()


def _keep_rows(path: Path, keep: np.ndarray) -> None:
    """Keep only these rows (ascending) of an .npy file, in place."""
    images = np.load(path, mmap_mode="r+")
    if len(keep) == len(images):
        return
    for start in range(0, len(keep), BLOCK):  # never overtakes: keep[i] >= i
        rows = keep[start : start + BLOCK]
        images[start : start + len(rows)] = images[rows]
    offset, row, shape = images.offset, images[0].size, (len(keep), *images.shape[1:])
    images.flush()
    with open(path, "r+b") as file:
        # numpy pads the header so that the length may change
        assert _write_header(file, shape) == offset
        file.truncate(offset + len(keep) * row)


def _load(
    split: Split, image_size: int, directory: Path
) -> tuple[Store, dict[int, str], Noticed] | None:
    """None where the files don't fit each other."""
    try:
        images = np.load(directory / "images.npy", mmap_mode="r")
        indices = np.load(directory / "indices.npy")
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        skipped = {int(index): why for index, why in meta["skipped"].items()}
        noticed = {kind: (count, first) for kind, (count, first) in meta["noticed"].items()}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if (
        images.shape != (len(indices), image_size, image_size, 3)
        or len(indices) + len(skipped) != split.length
    ):
        return None
    return Store(images, split.labels_of(indices), indices, directory), skipped, noticed


def _names(split: Split, bad: dict[int, str], most: int) -> str:
    names = [f"{split.where(index)} ({bad[index]})" for index in sorted(bad)[:most]]
    return ", ".join(names) + (f", and {len(bad) - most} more" if len(bad) > most else "")


def cannot_decode(split: Split, bad: dict[int, str]) -> str:
    """What to tell a person of images that can't be decoded."""
    return (
        f"cannot decode {_names(split, bad, 3)}; mend or remove, or leave such images out with "
        "data.on_error=skip"
    )
