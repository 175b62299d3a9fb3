"""Momentum Contrast: v1 (He et al., arXiv:1911.05722) and v2 (Chen et al., arXiv:2003.04297)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench import distributed
from ssl_bench.errors import UserError
from ssl_bench.fields import Fraction
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, ema_, health_of, momentum_copy


def info_nce_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """query, key (N, D) and queue (D, K), all normalised -> (N, 1 + K); the positive comes first."""
    query = query / temperature  # here and not the logits, which are a thousand times as many
    positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
    negative = query @ queue  # (N, K)
    return torch.cat([positive, negative], dim=1)


class MoCo(Method):
    """A query is told from the keys of earlier batches by its own key, encoded by a slow copy of the encoder.

    dim: width D of the embeddings. queue_size: number K of negatives. momentum: of the key encoder.
    mlp: v2's projection head, Linear-ReLU-Linear, instead of v1's Linear.
    bn_splits: batch norm sees the batch in this many parts, each as if on a GPU of its own (section 3.3): with the
    shuffle this keeps one device from solving the task through batch statistics.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 128,
        queue_size: PositiveInt = 65536,
        momentum: Fraction = 0.999,
        temperature: PositiveFloat = 0.07,
        mlp: bool = False,
        bn_splits: PositiveInt = 1,
    ) -> None:
        super().__init__(backbone)
        self.momentum, self.temperature, self.bn_splits = momentum, temperature, bn_splits
        if bn_splits > 1:
            layers.split_batch_norm_(backbone, bn_splits)
        width = backbone.dim
        self.head = layers.mlp(width, width, dim) if mlp else nn.Linear(width, dim)
        self.key_backbone = momentum_copy(self.backbone)
        self.key_head = momentum_copy(self.head)
        self.queue = layers.Queue(dim, queue_size)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """views: query and key images, (N, 3, H, W) each. `accuracy`: how often the positive scores highest."""
        query = self.normalized(self.head(self.backbone(views[0])))  # (N, D)
        with torch.no_grad():
            if self.training:  # here, between query and key, as in the authors' code
                ema_([self.key_backbone, self.key_head], [self.backbone, self.head], self.momentum)
            keys = self.encode_keys(views[1])  # (world * N, D)
            key = keys.view(distributed.world_size(), *query.shape)[distributed.rank()]
        logits = info_nce_logits(query, key, self.queue.keys, self.temperature)
        self.newest = keys  # enqueued by `update`: the backward pass has yet to read the queue as it is
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        accuracy = (logits[:, 0] > logits[:, 1:].amax(dim=1)).float().mean()
        loss = F.cross_entropy(logits, target)
        return {"loss": loss, "accuracy": accuracy.detach(), "embeddings": health_of(query, key)}

    def update(self, progress: float) -> None:
        self.queue.enqueue(self.newest)

    def normalized(self, embeddings: Tensor) -> Tensor:
        # in the queue's precision: under autocast the embeddings arrive as bfloat16
        return F.normalize(embeddings.to(self.queue.keys.dtype), dim=1)

    def encode_keys(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) of every rank -> keys (world * N, D) of the global batch, in its order.

        Batch norm sees the global batch shuffled (section 3.3, "Shuffling BN").
        """
        size, rank = distributed.world_size(), distributed.rank()
        if size * self.bn_splits == 1:
            return self.normalized(self.key_head(self.key_backbone(images)))
        if len(images) % self.bn_splits:
            raise UserError(
                f"method.bn_splits={self.bn_splits} does not divide the {len(images)} images of a process: "
                "change method.bn_splits or batch_size"
            )
        everyone = distributed.all_gather(images)
        order = distributed.broadcast(torch.randperm(len(everyone), device=images.device))
        mine = everyone[order.view(size, -1)[rank]]
        shuffled = distributed.all_gather(self.normalized(self.key_head(self.key_backbone(mine))))
        return torch.empty_like(shuffled).index_copy_(0, order, shuffled)
