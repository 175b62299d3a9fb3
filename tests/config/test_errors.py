"""A mistake is answered with one line: what is wrong, and what to type instead. Exit status 2,
nothing left behind.
"""

import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from commands import complaint, compose, mounted
from conftest import TINY, TINY_PRETRAIN, Command
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import ssl_bench
from ssl_bench import command
from ssl_bench.backbones import resnet
from ssl_bench.config import build, messages, typed
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.methods.moco import MoCo
from ssl_bench.runs.checkpoint import complete
from ssl_bench.runs.weights import official_moco_state_dict
from ssl_bench.runtime.device import check_compiler, pick_device

SMALL = [
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
    "data.workers=1",
    "log_every=1",
    "epochs=1",
]
PRETRAIN = [
    "data=dl21",
    "data.root=dl21",
    "stage=pretrain",
    "method.queue_size=16",
    "batch_size=8",
    *SMALL,
]
LINCLS = ["data=dl21", "data.root=dl21", "stage=lincls", "batch_size=4", *SMALL]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# --- mistakes in the configuration, by the command ------------------------------------------------

CONFIGURATION = {
    "key": (
        ["bach_size=3"],
        ["bach_size: no such key; did you mean batch_size? Valid: accumulate, augmentation, "],
    ),
    "nested key": (
        ["method.temprature=0.1"],
        [
            "method.temprature: no such key; did you mean method.temperature? Valid: "
            "method.bn_splits, method.dim, "
        ],
    ),
    "key of a launcher": (
        ["launcher=slurm", "hydra.launcher.partiton=gpu", "seed=0"],
        [
            "hydra.launcher.partiton: no such key; did you mean hydra.launcher.partition? Valid: "
            "hydra.launcher.acc"
        ],
    ),
    "key of a launcher in a sweep": (
        ["launcher=slurm", "hydra.launcher.partiton=gpu", "seed=0,1"],
        [
            "hydra.launcher.partiton: no such key; did you mean hydra.launcher.partition? Valid: "
            "hydra.launcher.acc"
        ],
    ),
    "key of a value": (["seed.x=1"], ["seed.x: no such key; seed has none"]),
    "a group of Hydra's that is a number": (
        ["hydra=3"],
        ["hydra=3: Hydra can't use that: Config group override must be a string or a list"],
    ),
    "a value that Hydra asserts": (
        ["hydra.verbose=3"],
        ["hydra.verbose=3: Hydra can't use that: "],
    ),
    "no launcher": (
        ["-m", "seed=0,1", "hydra.launcher=3"],
        ["hydra.launcher=3 is none: choose one by hydra/launcher=NAME"],
    ),
    "no sweeper": (
        ["-m", "seed=0,1", "hydra.sweeper=null"],
        ["hydra.sweeper=None is none: choose one by hydra/sweeper=NAME"],
    ),
    "a sweeper of elsewhere": (
        ["-m", "seed=0,1", "hydra.sweeper._target_=os.system"],
        ["hydra.sweeper._target_=os.system: Hydra can't use that: Invalid plugin 'os.system'"],
    ),
    "values to sweep that aren't there": (
        ["-m", "hydra.sweeper.params.sed=3"],
        ["hydra.sweeper.params.sed: no such key; ", "type +hydra.sweeper.params.sed="],
    ),
    "several values to show": (
        ["-m", "seed=0,1", "--cfg", "job"],
        ["seed=0,1: --cfg shows one configuration: give one value"],
    ),
    "interval": (
        ["method.temperature=interval(0.05,0.5)"],
        [
            "method.temperature=interval(0.05,0.5): an interval is for a search: "
            "add -m hydra/sweeper=optuna"
        ],
    ),
    "interval in a sweep": (
        ["-m", "method.temperature=interval(0.05,0.5)"],
        [
            "method.temperature=interval(0.05,0.5): an interval is for a search: "
            "add -m hydra/sweeper=optuna"
        ],
    ),
    "glob": (["method=glob(*)"], ["method=glob(*): several values are for a sweep: add -m"]),
    "no value in a range": (
        ["seed=range(0,0)"],
        ["seed=range(0,0): several values are for a sweep: add -m"],
    ),
    "no value in a sweep": (
        ["-m", "pretrained=glob(*)", "stage=lincls"],
        ["pretrained=glob(*): there is no such value, and so no member of the sweep"],
    ),
    "choice": (
        ["method=moco_v9"],
        [
            "method=moco_v9: no such choice; did you mean",
            "Valid: method=barlow_twins, method=byol, method=",
        ],
    ),
    "a number for a choice": (
        ["method=1"],
        ["method=1: no such choice; Valid: method=barlow_twins, method=byol"],
    ),
    "no choice": (["data=null"], ["data=null: no such choice; Valid: data=cifar10,"]),
    "no number in a list, either": (["method=[1]"], ["method=[1]: no such choice; Valid:"]),
    "no number for an experiment": (["experiment=nan"], ["experiment=nan: no such choice; Valid:"]),
    "the default experiment": (["experiment=null"], ["experiment=null: no such choice; Valid:"]),
    "numbers in a sweep of choices": (
        ["-m", "schedule=cosine,2"],
        ["schedule=cosine,2: no such choice; did you mean schedule=cosine?"],
    ),
    "a number of epochs with a point": (
        ["epochs=1.0"],
        ["epochs=1.0: input should be a valid int"],
    ),
    "a seed that is a text": (["seed=00"], ["seed=00: input should be a valid integer"]),
    "a number that is a truth": (["epochs=true"], ["epochs=True: input should be a valid integer"]),
    "a name that is a path": (
        ["data.name=../x"],
        ["data.name=../x: a name is letters, digits, dots and dashes, at most 80"],
    ),
    "a name without end": ([f"method.name={'x' * 300}"], ["a name is letters, digits, dots"]),
    "type": (["batch_size=abc"], ["batch_size=abc: input should be a valid integer"]),
    "range": (["method.temperature=-1"], ["method.temperature=-1: input should be greater than 0"]),
    "a key of the stage": (
        ["stage=status", "drop=x"],
        ["drop: no such key; did you mean stage.drop?"],
    ),
    "a key of two groups": (
        ["image_size=16"],
        ["image_size: no such key; did you mean data.image_size or augmentation.image_size?"],
    ),
    "part of a key's name": (["lr=0.1"], ["lr: no such key; did you mean optimizer.base_lr?"]),
    "a stage as a command": (
        ["pretrain", "epochs=10"],
        ["pretrain: not KEY=VALUE; did you mean stage=pretrain?"],
    ),
    "a method as a command": (
        ["-m", "random", "seed=0,1"],
        ["random: not KEY=VALUE; did you mean method=random?"],
    ),
    "a method that isn't found": (
        ["method=mine"],
        ["Valid: method=barlow_twins, ", "DIR/method/mine.yaml, is found by --config-dir=DIR"],
    ),
    "a module that isn't found": (
        ["method._target_=my_module.Mine"],
        ["(No module named 'my_module'); modules are looked for in the folder where you type"],
    ),
    "a key of the launcher": (
        ["launcher=slurm", "timeout_min=3"],
        ["timeout_min: no such key; did you mean hydra.launcher.timeout_min?"],
    ),
    "a number or a word": (
        ["keep=foo"],
        ["keep=foo: input should be a valid integer, or 'all', 'last', 'best' or 'backbone'"],
    ),
    "a pattern with brackets": (
        ["-m", "method=glob(moco_v[12])"],
        ["method=glob(moco_v[12]): a pattern", """type 'method=glob("moco_v[12]")'"""],
    ),
    "a comma at the end": (["-m", "seed=0,1,"], ["seed=0,1,: nothing stands", "type seed=0,1"]),
    "commas alone": (["-m", "seed=,"], ["seed=,: nothing stands", "type seed=..."]),
    "no choices": (["-m", "seed=choice()"], ["seed=choice(): empty choice", "'seed=choice(0,1)'"]),
    "a range of texts": (["-m", "seed=range(a)"], ["seed=range(a): ", "'seed=range(0,3)'"]),
    "a choice with a comma too many": (
        ["-m", "seed=choice(0,)"],
        ["seed=choice(0,): choice() can't be read: type 'seed=choice(0,1)', say"],
    ),
    "added key": (["+unknown=1"], ["unknown: no such key;", "Valid: accumulate, augmentation, "]),
    "needed": (["data=dl21"], ["data.root needs a value: type data.root=..."]),
    "no value": (["batch_size"], ["batch_size: not KEY=VALUE"]),
    "comma": (
        ["data=dl21", "data.root=a,b"],
        ["data.root=a,b: several values are for a sweep", "'data.root=\"a,b\"'"],
    ),
    "brackets": (
        ["data=dl21", "data.root=[x,y]"],
        ["data.root=[x,y]: should be a text", "'data.root=\"[x,y]\"'"],
    ),
    "special characters": (["dir=it's"], ["dir=it's: ", "quotes", "type 'dir=\"it'\"'\"'s\"'"]),
    "interpolation": (["seed=${sed}"], ["seed: Interpolation key 'sed' not found"]),
    "option": (
        ["--experiment", "quickstart"],
        ["--experiment: keys have no dashes: type experiment=quickstart"],
    ),
    "option of an argument": (
        ["--batch-size=5"],
        ["--batch-size=5: keys have no dashes: type batch_size=5"],
    ),
    "flag": (["--compile", "seed=1"], ["--compile: keys have no dashes: type compile=true"]),
    "no option": (["--foo", "3"], ["--foo: no such option, and keys have no dashes: KEY=VALUE"]),
    "option without its value": (
        ["--cfg"],
        ["argument --cfg/-c: expected one argument; ssl-bench --help shows all"],
    ),
    "a pickle": (["--experimental-rerun", "x.pickle"], ["--experimental-rerun: no such option"]),
    "images": (
        ["stage=predict", "pretrained=x"],
        ["stage.images needs a value: type stage.images=..."],
    ),
    "nothing alike": (
        ["stage=eval"],
        ["stage=eval: no such choice; Valid: stage=average, stage=board, stage=choose, "],
    ),
    "a number for a text": (
        ["dir=1e5"],
        ["dir=100000.0: should be a text; quote it: 'dir=\"1e5\"'"],
    ),
    "no experiment": (
        ["experiment=fast"],
        [
            "experiment=fast: no such choice;",
            "Valid: experiment=bench_synthetic, experiment=bench_vit, ",
        ],
    ),
    "processes": (
        [*TINY_PRETRAIN, "batch_size=129", "devices=2"],
        ["batch_size=129 is global", "devices=2 processes: choose a multiple, like batch_size=130"],
    ),
    "pretrained": (
        [*TINY, "stage=lincls", "pretrained=runs/moco"],
        ["pretrained=runs/moco: no such file or run directory", "that ssl-bench stage=zoo lists"],
    ),
    "synthesize": (["stage=synthesize"], ["stage.out needs a value: type stage.out=..."]),
    "sync": (
        ["stage=sync", "runs=none"],
        ["runs=none: no metrics.jsonl at or below it", "runs=[DIR,DIR]"],
    ),
}


@pytest.mark.parametrize(("command", "says"), CONFIGURATION.values(), ids=CONFIGURATION)
def test_configuration(
    ssl_bench: Command, tmp_path: Path, command: list[str], says: list[str]
) -> None:
    result = ssl_bench(*command)
    said = complaint(result)
    assert all(part in said for part in says), said
    assert "\n" not in said
    assert result.stderr.startswith("ssl-bench: ")  # before any log line: no data was touched
    assert files(tmp_path) == set()


ADVICE = re.compile(
    r"(?:did you mean|[Tt]ype|quote it:|like|or) ((?:'[^']*'|\"[^\"]*\"|[\w.=+-])+)"
)


@pytest.mark.parametrize(
    "mistake",
    [
        "sweep=1e5", "dir=1e5", "dir=true", "dir=[x,y]", "dir={a:b}", "pretrained=12", "runs=1.50",
        "method=moko_v2", "backbone=resnt18", "epochs=10 schedule.warmup_epochs=20",
        "batch_size=7 devices=2", "stage=lincls stage.features=cached stage.copies=200",
        "data.cache=1_000", 'dir="it\'s [1]"', "tracking=wand", "optimizer=sdg",
        "method=swav epochs=1 method.queue_length=0", "stage=predic stage.images=x pretrained=x",
        "--precision bf16", "--epochs=20", "--method.dim 64", "--compile",
        "stage=pipeline stage.rows.pretrained=[stage=knn,stage.k=[9]]",
        "stage=pipeline stage.protocol=[batch_size=3]", "seed=,0", "epochs=5,",
    ],
)  # fmt: skip
def test_what_is_advised_works_when_it_is_typed(mistake: str) -> None:
    def said(words: list[str]) -> str:
        if mistaken := command._no_option(words):
            return mistaken
        try:
            build.check(compose(*words), typed.quoted(words))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            return messages.message(error)
        return ""

    words = shlex.split(mistake) if '"' not in mistake else [mistake.replace('"', "")]
    advised = [
        word
        for advice in ADVICE.findall(said(words))
        for word in shlex.split(advice)
        if "=" in word
    ]
    assert advised, said(words)
    for advice in advised:
        rest = [
            word
            for word in words
            if typed.key_of(word).lstrip("-") != typed.key_of(advice) and "=" in word
        ]
        rest = [word for word in rest if not word.startswith("--")]
        known = said([*rest, advice])
        assert typed.key_of(advice) not in known, known


def test_nothing_typed_is_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `main` sets it, for its process
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", ["ssl-bench"])
    monkeypatch.setattr(command, "run", lambda: None)
    command.main()
    assert sys.argv[1:] == ["experiment=quickstart"]
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith("ssl-bench, with nothing typed, is ssl-bench experiment=")
    )
    monkeypatch.setattr("sys.argv", ["ssl-bench", "--version"])
    command.main()
    assert capsys.readouterr().out == f"ssl-bench {ssl_bench.__version__}\n"


def test_all_at_once(process: Command, tmp_path: Path) -> None:
    said = complaint(
        process("batch_size=abc", "method.temperature=-1", "+foo=1", "precision=fp8")
    ).splitlines()
    keys = [line.partition(":")[0] for line in said]
    assert sorted(keys) == ["batch_size=abc", "foo", "method.temperature=-1", "precision=fp8"]
    assert "'fp32', 'tf32', 'bf16' or 'fp16'" in said[keys.index("precision=fp8")]
    assert files(tmp_path) == set()


def test_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's python3 alone has none, and what is compiled includes them."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(
        UserError, match=r"finds none in .*: apt-get install python3-dev, or type compile=false"
    ):
        check_compiler()


def test_one_gpu_for_several_processes(ssl_bench: Command) -> None:
    said = complaint(ssl_bench(*TINY_PRETRAIN, "device=cuda:0", "devices=2"))
    assert said == "device=cuda:0 is one GPU, and devices=2 need as many: type device=cuda"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    # Slurm may show each process a GPU of its own
    for gpus, rank, expected in [(4, 3, 3), (1, 5, 0)]:
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert pick_device("auto", rank).index == expected
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        UserError, match="3 processes or more on this machine, and torch sees 2 GPUs"
    ):
        pick_device("auto", 2)


def test_a_gpu_of_slurm_that_torch_cannot_use_is_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    assert pick_device("auto", 0).type == "cpu"
    assert "can't use the GPU that Slurm gave this job, 0 (see nvidia-smi)" in caplog.text


def test_a_metric_of_val_is_none_of_pretraining(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="metric=val_top1: stage=pretrain never looks at val: type metric=knn_top1 or",
    ):
        launch(compose(*TINY_PRETRAIN, "device=cpu", "metric=val_top1", f"dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_full_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = "GPU 0 has a total capacity of 15.77 GiB of which 1.10 GiB is free"

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate 2.00 GiB. {free}. Process 7 has 14 GiB."
        )

    monkeypatch.setattr("ssl_bench.stages._training.fit", full)
    said = (
        f"batch_size=128 doesn't fit: CUDA out of memory. Tried to allocate 2.00 GiB. {free}. "
        "Type a smaller"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        launch(compose(*TINY_PRETRAIN, "device=cpu", f"dir={tmp_path / 'run'}"))


def test_no_compiler(ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert complaint(ssl_bench(*TINY_PRETRAIN, "compile=true")).startswith(
        "compile=true needs a C++ compiler"
    )
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_no_git(ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ssl_bench(*TINY_PRETRAIN, "epochs=1", "dir=run", check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(ssl_bench: Command, tmp_path: Path) -> None:
    said = complaint(ssl_bench(*TINY_PRETRAIN, "device=cuda"))
    assert re.fullmatch(
        r"device=cuda: torch \S+ sees no GPU here; use device=cpu or device=auto", said
    )
    assert files(tmp_path) == set()


def test_one_bad_member_of_a_sweep(ssl_bench: Command, tmp_path: Path) -> None:
    said = complaint(ssl_bench(*TINY_PRETRAIN, "-m", "method.temperature=0.1,-1")).splitlines()
    assert said[0] == "nothing was started."
    assert len(said) == 2
    assert said[1].endswith(
        "method.temperature=-1: method.temperature=-1: input should be greater than 0"
    )
    assert files(tmp_path) == set()


def test_a_mistyped_key_in_a_sweep(ssl_bench: Command, tmp_path: Path) -> None:
    said = complaint(ssl_bench("-m", "method.temprature=0.1,0.2", "batch_size=128")).splitlines()
    assert said[0] == "nothing was started."
    (line,) = said[1:]  # a reason that members share is told once
    assert line.startswith(
        "2 members, like method.temprature=0.1 batch_size=128: method.temprature: no such key; "
        "did you mean "
    )
    assert files(tmp_path) == set()


FOREIGN = {
    "of one": (
        ["-m", "method=moco_v2,simclr", "method.queue_size=1024", "seed=0,1"],
        "method.queue_size is no key of method=simclr",
        [
            "-m method=moco_v2 method.queue_size=1024 seed=0,1 sweep=NAME",
            "-m method=simclr seed=0,1 sweep=NAME",
        ],
    ),
    "each its own": (
        ["-m", "sweep=a", "method=simclr,dino,ibot", "method.hidden_dim=8", "method.out_dim=9"],
        "method.out_dim is no key of method=simclr",
        [
            "-m sweep=a method=simclr method.hidden_dim=8",
            "-m sweep=a method=dino,ibot method.hidden_dim=8 method.out_dim=9",
        ],
    ),
    "a launcher's": (
        ["launcher=workstation", "data=digits,folder", "sweep=a", "data.root='a b'"],
        "data.root is no key of data=digits",
        [
            "launcher=workstation data=digits sweep=a",
            "launcher=workstation data=folder sweep=a 'data.root='\"'\"'a b'\"'\"''",
        ],
    ),
}


@pytest.mark.parametrize(("words", "said", "commands"), FOREIGN.values(), ids=FOREIGN)
def test_a_key_of_some_choices_of_a_sweep_is_told_with_the_commands(
    ssl_bench: Command, tmp_path: Path, words: list[str], said: str, commands: list[str]
) -> None:
    lines = complaint(ssl_bench(*words)).splitlines()
    assert lines == [
        "nothing was started.",
        f"{said}; a sweep grows with each command that names it: type",
        *(f"  ssl-bench {command}" for command in commands),
    ]
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_a_key_that_the_default_choice_lacks_in_a_sweep(ssl_bench: Command, tmp_path: Path) -> None:
    """Hydra composes a sweep with the default of what is swept, here method=moco_v2."""
    words = [*TINY, "stage=pretrain", "epochs=1", "method=byol,simclr", "method.hidden_dim=16"]
    words.insert(0, "schedule.warmup_epochs=0")  # of a schedule that both of them bring
    ssl_bench("-m", *words, check=True)
    found = [*(tmp_path / "runs").rglob("summary.json")]
    configs = [yaml.safe_load((one.parent / "config.yaml").read_text()) for one in found]
    hidden = {config["method"]["name"]: config["method"]["hidden_dim"] for config in configs}
    assert hidden == {"byol": 16, "simclr": 16}
    said = complaint(ssl_bench("-m", *words[:-1], "method.hidden=16")).splitlines()
    assert len(said) == 3
    assert all("method.hidden: no such key; did you mean method.hidden_dim?" in x for x in said[1:])


def test_a_check_that_fails_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Hydra only warns of what a callback raises."""
    for error, status in (
        (ZeroDivisionError("x"), 1),
        (HydraException("x"), 2),
        (UserError("x"), 2),
    ):
        monkeypatch.setattr(command.Check, "_check_sweep", Mock(side_effect=error))
        with pytest.raises(SystemExit) as stop:
            command.Check().on_multirun_start(OmegaConf.create({}))
        assert stop.value.code == status
        if status == 2:
            assert stop.value.line == "x"
        else:
            assert "ZeroDivisionError: x" in capsys.readouterr().err


def test_a_mistyped_key_in_a_launcher_of_ones_own(ssl_bench: Command, tmp_path: Path) -> None:
    folder = tmp_path / "my conf" / "launcher"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [slurm]\n"
        "hydra: {launcher: {partiton: gpu, timeout_min: 9}}\n"
    )
    said = complaint(ssl_bench("seed=0,1", "--config-dir", "my conf", "launcher=mine"))
    assert said.startswith(
        "launcher/mine.yaml: hydra.launcher.partiton: no such key; "
        "did you mean hydra.launcher.partition? Valid: "
    )
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [slurm]\nhydra: {launcher: {timeout_min: long}}\n"
    )
    said = complaint(ssl_bench("seed=0,1", "--config-dir", "my conf", "launcher=mine"))
    assert said.startswith("launcher/mine.yaml: hydra.launcher.timeout_min: Value 'long'")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "seed=7", "--cfg", "job", "method=byol"],
        ["seed=7", "--cfg=job", "method=byol", "--multirun"],
    ],
)
def test_options_stand_anywhere(ssl_bench: Command, words: list[str]) -> None:
    shown = yaml.safe_load(ssl_bench(*words, check=True).stdout)
    assert (shown["seed"], shown["method"]["name"]) == (7, "byol")


def test_a_launcher_without_a_sweep(ssl_bench: Command, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: mine.Launcher\n")
    said = complaint(ssl_bench("--config-dir=conf", "hydra/launcher=mine"))
    assert (
        said
        == "hydra/launcher is for sweeps, and would be ignored here: add -m, or choose a launcher="
    )


@pytest.mark.parametrize(
    ("word", "is_sweep", "instead"),
    [
        ("hydra.job.chdir=true", False, "a run stays in the folder"),
        ("hydra.run.dir=there", False, "the directory of a run is dir="),
        ("+hydra.output_subdir=.hydra", True, "config.yaml"),
        ("hydra/job_logging=default", True, "verbosity="),
        ("hydra.sweeper.max_batch_size=1", False, "this is one run: add -m"),
        ("hydra.sweeper.max_batch_size=1", True, None),
        ("hydra.sweep.dir=there", False, "this is one run: add -m"),
        ("hydra.sweep.dir=there", True, None),
        ("hydra.sweep.subdir=there", True, "leave it out"),
        ("+hydra.job.env_set.A=1", True, "set variables in the shell"),
        ("+hydra.job.env_set.A=1", False, None),
        ("hydra.launcher.at_once=1", True, None),
    ],
)
def test_keys_of_hydra_that_do_nothing(word: str, is_sweep: bool, instead: str | None) -> None:
    config = OmegaConf.create({"hydra": {"overrides": {"hydra": [word]}}})
    said = command.hydra_in_vain(config, is_sweep)
    if instead is None:
        assert said == ""
    else:
        assert said.startswith(f"{word} would be ignored: ")
        assert instead in said


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_such_a_key_starts_nothing(ssl_bench: Command, tmp_path: Path, mode: list[str]) -> None:
    words = ["stage=knn", "backbone=pixels", "hydra.job.chdir=true"]
    assert "hydra.job.chdir=true would be ignored" in complaint(ssl_bench(*mode, *words))
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_a_zoo_name_without_a_network(
    ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    said = complaint(ssl_bench(*TINY, "stage=lincls", "pretrained=moco_v2_200ep"))
    assert said.startswith("pretrained=moco_v2_200ep: no download (")
    url = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar"
    place = Path(os.environ["SSL_BENCH_CACHE"], "zoo", "moco_v2_200ep.pth.tar")
    assert said.endswith(
        f"fetch {url} elsewhere and put it at {place} (its md5 begins with 59fd9945)"
    )
    assert not place.exists()
    assert files(tmp_path) == set()


# --- mistakes in the configuration, in this process -----------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
        (["dir=2024"], "dir=2024: should be a text; quote it: 'dir=\"2024\"'"),
        (["stage=predict", "stage.images=/x"], "stage=predict needs weights: type pretrained="),
        (
            ["method.bn_splits=3", "batch_size=8", "devices=2"],
            "method.bn_splits=3 does not divide the 4 images of a process: change one of "
            "method.bn_splits, batch_size, devices",
        ),
        (
            ["method=wmse", "method.whitening_size=96"],
            "method.whitening_size=96 does not divide batch_size=256",
        ),
        (
            ["backbone=vit_small", "method=dino", "backbone.patch_size=5", "data.image_size=32"],
            "backbone.patch_size=5 does not divide backbone.image_size=32: change one of "
            "backbone.patch_size, backbone.image_size",
        ),
        (["dir="], "dir=: string should have at least 1 character"),
        (["device=gpu"], "device=gpu: should be auto, cpu, mps, cuda or, for one GPU of sev"),
        (["sweep=runs/s"], "sweep=runs/s: should be a name of letters, digits, . _ and -"),
        (["epochs=0"], "epochs=0: input should be greater than 0"),
        (["compile=maybe"], "compile=maybe: should be true or false"),
        (["+optimizer.lr=0.1"], "optimizer.lr: no such key; did you mean optimizer.base_lr? Valid"),
        (["+data.size=8"], "data.size: no such key; did you mean data.image_size? Valid"),
        (["compile=yes"], "compile=yes: should be true or false"),
        *(
            ([f"method.mlp={word}"], f"method.mlp={word}: should be true or false")
            for word in ("no", "yes", "on", "off", "0", "1", "1.0", "t")
        ),
        (["method.dim='128'"], "method.dim='128': should be a number: type method.dim=128"),
        (["method.dim=true"], "method.dim=True: should be a number"),
        (["optimizer.base_lr='0.1'"],
         "optimizer.base_lr='0.1': should be a number: type optimizer.base_lr=0.1"),
        (["augmentation.crop_scale=['0.5',1]"], "augmentation.crop_scale.0='0.5': should be a num"),
        (["optimizer.base_lr=inf"], "optimizer.base_lr=inf: input should be a finite number"),
        (["optimizer.base_lr=nan"], "optimizer.base_lr=nan: input should be a finite number"),
        (["augmentation.crop_ratio=[0.5,inf]"],
         "augmentation.crop_ratio.1=inf: input should be a finite number"),
        (["backbone.stem=tiny"], "backbone.stem=tiny: input should be 'imagenet' or 'small'"),
        (["method.momentum=1.1"], "method.momentum=1.1: input should be less than or equal to 1"),
        (["method.mlp=2"], "method.mlp=2: should be true or false"),
        (["augmentation.mean=[0.5,0.5]"], "augmentation.mean.2 needs a value"),
        (["optimizer.scaling=cubic"],
         "scaling=cubic: input should be 'linear', 'sqrt', 'three_quarters' or 'none'"),
        (["data.on_error=ignore"], "data.on_error=ignore: input should be 'raise' or 'skip'"),
        (["data=cifar10", "data.root=x", "data.image_size=64"],
         "data.image_size=64: input should be 32"),
        (["data=stl10"], "data.root needs a value: type data.root=..."),
        (["stage=lincls", "stage.labels_per_class=0"],
         "stage.labels_per_class=0: input should be greater than 0"),
        *(
            ([f"stage={stage}", "stage.test_resize=0.9"],
             "stage.test_resize=0.9: input should be greater than")
            for stage in ("lincls", "knn", "finetune", "select")
        ),
        (["batch_size=10", "devices=4"], "choose a multiple, like batch_size=12"),
        (["+method.foo=1"], "method.foo: no such key; "),
        (["method._target_=ssl_bench.methods.moco.X"],
         "method._target_=ssl_bench.methods.moco.X: can't be imported"),
        *(
            ([f"{group}._target_=os.path.sep"],
             f"{group}._target_=os.path.sep is a value of type str: name a class or a function")
            for group in build.SUPPLIED if group != "data"
        ),
        (["method._target_=os.getpid"], "method._target_=os.getpid takes no backbone: each of its"),
        (["optimizer._target_=os.getpid"], "os.getpid takes no params and no batch_size: each of"),
        (["tracking._target_=os.getpid"], "os.getpid takes no directory and no config: each of"),
        (["stage._target_=os.getpid"], "stage._target_=os.getpid takes no cfg and no run: each"),
        (["backbone=pixels", "backbone._target_=os.getpid"],
         "backbone.image_size: no such key; there is none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_check(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        build.check(compose(*overrides))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


WHOLE = compose()
KEYS = sorted(
    f"{group}.{key}" if isinstance(WHOLE[group], type(WHOLE)) else group
    for group in WHOLE
    for key in (WHOLE[group] if isinstance(WHOLE[group], type(WHOLE)) else [""])
    if key != "name" and not str(key).startswith("_")
)


@given(key=st.sampled_from(KEYS), at=st.integers(0, 40))
@settings(max_examples=20)
def test_any_mistyped_key_is_named(key: str, at: int) -> None:
    """One letter twice, anywhere in the key's own name."""
    parent, _, name = key.rpartition(".")
    at %= len(name)
    mistyped = name[: at + 1] + name[at:]
    cfg = OmegaConf.create(OmegaConf.to_container(WHOLE))
    with open_dict(cfg):
        OmegaConf.update(cfg, f"{parent}.{mistyped}" if parent else mistyped, 1)
    with pytest.raises(UserError) as caught:
        build.check(cfg)
    wrong, right = (f"{parent}.{word}" if parent else word for word in (mistyped, name))
    assert str(caught.value).startswith(f"{wrong}: no such key; did you mean {right}? Valid: ")


# --- mistakes about the data, the weights and the directory ---------------------------------------


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "dl21"
    write_dl21(root, 30, 12, 9, num_classes=3, seed=0, image_size=16, workers=1)
    return root


@pytest.fixture
def data(master: Path, tmp_path: Path) -> Path:
    """30 unlabelled, 12 train and 9 val images of 3 classes in `dl21`, to damage."""
    return shutil.copytree(master, tmp_path / "dl21")


class Payload:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


def a_gap(data: Path) -> None:
    (data / "unlabeled" / "7.png").unlink()


def too_few_labels(data: Path) -> None:
    torch.save(torch.zeros(5, dtype=torch.int64), data / "train_label_tensor.pt")


def code_for_labels(data: Path) -> None:
    (data / "train_label_tensor.pt").write_bytes(pickle.dumps(Payload(), protocol=2))


def no_images(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def code_for_weights(data: Path) -> None:
    (data.parent / "weights.pt").write_bytes(pickle.dumps(Payload(), protocol=2))


def half_a_file(data: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, data.parent / "weights.pt")
    os.truncate(data.parent / "weights.pt", 1000)


def an_empty_file(data: Path) -> None:
    (data.parent / "weights.pt").touch()


def resnet50(data: Path) -> None:
    method = MoCo(resnet.resnet50(width=8), queue_size=16)
    torch.save(
        {"arch": "resnet50", "state_dict": official_moco_state_dict(method)},
        data.parent / "weights.pt",
    )


def a_file_in_the_way(data: Path) -> None:
    (data.parent / "taken").touch()


def nothing(data: Path) -> None:
    pass


WEIGHTS = [*LINCLS, "pretrained=weights.pt"]
QUICK = {  # (what is wrong with the data, the command, what is said)
    "no folder": (
        no_folder,
        PRETRAIN,
        ["no folder dl21/unlabeled; data.root= sets where the data set is (now dl21)"],
    ),
    "code for labels": (
        code_for_labels,
        LINCLS,
        ["dl21/train_label_tensor.pt is not a tensor file", "expected int64 labels"],
    ),
    "queue": (
        nothing,
        [*PRETRAIN, "method.queue_size=31"],
        ["method.queue_size=31 is larger than the dataset", "choose at most method.queue_size=30"],
    ),
    "batch": (
        nothing,
        [*PRETRAIN, "batch_size=31"],
        [
            "batch_size=31 is larger than the dataset (30 training images)",
            "choose at most batch_size=30",
        ],
    ),
}
SLOW = {  # a rule each that a test of its module knows too
    "gap": (a_gap, PRETRAIN, ["dl21/unlabeled/7.png is missing", "0, 1, 2, ... without a gap"]),
    "labels": (
        too_few_labels,
        LINCLS,
        ["train_label_tensor.pt in dl21 has 5 labels for 12 images"],
    ),
    "empty folder": (
        no_images,
        [*PRETRAIN, "data=folder"],
        [
            "no images under dl21; data.root= sets the folder; known extensions are ",
            " .jpg ",
            " .png ",
        ],
    ),
    "unlabelled": (
        nothing,
        [*LINCLS, "data=folder", "data.root=dl21/val"],
        ["dl21/val has no labels", "labelled data lie in train/<class>/ and val/<class>/"],
    ),
    "labels per class": (
        nothing,
        [*LINCLS, "stage.labels_per_class=99"],
        ["stage.labels_per_class=99: class ", "choose at most stage.labels_per_class="],
    ),
    "batch norm": (
        nothing,
        [*PRETRAIN, "method.bn_splits=3"],
        ["method.bn_splits=3 does not divide the 8 images", "change one of"],
    ),
    "three views": (
        nothing,
        [*PRETRAIN, "augmentation.num_views=3"],
        [
            "augmentation.num_views=3, but method=moco_v2 takes 2: type augmentation.num_views=2, "
            "or choose another"
        ],
    ),
    "two views": (
        nothing,
        [*LINCLS, "augmentation=moco_v2"],
        [
            "augmentation.num_views=2, but stage=lincls takes 1: type augmentation.num_views=1, "
            "or choose another"
        ],
    ),
    "interval": (
        nothing,
        [*PRETRAIN, "augmentation.crop_scale=[0.9,0.2]"],
        ["augmentation.crop_scale is [0.9, 0.2]: give [low, high] with 0 < low <= high <= 1"],
    ),
    "code for weights": (
        code_for_weights,
        WEIGHTS,
        ["weights.pt: truncated, or not a PyTorch file", "posix.mkdir"],
    ),
    "half a file": (
        half_a_file,
        WEIGHTS,
        ["weights.pt: damaged or truncated: its directory isn't what was written"],
    ),
    "empty file": (an_empty_file, WEIGHTS, ["weights.pt: truncated, or not a PyTorch file"]),
    "no run": (
        nothing,
        [*LINCLS, "pretrained=dl21"],
        ["pretrained=dl21: no checkpoint in this directory; give a run"],
    ),
    "backbone": (
        resnet50,
        WEIGHTS,
        [
            "pretrained=weights.pt: ",
            "unexpected (layer1.0.conv3.weight",
            "of another shape (",
            "Choose the backbone=",
        ],
    ),
    "pixels": (
        resnet50,
        [*(word for word in WEIGHTS if not word.startswith("backbone")), "backbone=pixels"],
        ["pretrained=weights.pt: this backbone has no tensors: leave it out"],
    ),
    "a file": (
        a_file_in_the_way,
        [*PRETRAIN, "dir=taken"],
        ["dir=taken: can't be written (File exists); choose another"],
    ),
    "not writable": (
        nothing,
        [*PRETRAIN, "dir=/proc/run"],
        ["dir=/proc/run: can't be written", "choose another dir="],
    ),
    "in a rank": (
        no_folder,
        [*PRETRAIN, "devices=2"],
        ["no folder dl21/unlabeled; data.root= sets where the data set is"],
    ),
}
CASES = [pytest.param(*case, id=name) for name, case in QUICK.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]


@pytest.mark.parametrize(("damage", "command", "says"), CASES)
def test_data(
    ssl_bench: Command,
    tmp_path: Path,
    data: Path,
    damage: Callable[[Path], None],
    command: list[str],
    says: list[str],
) -> None:
    damage(data)
    before = files(tmp_path)
    said = complaint(ssl_bench(*command))
    assert all(part in said for part in says), said
    assert "\n" not in said
    assert not (tmp_path / "executed").exists()
    assert files(tmp_path) == before  # a run that never began leaves no directory to stumble over


@pytest.mark.slow
def test_a_truncated_image(ssl_bench: Command, tmp_path: Path, data: Path) -> None:
    os.truncate(data / "unlabeled" / "3.png", 60)
    said = complaint(ssl_bench(*PRETRAIN))
    assert said.startswith("cannot decode dl21/unlabeled/3.png (")
    assert said.endswith("leave such images out with data.on_error=skip")
    result = ssl_bench(*PRETRAIN, "data.on_error=skip", "dir=run", check=True)
    assert "1 of 30 images are left out: dl21/unlabeled/3.png (" in result.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_another_configuration_in_the_same_directory(ssl_bench: Command, tmp_path: Path) -> None:
    command = [*TINY_PRETRAIN, "epochs=1", "dir=run"]
    ssl_bench(*command, check=True)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    said = complaint(ssl_bench(*command, "method.temperature=0.5", "batch_size=64"))
    assert said == (
        "dir=run holds a run with another configuration: batch_size was 128, is 64; "
        "method.temperature was 0.2, is 0.5. Choose another dir=, or delete it"
    )
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}


@pytest.mark.slow
def test_divergence(ssl_bench: Command, tmp_path: Path) -> None:
    """The weights become NaN; the checkpoints before that stay, and hold numbers."""
    command = [*TINY_PRETRAIN, "optimizer.base_lr=1e9", "save_every=1", "dir=run"]
    said = complaint(ssl_bench(*command))
    step = re.match(
        r"diverged at step (\d+): .*; the last good state, of step (\d+), is kept; try a lower",
        said,
    )
    assert step, said
    kept = complete(tmp_path / "run")
    assert int(kept[0].stem.removeprefix("step")) == int(step[2])
    for path in kept:
        assert int(path.stem.removeprefix("step")) < int(step[1])
        state = torch.load(path, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in state.values()), path


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Of a training, and of a stage that saves no state; a state that is there stays."""
    (disk := tmp_path / "disk").mkdir()
    pretrain = [*TINY_PRETRAIN, "epochs=3", "save_every=5", "eval_every=0", "device=cpu"]
    script = f"""
    python -m ssl_bench {" ".join(pretrain)} dir=run; echo status $?
    ls run/checkpoints
    head -c 9000000 /dev/zero > filled
    python -m ssl_bench stage=export pretrained=run stage.out=exports; echo status $?
    """
    told = subprocess.run(
        [*mounted(str(disk), "3m"), "sh", "-c", f"cd {disk} && {script}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert told.returncode == 0
    assert told.stdout.count("status 2\n") == 2
    assert told.stdout.count("\nssl-bench: the disk is full") == 2
    assert re.search(r"\nstep\d+\.pt\n", told.stdout)
    assert "Traceback" not in told.stdout
    assert "Error executing" not in told.stdout


@pytest.mark.slow
def test_a_member_that_fails_later_does_not_stop_the_sweep(
    ssl_bench: Command, tmp_path: Path
) -> None:
    result = ssl_bench(*TINY_PRETRAIN, "epochs=1", "-m", "optimizer.base_lr=1e38,0.1")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "diverged" in result.stderr.splitlines()[-1]
    (finished,) = (tmp_path / "runs").rglob("summary.json")
    config = yaml.safe_load((finished.parent / "config.yaml").read_text())
    assert config["optimizer"]["base_lr"] == 0.1


@pytest.mark.parametrize("words", [["--help"], ["stage=zoo"], ["--cfg", "job"], ["doctor"]])
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(words: list[str]) -> None:
    command = [sys.executable, "-m", "ssl_bench", *words]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(command, stdout=writer, stderr=-1, text=True)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")
