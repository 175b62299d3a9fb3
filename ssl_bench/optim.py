"""Optimizers, with the learning rate given for a batch of 256 and scaled to the batch at hand."""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from ssl_bench.fields import Fraction

Scaling = Literal["linear", "none"]


def scaled_lr(base_lr: float, batch_size: int, scaling: Scaling) -> float:
    """`linear`: base_lr * batch_size / 256 (Goyal et al., arXiv:1706.02677). batch_size is global."""
    return base_lr * batch_size / 256 if scaling == "linear" else base_lr


def sgd(
    params: Iterable[nn.Parameter],
    batch_size: PositiveInt,
    base_lr: PositiveFloat = 0.03,
    scaling: Scaling = "linear",
    momentum: Fraction = 0.9,
    weight_decay: NonNegativeFloat = 1e-4,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    lr = scaled_lr(base_lr, batch_size, scaling)
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
