"""Commands as the tests compose them."""

import copy
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

import hydra
import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf
from patience import PATIENCE, count_lines, wait

import ssl_bench
import ssl_bench.command
from ssl_bench.config import signatures
from ssl_bench.runs import sweep

CONF = Path(ssl_bench.command.__file__).with_name("conf")
GROUPS = (
    "data",
    "backbone",
    "method",
    "augmentation",
    "optimizer",
    "schedule",
    "tracking",
    "stage",
    "experiment",
    "launcher",
)
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDED = {
    "dl21": ["data.root=/x"],
    "folder": ["data.root=/x"],
    "imagenet": ["data.root=/x"],
    "webdataset": ["data.root=/x"],
    "huggingface": ["data.root=/x"],
    "stl10": ["data.root=/x"],
    "cifar10": ["data.root=/x"],
}
PUBLISHED = ("imagenet", "imagenet100", "cifar10", "stl10", "dl21")
NEEDED |= {f"{name}_moco_v2": ["data.root=/x"] for name in PUBLISHED}
NEEDED |= {"distill": ["method.teacher=/x"]}
NEEDED |= {"predict": ["stage.images=/x", "pretrained=/x"], "export": ["pretrained=/x"]}
NEEDED |= {"own": ["data._target_=ssl_bench.data.formats.digits.Digits"]}
NEEDED |= {
    "cifar100": ["data.root=/x"],
    "synthetic_dl21": ["data.root=/x"],
    "synthesize": ["stage.out=/x"],
}


def compose(*overrides: str) -> DictConfig:
    """What Hydra makes of them, in its own two steps: it composes the choices of files, which takes
    90 ms and is done once, and writes single values into that.
    """
    values = [word for word in overrides if _is_value(word)]
    parsed = OverridesParser.create().parse_overrides(values)
    if any(override.is_sweep_override() for override in parsed):  # for Hydra to refuse
        values = []
    cfg = copy.deepcopy(_composed(tuple(word for word in overrides if word not in values)))
    ConfigLoaderImpl._apply_overrides_to_config(parsed if values else [], cfg)
    return cfg


def _is_value(word: str) -> bool:
    """Does it give a key of the configuration a value, and choose no file?"""
    key = re.fullmatch(r"\+{0,2}(?!hydra\b)([a-z]\w*)(\.\w+)*=.*", word, re.DOTALL)
    return key is not None and (key[2] is not None or not (CONF / key[1]).is_dir())


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        return hydra.compose("config", list(overrides))


def interrupted(command: list[str], cwd: Path, run: Path, step: int, signum: int) -> int:
    """Start, send the signal to all its processes once `step` is logged, return the exit status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_bench", *command],
        cwd=cwd,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    wait(lambda: count_lines(cwd / run / "metrics.jsonl") >= step, process)
    os.killpg(process.pid, signum)
    process.wait(timeout=PATIENCE)
    return process.returncode


def run_here(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess:
    """`ssl-bench` with these words, typed in this folder, in this process: another one takes
    seconds until it has imported torch.

    What the process has in common with it, such as its folder and its environment, is put back.
    """
    with (
        TemporaryFile("w+") as out,
        TemporaryFile("w+") as err,
        _as_if_alone(["ssl-bench", *words], folder),
        _instead_of(out, err),
    ):
        try:
            ssl_bench.command.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:  # as Python itself would have it
            traceback.print_exc()
            status = 1
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(words, status, *texts)


@contextmanager
def _as_if_alone(argv: list[str], folder: Path) -> Iterator[None]:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2)
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    here, environment, path = Path.cwd(), dict(os.environ), list(sys.path)
    hydras, logger = Singleton.get_state(), logging.getLogger("ssl_bench")
    logs = [*logger.handlers], logger.propagate, logger.level
    GlobalHydra.instance().clear()
    try:
        os.chdir(folder)
        typed, sys.argv = sys.argv, argv
        yield
    finally:
        os.chdir(here)
        sys.argv, sys.path[:] = typed, path
        os.environ.clear()
        os.environ.update(environment)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        Singleton.set_state(hydras)
        logger.handlers, logger.propagate, logger.level = logs
        _forget_modules(folder)


def _forget_modules(folder: Path) -> None:
    """Those that a test wrote: the next one's may have their names."""
    if not list(folder.glob("*.py")):
        return
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{folder}{os.sep}"):
            del sys.modules[name]
    importlib.invalidate_caches()
    signatures.parameters.cache_clear()
    signatures.constant.cache_clear()


@contextmanager
def _instead_of(out: TextIO, err: TextIO) -> Iterator[None]:
    """stdout and stderr are these files, for the processes that are started meanwhile, too."""
    before = [os.dup(number) for number in (1, 2)]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            yield
        finally:
            for number, kept in enumerate(before, 1):
                os.dup2(kept, number)
                os.close(kept)


def complaint(result: subprocess.CompletedProcess) -> str:
    """What the command said of the mistake; asserts that, after log lines, it said nothing else."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    logged, mark, said = result.stderr.rstrip("\n").partition("ssl-bench: ")
    assert mark, result.stderr
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in logged.splitlines()), result.stderr
    return said


@cache
def plain(*overrides: str) -> dict:
    needed = [word for override in overrides for word in NEEDED.get(override.partition("=")[2], [])]
    return OmegaConf.to_container(compose(*overrides, *needed))


def member(
    folder: Path, summary: dict | None, *overrides: str, metric: str = "loss"
) -> sweep.Member:
    """On disk, finished if there is a summary."""
    name = sweep.name(overrides)
    config = {"dir": f"{folder.name}/{name}", "metric": metric, "pretrained": None, "epochs": 2}
    config |= {
        "stage": {"name": "pretrain"},
        "batch_size": 2,
        "device": "cpu",
        "seed": 0,
        "data": {"root": "/images"},
    }
    config |= {"method": {"name": "moco_v2"}, "optimizer": {"base_lr": 0.2}}
    given = OmegaConf.from_dotlist([word for word in overrides if not word.startswith("launcher=")])
    config = OmegaConf.to_container(OmegaConf.merge(config, given))
    made = sweep.Member(
        folder / ".members" / f"{name}.json", list(overrides), config, str(folder.parent), ""
    )
    made.save()
    if summary is not None:
        made.directory.mkdir(parents=True)
        (made.directory / "summary.json").write_text(json.dumps(summary))
        (made.directory / "config.yaml").write_text(yaml.safe_dump(config))
        (made.directory / "metrics.jsonl").write_text("")
    return made


SMALL_IMAGES = ["data.image_size=16", "backbone.width=8", "backbone.stem=small", "device=cpu"]


def mounted(place: str, size: str) -> list[str]:
    """What begins a command for which `place` is a disk of so many bytes. Skips where it can't."""
    script = f'mount -t tmpfs -o size={size} tmpfs {place} && exec "$@"'
    begin = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if os.geteuid() or subprocess.run([*begin, "true"], capture_output=True).returncode:
        pytest.skip("can't mount here")
    return begin
