"""Linear classification of frozen features (He et al., arXiv:1911.05722, section 4.1)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output

IGNORED = -100  # the label of an image that a head doesn't learn from


class LinearProbe(Method):
    """One linear layer on a frozen backbone in eval mode; fc ~ N(0, 0.01), bias 0, as in the
    authors' main_lincls.py.

    normalize: standardise the features by their batch statistics first (batch norm without
    parameters, as MAE does, arXiv:2111.06377, A.1), so that one learning rate suits features of any
    scale.
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
        return self.classify(features)

    @layers.full_precision  # lr 30 wants all of a gradient's digits
    def classify(self, features: Tensor) -> Tensor:
        return self.fc(self.norm(features))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        logits = self.logits(views[0])
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy.detach()}


def restored(backbone: nn.Module, state: Mapping[str, Tensor]) -> LinearProbe:
    """The probe that a run of lincls or finetune saved, on the CPU in eval mode. state: "model" of
    its checkpoint.
    """
    probe = (
        LinearProbe(backbone, len(state["fc.weight"]), normalize="norm.running_mean" in state)
        .cpu()
        .eval()
    )
    probe.load_state_dict({key: state[key] for key in probe.state_dict()})
    return probe


class LinearGrid(LinearProbe):
    """A LinearProbe for each of `cells` settings of the optimizer, all trained at once on features
    of the backbone.

    Each has two heads that see the same batches: one learns from all images; the other not from
    those held out, and is there to be scored on them. All start as `fc` does, and none feels the
    others: the loss is a sum over heads, each with tensors of its own, which is what LARS and
    clipping look at. `choose` makes one of them `fc`: then this is a LinearProbe.
    normalize: by the statistics of all features (`standardise`), not of each batch: every process
    has the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        cells: int,
        kept: float = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes, normalize)
        self.kept = kept
        self.fc.requires_grad_(False)
        # of each cell two, (num_classes, dim): the head of all images, then the other
        self.weights = nn.ParameterList(self.fc.weight.clone() for _ in range(2 * cells))
        self.biases = nn.ParameterList(self.fc.bias.clone() for _ in range(2 * cells))
        # they start alike: then any is the best
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64))
        self.finished = False

    def pairs(self) -> list[list[nn.Parameter]]:
        """Of each cell, the parameters of both heads."""
        return [
            [*self.weights[first : first + 2], *self.biases[first : first + 2]]
            for first in range(0, len(self.weights), 2)
        ]

    def train(self, mode: bool = True) -> "LinearGrid":
        super().train(mode)
        self.norm.eval()
        return self

    @torch.no_grad()
    def standardise(self, copies: Sequence[Tensor]) -> None:
        """Normalise by the mean and variance of features (N, dim) each."""
        mean = torch.stack([features.mean(dim=0) for features in copies]).mean(dim=0)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(
            torch.stack([(f - mean).square().mean(dim=0) for f in copies]).mean(dim=0)
        )

    @layers.full_precision
    def heads(self, features: Tensor) -> Tensor:
        """(N, dim) -> logits (N, cells, 2, num_classes), not in bfloat16."""
        logits = F.linear(
            self.norm(features), torch.cat(list(self.weights)), torch.cat(list(self.biases))
        )
        return logits.unflatten(1, (len(self.weights) // 2, 2, -1))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """views: one, of features (N, dim). labels (N, 2): for the one head and the other, IGNORED
        where held out.

        Its value, and accuracy, are those of the chosen cell's head of all images, as a LinearProbe
        has them; its gradient is that of all heads.
        """
        logits = self.heads(views[0])
        each, examined = _cross_entropy(logits, labels[:, None]).mean(dim=0).unbind(dim=1)
        # Not by how many images this batch keeps, which may be none, and isn't the same on each
        # process.
        loss = each.sum() + examined.sum() / self.kept
        right = (logits[:, :, 0].argmax(dim=2) == labels[:, :1]).float().mean(dim=0)
        self.seen = torch.stack([each.detach(), right])  # (2, cells), for a choice after this step
        # the host doesn't wait to know which
        mine, accuracy = self.seen.index_select(1, self.chosen[None])[:, 0]
        return {"loss": loss - loss.detach() + mine, "accuracy": accuracy}

    @torch.no_grad()
    def score(self, features: Tensor, labels: Tensor) -> Tensor:
        """Held-out features (N, dim), labels (N,) -> (cells, 2): how many are right, their summed
        cross-entropy.
        """
        logits = self.heads(features)[:, :, 1]
        right = logits.argmax(dim=2) == labels[:, None]
        return torch.stack(
            [right.sum(dim=0), _cross_entropy(logits, labels[:, None]).sum(dim=0)], dim=1
        )

    @torch.no_grad()
    def choose(self, cell: int) -> None:
        self.chosen.fill_(cell)
        self.fc.weight.copy_(self.weights[2 * cell])
        self.fc.bias.copy_(self.biases[2 * cell])

    def update(self, progress: float) -> None:
        self.finished = progress == 1


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., num_classes) -> (...); labels are expanded to it, and 0 comes of IGNORED.

    F.cross_entropy's softmax takes four times as long on a CPU where classes are few.
    """
    labels = labels.expand(logits.shape[:-1])
    own = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logits.logsumexp(-1) - own).masked_fill(labels == IGNORED, 0)
