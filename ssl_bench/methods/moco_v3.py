"""MoCo v3 (Chen, Xie and He, arXiv:2104.02057)."""

import logging
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, ema_, health_of, momentum_copy, rising
from ssl_bench.runtime import distributed

log = logging.getLogger(__name__)


@layers.full_precision
def contrastive_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """query, key (N, D), not normalised -> InfoNCE within the batch of all ranks, times 2T.

    Algorithm 1.
    """
    query = F.normalize(query, dim=1)
    keys = distributed.all_gather(F.normalize(key, dim=1))  # without gradient
    logits = query @ keys.T / temperature  # (N, world * N)
    target = torch.arange(len(query), device=query.device) + len(query) * distributed.rank()
    return F.cross_entropy(logits, target) * 2 * temperature


class MoCoV3(Method):
    """MoCo without a queue: the keys are the batch's own; queries pass a predictor as well.

    The heads are those of the authors' ResNet: projector Linear-BN-ReLU-Linear-BN, predictor
    Linear-BN-ReLU-Linear. For ViTs the authors have projector_layers=3 and predictor_norm, batch
    norm after the predictor's last layer. momentum: the key encoder's; it rises to 1 along a
    cosine.
    """

    whole_batch = "its negatives are the other images of the batch"

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 4096,
        momentum: Fraction = 0.99,
        temperature: PositiveFloat = 1.0,
        projector_layers: PositiveInt = 2,
        predictor_norm: bool = False,
    ) -> None:
        super().__init__(backbone)
        self.momentum, self.temperature = momentum, temperature
        hidden = (hidden_dim,) * (projector_layers - 1)
        self.projector = layers.mlp(backbone.dim, *hidden, dim, norm=True, final_norm="plain")
        final_norm: Literal["plain"] | None = "plain" if predictor_norm else None
        self.predictor = layers.mlp(
            dim, hidden_dim, dim, norm=True, final_norm=final_norm, final_bias=False
        )
        attends = any("Attention" in type(module).__name__ for module in backbone.modules())
        if projector_layers == 2 and attends:
            log.warning(
                "method=moco_v3 is the authors' recipe for ResNets; "
                "for ViTs they have method=moco_v3_vit"
            )
        self.key_backbone = momentum_copy(self.backbone)
        self.key_projector = momentum_copy(self.projector)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (N, D)
        with torch.no_grad():
            key1, key2 = (self.key_projector(self.key_backbone(view)) for view in views)
        loss = contrastive_loss(self.predictor(z1), key2, self.temperature)
        loss = loss + contrastive_loss(self.predictor(z2), key1, self.temperature)
        return {"loss": loss, "embeddings": health_of(z1, z2)}

    def update(self, progress: float) -> None:
        """The authors do the same before the keys of the next step, and by that step's momentum."""
        momentum = rising(self.momentum, progress)
        ema_([self.key_backbone, self.key_projector], [self.backbone, self.projector], momentum)
