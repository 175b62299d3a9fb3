"""Features judged without training: by their nearest neighbours and by a ridge classifier."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, BANK = 1024, 16384  # rows compared at once: their similarities take 64 MB


@torch.no_grad()
def weighted_knn(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Votes of the k nearest images of a bank for each class (Wu et al., arXiv:1805.01978, 3.4).

    queries (M, D), bank (N, D): features of any norm. bank_labels: int64 (N,). Returns (M,
    num_classes): a neighbour of cosine similarity s votes for its class with exp(s / temperature),
    and the votes are divided by their sum.
    """
    scores = []
    for block in queries.split(QUERIES):
        similarities, rows = nearest(block, bank, k)
        labels = bank_labels[rows.to(bank_labels.device)]
        scores.append(vote(similarities, labels, num_classes, temperature))
    return torch.cat(scores)


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each query: cosine similarities (M, k), rows (M, k).

    The most similar comes first; if the bank has fewer than k rows, all come. Beside its arguments
    it takes memory for a block of each; the bank may be on another device.
    """
    found = []
    # the 8 bits of bfloat16 can't tell near neighbours apart
    with torch.autocast(queries.device.type, enabled=False):
        for block in queries.split(QUERIES):
            block, best = _unit(block), None
            for start in range(0, len(bank), BANK):
                part = _unit(bank[start : start + BANK].to(block.device))
                similarities, rows = (block @ part.T).topk(min(k, len(part)))
                rows += start
                if best is not None:
                    similarities = torch.cat([best[0], similarities], 1)
                    rows = torch.cat([best[1], rows], 1)
                    similarities, order = similarities.topk(min(k, similarities.shape[1]))
                    rows = rows.gather(1, order)
                best = similarities, rows
            found.append(best)
    similarities, rows = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(rows)


def vote(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Neighbours' similarities and labels (M, k) -> votes (M, num_classes); see `weighted_knn`."""
    votes = (similarities / temperature).softmax(dim=1)  # exp alone overflows at low temperatures
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels.to(votes.device), votes)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float() if features.dtype.itemsize < 4 else features, dim=1)


def knn_and_ridge(features: Tensor, labels: Tensor, asked: Tensor) -> dict[str, float]:
    """Top-1 (percent) on the asked images of two classifiers that learn from the others.

    features (N, D), labels (N,), asked (N,) bool. A weighted kNN (k 20, temperature 0.07), and a
    ridge classifier of standardised features, its strength chosen by leaving each image out.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    num_classes = int(labels.max()) + 1
    bank, bank_labels = features[~asked], labels[~asked]
    scores = weighted_knn(features[asked], bank, bank_labels, num_classes, k=20, temperature=0.07)
    knn = (scores.argmax(dim=1) == labels[asked]).double().mean().item()
    x, y = features.numpy(), labels.numpy()
    ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 5, 7)))
    probe = ridge.fit(x[~asked], y[~asked]).score(x[asked], y[asked])
    return {"knn_top1": 100 * knn, "probe_top1": 100 * probe}
