"""Transformation Invariance and Covariance Contrast, TiCo (Zhu et al., arXiv:2206.10698)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, ema_, health_of, momentum_copy, rising
from ssl_bench.runtime import distributed


@layers.full_precision
def tico_loss(
    z1: Tensor, z2: Tensor, covariance: Tensor, beta: float, rho: float
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) of two views, not normalised, covariance (D, D) -> the loss, the next one.

    The views agree, and the first stays off the directions in which most embeddings lie. The
    covariance is a moving average over batches, by `beta`, that has this one in it and gets no
    gradient. rho: weight of the second term.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    own = z1.detach()
    covariance = beta * covariance + (1 - beta) * own.T @ own / len(z1)
    invariance = 1 - (z1 * z2).sum(dim=1).mean()
    contrast = (z1 @ covariance * z1).sum(dim=1).mean()
    return invariance + rho * contrast, covariance


class TiCo(Method):
    """A view agrees with a slow copy's other view; embeddings keep a covariance of high rank.

    The first view alone learns. dim: width D of the embeddings. The projector is
    Linear-BN-ReLU-Linear. hidden_dim: its hidden width. momentum: the slow copy's; it rises to 1
    along a cosine. beta, rho: see `tico_loss`.
    """

    whole_batch = "its loss is of a covariance over the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 4096,
        momentum: Fraction = 0.99,
        beta: Fraction = 0.9,
        rho: NonNegativeFloat = 8.0,
    ) -> None:
        super().__init__(backbone)
        self.momentum, self.beta, self.rho = momentum, beta, rho
        self.projector = layers.mlp(backbone.dim, hidden_dim, dim, norm=True)
        self.target_backbone = momentum_copy(self.backbone)
        self.target_projector = momentum_copy(self.projector)
        self.register_buffer("covariance", torch.zeros(dim, dim))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1 = self.projector(self.backbone(views[0]))  # (N, D)
        with torch.no_grad():
            z2 = self.target_projector(self.target_backbone(views[1]))
        everyone = distributed.gather(z1), distributed.all_gather(z2)
        loss, self.newest = tico_loss(*everyone, self.covariance, self.beta, self.rho)
        return {"loss": loss, "embeddings": health_of(z1, z2)}

    def update(self, progress: float) -> None:
        self.covariance.copy_(self.newest)
        target = [self.target_backbone, self.target_projector]
        ema_(target, [self.backbone, self.projector], rising(self.momentum, progress))
