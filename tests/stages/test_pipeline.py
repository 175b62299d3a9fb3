"""The main job, as the README starts it."""

import json
import re
import shutil
from pathlib import Path

import hydra
import pytest
import yaml
from commands import compose
from conftest import TINY, TINY_PRETRAIN, Command
from hydra.core.override_parser.overrides_parser import OverridesParser

from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.shell import quote
from ssl_bench.stages import pipeline


@pytest.mark.slow
def test_quickstart(ssl_bench: Command, tmp_path: Path) -> None:
    """With a quarter of its epochs and two draws; a release measures the README's numbers."""
    command = ["experiment=quickstart", "epochs=6", "stage.seeds=[0,1]", "dir=run"]
    result = ssl_bench(*command, check=True)
    run = tmp_path / "run"

    def draws(name: str) -> list[float]:
        return [
            json.loads((run / name / f"seed{i}" / "summary.json").read_text())["val_top1"]
            for i in range(2)
        ]

    pretrained, random, pixels = draws("pretrained"), draws("random-init"), draws("raw-pixels")
    assert all(ours > theirs for ours, theirs in zip(pretrained, random, strict=True))
    assert all(ours > theirs for ours, theirs in zip(pretrained, pixels, strict=True))
    assert sum(pretrained) / 2 > sum(pixels) / 2 + 2
    assert (
        result.stdout.index("| pretrained")
        < result.stdout.index("| raw pixels")
        < result.stdout.index("| random init")
    )
    assert (run / "overview.png").stat().st_size > 50_000
    # each evaluation is a line; its log.txt has the rest
    lines = result.stderr.splitlines()
    parts = re.findall(r" (\d) of 7: (.+), seed (\d)  val_top1 [\d.]+ %  .*took", result.stderr)
    assert [(int(number), int(seed)) for number, _, seed in parts] == [
        (2 + i, i % 2) for i in range(6)
    ]
    assert {name for _, name, _ in parts} == {"random init", "pretrained", "raw pixels"}
    assert len(lines) < 30
    assert "step 200/200" in (run / "raw-pixels" / "seed0" / "log.txt").read_text()
    again = ssl_bench(*command, check=True)
    assert "finished already" in again.stderr


@pytest.mark.parametrize(
    "name", ["a=b", "a,b", "a (1)", "#a", "it's", "[x]", "a&b", "é", "~a", r"a\'b", "plain"]
)
@pytest.mark.parametrize("choice", ["stage=pipeline", "experiment=quickstart"])
def test_any_directory_is_handed_on(name: str, choice: str) -> None:
    rows = compose(choice, f"dir={quote(name)}").stage.rows
    override = OverridesParser.create().parse_override(rows.pretrained[0])
    assert (override.key_or_group, override.value()) == ("pretrained", f"{name}/pretrain")


@pytest.mark.slow
def test_a_directory_with_special_characters(ssl_bench: Command, tmp_path: Path) -> None:
    name = "a=b, it's (1) #[x]&é"
    command = [*TINY, "stage=pipeline", "method.queue_size=1024", "epochs=1", "augmentation=digits"]
    command += [f"dir={quote(name)}"]
    ssl_bench(
        *command,
        "stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']",
        check=True,
    )
    assert (tmp_path / name / "pretrained" / "seed0" / "summary.json").exists()


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        (
            ["stage.labels_per_class=10"],
            "batch_size=128 is larger than the dataset (100 training images): choose at most "
            "batch_size=100",
        ),
        (["stage.labels_per_class=500"], "stage.labels_per_class=500: class 0 has 128 images"),
        (["stage.label_fraction=1e-3"], "stage.label_fraction=0.001 of 1,297 images is 1"),
        (
            ["batch_size=5", "stage.labels_per_class=1", "stage.features=cached"],
            "stage.features=cached chooses by held-out labels, and class 0 has one",
        ),
    ],
)
@pytest.mark.parametrize("launcher", [[], ["launcher=workstation"]])
def test_few_labels_are_counted_before_the_pretraining(
    ssl_bench: Command, tmp_path: Path, protocol: list[str], said: str, launcher: list[str]
) -> None:
    words = [*TINY, "stage=pipeline", "method.queue_size=1024", "augmentation=digits", *launcher]
    protocol = ["batch_size=128", *protocol]
    result = ssl_bench(*words, f"stage.protocol=[{','.join(map(repr, protocol))}]")
    assert result.returncode == 2
    assert f"stage.rows, random init: {said}" in result.stderr
    assert not list(tmp_path.glob("runs/**/metrics.jsonl"))


def test_which_rows_are_looked_at(tmp_path: Path) -> None:
    """Neighbours need no batch; a row of all labels is left to the pipeline itself, and images that
    aren't here to the machine that has them.
    """

    def check(*row: str, data: tuple[str, ...] = ("data=digits",)) -> None:
        words = ["stage=pipeline", *data, "data.image_size=16", f"dir={tmp_path / 'run'}"]
        with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
            cfg = hydra.compose("config", words)
            cfg.stage.rows, cfg.stage.protocol = {"mine": list(row)}, ["batch_size=1000"]
            pipeline.check_parts(cfg)

    check("stage=knn", "stage.labels_per_class=10", "batch_size=1000")
    with pytest.raises(UserError, match=r"stage\.rows, mine: batch_size=1000 is larger"):
        check("stage.labels_per_class=10")
    check("batch_size=2000")
    elsewhere = ("data=folder", f"data.root={tmp_path / 'nowhere'}")
    check("stage.labels_per_class=10", data=elsewhere)


def test_a_row_without_its_test_images_ends_before_the_pretraining(
    ssl_bench: Command, tmp_path: Path
) -> None:
    write_dl21(tmp_path / "data", num_unlabeled=64, num_train=64, num_val=64, num_classes=2)
    shutil.rmtree(tmp_path / "data" / "val")
    words = ["data=dl21", "data.root=data", "data.image_size=16", "batch_size=32"]
    result = ssl_bench("stage=pipeline", *words, "method.queue_size=32", "eval_every=0", "dir=run")
    assert result.returncode == 2
    assert "stage.rows, random init: " in result.stderr
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.slow
def test_a_picture_that_fails_does_not_cost_the_result(
    ssl_bench: Command, process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's backend, which a terminal of it has in its environment; and whatever else
    happens.
    """
    command = [
        *TINY,
        "stage=pipeline",
        "method.queue_size=1024",
        "epochs=1",
        "augmentation=digits",
        "dir=run",
    ]
    command += ["stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']"]
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    process(*command, check=True)  # which has imported no matplotlib before
    assert (tmp_path / "run" / "overview.png").exists()
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "overview.png").unlink()
    (tmp_path / "run" / "overview.png").mkdir()
    again = ssl_bench(*command, check=True)
    assert "no picture: IsADirectoryError: " in again.stderr
    assert "| pretrained" in again.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pretrained top-1"] > 5


@pytest.mark.slow
def test_pipeline_goes_on_where_it_stopped(ssl_bench: Command, tmp_path: Path) -> None:
    command = [
        *TINY,
        "stage=pipeline",
        "method.queue_size=1024",
        "epochs=1",
        "augmentation=digits",
        "dir=run",
    ]
    command += [
        "stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']",
        "stage.seeds=[0,1]",
    ]
    ssl_bench(*command, check=True)
    (tmp_path / "run" / "summary.json").unlink()
    result = ssl_bench(*command, check=True)
    assert result.stderr.count("finished already") == 5  # the pretraining, two rows of two draws
    assert "| pretrained" in result.stdout


@pytest.mark.slow
def test_any_list_of_evaluations_follows(ssl_bench: Command, tmp_path: Path) -> None:
    on = "pretrained=${quote:${dir}/pretrain}"
    rows = [
        f"pretrained: ['{on}']",
        f"kNN: [stage=knn, '{on}', augmentation.image_size=16]",
        f"whole: [stage=finetune, '{on}', augmentation.flip_p=0, stage.labels_per_class=10, "
        "batch_size=50, epochs=1]",
        f"file: [stage=export, '{on}', stage.out=out, stage.onnx=false]",
    ]
    command = [
        *TINY,
        "stage=pipeline",
        "method.queue_size=1024",
        "epochs=1",
        "augmentation=digits",
        "dir=run",
    ]
    command += ["stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']"]
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    text = "".join(f"    {row}\n" for row in rows)
    (conf / "mine.yaml").write_text(
        f"# @package _global_\nstage:\n  rows:\n    random init: []\n{text}"
    )
    result = ssl_bench("--config-dir=conf", "experiment=mine", *command, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= {"pretrained top-1", "kNN top-1", "whole top-1", "random init top-1"}
    assert "file top-1" not in summary
    stages = {path.parent.parent.name: yaml.safe_load(path.read_text())["stage"]["name"]
              for path in (tmp_path / "run").glob("*/seed0/config.yaml")}  # fmt: skip
    assert stages == {
        "pretrained": "lincls",
        "kNN": "knn",
        "whole": "finetune",
        "file": "export",
        "random-init": "lincls",
    }
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "| kNN" in result.stdout


@pytest.mark.slow
def test_a_newer_checkpoint_is_not_answered_with_an_old_result(
    ssl_bench: Command, tmp_path: Path
) -> None:
    ssl_bench(*TINY_PRETRAIN, "epochs=1", "save_every=4", "dir=pretrain", check=True)
    lincls = [*TINY, "stage=lincls", "pretrained=pretrain", "epochs=1", "dir=lincls"]
    newest = tmp_path / "pretrain" / "checkpoints" / "step0000000010.pt"
    newest.rename(tmp_path / "later.pt")
    ssl_bench(*lincls, check=True)
    (tmp_path / "later.pt").rename(newest)
    result = ssl_bench(*lincls)
    assert result.returncode == 2
    assert (
        "pretrained was pretrain/checkpoints/step0000000008.pt, is "
        "pretrain/checkpoints/step0000000010.pt" in result.stderr
    )


@pytest.mark.slow
def test_a_training_anew_is_not_answered_with_an_old_result(
    ssl_bench: Command, tmp_path: Path
) -> None:
    """In the same place, with as many steps."""
    ssl_bench(*TINY_PRETRAIN, "epochs=1", "dir=pretrain", check=True)
    lincls = [*TINY, "stage=lincls", "pretrained=pretrain", "epochs=1", "dir=lincls"]
    ssl_bench(*lincls, check=True)
    shutil.rmtree(tmp_path / "pretrain")
    ssl_bench(*TINY_PRETRAIN, "epochs=1", "dir=pretrain", "seed=1", check=True)
    result = ssl_bench(*lincls)
    assert result.returncode == 2
    assert (
        "pretrained=pretrain/checkpoints/step0000000010.pt holds other weights now. Choose"
        in result.stderr
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_pipeline_goes_on_by_another_spelling_of_its_directory_and_after_a_move(
    ssl_bench: Command, tmp_path: Path
) -> None:
    command = [*TINY, "stage=pipeline", "method.queue_size=1024", "epochs=1", "augmentation=digits"]
    command += ["stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']"]
    ssl_bench(*command, "dir=runs/x", check=True)
    for place in (tmp_path / "runs" / "x", Path("runs/../runs/x/"), Path("moved")):
        if place.name == "moved":
            shutil.move(tmp_path / "runs" / "x", tmp_path / "moved")
        (tmp_path / place / "summary.json").unlink()
        result = ssl_bench(*command, f"dir={place}", check=True)
        assert result.stderr.count("finished already") == 3  # the pretraining and two rows
