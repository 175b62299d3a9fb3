import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_bench.data.source import HostSource, permutation
from ssl_bench.errors import UserError


def make(num_images, batch_size, seed=0, **options):
    """Image i is filled with i; its label is 2 i and its index 1000 + i."""
    values = np.arange(num_images)
    images = np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (num_images, 2, 4, 3)).copy()
    return HostSource(images, 2 * values, 1000 + values, batch_size, seed, **options)


def seen(source, start, stop):
    return [(step, (indices - 1000).tolist()) for step, _, _, indices in source.stream(start, stop)]


sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_visits_no_image_twice_and_fills_its_batches(size, seed, epoch):
    num_images, batch_size = size
    source = make(num_images, batch_size, seed)
    steps = source.steps_per_epoch
    visited = [i for _, batch in seen(source, epoch * steps, (epoch + 1) * steps) for i in batch]
    assert len(visited) == num_images // batch_size * batch_size
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(range(num_images))


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(0, 100), st.data())
def test_a_stream_resumed_at_any_step_is_the_tail_of_the_whole(size, seed, data):
    source = make(*size, seed)
    stop = min(3 * source.steps_per_epoch, 50)
    start = data.draw(st.integers(0, stop))
    assert seen(make(*size, seed), start, stop) == seen(source, 0, stop)[start:]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 13), st.integers(0, 100))
def test_ranks_partition_the_global_batch_in_order(world_size, local, more, seed):
    batch_size = world_size * local
    whole = seen(make(batch_size + more, batch_size, seed), 0, 4)
    parts = [
        seen(make(batch_size + more, batch_size, seed, rank=r, world_size=world_size), 0, 4) for r in range(world_size)
    ]
    assert whole == [(step, [i for part in parts for i in part[step][1]]) for step in range(4)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 6))
def test_an_epoch_pass_sees_every_image_once(num_images, world_size, local):
    passes = [
        list(make(num_images, world_size * local, rank=r, world_size=world_size).epoch_pass())
        for r in range(world_size)
    ]
    visited = [(indices - 1000).tolist() for batches in passes for _, _, indices in batches]
    assert sorted(i for batch in visited for i in batch) == list(range(num_images))
    assert all(batch == sorted(batch) and len(batch) <= local for batch in visited)


def test_pixels_labels_and_indices_belong_together():
    for _, images, labels, indices in make(10, 4).stream(0, 5):
        assert images.shape == (4, 3, 2, 4)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        rows = indices - 1000
        assert torch.equal(images[:, 0, 0, 0].long(), rows)
        assert torch.equal(images.float().amax(dim=(1, 2, 3)), images.float().amin(dim=(1, 2, 3)))
        assert torch.equal(labels, 2 * rows)


def test_only_the_subset_is_drawn():
    source = make(20, 3, subset=np.array([3, 19, 7, 4]))
    assert source.num_images == 4
    assert source.steps_per_epoch == 1
    assert {i for _, batch in seen(source, 0, 30) for i in batch} == {3, 19, 7, 4}
    assert [i for _, _, indices in source.epoch_pass() for i in (indices - 1000).tolist()] == [3, 19, 7, 4]


def test_the_order_is_fixed_for_all_time():
    """A resumed run may come from an older version: the order must never change."""
    assert permutation(0, 0, 8).tolist() == [6, 7, 0, 5, 3, 4, 1, 2]
    assert not torch.equal(permutation(0, 0, 100), permutation(0, 1, 100))
    assert not torch.equal(permutation(0, 1, 100), permutation(1, 0, 100))


def test_the_thread_ends_with_the_generator():
    stream = make(10, 2).stream(0, 10**9)
    next(stream)
    assert [t for t in threading.enumerate() if t.name.startswith("source")]
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("source")]


def test_an_error_of_the_thread_reaches_the_consumer():
    source = make(10, 2)
    source.labels = source.labels[:3]
    with pytest.raises(IndexError):
        list(source.stream(0, 5))


def test_waiting_is_measured():
    source = make(10, 2)
    list(source.stream(0, 5))
    assert source.wait_seconds > 0


def test_batches_that_do_not_fit_are_refused():
    source = make(10, 11)
    with pytest.raises(UserError, match="batch_size=11 is more than the 10 images; use at most 10"):
        list(source.stream(0, 1))
    assert sum(len(labels) for _, labels, _ in source.epoch_pass()) == 10  # an evaluation needs no full batch
    with pytest.raises(UserError, match=r"batch_size=10 cannot be split evenly over 4 processes; .* like 12"):
        make(10, 10, world_size=4)
