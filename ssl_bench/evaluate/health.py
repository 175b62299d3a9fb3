"""Do embeddings collapse?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Below either of these, all images have nearly the same embedding (see `health`).
COLLAPSED_STD = 0.1  # 1 is an even spread
COLLAPSED_RANK = 1.5


@torch.no_grad()
def health(embeddings: Tensor) -> dict[str, float]:
    """Embeddings (V, N, D) of V views of N images -> measures of their collapse.

    embedding_std: standard deviation over the images of each dimension of the normalised
    embeddings, times sqrt(D): 1 if they are spread evenly, 0 if all are alike (SimSiam,
    arXiv:2011.10566, section 4.1). effective_rank: exponential of the entropy of the singular
    values, between 1 and min(N, D) (RankMe, arXiv:2210.02885, section 3).
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
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))  # one sync


def effective_rank(embeddings: Tensor) -> Tensor:
    """(N, D) -> scalar; see `health`."""
    embeddings = embeddings.double()
    narrow = embeddings if embeddings.shape[0] <= embeddings.shape[1] else embeddings.T
    # faster than the singular values of the matrix itself
    singular = torch.linalg.eigvalsh(narrow @ narrow.T).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=1e-30)
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
