"""Momentum Contrast: v1 (He et al., arXiv:1911.05722) and v2 (Chen et al., arXiv:2003.04297)."""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Fraction
from ssl_bench.errors import UserError
from ssl_bench.methods import layers, splits
from ssl_bench.methods.base import (
    Method,
    Output,
    ema_,
    health_of,
    momentum_copy,
    slow_statistics_,
)
from ssl_bench.runtime import distributed

log = logging.getLogger(__name__)

DIVIDES = {"bn_splits": "batch_size / devices"}  # see `build`


def info_nce_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Normalised query, key (N, D) and queue (D, K) -> (N, 1 + K); the positive comes first."""
    query = query / temperature  # not the logits, which are a thousand times as many numbers
    positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
    negative = query @ queue  # (N, K)
    return torch.cat([positive, negative], dim=1)


def split_(backbone: nn.Module, bn_splits: int | None, batch_size: int | None) -> int:
    """Split the batch norm of a backbone, in place. Returns the number of parts.

    bn_splits=None: by `splits.resolve`, or 1 if there is no batch norm, or one that does more and
    can't be split. UserError if bn_splits asks to split such a one. Says if the parts aren't the
    authors', and warns if nobody chose them.
    """
    processes = distributed.world_size()
    taken = splits.resolve(bn_splits, processes, batch_size)
    batch_norm = nn.modules.batchnorm._BatchNorm
    kinds = {type(child) for child in backbone.modules() if isinstance(child, batch_norm)}
    if bn_splits is None and not (kinds and kinds <= layers.SPLITTABLE):
        taken = 1
    if taken > 1:
        layers.split_batch_norm_(backbone, taken)
    parts = taken * processes
    if kinds and parts != splits.GPUS and distributed.rank() == 0:
        level = logging.INFO if bn_splits and parts > 1 else logging.WARNING
        said = f"in {parts} shuffled parts; the authors had {splits.GPUS}"
        if parts == 1:
            said = "whole, not shuffled: its statistics may give the positive away"
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        log.log(level, "%s sees a batch %s (method.bn_splits=%s)", names, said, taken)
    return taken


class MoCo(Method):
    """A query finds its own key, encoded by a slow copy, among the keys of earlier batches.

    dim: width D of the embeddings. queue_size: number K of negatives. momentum: the key encoder's.
    mlp: v2's projection head, Linear-ReLU-Linear, instead of v1's Linear.
    bn_splits: batch norm sees the batch in this many parts, each as if on its own GPU (section
    3.3); together with the shuffle this keeps one device from solving the task through batch
    statistics. None: see `split_`, which needs batch_size, that of all processes together.
    """

    whole_batch: str | None = None

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 128,
        queue_size: PositiveInt = 65536,
        momentum: Fraction = 0.999,
        temperature: PositiveFloat = 0.07,
        mlp: bool = False,
        bn_splits: PositiveInt | None = None,
        batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(backbone)
        self.momentum, self.temperature = momentum, temperature
        self.bn_splits = split_(backbone, bn_splits, batch_size)
        width = backbone.dim
        self.head = layers.mlp(width, width, dim) if mlp else nn.Linear(width, dim)
        self.key_backbone = momentum_copy(self.backbone)
        self.key_head = momentum_copy(self.head)
        self.queue = layers.Queue(dim, queue_size)

    def check(self, num_images: int, local_batch: int) -> None:
        queue_size = self.queue.keys.shape[1]
        if queue_size > num_images:
            raise UserError(
                f"method.queue_size={queue_size} is larger than the dataset ({num_images:,} "
                "images), so that every image would meet its own old key as a negative: choose at "
                f"most method.queue_size={num_images}"
            )
        self.check_splits(local_batch)

    def check_splits(self, local_batch: int) -> None:
        if local_batch % self.bn_splits:
            raise UserError(
                f"method.bn_splits={self.bn_splits} does not divide the {local_batch} images of a "
                "process: change one of method.bn_splits, batch_size, devices"
            )

    def in_parts(self, count: int) -> None:
        """Queries come in parts, each with its share of `bn_splits`; keys never do (`ahead`)."""
        if self.bn_splits > 1 and self.bn_splits % count:
            raise UserError(
                f"accumulate={count} doesn't divide method.bn_splits={self.bn_splits}, the parts "
                "of the batch that batch norm sees: change one of the two"
            )
        for child in self.backbone.modules():
            if isinstance(child, layers.SplitBatchNorm):
                child.num_splits //= count
        slow_statistics_(self.backbone, count)

    def ahead(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self.keys(views[1]),)

    def forward(
        self,
        views: Sequence[Tensor],
        labels: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Output:
        """views: query and key images, (N, 3, H, W) each. key: see `ahead`.

        `accuracy`: how often the positive scores highest.
        """
        query, key = self.encode(views, key)
        logits = info_nce_logits(query, key, self.queue.keys, self.temperature)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        accuracy = (logits[:, 0] > logits[:, 1:].amax(dim=1)).float().mean()
        loss = F.cross_entropy(logits, target)
        return {"loss": loss, "accuracy": accuracy.detach(), "embeddings": health_of(query, key)}

    def encode(self, views: Sequence[Tensor], key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Query and key images -> query and key, normalised (N, D). key: if it is there already."""
        if key is None:
            self.check_splits(len(views[0]))
        query = self.normalized(self.head(self.backbone(views[0])))  # (N, D)
        return query, self.keys(views[1]) if key is None else key

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Key images -> keys, normalised (N, D), by the key encoder after its step."""
        if self.training:  # between query and key, as in the authors' code
            ema_([self.key_backbone, self.key_head], [self.backbone, self.head], self.momentum)
        keys = self.encode_keys(images)  # (world * N, D)
        # enqueued by `update`: the backward pass has yet to read the queue as it is
        self.newest = keys
        return keys.view(distributed.world_size(), len(images), -1)[distributed.rank()]

    def update(self, progress: float) -> None:
        self.queue.enqueue(self.newest)

    def normalized(self, embeddings: Tensor) -> Tensor:
        # in the queue's precision: under autocast embeddings are bfloat16
        return F.normalize(embeddings.to(self.queue.keys.dtype), dim=1)

    def encode_keys(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) of every rank -> keys (world * N, D) of the global batch, in its order.

        Batch norm sees the global batch shuffled (section 3.3, "Shuffling BN").
        """
        size, rank = distributed.world_size(), distributed.rank()
        if size * self.bn_splits == 1:
            return self.normalized(self.key_head(self.key_backbone(images)))
        everyone = distributed.all_gather(images)
        order = distributed.broadcast(torch.randperm(len(everyone), device=images.device))
        mine = everyone[order.view(size, -1)[rank]]
        shuffled = distributed.all_gather(self.normalized(self.key_head(self.key_backbone(mine))))
        return torch.empty_like(shuffled).index_copy_(0, order, shuffled)
