"""Whitening for self-supervision, W-MSE (Ermolov et al., arXiv:2007.06346)."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.errors import UserError
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed

DIVIDES = {"whitening_size": "batch_size"}  # see `build`


@layers.full_precision
def whiten(x: Tensor, eps: float = 0.0) -> Tensor:
    """x (..., N, D) -> centred and decorrelated, of variance 1 in each dimension.

    By the inverse of the Cholesky factor of the covariance, which is mixed with a share `eps` of
    the identity (section 3). NaN if the covariance has no factor.
    """
    centred = x - x.mean(dim=-2, keepdim=True)
    covariance = centred.mT @ centred / (x.shape[-2] - 1)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # the one that raises an error waits for the device
    factor, failed = torch.linalg.cholesky_ex((1 - eps) * covariance + eps * identity)
    factor = factor.masked_fill(failed[..., None, None] > 0, torch.nan)
    return torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT


@layers.full_precision
def w_mse_loss(
    views: Sequence[Tensor], orders: Tensor, size: int, eps: float = 0.0, normalized: bool = True
) -> Tensor:
    """Embeddings V times (N, D) -> mean distance of the whitened views, over all pairs (section 3).

    orders: permutations (I, N); for each of them the images are cut in that order into parts of
    `size`, the same in all views, and each part of each view is whitened by itself.
    normalized: 2 - 2 cos instead of the mean squared difference.
    """
    parts = torch.stack(tuple(views))[:, orders]  # (V, I, N, D)
    parts = parts.unflatten(2, (-1, size))  # (V, I, N / size, size, D)
    white = whiten(parts, eps).flatten(1, 3)  # (V, I * N, D)
    losses = []
    for one, other in combinations(white, 2):
        if normalized:
            losses.append(2 - 2 * F.cosine_similarity(one, other, dim=1).mean())
        else:
            losses.append(F.mse_loss(one, other))
    return torch.stack(losses).mean()


class WMSE(Method):
    """Views agree after whitening, which keeps the embeddings from collapsing.

    dim: width D of the embeddings. The head is Linear-BN-ReLU-Linear. whitening_size: so many
    images are whitened together; at least 2 D, better 4 D. whitening_iterations: over so many
    divisions of the batch. eps: see `whiten`. normalized: see `w_mse_loss`.
    """

    whole_batch = "it whitens the embeddings of the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 64,
        hidden_dim: PositiveInt = 1024,
        whitening_size: PositiveInt = 128,
        whitening_iterations: PositiveInt = 1,
        eps: Fraction = 0.0,
        normalized: bool = True,
    ) -> None:
        super().__init__(backbone)
        self.size, self.iterations = whitening_size, whitening_iterations
        self.eps, self.normalized = eps, normalized
        # without the last bias of the authors' code, which the whitening would take out again
        self.head = layers.mlp(backbone.dim, hidden_dim, dim, norm=True, final_bias=False)
        if whitening_size <= dim:
            raise UserError(
                f"method.whitening_size={whitening_size}: so few images can't be whitened in "
                f"method.dim={dim} dimensions: choose method.whitening_size={2 * dim} or more"
            )

    def check(self, num_images: int, local_batch: int) -> None:
        batch = local_batch * distributed.world_size()
        if batch % self.size:
            raise UserError(
                f"method.whitening_size={self.size} does not divide batch_size={batch}: "
                "change one of the two"
            )

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        # views pass the backbone one by one, the head together, as in the authors' code
        z = self.head(torch.cat([self.backbone(view) for view in views]))
        views_z = z.chunk(len(views))  # V x (N, D)
        everyone = [distributed.gather(view) for view in views_z]
        count, device = len(everyone[0]), z.device
        orders = [torch.randperm(count, device=device) for _ in range(self.iterations)]
        shared = distributed.broadcast(torch.stack(orders))
        loss = w_mse_loss(everyone, shared, self.size, self.eps, self.normalized)
        return {"loss": loss, "embeddings": health_of(*views_z)}
