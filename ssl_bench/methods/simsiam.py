"""SimSiam (Chen and He, arXiv:2011.10566)."""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of


@layers.full_precision
def negative_cosine(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Predictions, projections (N, D) of two views -> -(cos(p1, z2) + cos(p2, z1)) / 2 (eq. 2).

    The projections get no gradient.
    """
    cosines = [F.cosine_similarity(p, z.detach(), dim=1).mean() for p, z in ((p1, z2), (p2, z1))]
    return -(cosines[0] + cosines[1]) / 2


class SimSiam(Method):
    """BYOL without a slow copy: the predictor and the missing gradient alone prevent collapse.

    dim: width of the projector, three Linear-BN layers. predictor_dim: width of the predictor's
    bottleneck.
    """

    whole_batch = None

    def __init__(
        self, backbone: nn.Module, dim: PositiveInt = 2048, predictor_dim: PositiveInt = 512
    ) -> None:
        super().__init__(backbone)
        width = backbone.dim
        self.projector = layers.mlp(width, width, width, dim, norm=True, final_norm="plain")
        self.predictor = layers.mlp(dim, predictor_dim, dim, norm=True)

    def param_groups(self) -> list[dict]:
        """The predictor's rate is constant, as in the authors' code (--fix-pred-lr; 4.2)."""
        others = [*self.backbone.parameters(), *self.projector.parameters()]
        predictor = list(self.predictor.parameters())
        return [{"params": others}, {"params": predictor, "constant_lr": True}]

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        loss = negative_cosine(self.predictor(z1), self.predictor(z2), z1, z2)
        return {"loss": loss, "embeddings": health_of(z1, z2)}
