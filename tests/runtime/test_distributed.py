"""Two real processes against one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Command
from processes import in_processes, on_ranks
from torch import Tensor, nn

from ssl_bench.backbones import resnet
from ssl_bench.data.source import HostSource
from ssl_bench.evaluate.features import extract_all
from ssl_bench.methods.moco import MoCo
from ssl_bench.runtime import distributed

STEPS, BATCH = 4, 8


def freeze_batch_norm(method: MoCo) -> None:
    """Batch norm by running statistics alone: what one process computes doesn't depend on the
    others' images.
    """
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, self=module: self


def train(method: MoCo, rank: int, size: int) -> dict[str, Tensor]:
    """A few steps on this rank's part of fixed global batches."""
    device = torch.device("cpu")
    method.double().train()
    parallel = distributed.data_parallel(method, device)
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = [
            torch.rand(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)
        ]
        torch.manual_seed(100 * step)  # the shuffle of the keys, drawn by rank 0
        loss = parallel([view.chunk(size)[rank] for view in views])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(distributed.mean(loss.detach()))
    return {
        "loss": torch.stack(losses),
        "queue": method.queue.keys,
        "pointer": method.queue.pointer,
        "conv1": method.backbone.conv1.weight.detach(),
        "key_conv1": method.key_backbone.conv1.weight,
    }


def build(bn_splits: int) -> MoCo:
    torch.manual_seed(0)
    return MoCo(
        resnet.resnet18(stem="small", width=8), 16, 20, momentum=0.9, mlp=True, bn_splits=bn_splits
    )


def frozen(rank: int, size: int) -> dict[str, Tensor]:
    method = build(1)
    freeze_batch_norm(method)
    return train(method, rank, size)


def split(rank: int, size: int) -> dict[str, Tensor]:
    return train(build(2 // size), rank, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", [frozen, split], ids=["frozen batch norm", "batch norm of each process"]
)
def test_two_processes_equal_one(job: Callable, tmp_path: Path) -> None:
    """`split`: one device with bn_splits=2 computes what two devices compute, shuffle and all."""
    one = job(0, 1)
    first, second = in_processes(job, tmp_path)
    for name in ("queue", "pointer", "conv1", "key_conv1"):
        assert torch.equal(first[name], second[name]), name  # ranks never drift apart
    for name in one:
        torch.testing.assert_close(first[name], one[name], rtol=1e-9, atol=1e-9)


def gathered(rank: int, size: int) -> dict[str, Tensor]:
    mine = torch.arange(3) + 10 * rank
    return {
        "gather": distributed.all_gather(mine),
        "broadcast": distributed.broadcast(mine.clone()),
        "total": distributed.total(mine),
        "any": torch.tensor(distributed.any_rank(rank == 1)),
    }


@pytest.mark.slow
def test_collectives(tmp_path: Path) -> None:
    for result in in_processes(gathered, tmp_path):
        assert result["gather"].tolist() == [0, 1, 2, 10, 11, 12]
        assert result["broadcast"].tolist() == [0, 1, 2]
        assert result["total"].tolist() == [10, 12, 14]
        assert result["any"]


class Flat(nn.Flatten):
    dim = 12


def few(rank: int, size: int) -> dict[str, Tensor]:
    images, rows = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3), np.arange(1)
    source = HostSource(images, rows, rows, size, 0, "cpu", rank, size)
    run = SimpleNamespace(device=torch.device("cpu"))
    return {"features": extract_all("fp32", run, Flat(), source, lambda images, _: images.float())}


@pytest.mark.slow
def test_a_rank_without_images(tmp_path: Path) -> None:
    for result in in_processes(few, tmp_path):
        assert sorted(result["features"].flatten().tolist()) == list(range(12))


def test_slurm_tasks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.launched() is None
    monkeypatch.setenv("SLURM_NTASKS", "2")  # a batch script of a job with two tasks is one process
    assert distributed.launched() is None
    for key, value in {"STEP_NUM_TASKS": 4, "STEP_NUM_NODES": 2, "PROCID": 3, "LOCALID": 1}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    assert distributed.launched() == distributed.World(rank=3, local_rank=1, size=4, local_size=2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[03-04,07],login", "gpu03"),
        ("r1i[0-1]n[2-5]", "r1i0n2"),
        ("cn[01-02]-ib", "cn01-ib"),
    ],
)
def test_rank_0_is_on_the_first_node(nodes: str, first: str) -> None:
    assert distributed.first_node(nodes) == first


@pytest.mark.parametrize("job", [11_999, 12_000, 4_000_000_000])
def test_the_port_is_not_one_that_the_system_gives_away(
    monkeypatch: pytest.MonkeyPatch, job: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[1-2]")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # set in the test, it goes with it
    distributed.find_rank_0()
    assert os.environ["MASTER_ADDR"] == "gpu1"
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 32_768


@pytest.mark.slow
def test_features_standardised_by_two_processes(ssl_bench: Command, tmp_path: Path) -> None:
    """By the statistics of the whole batch; every process evaluates the network that is saved."""
    command = [
        "stage=lincls",
        "stage.normalize=true",
        "data=digits",
        "data.image_size=16",
        "backbone=pixels",
    ]
    command += ["augmentation=none", "optimizer.base_lr=0.1", "batch_size=128", "epochs=3"]
    ssl_bench(*command, "dir=one", check=True)
    on_ranks([*command, "devices=2", "dir=two"], tmp_path)
    losses = [
        json.loads((tmp_path / name / "summary.json").read_text())["val_loss"]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
