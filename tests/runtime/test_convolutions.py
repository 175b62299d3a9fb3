"""Convolutions that torch computes beyond its memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from ssl_bench.backbones.resnet import resnet18, resnet50
from ssl_bench.errors import UserError
from ssl_bench.runtime.convolutions import guard_
from ssl_bench.stages._training import compile_

# As the stages do; on a CPU with AVX2 alone its allocator ended this process.
STEPS = """
from types import SimpleNamespace
import torch
from ssl_bench.backbones.resnet import resnet18
from ssl_bench.stages._training import on_device
run = SimpleNamespace(device=torch.device("cpu"))
network = on_device(resnet18(stem="small", width={width}), run)
images = torch.randn(128, 3, 16, 16).contiguous(memory_format=torch.channels_last)
for _ in range(6):
    network(images).sum().backward()
assert all(weight.grad.isfinite().all() for weight in network.parameters())
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 4])
def test_a_narrow_network_learns_within_its_memory(width: int) -> None:
    code = STEPS.format(width=width)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_computes_the_same() -> None:
    torch.manual_seed(0)
    network = resnet18(stem="small", width=4).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = network.eval()(images)
    network = network.to(memory_format=torch.channels_last)
    guard_(network)
    found = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("network", "guarded"),
    [
        (resnet18(width=4), 1),
        (resnet18(width=2), 2),
        (resnet18(width=8), 0),
        (resnet50(width=4), 0),
        (nn.Conv2d(4, 8, 1), 0),
        (nn.Conv2d(8, 16, 1, stride=2, groups=2), 1),
    ],
)
def test_only_what_needs_it_is_changed(network: nn.Module, guarded: int) -> None:
    guard_(network)
    assert sum(len(layer._forward_pre_hooks) for layer in network.modules()) == guarded


def test_it_is_not_compiled() -> None:
    with pytest.raises(
        UserError, match=r"compile=true: .*type compile=false, or backbone\.width=8"
    ):
        compile_(resnet18(width=4), torch.device("cpu"))
