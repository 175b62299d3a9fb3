"""SimCLR (Chen et al., arXiv:2002.05709)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed


@layers.full_precision
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Embeddings (N, D) of two views -> mean cross-entropy over all 2N anchors (section 2.1).

    Embeddings aren't normalised yet. The authors' code has twice this loss, which LARS makes up for
    in weights, but not in biases.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    # (2N, 2N); an image is no negative of itself
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, positives)


class SimCLR(Method):
    """Each view of an image finds the other view among all images of the batch.

    dim: width D of the embeddings. The projector is Linear-BN-ReLU-Linear-BN. hidden_dim: its
    hidden width, None: the width of the features.
    """

    whole_batch = "its negatives are the other images of the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 128,
        hidden_dim: PositiveInt | None = None,
        temperature: PositiveFloat = 0.1,
    ) -> None:
        super().__init__(backbone)
        self.temperature = temperature
        # The last batch norm scales and doesn't shift, as in the authors' model_util.py.
        width = backbone.dim
        self.projector = layers.mlp(width, hidden_dim or width, dim, norm=True, final_norm="scaled")

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        # in one pass, so that batch norm sees both views together, as in the authors' code
        z1, z2 = self.projector(self.backbone(torch.cat(tuple(views)))).chunk(2)  # (N, D)
        loss = nt_xent(distributed.gather(z1), distributed.gather(z2), self.temperature)
        return {"loss": loss, "embeddings": health_of(z1, z2)}
