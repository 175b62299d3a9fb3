"""Linear classification of frozen features (He et al., arXiv:1911.05722, section 4.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench.methods.base import Method, Output


class LinearProbe(Method):
    """One linear layer on a frozen backbone in eval mode; fc ~ N(0, 0.01), bias 0, as in the authors' main_lincls.py.

    normalize: standardise the features by their batch statistics first (batch norm without parameters, as MAE does,
    arXiv:2111.06377, A.1), so that one learning rate suits features of any scale.
    """

    num_views = 1

    def __init__(self, backbone: nn.Module, num_classes: int, normalize: bool = False) -> None:
        super().__init__(backbone.requires_grad_(False))
        self.norm = nn.BatchNorm1d(backbone.dim, affine=False) if normalize else nn.Identity()
        self.fc = nn.Linear(backbone.dim, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.backbone.eval()  # or its running statistics would drift
        return self

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        with torch.no_grad():
            features = self.backbone(images)
        return self.fc(self.norm(features))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        logits = self.logits(views[0])
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy.detach()}
