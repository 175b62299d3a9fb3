"""Relational self-supervised learning, ReSSL (Zheng et al., arXiv:2107.09282)."""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Output, health_of, momentum_copy
from ssl_bench.methods.moco import MoCo

DIVIDES = {"bn_splits": "batch_size / devices"}  # see `build`


@layers.full_precision
def relation_loss(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, key_temperature: float
) -> Tensor:
    """Cross-entropy of two views' similarities to a queue (section 3.2).

    query, key (N, D), not normalised; queue (D, K) of norm 1. The key's distribution over the
    queue, the sharper one, is the target.
    """
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    target = F.softmax(key @ queue / key_temperature, dim=1).detach()
    prediction = F.log_softmax(query @ queue / temperature, dim=1)
    return -(target * prediction).sum(dim=1).mean()


class ReSSL(MoCo):
    """A query is as similar to the images of a queue as its key, a weak view seen by a slow copy.

    Encoders, shuffled batch norm and queue are MoCo's. dim: width D of the embeddings. The head is
    Linear-ReLU-Linear. hidden_dim: its hidden width. temperature, key_temperature: of the queries'
    and of the keys' similarities. The others: see MoCo.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 512,
        hidden_dim: PositiveInt = 4096,
        queue_size: PositiveInt = 131072,
        momentum: Fraction = 0.999,
        temperature: PositiveFloat = 0.1,
        key_temperature: PositiveFloat = 0.04,
        bn_splits: PositiveInt | None = None,
        batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(
            backbone,
            dim,
            queue_size,
            momentum,
            temperature,
            bn_splits=bn_splits,
            batch_size=batch_size,
        )
        self.key_temperature = key_temperature
        self.head = layers.mlp(backbone.dim, hidden_dim, dim)
        self.key_head = momentum_copy(self.head)

    def forward(
        self,
        views: Sequence[Tensor],
        labels: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Output:
        """views: query and key images, (N, 3, H, W) each. key: see `ahead`."""
        query, key = self.encode(views, key)
        queue = self.queue.keys
        loss = relation_loss(query, key, queue, self.temperature, self.key_temperature)
        return {"loss": loss, "embeddings": health_of(query, key)}
