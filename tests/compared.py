"""What two trainings left, compared; small networks to compare."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_bench.backbones import resnet
from ssl_bench.methods.moco import MoCo

DERIVED = ("loss", "accuracy", "lr", "grad_norm", "epoch", "images_seen", "val_top1", "val_loss")
DERIVED += ("holdout_top1", "knn_top1", "probe_top1")


def final(run: Path) -> tuple[dict, list[dict]]:
    """The last checkpoint, and what was logged."""
    last = max((run / "checkpoints").glob("step*.pt"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.load(last, weights_only=True), [
        {k: line.get(k) for k in ("step", *DERIVED)} for line in lines
    ]


def assert_identical(one: object, other: object, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_identical(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{path}[{i}]")
    else:
        assert one == other, path


def moco(
    arch: str = "resnet18", seed: int = 0, mlp: bool = True, queue_size: int = 16, **shape
) -> MoCo:
    """A MoCo whose every tensor is its own: running statistics, key encoder and pointer too."""
    torch.manual_seed(seed)
    method = MoCo(getattr(resnet, arch)(**shape), 8, queue_size, mlp=mlp)
    for value in method.state_dict().values():
        if value.is_floating_point():
            value.add_(0.01 * torch.randn_like(value))
        else:
            value.fill_(3 + seed)
    return method


def tiny(seed: int = 0) -> MoCo:
    return moco(seed=seed, stem="small", width=8)


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def features(network: nn.Module) -> Tensor:
    return network.eval()(images())


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
