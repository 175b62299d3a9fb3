"""What a method is: a module that turns views into a loss."""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from types import MethodType

import torch
from torch import Tensor, nn

# "loss" is required. "embeddings" (V, N, D), detached, of V views of each image are what the loop
# judges the health of training by (evaluators.health). Every other entry is a scalar worth a chart.
Output = dict[str, Tensor]


class Method(nn.Module):
    """A plain module: no loop, no device, no configuration. The linear probe is one too."""

    num_views: int = 2  # of full size
    takes_small_views: bool = False  # any number of them after the others (multi-crop)
    split: str = "pretrain"  # the images it learns from
    learns: bool = True
    bn_splits: int = 1  # in so many parts its batch norm sees the batch of a process

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone  # what pretraining exports and lincls loads

    def param_groups(self) -> list[dict]:
        """What the optimizer trains. Keys that the loop knows beside those of the optimizer:

        constant_lr: the schedule leaves the rate alone. frozen_epochs: no gradient before this
        epoch.
        """
        return [
            {"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}
        ]

    def check(self, num_images: int, local_batch: int) -> None:
        """UserError if it can't learn from so many images, or in such batches on each process.

        Called before any image is read.
        """

    def begin(self, epoch: float, epochs: int) -> None:
        """Called before each step: at `epoch` (a fraction inside an epoch) of `epochs`."""

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """`num_views` batches (N, 3, H, W), labels (N,) int64 where the method uses them."""
        raise NotImplementedError

    def update(self, progress: float) -> None:
        """Called after `optimizer.step()` with the share of training done, 0 < progress <= 1."""


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that only `ema_` changes, and in which nothing is random: it has no dropout, no drop
    path.

    In train mode only what has running statistics learns: batch norm uses those of the batch, as
    the original.
    """
    copied = copy.deepcopy(module).requires_grad_(False)
    copied.train = MethodType(_train_statistics, copied)
    return copied.train(module.training)


def _train_statistics(module: nn.Module, mode: bool = True) -> nn.Module:
    """`module.train`. Whatever is random in a network, as a layer or inside of one, asks for its
    `training`.
    """
    type(module).train(module, mode)
    for child in module.modules():
        if not any(name.startswith("running_") for name in child._buffers):
            child.training = False
    return module


@torch.no_grad()
def ema_(target: Iterable[nn.Module], source: Iterable[nn.Module], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * source, for parameters; buffers are the copy's
    own.
    """
    theirs = [p for module in source for p in module.parameters()]
    ours = [p for module in target for p in module.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def rising(momentum: float, progress: float) -> float:
    """From `momentum` to 1 along half a cosine (BYOL, arXiv:2006.07733, section 3.3)."""
    return 1 - (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2


def by_size(network: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """V views (N, 3, H, W) -> (V * N, D), view after view; one pass for all of a size, as
    multi-crop's authors do.
    """
    return torch.cat(
        [
            network(torch.cat(list(group)))
            for _, group in groupby(views, key=lambda view: view.shape[-2:])
        ]
    )


def health_of(*embeddings: Tensor) -> Tensor:
    """The entry "embeddings" of an Output: V x (N, D) -> (V, N, D)."""
    return torch.stack([x.detach() for x in embeddings])
