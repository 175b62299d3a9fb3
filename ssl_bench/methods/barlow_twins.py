"""Barlow Twins (Zbontar et al., arXiv:2103.03230)."""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed


@layers.full_precision
def cross_correlation_loss(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """Embeddings (N, D) of two views -> how far their cross-correlation (D, D) is from the identity
    (equation 1).
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)
    return (correlation.diagonal() - 1).square().sum() + lambd * layers.off_diagonal(
        correlation
    ).square().sum()


class BarlowTwins(Method):
    """Each dimension of the embedding agrees between the views, and with no other dimension.

    dim: width of the projector, three layers Linear-BN-ReLU and at the end Linear. lambd: weight of
    the second part.
    """

    def __init__(
        self, backbone: nn.Module, dim: PositiveInt = 8192, lambd: NonNegativeFloat = 0.0051
    ) -> None:
        super().__init__(backbone)
        self.lambd = lambd
        self.projector = layers.mlp(backbone.dim, dim, dim, dim, norm=True, final_bias=False)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        # Of the whole batch on every rank. The authors sum the matrix over ranks without autograd:
        # the same loss, and this gradient divided by the number of ranks, which LARS makes good for
        # weights, but not for biases.
        loss = cross_correlation_loss(distributed.gather(z1), distributed.gather(z2), self.lambd)
        return {"loss": loss, "embeddings": health_of(z1, z2)}
