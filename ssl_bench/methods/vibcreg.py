"""VICReg with a better covariance term, VIbCReg (Lee and Aune, arXiv:2109.00783)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed

DIVIDES = {"num_groups": "dim"}  # see `build`


def correlation(z: Tensor) -> Tensor:
    """z (N, D) -> the mean of the D * D squared correlations, those of a dimension with itself 0.

    The "better covariance": its scale doesn't depend on D, nor on the scale of z.
    """
    directions = F.normalize(z - z.mean(dim=0), dim=0)
    return layers.off_diagonal(directions.T @ directions).square().sum() / z.shape[1] ** 2


@layers.full_precision
def vibcreg_loss(
    z1: Tensor, z2: Tensor, sim_coeff: float, std_coeff: float, cov_coeff: float
) -> Tensor:
    """Embeddings (N, D) of two views -> weighted invariance, variance, correlation."""
    variance = sum(F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() for z in (z1, z2))
    covariance = correlation(z1) + correlation(z2)
    return sim_coeff * F.mse_loss(z1, z2) + std_coeff * variance + cov_coeff * covariance


@layers.full_precision
def iterative_whitening(x: Tensor, num_groups: int, iterations: int, eps: float = 1e-5) -> Tensor:
    """x (N, D) -> centred, and nearly decorrelated in each of `num_groups` groups of dimensions.

    By so many of Newton's steps towards the inverse root of the covariance: IterNorm (Huang et al.,
    arXiv:1904.03441, algorithm 1).
    """
    groups = (x - x.mean(dim=0)).unflatten(1, (num_groups, -1)).transpose(0, 1)  # (G, N, D / G)
    identity = torch.eye(groups.shape[2], dtype=x.dtype, device=x.device)
    covariance = groups.mT @ groups / len(x) + eps * identity
    trace = covariance.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    covariance = covariance / trace  # its eigenvalues are below 1, so that the steps converge
    root = identity.expand_as(covariance)
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * root @ root @ root @ covariance
    return (groups @ root / trace.sqrt()).transpose(0, 1).flatten(1)


class VIbCReg(Method):
    """VICReg with correlations in the place of covariances, and whitened embeddings.

    dim: the width of the embeddings, hidden_dim: of the hidden layers of the projector, which is
    Linear-BN-GELU-Linear-BN-GELU-Linear-IterNorm. num_groups: in so many groups of dimensions they
    are whitened (`iterative_whitening`); 0: not at all.
    """

    whole_batch = "its loss is of variances and covariances over the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 2048,
        hidden_dim: PositiveInt = 2048,
        num_groups: NonNegativeInt = 64,
        whitening_iterations: PositiveInt = 5,
        sim_coeff: NonNegativeFloat = 25.0,
        std_coeff: NonNegativeFloat = 25.0,
        cov_coeff: NonNegativeFloat = 200.0,
    ) -> None:
        super().__init__(backbone)
        if num_groups and dim % num_groups:
            raise UserError(
                f"method.num_groups={num_groups} does not divide method.dim={dim}: "
                "change one of the two, or type method.num_groups=0"
            )
        self.coefficients = sim_coeff, std_coeff, cov_coeff
        self.num_groups, self.iterations = num_groups, whitening_iterations
        widths = (backbone.dim, hidden_dim, hidden_dim, dim)
        # without a last bias, and without IterNorm's: no term of the loss sees a shift
        self.projector = layers.mlp(*widths, norm=True, final_bias=False, activation=nn.GELU)
        if num_groups:
            self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.embed(view) for view in views)  # (world * N, D)
        loss = vibcreg_loss(z1, z2, *self.coefficients)
        spread = z1.detach().std(dim=0).mean()  # see vicreg.py
        return {"loss": loss, "embeddings": health_of(z1, z2), "embedding_std": spread}

    def embed(self, view: Tensor) -> Tensor:
        """(N, 3, H, W) -> the embeddings of all ranks, which are whitened together."""
        z = distributed.gather(self.projector(self.backbone(view)))
        if self.num_groups:
            z = iterative_whitening(z, self.num_groups, self.iterations) * self.weight
        return z
