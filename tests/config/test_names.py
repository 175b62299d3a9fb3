"""Names that aren't UTF-8, terminals that are ASCII, and ~."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from commands import CHOICES, SMALL_IMAGES, compose, plain
from omegaconf import OmegaConf
from PIL import Image

from ssl_bench import files
from ssl_bench.command import HOME
from ssl_bench.config import build, signatures
from ssl_bench.config.fields import is_path
from ssl_bench.launch.process import launch
from ssl_bench.runs import identity

LATIN = os.fsdecode(b"caf\xe9")  # as a disk of the nineties has it


@pytest.mark.slow
def test_names_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Of classes, images and folders, from the data to the report."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for split in ("train", "val"):
        for name in (LATIN, "b"):
            (data / split / name).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(data / split / name / f"{LATIN}{i}.png")
    runs = tmp_path / "runs"
    words = [
        "data=folder",
        f'data.root="{data}"',
        "data.workers=1",
        "batch_size=8",
        "epochs=1",
        *SMALL_IMAGES,
    ]
    launch(compose("stage=lincls", *words, f"dir={runs}/lincls"))
    predict = [
        "stage=predict",
        f"pretrained={runs}/lincls",
        f"stage.images={data}/val",
        f"dir={runs}/predicted",
    ]
    launch(compose(*predict, "device=cpu", "data.workers=1"))
    launch(
        compose(
            "stage=export",
            f"pretrained={runs}/lincls",
            f"stage.out={tmp_path}/out",
            "stage.onnx=false",
        )
    )
    launch(compose("stage=report", f"runs={runs}", f"stage.out={tmp_path}/report", "device=cpu"))
    choose = ["stage=select", "stage.budget=3", "stage.cover_train=false", "backbone.stem=small"]
    launch(compose(*choose, *words[:-1], f"dir={runs}/chosen"))
    assert "Classes, in the order of the logits: b, caf" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")
    assert "caf\\udce9" in (runs / "chosen" / "chosen.csv").read_text(encoding="utf-8")
    (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    files.write(tmp_path / "one", LATIN)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "how",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_without_the_character(how: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import logging, sys; from ssl_bench.launch.process import set_up_logging; "
        "set_up_logging()\n"
        "print('92.2 \\xb1 0.2'); print('\\xb1', file=sys.stderr)\n"
        "logging.getLogger('ssl_bench').warning('\\xb1 %s', '\\udce9')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=os.environ | how
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == rb"92.2 \xb1 0.2" + b"\n"
    assert result.stderr.count(rb"\xb1") == 2
    assert b"Error" not in result.stderr


PLACES = {  # every setting that is a path, with what its stage needs besides
    "dir": "", "pretrained": "stage=lincls", "continue_from": "", "runs": "stage=report",
    "data.root": "data=dl21", "data.cache": "", "data.extra_labels": "data=dl21 data.root=/x",
    **{f"data.{split}": "data=webdataset data.root=/x" for split in ("pretrain", "train", "val")},
    "stage.out": "stage=select", "stage.features": "stage=select",
    "stage.requested": "stage=select", "stage.images": "stage=predict", "stage.verify": "stage=zoo",
    "stage.readme": "stage=report", "stage.what": "stage=verify",
    "method.teacher": "method=distill",
}  # fmt: skip
# and what W&B is told
TEXTS = {"backbone.model", "backbone.options", "data.image", "data.label"}
TEXTS |= {"stage.host", "stage.token", "stage.drop", "stage.again"}
TEXTS |= {"stage.protocol", "stage.rows", "stage.features_of", "method.teacher_sha256"}
OUT = ["stage=export", "stage=report", "stage=dashboard", "stage=synthesize"]


@pytest.mark.parametrize(
    ("key", "words"), [*PLACES.items(), *(("stage.out", words) for words in OUT)]
)
def test_home(key: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = compose(*words.split(), f'{key}="~/x y"')
    assert OmegaConf.select(build.at_home(cfg), key) == "/home/me/x y"
    assert OmegaConf.select(cfg, key) == "~/x y"
    assert HOME.sub(r'\1="\2"', f"{key}=~/x") == f'{key}="~/x"'  # Hydra's grammar has no ~
    if key in ("runs", "data.train", "data.extra_labels", "stage.requested", "stage.what"):
        cfg = compose(*words.split(), f'{key}=["~/x","y/~"]')
        assert OmegaConf.select(build.at_home(cfg), key) == ["/home/me/x", "y/~"]


def test_every_setting_that_is_a_path_is_marked() -> None:
    """A new one that is a text is listed here, or marked."""

    def is_text(hint: object) -> bool:
        return hint is str or any(map(is_text, get_args(hint)))

    found = {
        name
        for name, hint in get_type_hints(build.Root, include_extras=True).items()
        if is_path(hint)
    }
    texts = set()
    for group, choice in CHOICES:
        if group not in build.SUPPLIED:
            continue
        node = plain(f"{group}={choice}")[group]
        for name, (hint, _) in signatures.parameters(
            node["_target_"], build.SUPPLIED[group]
        ).items():
            if is_path(hint):
                found.add(f"{group}.{name}")
            elif is_text(hint):
                texts.add(f"{group}.{name}")
    assert found == set(PLACES)
    assert {name for name in texts if not name.startswith("tracking.")} == TEXTS


def test_no_path_is_part_of_what_a_run_is() -> None:
    """Of stages that leave a run; these leave none."""
    without = {"stage.verify", "stage.readme", "stage.what"}
    known = {*identity.PATHS, *identity.BELOW_ROOT, *identity.KEPT_IN.values(), *without}
    assert not [key for key in PLACES if key not in known and not identity.is_free(key)]


def test_what_a_run_writes_stands_in_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hydra composes it: what follows from a path, as the folder of an evaluation does, sees it
    in full.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    launch(compose("method=random", 'dir="~/made"', *SMALL_IMAGES))
    launch(
        compose(
            "stage=lincls",
            'pretrained="~/made"',
            'dir="~/judged"',
            "epochs=1",
            "stage.labels_per_class=30",
            *SMALL_IMAGES,
        )
    )
    assert not (tmp_path / "~").exists()
    assert {path.parent.name for path in tmp_path.glob("*/summary.json")} == {"made", "judged"}
