"""Masked Siamese Networks, MSN (Assran et al., arXiv:2204.07141)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.augment import masks
from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import (
    Method,
    Output,
    ema_,
    health_of,
    momentum_copy,
    need_patches,
)
from ssl_bench.methods.swav import sinkhorn
from ssl_bench.runtime import distributed

HIDES_PATCHES = True  # see `build`: which backbones have them


def assigned(x: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """x (N, D), prototypes (K, D), not normalised -> probabilities (N, K)."""
    similarities = F.normalize(x, dim=1) @ F.normalize(prototypes, dim=1).T
    return F.softmax(similarities / temperature, dim=1)


@torch.no_grad()
def sharpened(probabilities: Tensor, sharpening: float, balanced: bool) -> Tensor:
    """Probabilities (N, K) to the power 1 / `sharpening` -> targets (N, K).

    balanced: the images of all ranks use prototypes evenly, by three rounds of Sinkhorn and Knopp's
    algorithm.
    """
    sharp = probabilities ** (1 / sharpening)
    sharp = sharp / sharp.sum(dim=1, keepdim=True)
    if not balanced:
        return sharp
    everyone = sinkhorn(distributed.all_gather(sharp).log(), 1.0, 3)
    return everyone.chunk(distributed.world_size())[distributed.rank()]


def entropy(probabilities: Tensor) -> Tensor:
    """(..., K) -> (...)"""
    return torch.special.entr(probabilities).sum(dim=-1)


@layers.full_precision
def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    balanced: bool = True,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (V * N, D), view after view, and targets (N, D) -> loss, me_max, entropy.

    The cross-entropy of anchors' assignments to prototypes (K, D) with the targets' sharpened ones;
    how far the anchors' mean assignment, over all ranks, is from the uniform; the anchors' mean
    entropy. smoothing: of the prototypes' labels.
    """
    num = len(prototypes)
    labels = torch.full((num, num), smoothing / num, dtype=anchors.dtype, device=anchors.device)
    labels.diagonal().add_(1 - smoothing)
    probabilities = assigned(anchors, prototypes, temperature) @ labels
    wanted = assigned(targets.detach(), prototypes.detach(), temperature) @ labels
    wanted = sharpened(wanted, sharpening, balanced)
    wanted = wanted.repeat(len(anchors) // len(targets), 1)
    loss = -(wanted * probabilities.log()).sum(dim=1).mean()
    mean = distributed.mean_with_grad(probabilities.mean(dim=0))
    return loss, math.log(num) - entropy(mean), entropy(probabilities).mean()


class MSN(Method):
    """Views of an image, one without some patches, are assigned as a slow copy assigns another.

    The slow copy sees the first view; the second, of whose patches a share `mask_ratio` is left
    out, and the small ones are the anchors. Pretraining exports the slow copy. The head is
    Linear-BN-GELU-Linear-BN-GELU-Linear; dim, hidden_dim: its widths. num_prototypes: that are
    learnt, too. momentum: the slow copy's; it rises to 1 linearly. temperature, sharpening,
    balanced: see `msn_loss`. me_max_weight, entropy_weight: of its other terms.
    """

    whole_batch = "its codes are shared out among the images of the batch"
    takes_small_views = True

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 2048,
        num_prototypes: PositiveInt = 1024,
        mask_ratio: Fraction = 0.15,
        momentum: Fraction = 0.996,
        temperature: PositiveFloat = 0.1,
        sharpening: PositiveFloat = 0.25,
        balanced: bool = True,
        me_max_weight: NonNegativeFloat = 1.0,
        entropy_weight: NonNegativeFloat = 0.0,
    ) -> None:
        need_patches(backbone, "msn")
        super().__init__(momentum_copy(backbone))
        self.image_size, side = backbone.image_size, backbone.image_size // backbone.patch_size
        self.num_patches, self.mask_ratio, self.momentum = side**2, mask_ratio, momentum
        self.options = (temperature, sharpening, balanced)
        self.weights = (me_max_weight, entropy_weight)
        self.student_backbone = backbone
        widths = (backbone.dim, hidden_dim, hidden_dim, dim)
        self.student_head = layers.mlp(*widths, norm=True, activation=nn.GELU)
        for layer in self.student_head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.student_head[-1].bias)
        self.head = momentum_copy(self.student_head)
        bound = dim**-0.5
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, dim).uniform_(-bound, bound))

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """The patches (N, K) that stay."""
        return (masks.random_patches(masks.noise(keys, self.num_patches), self.mask_ratio)[0],)

    def forward(
        self, views: Sequence[Tensor], labels: Tensor | None = None, kept: Tensor | None = None
    ) -> Output:
        assert kept is not None
        small = views[self.num_views :]
        with torch.no_grad():
            targets = self.head(self.backbone(views[0]))  # (N, D)
        seen = self.student_backbone.pooled(self.student_backbone.tokens(views[1], keep=kept))
        anchors = [self.student_head(seen)]
        if small:
            anchors.append(self.student_head(self.student_backbone(torch.cat(tuple(small)))))
        loss, me_max, spread = msn_loss(torch.cat(anchors), targets, self.prototypes, *self.options)
        total = loss + self.weights[0] * me_max + self.weights[1] * spread
        return {
            "loss": total,
            "msn": loss.detach(),
            "me_max": me_max.detach(),
            "entropy": spread.detach(),
            "embeddings": health_of(targets, anchors[0]),
        }

    def update(self, progress: float) -> None:
        momentum = self.momentum + (1 - self.momentum) * progress
        ema_([self.backbone, self.head], [self.student_backbone, self.student_head], momentum)
