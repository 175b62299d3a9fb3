"""benchmarks/ run and measure what they say."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import compose
from torch import nn

from ssl_bench.config import build
from ssl_bench.data.formats.digits import Digits

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SPEED.parent)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_quick(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SPEED),
        "--quick",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    # a busy machine would slow down more threads a hundred times
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed_cpu.json").read_text())

    (row,) = result["contenders"]["rows"]
    assert {len(repeats) for repeats in row["repeats"].values()} == {2}
    rates = {name: found["median"] for name, found in row["images_per_second"].items()}
    assert row["ratio"]["plain"] == pytest.approx(rates["ours"] / rates["plain"])
    # from outside, and as the program has it
    for found in (*row["repeats"]["ours"], *result["by_batch"]):
        inside, outside = found["logged_images_per_second"], found["images_per_second"]
        if isinstance(outside, dict):
            inside, outside = max(inside), outside["max"]
        assert inside == pytest.approx(outside, rel=0.3)

    (step,) = result["parts"]
    flops = step["flops"]
    assert flops["forward, query"] == flops["forward, key"] > 0
    assert 1.5 < flops["backward"] / flops["forward, query"] < 2.1
    assert flops["EMA of the key encoder"] == flops["augment two views"] == flops["SGD"] == 0
    assert all(seconds > 0 for seconds in step["seconds"].values())
    assert [row["images"] for row in result["by_size"]] == [4200, 5000]
    assert "| resnet18, batch 16 |" in (tmp_path / "speed_cpu.md").read_text()
    assert (tmp_path / "speed_cpu.png").stat().st_size > 10_000
    assert "aten::mm" in (tmp_path / "profile_cpu.txt").read_text()


def test_a_step_of_the_program_is_timed_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for a run has all that the loop asks of one."""
    parts = imported("parts", monkeypatch)
    cfg = compose(
        "stage=pretrain", "method=moco_v2", "data=digits", "data.image_size=16", "backbone.width=8",
        "backbone.stem=small", "method.queue_size=256", "batch_size=32", "dir=none", "device=cpu",
    )  # fmt: skip
    window = parts.Window(torch.device("cpu"), 1, 2, time.perf_counter)
    parts.pretrain(cfg, window)
    assert window.totals.keys() == {*parts.PARTS}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported("accuracy", monkeypatch)
    monkeypatch.setattr(module, "COUNTS", {"num_unlabeled": 100, "num_train": 200, "num_val": 40})
    small = [
        "epochs=1",
        "schedule.warmup_epochs=0",
        "stage.seeds=[0]",
        "method.queue_size=64",
        "batch_size=20",
        "backbone.width=8",
    ]
    monkeypatch.setattr(module, "COMMON", ["experiment=synthetic_dl21", *small])
    monkeypatch.setattr(
        sys, "argv", ["", "--folder", str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "out")]
    )
    module.main()
    assert json.loads((tmp_path / "out").read_text())["rows"].keys() == {
        *module.ROWS,
        "random init",
    }
    ran = [
        yaml.safe_load(path.read_text())
        for path in sorted(tmp_path.glob("*seed0/pretrain/config.yaml"))
    ]
    assert [config["precision"] for config in ran] == ["bf16", "fp32"]
    assert [config["augmentation"]["_target_"].startswith("accuracy") for config in ran] == [
        False,
        True,
    ]


def test_choices_at_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = imported("selection", monkeypatch)
    monkeypatch.setitem(module.SCALE, "dim", 64)
    for name, count, seed in (("unlabelled", 2000, 1), ("labelled", 100, 2)):
        module.simulate(tmp_path / f"{name}.npy", count, 64, seed, classes=20, latent=8)
    stored = np.load(tmp_path / "unlabelled.npy")
    assert (stored.shape, stored.dtype, stored.min()) == ((2000, 64), np.float16, 0)
    for strategy in module.STRATEGIES[1:]:
        module.choose(tmp_path, strategy, budget=50)  # asserts that they are 50
        found = json.loads(capsys.readouterr().out)
        assert found["seconds"].keys() == {"projection", "choice"}


def test_a_long_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes' images, the label that is known, and those that the annotator knows."""
    module = imported("selection", monkeypatch)
    subject = module.SUBJECTS["digits"]
    root = module.pool(tmp_path, subject, seed=3)
    labels = {
        name: torch.load(root / f"{name}_label_tensor.pt") for name in ("train", "unlabeled", "val")
    }
    counts = labels["unlabeled"].bincount()
    assert (counts[0], counts[9]) == (subject.most / subject.ratio, subject.most)
    assert counts.tolist() == sorted(counts.tolist())
    assert labels["train"].tolist() == [9]
    assert labels["val"].bincount().tolist() == [subject.num_val // 10] * 10
    assert len(list((root / "unlabeled").iterdir())) == len(labels["unlabeled"])


def test_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported("digests", monkeypatch)
    monkeypatch.setattr(module, "TIMES", 1)
    sizes = ["--checkpoint-gb", "0.001", "--store-gb", "0.001"]
    monkeypatch.setattr(
        sys, "argv", ["", *sizes, "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    module.main()
    found = json.loads((tmp_path / "out").read_text())
    for part in ("checkpoint", "store"):
        assert found[part]["seconds without"].keys() <= found[part]["seconds"].keys()
        assert not (tmp_path / part).exists()


@pytest.mark.slow
def test_the_speedrun_writes_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record composes, is packed before it is timed, and stands in the table."""
    module = imported("speedrun", monkeypatch)
    asked = []

    def timed(words: list[str], folder: Path) -> dict:
        if "seed=0" in words:
            variables, overrides = module.variables_of(words)
            assert variables in ([], ["OMP_NUM_THREADS=1"])
            build.check(compose("experiment=speedrun", *overrides))
        assert any((folder / "cache").glob("digits-*"))
        asked.append(words)
        return {"seconds": 20.0 + len(asked), "cpu_seconds": 30.0, "top1": 91.0, "draws": [91.0]}

    monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr(module, "machine", lambda: {"git_commit": "0" * 40, "cpus": 2, "cpu": "x"})
    monkeypatch.setattr(module, "ABLATIONS", dict([*module.ABLATIONS.items()][:2]))
    words = ["--records", "all", "--seeds", "0", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["", *words])
    module.main()
    page = (tmp_path / "speedrun.md").read_text()
    assert all(f"| {number} | {what} |" in page for number, (what, _) in module.RECORDS.items())
    assert "| 21.5 (21.0 to 22.0) | 91.0 (91.0 to 91.0) |" in page
    monkeypatch.setattr(sys, "argv", ["", "--ablations", "--seeds", "0", "--out", str(tmp_path)])
    module.main()
    assert len(asked) == 2 * len(module.RECORDS) + len(module.ABLATIONS)
    assert "data._target_=speedrun.HeldOut" in asked[-1]
    assert json.loads((tmp_path / "speedrun.json").read_text()).keys() == {"records", "ablations"}


def test_the_speedrun_is_tuned_without_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = imported("speedrun", monkeypatch)
    data, whole = module.HeldOut(8, cache=str(tmp_path)), Digits(8, cache=str(tmp_path))
    learnt, measured, train = (
        np.asarray(one.open(split).images)
        for one, split in ((data, "pretrain"), (data, "val"), (whole, "train"))
    )
    assert (len(learnt), len(measured)) == (1000, 297)
    assert np.array_equal(np.concatenate([learnt, measured]), train)


def test_stacked_seeds_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported("stacked", monkeypatch)
    for network in module.NETWORKS.values():
        seeds = module.Seeds(network, 2, torch.device("cpu"))
        views = torch.rand(2, 2, 8, 3, module.SIZE, module.SIZE)
        for way in module.WAYS.values():
            for _ in range(2):  # after one the seeds' weights differ
                getattr(seeds, way)(*views)
        before = dict(seeds.skeleton.named_parameters())
        for seed, model in enumerate(seeds.models):
            for name, weight in model.named_parameters():
                torch.testing.assert_close(seeds.weights[name][seed], weight, rtol=1e-4, atol=1e-6)
            assert not torch.equal(weight, before[name])


def test_what_was_tried_on_a_cpu_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One turn of one change, of a small network in place of ResNet-50."""
    module = imported("tried_cpu", monkeypatch)
    monkeypatch.setattr(nn.Conv2d, "forward", nn.Conv2d.forward)  # is changed, and given back
    small = ["backbone.width=8", "data.num_unlabeled=128", "method.queue_size=128"]
    small += ["precision=fp32"]  # a CPU that has to emulate bfloat16 would take ten minutes
    monkeypatch.setattr(module, "WORDS", (*module.WORDS, *small))
    name = "1x1 convolutions as matrix products"
    found = module.measure(name, 1, 3, str(tmp_path))
    assert found["images_per_second"] > 0
    assert found["of_floor"] > 0
    layer, x = nn.Conv2d(8, 4, 1), torch.randn(2, 8, 5, 5)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert f"| {name} |" in module.table({"turns": {name: [found]}})


def test_onset_and_announcement_of_a_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spread halves at step 50 and goes on falling; a dip of ten steps is no onset."""
    module = imported("collapse", monkeypatch)

    def line(step: int, std: float) -> dict[str, float]:
        told = {"step": step, "epoch": step / 40, "loss": 5 - step / 100}
        return told | {"embedding_std": std, "effective_rank": 20.0}

    falling = [1.0] * 20 + [0.45] * 10 + [1.0] * 19 + [0.99**n / 2.01 for n in range(71)]
    lines = [line(step, std) for step, std in enumerate(falling, start=1)]
    assert module.onset(lines) == 50
    # 0.3 is reached at step 101; who looks at the one before it looks again 19 steps later
    assert lines[99]["embedding_std"] > 0.3 > lines[100]["embedding_std"]
    assert module.announced(lines) == 120
    assert module.onset(lines[:60]) is None
    assert module.announced(lines[:60]) is None


def test_what_is_written_of_collapses_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported("collapse", monkeypatch)
    results = json.loads(module.RESULTS.read_text())
    assert results["collapsing"].keys() == module.COLLAPSING.keys()
    steps = {name: row["steps"] for name, row in results["collapsing"].items()}
    early = {module.COLLAPSING[name][0] for name in steps if steps[name] and steps[name] <= 50}
    assert len(early) >= 8
    assert not [name for name, row in results["healthy"].items() if row["warned"]]
    assert module.RESULTS.with_suffix(".md").read_text() == module.tables(results)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_collapse_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported("collapse", monkeypatch)
    found = module.collapse("MoCo v2, rate x 2,500", 1)
    assert 0 <= found["steps"] <= 50
    assert module.healthy("bench_synthetic", "simclr", 6)["warned"] == []


@pytest.mark.parametrize("name", ["choice_moco_v2", "choice_bench"])
def test_what_is_written_of_choices_holds(name: str) -> None:
    """Rho and regret of each criterion in docs/results/choice.md are those of the results file."""
    root = SPEED.parents[1]
    text = (root / "docs/results/choice.md").read_text()
    content = json.loads((root / f"benchmarks/results/{name}.json").read_text())
    for row in content["evidence"]["lincls val_top1"]:
        cells = [f"`{row['criterion']}`" if "rhos" in row else row["criterion"]]
        for key, form in (("rhos", ".2f"), ("regrets", ".1f")):
            values = row.get(key, [])
            shown = f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}" if values else ""
            cells.append(shown)
        line = r"\| " + r" +\| +".join(map(re.escape, cells)) + r" +\|"
        assert re.search(line, text), cells
