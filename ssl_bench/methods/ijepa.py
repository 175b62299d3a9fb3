"""I-JEPA (Assran et al., arXiv:2301.08243)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ssl_bench.augment import masks
from ssl_bench.backbones.vit import Block, init_as_ijepa, sincos, taken
from ssl_bench.config.fields import Fraction, Interval
from ssl_bench.errors import UserError
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, ema_, health_of, momentum_copy, need_patches
from ssl_bench.runtime import distributed

HIDES_PATCHES = True  # see `build`: which backbones have them


@layers.full_precision
def prediction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(..., D) each -> smooth L1, the mean of all; the target gets no gradient (train.py)."""
    return F.smooth_l1_loss(prediction, target.detach())


class Predictor(nn.Module):
    """A narrow ViT: from the context's tokens and the places of other patches to their tokens."""

    def __init__(self, dim: int, width: int, depth: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)
        init_as_ijepa(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        table = sincos(side, width, columns_first=True).float()
        self.register_buffer("positions", table[None], persistent=False)

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """tokens (N, K, dim) of the patches `context` (N, K), targets (N, B, M) -> (B * N, M, dim).

        Each of an image's B blocks is predicted by itself.
        """
        num_blocks = targets.shape[1]
        positions = self.positions.expand(len(tokens), -1, -1)
        seen = self.predictor_embed(tokens)
        seen = seen + taken(positions, context)
        asked = torch.cat([taken(positions, block) for block in targets.unbind(1)])
        asked = asked + self.mask_token.to(seen.dtype)
        x = torch.cat([seen.repeat(num_blocks, 1, 1), asked.to(seen.dtype)], dim=1)
        x = self.predictor_norm(self.predictor_blocks(x))
        return self.predictor_proj(x[:, context.shape[1] :])


class IJEPA(Method):
    """From a part of an image the features of other parts are predicted, as a slow copy has them.

    Pretraining exports that copy, the target encoder. predictor_dim, predictor_depth,
    predictor_heads: the predictor's width, blocks and attention heads. momentum: the copy's; it
    rises linearly to 1. target_scale, target_aspect, context_scale, num_targets, min_keep,
    to_edge: see `masks.targets_and_context`.
    """

    whole_batch = None
    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        predictor_dim: PositiveInt = 384,
        predictor_depth: PositiveInt = 12,
        predictor_heads: PositiveInt = 12,
        momentum: Fraction = 0.996,
        num_targets: PositiveInt = 4,
        target_scale: Interval = (0.15, 0.2),
        target_aspect: Interval = (0.75, 1.5),
        context_scale: Interval = (0.85, 1.0),
        min_keep: NonNegativeInt = 10,
        to_edge: bool = False,
    ) -> None:
        need_patches(backbone, "ijepa")
        super().__init__(momentum_copy(backbone))
        self.image_size, self.side = backbone.image_size, backbone.image_size // backbone.patch_size
        self.momentum, self.num_targets, self.min_keep = momentum, num_targets, min_keep
        self.to_edge = to_edge
        self.scales, self.aspect = (target_scale, context_scale), target_aspect
        sizes = (
            masks.block_size(v / 1000, self.side, target_scale, target_aspect) for v in range(1000)
        )
        smallest = min(rows * columns for rows, columns in sizes)
        if smallest <= min_keep:
            mend = f"method.min_keep={smallest - 1}, or " if smallest else ""
            raise UserError(
                f"method.min_keep={min_keep}: targets must have more patches, and of the "
                f"{self.side} x {self.side} of an image the smallest have {smallest}: type "
                f"{mend}a smaller backbone.patch_size"
            )
        self.student_backbone = backbone
        self.predictor = Predictor(
            backbone.dim, predictor_dim, predictor_depth, predictor_heads, self.side
        )
        self.chosen = (0.5, 0.5)  # uniform numbers: the sizes of this step's targets and context

    def begin(self, epoch: float, epochs: int) -> None:
        """The sizes of blocks are those of all images of a step, so that these can be stacked."""
        target, context = distributed.broadcast(torch.rand(2)).tolist()
        self.chosen = (target, context)

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """context (N, K) and targets (N, B, M), the numbers of patches.

        Places are drawn for each image. Lists are cut at their end to the shortest of the batch.
        """
        target = masks.block_size(self.chosen[0], self.side, self.scales[0], self.aspect)
        context = masks.block_size(self.chosen[1], self.side, self.scales[1], (1.0, 1.0))
        rules = (self.side, target, context, self.num_targets, self.min_keep, self.to_edge)
        drawn = [masks.targets_and_context(own, *rules) for own in masks.numbers(keys, 1)]
        shortest = torch.tensor([min(len(found) for _, found in drawn)])
        length = int(distributed.all_gather(shortest).min())
        contexts = torch.stack([torch.from_numpy(found[:length]) for _, found in drawn])
        targets = torch.stack([torch.stack(list(map(torch.from_numpy, t))) for t, _ in drawn])
        return contexts.to(keys.device), targets.to(keys.device)

    def forward(
        self,
        views: Sequence[Tensor],
        labels: Tensor | None = None,
        context: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Output:
        assert context is not None
        assert targets is not None
        images, prefix = views[0], self.backbone.num_prefix
        with torch.no_grad():
            features = self.backbone.tokens(images)[:, prefix:]
            wanted = layers.full_precision(F.layer_norm)(features, features.shape[-1:])
            wanted = torch.cat([taken(wanted, block) for block in targets.unbind(1)])
        tokens = self.student_backbone.tokens(images, keep=context)[:, prefix:]
        loss = prediction_loss(self.predictor(tokens, context, targets), wanted)
        return {"loss": loss, "embeddings": health_of(features.mean(dim=1))}

    def update(self, progress: float) -> None:
        """The authors have this momentum a step later: it begins at `momentum`."""
        momentum = self.momentum + (1 - self.momentum) * progress
        ema_([self.backbone], [self.student_backbone], momentum)
