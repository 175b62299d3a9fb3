"""Optimizers, with the learning rate given for a batch of 256 and scaled to the batch at hand.

Parameters may come in groups that have their own `lr` (scaled already) or `weight_decay`, which
replace base_lr and weight_decay there. Options about biases and norms (tensors of one dimension)
hold in every group; an option that would overwrite a group's own value is a UserError.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.errors import UserError

Scaling = Literal["linear", "sqrt", "three_quarters", "none"]
Params = Iterable[nn.Parameter] | Iterable[dict]


def scaled_lr(base_lr: float, batch_size: int, scaling: Scaling) -> float:
    """The rate for a batch_size, which is that of all processes together.

    `linear`: base_lr * batch_size / 256 (Goyal et al., arXiv:1706.02677). `sqrt`: base_lr *
    sqrt(batch_size) (SimCLR, arXiv:2002.05709, B.1). `three_quarters`: base_lr * (batch_size / 256)
    ** 0.75, which gives both rates that SwAV's authors give.
    """
    share = batch_size / 256
    factors = {
        "linear": share,
        "sqrt": math.sqrt(batch_size),
        "three_quarters": share**0.75,
        "none": 1.0,
    }
    return base_lr * factors[scaling]


def sgd(
    params: Params,
    batch_size: PositiveInt,
    base_lr: PositiveFloat = 0.03,
    scaling: Scaling = "linear",
    momentum: Fraction = 0.9,
    weight_decay: NonNegativeFloat = 1e-4,
    nesterov: bool = False,
    exclude_from_decay: bool = False,
    clip_grad_norm: PositiveFloat | None = None,
) -> torch.optim.Optimizer:
    """SGD. exclude_from_decay: no weight decay of biases and norms. clip_grad_norm: see `clip_`.

    base_lr: at batch 256. momentum: share of the last step in the next. weight_decay: so many
    times a weight is added to its gradient. nesterov: the gradient is taken as if the momentum's
    step had been made.
    """
    lr = scaled_lr(base_lr, batch_size, scaling)
    if exclude_from_decay:
        params = split(params, weights={}, others={"weight_decay": 0.0})
    optimizer = torch.optim.SGD(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )
    return _clipping(optimizer, clip_grad_norm)


def adamw(
    params: Params,
    batch_size: PositiveInt,
    base_lr: PositiveFloat = 5e-4,
    scaling: Scaling = "linear",
    weight_decay: NonNegativeFloat = 0.04,
    exclude_from_decay: bool = True,
    final_weight_decay: NonNegativeFloat | None = None,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    clip_grad_norm: PositiveFloat | None = None,
) -> torch.optim.Optimizer:
    """AdamW. exclude_from_decay: no weight decay of biases and norms. clip_grad_norm: see `clip_`.

    base_lr: at batch 256. weight_decay: share of a weight that a step takes off, times the rate.
    final_weight_decay: the weight decay goes there along half a cosine (DINO). betas: share of the
    last averages of the gradient and of its square in the next.
    """
    lr = scaled_lr(base_lr, batch_size, scaling)
    moving: dict[str, float] = {}
    if final_weight_decay is not None:
        option = f"optimizer.final_weight_decay={final_weight_decay:g}"
        params = _without("weight_decay", params, option)
        moving = {"initial_weight_decay": weight_decay, "final_weight_decay": final_weight_decay}
    others = {"weight_decay": 0.0} if exclude_from_decay else moving
    groups = split(params, weights=moving, others=others)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return _clipping(optimizer, clip_grad_norm)


def adam(
    params: Params,
    batch_size: PositiveInt,
    base_lr: PositiveFloat = 1e-3,
    scaling: Scaling = "none",
    weight_decay: NonNegativeFloat = 0.0,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba, arXiv:1412.6980), with the weight decay added to the gradient.

    base_lr: scaled to the batch as `scaling` says. betas: share of the last averages of the
    gradient and of its square in the next.
    """
    lr = scaled_lr(base_lr, batch_size, scaling)
    return torch.optim.Adam(
        _groups(params), lr=lr, betas=betas, weight_decay=weight_decay, fused=True
    )


def lars(
    params: Params,
    batch_size: PositiveInt,
    base_lr: PositiveFloat = 0.3,
    scaling: Scaling = "linear",
    momentum: Fraction = 0.9,
    weight_decay: NonNegativeFloat = 1e-6,
    trust_coefficient: PositiveFloat = 1e-3,
    base_lr_biases: PositiveFloat | None = None,
    exclude_from_decay: bool = True,
    exclude_from_adaptation: bool = True,
) -> torch.optim.Optimizer:
    """See LARS. base_lr_biases: another for biases and norms (Barlow Twins, arXiv:2103.03230, 2.2).

    None: the same for all. base_lr: at batch 256. momentum: share of the last step in the next.
    weight_decay: so many times a weight is added to its gradient. exclude_from_decay: no weight
    decay of biases and norms. exclude_from_adaptation: their steps aren't rescaled.
    """
    lr = scaled_lr(base_lr, batch_size, scaling)
    if base_lr_biases is not None:
        params = _without("lr", params, f"optimizer.base_lr_biases={base_lr_biases:g}")
        lr_biases = scaled_lr(base_lr_biases, batch_size, scaling)
        params = split(params, weights={}, others={"lr": lr_biases})
    exclude = (exclude_from_decay, exclude_from_adaptation)
    return LARS(params, lr, momentum, weight_decay, trust_coefficient, *exclude)


class LARS(torch.optim.Optimizer):
    """SGD that rescales each tensor's step to its norm (You et al., arXiv:1708.03888).

    step = lr * momentum(trust_coefficient * |w| / |g + decay * w| * (g + decay * w)); no rescaling
    where either norm is zero. exclude_from_decay: biases and norms (tensors of one dimension) have
    no weight decay. exclude_from_adaptation: they aren't rescaled. SimCLR, BYOL, Barlow Twins,
    VICReg and MoCo v3 have both, SwAV neither.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        exclude_from_decay: bool = True,
        exclude_from_adaptation: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.trust_coefficient = trust_coefficient
        self.exclude_from_decay = exclude_from_decay
        self.exclude_from_adaptation = exclude_from_adaptation

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            decayed = [p.ndim > 1 or not self.exclude_from_decay for p in params]
            decays = [group["weight_decay"] * this for this in decayed]
            if any(decays):
                updates = torch._foreach_add(updates, torch._foreach_mul(params, decays))
            rescaled = [p.ndim > 1 or not self.exclude_from_adaptation for p in params]
            adapted = [i for i, this in enumerate(rescaled) if this]
            if adapted:
                norms = torch.stack(torch._foreach_norm([params[i] for i in adapted]))
                lengths = torch.stack(torch._foreach_norm([updates[i] for i in adapted]))
                trust = self.trust_coefficient * norms / lengths
                trust = trust.where((norms > 0) & (lengths > 0), 1.0)
                scaled = torch._foreach_mul([updates[i] for i in adapted], list(trust.unbind()))
                updates = list(updates)
                for i, update in zip(adapted, scaled, strict=True):
                    updates[i] = update
            momenta = [self._momentum(p) for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def split(params: Params, weights: dict, others: dict) -> list[dict]:
    """Each group in two: weights with one setting, biases and norms (one dimension) with another.

    The settings replace what the group has.
    """
    parts = []
    for group in _groups(params):
        for wide, settings in ((True, weights), (False, others)):
            members = [p for p in group["params"] if (p.ndim > 1) is wide]
            if members:
                parts.append({**group, **settings, "params": members})
    return parts


def _groups(params: Params) -> list[dict]:
    """The parameters as groups, each with a list of them."""
    groups = list(params)
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    # an iterator could be read only once
    return [{**group, "params": list(group["params"])} for group in groups]


def _without(key: str, params: Params, option: str) -> list[dict]:
    """The groups. UserError if one has the key, which `option` would overwrite."""
    groups = _groups(params)
    if any(key in group for group in groups):
        raise UserError(
            f"{option} would overwrite the {key} that parameters have of their own here: type "
            f"{option.partition('=')[0]}=null"
        )
    return groups


def schedule_(optimizer: torch.optim.Optimizer, factor: float, epoch: float, epochs: int) -> None:
    """Set each group's rate and weight decay for the step at `epoch` of `epochs`.

    factor: the schedule's, which groups with constant_lr ignore. lr_scale: a group's share of the
    rate. final_weight_decay: see `adamw`.
    """
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0) * (1.0 if group.get("constant_lr") else factor)
        group["lr"] = group["initial_lr"] * scale
        if "final_weight_decay" in group:
            start, end = group["initial_weight_decay"], group["final_weight_decay"]
            decay = end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2
            group["weight_decay"] = decay


def clip_(optimizer: torch.optim.Optimizer) -> None:
    """In groups with a `clip_grad_norm`, shorten each tensor's gradient to that norm.

    As in utils.py of DINO's authors.
    """
    for group in optimizer.param_groups:
        if longest := group.get("clip_grad_norm"):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            factors = (longest / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, list(factors.unbind()))


def freeze_(optimizer: torch.optim.Optimizer, epoch: float) -> None:
    """Drop the gradients of groups whose `frozen_epochs` aren't over.

    A parameter without a gradient has no step, no momentum and no decay.
    """
    for group in optimizer.param_groups:
        if epoch < group.get("frozen_epochs", 0):
            for parameter in group["params"]:
                parameter.grad = None


def _clipping(
    optimizer: torch.optim.Optimizer, clip_grad_norm: float | None
) -> torch.optim.Optimizer:
    if clip_grad_norm is not None:
        for group in optimizer.param_groups:
            group["clip_grad_norm"] = clip_grad_norm
    return optimizer
