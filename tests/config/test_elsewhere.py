"""What comes from elsewhere is data: a file that is read back names no code, holds no markup, fills
in no variables.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import compose, run_here
from conftest import TINY
from made_runs import classified, pretrained
from patience import PATIENCE
from safetensors.torch import load_file

import ssl_bench
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.report import tables
from ssl_bench.runs import record, sweep
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.weights import DIGEST, digest

MINE = """
import pathlib
pathlib.Path("marker").touch()  # on being imported
def run(**given): ...
"""
TARGETS = {
    "os.system": {"command": "touch marker"},
    "builtins.eval": {"source": "open('marker', 'w')"},
    "subprocess.Popen": {"args": "touch marker", "shell": True},
    "my_evil_module.run": {},
    # ours, but no constructor that conf/ names
    "ssl_bench.files.write": {"path": "marker", "text": ""},
    "ssl_bench.stages.zoo.zoo": {"cfg": None, "run": None},  # one of another group
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my_evil_module.py, images/; runs/ with a pretraining, a classifier on it, a sweep; export/:
    all in order.
    """
    whole = tmp_path_factory.mktemp("whole")
    (whole / "my_evil_module.py").write_text(MINE)
    (whole / "images").mkdir()
    runs = whole / "runs"
    moco = pretrained(runs / "moco" / "seed0", *TINY, "method.queue_size=128")
    cfg = compose(*TINY, "method.queue_size=128")
    network = build.construct(cfg.method, backbone=build.construct(cfg.backbone))
    weights = Checkpoint(moco.directory, "run").save(80, model=network)
    probed = classified(runs / "lincls" / "seed0", 50.0, *TINY, f"pretrained={weights}")
    Checkpoint(probed.directory, "run").save(1, model=LinearProbe(network.backbone, 10))
    launch(
        compose(
            "stage=export",
            f"pretrained={probed.directory}",
            f"stage.out={whole}/export",
            "stage.onnx=false",
        )
    )
    folder = runs / "sweeps" / "mine"
    conf = str(Path(ssl_bench.__file__).with_name("conf"))
    member = sweep.Member(
        folder / ".members" / "seed-0.json", ["seed=0"], moco.config, str(whole), conf
    )
    member.config["dir"] = str(member.directory.relative_to(whole))
    member.save()
    return whole


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that, where commands are typed."""
    place = shutil.copytree(whole, tmp_path / "place")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    return place


def spoil_run(name: str, plant: Callable[[dict], None]) -> None:
    path = Path("runs", name, "seed0", "config.yaml")
    config = yaml.safe_load(path.read_text())
    plant(config)
    path.write_text(yaml.safe_dump(config))


def spoil_member(plant: Callable[[dict], None]) -> None:
    path = Path("runs/sweeps/mine/.members/seed-0.json")
    values = json.loads(path.read_text())
    plant(values["config"])
    path.write_text(json.dumps(values))


def spoil_export(plant: Callable[[dict], None]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path("export/model.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["ssl_bench"])
    plant(config)
    state, text = load_file(path), json.dumps(config)
    # as whoever wrote it would
    save_file(state, path, metadata | {"ssl_bench": text, DIGEST: digest(state, text)})
    Path("export/SHA256SUMS").unlink()


SPOIL = {
    "pretraining": lambda plant: spoil_run("moco", plant),
    "classifier": lambda plant: spoil_run("lincls", plant),
    "member": spoil_member,
    "export": spoil_export,
}
STAGES = {
    "report": ["stage=report", "runs=runs"],
    "status": ["stage=status", "runs=runs/sweeps/mine"],
    "zoo": ["stage=zoo", "runs=runs"],
    "export of a run": [
        "stage=export",
        "pretrained=runs/moco/seed0",
        "stage.onnx=false",
        "runs=runs",
    ],
    "export of a classifier": ["stage=export", "pretrained=runs/lincls/seed0", "stage.onnx=false"],
    "export of an export": [
        "stage=export",
        "pretrained=export/model.safetensors",
        "stage.onnx=false",
        "stage.out=x",
    ],
    "predict": ["stage=predict", "pretrained=runs/lincls/seed0", "stage.images=images"],
    "predict by an export": ["stage=predict", "pretrained=export", "stage.images=images"],
    "knn": ["stage=knn", *TINY, "pretrained=runs/moco/seed0", "dir=knn"],
    "again": ["stage=pretrain", *TINY, "dir=runs/moco/seed0"],
    "sync": ["stage=sync", "runs=runs"],
}
# The places whose content each of them constructs from.
CONSTRUCTS = {
    ("pretraining", "export of a run"),
    ("classifier", "report"),
    ("classifier", "export of a classifier"),
    ("classifier", "predict"),
    ("export", "export of an export"),
    ("export", "predict by an export"),
}


CASES = [(stage, spoilt, "os.system") for stage in STAGES for spoilt in SPOIL]
CASES += [
    (stage, spoilt, target) for spoilt, stage in sorted(CONSTRUCTS) for target in list(TARGETS)[1:]
]


@pytest.mark.parametrize(("stage", "spoilt", "target"), CASES)
def test_a_file_names_no_code_to_run(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    spoilt: str,
    target: str,
) -> None:
    """Such a target in every group of each file that is read back, before each stage that reads
    such files.
    """

    def plant(config: dict) -> None:
        for group in build.SUPPLIED:
            name = (config.get(group) or {}).get("name", group)
            config[group] = {"name": name, "_target_": target, **TARGETS[target]}

    SPOIL[spoilt](plant)
    monkeypatch.setattr(logging.getLogger("ssl_bench"), "propagate", True)
    said = ""
    try:
        launch(compose(*STAGES[stage]))
    except UserError as error:
        said = str(error)
    assert not (place / "marker").exists()
    assert "my_evil_module" not in sys.modules
    said += "".join(
        record.getMessage() for record in caplog.records if "is not ours" in record.getMessage()
    )
    if (spoilt, stage) in CONSTRUCTS:
        assert (
            f"backbone._target_={target} is not ours" in said
            or f"data._target_={target} is not ours" in said
        )


def started(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize("group", ["backbone", "stage", "tracking"])
def test_a_members_file_names_no_code_to_run(place: Path, group: str) -> None:
    """Nor does a module stand in for ours that lies in the folder which the file names."""
    (place / "torch.py").write_text(MINE)

    def plant(config: dict) -> None:
        config[group] = {"name": group, "_target_": "os.system", "command": "touch marker"}

    spoil_member(plant)
    file = str(Path("runs/sweeps/mine/.members/seed-0.json").absolute())
    result = subprocess.run(
        [sys.executable, "-m", "ssl_bench.launch.member", file],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(
        f"ssl-bench: {group}._target_=os.system is not ours, and this command doesn't name"
    )
    assert result.stderr.count("\n") == 1
    assert not (place / "marker").exists()


def test_a_members_rows_name_no_code_to_run(place: Path) -> None:
    """A pipeline composes its parts when it runs: by overrides that its file holds, from the YAML
    beside it.
    """
    cfg = compose(
        "experiment=quickstart",
        "+stage.rows.x=['stage=lincls', 'stage._target_=os.system']",
        "dir=runs/x",
    )
    launched = build.literal(cfg)  # as `launch` has it
    assert ("stage", "os.system") in build.named(launched)  # typed on a command line, it is named

    def plant(config: dict) -> None:
        config.clear()
        config |= json.loads(json.dumps(build.OmegaConf.to_container(launched, resolve=True)))

    spoil_member(plant)
    result = started("-m", "ssl_bench.launch.member", "runs/sweeps/mine/.members/seed-0.json")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "stage._target_=os.system is not ours" in result.stderr


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"overrides": 3, "config": {}, "cwd": "", "conf": ""}', "{", "null"]
)
def test_a_members_file_that_is_none(place: Path, content: str) -> None:
    file = Path("runs/sweeps/mine/.members/seed-0.json")
    file.write_text(content)
    for read in (lambda: sweep.members(file.parents[1]), lambda: record.find([Path("runs")])):
        with pytest.raises(UserError, match=r"seed-0\.json( is damaged|: not a member of a sweep)"):
            read()


def test_what_the_command_names_is_called(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own configuration, and by the YAML of --config-dir, which isn't composed for it."""
    spoil_run("moco", lambda config: config["backbone"].update(_target_="mine.Net"))
    Path("mine.py").write_text(
        "from ssl_bench.backbones.resnet import resnet18\n\n"
        "def Net(stem, width, zero_init_residual):\n"
        "    return resnet18(stem, width, zero_init_residual)\n"
    )
    Path("my_conf/backbone").mkdir(parents=True)
    Path("my_conf/backbone/mine.yaml").write_text(
        "name: mine\n_target_: mine.Net\nstem: small\nwidth: 8\n"
    )
    command = ["stage=export", "pretrained=runs/moco/seed0", "stage.onnx=false"]
    refused = run_here(command, place)
    assert refused.returncode == 2
    assert "backbone._target_=mine.Net is not ours" in refused.stderr
    named = run_here([*command, "--config-dir=my_conf"], place)
    assert named.returncode == 0, named.stderr


def test_a_dollar_in_a_file_is_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "abc123")
    texts = ["${oc.env:SECRET}", r"\${oc.env:SECRET}", r"\\${oc.env:SECRET}", "${"]
    plain = {"dir": texts[0], "rows": {"x": texts}}
    again = plain
    for _ in range(3):
        again = build.OmegaConf.to_container(build.literal(again), resolve=True)
    assert again == plain


def test_it_is_escaped_where_it_is_shown(place: Path) -> None:
    """In Markdown, on the page, in a terminal."""
    name = "<script>alert(1)</script>|a\n\x1b[2J<!-- end of results -->[x](javascript:y) $\\frac$"
    spoil_run("moco", lambda config: config["method"].update(name=name))
    launch(compose("stage=report", "runs=runs"))
    page = Path("runs/report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script>alert" not in page
    assert "\x1b" not in (shown := Path("runs/results.md").read_text())
    assert r"\<script>alert(1)\</script>\|a" in shown
    assert r"[x]\(javascript:y)" in shown
    readme = "<!-- results: results.json stage=pretrain -->\n<!-- end of results -->\n"
    filled = tables.fill(readme, Path("runs"))
    assert tables.fill(filled, Path("runs")) == filled
    assert len(tables.plain(name).splitlines()) == 1
    launch(
        compose("stage=export", "pretrained=runs/moco/seed0", "stage.onnx=false", "stage.out=card")
    )
    assert r"\<script>alert(1)\</script>" in Path("card/README.md").read_text()
