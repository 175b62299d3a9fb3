"""Methods with a slow teacher: what moves, what has a gradient, what a restart keeps; and that no
view is left out.
"""

import copy

import pytest
import torch
from small_methods import MULTI_CROP, drawn, make, num_views, views_of
from torch import Tensor

from ssl_bench.methods.base import Method

# what follows, and what it follows
SLOW = {
    "dino": {"backbone": "student_backbone", "head": "student_head"},
    "ibot": {"backbone": "student_backbone", "head": "student_head"},
    "dinov2": {"backbone": "student_backbone", "head": "student_head"},
    "ijepa": {"backbone": "student_backbone"},
}
BATCH = 8


def ready(name: str) -> tuple[Method, torch.optim.Optimizer]:
    """In training; its teacher differs from the student, as it does after some steps."""
    method = make(name).train()
    with torch.no_grad():
        for slow in SLOW.get(name, ()):
            for parameter in method.get_submodule(slow).parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return method, optimizer_of(method)


def optimizer_of(method: Method) -> torch.optim.Optimizer:
    params = [{"params": group["params"]} for group in method.param_groups()]
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def step(method: Method, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    """Number `number` of eight, as the loop makes it; the loss."""
    torch.manual_seed(number)
    method.begin(number / 4, 2)
    views = views_of(method_name(method), BATCH, number)
    loss = method(views, None, *drawn(method, BATCH, number))["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    method.update((number + 1) / 8)
    return loss.detach()


def method_name(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2]


@pytest.mark.parametrize("name", SLOW)
def test_a_teacher_follows_and_learns_nothing_itself(name: str) -> None:
    """By the momentum of this step; it has no gradient, and no optimizer has it."""
    method, optimizer = ready(name)
    pairs = {
        f"{slow}.{key}": (value.clone(), f"{fast}.{key}")
        for slow, fast in SLOW[name].items()
        for key, value in method.get_submodule(slow).named_parameters()
    }
    step(method, optimizer, 3)
    after = dict(method.named_parameters())
    base, progress = method.momentum, 0.5
    momentum = base + (1 - base) * progress  # half of the way, along a line or half a cosine
    moved = False
    for slow, (before, fast) in pairs.items():
        torch.testing.assert_close(
            after[slow], momentum * before + (1 - momentum) * after[fast], rtol=1e-5, atol=1e-7
        )
        assert after[slow].grad is None
        assert not after[slow].requires_grad
        moved |= not torch.equal(after[slow], before)
    assert moved
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(after[slow]) for slow in pairs}
    assert trained == {id(p) for p in after.values() if p.requires_grad}


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_every_centre_moves(name: str) -> None:
    method, optimizer = ready(name)
    centres = {key: value for key, value in method.named_buffers() if key.endswith("center")}
    assert len(centres) == (1 if name == "dino" else 2)
    for number in range(2):
        before = {key: value.clone() for key, value in centres.items()}
        step(method, optimizer, number)
        assert all((centres[key] - before[key]).abs().max() > 1e-6 for key in centres)


@pytest.mark.parametrize("name", [*SLOW, "lejepa"])
def test_a_restart_keeps_teacher_and_centre(name: str) -> None:
    """A new object with the saved state goes on as the first one does, bit for bit."""
    method, optimizer = ready(name)
    for number in range(2):
        step(method, optimizer, number)
    saved = copy.deepcopy([method.state_dict(), optimizer.state_dict()])
    again = make(name).train()
    with torch.no_grad():
        for parameter in again.parameters():  # initialised by another seed
            parameter.add_(1.0)
    again.load_state_dict(saved[0])
    going_on = optimizer_of(again)
    going_on.load_state_dict(saved[1])
    for number in (2, 3):
        assert torch.equal(step(method, optimizer, number), step(again, going_on, number))
    one, other = method.state_dict(), again.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2", "lejepa"])
def test_no_view_is_left_out_of_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a gradient; and the loss of classes is another where a teacher sees one flipped.

    In eval mode, since by the batch's statistics every view has an influence on the others.
    """
    method = ready(name)[0].eval()
    method.begin(0.0, 2)
    views = [view.requires_grad_() for view in views_of(name, BATCH)]
    assert len(views) == num_views(name) + 2 * (name in MULTI_CROP)
    more = drawn(method, BATCH)
    output = method(views, None, *more)
    loss, of_classes = output["loss"], "class_loss" if "class_loss" in output else "loss"
    gradients = torch.autograd.grad(loss, views)
    assert all(gradient.flatten(1).any(dim=1).all() for gradient in gradients)
    if name not in SLOW:
        return
    called = "tokens" if hasattr(method.backbone, "tokens") else "forward"
    plain = getattr(method.backbone, called)
    for number in range(num_views(name)):

        def flipped(images: Tensor, at: int = number) -> Tensor:
            parts = list(images.chunk(num_views(name)))
            parts[at] = parts[at].flip(3)
            return plain(torch.cat(parts))

        monkeypatch.setattr(method.backbone, called, flipped)
        changed = method(views, None, *more)[of_classes]
        assert abs(changed.item() - output[of_classes].item()) > 1e-7
