"""Augmented views of uint8 batches, on the device of the images."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.augment.draws import keys as draw_keys
from ssl_bench.augment.draws import uniforms
from ssl_bench.augment.ops import (
    ByolJitter,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Op,
    RandomGrayscale,
    RandomResizedCrop,
    Slant,
    Solarize,
)
from ssl_bench.augment.windows import Windows
from ssl_bench.config.fields import Fraction, Interpolation, Interval, Resize
from ssl_bench.errors import UserError
from ssl_bench.runtime.threads import lone_threads

RGB = tuple[float, float, float]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IDLE = {  # see `typed`
    "augmentation.num_small_views=0": ("augmentation.small_size", "augmentation.small_crop_scale")
}
# Pixels: more don't fit a core's caches, with fewer Python takes too much of the time.
CHUNK = 32 * 96 * 96


class View(nn.Module):
    """How one view is made: crop, flip, slant, jitter, grayscale, blur, solarize, normalise."""

    def __init__(self, crop: RandomResizedCrop, ops: Iterable[Op], normalize: Normalize) -> None:
        super().__init__()
        self.crop, self.ops, self.normalize = crop, nn.ModuleList(ops), normalize
        self.compiled = False  # if so, `transform` takes the whole batch on the CPU, too

    def sample(self, images: Tensor, keys: Tensor, number: int) -> list[tuple[Tensor, ...]]:
        """The parameters of the crop, then of each of `ops`; only the images' size is read."""
        counts = [self.crop.num_draws, *(op.num_draws for op in self.ops)]
        crop_u, *ops_u = uniforms(keys, number, sum(counts)).split(counts, dim=1)
        ops_params = [op.sample(u) for op, u in zip(self.ops, ops_u, strict=True)]
        return [self.crop.sample(crop_u, *images.shape[-2:]), *ops_params]

    def windows(self, sizes: Tensor, keys: Tensor, number: int) -> Windows:
        """The crops that `sample` draws, of pictures of these sizes (B, 2): heights and widths."""
        u = uniforms(keys, number, self.crop.num_draws)
        *box, mirrored = self.crop.sample(u, *sizes.unbind(1))
        boxes = torch.stack(box, dim=1)
        size = self.crop.size
        return Windows(
            boxes=boxes,
            resized=torch.full_like(boxes[:, :2], size),
            corners=torch.zeros_like(boxes[:, :2]),
            mirrored=mirrored,
            size=size,
            interpolation=self.crop.interpolation,
        )

    def transform(
        self,
        images: Tensor,
        params: list[tuple[Tensor, ...]],
        kinds: list[Tensor] | None = None,
        cut: bool = False,
    ) -> Tensor:
        """The pure half: no randomness, static shapes if `kinds` is None. It can be compiled.

        cut: the images are crops already.
        """
        layout = _layout(images)
        images = images.to(self.normalize.mean.dtype).mul_(1 / 255)
        if not cut:
            images = self.crop.apply(images, *params[0])
        for number, (op, values) in enumerate(zip(self.ops, params[1:], strict=True)):
            if kinds is None:
                images = op.apply(images, *values)
            else:
                images = op.apply_some(images, kinds[number], *values)
        images = self.normalize.apply(images)
        return images.contiguous(memory_format=layout) if kinds is None else images

    def forward(self, images: Tensor, keys: Tensor, number: int, cut: bool = False) -> Tensor:
        params = self.sample(images, keys, number)
        if images.device.type != "cpu" or self.compiled:
            return self.transform(images, params, cut=cut)
        shape = (len(images), 3, self.crop.size, self.crop.size)
        view = torch.empty(shape, dtype=self.normalize.mean.dtype, memory_format=_layout(images))
        kinds = [op.kinds(*values) for op, values in zip(self.ops, params[1:], strict=True)]

        @torch.no_grad()  # for the thread that it runs in
        def fill(rows: Tensor) -> None:
            some = [tuple(value[rows] for value in values) for values in params]
            # channels last, so that whole rows of memory are copied
            taken = images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
            done = self.transform(taken, some, [kind[rows] for kind in kinds], cut)
            # a fifth of the time of view[rows] = done
            for row, image in zip(rows.tolist(), done, strict=True):
                view[row] = image

        threads = torch.get_num_threads()
        each = _pool(threads).map if threads > 1 else map
        list(each(fill, self._chunks(kinds, len(images))))
        return view

    def _chunks(self, kinds: list[Tensor], count: int) -> list[Tensor]:
        """Indices of all images in chunks, sorted by their kinds, that of the jitter first.

        If there are many images, each chunk has one kind of jitter.
        """
        order, size = torch.arange(count), max(1, CHUNK // self.crop.size**2)
        jitter = [kinds[i] for i, op in enumerate(self.ops) if isinstance(op, ColorJitter)]
        for kind in [*reversed(kinds), *jitter]:
            order = order[kind[order].argsort(stable=True)]
        groups = [order]
        if jitter and count > 2 * size:
            groups = order.split(jitter[0].bincount().tolist())
        chunks: list[Tensor] = []
        for group in groups:
            if len(group):
                chunks.extend(group.tensor_split(-(-len(group) // size)))
        return chunks


class Views(nn.Module):
    """uint8 images (B, 3, H, W), keys (B,) -> normalised float32 views.

    First `num_views` of (B, 3, image_size, image_size), then `num_small_views` of (B, 3,
    small_size, small_size) (multi-crop, SwAV, arXiv:2006.09882, section 3.2). They have the memory
    format of the images, and the same keys (see `draws.keys`) give the same views. In place of
    images: crops of them, uint8 (B, 3, S, S) for each view, that a source has cut (`windows`).

    For the operations see `View`. image_size, small_size: pixels of a side. num_views: how many
    have full size. crop_scale, small_crop_scale: share of the image's area. crop_ratio: width by
    height. flip_p: how often a view is mirrored. brightness, contrast, saturation: the factor is
    drawn from U(1 - x, 1 + x). hue: the shift is drawn from U(-x, x), in turns of the colour
    circle. num_small_views: how many more have the small size (multi-crop). jitter: None,
    torchvision's, or "byol" (`ops.ByolJitter`).
    grayscale_first: grayscale comes before the jitter. A probability or strength of zero takes its
    operation out. jitter_p, grayscale_p, blur_p, solarize_p: one for all views, or one for each
    view of full size and one for all small views. rotate, shear: see `ops.Slant`. mean, std: None
    is ImageNet's, too.
    """

    def __init__(
        self,
        image_size: PositiveInt,
        num_views: PositiveInt = 2,
        crop_scale: Interval = (0.2, 1.0),
        crop_ratio: Interval = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
        flip_p: Fraction = 0.5,
        brightness: NonNegativeFloat = 0.4,
        contrast: NonNegativeFloat = 0.4,
        saturation: NonNegativeFloat = 0.4,
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1,
        jitter_p: Fraction | tuple[Fraction, ...] = 0.8,
        jitter: Literal["byol"] | None = None,
        grayscale_p: Fraction | tuple[Fraction, ...] = 0.2,
        grayscale_first: bool = False,
        blur_p: Fraction | tuple[Fraction, ...] = 0.5,
        blur_sigma: Interval = (0.1, 2.0),
        solarize_p: Fraction | tuple[Fraction, ...] = 0.0,
        mean: RGB | None = IMAGENET_MEAN,
        std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = IMAGENET_STD,
        num_small_views: NonNegativeInt = 0,
        small_size: PositiveInt = 48,
        small_crop_scale: Interval = (0.05, 0.14),
        rotate: Annotated[float, Field(gt=0, le=180)] | None = None,
        shear: Annotated[float, Field(gt=0, lt=90)] | None = None,
    ):
        super().__init__()
        _check_interval("crop_scale", crop_scale, low=0, high=1)
        _check_interval("small_crop_scale", small_crop_scale, low=0, high=1)
        _check_interval("crop_ratio", crop_ratio, low=0, high=float("inf"))
        _check_interval("blur_sigma", blur_sigma, low=0, high=float("inf"))
        self.image_size = image_size
        self.num_views, self.num_small_views = num_views, num_small_views
        self.normalize = Normalize(mean or IMAGENET_MEAN, std or IMAGENET_STD)
        kinds = num_views + (num_small_views > 0)
        chances = {
            "jitter_p": jitter_p,
            "grayscale_p": grayscale_p,
            "blur_p": blur_p,
            "solarize_p": solarize_p,
        }
        each = [_each(name, given, kinds) for name, given in chances.items()]
        probabilities = list(zip(*each, strict=True))  # of each kind

        def view(
            size: int,
            scale: tuple[float, float],
            jitter_p: float,
            grayscale_p: float,
            blur_p: float,
            solarize_p: float,
        ) -> View:
            colour: list[nn.Module] = []
            if jitter_p > 0 and max(brightness, contrast, saturation, hue) > 0:
                kind = ByolJitter if jitter == "byol" else ColorJitter
                colour.append(kind(brightness, contrast, saturation, hue, jitter_p))
            if grayscale_p > 0:
                colour.insert(0 if grayscale_first else len(colour), RandomGrayscale(grayscale_p))
            if blur_p > 0:
                colour.append(GaussianBlur(size, blur_p, blur_sigma))
            if solarize_p > 0:
                colour.append(Solarize(solarize_p))
            crop = RandomResizedCrop(size, scale, crop_ratio, flip_p, interpolation)
            slant = [Slant(rotate or 0.0, shear or 0.0)] if rotate or shear else []
            return View(crop, slant + colour, self.normalize)

        made = cache(view)  # equal views are one module, which is compiled once
        full = [made(image_size, tuple(crop_scale), *own) for own in probabilities[:num_views]]
        small = made(small_size, tuple(small_crop_scale), *probabilities[-1])
        self.views = nn.ModuleList(full + [small] * num_small_views)

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor], keys: Tensor) -> list[Tensor]:
        cut = not isinstance(images, Tensor)
        batches = images if cut else [images] * len(self.views)
        views = enumerate(zip(self.views, batches, strict=True))
        # bfloat16 resampling would lose the last two bits
        with torch.autocast(keys.device.type, enabled=False):
            return [view(batch, keys, number, cut) for number, (view, batch) in views]

    def windows(self, sizes: Tensor, seed: int, epoch: int, indices: Tensor) -> list[Windows]:
        """What to cut from pictures of these sizes (B, 2), heights and widths, for each view.

        They are the crops of `forward` with the keys of (seed, epoch, indices).
        """
        keys = draw_keys(seed, epoch, indices)
        return [view.windows(sizes, keys, number) for number, view in enumerate(self.views)]

    def compile_transforms(self) -> None:
        for view in set(self.views):
            view.transform, view.compiled = torch.compile(view.transform), True

    def denormalize(self, view: Tensor) -> Tensor:
        """A view (B, 3, S, S) as uint8 pixels, to look at."""
        return _denormalize(view, self.normalize)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return lone_threads(threads, "views")


class EvalView(nn.Module):
    """The view for evaluation: uint8 (B, 3, H, W) -> normalised float32 (B, 3, size, size).

    The shorter side becomes `image_size * resize` pixels (256 for 224 in the authors' code), then
    the central image_size x image_size are cut out.
    """

    def __init__(
        self,
        image_size: PositiveInt,
        resize: Resize = 256 / 224,
        mean: RGB = IMAGENET_MEAN,
        std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD,
    ):
        super().__init__()
        self.image_size, self.resize = image_size, resize
        self.normalize = Normalize(mean, std)

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        """Images, or the one view of each that `windows` says."""
        from torchvision.transforms.v2 import functional as tv

        if isinstance(images, Tensor):
            images = tv.resize(images, [self._shorter], antialias=True)
            images = tv.center_crop(images, [self.image_size, self.image_size])
        else:
            (images,) = images
        return self.normalize.apply(images.to(self.normalize.mean.dtype).mul_(1 / 255))

    @property
    def _shorter(self) -> int:
        """The shorter side in pixels, before the centre is cut out."""
        return round(self.image_size * self.resize)

    def windows(self, sizes: Tensor, seed: int, epoch: int, indices: Tensor) -> list[Windows]:
        """What to cut from pictures of these sizes (B, 2), heights and widths: nothing is drawn.

        As torchvision's Resize and CenterCrop: the longer side is rounded down, the corner to the
        nearest.
        """
        shorter = sizes.amin(dim=1, keepdim=True)
        resized = sizes * self._shorter // shorter
        corners = ((resized - self.image_size).double() / 2).round().long()
        boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
        mirrored = torch.zeros(len(sizes), dtype=torch.bool)
        return [Windows(boxes, resized, corners, mirrored, self.image_size, "bilinear")]

    def denormalize(self, view: Tensor) -> Tensor:
        """A view (B, 3, S, S) as uint8 pixels, to look at."""
        return _denormalize(view, self.normalize)


def _denormalize(view: Tensor, normalize: Normalize) -> Tensor:
    pixels = (view.float() * normalize.std + normalize.mean).mul_(255)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _layout(images: Tensor) -> torch.memory_format:
    nhwc = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def _check_interval(name: str, interval: tuple[float, float], low: float, high: float) -> None:
    if not low < interval[0] <= interval[1] <= high:
        raise UserError(
            f"augmentation.{name} is {list(interval)}: "
            f"give [low, high] with {low} < low <= high <= {high}"
        )


def _each(name: str, values: float | Sequence[float], kinds: int) -> Sequence[float]:
    """A value for each kind of view: those given, or the one given for all."""
    if isinstance(values, int | float):
        return (values,) * kinds
    if len(values) != kinds:
        raise UserError(
            f"augmentation.{name} has {len(values)} values, and there are {kinds} kinds of views "
            f"(each of full size, and the small ones together): give one value for all, or {kinds}"
        )
    return values
