"""Parts that methods share."""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.runtime import distributed


def mlp(
    *dims: int,
    norm: bool = False,
    final_norm: Literal["scaled", "plain"] | None = None,
    final_bias: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers of the given widths, with an activation between them.

    norm: batch norm before each activation. final_norm: batch norm after the last layer, with
    weights but no bias ("scaled") or without either ("plain"). A layer before batch norm has no
    bias, which the norm would take out again.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        bias = final_bias and not final_norm if last else not norm
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if last and final_norm:
            layers.append(nn.BatchNorm1d(outputs, affine=final_norm == "scaled"))
            if final_norm == "scaled":
                layers[-1].bias.requires_grad_(False)  # stays zero
        elif not last:
            layers += [nn.BatchNorm1d(outputs)] * norm + [activation()]
    return nn.Sequential(*layers)


def full_precision(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss, or a head, computed outside of autocast; tensors in half precision become float32.

    So do those in a list or a tuple.
    """

    def widened(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(widened, x))
        half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.half)
        return x.float() if half else x

    @wraps(loss)
    def computed(*args: Any, **kwargs: Any) -> Any:
        args = tuple(widened(x) for x in args)
        device = next(x for x in args if isinstance(x, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return loss(*args, **kwargs)

    return computed


def off_diagonal(matrix: Tensor) -> Tensor:
    """(D, D) -> (D * (D - 1),)"""
    return matrix.flatten()[1:].view(len(matrix) - 1, len(matrix) + 1)[:, :-1].flatten()


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
        newest = slice(max(0, num - size), None)  # if more keys come than fit, the last ones stay
        self.keys.index_copy_(1, slots[newest], keys[newest].T.to(self.keys.dtype))
        self.pointer.add_(num).remainder_(size)


SPLITTABLE = {nn.BatchNorm1d, nn.BatchNorm2d}


def _normalised_by_running_statistics(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    mean, variance = norm.running_mean, norm.running_var
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)


def _normalised_and_joined(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    variances: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm of len(means) consecutive parts of x; moves their means and variances (S, C)."""
    parts = [
        F.batch_norm(part, mean, variance, weight, bias, True, momentum, eps)
        for part, mean, variance in zip(x.chunk(len(means)), means, variances, strict=True)
    ]
    return torch.cat(parts)


class _InOneTensor(torch.autograd.Function):
    """As `_normalised_and_joined`, with the same kernels, on a CPU: each part is written where it
    belongs, which spares torch.cat's pass over memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        means: Tensor,
        variances: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        num_splits = len(means)
        whole = torch.empty_like(x)
        of_batch = torch.empty_like(means), torch.empty_like(variances)  # for the gradient
        for part, mean, variance, place, *of_part in zip(
            x.chunk(num_splits), means, variances, whole.chunk(num_splits), *of_batch, strict=True
        ):
            torch.ops.aten.native_batch_norm.out(
                part,
                weight,
                bias,
                mean,
                variance,
                True,
                momentum,
                eps,
                out=place,
                save_mean=of_part[0],
                save_invstd=of_part[1],
            )
        ctx.save_for_backward(x, weight, *of_batch)
        ctx.eps = eps
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, means, deviations = ctx.saved_tensors
        affine = weight is not None
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                of_part, part, weight, None, None, *of_batch, True, ctx.eps, [True, affine, affine]
            )
            for of_part, part, *of_batch in zip(
                gradient.chunk(len(means)), x.chunk(len(means)), means, deviations, strict=True
            )
        ]
        of_images, of_weight, of_bias = zip(*parts, strict=True)
        summed = [torch.stack(each).sum(dim=0) if affine else None for each in (of_weight, of_bias)]
        return torch.cat(of_images), *summed, None, None, None, None


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over each of `num_splits` consecutive parts of the batch, as so many GPUs do it.

    One device then behaves like several, which MoCo's shuffle needs. Its state is batch norm's.
    """

    num_splits: int = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _normalised_by_running_statistics(self, x)
        # Each part moves its own copy of the running statistics; their mean is kept, as in the
        # authors' code.
        means = self.running_mean.repeat(self.num_splits, 1)
        variances = self.running_var.repeat(self.num_splits, 1)
        eager_on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        single = x.numel() == self.num_splits * x.shape[1]  # which F.batch_norm refuses
        norm = _InOneTensor.apply if eager_on_cpu and not single else _normalised_and_joined
        normalised = norm(x, self.weight, self.bias, means, variances, self.momentum, self.eps)
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        self.num_batches_tracked.add_(1)
        return normalised


def split_batch_norm_(module: nn.Module, num_splits: int) -> None:
    """Turn every batch norm inside `module` into a split one, in place; its state stays."""
    for child in module.modules():
        if type(child) in SPLITTABLE:
            child.__class__ = SplitBatchNorm
            child.num_splits = num_splits
        else:
            _refuse_unknown(child, f"method.bn_splits={num_splits}", "method.bn_splits=1")


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, on any device; torch's own knows no CPU.

    Its state is batch norm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _normalised_by_running_statistics(self, x)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.half) else x
        mean = distributed.mean_with_grad(wide.mean(dims))  # every rank has as many images
        centred = wide - mean.view(shape)
        variance = distributed.mean_with_grad(centred.square().mean(dims))
        with torch.no_grad():
            count = distributed.world_size() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(x.dtype)


def sync_batch_norm_(module: nn.Module, device: torch.device, compiled: bool) -> None:
    """Let batch norm inside `module` see all ranks, in place, unless it is split on purpose.

    Its state stays. torch's own has the faster kernels, but waits for the GPU, which would leave a
    gap in a compiled network for each.
    """
    for child in module.modules():
        if type(child) not in SPLITTABLE:
            _refuse_unknown(child, "sync_batch_norm=true", "sync_batch_norm=false")
        elif device.type == "cuda" and not compiled:
            child.__class__, child.process_group = nn.SyncBatchNorm, None  # None: all ranks
        else:
            child.__class__ = SyncBatchNorm


def _refuse_unknown(child: nn.Module, asked: str, instead: str) -> None:
    """UserError for a batch norm that does more, as timm's with an activation, which would be lost.

    asked: the setting that would turn it into another. instead: what to type.
    """
    known = (nn.BatchNorm1d, nn.BatchNorm2d, SplitBatchNorm, SyncBatchNorm, nn.SyncBatchNorm)
    if isinstance(child, nn.modules.batchnorm._BatchNorm) and type(child) not in known:
        raise UserError(
            f"{asked} can't be had with this backbone's {type(child).__name__}: type {instead}"
        )
