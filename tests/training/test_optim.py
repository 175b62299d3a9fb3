"""Optimizers: by which rate and decay each parameter is trained, whatever options and groups are
combined.
"""

import math
from pathlib import Path

import pytest
import torch
from cached_lincls import CACHED, Features, train
from commands import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.methods.probe import IGNORED, LinearGrid, LinearProbe
from ssl_bench.training import optim
from ssl_bench.training.optim import clip_, schedule_

# Of each optimizer, the options that are about single parameters.
OPTIONS = {
    "sgd": {"exclude_from_decay": [False, True], "clip_grad_norm": [None, 0.1]},
    "adamw": {
        "exclude_from_decay": [False, True],
        "final_weight_decay": [None, 0.4],
        "clip_grad_norm": [None, 0.1],
    },
    "lars": {
        "base_lr_biases": [None, 0.05],
        "exclude_from_decay": [False, True],
        "exclude_from_adaptation": [False, True],
    },
}
BASE = {"base_lr": 0.2, "weight_decay": 0.03}
EPOCH, EPOCHS, FACTOR = 1.0, 4, 0.5  # where in the schedule the step is taken


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict, list[dict]]:
    """(optimizer, its options, what groups of parameters have of their own; [] for parameters
    without groups).
    """
    name = draw(st.sampled_from(sorted(OPTIONS)))
    options = {key: draw(st.sampled_from(values)) for key, values in OPTIONS[name].items()}
    keys = {"lr": st.sampled_from([0.01, 0.5]), "weight_decay": st.sampled_from([0.0, 0.2])}
    groups = st.lists(
        st.fixed_dictionaries({}, optional=keys | {"constant_lr": st.just(True)}), max_size=3
    )
    return name, options, draw(groups)


def stepped(name: str, options: dict, own: dict, weight: Tensor, gradient: Tensor) -> Tensor:
    """What the docs say that a first step makes of a tensor; own: what its group has."""
    bias = weight.ndim == 1
    lr, decay = own.get("lr", BASE["base_lr"]), own.get("weight_decay", BASE["weight_decay"])
    if bias and options.get("base_lr_biases"):
        lr = options["base_lr_biases"]
    if (end := options.get("final_weight_decay")) is not None:
        decay = end + (decay - end) * (1 + math.cos(math.pi * EPOCH / EPOCHS)) / 2
    if bias and options["exclude_from_decay"]:
        decay = 0.0
    lr *= 1.0 if own.get("constant_lr") else FACTOR
    if longest := options.get("clip_grad_norm"):
        gradient = gradient * min(1.0, longest / (gradient.norm().item() + 1e-6))
    if name == "adamw":
        return weight * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
    update = gradient + decay * weight
    if name == "lars" and not (bias and options["exclude_from_adaptation"]) and update.norm() > 0:
        update = update * 1e-3 * weight.norm() / update.norm()
    return weight - lr * update


def refused(options: dict, groups: list[dict]) -> bool:
    clashes = {"final_weight_decay": "weight_decay", "base_lr_biases": "lr"}
    return any(
        options.get(option) is not None and key in own
        for option, key in clashes.items()
        for own in groups
    )


@given(case=cases(), moved=st.booleans())
@settings(max_examples=150)
def test_every_parameter_is_trained_as_the_docs_say(
    case: tuple[str, dict, list[dict]], moved: bool
) -> None:
    name, options, groups = case
    generator = torch.Generator().manual_seed(0)
    tensors = [
        [
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
            for shape in ((3, 2), (4,), (2, 2))
        ]
        for _ in groups or [{}]
    ]
    params = (
        [{"params": list(some), **own} for some, own in zip(tensors, groups, strict=True)]
        if groups
        else tensors[0]
    )

    def make() -> torch.optim.Optimizer:
        return getattr(optim, name)(params, batch_size=256, **BASE, **options)

    if refused(options, groups):
        with pytest.raises(
            UserError, match=r"would overwrite the \w+ that parameters have of their own"
        ):
            make()
        return
    optimizer, expected = make(), []
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3 * len(tensors)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    for own, some in zip(groups or [{}], tensors, strict=True):
        for parameter in some:
            parameter.grad = moved * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            expected.append(
                stepped(name, options, own, parameter.detach().clone(), parameter.grad.clone())
            )
    schedule_(optimizer, FACTOR, EPOCH, EPOCHS)
    clip_(optimizer)
    optimizer.step()
    for parameter, value in zip((p for some in tensors for p in some), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=1e-9)


HEADS = {
    "sgd": {},
    "sgd, no decay of biases": {"exclude_from_decay": True},
    "sgd, clipped": {"clip_grad_norm": 0.05},
    "adamw": {},
    "adamw, clipped": {"clip_grad_norm": 0.05},
    "lars": {},
    "lars as SwAV's": {"exclude_from_decay": False, "exclude_from_adaptation": False},
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_of_the_grid_is_one_trained_alone(case: str) -> None:
    """By every optimizer: heads share the batch, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randint(4, (64,), generator=generator)
    held = torch.rand(64, generator=generator) < 0.3
    cells = [(0.1, 0.0), (3.0, 0.0), (0.1, 0.05), (3.0, 0.05)]
    seen = [y, y.masked_fill(held, IGNORED)]

    def optimizer(groups: list[dict]) -> torch.optim.Optimizer:
        return getattr(optim, case.partition(",")[0].partition(" ")[0])(
            groups, batch_size=256, **HEADS[case]
        )

    torch.manual_seed(1)
    many = LinearGrid(Features(), 4, len(cells), (~held).double().mean().item()).double().train()
    groups = [
        {"params": pair, "lr": lr, "weight_decay": decay}
        for (lr, decay), pair in zip(cells, many.pairs(), strict=True)
    ]
    train(many, optimizer(groups), x, torch.stack(seen, dim=1))
    for cell, (lr, decay) in enumerate(cells):
        for part, labels in enumerate(seen):
            torch.manual_seed(1)
            one = LinearProbe(Features(), 4).double().train()
            train(
                one,
                optimizer([{"params": one.fc.parameters(), "lr": lr, "weight_decay": decay}]),
                x,
                labels,
            )
            torch.testing.assert_close(
                many.weights[2 * cell + part], one.fc.weight, rtol=1e-6, atol=1e-9
            )
            torch.testing.assert_close(
                many.biases[2 * cell + part], one.fc.bias, rtol=1e-6, atol=1e-9
            )


ADAMW = ["optimizer=adamw", "optimizer.base_lr=0.1", "optimizer.weight_decay=0"]
LARS = ["optimizer=lars", "optimizer.base_lr=0.1", "optimizer.weight_decay=0"]
MISTAKES = {
    "cached, decay": (
        [*CACHED, *ADAMW, "optimizer.final_weight_decay=0.4"],
        "optimizer.final_weight_decay=0.4 would overwrite the weight_decay that parameters have of "
        "their own here",
    ),
    "cached, rate": (
        [*CACHED, *LARS, "optimizer.base_lr_biases=0.1"],
        "optimizer.base_lr_biases=0.1 would overwrite the lr that parameters have of their own "
        "here: type optimizer.base_lr_biases=null",
    ),
    "finetune": (
        ["stage=finetune", "optimizer=barlow_twins"],
        "optimizer.base_lr_biases=0.0048 would overwrite the lr that parameters have of their own "
        "here",
    ),
}


@pytest.mark.parametrize(("overrides", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_would_overwrite_an_axis_is_refused(
    tmp_path: Path, overrides: list[str], says: str
) -> None:
    elsewhere = [word for word in overrides if not word.startswith("data")]
    with pytest.raises(UserError) as caught:
        # before data is opened
        launch(compose(*elsewhere, "data=folder", "data.root=/nowhere", f"dir={tmp_path}/run"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("scaling", "rate"), [("linear", 2.0), ("sqrt", 22.627417), ("none", 1.0)])
def test_the_rate_is_that_of_the_batch(scaling: str, rate: float) -> None:
    """Goyal et al.: lr = base * batch / 256; SimCLR, B.1: base * sqrt(batch). The same in every
    optimizer.
    """
    for name in OPTIONS:
        (group,) = getattr(optim, name)(
            [nn.Parameter(torch.zeros(2, 2))], batch_size=512, base_lr=1.0, scaling=scaling
        ).param_groups
        assert group["lr"] == pytest.approx(rate)
