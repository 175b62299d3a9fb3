"""SwAV (Caron et al., arXiv:2006.09882)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Epochs
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, by_size, health_of
from ssl_bench.runtime import distributed

NUM_CODED = 2  # crops whose codes the other crops predict: those of full size
IDLE = {"method.queue_length=0": ("method.queue_start",)}  # see `typed`


@torch.no_grad()
@layers.full_precision
def sinkhorn(scores: Tensor, epsilon: float, num_iterations: int) -> Tensor:
    """Scores (B, K) of B images and K prototypes -> codes (B, K).

    An image's codes sum to 1, and prototypes are used evenly: equations 3 to 5, by the algorithm of
    Cuturi, arXiv:1306.0895.
    """
    codes = torch.exp(scores / epsilon)
    codes = codes / codes.sum()
    for _ in range(num_iterations):
        codes = codes / codes.sum(dim=0, keepdim=True) / codes.shape[1]
        codes = codes / codes.sum(dim=1, keepdim=True) / codes.shape[0]
    return codes * codes.shape[0]


@layers.full_precision
def swapped_prediction_loss(
    embeddings: Sequence[Tensor],
    prototypes: Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    num_iterations: int = 3,
    queue: Tensor | None = None,
) -> Tensor:
    """The first two crops' codes, each predicted from all other crops.

    embeddings: V times (N, D). prototypes: (K, D) of norm 1. queue: (2, Q, D), normalised
    embeddings of earlier images, which join the batch when codes are computed, a part for each of
    the two crops. Codes are computed from the batches of all ranks.
    """
    scores = [F.normalize(crop, dim=1) @ prototypes.T for crop in embeddings]  # (N, K)
    predictions = [F.log_softmax(score / temperature, dim=1) for score in scores]
    loss = scores[0].new_zeros(())
    for coded in range(NUM_CODED):
        everyone = distributed.all_gather(scores[coded].detach())
        stored = [] if queue is None else [queue[coded].to(everyone.dtype) @ prototypes.detach().T]
        codes = sinkhorn(torch.cat([*stored, everyone]), epsilon, num_iterations)[-len(everyone) :]
        code = codes.view(distributed.world_size(), *scores[coded].shape)[distributed.rank()]
        others = [prediction for crop, prediction in enumerate(predictions) if crop != coded]
        agreements = [(code * prediction).sum(dim=1).mean() for prediction in others]
        loss = loss - sum(agreements) / len(agreements)
    return loss / NUM_CODED


class SwAV(Method):
    """Crops of an image predict each other's assignment to prototypes.

    Prototypes are assigned evenly within the batch. dim: width D of the embeddings. The projector
    is Linear-BN-ReLU-Linear. hidden_dim: its hidden width. num_prototypes: K. frozen_epochs: for so
    long the prototypes don't move. queue_length: number of earlier images that join the batch from
    epoch `queue_start` on, for batches that are small beside K; 0: none.
    """

    whole_batch = "its codes are shared out among the images of the batch"
    takes_small_views = True

    def __init__(
        self,
        backbone: nn.Module,
        dim: PositiveInt = 128,
        hidden_dim: PositiveInt = 2048,
        num_prototypes: PositiveInt = 3000,
        temperature: PositiveFloat = 0.1,
        epsilon: PositiveFloat = 0.05,
        sinkhorn_iterations: PositiveInt = 3,
        frozen_epochs: Epochs = 1,
        queue_length: NonNegativeInt = 0,
        queue_start: Epochs = 15,
    ) -> None:
        super().__init__(backbone)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, sinkhorn_iterations
        self.frozen_epochs, self.queue_start = frozen_epochs, queue_start
        self.projector = layers.mlp(backbone.dim, hidden_dim, dim, norm=True)
        self.prototypes = nn.Linear(dim, num_prototypes, bias=False)
        # newest first, zeros where empty
        self.register_buffer("queue", torch.zeros(NUM_CODED, queue_length, dim))
        self.queueing = self.queue_full = False

    def param_groups(self) -> list[dict]:
        others = [*self.backbone.parameters(), *self.projector.parameters()]
        prototypes = list(self.prototypes.parameters())
        return [{"params": others}, {"params": prototypes, "frozen_epochs": self.frozen_epochs}]

    def begin(self, epoch: float, epochs: int) -> None:
        # In place: the gradient doesn't pass the normalisation.
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        self.queueing = self.queue.shape[1] > 0 and epoch >= self.queue_start
        if self.queueing and not self.queue_full:  # waits for the device until it is full
            self.queue_full = bool(self.queue[:, -1].any())

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        embeddings = self.projector(by_size(self.backbone, views))
        crops = embeddings.to(self.prototypes.weight.dtype).chunk(len(views))  # V x (N, D)
        queue = self.queue if self.queueing and self.queue_full else None
        prototypes = self.prototypes.weight
        loss = swapped_prediction_loss(
            crops, prototypes, self.temperature, self.epsilon, self.iterations, queue
        )
        if self.queueing and self.training:
            self.enqueue(crops[:NUM_CODED])
        return {"loss": loss, "embeddings": health_of(*crops[:NUM_CODED])}

    @torch.no_grad()
    def enqueue(self, crops: Sequence[Tensor]) -> None:
        newest = torch.stack([distributed.all_gather(F.normalize(crop, dim=1)) for crop in crops])
        length = self.queue.shape[1]
        newest = newest[:, :length]
        kept = self.queue[:, : length - newest.shape[1]]
        self.queue.copy_(torch.cat([newest, kept], dim=1))
