"""Decoupled Contrastive Learning (Yeh et al., arXiv:2110.06848)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed


def one_way(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    sigma: float | None = None,
    detach_weights: bool = False,
) -> Tensor:
    """Normalised embeddings (N, D) of two views -> the loss of the first view's.

    sigma: see `dcl_loss`.
    """
    similarity = (z1 * z2).sum(dim=1)  # (N,), of the positives
    weights = torch.ones_like(similarity)
    if sigma is not None:
        weights = 2 - len(z1) * F.softmax(similarity / sigma, dim=0)
    if detach_weights:
        weights = weights.detach()
    logits = torch.cat([z1 @ z1.T, z1 @ z2.T], dim=1) / temperature  # (N, 2N)
    own = torch.eye(len(z1), dtype=torch.bool, device=z1.device).repeat(1, 2)
    negatives = logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
    return (negatives - weights * similarity / temperature).mean()


@layers.full_precision
def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    sigma: float | None = None,
    detach_weights: bool = False,
) -> Tensor:
    """Embeddings (N, D) of two views, not normalised yet -> InfoNCE without its own positive.

    The positive doesn't stand in the denominator, so that easy positives don't take the gradient
    from the negatives (section 3). The mean of both directions. sigma: positives that are far from
    each other count more, by von Mises-Fisher weights (DCLW); None: all the same.
    detach_weights: no gradient through these.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    options = (temperature, sigma, detach_weights)
    return (one_way(z1, z2, *options) + one_way(z2, z1, *options)) / 2


class DCL(Method):
    """SimCLR with positives left out of the denominator.

    dim: width D of the embeddings. The projector is SimCLR's. hidden_dim: its hidden width, None:
    the width of the features. sigma: see `dcl_loss`; None: DCL, a number: DCLW.
    """

    whole_batch = "its negatives are the other images of the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 128,
        hidden_dim: PositiveInt | None = None,
        temperature: PositiveFloat = 0.1,
        sigma: PositiveFloat | None = None,
    ) -> None:
        super().__init__(backbone)
        self.temperature, self.sigma = temperature, sigma
        width = backbone.dim
        self.projector = layers.mlp(width, hidden_dim or width, dim, norm=True, final_norm="scaled")

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        # in one pass, so that batch norm sees both views together, as in SimCLR's code
        z1, z2 = self.projector(self.backbone(torch.cat(tuple(views)))).chunk(2)  # (N, D)
        everyone = (distributed.gather(z) for z in (z1, z2))
        loss = dcl_loss(*everyone, self.temperature, self.sigma)
        return {"loss": loss, "embeddings": health_of(z1, z2)}
