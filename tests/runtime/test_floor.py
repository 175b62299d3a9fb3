"""Model FLOPs utilization: what is counted, and what counting leaves alone."""

import json
from pathlib import Path

import pytest
import torch
from small_methods import TwoLayers, drawn, make, num_views, overrides, views_of

import ssl_bench
from ssl_bench.methods.base import digest
from ssl_bench.runtime import floor
from ssl_bench.training import engine


def test_the_operations_of_a_step_are_those_of_its_products() -> None:
    class Product(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(x).sum()}

    images = torch.rand(8, 16, requires_grad=True)
    # forward, and backward for the weights; inputs of a network need no gradient
    assert floor.step_flops(Product(16, 4), (images.detach(),)) == 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize("name", ["moco_v2", "simclr", "byol", "mae"])
def test_counting_changes_nothing(name: str) -> None:
    method = make(name, TwoLayers, depth=1).train()
    views = views_of(name, 16)[: num_views(name)]
    arguments = (views, torch.zeros(16, dtype=torch.long), *drawn(method, 16))
    before, state = digest(method), torch.get_rng_state()
    assert (floor.step_flops(method, arguments) or 0) > 1e5
    assert digest(method) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in method.parameters())
    method(*arguments)["loss"].backward()  # what forward keeps is that of a real step again


def test_a_method_that_looks_at_numbers_is_not_counted() -> None:
    class Looks(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(x).sum() * x.sum().item()}

    assert floor.step_flops(Looks(2, 2), (torch.rand(2, 2),)) is None


def test_the_rate_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations for each of N**3 pairs of numbers, in the least of the times."""
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(floor.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setitem(floor.SIDES, "cpu", 8)
    device = torch.device("cpu")
    assert floor.matmul_rate.__wrapped__(device, "fp32") == 2 * 8**3 / 2
    assert floor.matmul_rate.__wrapped__(torch.device("meta"), "fp32") is None


def test_a_run_says_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "COUNTED", 2)
    monkeypatch.setattr(floor, "matmul_rate", lambda device, precision: 1e12)
    words = overrides("simclr", "epochs=1", "eval_every=0", f"dir={tmp_path}/run")
    ssl_bench.train([word for word in words if not word.startswith("augmentation.small_size")])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    shares = [line["mfu"] / line["images_per_second"] for line in lines]
    assert shares == pytest.approx([shares[0]] * len(lines))
    assert 1e-6 < shares[0] < 1e-4  # MFLOPs an image over a TFLOP/s
