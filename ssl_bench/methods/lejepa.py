"""LeJEPA (Balestriero and LeCun, arXiv:2511.08544)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, by_size, health_of
from ssl_bench.runtime import distributed


def epps_pulley(x: Tensor, t_max: float = 3.0, num_points: int = 17) -> Tensor:
    """x (..., N, K): K samples of N numbers each -> (..., K), how far each is from a Gaussian.

    The squared distance of the sample's characteristic function from the standard normal's,
    weighted by the latter, over `num_points` points from 0 to t_max (algorithm 1). It grows with N,
    the images of all ranks.
    """
    t = torch.linspace(0, t_max, num_points, dtype=x.dtype, device=x.device)
    gaussian = torch.exp(-t.square() / 2)
    weights = 2 * t_max / (num_points - 1) * gaussian  # twice: the integrand is even
    weights[0] /= 2  # trapezia
    weights[-1] /= 2
    angles = x.unsqueeze(-1) * t  # (..., N, K, points)
    real = distributed.mean_with_grad(angles.cos().mean(dim=-3))  # (..., K, points)
    imaginary = distributed.mean_with_grad(angles.sin().mean(dim=-3))
    distance = (real - gaussian).square() + imaginary.square()
    return distance @ weights * (x.shape[-2] * distributed.world_size())


@layers.full_precision
def sigreg(z: Tensor, directions: Tensor, t_max: float = 3.0, num_points: int = 17) -> Tensor:
    """Sketched isotropic Gaussian regularisation: z (..., N, D), directions (D, K) of norm 1.

    The mean statistic of the embeddings projected on the directions (algorithm 1).
    """
    return epps_pulley(z @ directions, t_max, num_points).mean()


@layers.full_precision
def lejepa_loss(
    views: Sequence[Tensor],
    directions: Tensor,
    lambd: float,
    num_global: int | None = None,
    t_max: float = 3.0,
    num_points: int = 17,
) -> Tensor:
    """Embeddings V times (N, D) -> (1 - lambd) * invariance + lambd * SIGReg (algorithm 2).

    Each view is drawn to the mean of the image's first `num_global` views; None: of all.
    """
    z = torch.stack(tuple(views))
    center = z[:num_global].mean(dim=0)
    invariance = (z - center).square().mean()
    regularisation = sigreg(z, directions, t_max, num_points)
    return (1 - lambd) * invariance + lambd * regularisation


class LeJEPA(Method):
    """Views of an image agree, and embeddings are distributed as an isotropic Gaussian.

    No teacher, no stopped gradient, no predictor. dim: width D of the embeddings. The projector is
    Linear-BN-ReLU-Linear-BN-ReLU-Linear. lambd: weight of the regularisation. num_directions: on so
    many, drawn anew for each step, the embeddings are projected. t_max, num_points: where their
    characteristic functions are compared.
    """

    whole_batch = "its loss is of the distribution of the batch"
    takes_small_views = True

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 128,
        hidden_dim: PositiveInt = 2048,
        lambd: Fraction = 0.02,
        num_directions: PositiveInt = 256,
        t_max: PositiveFloat = 3.0,
        num_points: PositiveInt = 17,
    ) -> None:
        super().__init__(backbone)
        self.lambd, self.t_max, self.num_points = lambd, t_max, num_points
        self.projector = layers.mlp(backbone.dim, hidden_dim, hidden_dim, dim, norm=True)
        self.register_buffer("directions", torch.empty(dim, num_directions), persistent=False)

    def begin(self, epoch: float, epochs: int) -> None:
        """Here, and not in the forward pass: compiled, it would draw other numbers."""
        directions = F.normalize(torch.randn_like(self.directions), dim=0)
        self.directions.copy_(distributed.broadcast(directions))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        # all views in one pass, as in the authors' code
        z = self.projector(by_size(self.backbone, views)).chunk(len(views))  # V x (N, D)
        loss = lejepa_loss(
            z, self.directions, self.lambd, self.num_views, self.t_max, self.num_points
        )
        return {"loss": loss, "embeddings": health_of(*z[: self.num_views])}
