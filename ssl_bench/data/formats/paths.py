"""Paths of many image files in little memory, and the decoder that reads them."""

import io
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ssl_bench.data import pictures
from ssl_bench.data.pictures import Noticed, Values


class Files(Protocol):
    """Image files by their index, wherever their bytes are; picklable, for worker processes."""

    def __len__(self) -> int: ...

    def __call__(self, index: int) -> str:
        """The path, or the name to show a person."""
        ...

    def read(self, index: int) -> bytes:
        """What the file holds."""
        ...


class OnDisk:
    """Files that are known by their paths."""

    def __call__(self, index: int) -> str:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        with open(self(index), "rb") as file:
            return file.read()


class Paths(OnDisk):
    """Many paths under one root in little memory, shared by worker processes (see `pool`)."""

    def __init__(self, root: Path, text: bytes, ends: array):
        """text: the names, one after the other; ends: 0, then where each name ends."""
        self.root = root
        self.text = np.frombuffer(text, np.uint8)
        self.ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __call__(self, index: int) -> str:
        name = self.text[self.ends[index] : self.ends[index + 1]]
        return os.path.join(self.root, os.fsdecode(name.tobytes()))


@dataclass(frozen=True)
class Numbered(OnDisk):
    """ROOT/0.png, ROOT/1.png, ..."""

    root: Path
    length: int

    def __len__(self) -> int:
        return self.length

    def __call__(self, index: int) -> str:
        return os.path.join(self.root, f"{index}.png")


@dataclass(frozen=True)
class Joined(OnDisk):
    """All files of `first`, then the chosen ones of `second`."""

    first: Numbered
    second: Numbered
    chosen: np.ndarray  # int64 (n,)

    def __len__(self) -> int:
        return len(self.first) + len(self.chosen)

    def __call__(self, index: int) -> str:
        here = len(self.first)
        return self.first(index) if index < here else self.second(int(self.chosen[index - here]))


@dataclass(frozen=True)
class Decoder:
    """Reads image files, and notes what a person may not expect of them.

    image_size: None gives the pictures whole.
    """

    files: Files
    image_size: int | None
    values: Values
    noticed: Noticed = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def __call__(self, index: int) -> np.ndarray:
        kinds: list[str] = []
        file = io.BytesIO(self.files.read(index))
        image = pictures.decode(file, self.image_size, self.values, kinds)
        pictures.note(self.noticed, kinds, index)
        return image
