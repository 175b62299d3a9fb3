"""Which images to label next: rows of a pool, in the order in which they are worth asking for.

Points are features in the space of `Projection`: float32 (N, dim), on any device. `covered` (M,
dim) are the points of images that have labels already. A strategy yields each row of the pool once,
and is a function of its arguments; `generator` is on the CPU.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20  # their mean distance is the inverse of typicality (arXiv:2202.02794, section 3.2)
MEMBERS = 10  # images that a cluster has on average, at least: they are each other's neighbours
# Clusters of no more images come last (the authors' typiclust.py drops them: MIN_CLUSTER_SIZE).
SMALLEST = 5
SAMPLE = 50_000  # images whose principal components stand for those of all
ROWS, CENTRES = 2048, 1024  # distances are computed in blocks of this shape: 8 MB
AHEAD = 8192  # farthest points, among which the next centres are looked for
DRAWS = 256  # candidates drawn at once
# Iterations of k-means. 5 more change the mean squared distance of 100,000 points in 2,500 clusters
# by 0.01 %.
ITERATIONS = 5


class Projection:
    """Features -> unit vectors -> their first `dim` principal components, for cheap distances.

    Unit vectors, because self-supervised features are compared by angle (as by weighted kNN, and in
    TypiClust). features: (N, D), of any float type, may be memory-mapped; the components are those
    of SAMPLE rows drawn by seed. dim=0: the whole space, not rotated.
    """

    def __init__(self, features: np.ndarray, dim: int, seed: int, device: torch.device) -> None:
        self.device, self.components, self.explained = device, None, 1.0
        if 0 < dim < features.shape[1]:
            rows = np.random.default_rng(seed).permutation(len(features))[:SAMPLE]
            covariance = torch.cov(self._unit(features[np.sort(rows)]).T)
            variances, vectors = torch.linalg.eigh(covariance)  # ascending
            self.components = vectors[:, -dim:]
            # share of the variance that the components have
            self.explained = (variances[-dim:].sum() / variances.sum()).item()

    def __call__(self, features: np.ndarray) -> Tensor:
        """(N, D) -> float32 (N, dim) on the device."""
        dim = features.shape[1] if self.components is None else self.components.shape[1]
        points = torch.empty(len(features), dim, device=self.device)
        for start in range(0, len(features), ROWS):
            block = self._unit(features[start : start + ROWS])
            if self.components is not None:
                block = block @ self.components
            points[start : start + ROWS] = block
        return points

    def _unit(self, features: np.ndarray) -> Tensor:
        return F.normalize(torch.from_numpy(np.array(features, np.float32)).to(self.device))


# -- strategies ------------------------------------------------------------------------------------


def random(pool: Tensor, covered: Tensor, generator: torch.Generator) -> Iterator[int]:
    """The control: any order."""
    yield from torch.randperm(len(pool), generator=generator).tolist()


def k_center(pool: Tensor, covered: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Core-set (Sener & Savarese, arXiv:1708.00489, algorithm 1): the point farthest from centres.

    It needn't look at every point for every centre. Distances to the nearest centre only fall, so
    that an old one is an upper bound (lazy evaluation, Minoux 1978). The distances of the AHEAD
    farthest points are kept up to date; while one of these points is as far as any other point was,
    it is the farthest of all. The other points are compared with many new centres at once.
    """
    nearest = nearest_distances(pool, covered)  # squared; -1 for a centre, which can't be one again
    if not len(covered):
        first = int(torch.randint(len(pool), (), generator=generator))
        yield first
        lower(nearest, pool, pool[[first]])
        nearest[first] = -1
    while nearest.max() >= 0:
        values, ahead = nearest.topk(min(AHEAD + 1, len(pool)))
        bound = values[AHEAD:].clamp(min=0).sum()  # no other point is farther; 0 if there is none
        ahead, now = ahead[:AHEAD], values[:AHEAD].clone()
        points, centres = pool[ahead], []
        squares = points.square().sum(dim=1)
        while now[farthest := now.argmax()] >= bound:
            yield int(ahead[farthest])
            centres.append(ahead[farthest])
            distances = squares + squares[farthest] - 2 * (points @ points[farthest])
            torch.minimum(now, distances.clamp_(min=0), out=now)
            now[farthest] = -1
        chosen = torch.stack(centres)
        lower(nearest, pool, pool[chosen])
        nearest[chosen] = -1


def kmeans_plusplus(pool: Tensor, covered: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Seeds of k-means++ (Arthur & Vassilvitskii, SODA 2007), drawn by squared distance.

    The distance is to the nearest centre. DRAWS at a time are drawn by the distances at that
    moment, which fall with each new centre; each is kept with the probability (distance now /
    distance then). This rejection makes them draws by the distances of now.
    """
    nearest = nearest_distances(pool, covered)
    left = torch.ones(len(pool), dtype=torch.bool)
    if not len(covered):
        first = int(torch.randint(len(pool), (), generator=generator))
        yield first
        lower(nearest, pool, pool[[first]])
        nearest[first], left[first] = 0, False
    while left.any():
        weights = nearest.double().cumsum(dim=0)
        if weights[-1] == 0:  # all points that are left lie on a centre
            rest = left.nonzero()[:, 0]
            yield from rest[torch.randperm(len(rest), generator=generator)].tolist()
            return
        where, keep = torch.rand(2, DRAWS, generator=generator, dtype=torch.float64).to(pool.device)
        rows = torch.searchsorted(weights, where * weights[-1], right=True).clamp(max=len(pool) - 1)
        drawn, chosen = pool[rows], []
        distances = torch.cdist(drawn, drawn, compute_mode="donot_use_mm_for_euclid_dist")
        between = distances.square().cpu().numpy()
        wanted, now = (keep * nearest[rows]).tolist(), nearest[rows].cpu().numpy()
        for at, row in enumerate(rows.tolist()):
            if wanted[at] < now[at] and left[row]:
                yield row
                chosen.append(row)
                left[row] = False
                now = np.minimum(now, between[at])
        lower(nearest, pool, pool[chosen])
        nearest[chosen] = 0


def typiclust(
    pool: Tensor,
    covered: Tensor,
    generator: torch.Generator,
    budget: int,
    max_clusters: int | None = None,
) -> Iterator[int]:
    """TypiClust (Hacohen et al., arXiv:2202.02794, 3.2): the typical image of a cluster.

    There are as many clusters as there will be labels, but at most max_clusters (500 in the paper)
    and one for MEMBERS images. A label goes to a cluster that has fewest labels, the largest of
    these; there, to the image of greatest typicality.
    """
    points = torch.cat([pool, covered])
    most = min(max_clusters or len(points), len(points) // MEMBERS)
    clusters = max(1, min(budget + len(covered), most))
    of = cluster(points, clusters, generator)
    typical, mine = typicality(points, of)[: len(pool)], of[: len(pool)]
    sizes, members = of.bincount(minlength=clusters), mine.bincount(minlength=clusters)
    order = np.lexsort((-typical.numpy(), mine.numpy()))
    ranks = torch.empty_like(mine)  # in its cluster, the most typical image first
    ranks[order] = torch.arange(len(pool)) - (members.cumsum(dim=0) - members)[mine[order]]
    labels = (sizes - members)[mine] + ranks  # what the cluster has when the image's turn comes
    size = sizes[mine]
    yield from np.lexsort((-size.numpy(), labels.numpy(), (size <= SMALLEST).numpy())).tolist()


def margin(logits: Tensor) -> Tensor:
    """(N, classes) -> (N,): probability of the likeliest class minus that of the next.

    Scheffer et al., IDA 2001.
    """
    first, second = logits.float().softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return first - second


# -- distances and clusters ------------------------------------------------------------------------


def nearest_distances(points: Tensor, centres: Tensor) -> Tensor:
    """(N, dim), (K, dim) -> (N,): squared distance to the nearest centre, inf if there is none."""
    return lower(points.new_full((len(points),), torch.inf), points, centres)


def lower(nearest: Tensor, points: Tensor, centres: Tensor) -> Tensor:
    """nearest (N,), squared distances, lowered in place where one of `centres` is nearer."""
    for some in centres.split(CENTRES) if len(centres) else ():
        for now, block in zip(nearest.split(ROWS), points.split(ROWS), strict=True):
            torch.minimum(now, _squared(block, some).amin(dim=1), out=now)
    return nearest


def _squared(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances: (N, dim), (K, dim) -> (N, K)."""
    products = torch.addmm(centres.square().sum(dim=1), points, centres.T, alpha=-2)
    return products.add_(points.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def cluster(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """(N, dim) -> the cluster of each point, int64 (N,) on the CPU, by scikit-learn's k-means.

    The seeds are ours: scikit-learn compares every point with every seed, which would take longer
    than all the rest.
    """
    from sklearn.cluster import KMeans

    seeds = points[list(islice(kmeans_plusplus(points, points[:0], generator), clusters))]
    means = KMeans(clusters, init=seeds.cpu().numpy(), n_init=1, max_iter=ITERATIONS)
    return torch.from_numpy(means.fit_predict(points.cpu().numpy())).long()


def typicality(points: Tensor, of: Tensor) -> Tensor:
    """(N, dim), the cluster of each point (N,) -> typicality (N,), on the CPU.

    It is 1 / mean distance to the NEIGHBOURS nearest points of the cluster.
    """
    result = torch.empty(len(points), dtype=points.dtype)
    for rows in of.argsort(stable=True).split(of.bincount().tolist()):
        members, neighbours = points[rows.to(points.device)], min(NEIGHBOURS, len(rows) - 1)
        for some, block in zip(rows.split(ROWS), members.split(ROWS), strict=True):
            # one more, since the nearest is the point itself, at distance 0
            distances = torch.cdist(block, members).topk(neighbours + 1, largest=False).values
            result[some] = 1 / (distances.sum(dim=1) / max(neighbours, 1) + 1e-5).cpu()
    return result
