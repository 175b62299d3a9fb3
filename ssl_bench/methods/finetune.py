"""Training a pretrained backbone, or the end of it, with labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.methods.base import Method, Output

Block = list[nn.Module | nn.Parameter]


def blocks(network: nn.Module) -> list[Block]:
    """The parts of a network from input to output: first the stem, then each residual block.

    A block is an entry of a Sequential or ModuleList (layer1.0 of a ResNet, blocks.0 of a ViT);
    what comes before the first belongs to the stem, what comes after it to the block before. Every
    parameter is in exactly one part.
    """
    parts: list[Block] = [[]]

    def walk(module: nn.Module) -> None:
        # class token and position embeddings belong to the stem
        parts[0].extend(module.parameters(recurse=False))
        for child in module.children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                parts.extend([entry] for entry in child if any(True for _ in entry.parameters()))
            elif any(isinstance(inner, nn.Sequential | nn.ModuleList) for inner in child.modules()):
                walk(child)
            else:
                parts[-1].append(child)

    walk(network)
    return parts


def parameters(part: Block) -> list[nn.Parameter]:
    """The parameters of a part that are trained."""
    every: list[nn.Parameter] = []
    for member in part:
        every.extend([member] if isinstance(member, nn.Parameter) else member.parameters())
    return [parameter for parameter in every if parameter.requires_grad]


class FineTune(Method):
    """A new linear layer on a backbone, both trained.

    fc ~ N(0, 0.01), bias 0, as in Barlow Twins' evaluate.py. trained_blocks: train only the last so
    many `blocks` of the backbone, None: all; the others keep their weights and statistics. mixup:
    pairs of images and their labels are mixed by a share drawn from Beta(mixup, mixup) for each
    batch (Zhang et al., arXiv:1710.09412); 0: no mixing.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: PositiveInt,
        trained_blocks: PositiveInt | None = None,
        mixup: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(backbone)
        self.fc = nn.Linear(backbone.dim, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.mixup = mixup
        parts = blocks(backbone)
        if trained_blocks is not None and trained_blocks >= len(parts):
            raise UserError(
                f"stage.trained_blocks={trained_blocks}: the backbone has {len(parts) - 1} blocks: "
                "choose at most so many, or null for all of it"
            )
        first = 0 if trained_blocks is None else len(parts) - trained_blocks
        self.trained = [parameters(part) for part in parts[first:]]  # from the input to the output
        fixed = parts[:first]
        self.frozen = [module for part in fixed for module in part if isinstance(module, nn.Module)]
        for part in fixed:
            for parameter in parameters(part):
                parameter.requires_grad_(False)

    def measured(self) -> nn.Module:
        return self  # the layer on top of the backbone, too

    def train(self, mode: bool = True) -> "FineTune":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        return self.fc(self.backbone(images))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        """`accuracy`: with mixup, a label counts by its share in the image."""
        images, share = views[0], 1.0
        if self.mixup:
            # drawn on the host, by the step's generator
            share = torch.distributions.Beta(self.mixup, self.mixup).sample()
            # pairs are random, since the order of a batch is
            images = share * images + (1 - share) * images.flip(0)
        logits = self.logits(images)
        loss = share * F.cross_entropy(logits, labels)
        right = share * (logits.argmax(dim=1) == labels).float().mean()
        if self.mixup:
            others = labels.flip(0)
            loss = loss + (1 - share) * F.cross_entropy(logits, others)
            right = right + (1 - share) * (logits.argmax(dim=1) == others).float().mean()
        return {"loss": loss, "accuracy": right.detach()}
