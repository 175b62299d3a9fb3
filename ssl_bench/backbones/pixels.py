"""The image itself."""

from pydantic import PositiveInt
from torch import Tensor, nn


class Pixels(nn.Module):
    """The image itself as the feature: the floor of every table. Without parameters."""

    def __init__(self, image_size: PositiveInt) -> None:
        super().__init__()
        self.image_size, self.dim = image_size, 3 * image_size * image_size

    def refuses(self, size: int) -> str | None:
        return f"is not backbone.image_size={self.image_size}" if size != self.image_size else None

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)
