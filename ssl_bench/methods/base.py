"""What a method is: a module that turns views into a loss."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Output = dict[str, Tensor]  # "loss" is required; every other entry is a scalar worth a chart


class Method(nn.Module):
    """A plain module: no loop, no device, no configuration. The linear probe is one too."""

    num_views: int = 2

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone  # what pretraining exports and lincls loads

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """`num_views` batches (N, 3, H, W), labels (N,) int64 where the method uses them."""
        raise NotImplementedError

    def update(self, progress: float) -> None:
        """Called after `optimizer.step()` with the share of training done, 0 < progress <= 1."""


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that only `ema_` changes."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_(target: Iterable[nn.Module], source: Iterable[nn.Module], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * source, for parameters; buffers are the copy's own."""
    theirs = [p for module in source for p in module.parameters()]
    ours = [p for module in target for p in module.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
