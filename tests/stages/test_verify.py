"""Numbers that can be checked: a finished run is known by its files' digests, and stage=verify asks
for them all.
"""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import compose
from conftest import TINY, TINY_PRETRAIN

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs import layout, record

ROOT = Path(__file__).parents[2]
CLASSIFY = [
    *TINY,
    "stage=lincls",
    "epochs=1",
    "stage.labels_per_class=10",
    "batch_size=50",
    "optimizer.base_lr=1",
]


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
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run).returncode == 0
    )
    there = {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "environment.json",
        "inputs.json",
        "pretrained.sha256",
    }
    assert there < set(files.listed(run))
    assert {name for name in files.listed(run) if name.startswith("checkpoints/")} == {
        f"checkpoints/{layout.complete(run)[0].name}"
    }


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "environment.json",
        "inputs.json",
        "pretrained.sha256",
    ],
)
def test_a_flipped_bit_makes_no_table(place: Path, name: str) -> None:
    """Wherever it is: not a digit of a result, not one of what it is a result of."""
    path = place / "lincls" / "seed0" / name
    for at in [random.Random(0).random() for _ in range(5)]:
        whole = path.read_bytes()
        flip(path, at)
        with pytest.raises(
            UserError, match=rf"lincls/seed0/{name}.* leave this run out of runs="
        ) as caught:
            record.find([place])
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert len(record.find([place])) == 2


def test_nor_does_the_command_take_it_for_its_result(place: Path) -> None:
    flip(place / "moco" / "seed0" / "summary.json", 0.9)
    with pytest.raises(UserError, match=r"summary\.json: its sha256 is"):
        launch(compose(*TINY_PRETRAIN, "epochs=1", f"dir={place}/moco/seed0"))


def test_other_weights_under_the_same_name(place: Path) -> None:
    """Whole, but not what the run ended with."""
    run = place / "moco" / "seed0"
    newest, older = layout.complete(run)
    shutil.copy(older, newest)
    with pytest.raises(
        UserError, match=rf"{newest.name}: its sha256 is .*: a broken .* pretrained=.*08\.pt"
    ):
        launch(compose(*CLASSIFY, f"pretrained={run}", f"dir={place}/again"))


def test_a_run_that_goes_on_is_unsealed(place: Path) -> None:
    """Without its summary it isn't finished: the same command continues, and seals it again."""
    run = place / "moco" / "seed0"
    (run / "summary.json").unlink()
    launch(compose(*TINY_PRETRAIN, "epochs=1", f"dir={run}"))
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run).returncode == 0
    )


def test_a_run_of_before_is_read(place: Path) -> None:
    for sums in place.rglob("SHA256SUMS"):
        sums.unlink()
    path = place / "moco" / "seed0" / "environment.json"
    # nobody could know
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 1.0'))
    assert {one.stage for one in record.find([place])} == {"pretrain", "lincls"}


# -- stage=verify ----------------------------------------------------------------------------------


def verified(capsys: pytest.CaptureFixture, *words: str) -> tuple[dict, str]:
    """(counts, or the line about what differs; what was printed)."""
    capsys.readouterr()
    try:
        counts = launch(compose("stage=verify", *TINY[:2], *words))
    except UserError as error:
        counts = str(error)
    return counts, capsys.readouterr().out


def test_a_run_is_whole_with_all_that_it_stands_on(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    """Moved, too: what it stands on is found by content."""
    counts, said = verified(capsys, f"runs={place}")
    assert counts["differs"] == 0, said
    assert re.search(r"whole .*lincls/seed0: \d+ files, as SHA256SUMS says", said)
    assert re.search(r"whole .*pretrained=.*: sha256 \w{16}\.\.\., now .*step0000000010\.pt", said)
    assert re.search(r"whole .*images of 'val': 500, fingerprint", said)
    assert re.search(r"whole .*images of 'val', packed in ", said)
    assert re.search(r"whole .*step0000000010\.pt: step 10 of this configuration", said)


def test_what_differs_is_named_and_the_command_fails(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = layout.complete(place / "moco" / "seed0")[0]
    whole = checkpoint.read_bytes()
    for spoil, says in (
        (lambda: flip(checkpoint), r"step0000000010\.pt: its sha256 is"),
        (lambda: flip(place / "lincls/seed0/summary.json"), r"summary\.json: its sha256 is"),
    ):
        spoil()
        words = [f"runs={place}" if "step" in says else f"stage.what={place}"]
        counts, _ = verified(capsys, *words)
        assert re.search(rf"\d+ of \d+ differ: .*{says}", counts), counts
        assert "\n" not in counts
        checkpoint.write_bytes(whole)


def test_a_run_does_it_again(place: Path, capsys: pytest.CaptureFixture) -> None:
    """To the last digit on the same CPU; what was changed since isn't what comes out."""
    run = place / "lincls" / "seed0"
    counts, said = verified(capsys, f"stage.what={run}", f"runs={place}", "stage.rerun=true")
    assert counts["differs"] == 0
    assert re.search(r"whole .*again: the same to the last digit: .*val_top1", said)
    counts, said = verified(
        capsys, f"stage.what={run}", f"runs={place}", "stage.rerun=true", "stage.max_minutes=1e-9"
    )
    assert "it took 0 minutes: type stage.max_minutes=" in said
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"val_top1": summary["val_top1"] + 20}))
    (run / "SHA256SUMS").unlink()  # somebody who knows how
    counts, said = verified(capsys, f"stage.what={run}", f"runs={place}", "stage.rerun=true")
    assert re.search(r"1 of \d+ differ: .*again: val_top1 [\d.]+, was [\d.]+", counts)


def test_a_table_and_the_runs_it_was_made_of(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launch(compose("stage=report", f"runs={place}", "stage.details=0", f"stage.out={tmp_path}/out"))
    table = tmp_path / "out" / "results.json"
    counts, said = verified(capsys, f"stage.what={table}", f"runs={place}")
    assert counts["differs"] == 0
    assert len(re.findall(r"whole .*row .*: the same from its runs, n = 1", said)) == 2
    counts, said = verified(capsys, f"stage.what={table}")
    assert len(re.findall(r"missing .*row .*: 1 of its 1 runs are not among runs=", said)) == 2
    content = json.loads(table.read_text())
    content["rows"][0]["values"]["val_top1"][0] += 1
    table.write_text(json.dumps(content))
    counts, said = verified(capsys, f"stage.what={table}", f"runs={place}")
    assert re.fullmatch(
        r"1 of \d+ differ: .*: row .* of lincls: val_top1 [\d.]+, from its runs [\d.]+", counts
    )


def test_an_export(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = place / "lincls" / "seed0"
    launch(
        compose(
            "stage=export", f"pretrained={run}", f"stage.out={tmp_path}/out", "stage.onnx=false"
        )
    )
    assert verified(capsys, f"stage.what={tmp_path}/out")[0] == {
        "whole": 3,
        "missing": 0,
        "differs": 0,
    }
    flip(tmp_path / "out" / "README.md")
    assert "README.md" in verified(capsys, f"stage.what={tmp_path}/out")[0]


@pytest.mark.parametrize(("document", "tables"), [("README.md", 1), ("docs/results/index.md", 5)])
def test_the_tables_of(document: str, tables: int, capsys: pytest.CaptureFixture) -> None:
    """Each is what its results file gives, to the last digit."""
    counts, said = verified(capsys, f"stage.what={ROOT / document}")
    assert counts["differs"] == 0, said
    assert counts["whole"] >= tables


def test_a_figure_that_was_changed_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    text = (ROOT / "README.md").read_text()
    value = re.search(r"\| simclr +\| +(\d\d\.\d) ±", text)[1]
    (tmp_path / "README.md").write_text(text.replace(value, "99.9", 1))
    counts, _ = verified(capsys, f"stage.what={tmp_path}/README.md")
    assert re.match(
        r"1 of \d+ differ: .*README.md: table of benchmarks/results/quickstart.json: not what the",
        counts,
    )


@pytest.mark.parametrize("what", [None, "nowhere", "empty", "a.txt"])
def test_what_cannot_be_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture, what: str | None
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    said, _ = verified(capsys, *([f"stage.what={tmp_path}/{what}"] if what else []))
    assert said.startswith("stage.what=")
