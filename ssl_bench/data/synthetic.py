"""Procedural RGB images whose class is a shape.

Colour, texture, position, scale, tilt and clutter are nuisance. A shape is an implicit function
(u, v) -> roughly the signed distance to its outline, negative inside, in units of its radius; u
points right and v down.
"""

import math
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np

from ssl_bench.data.pool import run_chunks
from ssl_bench.errors import UserError

VERSION = 2  # raise it when `render` gives other pixels, so that packed stores are made anew
SPLITS = ("pretrain", "train", "val")
SQRT2 = math.sqrt(2)
# Radians to either side. A small network learns tilted shapes in minutes, freely turned ones in
# hours.
TILT = 0.25
PLAIN = np.full((2, 3), [[0.1], [0.9]], np.float32)  # colours: dark ground, light shape


def disc(u, v, cu=0.0, cv=0.0, radius=0.9):
    return np.hypot(u - cu, v - cv) - radius


def box(u, v, cu=0.0, cv=0.0, half_u=0.75, half_v=0.75):
    return np.maximum(np.abs(u - cu) - half_u, np.abs(v - cv) - half_v)


def polygon(u, v, sides, inradius, cv=0.0):
    """A regular polygon with a side at the bottom."""
    angles = [math.pi * (0.5 + 2 * side / sides) for side in range(sides)]
    return intersection(*(u * math.cos(a) + (v - cv) * math.sin(a) - inradius for a in angles))


def union(*distances):
    return reduce(np.minimum, distances)


def intersection(*distances):
    return reduce(np.maximum, distances)


def star(u, v, inner=0.42):
    """Five points. The plane is folded onto half a point, whose outline is one straight line."""
    half = math.pi / 5
    fold = np.abs(np.mod(np.arctan2(u, -v) + half, 2 * half) - half)
    radius = np.hypot(u, v)
    across, along = inner * math.sin(half), 1 - inner * math.cos(half)  # from tip to notch
    offset = (radius * np.cos(fold) - 1) * across + radius * np.sin(fold) * along
    return offset / math.hypot(across, along)


def heart(u, v):
    u = np.abs(u)
    return union((u + np.abs(v - 0.15) - 0.8) / SQRT2, disc(u, v, 0.4, -0.25, 0.8 / SQRT2))


def arrow(u, v):
    head = intersection((np.abs(u) - (v + 0.95)) / SQRT2, v + 0.1)
    return union(head, box(u, v, 0, 0.4, 0.22, 0.55))


def pacman(u, v):
    mouth = np.abs(v) * math.cos(0.7) - u * math.sin(0.7)
    return intersection(disc(u, v), -mouth)


def trefoil(u, v):
    angles = (0, 2 * math.pi / 3, 4 * math.pi / 3)
    return union(*(disc(u, v, 0.5 * math.sin(a), -0.5 * math.cos(a), 0.43) for a in angles))


def chevron(u, v):
    band = np.abs(v - np.abs(u) + 0.35) / SQRT2 - 0.26
    return intersection(band, np.abs(u) - 0.85)


SHAPES = {
    "circle": disc,
    "square": box,
    "triangle": lambda u, v: polygon(u, v, 3, 0.5, cv=0.1),
    "star": star,
    "cross": lambda u, v: union(box(u, v, 0, 0, 0.9, 0.28), box(u, v, 0, 0, 0.28, 0.9)),
    "ring": lambda u, v: np.abs(disc(u, v, 0, 0, 0.68)) - 0.2,
    "crescent": lambda u, v: intersection(disc(u, v, -0.15), -disc(u, v, 0.25, 0, 0.75)),
    "heart": heart,
    "arrow": arrow,
    "L": lambda u, v: union(box(u, v, -0.3, 0, 0.26, 0.9), box(u, v, 0.1, 0.64, 0.6, 0.26)),
    "hexagon": lambda u, v: polygon(u, v, 6, 0.8),
    "half_disc": lambda u, v: intersection(disc(u, v, 0, -0.4, 0.95), -0.4 - v),
    "T": lambda u, v: union(box(u, v, 0, -0.6, 0.8, 0.26), box(u, v, 0, 0.1, 0.26, 0.8)),
    "lens": lambda u, v: intersection(disc(u, v, -0.6, 0, 1.1), disc(u, v, 0.6, 0, 1.1)),
    "pacman": pacman,
    "Z": lambda u, v: union(box(u, v, -0.3, -0.3, 0.6, 0.3), box(u, v, 0.3, 0.3, 0.6, 0.3)),
    "U": lambda u, v: intersection(box(u, v, 0, 0, 0.78, 0.78), -box(u, v, 0, -0.55, 0.36, 0.85)),
    "dumbbell": lambda u, v: union(disc(np.abs(u), v, 0.58, 0, 0.38), box(u, v, 0, 0, 0.6, 0.13)),
    "chevron": chevron,
    "trefoil": trefoil,
}


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in [-1, 1]: x (1, size), y (size, 1), to be broadcast."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return line[None, :], line[:, None]


@lru_cache(maxsize=16)
def _interpolation(size: int, knots: int) -> np.ndarray:
    """(size, knots) matrix of linear interpolation between evenly spaced knots."""
    position = np.linspace(0, knots - 1, size, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(knots, dtype=np.float32)))


def _texture(rng: np.random.Generator, size: int) -> np.ndarray | float:
    """A random pattern, float32 (size, size) in about [-1, 1]; a plain 0 for none."""
    x, y = _grid(size)
    kind, angle, waves = rng.integers(5), rng.uniform(0, math.pi), rng.uniform(2, 7) * math.pi
    phase = rng.uniform(0, 2 * math.pi, 2).tolist()  # Python floats keep float32 arrays float32
    along = math.cos(angle) * x + math.sin(angle) * y
    if kind == 0:  # flat
        return 0.0
    if kind == 1:  # gradient
        return along
    if kind == 2:  # cloudy noise
        knots = int(rng.integers(4, 13))
        weights = _interpolation(size, knots)
        return weights @ rng.uniform(-1, 1, (knots, knots)).astype(np.float32) @ weights.T
    stripes = np.sin(waves * along + phase[0])
    if kind == 3:
        return np.clip(3 * stripes, -1, 1)
    across = math.cos(angle) * y - math.sin(angle) * x
    return np.clip(6 * stripes * np.sin(waves * across + phase[1]), -1, 1)  # checks


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours in [0, 1] that a person tells apart."""
    while True:
        first, second = rng.uniform(0.08, 0.92, (2, 3)).astype(np.float32)
        if abs(float((first - second).sum())) > 0.6 or float(np.abs(first - second).sum()) > 1.1:
            return first, second


def render(
    seed: int, split: str, index: int, image_size: int, num_classes: int, plain: bool = False
) -> tuple[np.ndarray, int]:
    """Image `index` of a split: uint8 (image_size, image_size, 3), and its label.

    A pure function of its arguments; the label is index % num_classes. `num_classes` goes up to
    len(SHAPES); split is "pretrain", "train" or "val". plain: light shapes on a dark ground,
    without colours, textures and clutter.
    """
    bits = np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, 0, 0, index])
    rng = np.random.Generator(bits)
    label = index % num_classes
    x, y = _grid(image_size)

    def paint(colour: np.ndarray) -> np.ndarray:
        """A colour with a texture: float32 (image_size or 1, image_size or 1, 3)."""
        if plain:
            return colour
        contrast = (rng.uniform(0.08, 0.3) * rng.uniform(-1, 1, 3)).astype(np.float32)
        texture = np.asarray(_texture(rng, image_size))
        return colour + texture[..., None] * contrast

    def cover(distance: np.ndarray, radius: float) -> np.ndarray:
        """How much of each pixel a shape covers, its edge one pixel wide: (size, size, 1)."""
        return np.clip(0.5 - distance * (radius * image_size / 2), 0, 1)[..., None]

    back, front = PLAIN if plain else _colours(rng)
    image = np.empty((image_size, image_size, 3), np.float32)
    image[:] = paint(back)
    for _ in range(0 if plain else rng.integers(3)):  # clutter, behind the shape
        cx, cy = rng.uniform(-1, 1, 2).tolist()
        blob = cover(disc(x, y, cx, cy, rng.uniform(0.05, 0.12)), 1)
        image += blob * (rng.uniform(0, 1, 3).astype(np.float32) - image)

    radius, angle = rng.uniform(0.45, 0.8), rng.uniform(-TILT, TILT)
    cx, cy = rng.uniform(radius - 1, 1 - radius, 2).tolist()
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u, v = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)
    image += cover(list(SHAPES.values())[label](u, v), radius) * (paint(front) - image)

    image += (rng.random(image.shape, np.float32) - 0.5) * rng.uniform(0.02, 0.14)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), label


def write_dl21(
    root: str | Path,
    num_unlabeled: int,
    num_train: int,
    num_val: int,
    num_classes: int,
    seed: int = 0,
    image_size: int = 96,
    num_request: int = 0,
    workers: int | None = None,
) -> None:
    """Write synthetic images as PNG files in the dl21 layout (see `formats.dl21`), in parallel.

    `num_request` > 0 adds request_00.csv and label_00.pt, the indices and labels of that many
    images of unlabeled/. A split appears complete or not at all. UserError if `root` isn't empty.
    """
    import torch

    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty; name a new folder, or empty this one")
    if num_request > num_unlabeled:
        raise UserError(
            f"num_request={num_request} is more than the {num_unlabeled} unlabeled images; "
            "ask for fewer"
        )
    if not 1 <= num_classes <= len(SHAPES):
        raise UserError(
            f"num_classes={num_classes} is not possible; choose 1 to {len(SHAPES)}, "
            "the number of shapes"
        )
    root.mkdir(parents=True, exist_ok=True)
    folders, counts = ("unlabeled", "train", "val"), (num_unlabeled, num_train, num_val)
    for split, folder, count in zip(SPLITS, folders, counts, strict=True):
        partial = root / f"{folder}.partial"
        partial.mkdir()
        try:
            task = _WritePNG(seed, split, image_size, num_classes, str(partial))
            for _ in run_chunks(task, count, workers, f"writing {folder}"):
                pass
            if split != "pretrain":
                torch.save(torch.arange(count) % num_classes, root / f"{folder}_label_tensor.pt")
            partial.rename(root / folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if num_request:
        rng = np.random.Generator(np.random.Philox(key=[seed, len(SPLITS)]))
        chosen = rng.permutation(num_unlabeled)[:num_request]
        lines = "".join(f"{index}\n" for index in chosen)
        (root / "request_00.csv").write_text(lines, encoding="utf-8")
        torch.save(torch.from_numpy(chosen) % num_classes, root / "label_00.pt")


@dataclass(frozen=True)
class _WritePNG:
    seed: int
    split: str
    image_size: int
    num_classes: int
    folder: str

    def __call__(self, start: int, stop: int) -> None:
        from PIL import Image

        for index in range(start, stop):
            image, _ = render(self.seed, self.split, index, self.image_size, self.num_classes)
            Image.fromarray(image).save(os.path.join(self.folder, f"{index}.png"), compress_level=1)
