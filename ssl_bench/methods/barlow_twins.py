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
    """Embeddings (N, D) of two views -> distance of their cross-correlation from the identity.

    The cross-correlation is (D, D); the loss is equation 1.
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)
    invariance = (correlation.diagonal() - 1).square().sum()
    redundancy = layers.off_diagonal(correlation).square().sum()
    return invariance + lambd * redundancy


class BarlowTwins(Method):
    """Each dimension of the embedding agrees between the views, and with no other dimension.

    The projector is Linear-BN-ReLU-Linear-BN-ReLU-Linear. dim: the width of its layers. lambd: the
    weight of the redundancy, the loss's second part.
    """

    whole_batch = "its loss is of correlations over the batch"

    def __init__(
        self, backbone: nn.Module, dim: PositiveInt = 8192, lambd: NonNegativeFloat = 0.0051
    ) -> None:
        super().__init__(backbone)
        self.lambd = lambd
        self.projector = layers.mlp(backbone.dim, dim, dim, dim, norm=True, final_bias=False)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        # Every rank computes the loss of the whole batch. The authors sum the matrix over ranks
        # without autograd: the same loss, with this gradient divided by the number of ranks, which
        # LARS makes up for in weights, but not in biases.
        loss = cross_correlation_loss(distributed.gather(z1), distributed.gather(z2), self.lambd)
        return {"loss": loss, "embeddings": health_of(z1, z2)}
