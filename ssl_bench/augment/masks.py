"""Which patches of an image a network doesn't see.

Like views, masks are drawn by (seed, epoch, image): `noise` gives uniform numbers of that image,
and pure functions make masks of them. Patches are counted row by row. In a mask True stands for a
hidden patch.
"""

import math
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ssl_bench.augment.draws import uniforms

STREAM = 2**20  # the "view" that masks draw from: no view of an image has this number
BLOCK = 64  # numbers drawn at once
TRIES = 10
ASPECT = math.log(1 / 0.3)  # of blocks, log of the longest


def noise(keys: Tensor, num: int) -> Tensor:
    """keys (N,) of `draws.keys` -> uniform numbers (N, num) that no view of these images has."""
    return uniforms(keys, STREAM, num)


def random_patches(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """noise (N, L) -> patches (N, K) that stay, mask (N, L), ranks (N, L) of the patches.

    The K = int(L * (1 - ratio)) patches of the smallest noise stay, in the order of rising noise,
    as in `random_masking` of MAE's authors. A patch's rank is its place in that order.
    """
    num_kept = int(noise.shape[1] * (1 - ratio))
    order = noise.argsort(dim=1, stable=True)
    ranks = order.argsort(dim=1)
    return order[:, :num_kept], ranks >= num_kept, ranks


def random_cells(noise: Tensor, ratio: float, scale: int) -> Tensor:
    """noise (N, C * C) of cells of scale x scale patches -> mask (N, (C * scale) ** 2).

    ceil(ratio * C * C) cells are hidden, as in MaskGenerator of SimMIM's authors.
    """
    cells = noise.shape[1]
    order = noise.argsort(dim=1, stable=True)
    hidden = order.argsort(dim=1) < math.ceil(cells * ratio)
    side = math.isqrt(cells)
    grid = hidden.view(-1, side, side)
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)


def numbers(keys: Tensor, stream: int) -> list[Iterator[float]]:
    """keys (N,) -> for each image the uniform numbers of its stream, one after the other, no end.

    stream: 1, 2, ...; masks that are drawn independently of each other have streams of their own.
    """
    keys = keys.cpu()

    def block(keys: Tensor, number: int) -> list[list[float]]:
        return uniforms(keys, STREAM + stream * 2**10 + number, BLOCK).tolist()

    def of_image(key: Tensor, first: list[float]) -> Iterator[float]:
        yield from first
        for number in count(1):
            yield from block(key[None], number)[0]

    return [of_image(key, first) for key, first in zip(keys, block(keys, 0), strict=True)]


def block_mask(
    numbers: Iterator[float], side: int, target: float, smallest: float, largest: float
) -> np.ndarray:
    """A mask (side, side) of rectangles, until `target` patches are hidden.

    A rectangle has an area of `smallest` to `largest` patches, or to what is missing, and an aspect
    of 0.3 to 1 / 0.3. If none of ten adds between one and so many patches, the mask stays short.
    As in BEiT (arXiv:2106.08254, algorithm 1), iBOT's loader.py and DINOv2's masking.py, in the
    order of their random numbers: area, aspect, and if it fits, row and column.
    """
    mask, hidden = np.zeros((side, side), dtype=bool), 0
    while hidden < target:
        limit, added = min(target - hidden, largest), 0
        for _ in range(TRIES):
            area = smallest + (limit - smallest) * next(numbers)
            aspect = math.exp(ASPECT * (2 * next(numbers) - 1))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < side and columns < side:
                top = math.floor((side - rows + 1) * next(numbers))
                left = math.floor((side - columns + 1) * next(numbers))
                block = mask[top : top + rows, left : left + columns]
                new = block.size - int(block.sum())
                if 0 < new <= limit:
                    block[:] = True
                    added = new
                    break
        if not added:
            break
        hidden += added
    return mask


def random_blocks(
    keys: Tensor,
    num_views: int,
    side: int,
    probability: float,
    ratio: tuple[float, float],
    smallest: float,
    largest: float = math.inf,
    whole: bool = True,
) -> Tensor:
    """keys (N,) -> masks (N, V, L) of blocks, L = side * side; see `block_mask`.

    Each view of an image has a mask with that probability, of a share of the patches drawn from
    `ratio`. whole: the number of patches that this is, is rounded down.
    """
    masks = np.zeros((len(keys), num_views, side, side), dtype=bool)
    for view in range(num_views):
        for row, stream in enumerate(numbers(keys, 1 + view)):
            if next(stream) < probability:
                target = (ratio[0] + (ratio[1] - ratio[0]) * next(stream)) * side * side
                target = math.floor(target) if whole else target
                masks[row, view] = block_mask(stream, side, target, smallest, largest)
    return torch.from_numpy(masks).flatten(2)


def block_size(
    number: float, side: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    """One uniform number -> rows and columns of a block of I-JEPA, smaller than the grid.

    scale: its share of the grid; aspect: rows / columns. As `_sample_block_size` of the authors'
    multiblock.py, in which the same number chooses both.
    """
    patches = int(side * side * (scale[0] + (scale[1] - scale[0]) * number))
    ratio = aspect[0] + (aspect[1] - aspect[0]) * number
    rows, columns = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
    return min(rows, side - 1), min(columns, side - 1)


def targets_and_context(
    numbers: Iterator[float],
    side: int,
    target_size: tuple[int, int],
    context_size: tuple[int, int],
    num_targets: int,
    min_keep: int,
    to_edge: bool = False,
) -> tuple[list[np.ndarray], np.ndarray]:
    """An image's target blocks, and its context without them: patches in rising order.

    As `MaskCollator` of the authors' multiblock.py (arXiv:2301.08243, section 3): a block of at
    most `min_keep` patches is drawn anew; if a context fails twenty times, the last target that was
    taken out of it is no more. Theirs don't reach the last row and column: those with `to_edge` do.
    """
    grid = np.arange(side * side).reshape(side, side)

    def block(size: tuple[int, int]) -> np.ndarray:
        top, left = (math.floor((side - length + to_edge) * next(numbers)) for length in size)
        return grid[top : top + size[0], left : left + size[1]].ravel()

    def large_enough(size: tuple[int, int]) -> np.ndarray:
        while len(found := block(size)) <= min_keep:
            pass
        return found

    targets = [large_enough(target_size) for _ in range(num_targets)]
    for kept in range(num_targets, -1, -1):
        taken = np.concatenate([np.empty(0, dtype=grid.dtype), *targets[:kept]])
        for _ in range(2 * TRIES):
            context = block(context_size)
            context = context[~np.isin(context, taken)]
            if len(context) > min_keep:
                return targets, context
    return targets, large_enough(context_size)
