"""One pass over images: accuracy of a classifier, features of a backbone."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench.data.source import Batch
from ssl_bench.evaluate import calibration
from ssl_bench.runtime import distributed


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    view: Callable[[Tensor | list[Tensor]], Tensor],
) -> dict[str, float]:
    """Of `model.logits`, over all images of all ranks.

    Top-1, top-5 and expected calibration error (percent), and cross-entropy.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, loss, count
    bins = torch.zeros(3, calibration.BINS, dtype=torch.float64)
    for images, labels, _ in batches:
        logits = model.logits(view(images)).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = torch.tensor(len(labels), device=loss.device)
        batch = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, count])
        sums += batch.double().cpu()
        bins += calibration.binned(logits.softmax(dim=1), labels)
    top1, top5, loss, count = distributed.total(sums).tolist()
    return {
        "val_top1": 100 * top1 / count,
        "val_top5": 100 * top5 / count,
        "val_loss": loss / count,
        "val_ece": calibration.expected_error(distributed.total(bins)),
    }


@torch.no_grad()
def extract(
    backbone: nn.Module,
    batches: Iterable[Batch],
    view: Callable[[Tensor | list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Features (N, dim) float32 and labels (N,) of this rank's images, on the CPU.

    The backbone is in eval mode.
    """
    # a rank may have no images
    features, labels = [torch.empty(0, backbone.dim)], [torch.empty(0, dtype=torch.int64)]
    for images, targets, _ in batches:
        features.append(backbone(view(images)).float().cpu())
        labels.append(targets.cpu())
    return torch.cat(features), torch.cat(labels)
