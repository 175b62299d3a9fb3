"""Vision transformers: torchvision's names, and the parts that later papers added.

They take images of any size that the patch size divides. `tokens` has all of the last layer, of
which methods may leave patches out or replace them.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer
from torchvision.ops import stochastic_depth

from ssl_bench.errors import UserError

Positions = Literal["learned", "sincos", "sincos_columns"]
Init = Literal["torchvision", "moco_v3", "mae", "dino", "dinov2", "ijepa"]
DropPath = Annotated[float, Field(ge=0, lt=1)]
DIVIDES = {"patch_size": "image_size"}  # see `build`


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al., arXiv:2103.17239, section 2); timm's name."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(EncoderBlock):
    """Attention (torch's scaled_dot_product_attention), then an MLP of four times the width.

    Each after a layer norm, and added to what comes in. drop_path: how often either is left out of
    an image in training (stochastic depth, arXiv:1603.09382). layer_scale: see LayerScale.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: float = 0.0, layer_scale: float | None = None
    ) -> None:
        super().__init__(num_heads, dim, 4 * dim, dropout=0.0, attention_dropout=0.0)
        self.drop_path = drop_path
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        attended, _ = self.self_attention(normed, normed, normed, need_weights=False)
        x = x + self._dropped(self.ls1(self.dropout(attended)))
        return x + self._dropped(self.ls2(self.mlp(self.ln_2(x))))

    def _dropped(self, x: Tensor) -> Tensor:
        if self.drop_path == 0:
            return x
        return stochastic_depth(x, self.drop_path, "row", self.training)


class ViT(VisionTransformer):
    """torchvision's network without `heads`, of `depth` blocks of width `dim`.

    forward: (N, 3, H, W) -> (N, dim), the class token or, without one, the mean of the patches.
    patch_size: pixels of a patch's side. positions: of patches; learned ones, or fixed sines and
    cosines (`sincos`) of the row, then of the column ("sincos", MoCo v3) or of the column first
    ("sincos_columns", MAE, I-JEPA). frozen_patches: the projection of the patches stays as
    initialised (MoCo v3). register_tokens: so many more tokens, without a position (Darcet et al.,
    arXiv:2309.16588). drop_path, layer_scale: see Block; drop_path rises from 0 at the first block,
    unless it is uniform.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        num_heads: int,
        depth: int = 12,
        positions: Positions = "learned",
        frozen_patches: bool = False,
        init: Init = "torchvision",
        class_token: bool = True,
        register_tokens: int = 0,
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        if dim % num_heads:
            raise UserError(f"backbone.num_heads={num_heads} does not divide the width, {dim}")
        if image_size % patch_size:
            raise UserError(
                f"backbone.patch_size={patch_size} does not divide backbone.image_size={image_size}"
            )
        super().__init__(image_size, patch_size, 0, num_heads, dim, 4 * dim, num_classes=1)
        self.heads, self.dim = nn.Identity(), dim
        shares = [1.0 if drop_path_uniform else i / max(1, depth - 1) for i in range(depth)]
        blocks = [Block(dim, num_heads, drop_path * share, layer_scale) for share in shares]
        named = ((f"encoder_layer_{i}", block) for i, block in enumerate(blocks))
        self.encoder.layers = nn.Sequential(OrderedDict(named))
        self.num_prefix = int(class_token) + register_tokens  # tokens before those of the patches
        self.has_class_token, self.num_blocks = class_token, depth
        self.register_tokens: nn.Parameter | None = None
        if register_tokens:
            registers = torch.empty(1, register_tokens, dim)
            self.register_tokens = nn.Parameter(nn.init.normal_(registers, std=1e-6))
        if not class_token:
            self.class_token = None
            self.encoder.pos_embedding = nn.Parameter(self.encoder.pos_embedding[:, 1:].detach())
        INITS[init](self)
        if positions != "learned":
            table = sincos(image_size // patch_size, dim, positions == "sincos_columns")
            zeros = torch.zeros(int(class_token), dim)
            self.encoder.pos_embedding.data[0] = torch.cat([zeros, table])
            self.encoder.pos_embedding.requires_grad_(False)
        self.conv_proj.requires_grad_(not frozen_patches)

    def classifier_keys(self) -> tuple[str, ...]:
        return ("heads.",)

    def refuses(self, size: int) -> str | None:
        if size % self.patch_size:
            return f"is no multiple of backbone.patch_size={self.patch_size}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.tokens(x))

    def pooled(self, tokens: Tensor) -> Tensor:
        """What `forward` gives of `tokens`: (N, P + L, dim) -> (N, dim)."""
        if self.class_token is not None:
            return tokens[:, 0]
        return tokens[:, self.num_prefix :].mean(dim=1)

    def tokens(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """(N, 3, H, W) -> the last layer's tokens, normalised: (N, P + L, dim).

        The class token and the registers come first, P = `num_prefix`, then the L patches, row by
        row. keep: int64 (N, K), the patches that the network sees, in this order; None: all. mask:
        bool (N, L), the patches that are replaced by `mask_token`, which broadcasts to (N, L, dim),
        before they get their positions.
        """
        return self.encoder.ln(self.encoder.layers(self._embedded(images, keep, mask, mask_token)))

    def last_tokens(self, images: Tensor, num_blocks: int) -> list[Tensor]:
        """`tokens` of each of the last blocks, normalised as the last one's, which comes last."""
        x, found = self._embedded(images), []
        for block in self.encoder.layers:
            found.append(x := block(x))
        return [self.encoder.ln(x) for x in found[-num_blocks:]]

    def attention(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, heads, L): what the class token attends to in the last block.

        Of the patches; the rest of 1 is the class token's and the registers'.
        """
        *before, last = self.encoder.layers
        x = self._embedded(images)
        for block in before:
            x = block(x)
        x = last.ln_1(x)
        _, weights = last.self_attention(x, x, x, average_attn_weights=False)
        return weights[:, :, 0, self.num_prefix :]

    def _embedded(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """What the first block is given; see `tokens`."""
        patches = self.conv_proj(images)  # (N, dim, rows, columns)
        positions = self.positions(*patches.shape[2:])
        x = patches.flatten(2).mT  # (N, L, dim)
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        first = positions.shape[1] - x.shape[1]
        x = x + positions[:, first:]
        if keep is not None:
            x = taken(x, keep)
        prefix = []
        if self.class_token is not None:
            prefix.append(self.class_token + positions[:, :first])
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return self.encoder.dropout(x)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, C + rows * columns, dim), C = 1 if there is a class token.

        For another grid than that of `image_size` they are interpolated, as DINO's authors do.
        """
        embedding = self.encoder.pos_embedding
        side = self.image_size // self.patch_size
        if (rows, columns) == (side, side):
            return embedding
        first = embedding.shape[1] - side * side
        grid = embedding[:, first:].mT.unflatten(2, (side, side))
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([embedding[:, :first], grid.flatten(2).mT], dim=1)


def taken(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (N, L, dim), indices int64 (N, K) -> those of these indices (N, K, dim)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos(side: int, dim: int, columns_first: bool = False) -> Tensor:
    """Fixed position embeddings (side * side, dim).

    A quarter each: sines and cosines of the row, and of the column, of wavelengths 2 pi to
    20,000 pi, as in vits.py 53-69 of MoCo v3's authors. columns_first: of the column, and of the
    row, as in util/pos_embed.py of MAE's.
    """
    place = torch.arange(side, dtype=torch.float64)
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.outer(place, rates)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    parts = [waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)]
    return torch.cat(parts[::-1] if columns_first else parts, dim=1)


@torch.no_grad()
def init_as_moco_v3(network: nn.Module) -> None:
    """Xavier's uniform for linear layers and patches, as in the authors' vits.py 31-47.

    Query, key and value count as a layer each.
    """
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            _uniform_(module.in_proj_weight, module.embed_dim, module.embed_dim)
    _init_as_mae(network, qkv=False)
    nn.init.zeros_(network.conv_proj.bias)
    if network.class_token is not None:
        nn.init.normal_(network.class_token, std=1e-6)


def init_as_mae(network: nn.Module) -> None:
    """Xavier's uniform for linear layers and patches, as in models_mae.py 69-98 of the authors.

    Query, key and value count as one layer.
    """
    _init_as_mae(network, qkv=True)


@torch.no_grad()
def _init_as_mae(network: nn.Module, qkv: bool) -> None:
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            if qkv:
                nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ViT):
            patches = module.conv_proj
            patches.reset_parameters()  # its bias stays so
            _uniform_(patches.weight, patches.weight[0].numel(), patches.out_channels)
            if module.class_token is not None:
                nn.init.normal_(module.class_token, std=0.02)


@torch.no_grad()
def init_as_dino(network: nn.Module) -> None:
    """A truncated normal of 0.02 for linear layers, tokens and positions, biases zero.

    As in vision_transformer.py 147-180 of the authors. Patches are as torch has them.
    """
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ViT):
            module.conv_proj.reset_parameters()
            nn.init.trunc_normal_(module.encoder.pos_embedding, std=0.02)
            if module.class_token is not None:
                nn.init.trunc_normal_(module.class_token, std=0.02)


def init_as_dinov2(network: nn.Module) -> None:
    """DINO's, but for the class token: as in the authors' vision_transformer.py."""
    init_as_dino(network)
    if network.class_token is not None:
        nn.init.normal_(network.class_token, std=1e-6)


@torch.no_grad()
def init_as_ijepa(network: nn.Module) -> None:
    """DINO's; the last layers of the i-th block's parts are divided by sqrt(2 i), i = 1, 2, ...

    As in src/models/vision_transformer.py of the authors (fix_init_weight). Patches, too, are of
    the truncated normal.
    """
    init_as_dino(network)
    if isinstance(network, ViT):
        nn.init.trunc_normal_(network.conv_proj.weight, std=0.02)
        nn.init.zeros_(network.conv_proj.bias)
    blocks = (module for module in network.modules() if isinstance(module, Block))
    for number, block in enumerate(blocks, start=1):
        block.self_attention.out_proj.weight.div_((2 * number) ** 0.5)
        block.mlp[3].weight.div_((2 * number) ** 0.5)


def _uniform_(weight: Tensor, inputs: int, outputs: int) -> None:
    bound = (6 / (inputs + outputs)) ** 0.5
    nn.init.uniform_(weight, -bound, bound)


INITS: dict[Init, Callable[[nn.Module], None]] = {
    "torchvision": lambda network: None,
    "moco_v3": init_as_moco_v3,
    "mae": init_as_mae,
    "dino": init_as_dino,
    "dinov2": init_as_dinov2,
    "ijepa": init_as_ijepa,
}


def vit_tiny(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    num_heads: PositiveInt | None = None,
    depth: PositiveInt = 12,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
    class_token: bool = True,
    register_tokens: NonNegativeInt = 0,
    drop_path: DropPath = 0.0,
    drop_path_uniform: bool = False,
    layer_scale: PositiveFloat | None = None,
    dim: PositiveInt = 192,
) -> nn.Module:
    """ViT-T (Touvron et al., arXiv:2012.12877, table 1), whose dim is 192. See ViT.

    num_heads: of attention; None: 64 channels each, as in that table. MoCo v3's ViT-S has 12. init:
    whose authors' initial weights.
    """
    return ViT(
        image_size,
        patch_size,
        dim,
        num_heads or max(1, dim // 64),
        depth,
        positions,
        frozen_patches,
        init,
        class_token,
        register_tokens,
        drop_path,
        drop_path_uniform,
        layer_scale,
    )


def vit_small(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    num_heads: PositiveInt | None = None,
    depth: PositiveInt = 12,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
    class_token: bool = True,
    register_tokens: NonNegativeInt = 0,
    drop_path: DropPath = 0.0,
    drop_path_uniform: bool = False,
    layer_scale: PositiveFloat | None = None,
) -> nn.Module:
    """ViT-S (Touvron et al., arXiv:2012.12877, table 1), dim = 384. See `vit_tiny`."""
    return ViT(
        image_size,
        patch_size,
        384,
        num_heads or 6,
        depth,
        positions,
        frozen_patches,
        init,
        class_token,
        register_tokens,
        drop_path,
        drop_path_uniform,
        layer_scale,
    )


def vit_base(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    num_heads: PositiveInt | None = None,
    depth: PositiveInt = 12,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
    class_token: bool = True,
    register_tokens: NonNegativeInt = 0,
    drop_path: DropPath = 0.0,
    drop_path_uniform: bool = False,
    layer_scale: PositiveFloat | None = None,
) -> nn.Module:
    """ViT-B (Dosovitskiy et al., arXiv:2010.11929, table 1), dim = 768. See `vit_tiny`."""
    return ViT(
        image_size,
        patch_size,
        768,
        num_heads or 12,
        depth,
        positions,
        frozen_patches,
        init,
        class_token,
        register_tokens,
        drop_path,
        drop_path_uniform,
        layer_scale,
    )
