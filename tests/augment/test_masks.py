"""Masks: functions of (seed, epoch, image) alone, by their papers' rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_bench.augment import masks
from ssl_bench.augment.draws import keys, uniforms


def test_masks_are_of_the_seed_the_epoch_and_the_image() -> None:
    """The same in any batch; not those of another epoch, another image, nor what a view draws."""
    indices = torch.arange(64)
    drawn = masks.noise(keys(3, 5, indices), 49)
    assert torch.equal(masks.noise(keys(3, 5, indices[20:30]), 49), drawn[20:30])
    for others in (keys(4, 5, indices), keys(3, 6, indices), keys(3, 5, indices + 64)):
        assert (masks.noise(others, 49) == drawn).float().mean() < 0.01
    for view in range(10):
        assert not torch.equal(uniforms(keys(3, 5, indices), view, 49), drawn)
    repeated = masks.random_patches(masks.noise(keys(3, 6, indices), 49), 0.75)[1]
    assert (repeated != masks.random_patches(drawn, 0.75)[1]).any(dim=1).all()


@given(
    num=st.integers(2, 60),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_random_patches(num: int, ratio: float, seed: int) -> None:
    """What stays and what is hidden are the whole image; the ranks bring it back in order."""
    noise = masks.noise(keys(seed, 0, torch.arange(3)), num)
    kept, mask, ranks = masks.random_patches(noise, ratio)
    assert kept.shape == (3, int(num * (1 - ratio)))
    for row in range(3):
        assert sorted(kept[row].tolist()) == (~mask[row]).nonzero().flatten().tolist()
        order = ranks[row].argsort()
        assert order[: kept.shape[1]].tolist() == kept[row].tolist()
        assert noise[row][order].diff().min() >= 0


def test_every_patch_is_hidden_as_often() -> None:
    noise = masks.noise(keys(0, 0, torch.arange(4000)), 36)
    shares = masks.random_patches(noise, 0.75)[1].float().mean(dim=0)
    assert shares.min() > 0.75 - 0.03
    assert shares.max() < 0.75 + 0.03


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_random_cells_are_squares(scale: int) -> None:
    mask = masks.random_cells(masks.noise(keys(0, 0, torch.arange(5)), 16), 0.6, scale)
    side = 4 * scale
    assert mask.shape == (5, side * side)
    assert mask.sum(dim=1).tolist() == [10 * scale**2] * 5
    cells = mask.view(5, 4, scale, 4, scale)
    assert (cells == cells[:, :, :1, :, :1]).all()


@pytest.mark.parametrize("to_edge", [False, True])
def test_the_last_row_and_column_are_for_blocks_that_reach_the_edge(to_edge: bool) -> None:
    """The authors' blocks leave them out, of a grid of 4 x 4 nearly half of the patches."""
    drawn = [
        masks.targets_and_context(own, 4, (2, 2), (3, 3), 2, 3, to_edge)
        for own in masks.numbers(keys(0, 0, torch.arange(64)), 1)
    ]
    seen = {
        int(patch) for targets, context in drawn for part in (*targets, context) for patch in part
    }
    inner = {4 * row + column for row in range(3) for column in range(3)}
    assert seen == (set(range(16)) if to_edge else inner)
    for targets, context in drawn:
        assert [len(target) for target in targets] == [4, 4]
        assert len(context) > 3
