"""What only a GPU can show. `pytest tests/runtime/test_cuda.py` on a machine that has one; skipped
elsewhere.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_PRETRAIN, Command
from photographs import write
from small_methods import LEARNING, differing, learnt

from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import Views
from ssl_bench.data.cutting import CutSource
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.source import HostSource, ResidentSource

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def packed(num: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num, 32, 32, 3), np.uint8), np.arange(num), np.arange(num)


@pytest.mark.parametrize("compiled", [False, True])
def test_views_are_those_of_the_cpu(compiled: bool) -> None:
    views = Views(24, solarize_p=0.3)
    images = torch.from_numpy(packed()[0]).permute(0, 3, 1, 2)
    drawn = keys(0, 0, torch.arange(40))
    expected = views(images, drawn)
    views.to("cuda")
    if compiled:
        views.compile_transforms()
    for one, two in zip(expected, views(images.cuda(), drawn.cuda()), strict=True):
        # a pixel at a threshold may fall to the other side of it
        assert ((one - two.cpu()).abs() < 1e-3).float().mean() > 0.999


@pytest.mark.parametrize("kind", [HostSource, ResidentSource])
def test_batches_are_those_of_the_cpu(kind: type) -> None:
    expected = HostSource(*packed(), 8, 0).stream(0, 12)
    for one, two in zip(expected, kind(*packed(), 8, 0, "cuda").stream(0, 12), strict=True):
        assert one[0] == two[0]
        assert two[1].is_contiguous(memory_format=torch.channels_last)
        for here, there in zip(one[1:], two[1:], strict=True):
            assert there.is_cuda
            assert torch.equal(here, there.cpu())


def test_a_batch_is_not_overwritten_while_it_is_used() -> None:
    """The copy runs ahead on a stream of its own."""
    sums = []
    for _, images, _, _ in HostSource(*packed(4000), 400, 0, "cuda").stream(0, 30):
        torch.cuda._sleep(20_000_000)  # cycles: the step is far behind the copies
        sums.append(images.long().sum())
    expected = [
        images.long().sum().item()
        for _, images, _, _ in HostSource(*packed(4000), 400, 0).stream(0, 30)
    ]
    assert torch.stack(sums).tolist() == expected


def test_views_of_photographs_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Cut on the host, copied while the device works, coloured there."""
    write(tmp_path / "images", count=6)
    data = Folder(str(tmp_path / "images"), cache=str(tmp_path / "cache"))
    store, views = data.open_encoded("pretrain", packed=True), Views(32)
    expected = list(CutSource(store, views, 8, 0).stream(0, 12))
    batches = []
    for step, cut, _, indices in CutSource(store, views, 8, 0, "cuda").stream(0, 12):
        torch.cuda._sleep(20_000_000)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in cut)
        batches.append((step, [view.clone() for view in cut], indices.clone()))
    for (step, cut, _, indices), (there, copied, where) in zip(expected, batches, strict=True):
        assert (step, indices.tolist()) == (there, where.tolist())
        for one, two in zip(cut, copied, strict=True):
            assert torch.equal(one, two.cpu())


def logged(ssl_bench: Command, tmp_path: Path, *overrides: str) -> list[dict]:
    """The lines of a tiny run, which sees the same views in the same order on every device."""
    ssl_bench(*TINY_PRETRAIN, "dir=run", *overrides, check=True)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    shutil.rmtree(tmp_path / "run")
    return lines


@pytest.mark.parametrize("source", ["host", "resident"])
@pytest.mark.parametrize(
    ("precision", "loss", "norm"),
    [("fp32", 1e-3, 1e-2), ("tf32", 1e-2, 0.1), ("bf16", 2e-2, 0.2), ("fp16", 1e-2, 0.1)],
)
def test_a_run_is_that_of_the_cpu(
    ssl_bench: Command, tmp_path: Path, precision: str, loss: float, norm: float, source: str
) -> None:
    """At the first step within what the precision allows (relative); later steps drift apart, but
    not far.
    """
    here = logged(ssl_bench, tmp_path, "device=cpu")
    there = logged(ssl_bench, tmp_path, "device=cuda", f"precision={precision}", f"source={source}")
    assert there[0]["loss"] == pytest.approx(here[0]["loss"], rel=loss)
    assert there[0]["grad_norm"] == pytest.approx(here[0]["grad_norm"], rel=norm)
    assert there[-1]["loss"] == pytest.approx(here[-1]["loss"], rel=0.02)


def test_the_compiled_run_is_the_eager_one(ssl_bench: Command, tmp_path: Path) -> None:
    eager, compiled = (
        logged(ssl_bench, tmp_path, "device=cuda", f"compile={word}")[0]
        for word in ("false", "true")
    )
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("name", LEARNING)
def test_graphs_learn_what_eager_does(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two steps to warm up and to record, then two that are replayed."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    found, expected = (learnt(name, compiled, "cuda", num_steps=4) for compiled in (True, False))
    assert differing(found, expected) == set()


def test_no_step_waits_for_the_gpu(tmp_path: Path) -> None:
    """A step between two log lines makes no host sync."""
    from torch.nn import Linear

    from ssl_bench.methods.moco import MoCo

    class Backbone(torch.nn.Sequential):
        dim = 8

    model = MoCo(Backbone(torch.nn.Flatten(), Linear(3 * 24 * 24, 8)), queue_size=64).cuda()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True
    )
    views = Views(24).cuda()
    source = ResidentSource(*packed(), 8, 0, "cuda").stream(0, 6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, images, _, indices in source:
            loss = model(views(images, keys(0, step, indices)))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
