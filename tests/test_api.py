"""`ssl_bench.train` does what the command does, `ssl_bench.load` gives what it made."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, Command
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image

import ssl_bench as api
from ssl_bench import command, console
from ssl_bench.api import _as_before
from ssl_bench.augment.views import EvalView

SHORT = [*TINY_PRETRAIN, "epochs=1", "eval_every=0", "device=cpu"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> api.Result:
    folder = tmp_path_factory.mktemp("run")
    return api.train([*SHORT, f"dir={folder}/run"])


def state() -> tuple:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hydras = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    return [*sys.argv], handlers, hydras, os.environ.get("HYDRA_FULL_ERROR"), os.getcwd()


def test_import_is_quick_and_names_are_there() -> None:
    script = (
        "import sys, ssl_bench; print(sorted({'torch', 'hydra', 'numpy'} & sys.modules.keys()))\n"
        "from ssl_bench import train, load, UserError\n"
        "import ssl_bench.command; print(callable(ssl_bench.train), ssl_bench.train is train)\n"
        "try: train(['method.temperature=-1'])\n"
        "except UserError as error: print(error, 'torch' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    wrong = "method.temperature=-1: input should be greater than 0 False"
    assert said.stdout.splitlines() == ["[]", "True True", wrong], said.stderr
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = api.trian
    assert set(api.__all__) <= {*dir(api), *api._HOMES}


def test_it_is_the_run_of_the_command(here: Path, ssl_bench: Command) -> None:
    before = state()
    ran = api.train(SHORT)
    assert state() == before
    assert ran.directory == Path(os.fspath(ran))
    assert f"pretrained={ran}" == f"pretrained={ran.directory}"
    assert ran.directory.is_relative_to("runs/moco_v2-resnet18-digits")
    assert ran.metrics == json.loads((here / ran.directory / "summary.json").read_text())
    assert api.train(SHORT) == ran
    repeated = ssl_bench(*SHORT, check=True)
    assert f"{ran.directory} is finished already" in repeated.stderr
    environment = json.loads((here / ran.directory / "environment.json").read_text())
    assert environment["command"][1:-1] == SHORT


def test_a_stage_without_a_directory(here: Path, capsys: pytest.CaptureFixture) -> None:
    ran = api.train(["stage=zoo"])
    assert ran.directory is None
    assert str(ran) == repr(ran)
    with pytest.raises(api.UserError, match="leaves no directory"):
        api.load(ran)
    assert "moco_v2_800ep" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "method.temprature=1", "batch_size=abc epochs=-1", "seed=0,1", "dir=[",
        "stage=report log_every=3", "batch_size=100000", "data=folder data.root=nowhere",
        "--config-dir=nowhere", "hydra/launcher=ssl_bench_slurm", "data._target_=nowhere.Mine",
    ],
)  # fmt: skip
def test_a_mistake_is_the_line_of_the_command(
    words: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = state()
    with pytest.raises(api.UserError) as told:
        api.train(words.split())
    assert state() == before
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("sys.argv", ["ssl-bench", *words.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.partition("ssl-bench: ")[2]
    assert said == f"{told.value}\n"


@pytest.mark.parametrize(
    "words", [["-m", "seed=0,1"], ["--help"], ["--cfg", "job"], ["launcher=slurm"], "stage=zoo"]
)
def test_what_is_for_the_command_line_is_said(words: list[str], here: Path) -> None:
    with pytest.raises(api.UserError, match=r"ssl_bench.train (does one run|runs in|takes a list)"):
        api.train(words)
    assert not list(here.iterdir())


@pytest.mark.parametrize("call", [api.train, lambda words: api.load("x", words)])
@pytest.mark.parametrize("words", [None, 3, "seed=1", {"seed": 1}, [["seed=1"]]])
def test_overrides_are_a_list_of_texts(call: Callable, words: object) -> None:
    if words is None and call is not api.train:
        words = 1
    with pytest.raises(api.UserError, match="takes a list"):
        call(words)


@pytest.mark.parametrize("run", [None, 3, ["a"]])
def test_what_is_loaded_is_a_path(run: object) -> None:
    with pytest.raises(api.UserError, match=r"ssl_bench\.load takes a path"):
        api.load(run)


def test_two_threads_are_told(here: Path) -> None:
    """Words, folder and Hydra's state are the process's: the second would lose its own."""
    with _as_before(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.train, ["stage=zoo"])
        with pytest.raises(api.UserError, match="one call at a time"):
            waiting.result()
    api.train(["stage=zoo"])


def test_a_program_with_its_own_hydra_and_log(here: Path) -> None:
    log = logging.getLogger("ssl_bench")
    mine = logging.NullHandler()
    log.handlers = [mine]
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        composed = GlobalHydra.instance().hydra
        with pytest.raises(api.UserError, match="did you mean"):
            api.train(["method.temprature=1"])
        assert GlobalHydra.instance().hydra is composed
        assert hydra.compose("config").seed == 0
    assert log.handlers == [mine]
    log.handlers = []
    for _ in range(3):
        api.train(["stage=zoo"])
    assert [type(handler) for handler in log.handlers] == [console.Handler]


def test_a_users_modules_are_found_where_the_call_is(here: Path) -> None:
    (here / "conf" / "method").mkdir(parents=True)
    node = "name: mine\n_target_: my_own.Mine\n"
    (here / "conf/method/mine.yaml").write_text(f"# @package method\n{node}")
    (here / "my_own.py").write_text(
        "from ssl_bench.methods.baselines import Random\n\n\nclass Mine(Random):\n"
        "    def __init__(self, backbone):\n        super().__init__(backbone)\n"
    )
    ran = api.train([*TINY[:4], "--config-dir=conf", "method=mine", "device=cpu"])
    assert list(ran.directory.glob("checkpoints/step*.pt"))


def test_ctrl_c_saves_and_the_same_call_continues(here: Path) -> None:
    def stop() -> None:
        lines = here / "run/metrics.jsonl"
        while not (lines.exists() and lines.read_text().count("\n") >= 2):
            if over.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    over = threading.Event()
    thread = threading.Thread(target=stop)
    thread.start()
    before, words = state(), [*SHORT, "epochs=200", "dir=run"]
    with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT after step \d+; the same call"):
        api.train(words)
    over.set()
    thread.join()
    assert state() == before
    (saved,) = (here / "run/checkpoints").glob("step*.pt")
    assert int(saved.stem[4:]) >= 2


def test_what_a_program_has_set_of_torch_changes_no_run_and_stays(
    here: Path, run: api.Result
) -> None:
    """Types, devices, gradients, autocast, generators."""
    weights = torch.load(next(Path(run).glob("checkpoints/*.pt")), weights_only=True)["model"]
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(7)
    drawn = torch.get_rng_state()
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            again = api.train([*SHORT, "dir=again"])
            backbone, transform = api.load(again)
            features = backbone(transform(np.zeros((16, 16, 3), np.uint8))[None])
            assert torch.zeros(1).device.type == "meta"
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.equal(torch.get_rng_state(), drawn)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    state = torch.load(next(Path(again).glob("checkpoints/*.pt")), weights_only=True)["model"]
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert all(weight.dtype == torch.float32 for weight in backbone.parameters())
    assert features.device.type == "cpu"


@pytest.mark.slow
def test_a_program_draws_other_numbers_each_time(here: Path) -> None:
    """Where the call is what imports torch, whose switches are then as it has them."""
    drawn = set()
    for name in ("one", "other"):
        words = [*SHORT, "precision=tf32", f"dir={name}"]
        script = f"import ssl_bench; ssl_bench.train({words}); import torch; "
        script += "print(torch.get_float32_matmul_precision(), torch.rand(1).item())"
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        precision, number = said.stdout.splitlines()[-1].split()
        assert precision == "highest"
        drawn.add(number)
    assert len(drawn) == 2


def test_off_the_main_thread(here: Path) -> None:
    ran: list[api.Result] = []
    thread = threading.Thread(target=lambda: ran.append(api.train(SHORT)))
    thread.start()
    thread.join()
    assert ran[0].metrics["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("threaded", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_several_processes_from_a_script(here: Path, threaded: bool) -> None:
    """Not even one that doesn't ask whether it is the main program runs twice."""
    call = f"print(repr(ssl_bench.train({[*SHORT, 'devices=2', 'method.bn_splits=1']!r})))"
    lines = ["import ssl_bench, threading", "print('begun')", f"def go(): {call}"]
    start = "thread = threading.Thread(target=go); thread.start(); thread.join()"
    lines.append(start if threaded else "go()")
    (here / "script.py").write_text("\n".join(lines))
    said = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("begun\nResult(directory="), said.stdout
    assert said.stdout.count("begun") == 1
    assert "on 2 x cpu" in said.stderr


# -- load ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of several modes and sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 40, 31, 3), np.uint8)
    made = {"a.png": Image.fromarray(pixels[0]), "b.png": Image.fromarray(pixels[1, :, :, 0])}
    made |= {"c.png": Image.fromarray(pixels[2, :16, :16]), "d.jpg": Image.fromarray(pixels[3])}
    alpha = Image.fromarray(np.dstack([pixels[0], pixels[1, :, :, :1]]))
    made |= {"e.png": alpha, "f.png": Image.fromarray(pixels[3, ..., 0].astype(np.uint16) * 257)}
    for name, picture in made.items():
        picture.save(folder / name)
    return [folder / name for name in made]


def test_what_is_loaded_sees_what_predict_sees(
    run: api.Result, pictures: list[Path], here: Path
) -> None:
    words = [f"pretrained={run.directory}", f"stage.images={pictures[0].parent}", "device=cpu"]
    predicted = api.train(["stage=predict", *words])
    backbone, transform = api.load(run)
    assert not backbone.training
    shown = transform(pictures)
    expected = np.load(predicted.directory / "features.npy")
    with torch.no_grad():
        torch.testing.assert_close(backbone(shown), torch.from_numpy(expected))
    for path, view in zip(pictures, shown, strict=True):
        assert torch.equal(transform(str(path)), view)
        with Image.open(path) as picture:
            assert torch.equal(transform(picture), view)
            assert torch.equal(transform(picture), view)  # it was read meanwhile


def test_tensors_and_pictures_are_shown_as_the_run_showed_test_images(run: api.Result) -> None:
    _, transform = api.load(run.directory)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    (mean, std) = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # moco_v2's
    expected = EvalView(16, 256 / 224, mean, std)(images)
    assert torch.equal(transform(images), expected)
    assert torch.equal(transform(images[0]), expected[0])
    assert torch.equal(transform(images[0].permute(1, 2, 0).numpy()), expected[0])
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    assert torch.equal(transform(pictures), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(3, 8, 8), r"a tensor float32 \(3, 8, 8\): give a picture"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), r"a tensor uint8 \(2, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"a tensor uint8 \(4, 8, 8\)"),
        (7, "an image of type int: give a picture of PIL's.*; or a path"),
        (np.zeros((3, 8, 8), np.uint8), r"an array uint8 \(3, 8, 8\): give"),
        ("nowhere.png", "nowhere.png: can't be decoded"),
        ([__file__], r"test_api.py: can't be decoded"),
        ([], "no images"),
    ],
)
def test_what_is_no_picture_is_said(run: api.Result, given: object, said: str) -> None:
    _, transform = api.load(run)
    with pytest.raises(api.UserError, match=said):
        transform(given)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("backbone=resnet18,resnet50", "backbone=resnet18,resnet50: give one value; or quote one"),
        ("pretrained_prefix=a,b", "pretrained_prefix=a,b: give one value; or quote one with a com"),
        ("backbone.width=interval(1,2)", "backbone.width=interval(1,2): give one value; or quote"),
        *(
            (word, f"{word} would be ignored: ssl_bench.load reads backbone=, its keys, pretrain")
            for word in (
                "seed=1,2", "epochs=3", "method=simclr", "seed=7", "optimizer.base_lr=3", "runs=x",
                "stage=knn", "stage.image_size=64", "pretrained=x", "hydra/launcher=basic", "-m",
                "+data.new=1", "~schedule", "experiment=quickstart", "zero_init_residual=true",
            )
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("argv", [["x"], ["ipykernel_launcher.py", "-f", "/x/kernel.json"]])
def test_what_load_does_not_take_is_one_line(
    run: api.Result, argv: list[str], word: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the words of the process are, which are none of ours."""
    monkeypatch.setattr("sys.argv", argv)
    before = state()
    with pytest.raises(api.UserError) as told:
        api.load(run, [word])
    assert str(told.value).startswith(said)
    assert "\n" not in str(told.value)
    assert state() == before


def test_weights_that_do_not_say_whose_they_are(run: api.Result, here: Path) -> None:
    from ssl_bench.backbones.resnet import resnet18

    torch.manual_seed(0)
    made = resnet18(width=8, stem="small")
    torch.save(made.state_dict(), "plain.pth")
    with pytest.raises(api.UserError, match="type backbone="):
        api.load("plain.pth")
    options = ["backbone=resnet18", "backbone.width=8", "backbone.stem=small"]
    backbone, transform = api.load("plain.pth", options)
    assert transform.view.image_size == 224
    assert all(map(torch.equal, backbone.state_dict().values(), made.state_dict().values()))
    for wrong, said in (
        (["backbone=resnet81"], "no such choice"),
        ([options[0], "backbone.wdth=8"], "did you mean backbone.width"),
        (["backbone=resnet18"], "of another shape"),
    ):
        with pytest.raises(api.UserError, match=said):
            api.load("plain.pth", wrong)
    with pytest.raises(api.UserError, match="no such file or run directory"):
        api.load("nowhere")
