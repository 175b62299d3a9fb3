"""`accumulate`: a batch in parts has the loss and the gradients of the whole, or is refused.

And what else concerns gradients of a batch that is split: compiled processes, `compress`.
"""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import in_processes
from small_methods import METHODS, TwoLayers, drawn, make, num_views, overrides, views_of
from torch import Tensor, nn

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.methods.base import Method
from ssl_bench.methods.moco import MoCo
from ssl_bench.runtime import distributed
from ssl_bench.stages._training import compile_
from ssl_bench.training.accumulation import EMBEDDINGS, joined, parts

METHODS_LEARNT = [name for name in METHODS if name != "random"]
# what their losses take from the other images of a batch is nothing
IN_PARTS = ["moco_v1", "moco_v2", "ressl", "byol", "simsiam", "mae", "simmim", "ijepa"]
IN_PARTS += ["supervised", "distill"]
BATCH = 16


def asked(name: str, *more: str) -> list[str]:
    """A command of a single epoch, nothing of which is ignored."""
    words = overrides(name, "epochs=1", *more)
    return [word for word in words if not word.startswith("augmentation.small_size")]


def freeze_(module: nn.Module) -> None:
    """Batch norm by running statistics, since by those of a batch images depend on each other."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
            child.train = lambda mode=True, self=child: self


def stepped(method: Method, name: str, count: int) -> dict[str, Tensor]:
    """Loss, gradients, embeddings and the state after a step in `count` parts."""
    method.double().train()
    if count > 1:
        method.in_parts(count)
    torch.manual_seed(1)
    method.begin(0.0, 2)
    views = [view.double() for view in views_of(name, BATCH)[: num_views(name)]]
    more = drawn(method, BATCH)
    if count > 1:
        more = (*more, *method.ahead(views))
    outputs = []
    for part in parts(views, torch.arange(BATCH) % 10, more, count):
        outputs.append(method(*part))
        (outputs[-1]["loss"] / count).backward()
    output = joined(outputs)
    found = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    found["loss"] = output["loss"].detach()
    if EMBEDDINGS in output:
        found[EMBEDDINGS] = output[EMBEDDINGS]
    method.update(0.5)
    buffers = dict(method.named_buffers())
    return found | {key: buffers[key] for key in buffers if key.startswith("queue.")}


@pytest.mark.parametrize("name", IN_PARTS)
def test_parts_of_a_batch_add_up(name: str) -> None:
    found = []
    for count in (1, 4):
        method = make(name, TwoLayers, depth=1)
        freeze_(method)
        found.append(stepped(method, name, count))
    whole, summed = found
    assert whole.keys() == summed.keys()
    for key in whole:
        torch.testing.assert_close(summed[key], whole[key], rtol=1e-6, atol=1e-8)


def test_moco_has_the_batch_norm_of_the_whole_batch() -> None:
    """Its parts are those of so many GPUs already; keys are shuffled across the whole batch."""
    found = []
    for count in (1, 2):
        torch.manual_seed(0)
        method = MoCo(TwoLayers(), 16, 64, momentum=0.5, mlp=True, bn_splits=4)
        found.append(stepped(method, "moco_v2", count))
        found[-1]["followed"] = next(method.key_backbone.parameters())
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-9, atol=1e-12)


def test_running_statistics_move_as_far_as_by_the_batch() -> None:
    method = make("byol", TwoLayers)
    method.in_parts(4)
    norm = next(m for m in method.modules() if isinstance(m, nn.BatchNorm2d)).train()
    for _ in range(4):
        norm(torch.full((2, 16, 2, 2), 10.0))
    assert torch.allclose(norm.running_mean, torch.ones(16))  # a tenth of the way


@pytest.mark.parametrize("name", METHODS_LEARNT)
def test_every_other_method_says_why_it_cannot(name: str) -> None:
    reason = make(name, TwoLayers, depth=1).whole_batch
    assert (reason is None) == (name in IN_PARTS)
    assert reason is None or reason.startswith("its ") or reason.startswith("it ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (asked("simclr", "accumulate=2"), "its negatives are the other images of the batch"),
        (asked("byol", "accumulate=3"), "accumulate=3 does not divide the 256 images"),
        (asked("moco_v2", "accumulate=16"), "doesn't divide method.bn_splits=8"),
        (asked("byol", "accumulate=256"), "batch norm needs two images"),
        (asked("byol", "accumulate=1"), "accumulate=1: input should be greater than or equal"),
        (asked("byol", "compress=bf16"), "this is one process"),
        (["stage=lincls", "accumulate=2"], "doesn't read accumulate"),
        (["stage=pretrain", "method=random", "accumulate=2"], "accumulate=2 would be ignored"),
    ],
)
def test_refused(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ssl_bench.train([*words, f"dir={tmp_path}/run"])
    assert said in str(caught.value)


def test_a_run_in_parts_is_the_run(tmp_path: Path) -> None:
    """The program itself, with MoCo's batch norm: up to rounding."""
    lines = []
    for name, more in (("whole", []), ("parts", ["accumulate=4"])):
        words = asked("moco_v2", "eval_every=0", f"dir={tmp_path}/{name}", *more)
        ssl_bench.train(words)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    for whole, summed in zip(*lines, strict=True):
        assert summed["loss"] == pytest.approx(whole["loss"], rel=1e-2)
    for key in ("loss", "accuracy", "grad_norm", "alignment"):  # before rounding has grown
        assert lines[1][0][key] == pytest.approx(lines[0][0][key], rel=1e-4), key


class Kept(nn.Module):
    """A small network without batch norm, which compiles in seconds."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def learnt(
    compiled: bool, compress: str | None, count: int, rank: int, size: int
) -> dict[str, Tensor]:
    """Losses and weights of a few steps of MoCo on this rank's part of each batch."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.manual_seed(0)
    method, device = MoCo(Kept(), 8, 32, momentum=0.9, mlp=True, bn_splits=1), torch.device("cpu")
    if count > 1:
        method.in_parts(count)
    if compiled:
        compile_(method, device)
    parallel = distributed.data_parallel(method, device, compress)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        views = [torch.rand(BATCH, 3, 8, 8, generator=generator) for _ in range(2)]
        mine = [view.chunk(size)[rank] for view in views]
        torch.manual_seed(step)
        optimizer.zero_grad()
        ahead = method.ahead(mine) if count > 1 else ()
        outputs: list[dict[str, Tensor]] = []
        for part in parts(mine, torch.zeros(len(mine[0])), ahead, count):
            with distributed.apart(parallel, len(outputs) + 1 < count):
                outputs.append(parallel(*part))
                (outputs[-1]["loss"] / count).backward()
        optimizer.step()
        method.update((step + 1) / 3)
        losses.append(distributed.mean(joined(outputs)["loss"].detach()))
    weights = {key: p.detach() for key, p in method.named_parameters()}
    return weights | {"losses": torch.stack(losses), "queue": method.queue.keys}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "compress", "count", "tolerance"),
    [(True, None, 1, 1e-5), (False, "bf16", 1, 1e-2), (False, None, 2, 1e-5)],
    ids=["compiled", "compressed", "in parts"],
)
def test_two_processes_have_the_losses_of_one(
    compiled: bool, compress: str | None, count: int, tolerance: float, tmp_path: Path
) -> None:
    one = learnt(False, None, 1, 0, 1)
    first, second = in_processes(partial(learnt, compiled, compress, count), tmp_path)
    for key in one:
        assert torch.equal(first[key], second[key]), key  # ranks never drift apart
        torch.testing.assert_close(first[key], one[key], rtol=tolerance, atol=tolerance)
    if compress:  # something was rounded
        assert any(not torch.equal(first[key], one[key]) for key in one)
