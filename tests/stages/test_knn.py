"""Nearest neighbours: the votes, block by block, and what may choose k and the temperature."""

import csv
import json
from pathlib import Path

import pytest
import torch
from commands import complaint, compose
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_ranks

from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import Interrupted, UserError
from ssl_bench.evaluate import calibration, neighbours
from ssl_bench.evaluate.neighbours import nearest, weighted_knn
from ssl_bench.launch.process import launch
from ssl_bench.runs.run import Run

DIGITS = [
    "stage=knn",
    "data=digits",
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
]


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 23), st.integers(2, 6)),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 23)),
    k=st.integers(1, 30),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
)
@settings(max_examples=60)
def test_votes_are_the_definition_in_blocks_of_any_size(
    sizes: tuple[int, int, int], blocks: tuple[int, int], k: int, temperature: float
) -> None:
    m, n, dim = sizes
    queries, bank = 3 * features(m, dim), 0.2 * features(n, dim, seed=1)
    labels = torch.arange(n) % 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "QUERIES", blocks[0])
        patch.setattr(neighbours, "BANK", blocks[1])
        scores = weighted_knn(queries, bank, labels, 4, k, temperature)
    similarities = torch.cosine_similarity(queries[:, None], bank[None], dim=2)
    for row, mine in zip(similarities, scores, strict=True):
        votes = torch.zeros(4, dtype=torch.float64)
        for neighbour in row.argsort(descending=True)[:k]:
            votes[labels[neighbour]] += ((row[neighbour] - row.max()) / temperature).exp()
        torch.testing.assert_close(mine, votes / votes.sum())


def test_a_low_temperature_does_not_overflow() -> None:
    bank = features(5, 3).float()
    scores = weighted_knn(bank, bank, torch.arange(5), 5, k=5, temperature=0.001)
    torch.testing.assert_close(scores, torch.eye(5))


def test_neighbours_come_in_order_and_with_their_rows() -> None:
    queries, bank = features(4, 8), features(30, 8, seed=1)
    similarities, rows = nearest(queries, bank, 7)
    assert (similarities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(
        similarities, torch.cosine_similarity(queries[:, None], bank[rows], dim=2)
    )


def test_the_choice_is_the_best_of_the_exam(tmp_path: Path) -> None:
    command = [*DIGITS, "stage.k=[3,500]", "stage.temperatures=[0.05,0.5]", f"dir={tmp_path}/run"]
    result = launch(compose(*command))
    with open(tmp_path / "run" / "grid.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["k"], row["temperature"]) for row in rows] == [
        (3, 0.05),
        (3, 0.5),
        (500, 0.05),
        (500, 0.5),
    ]
    best = max(rows, key=lambda row: row["holdout_top1"])
    assert {key: result[key] for key in best} == best
    assert result["holdout_top1"] > 80 > min(row["holdout_top1"] for row in rows)
    # measured with the whole training split as the bank, as one k and one temperature are
    only = [f"stage.k=[{best['k']:.0f}]", f"stage.temperatures=[{best['temperature']}]"]
    alone = launch(compose(*DIGITS, *only, f"dir={tmp_path}/alone"))
    assert "holdout_top1" not in alone
    assert [alone[key] for key in ("val_top1", "val_ece")] == [
        result[key] for key in ("val_top1", "val_ece")
    ]
    assert result["val_top5"] >= result["val_top1"]  # of a run that tries five neighbours or more
    assert "val_top5" not in alone  # three have no five classes
    with pytest.raises(UserError, match=r"metric=val_top5: stage.k=\[3\] has no five neighbours"):
        launch(compose(*DIGITS, "stage.k=[3]", "metric=val_top5", f"dir={tmp_path}/refused"))
    assert 0 < result["val_ece"] < 100
    bins = calibration.loaded(json.loads((tmp_path / "run" / "reliability.json").read_text()))
    assert bins[0].sum() == 500
    assert 100 * bins[2].sum().item() / 500 == pytest.approx(result["val_top1"])
    assert calibration.expected_error(bins) == result["val_ece"]
    (line,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert line == {"step": 1, "epoch": 1.0, **result}
    assert launch(compose(*command)) == result


def test_val_labels_choose_nothing(tmp_path: Path) -> None:
    write_dl21(tmp_path / "data", 1, 60, 40, num_classes=4, image_size=16, workers=1)
    command = [
        "stage=knn",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
        "data.image_size=16",
    ]
    command += ["backbone.width=8", "backbone.stem=small"]
    true = launch(compose(*command, f"dir={tmp_path}/true"))
    path = tmp_path / "data" / "val_label_tensor.pt"
    torch.save((torch.load(path, weights_only=True) + 1) % 4, path)
    poisoned = launch(compose(*command, f"dir={tmp_path}/poisoned"))
    assert true["val_top1"] != poisoned["val_top1"]
    assert [true[key] for key in ("k", "temperature", "holdout_top1")] == [
        poisoned[key] for key in ("k", "temperature", "holdout_top1")
    ]
    assert (tmp_path / "true" / "grid.csv").read_text() == (
        tmp_path / "poisoned" / "grid.csv"
    ).read_text()


def test_the_exam_is_asked_of_others(tmp_path: Path) -> None:
    """Labels without a pattern: an image in its own bank would know its own."""
    write_dl21(tmp_path / "data", 1, 80, 40, num_classes=4, image_size=16, workers=1)
    path = tmp_path / "data" / "train_label_tensor.pt"
    torch.save(
        torch.load(path, weights_only=True)[
            torch.randperm(80, generator=torch.Generator().manual_seed(0))
        ],
        path,
    )
    command = [
        "stage=knn",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
        "data.image_size=16",
    ]
    result = launch(compose(*command, "backbone=pixels", "stage.k=[1,3]", f"dir={tmp_path}/run"))
    assert result["holdout_top1"] < 60


def test_a_signal_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*DIGITS, "stage.k=[3]", "stage.temperatures=[0.07]", f"dir={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stopping", lambda self, step: step == 2)
        with pytest.raises(Interrupted):
            launch(compose(*command))
    assert launch(compose(*command))["val_top1"] > 50


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stage.labels_per_class=3", "stage.k=[30]"],
         r"stage.k=\[30\]: more than the 20 images of the bank; choose"),
        (["stage.labels_per_class=1"],
         r"stage=knn chooses by held-out labels, .* type one of each: stage.k=\[20\]"),
        (["stage.labels_per_class=1", "stage.label_fraction=0.1"], "give one of the two"),
        (["stage.label_fraction=0.001"],
         "of 1,297 images is 1, and one of each class makes 10: choose a larger share"),
        (["dir=null"], "dir=null: stage=knn writes its result there"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        launch(compose(*DIGITS, f"dir={tmp_path}/run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes(ssl_bench: Command, tmp_path: Path) -> None:
    """1,297 and 500 images in two shares are the same as in one."""
    ssl_bench(*DIGITS, "dir=one", check=True)
    on_ranks([*DIGITS, "devices=2", "dir=two"], tmp_path)
    one, two = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    )
    # batches of other sizes round differently: an image more or less
    assert one == pytest.approx(two, abs=0.4)
    assert complaint(ssl_bench(*DIGITS, "stage.k=20")).startswith(
        "stage.k=20: input should be a valid tuple"
    )
