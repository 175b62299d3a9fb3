"""What a method is: a module that turns views into a loss."""

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from types import MethodType

import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError

# "loss" is required. By "embeddings" (V, N, D), detached, of V views of each image, the loop judges
# the health of training (evaluate.health). Every other entry is a scalar worth a chart.
Output = dict[str, Tensor]


class Method(nn.Module):
    """A plain module: no loop, no device, no configuration. The linear probe is one too."""

    num_views: int = 2  # of full size
    takes_small_views: bool = False  # any number of them after the others (multi-crop)
    image_size: int | None = None  # pixels of the views of full size; None: any
    split: str = "pretrain"  # the images it learns from
    learns: bool = True
    bn_splits: int = 1  # the number of parts in which batch norm sees the batch of a process
    # what the loss takes from the whole batch, so that it can't come in parts (`accumulate`); None:
    # it is the mean of what each image has by itself
    whole_batch: str | None = "it isn't said to be a mean over images (whole_batch = None)"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone  # what pretraining exports and lincls loads

    def param_groups(self) -> list[dict]:
        """What the optimizer trains. Beside the optimizer's keys the loop knows these three:

        constant_lr: the schedule leaves the rate alone. frozen_epochs: no gradient before this
        epoch. lr_scale: the rate is multiplied by it.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained}]

    def measured(self) -> nn.Module:
        """What evaluations look at, with the names that its tensors have here."""
        return nn.ModuleDict({"backbone": self.backbone})

    def check(self, num_images: int, local_batch: int) -> None:
        """UserError if it can't learn from so many images, or in such batches on each process.

        Called before any image is read, and for the members of a sweep before any starts.
        """

    def prepare(self, batches: Iterator[tuple[list[Tensor], Tensor]]) -> None:
        """Called once, before the first step, for a method that must have seen all images.

        batches: the views and the indices (N,) of each batch of the first epoch. They aren't made
        unless they are asked for.
        """

    def begin(self, epoch: float, epochs: int) -> None:
        """Called before each step: at `epoch` (a fraction inside an epoch) of `epochs`."""

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """What else `forward` is given, after the labels: masks, say.

        Called before each step, and not compiled. keys (N,): of `draws.keys`, by which random
        numbers are those of the image and the epoch; indices (N,): which images of the data set.
        """
        return ()

    def in_parts(self, count: int) -> None:
        """Called before training if each batch comes in so many parts, one after the other.

        Running statistics move as far by the parts as they would by the batch.
        """
        slow_statistics_(self, count)

    def ahead(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `forward` is given after what `draw` gave, (N, ...) each, if a batch comes in parts.

        Called once a step, without gradient, with the whole batch of this process.
        """
        return ()

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """`num_views` batches (N, 3, H, W), labels (N,) int64 where the method uses them."""
        raise NotImplementedError

    def update(self, progress: float) -> None:
        """Called after `optimizer.step()` with the share of training done, 0 < progress <= 1."""


def slow_statistics_(module: nn.Module, count: int) -> None:
    """Have running statistics move as far by `count` batches as they do by one, in place."""
    for child in module.modules():
        if getattr(child, "running_mean", None) is not None and child.momentum is not None:
            child.momentum = 1 - (1 - child.momentum) ** (1 / count)


def need_patches(backbone: nn.Module, method: str) -> None:
    """UserError if the backbone has no `tokens`, of which `method` hides some."""
    if not hasattr(backbone, "tokens"):
        raise UserError(
            f"method={method} hides patches, and this backbone has none: "
            "type backbone=vit_tiny, backbone=vit_small or backbone=vit_base"
        )


def digest(*modules: nn.Module, size: int = 64) -> bytes:
    """A hash, of `size` bytes, of every parameter and buffer."""
    whole = hashlib.blake2b(digest_size=size)
    for module in modules:
        for key, value in module.state_dict().items():
            whole.update(key.encode())
            whole.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.digest()


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that only `ema_` changes, without dropout, drop path or anything else random.

    Of its layers only those with running statistics have a train mode: batch norm uses the batch's
    statistics, like the original's.
    """
    copied = copy.deepcopy(module).requires_grad_(False)
    copied.train = MethodType(_train_statistics, copied)
    copied.follows = True  # for `health.Following`
    return copied.train(module.training)


def _train_statistics(module: nn.Module, mode: bool = True) -> nn.Module:
    """`module.train`, for layers with running statistics only.

    Whatever is random in a network, be it a layer or a part of one, looks at `training`.
    """
    type(module).train(module, mode)
    for child in module.modules():
        if not any(name.startswith("running_") for name in child._buffers):
            child.training = False
    return module


@torch.no_grad()
def ema_(target: Iterable[nn.Module], source: Iterable[nn.Module], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * source, for parameters.

    The target keeps its own buffers.
    """
    theirs = [p for module in source for p in module.parameters()]
    ours = [p for module in target for p in module.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def rising(momentum: float, progress: float) -> float:
    """From `momentum` to 1 along half a cosine (BYOL, arXiv:2006.07733, section 3.3)."""
    return 1 - (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2


def by_size(network: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """V views (N, 3, H, W) -> (V * N, D), view after view.

    Views of one size pass the network together, as in the code of multi-crop's authors.
    """
    sizes = groupby(views, key=lambda view: view.shape[-2:])
    return torch.cat([network(torch.cat(list(group))) for _, group in sizes])


def health_of(*embeddings: Tensor) -> Tensor:
    """The entry "embeddings" of an Output: V times (N, D) -> (V, N, D), detached."""
    return torch.stack([x.detach() for x in embeddings])
