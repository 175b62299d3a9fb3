"""VICReg (Bardes et al., arXiv:2105.04906)."""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed


@layers.full_precision
def vicreg_loss(
    z1: Tensor, z2: Tensor, sim_coeff: float, std_coeff: float, cov_coeff: float
) -> Tensor:
    """Embeddings (N, D) of two views -> weighted invariance, variance, covariance (section 4.1)."""
    variance = covariance = z1.new_zeros(())
    for z in (z1, z2):
        z = z - z.mean(dim=0)
        variance = variance + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2
        matrix = z.T @ z / (len(z) - 1)
        covariance = covariance + layers.off_diagonal(matrix).square().sum() / z.shape[1]
    return sim_coeff * F.mse_loss(z1, z2) + std_coeff * variance + cov_coeff * covariance


class VICReg(Method):
    """Views agree; each dimension keeps its variance, and is uncorrelated with the others.

    The expander is Linear-BN-ReLU-Linear-BN-ReLU-Linear. dim: the width of its layers.
    """

    whole_batch = "its loss is of variances and covariances over the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 8192,
        sim_coeff: NonNegativeFloat = 25.0,
        std_coeff: NonNegativeFloat = 25.0,
        cov_coeff: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__(backbone)
        self.coefficients = sim_coeff, std_coeff, cov_coeff
        self.expander = layers.mlp(backbone.dim, dim, dim, dim, norm=True, final_bias=False)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.expander(self.backbone(view)) for view in views)  # (N, D)
        loss = vicreg_loss(distributed.gather(z1), distributed.gather(z2), *self.coefficients)
        # Not the spread of the normalised embeddings, but the one that the variance term keeps at 1
        # and that may shrink to 0.
        spread = z1.detach().std(dim=0).mean()
        return {"loss": loss, "embeddings": health_of(z1, z2), "embedding_std": spread}
