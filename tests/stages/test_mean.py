"""stage=average: the mean of the last checkpoints of a run."""

import json
from pathlib import Path

import pytest
import torch
from commands import compose
from conftest import TINY_PRETRAIN

from ssl_bench.errors import UserError
from ssl_bench.launch.continuing import continued
from ssl_bench.launch.process import launch
from ssl_bench.runs import layout, record

OWN = [word for word in TINY_PRETRAIN if word.startswith("backbone.")] + ["data.image_size=16"]


def command(*words: str) -> dict[str, float]:
    return launch(continued(compose(*words), words))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps, with its states after 8, 12, 16 and 20."""
    home = tmp_path_factory.mktemp("average") / "run"
    command(*TINY_PRETRAIN, "keep=4", "eval_every=0", f"dir={home}")
    return home


def model(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_the_mean_of_the_last_ones(home: Path, tmp_path: Path) -> None:
    result = command("stage=average", f"pretrained={home}", "stage.last=3", f"dir={tmp_path}/mean")
    assert result == {"checkpoints": 3, "first_step": 12, "last_step": 20}
    files = layout.complete(home)[:3]
    parts = [model(path) for path in files]
    mean = model(tmp_path / "mean" / "checkpoints" / files[0].name)
    assert mean.keys() == parts[0].keys()
    for key, value in mean.items():
        if value.is_floating_point():
            expected = torch.stack([part[key].double() for part in parts]).mean(0)
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, parts[0][key])
    assert any(not torch.equal(mean[key], parts[0][key]) for key in mean)
    sums = json.loads((tmp_path / "mean" / "averaged.json").read_text())
    assert list(sums) == [path.name for path in files[::-1]]


def test_it_is_measured_like_the_run(home: Path) -> None:
    mean = home / "average" / "last2"
    command("stage=average", f"pretrained={home}", "stage.last=2", f"dir={mean}")
    at = home / "average" / "last2" / "knn"
    measured = command("stage=knn", *OWN, f"pretrained={mean}", f"dir={at}")
    assert measured["val_top1"] > 30
    found = {ran.directory: ran for ran in record.find([home])}
    line = found[at].identity.line()
    assert [one.stage for one in line] == ["pretrain", "average", "knn"]
    title = "moco_v2-resnet18-digits-average-knn"
    assert found[at].identity.title == title
    alone = command("stage=knn", *OWN, f"pretrained={home}", f"dir={home}/knn")
    assert alone != measured
    runs = {ran.directory: ran for ran in record.find([home])}
    assert not runs[at].identity.alike(runs[home / "knn"].identity)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage.last=5"], "has kept 4 checkpoints: type stage.last=4, or train one with keep=5"),
        (["pretrained=null"], "stage=average needs a run: type pretrained=RUN"),
        (["pretrained={}/views.png"], "no run with a checkpoint"),
        (
            ["pretrained={}/checkpoints/step0000000008.pt"],
            "has kept 1 checkpoint: another run, or train one with keep=5",
        ),
    ],
)
def test_mistakes(home: Path, tmp_path: Path, words: list[str], said: str) -> None:
    words = ["stage=average", f"pretrained={home}", f"dir={tmp_path}/mean"] + [
        word.replace("{}", str(home)) for word in words
    ]
    with pytest.raises(UserError) as caught:
        command(*words)
    assert said in str(caught.value)
    assert not (tmp_path / "mean").exists()


def test_a_number_of_checkpoints_to_keep(home: Path) -> None:
    assert [layout.step_of(path) for path in layout.complete(home)] == [20, 16, 12, 8]
