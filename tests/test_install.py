"""A wheel, built from an sdist and installed without a network, runs elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN

import ssl_bench

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install")]  # one wheel, one environment

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")
)
# a link in conf/
CONFIGS += [f"launcher/{path.name}" for path in sorted((ROOT / "launchers").glob("*.yaml"))]
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
OFFLINE = {"PIP_NO_INDEX": "1"} | dict.fromkeys(PROXIES, "http://127.0.0.1:9")  # nobody listens


def call(*command: str | Path, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | OFFLINE
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what is installed, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("conf", "hydra_plugins", "launchers", "ssl_bench", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def dist(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist, and of the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"ssl_bench-{ssl_bench.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    return install(tmp_path_factory, "--no-index", wheel)


def install(tmp_path_factory: pytest.TempPathFactory, *what: str | Path) -> Callable[..., str]:
    """Runs a program of a new environment, which shares only the dependencies with this one."""
    venv, elsewhere = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=elsewhere)
    python = venv / "bin" / "python"
    site = Path(
        call(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere
        ).strip()
    )
    # Its own packages come first. Python reads no .pth files of the folder named here: an editable
    # install stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    call(
        *pip,
        "install",
        "--no-deps",
        "--force-reinstall",
        "--ignore-installed",
        *what,
        cwd=elsewhere,
    )
    where = Path(
        call(python, "-c", "import ssl_bench; print(ssl_bench.__file__)", cwd=elsewhere).strip()
    )
    assert where.is_relative_to(what[-1] if "--editable" in what else site)

    def program(name: str, *args: str) -> str:
        return call(venv / "bin" / name, *args, cwd=elsewhere)

    return program


def test_the_sdist_holds_what_the_wheel_is_built_of(dist: Path) -> None:
    """And nothing half: the tests need the repository."""
    name = f"ssl_bench-{ssl_bench.__version__}"
    with tarfile.open(dist / f"{name}.tar.gz") as archive:
        held = {file.removeprefix(f"{name}/").split("/")[0] for file in archive.getnames()}
    packages = {"ssl_bench", "hydra_plugins", "ssl_bench.egg-info"}
    texts = {"setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO"}
    assert held - {name} == packages | texts


def test_the_wheel_holds_every_configuration(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    held = sorted(name.removeprefix("ssl_bench/conf/") for name in names if name.endswith(".yaml"))
    assert held == sorted(CONFIGS)
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ssl_bench").rglob("*.py")
        if "conf" not in path.parts
    }
    assert modules <= set(names)
    assert {f"ssl_bench/report/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    strangers = {name.split("/")[0] for name in names} - {"ssl_bench", "hydra_plugins"}
    assert len(strangers) == 1  # ssl_bench-*.dist-info: neither conf, launchers nor tests beside it
    assert [name for name in names if name.startswith("hydra_plugins/")] == [
        "hydra_plugins/ssl_bench_launchers/__init__.py"  # a namespace: no __init__.py above
    ]


def test_help_and_configuration(installed: Callable[..., str]) -> None:
    page = installed("ssl-bench", "--help")
    for config in CONFIGS:
        group, _, choice = config.removesuffix(".yaml").rpartition("/")
        if row := re.search(rf"^{group}= +(.*(?:\n +.*)*)", page, re.M):  # others are in the docs
            assert choice in re.split(r"\W+", row[1]), config
    job = installed("ssl-bench", "--cfg", "job")
    assert "_target_: ssl_bench.methods.moco.MoCo" in job
    assert installed("python", "-m", "ssl_bench", "--cfg", "job") == job


def test_a_sweep(installed: Callable[..., str]) -> None:
    """Hydra finds the launchers; members, in processes of their own, find everything else."""
    installed("ssl-bench", "launcher=workstation", *TINY_PRETRAIN, "epochs=1")
    listing = installed("ssl-bench", "stage=status", "runs=runs/sweeps/pretrain")
    assert "| finished | 10/10" in listing
    assert "partition: n1s16-t4-2" in installed("ssl-bench", "launcher=nyu_t4x2", "--cfg", "hydra")


def test_an_editable_install(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hydra's own search doesn't look into one."""
    program = install(tmp_path_factory, "--no-build-isolation", "--editable", copy)
    assert "partition: n1s16-t4-2" in program("ssl-bench", "launcher=nyu_t4x2", "--cfg", "hydra")


def test_a_run(installed: Callable[..., str]) -> None:
    installed("ssl-bench", *TINY_PRETRAIN, "epochs=1", "dir=run")
    listing = installed("python", "-c", "import os; print(sorted(os.listdir('run')))")
    assert "summary.json" in listing
    assert "checkpoints" in listing
