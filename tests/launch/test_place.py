"""The directory of a run that isn't given one."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

import ssl_bench.command  # noqa: F401 - registers the resolvers
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.launch import place
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.run import Run
from ssl_bench.runs.tracking import NoTracker


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    place._composed.cache_clear()
    yield
    HydraConfig.instance().cfg = None


def command(*words: str) -> dict:
    """The configuration of a command, as the command itself composes it."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        cfg = hydra.compose("config", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
        )


def test_twelve_commands_have_twelve_places() -> None:
    one_each = [
        "batch_size=64",
        "epochs=10",
        "seed=1",
        "method=simclr",
        "method.temperature=0.1",
        "backbone.width=8",
        "backbone=resnet50",
        "optimizer.base_lr=0.06",
        "augmentation=simclr",
        "data.image_size=48",
        "precision=bf16",
        "schedule=constant",
        "stage.online_images=0",
        "data=synthetic",
        "experiment=quickstart",
    ]
    places = [command(word)["dir"] for word in one_each]
    assert len({"runs/moco_v2-resnet18-digits/seed0", *places}) == len(one_each) + 1
    assert places[0] == "runs/moco_v2-resnet18-digits/batch_size-64/seed0"
    assert [command(word)["dir"] for word in one_each] == places


@pytest.mark.parametrize(
    "word",
    [
        "++seed=0",
        "devices=1",
        "method.temperature=2e-1",
        "augmentation.crop_scale=[.2,1]",
        "batch_size=256",
        "augmentation=moco_v2",
        "method.temperature=0.20",
        "log_every=1",
        "device=cpu",
    ],
)
def test_a_default_typed_or_a_key_that_changes_no_result_is_the_same_place(word: str) -> None:
    assert command(word)["dir"] == command()["dir"]


def test_a_value_is_compared_with_what_was_chosen(tmp_path: Path) -> None:
    """That of moco_v2 changes simclr's; an experiment without a `dir` is a choice like others."""
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nbatch_size: 64\n"
    (tmp_path / "my" / "experiment" / "small.yaml").write_text(text)
    search = f"hydra.searchpath=[{tmp_path}/my]"
    commands = [
        [],
        ["augmentation=simclr"],
        ["augmentation=simclr", "augmentation.crop_scale=[0.2,1.0]"],
        [search, "experiment=small"],
        [search, "experiment=small", "batch_size=256"],
        ["batch_size=64"],
    ]
    assert len({command(*words)["dir"] for words in commands}) == len(commands)


VALUES = {
    "augmentation": ["moco_v2", "simclr"],
    "method": ["moco_v2", "moco_v1"],
    "batch_size": ["128", "256"],
    "optimizer.base_lr": ["0.03", "3e-2", "1e-4", "1"],
    "optimizer.weight_decay": ["1e-4", "4"],
    "augmentation.crop_scale": ["[0.2,1]", "[0.2,1.0]", "[0.3,1]"],
    "method.queue_size": ["1024", "4096"],
    "backbone.width": ["8", "16"],
    "seed": ["0", "1"],
    "schedule": ["cosine", "constant"],
    "log_every": ["1", "50"],
    "devices": ["1", "2"],
    "epochs": ["200", "201"],
    "eval_every": ["10", "20"],
}
commands = st.dictionaries(st.sampled_from(sorted(VALUES)), st.integers(0, 3), max_size=6)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(commands, commands, st.randoms())
def test_another_command_another_place(one: dict, other: dict, random) -> None:
    def words(chosen: dict) -> list[str]:
        typed = [f"{key}={VALUES[key][i % len(VALUES[key])]}" for key, i in chosen.items()]
        random.shuffle(typed)
        return typed

    first, second = command(*words(one)), command(*words(other))
    if Identity(first).key != Identity(second).key:
        assert first["dir"] != second["dir"]
    assert command(*words(one))["dir"] == first["dir"]
    assert len(Path(first["dir"]).parts[-2]) <= place.LONGEST


def test_names_that_would_be_alike_have_a_hash() -> None:
    names = [
        place.slug(words) for words in (["a=b-c"], ["a-b=c"], ["a=[b,c]"], ["a=b/c"], ["+a=b"])
    ]
    assert len(set(names)) == 5
    assert place.slug(["+a=b"]) == place.slug(["a=b"]) == "a-b"
    assert place.slug(["b=1e-4", "a=x"]) == "a-x-b-1e-4"
    assert place.path_slug("/a/b") != place.path_slug("/a-b")


def test_a_value_in_other_words_is_the_same_place() -> None:
    for several in (
        ["optimizer.base_lr=0.1", "optimizer.base_lr=0.10", "++optimizer.base_lr=1e-1"],
        ["augmentation.crop_scale=[0.5,1]", "augmentation.crop_scale=[.5,1.0]"],
        ["method.bn_splits=4", "method.bn_splits=4 devices=1"],
        ["seed=1", "++seed=1"],
    ):
        assert len({command(*words.split())["dir"] for words in several}) == 1, several


def test_two_runs_that_are_alike_below_runs_and_here(tmp_path: Path) -> None:
    for home in ("zz/seed0", "runs/zz/seed0"):
        (tmp_path / home).mkdir(parents=True)
    assert place.path_slug("runs/zz/seed0") == place.path_slug(f"{tmp_path}/runs/zz/seed0/")
    assert place.path_slug("runs/zz/seed0") == "zz-seed0"
    assert place.path_slug("zz/seed0") != "zz-seed0"


def test_images_of_another_folder(tmp_path: Path) -> None:
    def photos(root: str) -> str:
        return command("data=folder", f"data.root={root}")["dir"]

    assert photos("/x/cats") == photos("/y/cats/") == "runs/moco_v2-resnet18-folder/root-cats/seed0"
    assert photos("/x/dogs") != photos("/x/cats")
    assert command("data=dl21", "data.root=/x/dl21")["dir"] == "runs/moco_v2-resnet18-dl21/seed0"


def test_two_folders_of_one_name_are_two_places_once_both_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files have the same names and sizes. A copy is the same images, a moved folder, too."""
    for name in ("a", "b"):
        (tmp_path / name / "photos").mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(len(name) + ord(name) + number)
            image = Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / name / "photos" / f"{number}.bmp")

    def used(root: str, seed: int = 0) -> str:
        """The place of a run that has opened its images."""
        place._facts.cache_clear()
        config = command("data=folder", "data.image_size=8", f'data.root="{root}"', f"seed={seed}")
        with Run(config, torch.device("cpu"), NoTracker) as run:
            at_home = build.at_home(build.literal(config))
            split = build.construct(at_home.data).split("pretrain")
            run.uses("pretrain", split.facts())
            run.save(1, model=torch.nn.Linear(1, 1))
        return config["dir"]

    first, second = used("a/photos"), used("b/photos")
    assert first == "runs/moco_v2-resnet18-folder/data.image_size-8-root-photos/seed0"
    assert re.fullmatch(rf"{first.removesuffix('/seed0')}-images-[0-9a-f]{{8}}/seed0", second)
    assert [used("b/photos"), used("./a/photos/")] == [second, first]
    shutil.copytree("b", "copy")
    assert used("copy/photos") == second
    shutil.move("a", "moved")
    assert used("moved/photos") == first
    assert used("copy/photos", seed=1) == second.replace("seed0", "seed1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert used("~/copy/photos", seed=2) == second.replace("seed0", "seed2")
    Path(first, "config.yaml").write_text("")  # of one seed; another is as good
    assert used("copy/photos", seed=3) == second.replace("seed0", "seed3")
    assert command("data=folder", "data.image_size=8", "data.root=nowhere/photos")["dir"] == first


def test_a_run_notices_images_of_the_same_names_and_sizes(tmp_path: Path) -> None:
    facts = {"fingerprint": "a", "images": 40, "sample": "b"}
    config = {"dir": str(tmp_path / "run"), "seed": 0}
    with Run(config, torch.device("cpu"), NoTracker) as run:
        run.uses("train", facts)
        run.save(1, model=torch.nn.Linear(1, 1))
        with pytest.raises(UserError, match="had 40, the 40 now are not the same"):
            run.uses("train", facts | {"sample": "c"})
        inputs = tmp_path / "run" / "inputs.json"
        inputs.write_text('{"train": {"fingerprint": "a", "images": 40}}')  # of an earlier version
        before = inputs.read_bytes()
        run.uses("train", facts)
        assert inputs.read_bytes() == before


def test_a_pipelines_pretraining_tells_whose_place_it_is(tmp_path: Path) -> None:
    """And a folder without a split that was opened has other images."""
    for name, sub in (("a", "train/x"), ("a", "val/x"), ("b", ".")):
        (tmp_path / name / "photos" / sub).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "photos" / sub / "0.png")
    words = ("stage=pipeline", "data=folder", "data.image_size=8")
    config = command(*words, "data.root=a/photos")
    run = Path(config["dir"], "pretrain")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    data = build.construct(OmegaConf.create(config["data"]))
    facts = {name: data.split(name).facts() for name in ("pretrain", "train")}
    (run / "inputs.json").write_text(json.dumps(facts))
    assert command(*words, "data.root=a/photos")["dir"] == config["dir"]
    assert "-images-" in command(*words, "data.root=b/photos")["dir"]


def a_run(directory: str, *words: str) -> str:
    Path(directory, "checkpoints").mkdir(parents=True)
    Path(directory, "config.yaml").write_text(yaml.safe_dump(command(*words)))
    Path(directory, "checkpoints", "step0000000010.pt").touch()
    return directory


@pytest.mark.parametrize("stage", ["lincls", "knn", "finetune", "select"])
def test_an_evaluation_stands_under_what_it_measured(stage: str, tmp_path: Path) -> None:
    run = a_run("runs/moco_v2-resnet18-digits/seed0", "backbone.width=8")

    def measured(*words: str) -> str:
        return command(f"stage={stage}", *words)["dir"]

    name = "select-typiclust" if stage == "select" else stage
    at = measured(f"pretrained={run}", "backbone.width=8")
    assert at == f"{run}/{name}-digits/seed0"
    assert measured(f"pretrained={tmp_path}/{run}/") == at  # another spelling of it
    step = measured(f"pretrained={run}/checkpoints/step0000000010.pt", "seed=1")
    assert step == f"{run}/{name}-digits-at-step-10/seed1"
    assert measured(f"pretrained={run}", "data.image_size=48") == (
        f"{run}/{name}-digits/data.image_size-48/seed0"
    )
    assert measured() == f"runs/{name}-resnet18-digits/random/seed0"
    (tmp_path / "elsewhere").mkdir()
    # seen from there the run may be another person's: nothing is written in it
    os.chdir("elsewhere")
    assert measured(f"pretrained={tmp_path}/{run}").startswith(f"runs/{name}-resnet18-digits/")


def test_predictions_stand_under_what_made_them() -> None:
    run = a_run("runs/moco_v2-resnet18-digits/seed0")
    at = command("stage=predict", f"pretrained={run}", "stage.images=photos")["dir"]
    assert at == f"{run}/predict/photos"


def test_an_impossible_value_is_left_to_the_check() -> None:
    assert command("batch_size=abc", "devices=x")["dir"]


def test_what_cannot_be_read_is_no_reason_to_stop(tmp_path: Path) -> None:
    """As a link to nowhere, which data.on_error=skip leaves out: `Split.facts` has why."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "0.png")
    (tmp_path / "photos" / "1.png").symlink_to("/nowhere")
    data = command("data=folder", "data.image_size=8", "data.root=photos", "data.on_error=skip")
    split = build.construct(OmegaConf.create(data["data"])).split("pretrain")
    assert split.facts()["images"] == 2
