"""Which code a run had is written beside it, and a table says where it wasn't the same."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import member
from conftest import TINY_PRETRAIN, Command
from patience import PATIENCE

from ssl_bench.launch.launchers import Workstation
from ssl_bench.report import sweeps
from ssl_bench.runs import code
from ssl_bench.runs.run import Run
from ssl_bench.runs.tracking import NoTracker


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in a repository of its own, as its commit has it."""
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "mine.py").write_text("rate = 1\n")
    monkeypatch.setattr(code, "PACKAGE", package)
    code.digest.cache_clear()
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(package), *words], check=True)
    yield package
    code.digest.cache_clear()


def test_a_run_says_how_its_code_differs_from_the_commit(tmp_path: Path, package: Path) -> None:
    folder, config = tmp_path / "run", {"dir": str(tmp_path / "run"), "seed": 0}

    def started() -> dict:
        with Run(config, torch.device("cpu"), NoTracker) as run:
            run.save(1, model=torch.nn.Linear(1, 1))
        code.digest.cache_clear()
        return json.loads((folder / "environment.json").read_text())

    first = started()
    assert (first["git_dirty"], first["earlier_code"]) == (False, [])
    assert not list(folder.glob("*.diff"))
    (package / "mine.py").write_text("rate = 2\n")
    (package / "new.py").write_text("new = True\n")
    (package.parent / "notes.txt").write_text("of no interest")
    second = started()
    assert second["earlier_code"] == [first["code"]]
    (patch,) = folder.glob("*.diff")
    assert patch.name == f"code-{second['code'][:8]}.diff"
    assert "-rate = 1\n+rate = 2\n" in patch.read_text()
    assert "new file: new.py\nnew = True\n" in patch.read_text()
    assert "interest" not in patch.read_text()
    (package / "mine.py").write_text("rate = 1\n")
    (package / "new.py").unlink()
    third = started()
    assert third["code"] == first["code"]
    assert third["earlier_code"] == [second["code"]]


def test_a_copy_is_the_code_of_its_time(package: Path, tmp_path: Path) -> None:
    """It has what git said of the original, which may be edited meanwhile."""
    (package / "mine.py").write_text("rate = 2\n")
    (package.parent / "yaml").mkdir()
    (package.parent / "yaml" / "one.yaml").write_text("rate: 1\n")
    (package / "conf").symlink_to("../yaml")
    (package / "__pycache__").mkdir()
    before = code.digest(), code.commit(), code.changes()
    first = code.copied(tmp_path / "sweep")
    assert code.copied(tmp_path / "sweep") == first
    (package.parent / "yaml" / "one.yaml").write_text("rate: 2\n")
    assert code.copied(tmp_path / "sweep") != first
    (package / "mine.py").write_text("rate = 3\n")
    assert len({code.copied(tmp_path / "sweep"), *tmp_path.glob("sweep/*")}) == 3

    copy = first / package.name
    assert sorted(path.name for path in copy.iterdir()) == ["conf", "mine.py"]
    assert (copy / "conf" / "one.yaml").read_text() == "rate: 1\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "PACKAGE", copy)
        code.digest.cache_clear()
        assert (code.digest(), code.commit(), code.changes()) == before
    assert before[1]["git_dirty"]
    assert "-rate = 1\n+rate = 2\n" in before[2]


def test_all_that_a_command_launches_has_one_copy(package: Path, tmp_path: Path) -> None:
    """A search launches batch after batch."""
    launcher = Workstation(1)
    first = launcher._code(tmp_path / "sweep")
    (package / "mine.py").write_text("rate = 2\n")
    assert launcher._code(tmp_path / "sweep") == first == Path(*tmp_path.glob("sweep/code-*"))


def test_a_copy_of_what_is_read_only(package: Path, tmp_path: Path) -> None:
    (package / "mine.py").chmod(0o444)
    package.chmod(0o555)
    assert code.copied(tmp_path / "sweep") == code.copied(tmp_path / "sweep")
    package.chmod(0o755)


def test_a_table_of_mixed_code_says_so(tmp_path: Path) -> None:
    several = [
        member(tmp_path, {"loss": float(rate)}, f"method.temperature={rate}", f"seed={seed}")
        for rate in (1, 2)
        for seed in range(2)
    ]
    known = [{"code": 16 * "a"}, {"code": 16 * "a"}, {"code": 16 * "a"}, {}]
    for one, environment in zip(several, known, strict=True):
        (one.directory / "environment.json").write_text(json.dumps(environment))
    assert "code" not in sweeps.sweep_table(tmp_path)
    known[2]["earlier_code"] = [16 * "b"]
    (several[2].directory / "environment.json").write_text(json.dumps(known[2]))
    rows = [line.split("|")[1:-1] for line in sweeps.sweep_table(tmp_path).splitlines()]
    told = [[cell.strip() for cell in row[:2]] for row in rows if "--" not in row[0]]
    assert told == [["method.temperature", "code"], ["1", 8 * "a"], ["2", f"{8 * 'a'}, {8 * 'b'}"]]


def test_a_job_with_other_code_says_so(tmp_path: Path) -> None:
    """As in a container that doesn't pass PYTHONPATH on."""
    one = member(tmp_path / "sweep", None, "seed=0")
    program = (
        "import sys, pathlib; from ssl_bench.launch import member\n"
        "member.run(pathlib.Path(sys.argv[1]), submitted=sys.argv[2])\n"
    )
    for submitted, says in ((code.digest(), False), ("0" * 16, True)):
        words = [sys.executable, "-c", program, str(one.file), submitted]
        said = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE).stderr
        assert "the command of the sweep makes its members anew" in said  # it has no choices
        assert ("has other code than the command that submitted this job" in said) == says


OWN = """
from ssl_bench.methods.moco import MoCo
class Mine(MoCo):
    pass
"""


def test_own_modules_that_change_are_told(
    ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run goes on, and where it is finished; it has another code, then."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    words = [*TINY_PRETRAIN, f"method._target_={name}.Mine", "epochs=2", "eval_every=0", "dir=run"]
    ssl_bench(*words, "until=1", check=True)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["own_code"].keys() == {name}
    assert environment["code"] != code.digest()
    assert f"{name} has changed" not in ssl_bench(*words, "until=1", check=True).stderr
    (tmp_path / f"{name}.py").write_text(OWN + "# edited\n")
    said = ssl_bench(*words, check=True).stderr
    assert f"{name} has changed since this run began: it goes on with the new code" in said
    now = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert now["earlier_code"] == [environment["code"]]
    assert f"{name} has changed" not in ssl_bench(*words, check=True).stderr
    (tmp_path / f"{name}.py").write_text(OWN)
    said = ssl_bench(*words, check=True).stderr
    assert f"{name} has changed since run ran: its result is that of the old code" in said


def test_what_is_ours_or_installed_is_not_own() -> None:
    targets = {"method": "ssl_bench.methods.moco.MoCo", "data": "torchvision.datasets.CIFAR10"}
    nodes = {group: {"_target_": path} for group, path in targets.items()}
    assert code.own(nodes | {"optimizer": {"_target_": "json.loads"}, "seed": 0}) == {}
