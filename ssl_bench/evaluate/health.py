"""Do embeddings collapse? Does a teacher that should follow its student stand still?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below either of these, all images have nearly the same embedding (see `health`).
COLLAPSED_STD = 0.1  # 1 is an even spread
COLLAPSED_RANK = 1.5
COLLAPSING = 0.25  # to so much of what they were at first they may fall while the loss does
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
    if embeddings.device.type == "mps":
        embeddings = embeddings.cpu()  # mps can't compute eigenvalues
    if embeddings.dtype.itemsize < 4:
        embeddings = embeddings.float()
    unit = F.normalize(embeddings, dim=2)
    first = unit[0]
    values = {
        "embedding_std": first.std(dim=0).mean() * math.sqrt(first.shape[1]),
        "effective_rank": effective_rank(embeddings[0]),
        "uniformity": torch.pdist(first).square().mul(-2).exp().mean().log(),
    }
    if len(unit) > 1:
        values["alignment"] = (first - unit[1]).square().sum(dim=1).mean()
        values["lidar"] = lidar(embeddings[:, :LIDAR_IMAGES])
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))  # one sync


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


def collapse(values: dict[str, float]) -> str | None:
    """What to tell a person if the embeddings have collapsed, else None."""
    std, rank = values["embedding_std"], values["effective_rank"]
    if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
        return (
            f"all images have nearly the same embedding: spread {std:.2g} of 1, "
            f"effective rank {rank:.3g}"
        )
    return None


def collapsing(first: dict[str, float], now: dict[str, float]) -> str | None:
    """What to tell a person if the loss has fallen and the embeddings' variety with it, else None.

    first, now: two lines of a log.
    """
    fallen = [
        f"{name} from {first[key]:.3g} to {now[key]:.3g}"
        for key, name in (("embedding_std", "spread"), ("effective_rank", "effective rank"))
        if now[key] < COLLAPSING * first[key]
    ]
    if not fallen or not now["loss"] < first["loss"]:
        return None
    return f"the loss falls, from {first['loss']:.4g} to {now['loss']:.4g}, and {fallen[0]} with it"


class Following:
    """Do the momentum copies in a method (`base.momentum_copy`) follow what is trained?"""

    def __init__(self, method: nn.Module) -> None:
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

    @torch.no_grad()
    def _sample(self, parameters: list[nn.Parameter]) -> Tensor:
        some = [p.detach().flatten()[:SAMPLED].float() for p in parameters]
        return torch.cat(some) if some else torch.empty(0)
