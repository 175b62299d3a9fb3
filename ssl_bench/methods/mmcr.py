"""Maximum Manifold Capacity Representations, MMCR (Yerxa et al., arXiv:2303.03307)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, ema_, health_of, momentum_copy
from ssl_bench.runtime import distributed


@layers.full_precision
def mmcr_loss(z: Tensor, lambd: float = 0.0, slow: Tensor | None = None) -> Tensor:
    """Embeddings (N, V, D) of V views of N images, not normalised -> the loss.

    The images' mean directions span much (their nuclear norm is large), the views of an image
    little, by a weight of `lambd`. slow: those of a slow copy, (N, V, D), which count half in the
    means.
    """
    z = F.normalize(z, dim=-1)
    centroids = z.mean(dim=1)  # (N, D)
    if slow is not None:
        centroids = (centroids + F.normalize(slow, dim=-1).mean(dim=1)) / 2
    loss = -torch.linalg.svdvals(centroids).sum()
    if lambd:
        loss = loss + lambd * torch.linalg.svdvals(z.mT).sum() / len(z)
    return loss


class MMCR(Method):
    """Mean directions of images fill the space; the views of an image lie close to each other.

    num_views: V. The projector is Linear-BN-ReLU-Linear-BN-ReLU-Linear, without biases before a
    norm. dim, hidden_dim: its widths. momentum: the slow copy's, which sees all views, too. lambd:
    see `mmcr_loss`.
    """

    whole_batch = "its loss is of the singular values of the batch"

    def __init__(
        self,
        backbone: nn.Module,
        num_views: PositiveInt = 2,
        dim: PositiveInt = 512,
        hidden_dim: PositiveInt = 8192,
        momentum: Fraction = 0.99,
        lambd: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(backbone)
        self.num_views, self.momentum, self.lambd = num_views, momentum, lambd
        widths = (backbone.dim, hidden_dim, hidden_dim, dim)
        self.projector = layers.mlp(*widths, norm=True, final_bias=False)
        self.slow_backbone = momentum_copy(self.backbone)
        self.slow_projector = momentum_copy(self.projector)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        images = torch.cat(tuple(views))  # in one pass, as in the authors' code
        z = self.projector(self.backbone(images)).unflatten(0, (len(views), -1))  # (V, N, D)
        with torch.no_grad():
            slow = self.slow_projector(self.slow_backbone(images)).unflatten(0, (len(views), -1))
        everyone = distributed.gather(z.transpose(0, 1))  # (world * N, V, D)
        loss = mmcr_loss(everyone, self.lambd, distributed.all_gather(slow.transpose(0, 1)))
        return {"loss": loss, "embeddings": health_of(*z)}

    def update(self, progress: float) -> None:
        slow = [self.slow_backbone, self.slow_projector]
        ema_(slow, [self.backbone, self.projector], self.momentum)
