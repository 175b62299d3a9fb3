"""Every method under the same loop: trained, resumed, in bfloat16, compiled, on two processes,
watched for collapse.
"""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import compose
from compared import assert_identical
from processes import in_processes
from small_methods import (
    LEARNING,
    METHODS,
    SMALL,
    VITS,
    TwoLayers,
    differing,
    drawn,
    learnt,
    make,
    optimizer_of,
    overrides,
    teacher,
    views_of,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from ssl_bench.evaluate.health import collapse, effective_rank, health
from ssl_bench.launch.process import launch
from ssl_bench.methods import layers
from ssl_bench.runs.checkpoint import complete
from ssl_bench.runtime import distributed
from ssl_bench.training.optim import clip_, freeze_, schedule_

SMALL["swav"] += [
    "method.queue_start=0.2",
    "method.frozen_epochs=0.4",
    "augmentation.num_small_views=2",
]
for name in ("lejepa", "deepcluster_v2", "msn"):
    SMALL[name] += ["augmentation.num_small_views=2"]
for name in ("ibot", "dinov2"):
    SMALL[name] += ["augmentation.num_small_views=2", "method.warmup_teacher_temperature_epochs=2"]
SMALL["dino"] += ["method.warmup_teacher_temperature_epochs=2", "augmentation.num_small_views=2"]


def test_a_small_setting_for_each() -> None:
    assert set(METHODS) == {*SMALL, "random", "supervised"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in VITS)) for n in LEARNING]
)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """From the checkpoint of any step: here one in the middle of an epoch, and with every schedule
    on its way.
    """
    whole, part = tmp_path / "whole", tmp_path / "part"
    words = ["save_every=7"]
    if name not in VITS:  # whose patches are of 4 or 16 pixels
        words += ["data.image_size=8", "augmentation.small_size=4"]  # as the digits are
    if name == "distill":
        words += [f"method.teacher={teacher()}"]
    launch(compose(*overrides(name, *words, f"dir={whole}")))
    checkpoints = complete(whole)
    assert [path.stem for path in checkpoints] == ["step0000000010", "step0000000007"]
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    complete(part)[0].unlink()
    launch(compose(*overrides(name, *words, f"dir={part}")))
    load = lambda run: torch.load(complete(run)[0], weights_only=True)  # noqa: E731
    assert_identical(load(whole), load(part))
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, part)
    ]
    assert [line["step"] for line in lines[1]] == list(range(1, 11))
    same = ("loss", "lr", "grad_norm", "embedding_std", "effective_rank", "knn_top1", "probe_top1")
    assert [[line.get(key) for key in same] for line in lines[0]] == [
        [line.get(key) for key in same] for line in lines[1]
    ]
    if name == "supervised":  # which has seen the labels of all that could judge it
        assert not {"knn_top1", "probe_top1"} & lines[0][-1].keys()
        return
    # ten classes: 10 by chance. What few steps come to differs by points with the processor.
    assert lines[0][-1]["knn_top1"] > 15
    assert lines[0][-1]["probe_top1"] > 40


def test_random_is_as_initialised(tmp_path: Path) -> None:
    assert launch(compose(*overrides("random", f"dir={tmp_path / 'run'}"))) == {}
    state = torch.load(complete(tmp_path / "run")[0], weights_only=True)["model"]
    launch(
        compose(
            *overrides("simclr", f"dir={tmp_path / 'other'}", "epochs=1", "optimizer.base_lr=1e-30")
        )
    )
    other = torch.load(complete(tmp_path / "other")[0], weights_only=True)["model"]
    # the seed's, for every method
    assert torch.equal(state["backbone.conv1.weight"], other["backbone.conv1.weight"])


@pytest.mark.parametrize("name", LEARNING)
def test_bfloat16(name: str) -> None:
    method, views = make(name).train(), views_of(name, 32)
    labels = torch.arange(32) % 10
    method.begin(1.0, 2)
    more = drawn(method, 32)
    full = method(views, labels, *more)["loss"]
    method = make(name).train()
    method.begin(1.0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        half = method(views, labels, *more)
    half["loss"].backward()
    assert half["loss"].dtype == torch.float32  # the loss itself is not in bfloat16
    torch.testing.assert_close(half["loss"], full, rtol=0.1, atol=0.02)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


class Spy(TorchFunctionMode):
    """Notes what is done in half precision that a loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.half, self.normalised = set(), []  # what F.normalize gave

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        losses = (
            F.normalize,
            F.cosine_similarity,
            F.cross_entropy,
            F.log_softmax,
            F.softmax,
            F.mse_loss,
            torch.exp,
        )
        if function in losses and any(
            tensor.dtype in (torch.bfloat16, torch.half) for tensor in tensors
        ):
            self.half.add(function.__name__)
        multiplies = function in (
            F.linear,
            Tensor.matmul,
            Tensor.__matmul__,
        ) and torch.is_autocast_enabled("cpu")
        if multiplies and any(
            tensor is one or tensor._base is one for tensor in tensors for one in self.normalised
        ):
            self.half.add("product of directions")
        result = function(*args, **(kwargs or {}))
        if function is F.normalize:
            self.normalised.append(result)
        return result


@pytest.mark.parametrize("name", LEARNING)
def test_losses_and_heads_are_in_full_precision(name: str) -> None:
    """Under autocast: directions, products of directions, softmax. (MoCo's with its queue are said
    to be bfloat16.)
    """
    method = make(name).train()
    method.begin(1.0, 2)
    with Spy() as spy, torch.autocast("cpu", torch.bfloat16):
        method(views_of(name, 32), torch.arange(32) % 10, *drawn(method, 32))
    assert spy.half == set()


@pytest.mark.parametrize("name", LEARNING)
def test_only_what_learns_drops(name: str) -> None:
    """A copy that gives targets isn't random."""

    def network() -> nn.Module:
        layers = nn.Sequential(TwoLayers(), nn.Dropout(0.5))
        layers.dim = TwoLayers.dim
        return layers

    for child in make(name, network).train().children():
        learns = any(p.requires_grad for p in child.parameters())
        assert all(
            dropout.training is learns
            for dropout in child.modules()
            if isinstance(dropout, nn.Dropout)
        )


# a queue, prototypes, views of two sizes, hidden patches, a momentum network
TRACED_FIRST = ("moco_v2", "swav", "lejepa", "mae", "byol", "dinov2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in TRACED_FIRST else pytest.mark.exhaustive)
        for name in LEARNING
    ],
)
def test_traced_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of it, short of machine code: equal gradients, and a change of epoch
    doesn't trace it anew.
    """
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    counts: list[int] = []
    found = learnt(name, True, num_steps=4, after_step=lambda: counts.append(backend.frame_count))
    assert counts[0] > 0
    # I-JEPA's batches have blocks of other sizes, which are traced once as sizes that vary
    settled = 2 if name == "ijepa" else 1
    assert counts[-1] == counts[settled], counts
    assert differing(found, learnt(name, False, num_steps=4)) == set()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LEARNING)
def test_compiled(name: str) -> None:
    assert differing(learnt(name, True), learnt(name, False)) == set()


def steps(rank: int, size: int) -> dict[str, Tensor]:
    """Three steps of every method on this rank's part of fixed batches, in float64: losses and some
    weights.
    """
    found = {}
    for name in LEARNING:
        if name in ("moco_v1", "moco_v2", "ressl"):
            continue  # batch norm isn't synchronised: tests/runtime/test_distributed.py
        method = make(name, TwoLayers).double().train()
        if size > 1:
            layers.sync_batch_norm_(method, torch.device("cpu"), compiled=False)
        seen = [view.double().chunk(size)[rank] for view in views_of(name, 32, 9)]
        method.prepare(iter([(seen, torch.arange(32).chunk(size)[rank])]))
        parallel = distributed.data_parallel(method, torch.device("cpu"))
        optimizer = torch.optim.SGD(method.param_groups(), lr=0.05, momentum=0.9)
        losses = []
        for step in range(3):
            views = [view.double().chunk(size)[rank] for view in views_of(name, 16, step)]
            method.begin(step / 2, 2)
            part = slice(rank * 16 // size, (rank + 1) * 16 // size)
            labels, more = torch.arange(16)[part] % 10, drawn(method, 16, step, part)
            loss = parallel(views, labels, *more)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.update((step + 1) / 3)
            losses.append(distributed.mean(loss.detach()))
        found[f"{name} loss"] = torch.stack(losses)
        found |= {
            f"{name} {key}": value
            for key, value in method.state_dict().items()
            if value.is_floating_point()
        }
    return found


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Batch norm synchronised, the losses' gradients are those of the joined batch; ranks never
    drift apart.
    """
    one = steps(0, 1)
    first, second = in_processes(steps, tmp_path)
    for key, value in one.items():
        # In multi-crop, batch norm sees several crops in one pass, which ranks share in another
        # order: no difference.
        torch.testing.assert_close(
            first[key], value, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
        )
        if "loss" not in key:
            assert torch.equal(first[key], second[key]), key


def test_frozen_layers_stay_and_constant_rates_too() -> None:
    swav = make("swav")
    optimizer = optimizer_of(swav, 256, "method=swav")
    for epoch, moved in ((0.2, False), (0.4, True)):
        swav.begin(epoch, 2)
        before = swav.prototypes.weight.detach().clone()
        swav(views_of("swav", 8))["loss"].backward()
        freeze_(optimizer, epoch)
        optimizer.step()
        assert torch.equal(swav.prototypes.weight, before) is not moved
    optimizer = optimizer_of(make("simsiam"), 512, "method=simsiam")
    schedule_(optimizer, 0.25, 1, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.1]


@pytest.mark.parametrize(
    "overrides", [["method=dino"], ["optimizer=adamw", "optimizer.clip_grad_norm=3"]]
)
def test_long_gradients_are_shortened_tensor_by_tensor(overrides: list[str]) -> None:
    model = make("supervised")
    optimizer, gradients = optimizer_of(model, 256, *overrides), []
    for number, parameter in enumerate(list(model.parameters())[:-1]):  # the last one has none
        parameter.grad = torch.randn_like(parameter)
        parameter.grad *= (1 if number % 2 else 20) / parameter.grad.norm()
        gradients.append((parameter, parameter.grad.clone()))
    clip_(optimizer)
    for number, (parameter, before) in enumerate(gradients):
        torch.testing.assert_close(parameter.grad, before * (1 if number % 2 else 3 / 20))


def test_weight_decay_follows_its_cosine() -> None:
    optimizer = optimizer_of(
        make("supervised"), 256, "optimizer=adamw", "optimizer.final_weight_decay=0.4"
    )
    decays = []
    for epoch in (0, 5, 10):
        schedule_(optimizer, 1.0, epoch, 10)
        decays.append([round(group["weight_decay"], 6) for group in optimizer.param_groups])
    assert decays == [[0.04, 0.0], [0.22, 0.0], [0.4, 0.0]]


def test_health_of_known_embeddings() -> None:
    torch.manual_seed(0)
    spread = health(torch.randn(2, 4000, 16))
    assert spread["embedding_std"] == pytest.approx(1, abs=0.02)
    assert spread["effective_rank"] == pytest.approx(16, abs=0.1)
    assert spread["alignment"] == pytest.approx(2, abs=0.05)  # of independent directions
    assert collapse(spread) is None
    assert health(torch.randn(1, 64, 16)).keys() == {
        "embedding_std",
        "effective_rank",
        "uniformity",
    }
    same = health(torch.ones(2, 50, 16) + 1e-4 * torch.randn(2, 50, 16))
    assert same["embedding_std"] < 0.01
    assert same["uniformity"] == pytest.approx(0, abs=1e-3)
    assert "all images have nearly the same embedding" in collapse(same)
    assert effective_rank(torch.eye(7)[:, :5]) == pytest.approx(5)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["byol", "vicreg"])
def test_a_collapsed_run_is_flagged(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BYOL without its predictor; VICReg without its variance. The whole ones are not flagged."""
    caplog.set_level(logging.WARNING, "ssl_bench")
    settings = ["epochs=8", "eval_every=0", "optimizer=sgd", "optimizer.base_lr=0.1", "log_every=5"]
    if case == "byol":
        settings += ["method.momentum=0.9"]
    launch(compose(*overrides(case, *settings, f"dir={tmp_path / 'whole'}")))
    assert "collapsed" not in caplog.text
    if case == "byol":
        from ssl_bench.methods.byol import BYOL

        plain = BYOL.__init__

        def without_predictor(self: BYOL, *args: object, **kwargs: object) -> None:
            plain(self, *args, **kwargs)
            self.predictor = nn.Identity()

        monkeypatch.setattr(BYOL, "__init__", without_predictor)
    else:
        settings += ["method.std_coeff=0"]
    launch(compose(*overrides(case, *settings, f"dir={tmp_path / 'collapsed'}")))
    assert "the run has collapsed: all images have nearly the same embedding" in caplog.text
