"""Batched augmentation in two halves.

`sample(u)` turns uniforms (B, num_draws) into a set of parameters for each image and sees no
pixels. `apply(images, *params)` is a pure function with static shapes and no data-dependent
branches: float images (B, 3, H, W) in [0, 1] to the same. For the same parameters each op equals
its namesake in `torchvision.transforms.v2.functional` on float tensors.

Per-pixel comparisons and `torch.where` are avoided: on the CPU they cost ten times an arithmetic
pass.
"""

import math
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench.config.fields import Interpolation

TINY = 1e-30  # added to a zero, or put in its place: small beside any difference of two pixels


class RandomResizedCrop(nn.Module):
    """A random box, resized to (size, size) with antialiasing, mirrored with probability `flip_p`.

    The mirror is in the resampling matrix and costs nothing; whatever follows treats left and right
    alike, so the result is that of a flip at the end.
    """

    tries = 10  # as torchvision: after ten boxes that don't fit, a centre crop

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_p: float = 0.0,
        interpolation: Interpolation = "bilinear",
    ):
        super().__init__()
        self.size, self.scale, self.ratio, self.flip_p = size, scale, ratio, flip_p
        self.interpolation = interpolation
        self.num_draws = 2 * self.tries + 3

    def sample(self, u: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, ...]:
        """Top, left, height and width of boxes in height x width, int64 (B,); flip, bool (B,).

        height, width: those of all images, or int64 (B,).
        """
        areas, ratios, (y, x, flip) = u[:, : self.tries], u[:, self.tries : -3], u[:, -3:].unbind(1)
        tall, wide = (
            side[:, None] if isinstance(side, Tensor) else side for side in (height, width)
        )
        areas = tall * wide * _between(areas, *self.scale)
        ratios = _between(ratios, *map(math.log, self.ratio)).exp()
        widths, heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
        valid = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= tall)

        # The fallback is one more try, always valid; argmax returns the first valid one.
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        fallback_h, fallback_w = self._fallback(tall, wide)
        heights = torch.cat([heights, torch.zeros_like(heights[:, :1]) + fallback_h], 1)
        widths = torch.cat([widths, torch.zeros_like(widths[:, :1]) + fallback_w], 1)
        chosen = valid.int().argmax(1, keepdim=True)
        box_h, box_w = heights.gather(1, chosen).squeeze(1), widths.gather(1, chosen).squeeze(1)

        centred = chosen.squeeze(1) == self.tries
        top = torch.where(centred, (height - box_h).div(2), y * (height - box_h + 1)).floor()
        left = torch.where(centred, (width - box_w).div(2), x * (width - box_w + 1)).floor()
        return top.long(), left.long(), box_h.long(), box_w.long(), flip < self.flip_p

    def _fallback(
        self, height: int | Tensor, width: int | Tensor
    ) -> tuple[int | Tensor, int | Tensor]:
        """The largest box of an allowed shape."""
        low, high = self.ratio
        if isinstance(height, Tensor):
            tall = (width.double() / low).round().clamp(min=1).minimum(height)
            wide = (height.double() * high).round().clamp(min=1).minimum(width)
            return tall.float(), wide.float()
        if width / height < low:
            return max(1, round(width / low)), width
        if width / height > high:
            return height, max(1, round(height * high))
        return height, width

    def apply(
        self, images: Tensor, top: Tensor, left: Tensor, box_h: Tensor, box_w: Tensor, flip: Tensor
    ) -> Tensor:
        cubic = self.interpolation == "bicubic"
        rows = _resampling(top, box_h, torch.zeros_like(flip), self.size, images.shape[2], cubic)
        columns = _resampling(left, box_w, flip, self.size, images.shape[3], cubic)
        # no copy if the memory is channels_last
        images = _mix_rows(images.permute(0, 2, 3, 1).flatten(2), *rows)
        images = images.unflatten(2, (-1, 3)).permute(0, 3, 2, 1)  # (B, 3, W, size)
        images = _mix_rows(images, *columns).mT
        return images.clamp_(0, 1) if cubic else images  # a cubic overshoots at edges


def _resampling(
    start: Tensor, length: Tensor, mirror: Tensor, size: int, total: int, cubic: bool
) -> tuple[Tensor, Tensor]:
    """The pixels, of `total`, and their weights that resample [start, start + length) to `size`.

    Returns pixels and weights (B, size, taps). The filter, a triangle or a cubic, is scaled to the
    larger of an input and an output pixel, cut at the box and renormalised.
    """
    reach = 2 if cubic else 1  # of the filter to either side, in pixels
    taps = math.ceil(2 * reach * max(1.0, total / size))  # the most pixels under any filter
    targets = torch.arange(size, device=start.device)
    targets = torch.where(mirror[:, None], size - 1 - targets, targets)
    scale = length[:, None] / size
    width = scale.clamp(min=1)
    centres = (targets + 0.5) * scale  # (B, size), in the box's coordinates
    first = (centres - reach * width + 0.5).floor()
    pixels = first[..., None] + torch.arange(taps, device=start.device)
    distances = (pixels + 0.5 - centres[..., None]).abs() / width[..., None]
    weights = _cubic(distances) if cubic else (1 - distances).clamp(min=0)
    weights = weights * ((pixels >= 0) & (pixels < length[:, None, None]))
    pixels = pixels.clamp(min=0).minimum(length[:, None, None] - 1).long() + start[:, None, None]
    return pixels, weights / weights.sum(2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel for x >= 0, a = -0.5 (IEEE Trans. ASSP 29(6), 1981), as PIL and TensorFlow."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, far) * (x < 2)


def _mix_rows(images: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """(B, ..., N, K), (B, M, taps) -> (B, ..., M, K): each row the weighted sum of a few rows."""
    mix = _mix_by_bags if images.device.type == "cpu" else _mix_by_matrices
    return mix(images, rows, weights.to(images.dtype))


def _mix_by_bags(images: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`_mix_rows` as an embedding bag: on the CPU a fifth of the time of the matrix product."""
    shape = (*images.shape[:-2], rows.shape[1], images.shape[-1])
    tables = images.shape[:-2].numel()
    copies = tables // len(rows)  # channels, which share rows and weights
    offsets = torch.arange(tables, device=rows.device).view(-1, copies, 1, 1) * images.shape[-2]
    bags = (rows[:, None] + offsets).flatten(0, 2)
    weights = weights[:, None].expand(-1, copies, -1, -1).flatten(0, 2)
    table = images.reshape(-1, images.shape[-1])
    mixed = nn.functional.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    return mixed.view(shape)


def _mix_by_matrices(images: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`_mix_rows` by a matrix for each image, mostly 0: GPUs multiply faster than they gather."""
    matrices = weights.new_zeros(*rows.shape[:2], images.shape[-2]).scatter_add_(2, rows, weights)
    inputs = images.movedim(-2, 1)  # (B, N, ..., K)
    return torch.bmm(matrices, inputs.flatten(2)).unflatten(2, inputs.shape[2:]).movedim(1, -2)


class Op(nn.Module):
    """An operation on images after the crop."""

    def kinds(self, applied: Tensor) -> Tensor:
        """Parameters of `sample` -> int64 (B,), 0 for images that `apply` would leave unchanged."""
        return (applied > 0).long()

    def apply_some(self, images: Tensor, kinds: Tensor, *params: Tensor) -> Tensor:
        """`apply`, mostly to the images that it would change; may overwrite `images`."""
        changed = kinds.nonzero()
        if not len(changed):
            return images
        span = slice(int(changed[0]), int(changed[-1]) + 1)
        done = self._apply_kinds(images[span], kinds[span], *(values[span] for values in params))
        if len(done) == len(images):
            return done
        images[span] = done
        return images

    def _apply_kinds(self, images: Tensor, kinds: Tensor, *params: Tensor) -> Tensor:
        return self.apply(images, *params)


class Slant(Op):
    """Turned by U(-rotate, rotate) and sheared by U(-shear, shear) degrees, about the centre.

    Square images. What comes in from outside is black.
    """

    num_draws = 2

    def __init__(self, rotate: float = 0.0, shear: float = 0.0):
        super().__init__()
        self.rotate, self.shear = rotate, shear

    def sample(self, u: Tensor) -> tuple[Tensor, ...]:
        """angle and shear, (B,) each, in degrees; clockwise as torchvision's affine"""
        angle, shear = u.unbind(1)
        return _between(angle, -self.rotate, self.rotate), _between(shear, -self.shear, self.shear)

    def kinds(self, angle: Tensor, shear: Tensor) -> Tensor:
        return ((angle != 0) | (shear != 0)).long()

    def apply(self, images: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
        angle, tangent = angle.deg2rad(), shear.deg2rad().tan()
        cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # from where each pixel comes
        across = torch.stack([cosine - sine * tangent, cosine * tangent + sine, zero], dim=1)
        down = torch.stack([-sine, cosine, zero], dim=1)
        theta = torch.stack([across, down], dim=1).to(images.dtype)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


class ColorJitter(Op):
    """Brightness, contrast, saturation and hue in a random order, with probability `p`.

    For a strength x the factor is U(max(0, 1 - x), 1 + x), the hue shift U(-hue, hue). A strength
    of zero takes its operation out.
    """

    least = 0.0  # the smallest factor

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        p: float = 1.0,
    ):
        super().__init__()
        self.strengths = (brightness, contrast, saturation)
        self.hue, self.p = hue, p
        self.num_draws = 6
        blends = [kind for kind, strength in enumerate(self.strengths) if strength > 0]
        orders = list(permutations(blends + [3] * (hue > 0)))
        # An order for each image with static shapes: every blend has a stage before the hue and one
        # after it. The one that the order doesn't ask for has kind 3 (factor 1: no change).
        # stages[order] = kinds before, kinds after.
        stages, turns = [], []
        for order in orders:
            turn = order.index(3) if hue > 0 else len(order)
            kinds = [kind for kind in order if kind != 3]
            before = [kind if i < turn else 3 for i, kind in enumerate(kinds)]
            after = [3 if i < turn else kind for i, kind in enumerate(kinds)] if hue > 0 else []
            stages.append(before + after)
            turns.append(turn)
        self.num_before = len(blends)
        table = torch.tensor(stages).reshape(len(orders), -1)
        self.register_buffer("stages", table, persistent=False)
        self.register_buffer("turns", torch.tensor(turns), persistent=False)

    def sample(self, u: Tensor) -> tuple[Tensor, ...]:
        """Factors (B, 3) of the blends; hue shift (B,) in turns; order (B,), a row of `stages`.

        The blends are brightness, contrast and saturation.
        """
        applied = u[:, :1] < self.p
        draws = zip(u[:, 1:4].unbind(1), self.strengths, strict=True)
        factors = [_between(draw, max(self.least, 1 - x), 1 + x) for draw, x in draws]
        factors = torch.stack(factors, 1).where(applied, 1.0)
        hue = _between(u[:, 4], -self.hue, self.hue) * applied[:, 0]
        return factors, hue, (u[:, 5] * len(self.stages)).long()

    def kinds(self, factors: Tensor, hue: Tensor, order: Tensor) -> Tensor:
        """0 for no change, else 1 + the number of blends before the hue."""
        return (self.turns[order] + 1) * ((factors != 1).any(1) | (hue != 0))

    def _apply_kinds(self, images: Tensor, kinds: Tensor, *params: Tensor) -> Tensor:
        turns = kinds[kinds > 0] - 1
        return self.apply(images, *params, first_turn=int(turns.min()), last_turn=int(turns.max()))

    def apply(
        self,
        images: Tensor,
        factors: Tensor,
        hue: Tensor,
        order: Tensor,
        first_turn: int = 0,
        last_turn: int | None = None,
    ) -> Tensor:
        """In no image do fewer than first_turn or more than last_turn blends precede the hue.

        Stages that no image has are left out.
        """
        kinds = self.stages[order]  # (B, stages)
        factors = torch.cat([factors, torch.ones_like(factors[:, :1])], 1).gather(1, kinds)
        stages = self._weights(factors, kinds).to(images.dtype)[..., None, None, None].unbind(1)
        before = stages[: self.num_before][:last_turn]
        after = stages[self.num_before :][first_turn:]
        for stage in before:
            images = self._blend(images, *stage.unbind(1))
        if self.hue > 0:
            images = _shift_hue(images, hue)
        for stage in after:
            images = self._blend(images, *stage.unbind(1))
        return images

    @staticmethod
    def _weights(factors: Tensor, kinds: Tensor) -> Tensor:
        """Factors and kinds (B, stages) -> weights for `_blend` (B, stages, 3)."""
        return torch.stack([factors, (1 - factors) * (kinds == 1), (1 - factors) * (kinds == 2)], 2)

    @staticmethod
    def _blend(images: Tensor, factor: Tensor, mean_weight: Tensor, grey_weight: Tensor) -> Tensor:
        """clamp(factor * image + mean_weight * mean(grey) + grey_weight * grey).

        By its weights this is brightness, contrast or saturation.
        """
        grey = _grey(images)
        mean = grey.mean((1, 2, 3), keepdim=True)
        added = grey.mul_(grey_weight).add_(mean * mean_weight)
        return torch.addcmul(added, images, factor).clamp_(0, 1)


class ByolJitter(ColorJitter):
    """The jitter of BYOL's authors (deepmind-research, byol/utils/augmentations.py 239-282).

    Brightness is added, as its factor less 1; contrast is about each channel's mean; saturation is
    that of HSV.
    """

    least = -math.inf

    @staticmethod
    def _weights(factors: Tensor, kinds: Tensor) -> Tensor:
        ones = torch.ones_like(factors)
        weights = [factors.where(kinds == kind, ones) for kind in range(3)]
        return torch.stack([weights[0] - 1, *weights[1:]], 2)

    @staticmethod
    def _blend(images: Tensor, added: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
        """One of the three: the others have their neutral values, 0, 1 and 1."""
        means = images.mean((2, 3), keepdim=True)
        images = torch.addcmul(means * (1 - contrast) + added, images, contrast).clamp_(0, 1)
        high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
        # a saturation of at most 1, where the lowest channel is 0
        spread = (high - low).clamp(min=torch.finfo(images.dtype).tiny)  # TINY is 0 in float16
        factor = torch.minimum(saturation, high / spread)
        return torch.addcmul(high * (1 - factor), images, factor)


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue of the HSV hexagon; the largest and the smallest value stay as they are."""
    dtype = images.dtype
    if dtype in (torch.bfloat16, torch.float16):
        images = images.float()  # a hue of so few bits would tint the greys
    red, green, blue = images.unbind(1)
    low = torch.minimum(red, green).minimum(blue)
    high = torch.maximum(red, green).maximum(blue)
    spread = high - low
    # The hue in sixths of a turn, 0 at red. Its size is 1 + (green + blue - red - low) / spread
    # (one line for what is usually three cases), its sign that of green - blue.
    hue = (green + blue).sub_(red).sub_(low).div_(spread.clamp(min=TINY)).add_(1)
    hue.mul_((green - blue).add_(TINY).sign_())  # the sign of zero is +: cyan is at +3
    hue.add_(turns.to(hue.dtype).mul(6)[:, None, None])
    hue.sub_((hue * (1 / 6)).floor_(), alpha=6)  # [0, 6)

    # A channel is highest within 1 of its own hue, lowest beyond 2, and linear between. Red's
    # distance is 3 - |hue - 3|.
    out = torch.empty_like(images)  # filled in place: torch.stack would rearrange the memory
    out[:, 0] = torch.addcmul(low - spread, spread, (hue - 3).abs_().clamp_(1, 2))
    high.add_(spread)
    out[:, 1] = torch.addcmul(high, spread, (hue - 2).abs_().clamp_(1, 2), value=-1)
    out[:, 2] = torch.addcmul(high, spread, (hue - 4).abs_().clamp_(1, 2), value=-1)
    return out.to(dtype)


class RandomGrayscale(Op):
    """Luminance in all three channels, with probability `p`."""

    num_draws = 1

    def __init__(self, p: float = 0.1):
        super().__init__()
        self.p = p

    def sample(self, u: Tensor) -> tuple[Tensor, ...]:
        """applied (B,) bool"""
        return (u[:, 0] < self.p,)

    def apply(self, images: Tensor, applied: Tensor) -> Tensor:
        applied = _per_image(applied, images)
        return torch.addcmul(_grey(images).mul_(applied), images, 1 - applied)


class GaussianBlur(Op):
    """Separable Gaussian blur of square images with reflected borders, with probability `p`.

    sigma is U(low, high) pixels. The kernel has `kernel_size` taps (23: SimCLR's tenth of 224
    pixels) or as many as reflection allows.
    """

    num_draws = 2

    def __init__(
        self,
        size: int,
        p: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        kernel_size: int = 23,
    ):
        super().__init__()
        self.p, self.sigma = p, sigma
        self.half = min(kernel_size // 2, size - 1)
        inputs = (torch.arange(size)[:, None] + torch.arange(-self.half, self.half + 1)).abs()
        inputs = torch.minimum(inputs, 2 * (size - 1) - inputs)  # reflected, (size, taps)
        self.register_buffer("inputs", inputs, persistent=False)

    def sample(self, u: Tensor) -> tuple[Tensor, ...]:
        """sigma (B,) in pixels; 0 leaves the image unchanged"""
        return (_between(u[:, 1], *self.sigma) * (u[:, 0] < self.p),)

    def apply(self, images: Tensor, sigma: Tensor) -> Tensor:
        distances = torch.arange(-self.half, self.half + 1, device=images.device)
        sigma = sigma.clamp(min=1e-3)[:, None]  # where the kernel is 0, ..., 0, 1, 0, ..., 0
        kernels = torch.exp(-0.5 * (distances / sigma) ** 2)
        kernels = kernels / kernels.sum(1, keepdim=True)
        weights = kernels[:, None].expand(-1, len(self.inputs), -1)
        inputs = self.inputs.expand(len(images), -1, -1)
        return _mix_rows(_mix_rows(images.mT, inputs, weights).mT, inputs, weights)


class Solarize(Op):
    """Inverts the pixels at or above `threshold`, with probability `p`."""

    num_draws = 1

    def __init__(self, p: float = 0.2, threshold: float = 0.5):
        super().__init__()
        self.p, self.threshold = p, threshold

    def sample(self, u: Tensor) -> tuple[Tensor, ...]:
        """applied (B,) bool"""
        return (u[:, 0] < self.p,)

    def apply(self, images: Tensor, applied: Tensor) -> Tensor:
        inverted = (images >= self.threshold) & applied[:, None, None, None]
        return images.sub(inverted.to(images.dtype)).abs_()  # |x - 1| = 1 - x


class Normalize(nn.Module):
    """(x - mean) / std for each channel."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def apply(self, images: Tensor) -> Tensor:
        return images.sub(self.mean.to(images.dtype)).div_(self.std.to(images.dtype))


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.dtype)[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), with torchvision's weights (ITU-R 601)."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
