"""Methods that hide patches: what they see, and what their losses look at."""

from collections.abc import Callable

import pytest
import torch
from small_methods import PATCHES, drawn, make, resnet
from torch import Tensor

from ssl_bench.augment.draws import keys
from ssl_bench.errors import UserError
from ssl_bench.methods.base import Method
from ssl_bench.methods.deepcluster_v2 import assignment_loss
from ssl_bench.methods.mae import MAE, patchify
from ssl_bench.methods.simmim import SimMIM


def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def painted(where: Tensor) -> Tensor:
    """The images, with other pixels in the patches of this mask (3, 16)."""
    grid = where.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return torch.where(grid, torch.rand(3, 3, 16, 16), images())


def mask_of(method: Method, more: tuple[Tensor, ...]) -> Tensor:
    """Bool (3, 16) of what was drawn."""
    if isinstance(method, MAE):
        return more[0].argsort(1).argsort(1) >= 4
    return more[0]


@pytest.mark.parametrize("name", PATCHES)
def test_a_method_that_hides_patches_needs_some(name: str) -> None:
    kind = type(make(name))
    with pytest.raises(UserError, match=rf"method={name} .* type backbone=vit_tiny"):
        kind(resnet())


@pytest.mark.parametrize("kind", [MAE, SimMIM])
@torch.no_grad()
def test_hidden_pixels_are_the_target_alone(kind: Callable) -> None:
    """The prediction doesn't see them, the loss doesn't see the others."""
    method = make(kind.__name__.lower()).eval()
    more = drawn(method, 3)
    hidden = mask_of(method, more)
    predictions = []

    def note(module: object, given: object, output: Tensor) -> None:
        predictions.append(output)

    last = method.decoder_pred if kind is MAE else method.decoder
    last.register_forward_hook(note)
    losses = [method([x], None, *more)["loss"] for x in (images(), painted(hidden))]
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=0)
    assert losses[0] != losses[1]
    assert 0 < hidden.sum() < hidden.numel()
    method([painted(~hidden)], None, *more)
    assert not torch.equal(predictions[2], predictions[0])


@torch.no_grad()
def test_maes_loss_by_hand() -> None:
    method = make("mae").eval()
    (noise,) = drawn(method, 3)
    predictions = []
    method.decoder_pred.register_forward_hook(lambda *noted: predictions.append(noted[2]))
    loss = method([images()], None, noise)["loss"]
    prediction, patches, errors = predictions[0][:, 1:], patchify(images(), 4), []
    for row, patch in mask_of(method, (noise,)).nonzero().tolist():
        pixels = patches[row, patch]
        wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
        errors.append((prediction[row, patch] - wanted).square().mean())
    assert len(errors) == 3 * 12
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@pytest.mark.parametrize("name", PATCHES)
def test_masks_differ_between_epochs_and_images(name: str) -> None:
    method, indices = make(name), torch.arange(32)
    first, again, later = (method.draw(keys(0, epoch, indices), indices) for epoch in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    part = method.draw(keys(0, 0, indices[8:16]), indices[8:16])
    of_images = 1 if name == "ijepa" else 0  # its contexts are cut to the shortest of the batch
    assert torch.equal(part[of_images], first[of_images][8:16])


def test_msn_is_that_of_the_paper() -> None:
    """Its loss, and its gradient for every parameter; what is left out of a view has no part."""
    method = make("msn").double().train()
    with torch.no_grad():
        for slow in (method.backbone, method.head):
            for parameter in slow.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    network, head = method.student_backbone, method.student_head
    target, anchor, small = (torch.rand(6, 3, size, size).double() for size in (16, 16, 8))
    (kept,) = drawn(method, 6)
    assert kept.shape == (6, 13)  # int(16 * 0.85)
    assert len({tuple(sorted(row.tolist())) for row in kept}) > 1  # each image's own

    def assigned(x: Tensor, prototypes: Tensor) -> Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return (unit @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T / 0.1).softmax(1)

    seen = network.tokens(anchor, keep=kept)[:, 0]  # the class token
    anchors = [assigned(head(x), method.prototypes) for x in (seen, network(small))]
    wanted = assigned(method.head(method.backbone(target)), method.prototypes).detach() ** 4
    wanted = wanted / wanted.sum(1, keepdim=True)
    for _ in range(3):  # prototypes are used evenly, then images have one each
        wanted = wanted / wanted.sum(0) / 32
        wanted = wanted / wanted.sum(1, keepdim=True) / 6
    cross = sum(-(6 * wanted * anchor.log()).sum(1).mean() for anchor in anchors) / 2
    mean = torch.cat(anchors).mean(0)
    expected = cross + torch.tensor(32.0).double().log() + (mean * mean.log()).sum()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, trained)
    loss = method([target, anchor, small], None, kept)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    hidden = torch.ones(6, 16, dtype=torch.bool).scatter_(1, kept, False)
    grid = hidden.view(6, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(grid, torch.rand(6, 3, 16, 16).double(), anchor)
    assert not torch.equal(changed, anchor)
    assert torch.equal(method([target, changed, small], None, kept)["loss"], loss)
    before = [p.clone() for p in method.backbone.parameters()]
    method.update(0.25)  # linearly from 0.996 to 1
    for ours, was, fast in zip(
        method.backbone.parameters(), before, network.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, 0.997 * was + 0.003 * fast)


def test_clusters_are_made_at_the_beginning_of_an_epoch() -> None:
    """Of what the memory has then; images that it doesn't have have no cluster, and no part."""
    method = make("deepcluster_v2").train()
    images = [torch.rand(8, 3, 16, 16) for _ in range(2)]
    method.memory[:, 4:6] = 0  # not seen yet
    method.begin(1.0, 3)
    (assignments, indices) = drawn(method, 8)
    assert (assignments[4:6] == -100).all()
    assert (assignments[[0, 1, 2, 3, 6, 7]] >= 0).all()
    output = method(images, None, assignments, indices)
    part = [0, 1, 2, 3, 6, 7]
    with torch.no_grad():
        crops = method.projector(method.backbone(torch.cat(images))).view(2, 8, -1)[:, part]
    torch.testing.assert_close(
        output["loss"], assignment_loss(crops, method.centroids, assignments[part], 0.1)
    )
    memory, clusters = method.memory.clone(), method.assignments.clone()
    method.begin(1.5, 3)
    assert torch.equal(method.assignments, clusters)
    method.update(0.5)
    assert (method.memory[:, :8] != memory[:, :8]).any(dim=2).all()  # the newest embeddings
    assert torch.equal(method.memory[:, 8:], memory[:, 8:])
    again = make("deepcluster_v2").train()  # from a checkpoint
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        torch.manual_seed(0)
        one.begin(2.0, 3)
    assert (method.assignments >= 0).all()
    assert torch.equal(again.assignments, method.assignments)
    assert torch.equal(again.centroids0, method.centroids0)


def test_more_clusters_than_images() -> None:
    method = make("deepcluster_v2")
    method.check(num_images=13, local_batch=4)
    with pytest.raises(UserError, match=r"method\.num_prototypes=\[12, 10\]: .* at most 10"):
        method.check(num_images=13, local_batch=5)
