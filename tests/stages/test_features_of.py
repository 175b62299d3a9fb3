"""`stage.features_of`: what a classifier learns from, in its run and wherever its weights go."""

from pathlib import Path

import pytest
import torch
from commands import compose
from torch import Tensor

from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.report import grouping
from ssl_bench.runs import record
from ssl_bench.stages._pretrained import open_pretrained

VIT = ["data=digits", "data.image_size=16", "backbone=vit_tiny", "backbone.patch_size=4"]
VIT += ["backbone.depth=2", "stage.labels_per_class=3", "device=cpu"]
LINCLS = ["stage=lincls", *VIT, "batch_size=30", "epochs=2", "augmentation.flip_p=0"]
ATTENTIVE = ["stage.features_of=attentive", "optimizer=attentive", "schedule=cosine"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"usual": [], "joined": ["stage.features_of=last_2"], "attentive": ATTENTIVE}
    for name, words in kinds.items():
        launch(compose(*LINCLS, *words, f"dir={folder}/{name}"))
    return folder


def test_each_has_a_row_of_its_own(runs: Path) -> None:
    found = sorted(record.find([runs]), key=lambda ran: ran.directory.name)
    (board,) = grouping.boards(found)
    names = sorted(group.name for group in board.groups)
    assert len({ran.identity.key for ran in found}) == 3
    assert any("features_of=last_2" in name for name in names)
    assert any("features_of=attentive" in name for name in names)
    assert found[1].identity.title.endswith("lincls-last_2-3-labels-a-class")


@pytest.mark.parametrize("name", ["joined", "attentive"])
def test_weights_come_with_what_their_classifier_was_given(runs: Path, name: str) -> None:
    (file,) = (runs / name / "checkpoints").glob("step*2.pt")
    state = torch.load(file, weights_only=True)["model"]
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    opened = open_pretrained(
        compose("stage=predict", f"pretrained={runs / name}", "stage.images=x")
    )
    backbone = build.construct(opened.network)

    def blocks() -> Tensor:
        backbone.load_state_dict(
            {key[9:]: state[key] for key in state if key.startswith("backbone.")}
        )
        one, two = backbone.eval().last_tokens(images, 2)
        if name == "attentive":
            return two[:, 1:]
        return torch.cat([one[:, 0], two[:, 0], two[:, 1:].mean(1)], dim=1)

    with torch.no_grad():
        features = blocks()
        backbone.dim = features.shape[-1]
        probe = LinearProbe(backbone, 10, attentive=name == "attentive").eval()
        probe.load_state_dict(state)
        expected = probe.fc(probe.pool(features))
        assert opened.backbone(images).shape == (3, opened.backbone.dim)
        torch.testing.assert_close(opened.classifier(opened.backbone(images)), expected)


def test_neighbours_are_of_these_features(tmp_path: Path) -> None:
    found = {}
    for choice in ("null", "cls", "mean"):
        words = [f"stage.features_of={choice}", "stage.k=[5]", "stage.temperatures=[0.07]"]
        result = launch(compose("stage=knn", *VIT, *words, f"dir={tmp_path}/{choice}"))
        found[choice] = result["val_top1"]
    assert found["null"] == found["cls"] != found["mean"]
    assert min(found.values()) > 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage=lincls", "stage.features_of=token"],
         r"stage\.features_of=token: choose cls, mean, last_4 \(or another number"),
        (["stage=knn", "stage.features_of=attentive"], r"attentive: choose cls, mean or last_4"),
        (["stage=lincls", "stage.features_of=last_0"], "choose cls, mean, last_4"),
    ],
)  # fmt: skip
def test_choices(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build.check(compose(*words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage.features_of=attentive"], "type optimizer=attentive schedule=cosine"),
        ([*ATTENTIVE, "stage.features=cached"], r"type stage\.features=official"),
        ([*ATTENTIVE, "stage.normalize=true"], r"type stage\.normalize=false"),
        (["stage.features_of=last_3"], r"choose at most stage\.features_of=last_2"),
        (["stage.features_of=mean", "backbone=resnet18"], "this backbone has no tokens"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, words: list[str], says: str) -> None:
    kept = [word for word in LINCLS if not ("resnet" in words[-1] and word.startswith("backbone"))]
    with pytest.raises(UserError, match=says):
        launch(compose(*kept, *words, f"dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


def test_a_classifier_that_selects_is_asked_of_its_own_features(runs: Path, tmp_path: Path) -> None:
    command = ["stage=select", "stage.strategy=margin", "stage.budget=5", "stage.cover_train=false"]
    command += [*(word for word in VIT if "labels_per_class" not in word), f"dir={tmp_path}/run"]
    with pytest.raises(UserError, match=r"type stage\.features_of=last_2"):
        launch(compose(*command, f"pretrained={runs}/joined"))
    with pytest.raises(UserError, match=r"features_of=attentive: choose another stage\.strategy="):
        launch(compose(*command, f"pretrained={runs}/attentive"))
    result = launch(compose(*command, f"pretrained={runs}/joined", "stage.features_of=last_2"))
    assert result["num_chosen"] == 5
