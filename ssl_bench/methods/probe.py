"""Linear classification of frozen features (He et al., arXiv:1911.05722, section 4.1)."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output

IGNORED = -100  # the label of an image that a head doesn't learn from


class AttentivePool(nn.Module):
    """What a learnt query finds among the patches: (N, L, dim) -> (N, dim).

    A block of cross-attention, heads of 64 channels, and an MLP of four times the width: the
    attentive probe of V-JEPA (arXiv:2404.08471, section 4.3; src/models/attentive_pooler.py of the
    authors, whose initial weights these are).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        heads = math.gcd(dim, max(1, dim // 64))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        outputs = self.attention.out_proj, self.mlp[2]
        for weight in (self.query, self.attention.in_proj_weight, self.mlp[0].weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in outputs:
            nn.init.trunc_normal_(layer.weight, std=0.02 / math.sqrt(2))
        for layer in (self.mlp[0], *outputs):
            nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor) -> Tensor:
        query, patches = self.query.expand(len(patches), -1, -1), self.norm(patches)
        x = query + self.attention(query, patches, patches, need_weights=False)[0]
        return (x + self.mlp(self.norm_mlp(x)))[:, 0]


class LinearProbe(Method):
    """One linear layer on a frozen backbone in eval mode.

    fc ~ N(0, 0.01), bias 0, as in the authors' main_lincls.py. normalize: standardise the features
    by their batch statistics first (batch norm without parameters, as MAE does, arXiv:2111.06377,
    A.1), so that one learning rate suits features of any scale. attentive: the backbone gives
    patches (`read_out_`), of which an AttentivePool, trained with the layer, makes the features.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        normalize: bool = False,
        attentive: bool = False,
    ) -> None:
        super().__init__(backbone.requires_grad_(False))
        self.pool = AttentivePool(backbone.dim) if attentive else nn.Identity()
        self.norm = nn.BatchNorm1d(backbone.dim, affine=False) if normalize else nn.Identity()
        self.fc = nn.Linear(backbone.dim, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.backbone.eval()  # or its running statistics would drift
        return self

    def measured(self) -> nn.Module:
        return self  # the layer on top of the backbone, too

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        with torch.no_grad():
            features = self.backbone(images)
        return self.classify(self.pool(features))

    @layers.full_precision  # a rate of 30 needs all digits of the gradient
    def classify(self, features: Tensor) -> Tensor:
        return self.fc(self.norm(features))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        logits = self.logits(views[0])
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy.detach()}


def restored(backbone: nn.Module, state: Mapping[str, Tensor]) -> LinearProbe:
    """The classifier that a run of lincls or finetune saved, on the CPU in eval mode.

    state: "model" of the run's checkpoint.
    """
    options = "norm.running_mean" in state, "pool.query" in state
    probe = LinearProbe(backbone, len(state["fc.weight"]), *options).cpu().eval()
    probe.load_state_dict({key: state[key] for key in probe.state_dict()})
    return probe


class LinearGrid(LinearProbe):
    """A LinearProbe for each of `cells` settings of the optimizer, trained at once on features.

    Each cell has two heads that see the same batches: one learns from all images; the other doesn't
    learn from held-out images, and is scored on them. All heads start as `fc` does, and none
    affects another: the loss is a sum over heads, and each head has its own tensors, which LARS and
    clipping look at one by one. `choose` makes one of them `fc`: then this is a LinearProbe.
    normalize: by the statistics of all features (`standardise`), not of each batch, so that every
    process has the same.
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
        # two of (num_classes, dim) for each cell: the head of all images, then the other
        self.weights = nn.ParameterList(self.fc.weight.clone() for _ in range(2 * cells))
        self.biases = nn.ParameterList(self.fc.bias.clone() for _ in range(2 * cells))
        # at the start all cells are alike, so that any is the best
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64))
        self.finished = False

    def pairs(self) -> list[list[nn.Parameter]]:
        """The parameters of both heads, for each cell."""
        heads = [slice(first, first + 2) for first in range(0, len(self.weights), 2)]
        return [[*self.weights[both], *self.biases[both]] for both in heads]

    def train(self, mode: bool = True) -> "LinearGrid":
        super().train(mode)
        self.norm.eval()
        return self

    @torch.no_grad()
    def standardise(self, copies: Sequence[Tensor]) -> None:
        """Normalise by the mean and variance of these features, (N, dim) each, from now on."""
        mean = torch.stack([features.mean(dim=0) for features in copies]).mean(dim=0)
        variances = [(features - mean).square().mean(dim=0) for features in copies]
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(torch.stack(variances).mean(dim=0))

    @layers.full_precision
    def heads(self, features: Tensor) -> Tensor:
        """(N, dim) -> logits (N, cells, 2, num_classes), not in bfloat16."""
        weights, biases = torch.cat(list(self.weights)), torch.cat(list(self.biases))
        logits = F.linear(self.norm(features), weights, biases)
        return logits.unflatten(1, (len(self.weights) // 2, 2, -1))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """views: one, of features (N, dim). labels (N, 2): for either head, IGNORED if held out.

        The loss's value, and `accuracy`, are those of the chosen cell's head of all images, as a
        LinearProbe has them; the loss's gradient is that of all heads.
        """
        logits = self.heads(views[0])
        each, examined = _cross_entropy(logits, labels[:, None]).mean(dim=0).unbind(dim=1)
        # Divided by the share that is kept overall: this batch may keep none, and each process
        # keeps another number.
        loss = each.sum() + examined.sum() / self.kept
        right = (logits[:, :, 0].argmax(dim=2) == labels[:, :1]).float().mean(dim=0)
        self.seen = torch.stack([each.detach(), right])  # (2, cells), for a choice after this step
        # selected on the device, so that the host doesn't wait
        mine, accuracy = self.seen.index_select(1, self.chosen[None])[:, 0]
        return {"loss": loss - loss.detach() + mine, "accuracy": accuracy}

    @torch.no_grad()
    def score(self, features: Tensor, labels: Tensor) -> Tensor:
        """Held-out features (N, dim), labels (N,) -> (cells, 2): number right, sum of losses."""
        logits = self.heads(features)[:, :, 1]
        right = logits.argmax(dim=2) == labels[:, None]
        losses = _cross_entropy(logits, labels[:, None])
        return torch.stack([right.sum(dim=0), losses.sum(dim=0)], dim=1)

    @torch.no_grad()
    def choose(self, cell: int) -> None:
        self.chosen.fill_(cell)
        self.fc.weight.copy_(self.weights[2 * cell])
        self.fc.bias.copy_(self.biases[2 * cell])

    def update(self, progress: float) -> None:
        self.finished = progress == 1


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (..., num_classes) -> losses (...), 0 for IGNORED; labels are expanded to that shape.

    F.cross_entropy takes four times as long on a CPU if classes are few.
    """
    labels = labels.expand(logits.shape[:-1])
    own = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logits.logsumexp(-1) - own).masked_fill(labels == IGNORED, 0)
