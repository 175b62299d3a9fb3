"""Vision transformers: torchvision's without their head.

They take images of any size that the patch size divides.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.errors import UserError

Positions = Literal["learned", "sincos"]
Init = Literal["torchvision", "moco_v3"]


def _vit(
    image_size: int,
    patch_size: int,
    dim: int,
    num_heads: int,
    positions: Positions,
    frozen_patches: bool,
    init: Init,
) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    class ViT(VisionTransformer):
        """torchvision's network without `heads`: its own names. Takes images of any size."""

        def __init__(self) -> None:
            super().__init__(image_size, patch_size, 12, num_heads, dim, 4 * dim, num_classes=1)
            self.heads, self.dim = nn.Identity(), dim
            if init == "moco_v3":
                _init_as_moco_v3(self)
            if positions == "sincos":
                self.encoder.pos_embedding.data[0] = _sincos(image_size // patch_size, dim)
                self.encoder.pos_embedding.requires_grad_(False)
            self.conv_proj.requires_grad_(not frozen_patches)

        def classifier_keys(self) -> tuple[str, ...]:
            return ("heads.",)

        def forward(self, x: Tensor) -> Tensor:
            patches = self.conv_proj(x)  # (N, dim, rows, columns)
            class_token = self.class_token.expand(x.shape[0], -1, -1)
            tokens = torch.cat([class_token, patches.flatten(2).mT], dim=1)
            tokens = tokens + self.positions(*patches.shape[2:])
            return self.encoder.ln(self.encoder.layers(self.encoder.dropout(tokens)))[:, 0]

        def refuses(self, size: int) -> str | None:
            if size % patch_size:
                return f"is no multiple of backbone.patch_size={patch_size}"
            return None

        def positions(self, rows: int, columns: int) -> Tensor:
            """Position embeddings (1, 1 + rows * columns, dim).

            For another grid than that of `image_size` they are interpolated, as DINO's authors do.
            """
            embedding = self.encoder.pos_embedding
            side = image_size // patch_size
            if (rows, columns) == (side, side):
                return embedding
            grid = embedding[:, 1:].mT.unflatten(2, (side, side))
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
            return torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)

    if dim % num_heads:
        raise UserError(f"backbone.num_heads={num_heads} does not divide the width, {dim}")
    if image_size % patch_size:
        raise UserError(
            f"backbone.patch_size={patch_size} does not divide backbone.image_size={image_size}"
        )
    return ViT()


@torch.no_grad()
def _init_as_moco_v3(network: nn.Module) -> None:
    """Xavier's uniform for linear layers and patches, as in the authors' vits.py 31-47.

    Query, key and value count as a layer each.
    """

    def uniform_(weight: Tensor, inputs: int, outputs: int) -> None:
        bound = (6 / (inputs + outputs)) ** 0.5
        nn.init.uniform_(weight, -bound, bound)

    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            uniform_(module.in_proj_weight, module.embed_dim, module.embed_dim)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            uniform_(module.weight, module.in_features, module.out_features)
            nn.init.zeros_(module.bias)
    patches = network.conv_proj
    uniform_(patches.weight, patches.weight[0].numel(), patches.out_channels)
    nn.init.zeros_(patches.bias)
    nn.init.normal_(network.class_token, std=1e-6)


def _sincos(side: int, dim: int) -> Tensor:
    """Fixed position embeddings (1 + side * side, dim), as in the authors' vits.py 53-69.

    A quarter each: sines and cosines of the row, and of the column, of wavelengths 2 pi to
    20,000 pi. The class token's are 0.
    """
    place = torch.arange(side, dtype=torch.float32)
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    angles = torch.outer(place, rates)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    grid = torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])


def vit_tiny(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    num_heads: PositiveInt | None = None,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
) -> nn.Module:
    """ViT-T (Touvron et al., arXiv:2012.12877, table 1), dim = 192.

    num_heads: of attention; None: 64 channels each, as in that table. MoCo v3's ViT-S has 12.
    positions: the patches' embeddings; "sincos" are fixed. frozen_patches: the projection of the
    patches stays as initialised. Both, and `init`, are MoCo v3's (arXiv:2104.02057, section 4.1).
    """
    return _vit(image_size, patch_size, 192, num_heads or 3, positions, frozen_patches, init)


def vit_small(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    num_heads: PositiveInt | None = None,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
) -> nn.Module:
    """ViT-S (Touvron et al., arXiv:2012.12877, table 1), dim = 384. See `vit_tiny`."""
    return _vit(image_size, patch_size, 384, num_heads or 6, positions, frozen_patches, init)


def vit_base(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    num_heads: PositiveInt | None = None,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
) -> nn.Module:
    """ViT-B (Dosovitskiy et al., arXiv:2010.11929, table 1), dim = 768. See `vit_tiny`."""
    return _vit(image_size, patch_size, 768, num_heads or 12, positions, frozen_patches, init)
