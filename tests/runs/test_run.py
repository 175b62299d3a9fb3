"""What a run does with its folder, beside what the command shows."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from patience import PATIENCE

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import identity
from ssl_bench.runs.run import Run
from ssl_bench.runs.sweep import locked
from ssl_bench.runs.tracking import NoTracker
from ssl_bench.runs.units import spoken


def images(fingerprint: str, count: int) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "images": count, "sample": ""}


def run(directory: Path, seed: int) -> Run:
    return Run({"dir": str(directory), "seed": seed}, torch.device("cpu"), NoTracker)


def test_who_comes_second_does_not_take_the_firsts_result_for_its_own(tmp_path: Path) -> None:
    """Not even where the first had saved nothing yet when the second came."""
    with ThreadPoolExecutor(1) as thread:
        with run(tmp_path / "run", seed=0) as first:
            second = thread.submit(run(tmp_path / "run", seed=1).__enter__)
            time.sleep(0.5)
            assert not second.done()
            first.finish({"loss": 1.0})
        with pytest.raises(UserError, match="another configuration: seed was 0, is 1"):
            second.result(timeout=PATIENCE)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    with run(tmp_path / "run", seed=0) as first:
        first.finish({"loss": 1.0})
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(
        UserError, match=f"{name}: its sha256 is .* a broken or another file; put back the one"
    ):
        run(tmp_path / "run", seed=0).__enter__()


def test_other_images_than_it_began_with(tmp_path: Path) -> None:
    """Told where something was computed from the former ones; before that they may change."""
    with run(tmp_path / "run", seed=0) as first:
        first.uses("train", images("a", 40))
        first.uses("train", images("b", 41))
        first.save(1, model=torch.nn.Linear(1, 1))
        first.uses("val", images("c", 10))
        with pytest.raises(
            UserError,
            match="of other images: its split 'train' had 41, the 40 now are not the same",
        ):
            first.uses("train", images("a", 40))
        first.uses("train", images("b", 41))


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal(tmp_path: Path, ignored: bool) -> None:
    """Stops it as SIGTERM does, unless nohup keeps it away."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with run(tmp_path / "run", seed=0) as first:
            os.kill(os.getpid(), signal.SIGHUP)
            assert first.stopping(1) is not ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    with run(tmp_path / "run", seed=0):
        assert locked(tmp_path / "run" / ".lock")
    assert not locked(tmp_path / "run" / ".lock")


def test_weights_matter_once_something_is_computed(tmp_path: Path) -> None:
    def on_weights() -> Run:
        config = {"dir": str(tmp_path / "run"), "seed": 0, "pretrained": str(tmp_path / "weights")}
        return Run(config, torch.device("cpu"), NoTracker)

    for content in ("first", "second"):
        (tmp_path / "weights").write_text(content)
        with on_weights() as last:
            pass
    with on_weights() as last:
        last.finish({"loss": 1.0})
    (tmp_path / "weights").write_text("third")
    with pytest.raises(UserError, match="weights holds other weights now"):
        on_weights().__enter__()


def test_nothing_is_left_of_a_configuration_that_saved_nothing(tmp_path: Path) -> None:
    """Or the next one there would stand on weights and images that it has never seen."""
    (tmp_path / "weights").write_text("first")
    config = {"dir": str(tmp_path / "run"), "seed": 0, "pretrained": str(tmp_path / "weights")}
    with Run(config, torch.device("cpu"), NoTracker) as first:
        first.uses("train", images("a", 40))
    with run(tmp_path / "run", seed=0) as second:
        second.uses("pretrain", images("b", 41))
        second.finish({"loss": 1.0})
    left = identity.left_by(second._config, tmp_path / "run")
    assert (left.weights, left.images) == ("", {"pretrain": images("b", 41)})


def test_a_wrong_folder_of_images_costs_a_finished_run_nothing(tmp_path: Path) -> None:
    """Its digests neither: that the images are others is found before anything is written."""
    config = {"dir": str(tmp_path / "run"), "seed": 0, "data": {"root": "here"}}
    with Run(config, torch.device("cpu"), NoTracker) as first:
        for split, count in (("train", 40), ("val", 10)):
            first.uses(split, images("a", count))
        first.finish({"loss": 1.0})
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def split_of(fingerprint: str) -> Callable[[str], SimpleNamespace]:
        return lambda name: SimpleNamespace(
            facts=lambda: images(fingerprint, 40 if name == "train" else 10)
        )

    moved = config | {"data": {"root": "there"}}
    with Run(moved, torch.device("cpu"), NoTracker) as again:
        with pytest.raises(UserError, match="holds a run of other images: its split 'train'"):
            again.check_data(split_of("b"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
        again.check_data(split_of("a"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["root"] == "there"
    for name in files.listed(tmp_path / "run"):
        files.check(tmp_path / "run" / name)


def test_a_signal_that_comes_too_late_for_a_run_stops_the_one_around_it(tmp_path: Path) -> None:
    """That of a pipeline, which would go on with its next part."""
    with run(tmp_path / "outer", seed=0) as outer:
        with run(tmp_path / "inner", seed=0) as inner:
            signal.raise_signal(signal.SIGTERM)
            inner.finish({"loss": 1.0})
        assert outer.signalled


def test_shares_are_percent_on_the_console_as_in_tables() -> None:
    values = {
        "accuracy": 0.92,
        "knn_top1": 98.46,
        "data_wait": 0.031,
        "loss": 5.123,
        "images_per_second": 12345.6,
    }
    assert [spoken(*item) for item in values.items()] == [
        "92 %",
        "98.46 %",
        "3.1 %",
        "5.123",
        "12,346",
    ]
