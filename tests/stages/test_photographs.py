"""Photographs of any size, from the folder to the accuracy: `data=folder` as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compared import assert_identical, final
from conftest import Command
from patience import wait
from photographs import photographs
from PIL import Image

import ssl_bench as package

DATA = ["data=folder", "data.root=images", "augmentation.image_size=32", "tracking=local"]
DATA += ["backbone.width=8", "batch_size=8"]
PRETRAIN = ["stage=pretrain", *DATA, "method.queue_size=16", "method.bn_splits=1"]
PRETRAIN += ["epochs=2", "log_every=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of parts of photographs, in train and val."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, image in list(photographs().items())[:4]:
            place = root / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                low, high = rng.uniform(0, 0.3, 2), rng.uniform(0.7, 1, 2)
                box = (*low * image.size, *high * image.size)
                image.crop(tuple(int(x) for x in box)).save(place / f"{number}.jpg", quality=90)
    return root


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").symlink_to(folder / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_the_folder_to_the_accuracy(ssl_bench: Command, here: Path) -> None:
    """Every stage that looks at images takes them as they are; the log says so."""
    said = ssl_bench(*PRETRAIN, "dir=run", check=True).stderr
    assert re.search(r"pretrain: 48 pictures as they are, [\d.]+ [kM]B, packed in", said)
    with Image.open(here / "run/views.png") as sheet:  # images and two views, eight of each
        assert min(sheet.size[0] / 8, sheet.size[1] / 3) >= 112
    line = json.loads((here / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert {"knn_top1", "probe_top1"} <= line.keys()
    stages = {
        "knn": [],
        "lincls": ["epochs=2"],
        "cached": ["stage=lincls", "stage.features=cached", "epochs=2", "stage.copies=1"],
        "finetune": ["epochs=1"],
    }
    for name, words in stages.items():
        stage = [] if "stage=lincls" in words else [f"stage={name}"]
        ssl_bench(*stage, *words, *DATA, "pretrained=run", f"dir={name}", check=True)
        summary = json.loads((here / name / "summary.json").read_text())
        assert 0 <= summary["val_top1"] <= 100
    words = ["stage=select", "stage.budget=4", "pretrained=run", "dir=select"]
    ssl_bench(*words, *DATA, check=True)
    assert (here / "select/chosen.png").is_file()
    words = ["stage=report", "runs=[run,lincls]", "stage.out=report"]
    ssl_bench(*words, check=True)
    assert (here / "report/report.html").is_file()


def test_predictions_see_what_the_evaluation_saw(ssl_bench: Command, here: Path) -> None:
    """Also from Python; the folder's files aren't copied."""
    ssl_bench(*PRETRAIN, "dir=run", "epochs=1", check=True)
    ssl_bench("stage=lincls", *DATA, "pretrained=run", "dir=lincls", "epochs=2", check=True)
    said = ssl_bench(
        "stage=predict", "pretrained=lincls", "stage.images=images/val", "dir=predict", check=True
    ).stderr
    assert re.search(r"16 pictures as they are, [\d.]+ [kM]B, where they are, indexed in", said)
    rows = [line.split(",") for line in (here / "predict/images.csv").read_text().splitlines()[1:]]
    right = [path.split("/")[0] == name for path, _, _, name in rows]
    measured = json.loads((here / "lincls/summary.json").read_text())["val_top1"]
    assert 100 * np.mean(right) == pytest.approx(measured)
    backbone, transform = package.load("lincls")
    features = np.load(here / "predict/features.npy")
    with torch.no_grad():
        seen = backbone(transform([f"images/val/{path}" for path, *_ in rows]))
    assert np.allclose(seen, features, atol=1e-4)


def test_what_was_made_smaller_is_made_smaller_again(ssl_bench: Command, here: Path) -> None:
    """Predictions and Python see the pictures that the run saw."""
    ssl_bench(*PRETRAIN, "data.max_side=60", "dir=run", "epochs=1", check=True)
    words = ["stage=predict", "pretrained=run", "stage.images=images/val", "dir=predict"]
    ssl_bench(*words, check=True)
    features = np.load(here / "predict/features.npy")
    backbone, transform = package.load("run")
    assert "max_side=60" in repr(transform)
    rows = (here / "predict/images.csv").read_text().splitlines()[1:]
    shown = transform([f"images/val/{path}" for path in rows])
    with torch.no_grad():
        assert np.allclose(backbone(shown), features, atol=1e-4)
    transform.max_side = None
    assert (transform([f"images/val/{path}" for path in rows]) - shown).abs().max() > 0.1


def test_a_choice_of_small_squares_of_several_sizes_is_shown(
    ssl_bench: Command, here: Path
) -> None:
    """They are shown as they are, beside others that are made smaller."""
    sides = [30, 40, 90, 140]
    (here / "squares").mkdir()
    for number, side in enumerate(2 * sides):
        image = photographs()["china"].resize((side, side)).rotate(number)
        image.save(here / "squares" / f"{number}.png")
    words = [*PRETRAIN, "data.root=squares", "method.queue_size=8", "epochs=1", "dir=run"]
    ssl_bench(*words, check=True)
    words = ["stage=select", "stage.budget=8", "pretrained=run", "dir=select"]
    ssl_bench(*words, *DATA, "data.root=squares", check=True)
    chosen = (here / "select/request_00.csv").read_text().split()
    with Image.open(here / "select/chosen.png") as sheet:
        cells = np.asarray(sheet)[4:, sheet.width - 8 * (192 + 4) :]  # 96, twice as large
    for place, index in enumerate(chosen):
        side = min(sides[int(index) % 4], 96)
        cell = cells[:192, place * 196 : place * 196 + 192]
        filled = (cell != 255).any(-1)
        assert filled[: side * (192 // side), : side * (192 // side)].mean() > 0.5
        assert not filled[side * (192 // side) :].any()


def test_small_squares_are_packed_decoded(ssl_bench: Command, here: Path) -> None:
    """All of one size, not larger than the views; one that differs, and they aren't."""
    squares = here / "squares"
    squares.mkdir()
    for number in range(16):
        image = photographs()["china"].resize((32, 32))
        image.rotate(number).save(squares / f"{number:02}.png")
    words = [*PRETRAIN, "data.root=squares", "epochs=1", "eval_every=0"]
    said = ssl_bench(*words, "dir=one", check=True).stderr
    assert "pretrain: all images are 32 x 32, and are packed decoded" in said
    assert re.search(r"pretrain: 16 images, [\d.]+ [kM]B, on", said)
    ssl_bench(*words, "data.image_size=32", "dir=typed", check=True)
    ssl_bench(*words, "source=streamed", "dir=streamed", check=True)
    for other in ("typed", "streamed"):
        assert_identical(final(here / "one")[0]["model"], final(here / other)[0]["model"])
    image.resize((33, 32)).save(squares / "15.png")
    said = ssl_bench(*words, "dir=other", check=True).stderr
    assert "pretrain: 16 pictures as they are" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["source=resident"], "source=resident keeps decoded images of one size"),
        (["data.max_side=100", "source=streamed"], "data.max_side=100 rewrites pictures as they"),
        (["data.max_side=100", "data.image_size=32"], "data.max_side=100 is for pictures that"),
        (["data.draft=true", "data.image_size=32"], "data.draft=true is for pictures that stay"),
    ],
)
def test_what_does_not_go_together(
    ssl_bench: Command, here: Path, words: list[str], line: str
) -> None:
    said = ssl_bench(*PRETRAIN, *words, "dir=run")
    assert said.returncode != 0
    assert line in said.stderr
    assert "Traceback" not in said.stderr


def ended(folder: Path, *words: str) -> dict:
    """The state of a run that was ended by its command."""
    command = [sys.executable, "-m", "ssl_bench", *PRETRAIN, "eval_every=0", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=ENVIRONMENT)
    (name,) = (word.removeprefix("dir=") for word in words if word.startswith("dir="))
    state, _ = final(folder / name)
    state.pop("run")
    return state


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_and_resumed_bit_for_bit(here: Path) -> None:
    """On other numbers of threads, packed or from the files."""
    whole = ended(here, "dir=whole", "data.workers=1")
    words = [*PRETRAIN, "eval_every=0", "dir=killed", "save_every=1", "data.workers=3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_bench", *words],
        cwd=here,
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    wait(lambda: len(list(here.glob("killed/checkpoints/*.pt"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "step0000000012" not in " ".join(map(str, here.glob("killed/checkpoints/*")))
    assert_identical(whole, ended(here, "dir=killed", "data.workers=2", "source=streamed"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_see_what_one_sees(here: Path) -> None:
    """The same views, so the same losses but for the rounding of sums."""
    words = ["method=simclr", "optimizer=sgd", "optimizer.base_lr=0.01", "schedule=constant"]
    for count in (1, 2):
        command = [sys.executable, "-m", "ssl_bench", "stage=pretrain", *DATA, *words]
        command += ["epochs=1", "log_every=1", "eval_every=0"]
        command += [f"devices={count}", "device=cpu", f"dir=run{count}"]
        run = subprocess.run(command, cwd=here, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert run.returncode == 0, run.stderr
    losses = []
    for count in (1, 2):
        lines = (here / f"run{count}/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
