"""NNCLR (Dwibedi et al., arXiv:2104.14548)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of
from ssl_bench.runtime import distributed


@torch.no_grad()
@layers.full_precision
def nearest(z: Tensor, queue: Tensor) -> Tensor:
    """Indices (N,) in the normalised queue (D, K) of the nearest to each of z (N, D)."""
    return (F.normalize(z, dim=1) @ queue).argmax(dim=1)


@layers.full_precision
def nnclr_loss(neighbours: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """Neighbours of one view, predictions of the other, (N, D) each -> InfoNCE (section 3.2).

    Each neighbour finds its image's prediction among those of all images. Neither is normalised
    yet.
    """
    neighbours, predictions = F.normalize(neighbours, dim=1), F.normalize(predictions, dim=1)
    logits = neighbours @ predictions.T / temperature  # (N, N)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class NNCLR(Method):
    """The positive of a view is the other view's nearest neighbour among earlier images.

    dim: width D of the embeddings. The projector is Linear-BN-ReLU-Linear-BN-ReLU-Linear-BN, the
    predictor Linear-BN-ReLU-Linear. hidden_dim, predictor_dim: their hidden widths. queue_size: the
    number K of earlier images.
    """

    whole_batch = "its negatives are the other images of the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 2048,
        predictor_dim: PositiveInt = 4096,
        queue_size: PositiveInt = 98304,
        temperature: PositiveFloat = 0.1,
    ) -> None:
        super().__init__(backbone)
        self.temperature = temperature
        # The predictor's norm would take out a shift of the last one: its gradient is zero.
        widths = (backbone.dim, hidden_dim, hidden_dim, dim)
        self.projector = layers.mlp(*widths, norm=True, final_norm="scaled")
        self.predictor = layers.mlp(dim, predictor_dim, dim, norm=True)
        self.queue = layers.Queue(dim, queue_size)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        neighbours1, neighbours2 = (self.neighbours(z) for z in (z1, z2))
        p1, p2 = (distributed.gather(self.predictor(z)) for z in (z1, z2))
        loss = nnclr_loss(neighbours1, p2, self.temperature) / 2
        loss = loss + nnclr_loss(neighbours2, p1, self.temperature) / 2
        self.newest = self.normalized(distributed.all_gather(z1))
        return {"loss": loss, "embeddings": health_of(z1, z2)}

    def neighbours(self, z: Tensor) -> Tensor:
        """z (N, D) of this rank -> the nearest in the queue (world * N, D), of all ranks."""
        return self.queue.keys.T[nearest(distributed.all_gather(z), self.queue.keys)]

    @torch.no_grad()
    def normalized(self, z: Tensor) -> Tensor:
        return F.normalize(z.to(self.queue.keys.dtype), dim=1)

    def update(self, progress: float) -> None:
        """The first view of each image goes into the queue, after its neighbours were found."""
        self.queue.enqueue(self.newest)
