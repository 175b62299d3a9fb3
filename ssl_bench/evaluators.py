"""What is measured without training: features, by their neighbours and linearly; the health of embeddings."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLLAPSED_STD = 0.1  # of 1: what is left of the spread when all images have nearly the same embedding
COLLAPSED_RANK = 1.5


@torch.no_grad()
def health(embeddings: Tensor) -> dict[str, float]:
    """Embeddings (V, N, D) of V views of N images -> what tells that they collapse, or don't.

    embedding_std: standard deviation over the images of each dimension of the normalised embeddings, times sqrt(D):
    1 where they are spread evenly, 0 where all are alike (SimSiam, arXiv:2011.10566, section 4.1).
    effective_rank: exponential of the entropy of the singular values, between 1 and min(N, D) (RankMe,
    arXiv:2210.02885, section 3).
    alignment, uniformity: mean squared distance of two views of an image, log of the mean Gaussian potential of pairs
    of images, of normalised embeddings; lower is better in both (Wang and Isola, arXiv:2005.10242, section 4).
    """
    if embeddings.device.type == "mps":
        embeddings = embeddings.cpu()  # it has no eigenvalues
    embeddings = embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings
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
    singular = torch.linalg.eigvalsh(narrow @ narrow.T).clamp(min=0).sqrt()  # faster than of the matrix itself
    shares = singular / singular.sum().clamp(min=1e-30)
    return torch.special.entr(shares).sum().exp().to(torch.float32)


def collapse(values: dict[str, float]) -> str | None:
    """What to tell of collapsed embeddings, or None."""
    std, rank = values["embedding_std"], values["effective_rank"]
    if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
        return f"all images have nearly the same embedding: spread {std:.2g} of 1, effective rank {rank:.3g}"
    return None


def knn_and_ridge(features: Tensor, labels: Tensor, asked: Tensor) -> dict[str, float]:
    """Features (N, D), labels (N,), asked (N,) bool -> top-1 (percent) for the asked images of what the others teach.

    A weighted kNN (k 20, temperature 0.07) and a ridge classifier of standardised features, its strength chosen by
    leaving each image out.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    num_classes = int(labels.max()) + 1
    scores = weighted_knn(features[asked], features[~asked], labels[~asked], num_classes, k=20, temperature=0.07)
    knn = (scores.argmax(dim=1) == labels[asked]).double().mean().item()
    x, y = features.numpy(), labels.numpy()
    ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 5, 7)))
    probe = ridge.fit(x[~asked], y[~asked]).score(x[asked], y[asked])
    return {"knn_top1": 100 * knn, "probe_top1": 100 * probe}


def weighted_knn(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Queries (M, D), bank (N, D), bank_labels (N,) -> scores (M, num_classes): the k most similar images of the bank
    vote, each with exp(cosine / temperature) (Wu et al., arXiv:1805.01978, section 3.4)."""
    similarity, nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(min(k, len(bank)), dim=1)
    votes = (similarity / temperature).exp()
    return votes.new_zeros(len(queries), num_classes).scatter_add_(1, bank_labels[nearest], votes)
