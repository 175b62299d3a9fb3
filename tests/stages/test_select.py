"""Stage select: what it writes, what it leaves out, and what a restart finds."""

import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import complaint, compose
from conftest import Command
from PIL import Image

from ssl_bench.augment.views import EvalView
from ssl_bench.config import build
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import Interrupted, UserError
from ssl_bench.evaluate import features, selection
from ssl_bench.evaluate.features import extract_all
from ssl_bench.launch.process import launch
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.runs import weights

TINY = ["data.image_size=16", "data.workers=1", "backbone.width=8", "backbone.stem=small"]
KNOWN = [3, 50, 7]  # have extra labels
ASKED = [0, 59, 21]  # were asked for
FEATURES = ["kmeans_plusplus", "k_center", "typiclust"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 unlabelled images, 12 for training; two requests, of which one has labels. No val split:
    nothing needs it.
    """
    root = tmp_path_factory.mktemp("select") / "data"
    write_dl21(root, 60, 12, 4, num_classes=4, image_size=16, workers=1)
    shutil.rmtree(root / "val")
    (root / "val_label_tensor.pt").unlink()
    for number, indices in ((0, KNOWN), (4, ASKED)):
        (root / f"request_{number:02d}.csv").write_text("".join(f"{index}\n" for index in indices))
    torch.save(torch.tensor(KNOWN) % 4, root / "label_00.pt")
    return root


@pytest.fixture
def command(root: Path, tmp_path: Path) -> list[str]:
    return [
        *TINY,
        "stage=select",
        "data=dl21",
        f"data.root={root}",
        "stage.budget=10",
        f"dir={tmp_path}/run",
    ]


def request(folder: Path) -> list[int]:
    (path,) = folder.glob("request_*.csv")
    return [int(line) for line in path.read_text().split()]


@pytest.mark.parametrize("strategy", ["random", *FEATURES])
def test_the_request(command: list[str], tmp_path: Path, strategy: str) -> None:
    extra = ["data.extra_labels=[request_00.csv,label_00.pt]", "stage.requested=request_04.csv"]
    result = launch(compose(*command, *extra, f"stage.strategy={strategy}", "batch_size=7"))
    run = tmp_path / "run"
    chosen = request(run)
    assert [path.name for path in run.glob("request_*.csv")] == ["request_05.csv"]
    assert len(set(chosen)) == result["num_chosen"] == 10
    assert set(chosen) <= set(range(60)) - {*KNOWN, *ASKED}
    assert chosen != sorted(chosen)
    with open(run / "chosen.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == chosen
    assert all(row["image"].endswith(f"/unlabeled/{row['index']}.png") for row in rows)
    assert result["num_covered"] == (6 if strategy == "random" else 12 + 6)
    assert strategy == "random" or 0 < result["mean_distance"] < 2


def test_the_contact_sheet_shows_the_chosen(command: list[str], root: Path, tmp_path: Path) -> None:
    launch(compose(*command, "stage.strategy=random"))
    sheet = np.asarray(Image.open(tmp_path / "run" / "chosen.png"))
    chosen = request(tmp_path / "run")
    left, side, gap = sheet.shape[1] - 116 * len(chosen), 112, 4  # 16 pixels, seven times as large
    for place, index in enumerate(chosen):
        image = np.asarray(Image.open(root / "unlabeled" / f"{index}.png"))
        at = left + place * (side + gap)
        np.testing.assert_array_equal(sheet[gap : gap + side : 7, at : at + side : 7], image)


def test_covered_images_keep_others_from_being_chosen(command: list[str], tmp_path: Path) -> None:
    """k-center never asks for an image that lies on a covered one; of the train split as of earlier
    requests.
    """
    alone = launch(
        compose(
            *command, "stage.strategy=k_center", "stage.cover_train=false", f"dir={tmp_path}/alone"
        )
    )
    covering = launch(compose(*command, "stage.strategy=k_center", f"dir={tmp_path}/covering"))
    assert (alone["num_covered"], covering["num_covered"]) == (0, 12)
    assert covering["mean_distance"] < alone["mean_distance"]


def test_it_is_the_strategy_of_the_features(command: list[str], tmp_path: Path) -> None:
    launch(compose(*command, "stage.strategy=k_center", "stage.cover_train=false", "stage.dim=0"))
    (path,) = (tmp_path / "run" / "features").glob("pretrain-*.npy")
    stored = np.load(path).astype(np.float32)
    assert stored.shape == (60, 64)
    unit = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    chosen = request(tmp_path / "run")
    for count in range(1, 10):
        distances = np.linalg.norm(unit[:, None] - unit[chosen[:count]][None], axis=2).min(axis=1)
        assert distances[chosen[count]] == pytest.approx(distances.max(), abs=1e-3)


def test_margin_is_that_of_the_classifier(command: list[str], root: Path, tmp_path: Path) -> None:
    write_dl21(tmp_path / "data", 60, 40, 4, num_classes=4, image_size=16, workers=1)
    same = [
        *TINY,
        "data=dl21",
        f"data.root={tmp_path}/data",
        "augmentation=lincls",
        "batch_size=20",
    ]
    for name, options in {
        "plain": [],
        "grid": ["stage.features=cached", "stage.normalize=true"],
    }.items():
        launch(compose(*same, "stage=lincls", "epochs=2", *options, f"dir={tmp_path}/{name}"))
        cfg = compose(
            *command,
            "stage.strategy=margin",
            f"pretrained={tmp_path}/{name}",
            f"dir={tmp_path}/{name}-chosen",
        )
        launch(cfg)
        state = torch.load(weights.find(cfg.pretrained), weights_only=True)["model"]
        probe = LinearProbe(build.construct(cfg.backbone), 4, normalize=name == "grid").eval()
        probe.load_state_dict({key: state[key] for key in probe.state_dict()})
        pixels = np.stack(
            [np.asarray(Image.open(root / "unlabeled" / f"{index}.png")) for index in range(60)]
        )
        view = EvalView(16)  # ImageNet's mean and std, with which MoCo v2 was trained
        with torch.no_grad():
            margin = selection.margin(
                probe.logits(view(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
            ).numpy()
        chosen = request(tmp_path / f"{name}-chosen")
        np.testing.assert_allclose(margin[chosen], np.sort(margin)[:10], atol=2e-3)


def test_a_restart_computes_what_is_missing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BLOCK", 16)
    whole = launch(compose(*command, f"dir={tmp_path}/whole"))
    compute, seen = extract_all, []

    def interrupted(cfg, run, backbone, source, view):
        seen.append(source.num_images)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return compute(cfg, run, backbone, source, view)

    monkeypatch.setattr(features, "extract_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(compose(*command))
    assert launch(compose(*command)) == whole
    assert seen == [16, 16, 16, 16, 12, 12]  # the third is done again; the last is the train split
    assert request(tmp_path / "run") == request(tmp_path / "whole")


def test_a_signal_stops_it_with_what_it_has(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BLOCK", 16)
    asked = iter([False, True])  # it comes in the second block
    monkeypatch.setattr("ssl_bench.runs.run.Run.stopping", lambda self, step: next(asked))
    with pytest.raises(Interrupted):
        launch(compose(*command))
    (progress,) = (tmp_path / "run" / "features").glob("*.json")
    assert json.loads(progress.read_text()) == {"images": 32}
    assert not list((tmp_path / "run").glob("request_*"))


def test_features_are_shared_by_runs_of_the_same_backbone_only(
    command: list[str], tmp_path: Path
) -> None:
    shared = [*command, f"stage.features={tmp_path}/shared", "stage.cover_train=false"]
    for name, options, files in (
        ("one", [], 1),
        ("two", ["stage.strategy=k_center"], 1),
        ("three", ["seed=1"], 2),  # another initialisation
        ("four", ["stage.test_resize=1"], 3),
    ):
        launch(compose(*shared, *options, f"dir={tmp_path}/{name}"))
        assert len(list((tmp_path / "shared").glob("*.npy"))) == files


def test_labels_of_the_images_themselves_choose_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The digits to train on are those to choose from: no image is covered, and that is said."""
    caplog.set_level(logging.INFO, "ssl_bench")
    command = [*TINY, "stage=select", "data=digits", "stage.budget=25", f"dir={tmp_path}/run"]
    assert launch(compose(*command))["num_covered"] == 0
    assert len(request(tmp_path / "run")) == 25
    assert "they are chosen though they have labels" in caplog.text


def test_it_names_the_requests_it_was_not_told_of(
    command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    launch(compose(*command, "stage.requested=[request_04.csv]", "stage.strategy=random"))
    assert [r.message for r in caplog.records if "may be among the chosen" in r.message] == [
        "images of request_00.csv may be among the chosen: stage.requested= doesn't name it"
    ]


MISTAKES = {
    "budget": (
        ["stage.budget=58", "stage.requested=[request_00.csv]"],
        "57 images without a label: choose at most",
    ),
    "request": (
        ["stage.requested=[request_09.csv]"],
        "request_09.csv; stage.requested= names index files under",
    ),
    "other data": (
        ["stage.requested=[other.csv]"],
        "other.csv names image 60 of 60; does it belong to this data set?",
    ),
    "classifier": (
        ["stage.strategy=margin"],
        "pretrained=None holds no classifier, which stage.strategy=margin needs",
    ),
    "one class": (
        ["stage.strategy=margin", "pretrained=one.pt"],
        "its classifier knows one class, and stage.",
    ),
    "clusters": (
        ["stage.strategy=random", "stage.max_clusters=9"],
        "max_clusters=9 would be ignored: it is for",
    ),
    "out": (["stage.out=/nowhere"], "stage.out=/nowhere: not a folder that can be written"),
    "directory": (["dir=null"], "dir=null: stage=select writes its result there"),
}


@pytest.mark.parametrize(("overrides", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(
    command: list[str],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    says: str,
) -> None:
    (root / "other.csv").write_text("59\n60\n")
    torch.save({"model": {"fc.weight": torch.zeros(1, 64)}, "step": 1}, tmp_path / "one.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        launch(compose(*command, *overrides))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # said before an image was read


@pytest.mark.slow
def test_the_command(ssl_bench: Command, command: list[str], root: Path, tmp_path: Path) -> None:
    """Of two processes too; the request goes where the labels will, and its number is taken from
    then on.
    """
    (tmp_path / "requests").mkdir()
    out = [f"stage.out={tmp_path}/requests", "stage.budget=5"]
    ssl_bench(*command, *out, check=True)
    again = ssl_bench(
        *command, *out, "devices=2", "batch_size=8", f"dir={tmp_path}/again", check=True
    )
    assert "request_06.csv: 5 images to label" in again.stdout
    one, two = ((tmp_path / "requests" / f"request_0{number}.csv").read_text() for number in (5, 6))
    assert one == two
    assert "finished already" in ssl_bench(*command, *out, check=True).stderr
    assert "stage.strategy=kcenter: input should be 'random', " in complaint(
        ssl_bench(*command, "stage.strategy=kcenter")
    )
