"""Numbers that can be checked: a finished run is known by its files' digests, and stage=verify asks for them all."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import TINY, TINY_PRETRAIN
from test_config import compose

from ssl_bench import files, results
from ssl_bench.errors import UserError
from ssl_bench.launch import launch

CLASSIFY = [*TINY, "stage=lincls", "epochs=1", "stage.labels_per_class=10", "batch_size=50", "optimizer.base_lr=1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """moco/seed0, and lincls/seed0 on it, as the commands leave them."""
    folder = tmp_path_factory.mktemp("ran")
    launch(compose(*TINY_PRETRAIN, "epochs=1", f"dir={folder}/moco/seed0"))
    launch(compose(*CLASSIFY, f"pretrained={folder}/moco/seed0", f"dir={folder}/lincls/seed0"))
    return folder


@pytest.fixture
def place(ran: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ran, tmp_path / "runs")


def flip(path: Path, at: float = 0.5) -> None:
    whole = bytearray(path.read_bytes())
    whole[int(at * len(whole))] ^= 1
    path.write_bytes(whole)


def test_sha256sum_knows_a_finished_run(ran: Path) -> None:
    run = ran / "lincls" / "seed0"
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run).returncode == 0
    there = {"config.yaml", "metrics.jsonl", "summary.json", "environment.json", "inputs.json", "pretrained.sha256"}
    assert there < set(files.listed(run))
    assert {name for name in files.listed(run) if name.startswith("checkpoints/")} == {
        f"checkpoints/{files.complete(run)[0].name}"
    }


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "summary.json", "environment.json", "inputs.json", "pretrained.sha256"]
)
def test_a_flipped_bit_makes_no_table(place: Path, name: str) -> None:
    """Wherever it is: not a digit of a result, not one of what it is a result of."""
    path = place / "lincls" / "seed0" / name
    for at in [random.Random(0).random() for _ in range(5)]:
        whole = path.read_bytes()
        flip(path, at)
        with pytest.raises(UserError, match=rf"lincls/seed0/{name}.* leave this run out of runs=") as caught:
            results.find([place])
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert len(results.find([place])) == 2


def test_nor_does_the_command_take_it_for_its_result(place: Path) -> None:
    flip(place / "moco" / "seed0" / "summary.json", 0.9)
    with pytest.raises(UserError, match=r"summary\.json: its sha256 is"):
        launch(compose(*TINY_PRETRAIN, "epochs=1", f"dir={place}/moco/seed0"))


def test_other_weights_under_the_same_name(place: Path) -> None:
    """Whole, but not what the run ended with."""
    run = place / "moco" / "seed0"
    newest, older = files.complete(run)
    shutil.copy(older, newest)
    with pytest.raises(UserError, match=rf"{newest.name}: its sha256 is .*SHA256SUMS says: a broken or another file"):
        launch(compose(*CLASSIFY, f"pretrained={run}", f"dir={place}/again"))


def test_a_run_that_goes_on_is_unsealed(place: Path) -> None:
    """Without its summary it isn't finished: the same command continues, and seals it again."""
    run = place / "moco" / "seed0"
    (run / "summary.json").unlink()
    launch(compose(*TINY_PRETRAIN, "epochs=1", f"dir={run}"))
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run).returncode == 0


def test_a_run_of_before_is_read(place: Path) -> None:
    for sums in place.rglob("SHA256SUMS"):
        sums.unlink()
    path = place / "moco" / "seed0" / "environment.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 1.0'))  # nobody could know
    assert {one.stage for one in results.find([place])} == {"pretrain", "lincls"}
