"""Bootstrap Your Own Latent (Grill et al., arXiv:2006.07733)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, ema_, health_of, momentum_copy, rising


@layers.full_precision
def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, D) each, not normalised -> 2 - 2 cos, averaged over the batch (equation 2).

    The target gets no gradient.
    """
    return 2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=1).mean()


class BYOL(Method):
    """The online network predicts what a slow copy of it, the target, makes of the other view.

    momentum: the target's; it rises to 1 along a cosine. Projector and predictor are
    Linear-BN-ReLU-Linear.
    """

    whole_batch: str | None = None

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 4096,
        momentum: Fraction = 0.996,
    ) -> None:
        super().__init__(backbone)
        self.momentum = momentum
        self.projector = layers.mlp(backbone.dim, hidden_dim, dim, norm=True, final_bias=False)
        self.predictor = layers.mlp(dim, hidden_dim, dim, norm=True, final_bias=False)
        self.target_backbone = momentum_copy(self.backbone)
        self.target_projector = momentum_copy(self.projector)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        with torch.no_grad():
            target1, target2 = (self.target_projector(self.target_backbone(view)) for view in views)
        loss = regression_loss(self.predictor(z1), target2)
        loss = loss + regression_loss(self.predictor(z2), target1)
        return {"loss": loss, "embeddings": health_of(z1, z2)}

    def update(self, progress: float) -> None:
        target = [self.target_backbone, self.target_projector]
        ema_(target, [self.backbone, self.projector], rising(self.momentum, progress))
