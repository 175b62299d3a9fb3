"""A run that is watched by a metric: its best state, its early end, its pause."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import train
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.launch import place
from ssl_bench.runs import checkpoint, layout, watch
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.identity import Identity

PATIENT = {"epochs": 9, "save_best": "knn_top1", "patience": 3}
VALUES = [1.0, 3.0, 2.0, 3.0, 2.0, 9.0, 9.0, 9.0, 9.0]  # an epoch; the best before the end: 2


class Killed(BaseException):
    """As by SIGKILL: nothing is saved on the way out."""


def told(values: list[float], killed_at: int = 0) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation with these results, one an epoch of three steps, by a weight that counts."""
    left = list(values)

    def evaluate(network: nn.Module) -> dict[str, float]:
        value = left.pop(0)
        if killed_at and len(values) - len(left) == killed_at:
            raise Killed
        return {"knn_top1": value}

    return evaluate


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_best_state_is_kept_and_the_run_ends_early(tmp_path: Path) -> None:
    """Three epochs after the second, with whose state nothing has happened since."""
    method, _ = train(tmp_path / "run", settings=PATIENT, evaluate=told(VALUES))
    (file,) = layout.best(tmp_path / "run")
    assert (file.name, lines(tmp_path / "run")[-1]["step"]) == ("step0000000006.pt", 15)
    whole, _ = train(tmp_path / "six", settings={"epochs": 9, "until": 2}, evaluate=told(VALUES))
    assert torch.equal(checkpoint.read(file)["model"]["weight"], whole.weight)
    assert not torch.equal(method.weight, whole.weight)
    config = PATIENT | {"eval_every": 1}
    assert watch.ended_early(config, lines(tmp_path / "run")) == (
        "stopped early at step 15 of 27: no better knn_top1 than 3 % (epoch 2) for 3 epochs"
    )


def test_patience_that_is_used_up_at_the_end_ends_nothing_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ssl_bench")
    for epochs in (2, 3):
        settings = {"epochs": epochs, "save_best": "knn_top1", "patience": 1}
        train(tmp_path / f"{epochs}", settings=settings, evaluate=told([3.0, 2.0, 1.0]))
        config = settings | {"eval_every": 1}
        assert (epochs == 3) == bool(watch.ended_early(config, lines(tmp_path / f"{epochs}")))
        assert ("ends early" in caplog.text) == (epochs == 3)
    assert "ends early: no better knn_top1 than 3 % (epoch 1) for 1 epoch" in caplog.messages[-1]


@pytest.mark.parametrize("killed_at", [2, 4, 5])
@pytest.mark.parametrize("linked", [True, False])
def test_a_kill_changes_neither_the_end_nor_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, linked: bool
) -> None:
    """Neither in an evaluation nor, at the best one, between its state and the link to that."""
    whole, _ = train(tmp_path / "whole", settings=PATIENT, evaluate=told(VALUES))
    keep = Checkpoint.keep_as_best

    def cut(self: Checkpoint, step: int) -> None:
        if step == 6 and not linked:
            raise Killed
        keep(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep_as_best", cut)
        with pytest.raises(Killed):
            train(tmp_path / "run", settings=PATIENT, evaluate=told(VALUES, killed_at))
    step = layout.step_of(layout.complete(tmp_path / "run")[0])
    rest, _ = train(tmp_path / "run", settings=PATIENT, evaluate=told(VALUES[step // 3 :]))
    assert torch.equal(rest.weight, whole.weight)
    values = [
        [(line["step"], line["loss"], line.get("knn_top1")) for line in lines(tmp_path / name)]
        for name in ("run", "whole")
    ]
    assert values[0] == values[1]
    kept = [layout.best(tmp_path / name)[0] for name in ("run", "whole")]
    assert kept[0].name == kept[1].name
    states = [checkpoint.read(path)["model"]["weight"] for path in kept]
    assert torch.equal(*states)


def test_a_paused_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """In the schedule of all its epochs; twice paused, and once more with nothing to do."""
    whole, _ = train(tmp_path / "whole", settings={"epochs": 4})
    drawn, updated = [], []
    for until in (1, 3, 3, None):
        rest, _ = train(tmp_path / "run", settings={"epochs": 4, "until": until})
        drawn += rest.drawn
        updated += rest.updated
    assert torch.equal(rest.weight, whole.weight)
    assert (drawn, updated) == (whole.drawn, whole.updated)


def test_a_pause_is_no_evaluation_that_patience_counts() -> None:
    config = PATIENT | {"eval_every": 2}
    logged = [{"step": 3 * n, "epoch": float(n), "knn_top1": VALUES[n - 1]} for n in (1, 2, 3, 4)]
    assert [look.epoch for look in watch.looks(config, logged)] == [2, 4]


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("knn_top1", [1, 3, 3, 2], 2),
        ("loss", [4, 2, 2, 3], 2),
        ("alignment", [4, float("nan"), 2, 3], 3),
        ("max:alignment", [4, float("nan"), 2, 3], 1),
        ("min:own", [float("nan"), 2, 1, 3], 3),
    ],
)
def test_which_is_the_best(name: str, values: list[float], best: int) -> None:
    metric = name.rpartition(":")[2]
    logged = [{"step": n, "epoch": float(n), metric: v} for n, v in enumerate(values, start=1)]
    found = watch.best({"save_best": name, "eval_every": 1, "epochs": 4}, logged)
    assert found is not None
    assert found.step == best


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"save_best": "lr"}, "save_best=lr: it isn't known whether more or less of it is better"),
        ({"save_best": "knn_top"}, r"better: did you mean save_best=knn_top1\? Choose from val_"),
        ({"save_best": "mine"}, "type save_best=max:NAME or save_best=min:NAME for another value"),
        ({"patience": 3}, "patience= needs a metric to wait for: type save_best=knn_top1"),
    ],
)
def test_what_cannot_be_watched(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        watch.watched(config)


def test_a_metric_that_nothing_measures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing measures mine: type save_best= with one of"):
        train(tmp_path / "run", settings={"save_best": "max:mine"}, evaluate=told(VALUES))


def test_the_best_state_is_named_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pretrained=RUN/best is the run's, at a step, and its evaluations lie beside the others."""
    monkeypatch.chdir(tmp_path)
    train(Path("run"), settings=PATIENT, evaluate=told(VALUES))
    file = layout.weights_of(Path("run/best"))
    assert file == Path("run/best/step0000000006.pt")
    assert layout.run_of(file) == layout.run_at(Path("run/best")) == tmp_path / "run"
    assert place.below("run/best", "knn", "", "digits") == "run/knn-digits-at-step-6"


def test_what_decides_the_end_is_part_of_a_run() -> None:
    """And nothing of it where there is no patience: no run that exists is another one."""
    old = {"epochs": 9, "metric": "loss", "eval_every": 1}
    new = old | {"patience": None, "save_best": None, "until": None}
    assert Identity(old).key == Identity(new | {"save_best": "loss", "until": 2}).key
    patient = [new | {"patience": 3}, new | {"patience": 3, "eval_every": 2}, new | {"patience": 4}]
    patient.append(new | {"patience": 3, "save_best": "knn_top1"})
    assert len({Identity(config).key for config in [new, *patient]}) == 5
