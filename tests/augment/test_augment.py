"""Augmentation: the draws, each op against torchvision for the same parameters, and the views."""

import colorsys
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.v2 import functional as tv

from ssl_bench.augment import ops
from ssl_bench.augment import views as views_module
from ssl_bench.augment.draws import GOLDEN, _mix, _signed, keys, uniforms
from ssl_bench.augment.views import EvalView, Views
from ssl_bench.config import build
from ssl_bench.errors import UserError

OPS = [
    ops.RandomResizedCrop(16, flip_p=0.5),
    ops.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    ops.ByolJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
    ops.RandomGrayscale(0.5),
    ops.GaussianBlur(16),
    ops.Solarize(0.5),
]


def draw(num_images: int, num: int, seed: int = 0) -> torch.Tensor:
    return uniforms(keys(seed, 0, torch.arange(num_images)), 0, num)


def sample(op, num_images: int, size=(16, 16), seed: int = 0):
    u = draw(num_images, op.num_draws, seed)
    return op.sample(u, *size) if isinstance(op, ops.RandomResizedCrop) else op.sample(u)


def image_batch(num: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Noise, and the images on which colour conversions go wrong: grey, saturated, of few levels,
    black.
    """
    images = torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(seed))
    kinds = torch.arange(num) % 5
    images[kinds == 1] = images[kinds == 1][:, :1].expand(-1, 3, -1, -1)
    images[kinds == 2] = images[kinds == 2].round()
    images[kinds == 3] = (images[kinds == 3] * 4).round() / 4
    images[kinds == 4] *= torch.linspace(0, 1, width)
    return images


def assert_equals(ours: torch.Tensor, expected: torch.Tensor, mean: float, largest: float) -> None:
    difference = (ours - expected).abs()
    assert difference.mean() < mean
    assert difference.max() < largest


# ---- draws ----


def test_draws_are_a_function_of_the_image_not_of_the_batch():
    everything = uniforms(keys(3, 5, torch.arange(100)), 1, 8)
    some = torch.tensor([77, 3, 50])
    assert torch.equal(uniforms(keys(3, 5, some), 1, 8), everything[some])
    assert torch.equal(uniforms(keys(3, 5, some), 1, 4), everything[some, :4])


def test_draws_never_change():
    """Frozen: a change here changes every run that is resumed across it."""
    bits = (uniforms(keys(1, 2, torch.tensor([0, 511_999])), 1, 2) * 2**24).long()
    assert bits.tolist() == [[10756204, 11962271], [11684298, 11952307]]
    splitmix64_of_seed_0 = 0xE220A8397B1DCDAF  # the generator's published first output
    assert _mix(torch.tensor(_signed(GOLDEN))).item() == _signed(splitmix64_of_seed_0)


def test_draws_are_uniform():
    u = draw(20_000, 8)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.unbind(1):
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    low_bits = (u * 2**24).long() % 256
    assert stats.chisquare(np.bincount(low_bits.flatten(), minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize(
    "other",
    [
        lambda i: uniforms(keys(0, 0, i), 0, 2)[:, 1],
        lambda i: uniforms(keys(0, 0, i), 1, 1)[:, 0],
        lambda i: uniforms(keys(0, 0, i + 1), 0, 1)[:, 0],
        lambda i: uniforms(keys(0, 1, i), 0, 1)[:, 0],
        lambda i: uniforms(keys(1, 0, i), 0, 1)[:, 0],
    ],
    ids=["draw", "view", "index", "epoch", "seed"],
)
def test_neighbouring_draws_are_independent(other):
    indices = torch.arange(20_000)
    one, two = uniforms(keys(0, 0, indices), 0, 1)[:, 0], other(indices)
    cells = (one * 10).long() * 10 + (two * 10).long()
    assert stats.chisquare(np.bincount(cells, minlength=100)).pvalue > 1e-4


# ---- each op equals torchvision for the same parameters ----


@contextmanager
def resampling_of(device: str) -> Iterator[None]:
    """GPUs resample in a way of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "gpu":
            patch.setattr(ops, "_mix_by_bags", ops._mix_by_matrices)
        yield


@settings(max_examples=60)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), size=st.integers(1, 40),
    seed=st.integers(0, 999), scale=st.sampled_from([(0.08, 1.0), (0.2, 1.0), (1.0, 1.0)]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]), device=st.sampled_from(["cpu", "gpu"]),
)  # fmt: skip
def test_crop_equals_torchvision(height, width, size, seed, scale, interpolation, device):
    """Enlarging and shrinking boxes: mean absolute difference below 1e-6, largest below 2e-5."""
    crop = ops.RandomResizedCrop(size, scale, flip_p=0.5, interpolation=interpolation)
    images = image_batch(4, height, width, seed)
    params = sample(crop, 4, (height, width), seed)
    with resampling_of(device):
        ours = crop.apply(images, *params)
    assert ours.shape == (4, 3, size, size)
    for i, (top, left, box_h, box_w, flip) in enumerate(
        zip(*(p.tolist() for p in params), strict=True)
    ):
        assert 0 <= top <= height - box_h
        assert 0 <= left <= width - box_w
        mode = InterpolationMode(interpolation)
        expected = tv.resized_crop(
            images[i], top, left, box_h, box_w, [size, size], mode, antialias=True
        ).clamp(0, 1)
        assert_equals(ours[i], expected.flip(-1) if flip else expected, mean=1e-6, largest=2e-5)


def test_bicubic_crops_are_pils():
    """Mean absolute difference below 1/255: what DINO's, Barlow Twins' and VICReg's authors see
    (PIL rounds twice).

    Without the extremes, at which PIL cuts off what shoots over twice, and we (and torchvision)
    once.
    """
    crop = ops.RandomResizedCrop(24, flip_p=0.0, interpolation="bicubic")
    images = uint8_batch(20) // 2 + 64
    params = sample(crop, 20, images.shape[2:])
    ours = crop.apply(images / 255, *params)
    for image, mine, *values in zip(images, ours, *params, strict=True):
        top, left, box_h, box_w, _ = (value.item() for value in values)
        box = tv.to_pil_image(image).crop((left, top, left + box_w, top + box_h))
        expected = tv.to_image(box.resize((24, 24), Image.Resampling.BICUBIC)) / 255
        assert (mine - expected).abs().mean() < 1 / 255


ADJUST = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]


def jitter_expected(image, values, order):
    for kind in order:
        image = ADJUST[kind](image, values[kind])
    return image


def test_jitter_equals_torchvision_in_every_order():
    """Mean absolute difference below 1e-6, largest below 2e-5: all 24 orders, clipping factors, all
    hues.
    """
    jitter = ops.ColorJitter(0.9, 0.9, 0.9, 0.5)
    orders = list(itertools.permutations(range(4)))
    images = image_batch(5 * len(orders))
    factors, hue, _ = sample(jitter, len(images))
    order = torch.arange(len(orders)).repeat_interleave(5)
    ours = jitter.apply(images, factors, hue, order)
    for i, image in enumerate(images):
        expected = jitter_expected(image, [*factors[i].tolist(), hue[i].item()], orders[order[i]])
        assert_equals(ours[i], expected, mean=1e-6, largest=2e-5)


def byol_expected(
    image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, order
):
    """deepmind-research, byol/utils/augmentations.py 239-289 and 313-342, pixel by pixel by
    Python's colorsys.
    """
    for kind in order:
        if kind == 0:
            image = image + (brightness - 1)
        elif kind == 1:
            mean = image.mean((1, 2), keepdims=True)
            image = contrast * (image - mean) + mean
        else:
            pixels = []
            for pixel in image.reshape(3, -1).T:
                h, s, v = colorsys.rgb_to_hsv(*pixel)
                h, s = (
                    ((h + hue) % 1.0, s) if kind == 3 else (h, min(max(s * saturation, 0.0), 1.0))
                )
                pixels.append(colorsys.hsv_to_rgb(h, s, v))
            image = np.array(pixels).T.reshape(image.shape)
        image = image.clip(0, 1)
    return image


def test_jitter_equals_byols_in_every_order():
    """For the same draws, in float64: largest difference below 1e-9, of all 24 orders, clipping
    factors, all hues.
    """
    jitter = ops.ByolJitter(0.9, 0.9, 0.9, 0.5)
    orders = list(itertools.permutations(range(4)))
    images = image_batch(5 * len(orders), 6, 5).double()
    factors, hue, _ = (values.double() for values in sample(jitter, len(images)))
    order = torch.arange(len(orders)).repeat_interleave(5)
    ours = jitter.apply(images, factors, hue, order)
    for i, image in enumerate(images.numpy()):
        expected = byol_expected(image, *factors[i].tolist(), hue[i].item(), orders[order[i]])
        assert np.abs(ours[i].numpy() - expected).max() < 1e-9
    u = draw(20_000, 6)  # what is added: U(-x, x), of any strength
    added = ops.ByolJitter(brightness=1.6).sample(u)[0][:, 0] - 1
    assert stats.kstest(added.double().numpy(), "uniform", (-1.6, 3.2)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("name", "adds"), [("byol", True), ("simclr", False), ("barlow_twins", False)]
)
def test_brightness_is_added_in_byols_recipe_alone(name, adds):
    """Nothing times a factor stays nothing."""
    cfg = compose(f"method={name}", "augmentation.solarize_p=0")
    black = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    views = build.construct(cfg.augmentation)
    brightest = max(
        views.denormalize(view).max() for view in views(black, keys(0, 0, torch.arange(20)))
    )
    assert bool(brightest > 0) is adds


@pytest.mark.parametrize(
    "strengths",
    [(0.4, 0, 0, 0), (0, 0.4, 0, 0.1), (0, 0, 0.4, 0), (0, 0, 0, 0.5), (0.2, 0.2, 0.2, 0)],
)
def test_jitter_with_strengths_of_zero(strengths):
    """Mean absolute difference below 1e-6; a strength of zero leaves nothing to compute for it."""
    jitter = ops.ColorJitter(*strengths)
    active = [kind for kind, strength in enumerate(strengths) if strength > 0]
    images = image_batch(30)
    factors, hue, order = sample(jitter, 30)
    ours = jitter.apply(images, factors, hue, order)
    orders = list(itertools.permutations(active))
    for i, image in enumerate(images):
        expected = jitter_expected(image, [*factors[i].tolist(), hue[i].item()], orders[order[i]])
        assert_equals(ours[i], expected, mean=1e-6, largest=2e-5)
    blends = len([kind for kind in active if kind < 3])
    assert jitter.stages.shape[1] == (2 * blends if strengths[3] else blends)


def test_hue_keeps_corner_colours():
    """The six pure colours and greys by sixths of a turn: exact answers, where the hue formulas
    have their seams.
    """
    wheel = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1.0]])
    for turn in range(-3, 4):
        images = wheel.T.reshape(1, 3, 1, 6)
        ours = ops._shift_hue(images, torch.tensor([turn / 6]))
        assert_equals(ours, images.roll(-turn, 3), mean=1e-6, largest=2e-6)
    grey = torch.linspace(0, 1, 9).expand(1, 3, 1, 9)
    assert torch.equal(ops._shift_hue(grey, torch.tensor([0.3])), grey)


def test_grayscale_equals_torchvision():
    """Exact where it isn't applied, largest difference below 1e-6 where it is."""
    images = image_batch(10)
    applied = torch.arange(10) % 2 == 0
    ours = ops.RandomGrayscale(0.5).apply(images, applied)
    assert torch.equal(ours[~applied], images[~applied])
    assert_equals(ours[applied], tv.rgb_to_grayscale(images[applied], 3), mean=1e-7, largest=1e-6)


@settings(max_examples=30)
@given(size=st.integers(1, 60), sigma=st.floats(0.1, 3.0), device=st.sampled_from(["cpu", "gpu"]))
def test_blur_equals_torchvision(size, sigma, device):
    """Mean absolute difference below 1e-6, largest below 1e-5; small images take the kernel that
    reflection allows.
    """
    blur = ops.GaussianBlur(size)
    images = image_batch(2, size, size)
    with resampling_of(device):
        ours = blur.apply(images, torch.tensor([sigma, 0.0]))
    kernel = 2 * min(11, size - 1) + 1
    assert_equals(ours[0], tv.gaussian_blur(images[0], kernel, sigma), mean=1e-6, largest=1e-5)
    assert torch.equal(ours[1], images[1])


def test_solarize_equals_torchvision():
    """Exact, the threshold itself included."""
    images = image_batch(10)  # has pixels of exactly 0.5
    applied = torch.arange(10) < 7
    ours = ops.Solarize(0.5).apply(images, applied)
    assert torch.equal(ours[:7], tv.solarize(images[:7], 0.5))
    assert torch.equal(ours[7:], images[7:])


def test_slant_equals_torchvision():
    """Turned and sheared about the centre, with black outside."""
    slant, images = ops.Slant(rotate=40.0, shear=30.0), image_batch(20, 9, 9)
    angle, shear = sample(slant, 20)
    assert (angle.abs().max(), shear.abs().max()) > (30, 20)
    ours = slant.apply(images, angle, shear)
    for i, image in enumerate(images):
        tilt = [angle[i].item(), [0, 0], 1.0, [shear[i].item(), 0.0]]
        expected = tv.affine(image, *tilt, interpolation=tv.InterpolationMode.BILINEAR)
        assert_equals(ours[i], expected, mean=1e-6, largest=2e-5)


def test_normalize_equals_torchvision():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = image_batch(5)
    assert_equals(
        ops.Normalize(mean, std).apply(images),
        tv.normalize(images, mean, std),
        mean=1e-6,
        largest=1e-5,
    )


@pytest.mark.parametrize("op", [*OPS, ops.Slant(20, 10)], ids=lambda op: type(op).__name__)
def test_op_is_pure_and_per_sample(op):
    """Inputs stay as they are, an image's result doesn't depend on its neighbours, other dtypes and
    layouts work.
    """
    images = image_batch(10)
    images[0] = 0
    before = images.clone()
    params = sample(op, 10)
    whole = op.apply(images, *params)
    assert torch.equal(images, before)
    part = op.apply(images[4:7], *(p[4:7] for p in params))
    torch.testing.assert_close(part, whole[4:7], rtol=0, atol=1e-6)
    double = op.apply(images.double(), *params)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, whole.double(), rtol=0, atol=2e-5)
    # 0.1 is far above bfloat16's error on all ops but solarize, whose threshold turns a rounding
    # into a jump.
    for dtype in (torch.bfloat16, torch.float16):
        half = op.apply(images.to(dtype), *params)
        assert half.dtype == dtype
        assert (half.float() - whole).abs().mean() < 0.01
    channels_last = op.apply(images.contiguous(memory_format=torch.channels_last), *params)
    torch.testing.assert_close(channels_last, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", [*OPS, ops.Slant(20, 10)], ids=lambda op: type(op).__name__)
def test_apply_is_one_static_graph(op):
    images, params = image_batch(6), sample(op, 6)
    compiled = torch.compile(op.apply, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(
        compiled(images, *params), op.apply(images, *params), rtol=0, atol=1e-6
    )


# ---- the parameters follow torchvision's distributions ----


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (96, 96, (0.2, 1.0), (3 / 4, 4 / 3)),
        (60, 96, (0.08, 1.0), (3 / 4, 4 / 3)),
        (40, 160, (0.5, 1.0), (3 / 4, 4 / 3)),  # most tries don't fit: the fallback
        (160, 40, (0.5, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),  # a photograph
        (640, 427, (0.2, 1.0), (3 / 4, 4 / 3)),
        (300, 6000, (0.08, 1.0), (3 / 4, 4 / 3)),  # a panorama
        (7, 5, (0.08, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_crop_parameters_follow_torchvision(height, width, scale, ratio):
    num = 3000
    crop = ops.RandomResizedCrop(32, scale, ratio, flip_p=0.5)
    *ours, flip = sample(crop, num, (height, width))
    top, left, box_h, box_w = (p.double().numpy() for p in ours)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array(
        [TorchvisionCrop.get_params(image, scale, ratio) for _ in range(num)], dtype=float
    )
    for mine, reference in [
        (box_h * box_w, theirs[:, 2] * theirs[:, 3]),
        (box_w / box_h, theirs[:, 3] / theirs[:, 2]),
        (top, theirs[:, 0]),
        (left, theirs[:, 1]),
    ]:
        assert stats.ks_2samp(mine, reference).pvalue > 1e-4
    assert stats.binomtest(int(flip.sum()), num, 0.5).pvalue > 1e-4


def test_crop_fallback_is_torchvisions():
    """Boxes of the whole area never fit these images: always the centre crop."""
    for height, width in [(40, 160), (160, 40), (30, 33)]:
        scale, ratio = ((5.0, 5.0), (3 / 4, 4 / 3))
        crop = ops.RandomResizedCrop(32, scale, ratio)
        expected = TorchvisionCrop.get_params(torch.empty(3, height, width), scale, ratio)
        boxes = torch.stack(sample(crop, 3, (height, width))[:4], 1)
        assert boxes.tolist() == [list(expected)] * 3


SIDE = st.integers(1, 3000)


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=20), st.integers(0, 2**31))
def test_crops_of_many_sizes_are_those_of_each(sizes, seed):
    """A batch of pictures of any size draws what batches of one size draw; all within them."""
    crop = ops.RandomResizedCrop(32, (0.08, 1.0), flip_p=0.5)
    u = uniforms(keys(seed, 0, torch.arange(len(sizes))), 0, crop.num_draws)
    heights, widths = torch.tensor(sizes).unbind(1)
    together = crop.sample(u, heights, widths)
    for number, (height, width) in enumerate(sizes):
        alone = crop.sample(u[number : number + 1], height, width)
        assert [value[number].item() for value in together] == [value.item() for value in alone]
        top, left, box_h, box_w, _ = (value.item() for value in alone)
        assert 0 <= top < top + box_h <= height
        assert 0 <= left < left + box_w <= width


def test_every_place_of_a_box_is_as_likely():
    """The last row and column, too: boxes of 2 x 3 pixels out of 5 x 5 have 4 x 3 places."""
    top, left, box_h, box_w, _ = sample(
        ops.RandomResizedCrop(4, (0.24, 0.24), (1.5, 1.5)), 6000, (5, 5)
    )
    assert set(box_h.tolist()) == {2}
    assert set(box_w.tolist()) == {3}
    places = np.bincount(3 * top + left, minlength=12)
    assert stats.chisquare(places).pvalue > 1e-4


def test_jitter_parameters():
    num = 24_000
    factors, hue, order = sample(ops.ColorJitter(0.4, 1.5, 0.2, 0.1, p=0.8), num)
    counts = Counter(order.tolist())
    assert set(counts) == set(range(24))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    applied = factors[:, 0] != 1
    assert stats.binomtest(int(applied.sum()), num, 0.8).pvalue > 1e-4
    assert (factors[~applied] == 1).all()
    assert (hue[~applied] == 0).all()
    for values, low, high in [
        (factors[:, 0], 0.6, 1.4),
        (factors[:, 1], 0, 2.5),
        (factors[:, 2], 0.8, 1.2),
        (hue, -0.1, 0.1),
    ]:
        assert (
            stats.kstest(values[applied].double().numpy(), "uniform", (low, high - low)).pvalue
            > 1e-4
        )


def test_frequencies_and_sigma():
    num = 10_000
    for op, p in [
        (ops.RandomGrayscale(0.2), 0.2),
        (ops.Solarize(0.3), 0.3),
        (ops.GaussianBlur(16, 0.5), 0.5),
    ]:
        (values,) = sample(op, num)
        assert stats.binomtest(int((values > 0).sum()), num, p).pvalue > 1e-4
    (sigma,) = sample(ops.GaussianBlur(16, 1.0, (0.1, 2.0)), num)
    assert stats.kstest(sigma.double().numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-4


# ---- views ----

POLICIES = sorted((Path(__file__).parents[2] / "conf" / "augmentation").glob("*.yaml"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_policies_state_every_parameter(path):
    """A key that the file leaves out could not be overridden on the command line."""
    policy = OmegaConf.to_container(
        compose(f"augmentation={path.stem}").augmentation, resolve=False
    )
    assert policy.pop("name") == path.stem
    assert policy.pop("_target_") == "ssl_bench.augment.views.Views"
    assert policy.pop("image_size") == "${either:${data.image_size},96}"
    defaults = {
        name: p.default
        for name, p in inspect.signature(Views).parameters.items()
        if name != "image_size"
    }
    assert set(policy) == set(defaults)
    views = Views(16, **policy)(uint8_batch(5), keys(0, 0, torch.arange(5)))
    small = [(5, 3, policy["small_size"], policy["small_size"])] * policy["num_small_views"]
    assert [view.shape for view in views] == [(5, 3, 16, 16)] * policy["num_views"] + small
    if path.stem == "moco_v2":  # the constructor's defaults are the paper's
        assert {k: pytest.approx(v) for k, v in policy.items()} == {
            k: v for k, v in defaults.items()
        }


def uint8_batch(num: int, size: int = 24) -> torch.Tensor:
    return (image_batch(num, size, size) * 255).round().to(torch.uint8)


def test_views_may_differ_in_kind():
    """The first always blurred, the second never; solarized the other way round; two small ones
    with neither.
    """
    plain = dict(
        jitter_p=0.0, grayscale_p=0.0, flip_p=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)
    )
    views = Views(
        16,
        blur_p=(1.0, 0.0, 0.0),
        solarize_p=(0.0, 1.0, 0.0),
        num_small_views=2,
        small_size=8,
        **plain,
    )
    out = views(uint8_batch(6), keys(0, 0, torch.arange(6)))
    assert [view.shape[-1] for view in out] == [16, 16, 8, 8]
    sharp = Views(16, blur_p=0.0, **plain)(uint8_batch(6), keys(0, 0, torch.arange(6)))[0]
    roughness = lambda view: view.diff(dim=3).abs().mean()  # noqa: E731
    assert roughness(out[0]) < 0.8 * roughness(sharp)
    levels = [views.normalize.std * view + views.normalize.mean for view in (sharp, out[1])]
    assert_equals(levels[1], tv.solarize(levels[0], 0.5), mean=1e-5, largest=1e-4)
    assert len(set(views.views)) == 3  # the small ones share theirs
    with pytest.raises(UserError, match="blur_p has 2 values, and there are 3 kinds of views"):
        Views(16, blur_p=(1.0, 0.1), num_small_views=2)


def test_views_are_reproducible_and_differ():
    views, images = Views(16, num_views=3), uint8_batch(40)
    image_keys = keys(0, 0, torch.arange(40))
    out = views(images, image_keys)
    assert [view.shape for view in out] == [(40, 3, 16, 16)] * 3
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(out, 2))
    for again, view in zip(views(images[30:35], image_keys[30:35]), out, strict=True):
        torch.testing.assert_close(again, view[30:35], rtol=0, atol=1e-5)


def test_a_view_is_torchvisions_chain():
    """The whole policy against torchvision's, one by one: mean absolute difference below 1e-5 (the
    bar is 1/255).
    """
    views, images = Views(16, solarize_p=0.3), uint8_batch(30)
    image_keys = keys(0, 0, torch.arange(30))
    crop, (factors, hue, order), (grey,), (sigma,), (solarized,) = views.views[0].sample(
        images, image_keys, 0
    )
    out = views(images, image_keys)[0] * views.normalize.std + views.normalize.mean
    orders = list(itertools.permutations(range(4)))
    for i, image in enumerate(images / 255):
        top, left, box_h, box_w, flip = (p[i].item() for p in crop)
        image = tv.resized_crop(image, top, left, box_h, box_w, [16, 16], antialias=True)
        image = jitter_expected(image, [*factors[i].tolist(), hue[i].item()], orders[order[i]])
        image = tv.rgb_to_grayscale(image, 3) if grey[i] else image
        image = tv.gaussian_blur(image, 23, sigma[i].item()) if sigma[i] > 0 else image
        image = tv.solarize(image, 0.5) if solarized[i] else image
        image = image.flip(-1) if flip else image  # last, as the authors do; ours is in the crop
        assert (out[i] - image).abs().mean() < 1e-5


def test_grayscale_first_makes_hue_and_saturation_do_nothing():
    policy = dict(
        grayscale_p=1.0,
        jitter_p=1.0,
        brightness=0,
        contrast=0,
        blur_p=0,
        flip_p=0,
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
    )
    images, image_keys = uint8_batch(10), keys(0, 0, torch.arange(10))
    first = Views(24, grayscale_first=True, **policy)
    last = Views(24, grayscale_first=False, **policy)
    grey = tv.rgb_to_grayscale(images / 255, 3)
    restored = first(images, image_keys)[0] * first.normalize.std + first.normalize.mean
    # torchvision's luminance weights sum to 0.9999
    assert_equals(restored, grey, mean=1e-4, largest=1e-4)
    restored = last(images, image_keys)[0] * last.normalize.std + last.normalize.mean
    assert (restored - grey).abs().max() > 0.05


def test_views_without_randomness_only_normalise():
    views = Views(
        24, 1, crop_scale=(1, 1), crop_ratio=(1, 1), flip_p=0,
        brightness=0, contrast=0, saturation=0, hue=0, grayscale_p=0, blur_p=0,
    )  # fmt: skip
    assert len(views.views[0].ops) == 0
    images = uint8_batch(20)
    (view,) = views(images, keys(0, 0, torch.arange(20)))
    assert torch.equal(views.denormalize(view), images)
    torch.testing.assert_close(
        view,
        tv.normalize(images / 255, views.normalize.mean.flatten(), views.normalize.std.flatten()),
    )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_views_keep_the_memory_format(layout):
    images = uint8_batch(20).contiguous(memory_format=layout)
    for view in Views(16)(images, keys(0, 0, torch.arange(20))):
        assert view.is_contiguous(memory_format=layout)


def test_views_under_autocast_stay_float32():
    views, images, image_keys = Views(16), uint8_batch(8), keys(0, 0, torch.arange(8))
    expected = views(images, image_keys)
    with torch.autocast("cpu", torch.bfloat16):
        inside = views(images, image_keys)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_transform_is_one_static_graph():
    views, images = Views(16, solarize_p=0.2), uint8_batch(8)
    view = views.views[0]
    params = view.sample(images, keys(0, 0, torch.arange(8)), 0)
    compiled = torch.compile(view.transform, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(
        compiled(images, params), view.transform(images, params), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "policy",
    [
        {"solarize_p": 0.2, "rotate": 10.0},
        {"grayscale_first": True},
        {"hue": 0.0},
        {"jitter_p": 0.0},
        {"jitter_p": 1.0, "blur_p": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [8, 40, 100])
def test_leaving_out_what_changes_nothing_changes_nothing(policy, chunk, monkeypatch):
    """On the CPU images are sorted by what happens to them, and nothing else is worked out."""
    monkeypatch.setattr(views_module, "CHUNK", chunk * 16 * 16)
    count = 60
    views, images, image_keys = (
        Views(16, **policy),
        uint8_batch(count),
        keys(0, 0, torch.arange(count)),
    )
    for number, (view, made) in enumerate(zip(views.views, views(images, image_keys), strict=True)):
        everything = view.transform(images, view.sample(images, image_keys, number))
        assert_equals(made, everything, mean=1e-6, largest=1e-4)


@pytest.mark.parametrize("op", OPS[1:], ids=lambda op: type(op).__name__)
def test_kinds_say_which_images_an_op_changes(op):
    images, params = image_batch(40), sample(op, 40)
    changed = (op.apply(images, *params) - images).abs().amax((1, 2, 3)) > 1e-6
    left = op.kinds(*params) == 0
    assert 0 < left.sum() < 40
    assert not (changed & left).any()


def test_jitter_of_one_kind_is_jitter():
    jitter = ops.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    images, params = image_batch(200), sample(jitter, 200)
    kinds, expected = jitter.kinds(*params), jitter.apply(images, *params)
    assert kinds.unique().tolist() == [0, 1, 2, 3, 4]
    for kind in (1, 2, 3, 4):
        some = kinds == kind
        result = jitter.apply_some(images[some], kinds[some], *(value[some] for value in params))
        assert_equals(result, expected[some], mean=1e-6, largest=1e-5)


def test_views_hold_nothing_for_the_checkpoint():
    assert Views(16, solarize_p=0.1).state_dict() == {}


@pytest.mark.parametrize(
    ("name", "interval"),
    [
        ("crop_scale", (0.8, 0.2)),
        ("crop_scale", (0.2, 1.5)),
        ("crop_ratio", (0, 1)),
        ("blur_sigma", (2, 1)),
    ],
)
def test_bad_intervals_are_told(name, interval):
    with pytest.raises(UserError, match=f"augmentation.{name} is .*low <= high"):
        Views(16, **{name: interval})


def test_eval_view_is_resize_and_centre_crop():
    images = uint8_batch(6, size=40)
    view = EvalView(28)
    expected = tv.center_crop(tv.resize(images, [32], antialias=True), [28, 28])
    out = view(images)
    assert out.shape == (6, 3, 28, 28)
    assert torch.equal(view.denormalize(out), expected)
    assert torch.equal(
        EvalView(40, resize=1.0).denormalize(EvalView(40, resize=1.0)(images)), images
    )


def test_threads_change_nothing() -> None:
    views, images = (
        Views(24, solarize_p=0.3),
        torch.randint(256, (70, 3, 40, 40), dtype=torch.uint8),
    )
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(views(images, keys(0, 0, torch.arange(70))))
            assert torch.get_num_threads() == threads
            assert all(not view.requires_grad for view in made[-1])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *made))
