"""Images as records of binary files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_bench.data.formats.base import Digests, hashed
from ssl_bench.errors import UserError


@dataclass(frozen=True)
class Records:
    """Images as records of equal length in binary files, the pixels at the end of each record."""

    files: tuple[str, ...]
    lengths: tuple[int, ...]  # records in each file
    record: int  # bytes
    image_size: int
    order: tuple[int, int, int]  # the stored axes (channel first) that are (height, width, channel)

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


def records_of(
    paths: list[Path], record: int, image_size: int, order: tuple[int, int, int]
) -> tuple[Records, Digests]:
    """The records of these files, and their digests. UserError for a file of broken records."""
    lengths, stats = [], []
    for path in paths:
        status = path.stat()
        if status.st_size % record or status.st_size == 0:
            raise UserError(
                f"{path} has {status.st_size} bytes, not a multiple of {record}; download it again"
            )
        lengths.append(status.st_size // record)
        stats.append((path.name, status.st_size, status.st_mtime_ns))
    content = [(name, size) for name, size, _ in stats]
    digests = Digests(hashed(*stats), hashed(*content))
    return Records(tuple(map(str, paths)), tuple(lengths), record, image_size, order), digests


def names_in(paths: Iterable[Path], num_classes: int) -> list[str]:
    """The names of the classes, a line each of the first file that is there; or none."""
    for path in paths:
        if path.is_file():
            names = path.read_text(encoding="utf-8", errors="replace").split()
            return names if len(names) == num_classes else []
    return []


def check_range(labels: np.ndarray, num_classes: int, path: Path) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{path} has labels outside its {num_classes} classes; is it the right file, "
            "unpacked whole?"
        )
