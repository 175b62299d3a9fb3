"""DeepCluster v2 (Caron et al., arXiv:2006.09882, appendix)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, by_size, health_of
from ssl_bench.runtime import distributed

NUM_STORED = 2  # crops whose embeddings are clustered: those of full size
UNKNOWN = -100  # the cluster of an image that isn't in the memory: it has no part in the loss
BLOCK = 2**27  # similarities that are computed at once: 0.5 GB


@torch.no_grad()
@layers.full_precision
def cluster(embeddings: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means -> the cluster of each embedding, int64 (N,), and the centroids (K, D).

    embeddings (N, D), centroids (K, D), where it begins. A round: each embedding goes to the most
    similar centroid, each centroid to the mean of its embeddings, if it has any, and to norm 1. The
    assignment after the last round is what is returned. The same each time, on a GPU too.
    """
    centroids = centroids.clone()
    blocks = embeddings.split(max(1, BLOCK // len(centroids)))
    for _ in range(iterations):
        sums, counts = torch.zeros_like(centroids), centroids.new_zeros(len(centroids), 1)
        for block in blocks:
            # a product: adding rows to sums by their index has no fixed order on a GPU
            members = F.one_hot((block @ centroids.T).argmax(dim=1), len(centroids)).to(block.dtype)
            sums += members.T @ block
            counts += members.sum(dim=0)[:, None]
        centroids = F.normalize(torch.where(counts > 0, sums / counts, centroids), dim=1)
    return torch.cat([(block @ centroids.T).argmax(dim=1) for block in blocks]), centroids


@layers.full_precision
def assignment_loss(
    embeddings: Sequence[Tensor],
    centroids: Sequence[Tensor],
    assignments: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy of every crop with its image's cluster, averaged over sets of clusters.

    embeddings: V crops (N, D), not normalised. centroids: S sets (K, D) of norm 1. assignments:
    int64 (N, S), UNKNOWN for an image that hasn't any; the mean is over the others of all ranks.
    """
    crops = F.normalize(torch.cat(tuple(embeddings)), dim=1)
    targets = assignments.repeat(len(embeddings), 1)  # (V * N, S)
    losses = []
    for own, target in zip(centroids, targets.unbind(1), strict=True):
        total = F.cross_entropy(
            crops @ own.T / temperature, target, ignore_index=UNKNOWN, reduction="sum"
        )
        known = distributed.mean((target != UNKNOWN).sum().to(total.dtype)).clamp(min=1)
        losses.append(total / known)
    return torch.stack(losses).mean()


class DeepClusterV2(Method):
    """Crops of an image predict to which of clusters, made of all images, it belongs.

    A memory has the embeddings of every image's two large crops, as they were when it was last
    seen. At the beginning of an epoch they are clustered, several times with other beginnings, and
    the clusters are what all crops learn until the next. dim: width D of the embeddings. The
    projector is Linear-BN-ReLU-Linear. hidden_dim: its hidden width. num_prototypes: the number of
    clusters in each set; sets take turns in which of the two crops they cluster. iterations: of
    k-means. num_images: of the data set, handed over by the stage.
    """

    whole_batch = "its memory takes the embeddings of the whole batch at once"
    takes_small_views = True

    def __init__(
        self,
        backbone: nn.Module,
        num_images: PositiveInt,
        dim: PositiveInt = 128,
        hidden_dim: PositiveInt = 2048,
        num_prototypes: tuple[PositiveInt, ...] = (3000, 3000, 3000),
        temperature: PositiveFloat = 0.1,
        iterations: PositiveInt = 10,
    ) -> None:
        super().__init__(backbone)
        self.temperature, self.iterations = temperature, iterations
        self.projector = layers.mlp(backbone.dim, hidden_dim, dim, norm=True)
        sets = len(num_prototypes)
        # by the image's number; zeros: not seen yet
        self.register_buffer("memory", torch.zeros(NUM_STORED, num_images, dim))
        self.register_buffer("assignments", torch.full((num_images, sets), UNKNOWN))
        for number, size in enumerate(num_prototypes):
            self.register_buffer(f"centroids{number}", torch.zeros(size, dim))
        self.num_prototypes = num_prototypes

    @property
    def centroids(self) -> list[Tensor]:
        return [getattr(self, f"centroids{i}") for i in range(len(self.num_prototypes))]

    def check(self, num_images: int, local_batch: int) -> None:
        batch = local_batch * distributed.world_size()
        seen, most = num_images // batch * batch, max(self.num_prototypes)
        if most > seen:
            raise UserError(
                f"method.num_prototypes={list(self.num_prototypes)}: an epoch has {seen:,} images "
                f"to begin clusters with: choose at most {seen}, or another batch_size"
            )

    @torch.no_grad()
    def prepare(self, batches: Iterator[tuple[list[Tensor], Tensor]]) -> None:
        """The first epoch's views fill the memory, as in the authors' `init_memory`."""
        for views, indices in batches:
            crops = [self.projector(self.backbone(view)) for view in views[:NUM_STORED]]
            self.store(torch.stack(crops, dim=1), indices)

    def begin(self, epoch: float, epochs: int) -> None:
        if epoch == int(epoch):
            self.assign()

    @torch.no_grad()
    def assign(self) -> None:
        """Cluster the memory anew. Every rank has all of it; rank 0's clusters are taken."""
        known = self.memory[0].any(dim=1).nonzero().squeeze(1)  # waits for the device
        for number, centroids in enumerate(self.centroids):
            embeddings = self.memory[number % NUM_STORED][known]
            first = torch.randperm(len(known), device=known.device)[: len(centroids)]
            found, made = cluster(embeddings, embeddings[first], self.iterations)
            centroids.copy_(distributed.broadcast(made))
            self.assignments[known, number] = distributed.broadcast(found)

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """The clusters (N, S) of the images, and which these are (N,)."""
        return self.assignments[indices], indices

    def forward(
        self,
        views: Sequence[Tensor],
        labels: Tensor | None = None,
        assignments: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Output:
        assert assignments is not None
        assert indices is not None
        crops = self.projector(by_size(self.backbone, views)).chunk(len(views))  # V x (N, D)
        loss = assignment_loss(crops, self.centroids, assignments, self.temperature)
        large = crops[:NUM_STORED]
        self.newest = torch.stack(large, dim=1).detach(), indices
        return {"loss": loss, "embeddings": health_of(*large)}

    def update(self, progress: float) -> None:
        self.store(*self.newest)

    @torch.no_grad()
    def store(self, embeddings: Tensor, indices: Tensor) -> None:
        """embeddings (N, 2, D), not normalised, of these images of this rank."""
        everyone = distributed.all_gather(embeddings.to(self.memory.dtype))
        directions = F.normalize(everyone, dim=2).transpose(0, 1)
        self.memory.index_copy_(1, distributed.all_gather(indices), directions)
