"""Stage pretrain: what it measures while it learns, and what it refuses."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import compose
from compared import assert_identical
from conftest import TINY, TINY_PRETRAIN

from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs import layout, record, tracking
from ssl_bench.runtime import distributed
from ssl_bench.stages.pretrain import pretrain

RUN = [
    "stage=pretrain",
    "data=dl21",
    "data.image_size=16",
    "data.workers=1",
    "backbone.width=8",
    "backbone.stem=small",
]
RUN += ["method.queue_size=8", "batch_size=8", "epochs=1", "eval_every=1", "log_every=1"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """8 unlabelled images; 2 for training of each of 3 classes."""
    write_dl21(tmp_path / "dl21", 8, 6, 3, num_classes=3, image_size=16, workers=1)
    return [
        *RUN,
        f"data.root={tmp_path}/dl21",
        f"data.cache={tmp_path}/cache",
        f"dir={tmp_path}/run",
    ]


@pytest.mark.parametrize(("broken", "judged"), [([], True), ([0], True), ([0, 1], False)])
def test_the_judges_are_pairs_that_can_be_decoded(
    command: list[str], tmp_path: Path, broken: list[int], judged: bool
) -> None:
    """The first two images are of different classes: without them one class has two."""
    for index in broken:
        (tmp_path / "dl21" / "train" / f"{index}.png").write_bytes(b"no image")
    result = launch(compose(*command, "data.on_error=skip"))
    assert ("knn_top1" in result) == judged


def test_one_image_judges_nothing(command: list[str]) -> None:
    result = launch(compose(*command, "stage.online_images=1"))
    assert not [key for key in result if key.startswith(("knn", "features_"))]


def test_features_are_measured_without_labels(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the test view shows them, of the images that are learnt from, where none has a label."""
    monkeypatch.setattr("ssl_bench.stages.pretrain.judges", lambda *of: None)
    result = launch(compose(*command, "stage.online_images=7"))
    assert "knn_top1" not in result
    assert 1 <= result["features_rankme"] <= 7
    assert result["features_uniformity"] <= 0


# -- from weights there are ------------------------------------------------------------------------

STILL = ["optimizer.base_lr=1e-30", "optimizer.weight_decay=0"]
DIGITS = [*TINY_PRETRAIN, "epochs=1"]


@pytest.fixture
def simclr(tmp_path: Path) -> Path:
    """A run of another method."""
    run = tmp_path / "simclr" / "seed0"
    launch(compose(*TINY, "stage=pretrain", "method=simclr", "epochs=1", f"dir={run}"))
    return run


def parameters(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Without what batch norm has seen, which moves at any rate."""
    state = torch.load(layout.complete(run)[0], weights_only=True)["model"]
    found = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    return {key: x for key, x in found.items() if "running" not in key and "num_batches" not in key}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_begins_with_the_weights_given(tmp_path: Path, simclr: Path) -> None:
    """In every copy of the backbone; heads are those of a run without."""
    for name, words in {"on": [f"pretrained={simclr}"], "scratch": []}.items():
        launch(compose(*DIGITS, *STILL, *words, f"dir={tmp_path}/{name}"))
    theirs, on, scratch = simclr, tmp_path / "on", tmp_path / "scratch"
    assert same(parameters(on, "backbone."), parameters(theirs, "backbone."))
    assert same(parameters(on, "key_backbone."), parameters(theirs, "backbone."))
    assert same(parameters(on, "head."), parameters(scratch, "head."))
    assert not same(parameters(on, "backbone."), parameters(scratch, "backbone."))


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_says_what_it_stands_on(tmp_path: Path, simclr: Path) -> None:
    command = [*DIGITS, f"pretrained={simclr}", f"dir={tmp_path}/on/seed0"]
    whole = launch(compose(*command))
    run = tmp_path / "on" / "seed0"
    last = layout.complete(run)[0]
    before = torch.load(last, weights_only=True)
    for path in (last, run / "summary.json", run / "SHA256SUMS"):
        path.unlink()
    again = launch(compose(*command))
    assert_identical(torch.load(last, weights_only=True), before)
    assert again["loss"] == whole["loss"]

    (ran,) = [ran for ran in record.find([tmp_path]) if ran.directory == run]
    assert ran.identity.below.name == "simclr"
    assert ran.identity.title == "simclr-resnet18-digits-moco_v2"
    assert tracking._tags(ran.identity, ()) == [
        "pretrain",
        "simclr",
        "moco_v2",
        "resnet18",
        "digits",
    ]
    scratch = launch(compose(*DIGITS, f"dir={tmp_path}/scratch/seed0"))
    assert scratch["loss"] != whole["loss"]
    launch(compose("stage=report", f"runs={tmp_path}", "metric=loss"))
    table = (tmp_path / "results.md").read_text()
    assert "| moco_v2 pretrained=simclr" in table

    command[-1] = f"dir={tmp_path}/scratch/seed0"
    with pytest.raises(UserError, match=r"another configuration: pretrained was None, is .*simclr"):
        launch(compose(*command))


def test_its_place_is_named_after_the_weights(simclr: Path) -> None:
    plain, on = (str(compose(*DIGITS, *words).dir) for words in ([], [f"pretrained={simclr}"]))
    assert plain == "runs/moco_v2-resnet18-digits/seed0"
    assert re.fullmatch(r"runs/moco_v2-resnet18-digits-from-\S+-\w{8}/seed0", on)


def test_labels_that_the_weights_have_learnt_judge_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssl_bench")
    supervised = tmp_path / "supervised"
    method = ["stage=pretrain", "method=supervised", "epochs=1"]
    launch(compose(*TINY, *method, f"dir={supervised}"))
    result = launch(compose(*DIGITS, f"pretrained={supervised}", f"dir={tmp_path}/on"))
    assert "probe_top1" not in result
    assert any("none are left to judge by" in message for message in caplog.messages)
    assert json.loads((tmp_path / "on" / "labels.json").read_text())["seen"]


def test_weights_that_are_not_there_are_told_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pretrained=none: no such file or run directory"):
        launch(compose(*DIGITS, "pretrained=none", f"dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["eval_every=0", "stage.online_images=0"])
def test_a_metric_that_nothing_measures(command: list[str], tmp_path: Path, off: str) -> None:
    words = [*command, off, "metric=knn_top1"]
    with pytest.raises(UserError, match=r"^metric=knn_top1: nothing measures it with eval_every="):
        launch(compose(*words))
    assert not (tmp_path / "run").exists()


PIXELS = ["backbone=pixels", "augmentation.image_size=8"]
VIT = ["backbone=vit_tiny", "backbone.patch_size=8"]
MISTAKES = {
    "no labels": (["method=supervised", "data=folder"], "has no labels, so no split 'train'"),
    "pixels": (
        PIXELS,
        "augmentation.image_size=8 is not backbone.image_size=16; backbone=pixels doesn't take it",
    ),
    "patches": (
        [*VIT, "augmentation.image_size=12"],
        "augmentation.image_size=12 is no multiple of backbone.patch_size=8",
    ),
    "small views": (
        [*VIT, "method=dino", "augmentation.small_size=4"],
        "augmentation.small_size=4 is no multiple of backbone.patch_size=8; "
        "backbone=vit_tiny doesn't take it",
    ),
}


@pytest.mark.parametrize(("overrides", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(command: list[str], tmp_path: Path, overrides: list[str], says: str) -> None:
    ours = [word for word in command if "queue" not in word and not word.startswith("backbone.")]
    with pytest.raises(UserError) as caught:
        launch(compose(*ours, *overrides))
    assert says in str(caught.value)
    assert not (tmp_path / "cache").exists()  # said before an image was read


@pytest.mark.parametrize("stage", ["lincls", "knn", "finetune", "select stage.budget=9"])
def test_sizes_of_the_other_stages(tmp_path: Path, stage: str) -> None:
    command = [*f"stage={stage}".split(), "data.image_size=16", *PIXELS]
    with pytest.raises(UserError, match=r"augmentation.image_size=8 is not backbone.image_size=16"):
        launch(compose(*command, f"data.cache={tmp_path}/cache", f"dir={tmp_path}/run"))
    assert not (tmp_path / "cache").exists()


def test_batch_norm_over_parts_is_not_synchronised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    run = SimpleNamespace(device=torch.device("cpu"), is_main=False)
    cfg = compose(
        "stage=pretrain", "sync_batch_norm=true", "method.queue_size=512", f"dir={tmp_path}"
    )
    with pytest.raises(
        UserError,
        match=r"sync_batch_norm=true.*method\.bn_splits=4.*type sync_batch_norm=false, or",
    ):
        pretrain(cfg, run)
