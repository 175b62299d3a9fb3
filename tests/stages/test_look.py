"""Images look to an evaluation as they did to the training of its backbone, unless somebody types
otherwise.
"""

import json
import logging
import re
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from commands import compose
from compared import tiny
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.sweep import Member
from ssl_bench.stages.pipeline import evaluation

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
TYPED = [f"augmentation.mean={json.dumps(MEAN)}", f"augmentation.std={json.dumps(STD)}"]
STAGES = {
    "lincls": [],
    "lincls, cached": ["stage.features=cached"],
    "knn": [],
    "finetune": [],
    "select": ["stage.budget=3"],
}
SMALL = [
    "data=dl21",
    "data.image_size=16",
    "data.workers=1",
    "backbone.width=8",
    "backbone.stem=small",
    "batch_size=8",
]


def look(run: Path) -> tuple[list[float], list[float]]:
    node = yaml.safe_load((run / "config.yaml").read_text())["augmentation"]
    return node["mean"], node["std"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """12 unlabelled, 20 train, 8 val images."""
    place = tmp_path_factory.mktemp("look")
    write_dl21(place / "data", 12, 20, 8, num_classes=2, image_size=16, workers=1)
    return [*SMALL, f"data.root={place}/data"]


@pytest.fixture(scope="module")
def pretrained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("look") / "pretrained"
    launch(compose(*data, "stage=pretrain", "method=random", *TYPED, f"dir={place}"))
    return place


def stage(name: str, *more: str) -> list[str]:
    epochs = ["epochs=1"] if name not in ("knn", "select") else []
    return [f"stage={name.partition(',')[0]}", *STAGES[name], "augmentation=none", *epochs, *more]


@pytest.mark.parametrize("name", STAGES)
def test_what_the_backbone_was_trained_with(
    data: list[str], pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, "ssl_bench")
    cfg = compose(*stage(name, *data, f"pretrained={pretrained}", f"dir={tmp_path}/run"))
    launch(cfg)
    assert look(tmp_path / "run") == (MEAN, STD)
    assert "augmentation.mean=[0.5,0.4,0.3], as it was trained with" in caplog.text
    assert cfg.augmentation.mean is None  # nothing changes a configuration
    assert launch(cfg)  # the same run
    said = r"mean_distance [\d.]+" if name == "select" else r"top1 [\d.]+ %"
    assert re.search(rf"finished already \(.*{said}[,)]", caplog.text)  # in the words of its log


def test_at_any_depth(data: list[str], pretrained: Path, tmp_path: Path) -> None:
    launch(compose(*stage("finetune", *data, f"pretrained={pretrained}", f"dir={tmp_path}/tuned")))
    out = [
        "stage=export",
        f"pretrained={tmp_path}/tuned",
        f"stage.out={tmp_path}/out",
        "stage.onnx=false",
    ]
    launch(compose(*out))
    launch(compose(*stage("lincls", *data, f"pretrained={tmp_path}/out", f"dir={tmp_path}/run")))
    assert look(tmp_path / "run") == (MEAN, STD)


@pytest.mark.parametrize(
    "words", [TYPED[::-1], ["augmentation=digits", "augmentation.num_views=1"]]
)
def test_what_was_typed_wins_with_a_warning(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, words: list[str]
) -> None:
    place = tmp_path / "imagenet"
    launch(compose(*data, "stage=pretrain", "method=random", f"dir={place}"))
    command = [
        word
        for word in stage("lincls", *data, f"pretrained={place}", f"dir={tmp_path}/run")
        if "none" not in word
    ]
    launch(compose(*command, *words))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("but it was trained with [0.485,0.456,0.406]" in line for line in said)
    assert look(tmp_path / "run") == ((MEAN, STD) if words[0] in TYPED else ([0.5] * 3, [0.5] * 3))


def test_where_nothing_is_known_it_is_imagenets(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(tiny().backbone.state_dict(), tmp_path / "x.pth")
    for source in (f"{tmp_path}/x.pth", "null"):
        run = tmp_path / source[-3:]
        launch(compose(*stage("knn", *data, f"pretrained={source}", f"dir={run}")))
        assert look(run) == IMAGENET
    assert "trained with" not in caplog.text


@pytest.mark.parametrize(
    "augmentation",
    [{"mean": ["a", 1, 2]}, {"mean": "os.system"}, {"std": [0, 1, 1]}, {"std": {}}, {"std": [1]}],
    ids=str,
)
def test_a_recipe_from_elsewhere_is_checked(
    data: list[str], tmp_path: Path, augmentation: dict
) -> None:
    recipe = {"backbone": {}, "stage": {}, "augmentation": augmentation}
    save_file(
        tiny().backbone.state_dict(), tmp_path / "x.safetensors", {"ssl_bench": json.dumps(recipe)}
    )
    for words in ([], TYPED):
        with pytest.raises(
            UserError, match=r"x.safetensors: its configuration has augmentation.*, which can't be"
        ):
            launch(
                compose(
                    *stage(
                        "knn", *data, f"pretrained={tmp_path}/x.safetensors", f"dir={tmp_path}/run"
                    ),
                    *words,
                )
            )


def test_every_row_of_a_pipeline_sees_the_same_images() -> None:
    """The baselines, too; single keys and whole policies that a row types stay."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=quickstart"])
        rows = {
            name: evaluation(cfg, name, list(cfg.stage.protocol), list(own), 0)
            for name, own in cfg.stage.rows.items()
        }
        typed = evaluation(
            cfg, "mine", ["augmentation=none", "augmentation.mean=[0.1,0.2,0.3]"], [], 0
        )
        policy = evaluation(cfg, "mine", ["augmentation=moco_v1"], [], 0)
        bench = hydra.compose("config", ["experiment=bench_synthetic"])
        member = evaluation(
            bench, "pretrained", list(bench.stage.protocol), list(bench.stage.rows.pretrained), 0
        )
    assert len(rows) == 3
    for row in (*rows.values(), member):
        assert (list(row.augmentation.mean), list(row.augmentation.std)) == ([0.5] * 3, [0.5] * 3)
    assert (list(typed.augmentation.mean), list(typed.augmentation.std)) == (
        [0.1, 0.2, 0.3],
        [0.5] * 3,
    )
    assert list(policy.augmentation.mean) == IMAGENET[0]


def test_a_member_of_a_sweep_is_the_run_that_it_became(
    data: list[str], pretrained: Path, tmp_path: Path
) -> None:
    """Its file has what was composed, its run what that came to."""
    cfg = compose(*stage("knn", *data, f"pretrained={pretrained}", f"dir={tmp_path}/sweep/member"))
    summary = launch(cfg)
    member = Member(
        tmp_path / "sweep" / ".members" / "member.json",
        [],
        OmegaConf.to_container(cfg, resolve=True),
        ".",
        ".",
    )
    assert member.result() == pytest.approx(summary)
    assert member.conflict == ""
    member.config["augmentation"]["mean"] = IMAGENET[0]
    assert "augmentation.mean was [0.5, 0.4, 0.3], is [0.485, 0.456, 0.406]" in member.conflict
    assert Identity(member.config).key
