"""What the authors' own programs compute (facebookresearch/moco at 132aea9), in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import U, official_weights
from torch import Tensor, nn
from torchvision import models

from ssl_bench import backbones
from ssl_bench.interop import load_official_moco, official_moco_state_dict
from ssl_bench.methods.moco import MoCo, info_nce_logits
from ssl_bench.probe import LinearProbe

REFERENCE = np.load(Path(__file__).with_name("parity.npz"))


def reference(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def close(actual: Tensor, name: str, rtol: float) -> None:
    expected = reference(name).to(actual.dtype)
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("case", "temperature", "mlp"), [("moco_v1", 0.07, False), ("moco_v2", 0.2, True)])
def test_moco(case: str, temperature: float, mlp: bool) -> None:
    method = MoCo(backbones.resnet18(), 32, 64, momentum=0.99, temperature=temperature, mlp=mlp).double()
    theirs = models.resnet18(num_classes=32)
    if mlp:
        theirs.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), theirs.fc)
    weights = official_weights(theirs)
    state = {f"module.encoder_{which}.{key}": value for which in "qk" for key, value in weights.items()}
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
            close(info_nce_logits(query, key, method.queue.keys, temperature), f"{case}/logits_step0", 1e-9)
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
        name for name in REFERENCE.files if name.startswith(f"{case}/") and "step0" not in name and "loss" not in name
    ]
    assert len(names) == 8
    for name in names:
        key = name.removeprefix(f"{case}/").replace("/", ".")
        close(final[f"module.{key}"], name, 1e-6)


def test_lincls() -> None:
    theirs = models.resnet18(num_classes=10)
    backbone = backbones.resnet18().double()
    weights = official_weights(theirs)
    backbone.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
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
