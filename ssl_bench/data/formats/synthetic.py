"""Images that are drawn on demand."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from ssl_bench.config.fields import Place
from ssl_bench.data import synthetic
from ssl_bench.data.formats.base import Dataset, Digests, hashed
from ssl_bench.data.store import OnError, Split


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


@dataclass(frozen=True)
class _PlainRenderer(_Renderer):
    def __call__(self, index: int) -> np.ndarray:
        arguments = self.seed, self.split, index, self.image_size, self.num_classes
        return synthetic.render(*arguments, plain=True)[0]


class Synthetic(Dataset):
    """Images drawn by `synthetic.render`, whose class is a shape; each split has its own images."""

    renderer: type[_Renderer] = _Renderer

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
        read = self.renderer(self.seed, name, length, self.side, self.num_classes)
        digest = hashed(synthetic.VERSION, read)
        where = f"synthetic {name} image {{}}".format
        return self._split(name, name, Digests(digest, digest), labels, read, where)


class Shapes(Synthetic):
    """The same shapes, light on dark, which a small network learns in a minute."""

    renderer = _PlainRenderer
