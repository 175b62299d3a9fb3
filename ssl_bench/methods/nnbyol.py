"""BYOL whose target is a neighbour's: NNBYOL of solo-learn, after NNCLR (arXiv:2104.14548)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Output, health_of
from ssl_bench.methods.byol import BYOL, regression_loss
from ssl_bench.methods.nnclr import nearest
from ssl_bench.runtime import distributed


class NNBYOL(BYOL):
    """The online network predicts the earlier target that is nearest to the other view's.

    queue_size: number of earlier targets. The others: see BYOL.
    """

    whole_batch = "its queue takes the targets of the whole batch at once"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 4096,
        momentum: Fraction = 0.99,
        queue_size: PositiveInt = 65536,
    ) -> None:
        super().__init__(backbone, dim, hidden_dim, momentum)
        self.queue = layers.Queue(dim, queue_size)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        with torch.no_grad():
            targets = [self.target_projector(self.target_backbone(view)) for view in views]
            neighbour1, neighbour2 = (
                self.queue.keys.T[nearest(target, self.queue.keys)] for target in targets
            )
            newest = distributed.all_gather(targets[0]).to(self.queue.keys.dtype)
            self.newest = F.normalize(newest, dim=1)
        loss = regression_loss(self.predictor(z1), neighbour2)
        loss = loss + regression_loss(self.predictor(z2), neighbour1)
        return {"loss": loss, "embeddings": health_of(z1, z2)}

    def update(self, progress: float) -> None:
        """The first view's targets go into the queue, after their neighbours were found."""
        super().update(progress)
        self.queue.enqueue(self.newest)
