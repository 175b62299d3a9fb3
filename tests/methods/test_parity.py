"""What the authors' own programs compute, in float64. Every array of parity.npz is compared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import U, official_weights
from torch import Tensor, nn
from torchvision import models

from ssl_bench.backbones import resnet
from ssl_bench.methods.barlow_twins import cross_correlation_loss
from ssl_bench.methods.byol import regression_loss
from ssl_bench.methods.dino import DINOLoss
from ssl_bench.methods.moco import MoCo, info_nce_logits
from ssl_bench.methods.moco_v3 import contrastive_loss
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.methods.simclr import nt_xent
from ssl_bench.methods.simsiam import negative_cosine
from ssl_bench.methods.swav import sinkhorn, swapped_prediction_loss
from ssl_bench.methods.vicreg import vicreg_loss
from ssl_bench.runs.weights import load_official_moco, official_moco_state_dict
from ssl_bench.training.optim import LARS

REFERENCE = np.load(Path(__file__).with_name("parity.npz"))


def reference(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def close(actual: Tensor, name: str, rtol: float) -> None:
    expected = reference(name).to(actual.dtype)
    torch.testing.assert_close(
        actual.detach().reshape(expected.shape), expected, rtol=rtol, atol=rtol
    )


@pytest.mark.parametrize(
    ("case", "temperature", "mlp"), [("moco_v1", 0.07, False), ("moco_v2", 0.2, True)]
)
def test_moco(case: str, temperature: float, mlp: bool) -> None:
    method = MoCo(
        resnet.resnet18(), 32, 64, momentum=0.99, temperature=temperature, mlp=mlp, bn_splits=1
    ).double()
    theirs = models.resnet18(num_classes=32)
    if mlp:
        theirs.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), theirs.fc)
    weights = official_weights(theirs)
    state = {
        f"module.encoder_{which}.{key}": value for which in "qk" for key, value in weights.items()
    }
    state["module.queue"] = F.normalize(U("queue", 32, 64), dim=0)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    load_official_moco(method, state)

    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.03, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(8):
        views = [U(f"image/{step}/{view}", 16, 3, 32, 32) for view in range(2)]
        if step == 0:
            with torch.no_grad():
                query = F.normalize(method.head(method.backbone(views[0])), dim=1)
                key = F.normalize(method.key_head(method.key_backbone(views[1])), dim=1)
            close(
                info_nce_logits(query, key, method.queue.keys, temperature),
                f"{case}/logits_step0",
                1e-9,
            )
            load_official_moco(method, state)  # that pass moved the running statistics
        loss = method(views)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update((step + 1) / 8)
        losses.append(loss.detach())
    close(torch.stack(losses), f"{case}/loss", 1e-6)
    final = official_moco_state_dict(method)
    names = [
        name
        for name in REFERENCE.files
        if name.startswith(f"{case}/") and "step0" not in name and "loss" not in name
    ]
    assert len(names) == 8
    for name in names:
        key = name.removeprefix(f"{case}/").replace("/", ".")
        close(final[f"module.{key}"], name, 1e-6)


def test_lincls() -> None:
    theirs = models.resnet18(num_classes=10)
    backbone = resnet.resnet18().double()
    weights = official_weights(theirs)
    backbone.load_state_dict(
        {key: value for key, value in weights.items() if not key.startswith("fc.")}
    )
    probe = LinearProbe(backbone, num_classes=10).double().train()
    probe.fc.load_state_dict({"weight": 0.01 * U("fc.weight", 10, 512), "bias": torch.zeros(10)})
    optimizer = torch.optim.SGD(probe.fc.parameters(), lr=1e-4, momentum=0.9)
    losses = []
    for step in range(8):
        labels = torch.floor(10 * (U(f"label/{step}", 16) / 2 + 0.5)).long()
        loss = probe([U(f"image/{step}/0", 16, 3, 32, 32)], labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    close(torch.stack(losses), "lincls/loss", 1e-9)
    close(probe.fc.weight, "lincls/fc.weight", 1e-9)


def embeddings(case: str, *names: str) -> list[Tensor]:
    return [U(f"{case}/{name}", 24, 16).requires_grad_() for name in names]


LOSSES: dict[str, tuple[str, tuple[str, ...], Callable[..., Tensor]]] = {
    "simclr/t0.1": ("simclr", ("z1", "z2"), lambda z1, z2: nt_xent(z1, z2, 0.1)),
    "simclr/t0.5": ("simclr", ("z1", "z2"), lambda z1, z2: nt_xent(z1, z2, 0.5)),
    "byol": ("byol", ("z1", "z2"), regression_loss),  # no gradient to the target
    "simsiam": ("simsiam", ("p1", "p2", "z1", "z2"), negative_cosine),
    "barlow_twins/lambda0.0051": (
        "barlow_twins",
        ("z1", "z2"),
        lambda z1, z2: cross_correlation_loss(z1, z2, 0.0051),
    ),
    "barlow_twins/lambda0.02": (
        "barlow_twins",
        ("z1", "z2"),
        lambda z1, z2: cross_correlation_loss(z1, z2, 0.02),
    ),
    "vicreg": ("vicreg", ("z1", "z2"), lambda z1, z2: vicreg_loss(z1, z2, 25.0, 25.0, 1.0)),
} | {
    f"moco_v3/t{temperature}": (
        "moco_v3",
        ("q1", "q2", "k1", "k2"),
        lambda q1, q2, k1, k2, t=temperature: (
            contrastive_loss(q1, k2, t) + contrastive_loss(q2, k1, t)
        ),
    )
    for temperature in (0.2, 1.0)
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses(case: str) -> None:
    inputs, names, loss = LOSSES[case]
    z = embeddings(inputs, *names)
    value = loss(*z)
    value.backward()
    close(value, f"{case}/loss", 1e-9)
    for i, tensor in enumerate(z, start=1):
        if f"{case}/grad_z{i}" in REFERENCE.files:
            close(tensor.grad, f"{case}/grad_z{i}", 1e-9)


@pytest.mark.parametrize("case", ["swav", "swav_queue"])
def test_swav(case: str) -> None:
    z = embeddings("swav", "z1", "z2")
    prototypes = F.normalize(U("swav/prototypes", 12, 16), dim=1)
    queue = F.normalize(U("swav/queue", 2, 36, 16), dim=2) if case == "swav_queue" else None
    loss = swapped_prediction_loss(
        z, prototypes, temperature=0.1, epsilon=0.05, num_iterations=3, queue=queue
    )
    loss.backward()
    close(loss, f"{case}/loss", 1e-9)
    for i, tensor in enumerate(z):
        close(tensor.grad, f"{case}/grad_z{i + 1}", 1e-9)
        if queue is None:
            codes = sinkhorn(F.normalize(tensor.detach(), dim=1) @ prototypes.T, 0.05, 3)
            close(codes, f"swav/assignments{i}", 1e-9)


def test_dino() -> None:
    criterion = DINOLoss(
        16, 0.04, 0.07, warmup_epochs=2, student_temperature=0.1, center_momentum=0.9
    ).double()
    teacher = U("dino/teacher", 48, 16)
    for epoch, case in ((0, "dino/epoch0"), (3, "dino/epoch3_second_call")):
        student = U("dino/student", 96, 16).requires_grad_()
        criterion.begin(epoch)
        loss = criterion(student, teacher)
        loss.backward()
        criterion.move()
        close(loss, f"{case}/loss", 1e-9)
        close(student.grad, f"{case}/grad_z1", 1e-9)
        if epoch == 0:
            close(criterion.center, "dino/center", 1e-9)


@pytest.mark.parametrize("case", ["barlow_twins", "moco_v3"])
def test_lars(case: str) -> None:
    """The authors write one rule in two ways: neither decay nor adaptation for biases and norms."""
    w, b = (nn.Parameter(U(f"lars/{name}", *shape)) for name, shape in (("w", (8, 6)), ("b", (8,))))
    optimizer = LARS([w, b], lr=0.2, weight_decay=1e-2, momentum=0.9)
    for i in range(5):
        w.grad, b.grad = U(f"lars/gw{i}", 8, 6), U(f"lars/gb{i}", 8)
        optimizer.step()
    close(w, f"lars/{case}/w", 1e-9)
    close(b, f"lars/{case}/b", 1e-9)


def test_nothing_is_forgotten() -> None:
    values = ("loss", "grad_z1", "grad_z2")
    compared = {f"{case}/{value}" for case in (*LOSSES, "swav", "swav_queue") for value in values}
    compared |= {
        "swav/assignments0",
        "swav/assignments1",
        "lincls/loss",
        "lincls/fc.weight",
        "dino/center",
    }
    compared |= {
        f"dino/{call}/{value}" for call in ("epoch0", "epoch3_second_call") for value in values
    }
    compared |= {f"lars/{case}/{name}" for case in ("barlow_twins", "moco_v3") for name in "wb"}
    assert {
        name for name in REFERENCE.files if not name.startswith(("moco_v1/", "moco_v2/"))
    } <= compared
