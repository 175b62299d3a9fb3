"""The floor and the ceiling of a table: an untrained network, and one trained with labels."""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, health_of


class Random(Method):
    """The network as initialised; nothing is trained."""

    learns = False


class Supervised(Method):
    """Cross-entropy with the labels of the training split."""

    whole_batch = None
    num_views = 1
    split = "train"

    def __init__(self, backbone: nn.Module, num_classes: PositiveInt) -> None:
        super().__init__(backbone)
        self.fc = nn.Linear(backbone.dim, num_classes)

    def measured(self) -> nn.Module:
        return self  # the layer on top of the backbone, too

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        features = self.backbone(views[0])
        logits = self.fc(features)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        loss = layers.full_precision(F.cross_entropy)(logits, labels)
        return {"loss": loss, "accuracy": accuracy.detach(), "embeddings": health_of(features)}
