"""Linear classification from cached features: what a grid's heads learn, and what may choose among
them.
"""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cached_lincls import CACHED, DIGITS, Features, state, train
from commands import complaint, compose
from conftest import Command
from PIL import Image
from processes import on_ranks
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ssl_bench.config import build
from ssl_bench.data.source import FeatureSource
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.evaluate.labels import hold_out
from ssl_bench.launch.process import launch
from ssl_bench.methods.probe import IGNORED, LinearGrid, LinearProbe
from ssl_bench.stages._lincls_grid import GridOptions, check_options


def grid(run: Path) -> list[dict[str, float]]:
    with open(run / "grid.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_features_are_standardised_and_a_head_is_examined_and_chosen() -> None:
    """That heads learn as if alone: tests/training/test_optim.py."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randint(4, (64,), generator=generator)
    many = LinearGrid(Features(), 4, 3, normalize=True).double().train()
    many.standardise([x[:32], x[32:]])
    torch.testing.assert_close(
        many.norm(x).var(dim=0, correction=0), torch.ones(6).double(), rtol=1e-3, atol=1e-3
    )
    groups = [{"params": pair, "lr": 0.1 * i} for i, pair in enumerate(many.pairs())]
    targets = torch.stack([y, y.masked_fill(y == 0, IGNORED)], dim=1)
    train(many, torch.optim.SGD(groups, lr=1), x, targets)
    scores = many.score(x, y)
    for cell in range(3):
        one = LinearProbe(Features(), 4).double()
        one.fc.weight, one.fc.bias = many.weights[2 * cell + 1], many.biases[2 * cell + 1]
        result = one([many.norm(x)], y)
        means = torch.stack([result["accuracy"].double(), result["loss"].detach()])
        torch.testing.assert_close(scores[cell], means * len(y))
        many.choose(cell)
        torch.testing.assert_close(many.logits(x), many.heads(x)[:, cell, 0])


def test_loss_and_accuracy_are_those_of_the_chosen_classifier() -> None:
    """As a LinearProbe of these weights has them; the gradient is that of all."""
    x, y = torch.randn(32, 6).double(), torch.randint(4, (32,))
    many = LinearGrid(Features(), 4, 3, kept=0.75).double()
    for number, weight in enumerate(many.weights):
        torch.nn.init.normal_(weight, std=1 + number)
    labels = torch.stack([y, y.masked_fill(torch.arange(32) < 8, IGNORED)], dim=1)
    gradients = []
    for cell in range(3):
        many.choose(cell)
        shown, one = many([x], labels), LinearProbe(Features(), 4).double()
        one.fc.weight, one.fc.bias = many.weights[2 * cell], many.biases[2 * cell]
        torch.testing.assert_close(shown["loss"].detach(), one([x], y)["loss"].detach())
        assert shown["accuracy"] == one([x], y)["accuracy"]
        assert torch.equal(
            many.seen[:, cell], torch.stack([*map(Tensor.detach, shown.values())]).double()
        )
        gradients.append(torch.cat(torch.autograd.grad(shown["loss"], [*many.weights]), dim=1))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert all(part.any() for part in gradients[0].split(6, dim=1))


def test_a_batch_held_out_altogether_teaches_nothing() -> None:
    probe = LinearGrid(Features(), 4, 1)
    loss = probe([torch.randn(3, 6)], torch.tensor([[0, IGNORED], [1, IGNORED], [2, IGNORED]]))[
        "loss"
    ]
    loss.backward()
    assert loss.isfinite()
    assert probe.weights[0].grad.abs().sum() > 0
    assert not probe.weights[1].grad.any()


def test_hold_out_takes_a_share_of_each_class() -> None:
    labels = np.repeat([3, 5, 9], [50, 10, 2])
    held = hold_out(labels, 0.2, seed=0)
    assert [held[labels == label].sum() for label in (3, 5, 9)] == [10, 2, 1]
    assert not np.array_equal(held, hold_out(labels, 0.2, seed=1))
    assert [hold_out(labels, 0.9, 0)[labels == label].sum() for label in (3, 5, 9)] == [45, 9, 1]
    with pytest.raises(
        UserError, match=r"class 7 has one image to learn from: give each class two"
    ):
        hold_out(np.array([3, 3, 7]), 0.2, seed=0)


def test_features_come_in_the_order_of_images() -> None:
    """Every row once an epoch; the epochs in turn from the copies; two processes have the parts of
    one batch.
    """
    copies, labels = [torch.arange(7.0)[:, None] + 100 * i for i in range(2)], torch.arange(7)
    whole = list(FeatureSource(copies, labels, 2, seed=0).stream(0, 9))
    parts = [
        list(FeatureSource(copies, labels, 2, 0, "cpu", rank, 2).stream(4, 9)) for rank in range(2)
    ]
    for (step, x, y, rows), one, two in zip(whole[4:], *parts, strict=True):
        assert step == one[0] == two[0]
        assert torch.equal(x[:, 0], y + 100.0 * (step // 3 % 2))
        assert torch.equal(y, rows)
        assert torch.equal(torch.cat([one[1], two[1]]), x)
    assert len(set(torch.cat([y for _, _, y, _ in whole[:3]]).tolist())) == 6


@pytest.mark.parametrize("normalize", [False, True])
def test_as_many_copies_as_epochs_are_the_official_protocol(
    tmp_path: Path, normalize: bool
) -> None:
    """Normalised, each official batch has statistics of its own: then only about."""
    common = ["optimizer.base_lr=3", "optimizer.weight_decay=1e-3", f"stage.normalize={normalize}"]
    official = launch(compose(*DIGITS, *common, f"dir={tmp_path}/official"))
    cell = ["stage.lrs=[1,3]", "stage.weight_decays=[1e-3]", "stage.copies=2"]
    cached = launch(compose(*CACHED, *common, *cell, f"dir={tmp_path}/cached"))
    one, many = state(tmp_path / "official"), state(tmp_path / "cached")
    head = many["weights.2"]  # of the second cell, which learns from all
    if normalize:
        assert (
            torch.corrcoef(torch.stack([one["fc.weight"].flatten(), head.flatten()]))[0, 1] > 0.95
        )
    else:
        torch.testing.assert_close(one["fc.weight"], head, rtol=1e-3, atol=1e-4)
    chosen = grid(tmp_path / "cached")[[1, 3].index(cached["lr"])]
    assert (cached["weight_decay"], cached["holdout_top1"]) == (1e-3, chosen["holdout_top1"])
    assert torch.equal(many["fc.weight"], many[f"weights.{2 * [1, 3].index(cached['lr'])}"])
    if cached["lr"] == 3 and not normalize:
        assert cached["val_top1"] == pytest.approx(official["val_top1"], abs=0.21)


def test_val_labels_choose_nothing(tmp_path: Path) -> None:
    write_dl21(tmp_path / "data", 1, 60, 40, num_classes=4, image_size=16, workers=1)
    command = [
        "stage=lincls",
        "stage.features=cached",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
    ]
    command += [
        "data.image_size=16",
        "backbone.width=8",
        "backbone.stem=small",
        "batch_size=20",
        "epochs=4",
    ]
    true = launch(compose(*command, f"dir={tmp_path}/true"))
    path = tmp_path / "data" / "val_label_tensor.pt"
    torch.save(torch.zeros_like(torch.load(path, weights_only=True)), path)
    poisoned = launch(compose(*command, f"dir={tmp_path}/poisoned"))
    assert true["val_loss"] != poisoned["val_loss"]
    assert [true[key] for key in ("lr", "weight_decay", "holdout_top1")] == [
        poisoned[key] for key in ("lr", "weight_decay", "holdout_top1")
    ]
    one, other = state(tmp_path / "true"), state(tmp_path / "poisoned")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_exam_is_not_learnt(tmp_path: Path) -> None:
    """Labels without a pattern, learnt by heart by one head: the other one hasn't heard of those it
    is asked for.
    """
    write_dl21(tmp_path / "data", 1, 80, 40, num_classes=4, image_size=16, workers=1)
    path = tmp_path / "data" / "train_label_tensor.pt"
    torch.save(
        torch.load(path, weights_only=True)[
            torch.randperm(80, generator=torch.Generator().manual_seed(0))
        ],
        path,
    )
    command = [
        "stage=lincls",
        "stage.features=cached",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
    ]
    command += [
        "data.image_size=16",
        "backbone=pixels",
        "batch_size=20",
        "epochs=100",
        "eval_every=0",
    ]
    result = launch(
        compose(*command, "stage.lrs=[1,1.1]", "stage.weight_decays=[0]", f"dir={tmp_path}/run")
    )
    assert result["accuracy"] > 0.95
    assert result["holdout_top1"] < 60


@pytest.mark.parametrize("stage", ["lincls", "finetune"])
def test_what_is_measured_is_what_was_asked_for(tmp_path: Path, stage: str) -> None:
    """The saved network on the val images as torchvision shows them: all of them once, resized,
    cut, normalised.
    """
    write_dl21(tmp_path / "data", 1, 60, 23, num_classes=4, image_size=16, workers=1)
    command = [
        f"stage={stage}",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
        "data.image_size=16",
    ]
    command += [
        "augmentation.image_size=12",
        "stage.test_resize=1.5",
        "augmentation.std=[0.5,0.4,0.3]",
    ]
    command += [
        "stage.label_fraction=0.5",
        "batch_size=10",
        "epochs=2",
        "optimizer.base_lr=1",
        f"dir={tmp_path}/run",
    ]
    normalize = stage == "lincls"
    cfg = compose(
        *command, "backbone.width=8", "backbone.stem=small", *["stage.normalize=true"] * normalize
    )
    result = launch(cfg)
    assert result["images_seen"] == 2 * 30
    saved = state(tmp_path / "run")
    assert any(key.startswith("norm.") for key in saved) == normalize
    network = build.construct(cfg.backbone).eval()
    network.load_state_dict(
        {key.removeprefix("backbone."): saved[key] for key in saved if key.startswith("backbone.")}
    )
    probe = LinearProbe(network, 4, normalize).eval()
    probe.load_state_dict({key: saved[key] for key in probe.state_dict()})
    images = [
        tv.to_image(Image.open(tmp_path / "data" / "val" / f"{index}.png")) for index in range(23)
    ]
    shown = tv.center_crop(tv.resize(torch.stack(images), [18], antialias=True), [12, 12]) / 255
    with torch.no_grad():
        logits = probe.logits(tv.normalize(shown, [0.485, 0.456, 0.406], [0.5, 0.4, 0.3]))
    labels = torch.load(tmp_path / "data" / "val_label_tensor.pt", weights_only=True)
    assert result["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result["val_top1"] == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean().item()
    )


def test_the_choice_is_the_best_of_the_exam(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssl_bench")
    few = [
        "stage.labels_per_class=10",
        "batch_size=50",
        "stage.normalize=true",
        "stage.holdout=0.3",
    ]
    result = launch(compose(*CACHED, *few, "stage.lrs=[1e-6,1e-5]", f"dir={tmp_path}/run"))
    assert result.keys() >= {"val_top1", "val_top5", "val_loss"}
    rows = grid(tmp_path / "run")
    assert len(rows) == 2 * len(GridOptions().weight_decays)
    best = max(rows, key=lambda row: (row["holdout_top1"], -row["holdout_loss"]))
    assert {key: result[key] for key in ("lr", "weight_decay", "holdout_top1")} == {
        key: best[key] for key in ("lr", "weight_decay", "holdout_top1")
    }
    assert "on 30 held-out images" in caplog.text
    assert "at the edge of stage.lrs" in caplog.text
    measured = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    # once, at the end
    assert ["val_top1" in line for line in measured] == [False, False, False, True]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimizer.base_lr=0.07"],
         "base_lr=0.07 would be ignored: stage.features=cached tries stage.lrs=[0.01,"),
        (["optimizer.weight_decay=0.5"], "type stage.weight_decays=[0.5], with others to try"),
        (["batch_size=4096", "stage.weight_decays=[0,0.1]"],
         "a step would take 160 times the weights from"),
    ],
    ids=["lr", "weight decay", "both too large"],
)  # fmt: skip
def test_an_optimizer_that_would_be_ignored(overrides: list[str], says: str) -> None:
    cfg = compose(*CACHED, *overrides)
    with pytest.raises(UserError) as caught:
        check_options(cfg, GridOptions(weight_decays=tuple(cfg.stage.weight_decays)))
    assert says in str(caught.value)


def test_the_recipe_itself_and_what_is_in_the_grid_are_no_mistakes() -> None:
    check_options(compose(*CACHED), GridOptions(lrs=(0.1,), weight_decays=(1e-6,)))
    check_options(
        compose(*CACHED, "optimizer.base_lr=0.1", "optimizer.weight_decay=1e-4"), GridOptions()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["stage.copies=1"],
            "stage.copies=1 would be ignored: it is for stage.features=cached; add that",
        ),
        (
            ["stage.lrs=[0.1,1]"],
            "stage.lrs=[0.1,1] would be ignored: it is for stage.features=cached; add that",
        ),
        (
            ["stage.features=cached", "stage.labels_per_class=1", "batch_size=10"],
            "class 0 has one image",
        ),
        (
            ["stage.features=cached", "stage.lrs=[]"],
            "stage.lrs=[]: tuple should have at least 1 item",
        ),
        (
            ["stage.features=cached", "stage.holdout=1"],
            "stage.holdout=1: input should be less than 1",
        ),
    ],
)
def test_mistakes(ssl_bench: Command, tmp_path: Path, overrides: list[str], says: str) -> None:
    assert says in complaint(ssl_bench(*DIGITS, *overrides))
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


@pytest.mark.slow
def test_two_processes(ssl_bench: Command, tmp_path: Path) -> None:
    """1,297 images don't divide by 2, nor does the val split's share of the last batch."""
    command = [*CACHED, "stage.copies=1", "stage.lrs=[0.3,3]"]
    ssl_bench(*command, "dir=one", check=True)
    on_ranks([*command, "dir=two", "devices=2"], tmp_path)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for head in range(8):
        torch.testing.assert_close(
            one[f"weights.{head}"], two[f"weights.{head}"], rtol=1e-3, atol=1e-4
        )
    results = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    ]
    # an image more or less
    assert results[0]["holdout_top1"] == pytest.approx(results[1]["holdout_top1"], abs=0.4)
