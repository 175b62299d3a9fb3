"""What is cut from pictures of any size before they are a batch: draws from the sizes alone."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Window(NamedTuple):
    """One view of one picture, as `Windows` describes it."""

    top: int
    left: int
    height: int
    width: int
    resized: tuple[int, int]
    corner: tuple[int, int]
    mirrored: bool


class Windows(NamedTuple):
    """One view of each of B pictures: a box, resized, of which a square of `size` pixels is cut.

    That square is all of a random crop; of a test view it is the centre.
    """

    boxes: Tensor  # int64 (B, 4): top, left, height, width in the upright picture
    resized: Tensor  # int64 (B, 2): the height and width that the box becomes
    corners: Tensor  # int64 (B, 2): top and left of the square in the resized box
    mirrored: Tensor  # bool (B,)
    size: int
    interpolation: str  # "bilinear" or "bicubic", antialiased

    def each(self) -> list[Window]:
        """One of each picture, in plain numbers."""
        columns = (self.boxes, self.resized, self.corners, self.mirrored)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            Window(box[0], box[1], box[2], box[3], tuple(resized), tuple(corner), mirrored)
            for box, resized, corner, mirrored in rows
        ]


class Look(Protocol):
    """How pictures are shown: an augmentation, or a test view."""

    image_size: int  # of the largest views

    def windows(self, sizes: Tensor, seed: int, epoch: int, indices: Tensor) -> list[Windows]:
        """What to cut from pictures of these sizes, for each view.

        sizes: int64 (B, 2), heights and widths; indices: int64 (B,), in the split.
        """
        ...
