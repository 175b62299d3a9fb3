"""Masked autoencoders, MAE (He et al., arXiv:2111.06377)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.augment import masks
from ssl_bench.backbones.vit import Block, init_as_mae, sincos, taken
from ssl_bench.config.fields import OpenShare
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, need_patches

HIDES_PATCHES = True  # see `build`: which backbones have them


def patchify(images: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, L, patch * patch * C): patches row by row.

    Inside a patch the order is (row, column, channel).
    """
    blocks = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (N, C, rows, columns, p, p)
    return blocks.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, channels: int = 3) -> Tensor:
    """`patchify` undone, for square images."""
    side = round(tokens.shape[1] ** 0.5)
    blocks = tokens.view(-1, side, side, patch, patch, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def mask(tokens: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, L, D), noise (N, L) -> kept (N, K, D), mask (N, L) and ids_restore (N, L).

    See `masks.random_patches`. mask is 1 where a token was removed; ids_restore are the ranks, by
    which the kept ones followed by the others come back in order.
    """
    kept, hidden, ranks = masks.random_patches(noise, ratio)
    return taken(tokens, kept), hidden.to(tokens.dtype), ranks


@layers.full_precision
def reconstruction_loss(
    images: Tensor, prediction: Tensor, mask: Tensor, patch: int, norm_pix: bool
) -> Tensor:
    """images (N, 3, H, W), prediction (N, L, patch * patch * 3), mask (N, L), not 0 where hidden.

    The mean squared error of the pixels of hidden patches (section 3). norm_pix: the target is each
    patch less its mean, divided by its standard deviation.
    """
    target = patchify(images, patch)
    if norm_pix:
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    errors = (prediction - target).square().mean(dim=-1)  # (N, L)
    mask = mask.to(errors.dtype)
    return (errors * mask).sum() / mask.sum()


class MAE(Method):
    """A small decoder paints the patches that the encoder didn't see.

    mask_ratio: share of the patches that are hidden. decoder_dim, decoder_depth, decoder_heads: the
    decoder's width, number of blocks and attention heads. norm_pix: see `reconstruction_loss`.
    """

    whole_batch = None
    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        mask_ratio: OpenShare = 0.75,
        decoder_dim: PositiveInt = 512,
        decoder_depth: PositiveInt = 8,
        decoder_heads: PositiveInt = 16,
        norm_pix: bool = True,
    ) -> None:
        super().__init__(backbone)
        need_patches(backbone, "mae")
        self.image_size = backbone.image_size
        self.mask_ratio, self.norm_pix, self.patch = mask_ratio, norm_pix, backbone.patch_size
        self.decoder_embed = nn.Linear(backbone.dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        blocks = [Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch**2 * 3)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_as_mae(part)
        # those of the class token and of registers are zero
        table = sincos(backbone.image_size // self.patch, decoder_dim, columns_first=True)
        positions = torch.cat([torch.zeros(backbone.num_prefix, decoder_dim), table])
        self.register_buffer("decoder_positions", positions.float(), persistent=False)

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        num_patches = len(self.decoder_positions) - self.backbone.num_prefix
        return (masks.noise(keys, num_patches),)

    def forward(
        self, views: Sequence[Tensor], labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Output:
        """noise: (N, L), uniform; see `masks.random_patches`."""
        assert noise is not None
        prediction, hidden = self.predict(views[0], noise)
        loss = reconstruction_loss(views[0], prediction, hidden, self.patch, self.norm_pix)
        return {"loss": loss}

    def predict(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels of all patches (N, L, patch**2 * 3), and which are hidden (N, L)."""
        numbers = torch.arange(noise.shape[1], device=noise.device).expand_as(noise)
        kept, hidden, ranks = mask(numbers[..., None], noise, self.mask_ratio)
        latent = self.backbone.tokens(images, keep=kept[..., 0])
        return self.decode(latent, ranks), hidden

    def paint(self, images: Tensor, keys: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) in which hidden patches are zero, and in which they are painted.

        keys, indices: see `draw`. With norm_pix each has the mean and standard deviation of its own
        pixels.
        """
        prediction, hidden = self.predict(images, *self.draw(keys, indices))
        patches, hidden = patchify(images, self.patch), hidden[..., None].bool()
        if self.norm_pix:
            mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        both = patches.masked_fill(hidden, 0), torch.where(hidden, prediction, patches)
        masked, painted = (unpatchify(one, self.patch) for one in both)
        return masked, painted

    def decode(self, latent: Tensor, ranks: Tensor) -> Tensor:
        """Tokens (N, P + K, dim) of the encoder, ranks (N, L) -> pixels (N, L, patch**2 * 3)."""
        tokens, prefix = self.decoder_embed(latent), self.backbone.num_prefix
        num_hidden = ranks.shape[1] + prefix - tokens.shape[1]
        fill = self.mask_token.to(tokens.dtype).expand(len(tokens), num_hidden, -1)
        patches = taken(torch.cat([tokens[:, prefix:], fill], dim=1), ranks)
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1) + self.decoder_positions
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, prefix:]
