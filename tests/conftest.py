"""What the tests share: a private image cache, and the command as a user types it."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import durations
import hypothesis
import pytest
from browsing import FLAGS
from commands import run_here
from patience import PATIENCE

SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts daemons

# Several workers at once (make test): torch's threads would wait for each other by spinning, on
# cores that others need.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Two processes that build the same file for torch.compile may read each other's half (torch
    # 2.14).
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
        f"{tempfile.gettempdir()}/inductor-{os.environ['PYTEST_XDIST_WORKER']}"
    )


# Other tests may keep a machine busy.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    if clock := durations.clock():
        config.pluginmanager.register(clock)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, and one for Slurm's tests, which wait more than they compute."""
    from xdist.plugin import pytest_xdist_auto_num_workers as cores

    all_tests = config.option.markexpr in ("", "not exhaustive") and not config.option.keyword
    return cores(config) + (all_tests and shutil.which("slurmctld", path=SYSTEM_PATH) is not None)


# xdist reads the groups in such a hook, too
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no worker is left with it at the end; Slurm's tests take
    longest. The quick ones of a file stay on one worker: what they share is made once.
    """
    for item in items:
        slow, grouped = (item.get_closest_marker(name) for name in ("slow", "xdist_group"))
        if not (slow or grouped):
            item.add_marker(pytest.mark.xdist_group(item.path.stem.removeprefix("test_")))
    durations.mark(items)
    items.sort(key=lambda item: [not item.get_closest_marker(name) for name in ("slurm", "slow")])


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SSL_BENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("COLUMNS", None)  # of the terminal that the tests were started from


@pytest.fixture(autouse=True, scope="module")
def _no_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only tests/runtime/test_cuda.py sees GPUs: the others ask for bits that these don't repeat,
    and for
    two devices.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_cuda.py":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the commands
            patch.setattr("torch.cuda.is_available", lambda: False)  # of what runs here
        yield


@contextmanager
def _log_as_before() -> Iterator[None]:
    """A command that runs here sets up its log, on a stream that ends with its test."""
    logger = logging.getLogger("ssl_bench")
    before = [*logger.handlers], logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = before


@pytest.fixture(autouse=True)
def _log_of_a_test() -> Iterator[None]:
    with _log_as_before():
        yield


@pytest.fixture(autouse=True, scope="module")
def _log_of_a_module() -> Iterator[None]:
    """Its fixtures run commands, too."""
    with _log_as_before():
        yield


Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def ssl_bench(tmp_path: Path) -> Command:
    """`ssl-bench` in a folder of its own, but in this process. Returns what a process would."""

    def command(*args: str, check: bool = False) -> subprocess.CompletedProcess:
        result = run_here(args, tmp_path)
        assert not check or result.returncode == 0, result.stderr
        return result

    return command


@pytest.fixture
def process(tmp_path: Path) -> Command:
    """As `ssl_bench`, in a process of its own, for what a process has that no two tests share: what
    it imports, its environment at the start, how it ends. It needs seconds to import torch.
    """

    def command(*args: str, check: bool = False) -> subprocess.CompletedProcess:
        result = subprocess.run(
            [sys.executable, "-m", "ssl_bench", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return command


# A run of seconds: 1297 digits at 16x16, a ResNet-18 of an eighth of the width, 10 steps an epoch.
TINY = [
    "data=digits",
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
    "augmentation.flip_p=0",
    "batch_size=128",
    "log_every=1",
    "tracking=local",
]
TINY_PRETRAIN = [*TINY, "stage=pretrain", "method.queue_size=1024", "epochs=2", "save_every=4"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Chromium without a network, for the tests of pages."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.get("about:blank")  # ends the page of a new browser, which is still loading
    yield chrome
    chrome.quit()
