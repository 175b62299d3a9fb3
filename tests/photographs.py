"""Photographs: those that come with scikit-learn and scikit-image, as files of many kinds."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_sample_image

# of scikit-image: those that are in its wheel
FILES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")


@cache
def photographs() -> dict[str, Image.Image]:
    """Pictures of PIL's, RGB, 451 x 300 to 741 x 500 pixels, square and not."""
    found = {
        name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")
    }
    folder = Path(skimage.__file__).parent / "data"
    for name in FILES:
        found[name.partition(".")[0]] = Image.open(folder / name).convert("RGB")
    return found


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90} | options)
    return file.getvalue()


def write(folder: Path, count: int = 1) -> list[Path]:
    """JPEGs of the photographs and of `count` - 1 parts of each, of other sizes; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    rng = np.random.default_rng(0)
    for name, image in photographs().items():
        for number in range(count):
            part = image
            if number:
                low, high = rng.uniform(0, 0.3, 2), rng.uniform(0.7, 1, 2)
                part = image.crop(tuple(int(x) for x in (*low * image.size, *high * image.size)))
            paths.append(folder / f"{name}{number}.jpg")
            paths[-1].write_bytes(jpeg(part))
    return paths
