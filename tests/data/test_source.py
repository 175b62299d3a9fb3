import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import slow_reader
import torch
from conftest import TINY_PRETRAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.pool import send
from ssl_bench.data.source import HostSource, ResidentSource, StreamedSource, permutation
from ssl_bench.errors import Interrupted, UserError


def make(num_images, batch_size, seed=0, **options):
    """Image i is filled with i; its label is 2 i and its index 1000 + i."""
    values = np.arange(num_images)
    images = np.broadcast_to(
        values.astype(np.uint8)[:, None, None, None], (num_images, 2, 4, 3)
    ).copy()
    return HostSource(images, 2 * values, 1000 + values, batch_size, seed, **options)


def seen(source, start, stop):
    return [(step, (indices - 1000).tolist()) for step, _, _, indices in source.stream(start, stop)]


sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=30)
@given(sizes, st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_visits_no_image_twice_and_fills_its_batches(size, seed, epoch):
    num_images, batch_size = size
    source = make(num_images, batch_size, seed)
    steps = source.steps_per_epoch
    visited = [i for _, batch in seen(source, epoch * steps, (epoch + 1) * steps) for i in batch]
    assert len(visited) == num_images // batch_size * batch_size
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(range(num_images))


@settings(max_examples=30)
@given(sizes, st.integers(0, 100), st.data())
def test_a_stream_resumed_at_any_step_is_the_tail_of_the_whole(size, seed, data):
    source = make(*size, seed)
    stop = min(3 * source.steps_per_epoch, 50)
    start = data.draw(st.integers(0, stop))
    assert seen(make(*size, seed), start, stop) == seen(source, 0, stop)[start:]


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 13), st.integers(0, 100))
def test_ranks_partition_the_global_batch_in_order(world_size, local, more, seed):
    batch_size = world_size * local
    whole = seen(make(batch_size + more, batch_size, seed), 0, 4)
    parts = [
        seen(make(batch_size + more, batch_size, seed, rank=r, world_size=world_size), 0, 4)
        for r in range(world_size)
    ]
    assert whole == [(step, [i for part in parts for i in part[step][1]]) for step in range(4)]


@settings(max_examples=30)
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
    """By index: rows are others where images were skipped."""
    source = make(20, 3, subset=np.array([1003, 1019, 1007, 1004, 1999]))
    assert source.num_images == 4
    assert source.steps_per_epoch == 1
    assert {i for _, batch in seen(source, 0, 30) for i in batch} == {3, 19, 7, 4}
    assert [i for _, _, indices in source.epoch_pass() for i in (indices - 1000).tolist()] == [
        3,
        4,
        7,
        19,
    ]


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
    # an evaluation needs no full batch
    assert sum(len(labels) for _, labels, _ in source.epoch_pass()) == 10
    with pytest.raises(
        UserError, match=r"batch_size=10 cannot be split evenly over 4 processes; .* like 12"
    ):
        make(10, 10, world_size=4)


@pytest.fixture
def folder(tmp_path):
    """Ten noise images, labelled by two class folders."""
    for i in range(10):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    (tmp_path / "val").mkdir()
    for name in "ab":
        (tmp_path / "val" / name).symlink_to(tmp_path / "train" / name)
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_source_yields_the_same(folder, tmp_path, world_size):
    data = Folder(str(folder), image_size=8, cache=str(tmp_path / "cache"), workers=1)
    store = data.open("train")
    share = {
        "batch_size": 4,
        "seed": 3,
        "rank": world_size - 1,
        "world_size": world_size,
        "subset": np.arange(1, 9),
    }
    packed = store.images, store.labels, store.indices
    whole = HostSource(*packed, **share)
    for other in (
        ResidentSource(*packed, **share),
        StreamedSource(data.split("train"), workers=2, **share),
    ):
        for one, two in zip(whole.stream(1, 5), other.stream(1, 5), strict=True):
            assert all(map(torch.equal, map(torch.as_tensor, one), map(torch.as_tensor, two)))
            assert two[1].is_contiguous(memory_format=torch.channels_last)
        for one, two in zip(whole.epoch_pass(), other.epoch_pass(), strict=True):
            assert all(map(torch.equal, one, two))


def test_streaming_draws_nothing_from_the_generator_of_the_step(folder):
    source = StreamedSource(Folder(str(folder), image_size=8).split("train"), 4, 0, workers=1)
    before = torch.get_rng_state()
    list(source.stream(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_an_image_that_cannot_be_streamed_is_named(folder, damage):
    data = Folder(str(folder), image_size=8)
    split = data.split("train")
    path = Path(split.where(2))
    path.write_bytes(path.read_bytes()[:60])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=f"^cannot (decode|read) [^\n]*{path.name}[^\n]*$"):
        list(StreamedSource(split, 5, 0, workers=2).stream(0, 2))


def test_streaming_skips_to_the_next_image(folder, caplog):
    split = Folder(str(folder), image_size=8).split("train")
    for index in (2, 3):
        Path(split.where(index)).write_bytes(b"")
    source = StreamedSource(split, 5, 0, workers=2, on_error="skip")
    batches = [*source.epoch_pass(), *source.epoch_pass()]
    assert (
        torch.cat([indices for _, _, indices in batches]).tolist()
        == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9] * 2
    )
    for images, labels, indices in batches:
        for image, label, index in zip(images, labels, indices, strict=True):
            assert np.array_equal(image.permute(1, 2, 0), split.read(int(index)))
            assert label == split.labels[index]
    assert (
        len([record for record in caplog.records if "skipped for the next image" in record.message])
        == 2
    )


def test_streaming_ends_when_nothing_comes(folder, monkeypatch):
    split = Folder(str(folder), image_size=8).split("train")
    for kill, said in (
        (True, "a data worker ended with status -9"),
        (False, "no image was decoded for .*png"),
    ):
        source = StreamedSource(
            replace(split, read=slow_reader.Slow(split.read, kill)), 5, 0, workers=1
        )
        batches = source.epoch_pass()
        next(batches)
        monkeypatch.setattr("ssl_bench.data.source.PATIENCE", 600 if kill else 1)
        with pytest.raises(UserError, match=said):
            next(batches)


def test_batches_that_overtake_a_slow_one_are_few(folder, monkeypatch):
    """And it is waited for no longer, nor deaf to a signal, because of them."""
    sent, waited = [], []

    def counted(connection, chunk):
        sent.append(chunk)
        send(connection, chunk)

    monkeypatch.setattr("ssl_bench.data.pool.send", counted)
    split = Folder(str(folder), image_size=8).split("train")
    slow = int(permutation(0, 0, 10)[2])
    source = StreamedSource(
        replace(split, read=slow_reader.Stuck(split.read, slow)), 1, 0, workers=3
    )
    source.waiting = waited.append
    batches = source.stream(0, 10**6)
    next(batches), next(batches)
    monkeypatch.setattr("ssl_bench.data.source.PATIENCE", 1)
    with pytest.raises(
        UserError, match=f"no image was decoded for .*{Path(split.where(slow)).name}"
    ):
        next(batches)
    assert len(sent) <= 2 + 2 * 3
    assert waited


def test_a_signal_is_honoured_while_streaming_waits(folder):
    split = Folder(str(folder), image_size=8).split("train")
    source = StreamedSource(
        replace(split, read=slow_reader.Slow(split.read, False)), 5, 0, workers=1
    )

    def stop(seconds):
        raise Interrupted(15)

    batches = source.epoch_pass()
    next(batches)
    source.waiting = stop
    with pytest.raises(Interrupted):
        next(batches)


@pytest.mark.slow
def test_where_images_wait_changes_no_weight(ssl_bench, tmp_path):
    states = []
    for source in ("host", "resident", "streamed"):
        result = ssl_bench(
            *TINY_PRETRAIN, "epochs=1", f"source={source}", f"dir={source}", check=True
        )
        assert {"host": "images.npy", "resident": "on cpu", "streamed": "decoded as"}[
            source
        ] in result.stderr
        (checkpoint, *_) = sorted((tmp_path / source / "checkpoints").iterdir(), reverse=True)
        states.append(torch.load(checkpoint, weights_only=True)["model"])
    assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in states[0])


def test_room_on_the_disk_is_looked_at(tmp_path, monkeypatch):
    from ssl_bench.data import store
    from ssl_bench.data.formats.digits import Digits

    monkeypatch.setattr(store, "free_bytes", lambda root: 1000)
    data = Digits(image_size=8, cache=str(tmp_path / "new" / "cache"))
    assert not data.has_room("train")
    monkeypatch.undo()
    assert data.has_room("train")
