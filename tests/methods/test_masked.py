"""Methods that hide patches: what they see, and what their losses look at."""

from collections.abc import Callable

import pytest
import torch
from small_methods import PATCHES, drawn, make, resnet
from torch import Tensor

from ssl_bench.augment.draws import keys
from ssl_bench.errors import UserError
from ssl_bench.methods.base import Method
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
