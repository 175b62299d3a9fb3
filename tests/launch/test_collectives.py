"""What all processes do together, all of them do: read from the code, and run."""

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, TINY_PRETRAIN, Command
from patience import PATIENCE, count_lines, wait
from processes import on_ranks

import ssl_bench

ROOT = Path(ssl_bench.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TORCHRUN += ["-m", "ssl_bench"]

# -- read: no collective where rank 0 is alone -----------------------------------------------------

PLAIN = {
    name
    for kind in (str, bytes, list, dict, set, Path, torch.nn.Module, torch.Tensor)
    for name in dir(kind)
}
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "broadcast",
    "barrier",
    "init_process_group",
    "DistributedDataParallel",
)


class Module:
    """A file of ours: its functions and methods by name (two of one name are one here), and what it
    imports of ours.
    """

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree
        self.functions: dict[str, list[ast.AST]] = {}
        self.imported: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl_bench"):
                here = node.module.removeprefix("ssl_bench").lstrip(".")
                self.imported |= {
                    item.asname or item.name: f"{here}.{item.name}".lstrip(".")
                    for item in node.names
                }
        methods = (
            item for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body
        )
        self.methods = {item.name for item in methods if isinstance(item, ast.FunctionDef)}


class Reading:
    """Which functions talk to other processes, by themselves or by what they call."""

    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.modules = {name: Module(name, tree) for name, tree in trees.items()}
        self.talking: set[str] = {"runs.run.Run"}  # whose opening waits for all
        before = -1
        while len(self.talking) > before:
            before = len(self.talking)
            for module in self.modules.values():
                for name, bodies in module.functions.items():
                    if any(self.talks(node, module) for body in bodies for node in ast.walk(body)):
                        self.talking.add(f"{module.name}.{name}")

    def talks(self, node: ast.AST, module: Module) -> bool:
        if not isinstance(node, ast.Call):
            return False
        if module.name == "runtime.distributed" and ast.unparse(node.func).startswith(
            ("dist.", "ddp")
        ):
            return ast.unparse(node.func).endswith(COLLECTIVES) or ast.unparse(node.func) == "ddp"
        return bool(self.called(node.func, module) & self.talking)

    def called(self, func: ast.AST, module: Module) -> set[str]:
        """What this may be, as module.name."""
        if isinstance(func, ast.Name):
            return {module.imported.get(func.id, f"{module.name}.{func.id}")}
        if not isinstance(func, ast.Attribute):
            return set()
        owner, name = ast.unparse(func.value), func.attr
        if owner in module.imported and module.imported[owner] in self.modules:
            return {f"{module.imported[owner]}.{name}"}
        if owner == "self":
            return {f"{module.name}.{name}"}
        if owner == "run":
            return {f"runs.run.{name}"}
        return {
            f"{other.name}.{name}"
            for other in self.modules.values()
            if name in other.methods - PLAIN
        }

    def found(self) -> list[str]:
        """The calls that talk where a part of the processes is."""
        return sorted(
            {
                f"{module.name}:{call.lineno}: {ast.unparse(call.func)}"
                for module in self.modules.values()
                for part in alone(module.tree)
                for call in ast.walk(part)
                if module.name != "runtime.distributed" and self.talks(call, module)
            }
        )


def is_main(test: ast.AST) -> bool:
    """Is this a condition that only rank 0 meets?"""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(is_main(value) for value in test.values)
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not) and ast.unparse(test.operand).endswith("rank()")
    return ast.unparse(test).endswith(("is_main", "rank() == 0", "rank == 0"))


def is_other(test: ast.AST) -> bool:
    """One that every rank but 0 meets?"""
    if isinstance(test, ast.BoolOp):
        return any(is_other(value) for value in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return is_main(test.operand)
    return ast.unparse(test).endswith(("rank()", "rank() > 0", "rank > 0", "rank() != 0"))


def alone(tree: ast.AST) -> Iterator[ast.AST]:
    """What a part of the ranks does: what stands under such a condition, and after one that the
    others leave by.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp) and (is_main(node.test) or is_other(node.test)):
            parts = [node.body, node.orelse]
            yield from (
                item for part in parts for item in (part if isinstance(part, list) else [part])
            )
        if isinstance(node, ast.BoolOp):
            for i, value in enumerate(node.values):
                if is_main(value) or is_other(value):
                    yield from node.values[i + 1 :]
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for i, item in enumerate(block if isinstance(block, list) else []):
                left = isinstance(item, ast.If) and isinstance(
                    item.body[-1], ast.Return | ast.Raise | ast.Continue
                )
                if left and is_other(item.test):
                    yield from block[i + 1 :]


TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in ROOT.rglob("*.py")
}


@cache
def package() -> Reading:
    return Reading(TREES)


def test_no_collective_where_rank_0_is_alone() -> None:
    assert package().found() == []


def test_the_reading_knows_what_talks() -> None:
    talking = package().talking
    names = (
        "runtime.distributed.any_rank runs.run.stopping stages._training.open_source "
        "evaluate.features.extract_all launch.process.launch evaluate.features.watched "
        "evaluate.passes.evaluate training.engine.fit evaluate.features.stored_features "
        "stages.pipeline.draw"
    )
    assert set(names.split()) <= talking
    assert (
        not {
            "runs.run.log",
            "runs.run.save",
            "runs.run.uses",
            "files.write",
            "runs.run.signalled",
            "stages.select.take",
        }
        & talking
    )


@pytest.mark.parametrize(
    "lines",
    [
        "if run.is_main and results:\n  draw(run)",
        "if not run.is_main:\n  return {}\nfor row in rows:\n  draw(run)",
        "if distributed.rank() == 0:\n  draw(run)",
        "if distributed.rank():\n  return\ndraw(run)",
        "x = draw(run) if run.is_main else None",
        "return run.is_main and draw(run)",
        "if rank > 0:\n  draw(run)",
    ],
)
def test_the_reading_finds_it(lines: str) -> None:
    text = "def draw(run):\n  if run.stopping(1):\n    pass\n\n\ndef stage(run):\n"
    text += "".join(f"  {line}\n" for line in lines.splitlines())
    called = {name: TREES[name] for name in ("runs.run", "runtime.distributed")}
    reading = Reading(called | {"mine": ast.parse(text)})
    assert [line.split(": ")[1] for line in reading.found()] == ["draw"]


# -- run -------------------------------------------------------------------------------------------

PIPELINE = [
    *TINY,
    "stage=pipeline",
    "method.queue_size=1024",
    "epochs=1",
    "augmentation=digits",
    "dir=run",
]
PIPELINE += ["stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']"]


def torchrun(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [*TORCHRUN, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
    )


@pytest.mark.slow
def test_a_pipeline_of_two_processes(ssl_bench: Command, tmp_path: Path) -> None:
    """torchrun's. It draws what one process draws, of the same images."""
    rows = tmp_path / "conf" / "experiment" / "mine.yaml"
    rows.parent.mkdir(parents=True)
    on = "'pretrained=${quote:${dir}/pretrain}'"
    rows.write_text(
        "# @package _global_\n"
        "stage:\n"
        "  rows:\n"
        f"    kNN: [stage=knn, {on}]\n"
        f"    whole: [stage=finetune, {on}, augmentation.flip_p=0, batch_size=50, epochs=1]\n"
        f"    cached: [stage=lincls, {on}, stage.features=cached, batch_size=50, epochs=1, "
        "'stage.lrs=[1,10]']\n"
        f"    next: [stage=select, {on}, stage.budget=20, stage.cover_train=false]\n"
        f"    file: [stage=export, {on}, stage.out=out, stage.onnx=false]\n"
    )
    result = torchrun(tmp_path, "--config-dir=conf", "experiment=mine", *PIPELINE)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= {
        f"{row} top-1" for row in ("pretrained", "random init", "kNN", "whole", "cached")
    }
    assert (tmp_path / "run" / "overview.png").stat().st_size > 30_000
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert result.stdout.count("| pretrained") == 1
    pretraining = tmp_path / "run" / "pretrain"
    assert json.loads((pretraining / "environment.json").read_text())["world_size"] == 2
    # it may change the result
    assert yaml.safe_load((pretraining / "config.yaml").read_text())["devices"] == 2
    assert result.stderr.count("step 10/10") == 1  # one rank speaks
    on_ranks(["--config-dir=conf", "experiment=mine", *PIPELINE], tmp_path)  # it is finished


@pytest.mark.parametrize("launcher", [["-m"], ["launcher=workstation"]])
def test_a_sweep_in_several_processes_is_refused(
    ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: list[str]
) -> None:
    """By each of them."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    result = ssl_bench(*launcher, *TINY_PRETRAIN, "seed=0,1")
    assert result.returncode == 2
    assert (
        "ssl-bench: a sweep in the 2 processes of torchrun or srun: start it once" in result.stderr
    )
    assert not list(tmp_path.rglob("*.json"))


def process(folder: Path, rank: int, port: int, *words: str, **env: str) -> subprocess.Popen:
    """A rank that nobody watches, as of a plain srun or of a cluster's own launcher."""
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "ssl_bench", *TINY_PRETRAIN, "dir=run", *words]
    environment = os.environ | own | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("address", ["no-such-node.invalid", "127.0.0.1"])
def test_processes_that_do_not_meet_say_so(tmp_path: Path, port: int, address: str) -> None:
    one = process(tmp_path, 1, port, SSL_BENCH_RENDEZVOUS="3", MASTER_ADDR=address)
    _, said = one.communicate(timeout=PATIENCE)
    assert one.returncode == 2
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert (
        f"process 1 of 2 didn't meet the others at {address}:{port} within 3 s "
        "($SSL_BENCH_RENDEZVOUS)" in last
    )
    assert ("is no name that" in last) == (address != "127.0.0.1")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_that_comes_late_is_waited_for_at_collectives(tmp_path: Path, port: int) -> None:
    """Meeting has a limit of seconds here; packing, which the others wait for, hasn't."""
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "from ssl_bench.data.formats.digits import Digits\n"
        "\n"
        "\n"
        "class Mine(Digits):\n"
        "    def open(self, split):\n"
        "        time.sleep(6 * (os.environ['RANK'] == '0'))\n"
        "        return super().open(split)\n"
    )
    words = ["epochs=1", "data._target_=mine.Mine"]
    both = [process(tmp_path, rank, port, *words, SSL_BENCH_RENDEZVOUS="4") for rank in (0, 1)]
    for one in both:
        _, said = one.communicate(timeout=PATIENCE)
        assert one.returncode == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_process_that_dies_leaves_nobody_hanging(tmp_path: Path, port: int, left: int) -> None:
    """Killed, it can't say a word; the other one does, at once, and the same command continues."""
    both = [process(tmp_path, rank, port, "epochs=20", "log_every=1") for rank in (0, 1)]
    wait(lambda: count_lines(tmp_path / "run" / "metrics.jsonl") >= 6, both[0])
    both[1 - left].send_signal(signal.SIGKILL)
    _, said = both[left].communicate(timeout=PATIENCE)
    both[1 - left].communicate()
    assert both[left].returncode == 2, said
    assert "Traceback" not in said
    assert "ssl-bench: another of the 2 processes has ended" in said


@pytest.mark.slow
def test_of_a_process_that_was_killed_its_parent_tells(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ssl_bench",
        *TINY_PRETRAIN,
        "dir=run",
        "devices=2",
        "epochs=20",
    ]
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait(lambda: list((tmp_path / "run").glob("checkpoints/step*.pt")), run)
    children = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True
    ).stdout.split()
    ranks = [
        pid
        for pid in children
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(int(ranks[0] if ranks else children[-1]), signal.SIGKILL)
    _, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2
    assert "Traceback" not in said
    assert "ssl-bench: one of the 2 processes was ended by SIGKILL" in said
