"""The base of all data sets: splits, their digests, their packed stores."""

import copy
import csv
import hashlib
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ssl_bench.config.fields import BitDepth, Place, ValueRange
from ssl_bench.data import encoded, synthetic
from ssl_bench.data.encoded import Encoded, open_encoded
from ssl_bench.data.formats.paths import Decoder, Files
from ssl_bench.data.pictures import Values
from ssl_bench.data.store import LAYOUT, OnError, Split, Store, has_room, open_store
from ssl_bench.errors import UserError

# Version of the decoding of image files: raise it when pixels change, so that packed stores are
# made anew.
VERSION = 2
SplitName = Literal["pretrain", "train", "val"]


class Dataset(ABC):
    """Up to three splits: "pretrain" (no labels), "train" and "val".

    `image_size`: of the squares that the images become; None: they stay as they are. `on_error`:
    "raise" or "skip" images that can't be decoded. `cache`: folder of the packed stores, by default
    $SSL_BENCH_CACHE/stores or ~/.cache/ssl_bench/stores. `workers`: packing processes, by default
    one a CPU.
    """

    kind = ""  # names its packed stores; by default what the class is called
    class_names: Sequence[str] = ()  # in the order of the class numbers; empty if they have none
    root = "."  # where index files are looked for
    extra: Sequence[str] = ()  # an index file and its label file
    values = Values()  # how its image files' values are to be read
    max_side: int | None = None  # pixels; image files are made smaller that are larger
    in_shards = False  # do its images lie in few large files, as if packed?
    listed_at_once = True  # by names alone; False: files are read for it
    draft = False  # large JPEGs are decoded at a part of their size

    def __init__(
        self,
        image_size: int | None,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: int | None = None,
    ):
        self.image_size, self.on_error = image_size, on_error
        self.cache, self.workers = cache, workers
        self._splits: dict[str, Split] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """None if there are no labels. Raises UserError for labels that can't be read."""

    @abstractmethod
    def _list(self, name: str) -> Split: ...

    @property
    def side(self) -> int:
        """The size of the images where it is one."""
        assert self.image_size is not None
        return self.image_size

    def split(self, name: SplitName) -> Split:
        """List the images of a split and check its labels; decodes nothing. Raises UserError."""
        if name not in synthetic.SPLITS:
            raise UserError(f"no split '{name}'; choose from {', '.join(synthetic.SPLITS)}")
        if name not in self._splits:
            try:
                self._splits[name] = self._list(name)
            except OSError as error:  # a dangling link, a folder that may not be read
                raise UserError(
                    f"cannot list split '{name}' ({error}); mend that, or set data.root="
                ) from error
        return self._splits[name]

    def open(self, name: SplitName) -> Store:
        """The decoded images of a split, packed first if need be. Raises UserError.

        They have an `image_size`; see `squares`.
        """
        split, options = self.split(name), (self.cache, self.workers, self.on_error)
        return open_store(split, self.side, *options)

    def open_encoded(self, name: SplitName, packed: bool) -> Encoded:
        """The images of a split as they are, indexed first if need be. Raises UserError.

        packed: their bytes are copied into the cache, else read from where they are.
        """
        split, options = self.split(name), (self.cache, self.workers, self.on_error)
        max_side = self.max_side if packed else None  # what lies in its file stays as it is
        return open_encoded(split, self.values, packed, *options, max_side)

    def reads_singly(self, name: SplitName) -> bool:
        """Can an image of the split be read without others that lie beside it?"""
        return True

    def begins_small(self, name: SplitName, side: int) -> bool:
        """Is the first image of a split a square of at most `side` pixels? It may be damaged."""
        from PIL import Image

        split = self.split(name)
        try:
            with Image.open(io.BytesIO(split.file(0))) as image:
                return image.size[0] == image.size[1] <= side
        except Exception:  # PIL raises many kinds; the index tells of it, and of the others' sizes
            return True

    def squares(self, image_size: int) -> "Dataset":
        """This data set with images of `image_size`."""
        other = copy.copy(self)
        other.image_size, other._splits = image_size, {}
        return other

    def has_room(self, name: SplitName) -> bool:
        """Is there room on the disk to pack the split?"""
        split = self.split(name)
        if self.image_size is None:
            return encoded.has_room(split, self.cache, self.max_side)
        return has_room(split, self.image_size, self.cache)

    def requested(self, files: Sequence[str] = ()) -> np.ndarray:
        """The images of "pretrain" that have extra labels or are named in index files.

        files: relative to the root, one index a line. Returns int64, ascending. Raises UserError.
        """
        length = self.split("pretrain").length
        found = [np.empty(0, np.int64)]
        for name in [*self.extra[:1], *files]:
            path = folder_at(self.root) / name.strip()
            indices = load_indices(path, "stage.requested= names index files")
            if len(indices) and indices.max() >= length:
                raise UserError(
                    f"{name} names image {indices.max()} of {length:,}; "
                    "does it belong to this data set?"
                )
            found.append(indices)
        return np.unique(np.concatenate(found))

    def _decoder(self, files: Files) -> Decoder:
        return Decoder(files, self.image_size, self.values)

    def _split(self, name, images, digests, labels, read, where) -> Split:
        """A Split of the image set `images` ("unlabeled", "train", ...) with these sources."""
        kind = f"{self.kind or type(self).__name__.lower()}-{images}"
        # Images that no decoder reads keep the first version: their runs go on when the decoding
        # changes.
        stored: tuple = (1, self.image_size)
        encoded_images: dict[str, Any] = {}
        if isinstance(read, Decoder):
            stored = (VERSION, self.image_size, self.values)
            if self.max_side is not None:
                stored += (self.max_side,)
            encoded_images = {"encoded": read.files.read, "nbytes": digests.nbytes}
        store_name = f"{kind}-{hashed(LAYOUT, *stored, digests.files)[:16]}"
        pixels = (*stored, "draft") if self.draft else stored  # as they are read, not stored
        facts = digests.content, b"" if labels is None else labels.tobytes()
        fingerprint, origin = hashed(kind, *pixels, *facts), hashed(kind, *facts)
        length = len(read)
        if length == 0:
            raise UserError(f"split '{name}' of {type(self).__name__} holds no images")
        whose = (name, length, labels, store_name, fingerprint, origin)
        return Split(*whose, read, where, **encoded_images)


class ImageFiles(Dataset):
    """Data sets whose images are files, which stay as they are where image_size is None.

    max_side: pictures of which a side has more pixels are made smaller; draft: large JPEGs are
    decoded at a part of their size. bit_depth, value_range: see `pictures`.
    """

    def __init__(
        self,
        image_size: int | None,
        max_side: int | None,
        draft: bool,
        bit_depth: BitDepth | None,
        value_range: ValueRange | None,
        on_error: OnError,
        cache: Place | None,
        workers: int | None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.values = values_of(bit_depth, value_range)
        self.max_side, self.draft = max_side, draft
        if image_size is not None and (max_side is not None or draft):
            typed = "data.draft=true" if max_side is None else f"data.max_side={max_side}"
            raise UserError(
                f"{typed} is for pictures that stay as they are, and data.image_size={image_size} "
                "makes squares of them: leave one of the two out"
            )


class Digests(NamedTuple):
    """Digests of a split's source files."""

    files: str  # of names, sizes and times
    content: str  # of names and sizes, which a copy shares
    nbytes: int = 0  # of all files together


def digests_of(stats: np.ndarray) -> Digests:
    """stats: int64 (n, 3): number, size in bytes, mtime in ns."""
    nbytes = int(stats[:, 1].sum())
    return Digests(hashed(stats.tobytes()), hashed(stats[:, :2].tobytes()), nbytes)


def hashed(*parts) -> str:
    """The sha256 of these parts, each with its length, in hex."""
    result = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()


def folder_at(root: str, *parts: str) -> Path:
    path = Path(root, *parts)
    if not path.is_dir():
        raise UserError(f"no folder {path}; data.root= sets where the data set is (now {root})")
    return path


def load_indices(path: Path, key: str) -> np.ndarray:
    """int64 (n,) from a file with one index a line. key: for the error, what names the file."""
    if not path.is_file():
        raise UserError(f"no file {path}; {key} under data.root")
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            if not row[0].strip().isdecimal():
                raise UserError(
                    f"line {line} of {path} is '{','.join(row)[:40]}'; "
                    "expected one image index a line"
                )
            rows.append(int(row[0]))
    return np.array(rows, np.int64)


def values_of(bit_depth: int | None, value_range: list[float] | None) -> Values:
    if value_range is None:
        return Values(bit_depth)
    low, high = value_range
    given = f"data.value_range=[{low:g},{high:g}]"
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"{given}: type what is black and what is white, the lower first: "
            "data.value_range=[0,4095]"
        )
    if bit_depth is not None:
        raise UserError(
            f"data.bit_depth={bit_depth} and {given} both say what 16 bits mean: "
            "give one of the two"
        )
    return Values(None, (float(low), float(high)))
