"""Linear classification from cached features of digits."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_bench.methods.probe import IGNORED, LinearProbe
from ssl_bench.training.optim import clip_

# 1,297 digits, 10 steps an epoch
DIGITS = [
    "stage=lincls",
    "data=digits",
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
]
DIGITS += ["augmentation.flip_p=0", "batch_size=128", "log_every=1", "epochs=2"]
CACHED = [*DIGITS, "stage.features=cached"]


def state(run: Path) -> dict[str, Tensor]:
    return torch.load(max((run / "checkpoints").glob("step*.pt")), weights_only=True)["model"]


class Features(nn.Identity):
    dim = 6


def train(probe: LinearProbe, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Five epochs of batches of 8. A probe of one head is shown only the images whose label isn't
    IGNORED.
    """
    for _ in range(5):
        for features, labels in zip(x.split(8), y.split(8), strict=True):
            keep, share = torch.ones(8, dtype=torch.bool), 1.0
            if labels.ndim == 1:  # its loss is a mean over the images of the batch that it keeps
                keep = labels != IGNORED
                share = keep.double().mean() / (y != IGNORED).double().mean()
            loss = share * probe([features[keep]], labels[keep])["loss"]
            optimizer.zero_grad()
            loss.backward()
            clip_(optimizer)
            optimizer.step()
