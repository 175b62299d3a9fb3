"""The handwritten digits of scikit-learn."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from ssl_bench.config.fields import Place
from ssl_bench.data import pictures
from ssl_bench.data.formats.base import Dataset, Digests, hashed
from ssl_bench.data.store import OnError, Split

IMAGES = 1_297  # that a pretraining sees


class Digits(Dataset):
    """The 1797 handwritten digits (8x8) that scikit-learn ships, upsampled.

    They come in the order of their writers, so the last 500, the val split, hardly share a writer
    with train. "pretrain" is train without its labels.
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
        # What sklearn.datasets.load_digits reads, whose import takes a second.
        spec = find_spec("sklearn")
        assert spec is not None, "setup.cfg requires it"
        assert spec.submodule_search_locations is not None, "it is a package"
        file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
        rows = np.loadtxt(file, delimiter=",")[slice(-500, None) if name == "val" else slice(-500)]
        pixels = rows[:, :-1].reshape(-1, 8, 8)
        images = (pixels * (255 / 16)).round().astype(np.uint8)  # 0..16 -> 0..255
        labels = None if name == "pretrain" else rows[:, -1].astype(np.int64)
        read = _DigitReader(images, self.side)
        digest = hashed(images.tobytes())
        source = "val" if name == "val" else "train"
        where = f"{source} digit {{}}".format
        return self._split(name, source, Digests(digest, digest), labels, read, where)


@dataclass(frozen=True)
class _DigitReader:
    images: np.ndarray  # uint8 (n, 8, 8)
    image_size: int

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int) -> np.ndarray:
        from PIL import Image

        digit = Image.fromarray(self.images[index]).convert("RGB")
        return pictures.centre_square(digit, self.image_size)
