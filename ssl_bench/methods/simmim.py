"""SimMIM (Xie et al., arXiv:2111.09886)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.augment import masks
from ssl_bench.config.fields import OpenShare
from ssl_bench.errors import UserError
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, need_patches

HIDES_PATCHES = True  # see `build`: which backbones have them


@layers.full_precision
def reconstruction_loss(images: Tensor, reconstruction: Tensor, mask: Tensor, patch: int) -> Tensor:
    """images, reconstruction (N, 3, H, W), mask (N, rows, columns) of patches, not 0 where hidden.

    The mean absolute error of the hidden pixels (section 3.4; equation 1).
    """
    hidden = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # (N, 1, H, W)
    hidden = hidden.to(images.dtype)
    errors = (images - reconstruction).abs() * hidden
    return errors.sum() / (hidden.sum() + 1e-5) / images.shape[1]


class SimMIM(Method):
    """A linear layer paints the hidden patches, which the encoder has as mask tokens.

    mask_patch_size: the hidden squares' side in pixels. mask_ratio: the share of them that is
    hidden.
    """

    whole_batch = None
    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        mask_patch_size: PositiveInt = 32,
        mask_ratio: OpenShare = 0.6,
    ) -> None:
        super().__init__(backbone)
        need_patches(backbone, "simmim")
        patch, size = backbone.patch_size, backbone.image_size
        self.image_size = size
        if mask_patch_size % patch or size % mask_patch_size:
            raise UserError(
                f"method.mask_patch_size={mask_patch_size} must be a multiple of "
                f"backbone.patch_size={patch}, and divide backbone.image_size={size}"
            )
        self.patch, self.mask_ratio = patch, mask_ratio
        self.scale, self.num_cells = mask_patch_size // patch, (size // mask_patch_size) ** 2
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(backbone.dim, patch**2 * 3, kernel_size=1), nn.PixelShuffle(patch)
        )

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        return (masks.random_cells(masks.noise(keys, self.num_cells), self.mask_ratio, self.scale),)

    def forward(
        self, views: Sequence[Tensor], labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Output:
        """mask: bool (N, L), of patches."""
        assert mask is not None
        reconstruction, hidden = self.predict(views[0], mask)
        return {"loss": reconstruction_loss(views[0], reconstruction, hidden, self.patch)}

    def predict(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The painted images (N, 3, H, W), and the mask (N, rows, columns)."""
        grid = tuple(size // self.patch for size in images.shape[2:])
        tokens = self.backbone.tokens(images, mask=mask, mask_token=self.mask_token)
        patches = tokens[:, self.backbone.num_prefix :].mT.unflatten(2, grid)  # (N, dim, rows, ...)
        return self.decoder(patches), mask.unflatten(1, grid)

    def paint(self, images: Tensor, keys: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in which hidden patches are zero, and in which they are painted.

        keys, indices: see `draw`.
        """
        reconstruction, hidden = self.predict(images, *self.draw(keys, indices))
        hidden = hidden.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)[:, None]
        return images.masked_fill(hidden, 0), torch.where(hidden, reconstruction, images)
