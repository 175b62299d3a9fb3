"""Do embeddings collapse? Does a teacher that should follow its student stand still?"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below either of these, all images have nearly the same embedding (see `health`).
COLLAPSED_STD = 0.1  # 1 is an even spread
COLLAPSED_RANK = 1.5
# What must be left of the largest values of a run. Healthy ones come near to it: MoCo's rank fell
# to a tenth, DeepCluster's spread to two fifths, and ReSSL's, in its first 25 steps and while its
# loss rose, to a quarter (benchmarks/collapse.py).
LEFT_STD = 0.3  # while the loss falls
LEFT_ANYWAY = 0.2
LEFT_RANK = 0.08
FEW = 2.5, 0.25  # so few directions, and no more than this share of the largest rank
GROWN = 4  # times its first size: so large weights are only with too high a learning rate
WATCHED = 20  # steps after which embeddings are looked at, whatever log_every is
WATCHES = ("loss", "embedding_std", "effective_rank")  # what `Watch` wants to know of a step
MOVING = 50  # steps after which a teacher has moved, or an epoch
LIDAR_IMAGES = 256  # as many are enough for a comparison, and their matrices are quickly solved
SAMPLED = 64  # values of each parameter that are compared


@torch.no_grad()
def health(embeddings: Tensor) -> dict[str, float]:
    """Embeddings (V, N, D) of V views of N images -> measures of their collapse.

    embedding_std: standard deviation over the images of each dimension of the normalised
    embeddings, times sqrt(D): 1 if they are spread evenly, 0 if all are alike (SimSiam,
    arXiv:2011.10566, section 4.1). effective_rank: exponential of the entropy of the singular
    values, between 1 and min(N, D) (RankMe, arXiv:2210.02885, section 3). lidar: see `lidar`.
    alignment, uniformity: mean squared distance of two views of an image; log of the mean Gaussian
    potential of pairs of images; both of normalised embeddings, and lower is better (Wang and
    Isola, arXiv:2005.10242, section 4).
    """
    embeddings = _computable(embeddings)
    unit = F.normalize(embeddings, dim=2)
    first = unit[0]
    values = _variety(embeddings[0], first) | {"uniformity": uniformity(first)}
    if len(unit) > 1:
        values["alignment"] = alignment(first, unit[1])
        values["lidar"] = lidar(embeddings[:, :LIDAR_IMAGES])
    return _told(values)


@torch.no_grad()
def variety(embeddings: Tensor) -> dict[str, float]:
    """embedding_std and effective_rank of `health`, of at most LIDAR_IMAGES images."""
    first = _computable(embeddings[0, :LIDAR_IMAGES])
    return _told(_variety(first, F.normalize(first, dim=1)))


def _variety(embeddings: Tensor, unit: Tensor) -> dict[str, Tensor]:
    """embeddings (N, D), and the same with norm 1."""
    std = unit.std(dim=0).mean() * math.sqrt(unit.shape[1])
    return {"embedding_std": std, "effective_rank": effective_rank(embeddings)}


def _computable(embeddings: Tensor) -> Tensor:
    if embeddings.device.type == "mps":
        embeddings = embeddings.cpu()  # mps can't compute eigenvalues
    return embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings


def _told(values: dict[str, Tensor]) -> dict[str, float]:
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))  # one sync


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Two views (N, D) of norm 1 of each of N images -> mean squared distance; see `health`."""
    return (first - second).square().sum(dim=1).mean()


def uniformity(unit: Tensor) -> Tensor:
    """(N, D) of norm 1 -> log of the mean Gaussian potential of pairs; see `health`."""
    return torch.pdist(unit).square().mul(-2).exp().mean().log()


def effective_rank(embeddings: Tensor) -> Tensor:
    """(N, D) -> scalar; see `health`."""
    embeddings = embeddings.double()
    narrow = embeddings if embeddings.shape[0] <= embeddings.shape[1] else embeddings.T
    # faster than the singular values of the matrix itself
    singular = torch.linalg.eigvalsh(narrow @ narrow.T).clamp(min=0).sqrt()
    return _exponential_entropy(singular)


def lidar(embeddings: Tensor, delta: float = 1e-4) -> Tensor:
    """Embeddings (Q, N, D) of Q views of N images -> the rank of what tells images apart.

    The effective rank of W^-1/2 B W^-1/2: B is the covariance of the N means of an image's views, W
    that of views around their image's mean, plus delta on its diagonal (LiDAR, arXiv:2312.04000,
    section 4). Directions in which the views of an image differ as much as images do count little.
    The paper has 50 views of 1,000 images; with a method's two of a batch it is coarse, and tells
    settings apart that share batch size and views.
    """
    num_views, num_images, dim = embeddings.shape
    views = embeddings.double()
    means = views.mean(dim=0)
    between = (means - means.mean(dim=0)) / math.sqrt(num_images)  # B = between^T between
    within = (views - means).flatten(0, 1) / math.sqrt(num_views * num_images)
    # the eigenvalues of between W^-1 between^T are the matrix's, but for zeros
    if dim <= len(within):
        eye = torch.eye(dim, dtype=within.dtype, device=within.device)
        solved = torch.linalg.solve(within.T @ within + delta * eye, between.T)
    else:  # W^-1 by the identity of Woodbury
        eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
        inner = torch.linalg.solve(within @ within.T + delta * eye, within @ between.T)
        solved = (between.T - within.T @ inner) / delta
    return _exponential_entropy(torch.linalg.eigvalsh(between @ solved).clamp(min=0))


def _exponential_entropy(values: Tensor) -> Tensor:
    shares = values / values.sum().clamp(min=1e-30)
    return torch.special.entr(shares).sum().exp().to(torch.float32)


def collapse(values: Mapping[str, float]) -> str | None:
    """What to tell a person if the embeddings have collapsed, else None."""
    std, rank = values["embedding_std"], values["effective_rank"]
    if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
        return (
            f"all images have nearly the same embedding: spread {std:.2g} of 1, "
            f"effective rank {rank:.3g}"
        )
    return None


class Watch:
    """Tells from the lines of a log that embeddings collapse, as soon as one of them shows it.

    What counts is how much a run has lost of the variety that it had: some begin with little, as
    ViTs do, and what a healthy one has falls at first. Those that have little in their second epoch
    still have collapsed, too.

    loses: may it lose variety? A classifier's images become as few as its classes.
    """

    def __init__(self, loses: bool = False) -> None:
        self.loses = loses
        self.most = {"embedding_std": 0.0, "effective_rank": 0.0}
        self.loss: float | None = None  # of the first line

    def see(self, line: Mapping[str, float]) -> None:
        """Remember a line. Those that a run has logged before it was stopped are seen, too."""
        if self.loss is None:
            self.loss = line.get("loss")
        self.most = {key: max(most, line.get(key, most)) for key, most in self.most.items()}

    def __call__(self, line: Mapping[str, float], epoch: float) -> dict[str, str]:
        """{"has collapsed" or "is collapsing": what to tell a person}; empty: neither.

        epoch: at which the line is, counted from 0.
        """
        self.see(line)
        std, rank = line["embedding_std"], line["effective_rank"]
        told, most = {}, self.most
        falls = self.loss is not None and line["loss"] < self.loss
        lost = std < (LEFT_STD if falls else LEFT_ANYWAY) * most["embedding_std"]
        if (said := collapse(line)) and (epoch >= 1 or lost):
            told["has collapsed"] = said
        if told or self.loses:
            return told
        few, share = FEW
        most_rank = most["effective_rank"]
        if lost:
            told["is collapsing"] = (
                "embeddings of different images become alike: their spread has fallen from "
                f"{most['embedding_std']:.3g} to {std:.3g}"
            )
        elif rank < LEFT_RANK * most_rank or (rank < few and rank < share * most_rank):
            told["is collapsing"] = (
                "embeddings come to lie in few directions: their effective rank has fallen from "
                f"{most_rank:.3g} to {rank:.3g}"
            )
        return told

    def cause(self, line: Mapping[str, float], following: "Following") -> str:
        """In words, why embeddings collapse, as far as it can be told; "": it can't."""
        if following.stand_still():
            return "the momentum teacher stands still (is method.momentum less than 1?)"
        if following.equal():
            return "the momentum teacher equals its student (is method.momentum more than 0?)"
        if (grown := following.grown()) > GROWN:
            return (
                f"weights are {grown:.3g} times as large as they were: the learning rate is too "
                "high (optimizer.base_lr, schedule.warmup_epochs)"
            )
        if self.loss is not None and line["loss"] < self.loss:
            return (
                f"the loss falls with it, from {self.loss:.4g} to {line['loss']:.4g}: too little "
                "in it keeps images apart"
            )
        return ""


class Following:
    """Do the momentum copies in a method (`base.momentum_copy`) follow what is trained?"""

    def __init__(self, method: nn.Module) -> None:
        self.method = method
        copies = [child for child in method.modules() if getattr(child, "follows", False)]
        self.copied = [p for copy in copies for p in copy.parameters()]
        self.trained = [p for p in method.parameters() if p.requires_grad]
        self.before = self._sample(self.copied), self._sample(self.trained)

    def stand_still(self) -> bool:
        """Has none of the copies moved since this was made, and what is trained has?"""
        copied, trained = self.before
        if not len(copied) or not torch.equal(self._sample(self.copied), copied):
            return False
        return not torch.equal(self._sample(self.trained), trained)

    def equal(self) -> bool:
        """Is there a copy, and is each of its tensors one of the others' now?"""
        ours = {id(p) for p in self.copied}
        others = [p for p in self.method.parameters() if id(p) not in ours]
        there = {self._sample([p]).cpu().numpy().tobytes() for p in others}
        copies = (self._sample([p]).cpu().numpy().tobytes() for p in self.copied)
        return bool(self.copied) and all(copy in there for copy in copies)

    def grown(self) -> float:
        """How many times larger what is trained is now than when this was made."""
        _, trained = self.before
        return float(self._sample(self.trained).norm() / trained.norm().clamp(min=1e-30))

    @torch.no_grad()
    def _sample(self, parameters: list[nn.Parameter]) -> Tensor:
        some = [p.detach().flatten()[:SAMPLED].float() for p in parameters]
        return torch.cat(some) if some else torch.empty(0)
