"""Parts that methods share."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*dims: int) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(dims)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


class Queue(nn.Module):
    """The last `size` keys in a ring, as columns (dim, size). Any number may be put in at once.

    The pointer is a tensor: moving it needs no host sync.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """keys (N, dim); the oldest N make room."""
        size, num = self.keys.shape[1], keys.shape[0]
        slots = (self.pointer + torch.arange(num, device=keys.device)) % size
        newest = slice(max(0, num - size), None)  # of more keys than places, only the last survive
        self.keys.index_copy_(1, slots[newest], keys[newest].T.to(self.keys.dtype))
        self.pointer.add_(num).remainder_(size)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over each of `num_splits` consecutive parts of the batch, as that many GPUs would compute it.

    One device then behaves like several, which MoCo's shuffle needs. Same state as `BatchNorm2d`.
    """

    num_splits: int = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        # Each part moves its own copy of the running statistics; what stays is their mean, as in the authors' code.
        means = self.running_mean.repeat(self.num_splits, 1)
        variances = self.running_var.repeat(self.num_splits, 1)
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.num_splits), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batch_norm_(module: nn.Module, num_splits: int) -> None:
    """Turn every BatchNorm2d inside `module` into a split one, in place. Parameters and buffers stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SplitBatchNorm2d
            child.num_splits = num_splits
