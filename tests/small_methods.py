"""Every method, small."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from commands import CONF, compose
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.backbones.resnet import resnet18
from ssl_bench.backbones.vit import ViT
from ssl_bench.config import build
from ssl_bench.launch.process import launch
from ssl_bench.methods.base import Method
from ssl_bench.stages._training import compile_

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
LEARNING = [name for name in METHODS if name != "random"]
# those whose recipe has a ViT: read, not composed, since each worker asks before its first test
VITS = [
    name
    for name in METHODS
    if "override /backbone: vit_" in (CONF / "method" / f"{name}.yaml").read_text()
]
PATCHES = [name for name in VITS if name != "moco_v3_vit"]  # and that hide some of its patches
MULTI_CROP = ("swav", "dino", "lejepa", "ibot", "dinov2", "deepcluster_v2", "msn")


# heads of the size of the images
SMALL = {
    "moco_v1": ["method.queue_size=512", "method.dim=16"],
    "moco_v2": ["method.queue_size=512", "method.dim=16"],
    "simclr": ["method.dim=16"],
    "byol": ["method.dim=16", "method.hidden_dim=32"],
    "simsiam": ["method.dim=32", "method.predictor_dim=16"],
    "barlow_twins": ["method.dim=32"],
    "vicreg": ["method.dim=32"],
    "moco_v3": ["method.dim=16", "method.hidden_dim=32"],
    "moco_v3_vit": ["method.dim=16", "method.hidden_dim=32", "backbone.patch_size=16"],
    "mae": ["method.decoder_dim=32", "method.decoder_depth=1", "method.decoder_heads=2"],
    "simmim": ["method.mask_patch_size=4"],
    "ijepa": [
        "method.predictor_dim=32",
        "method.predictor_depth=1",
        "method.predictor_heads=2",
        "method.min_keep=0",
    ],
    "ibot": ["method.out_dim=64", "method.hidden_dim=32", "method.bottleneck_dim=16"],
    "dinov2": ["method.out_dim=64", "method.hidden_dim=32", "method.bottleneck_dim=16"],
    "swav": [
        "method.dim=16",
        "method.hidden_dim=32",
        "method.num_prototypes=20",
        "method.queue_length=256",
    ],
    "dino": ["method.out_dim=64", "method.hidden_dim=32", "method.bottleneck_dim=16"],
    "lejepa": ["method.dim=16", "method.hidden_dim=32", "method.num_directions=32"],
    "nnclr": [
        "method.dim=16",
        "method.hidden_dim=32",
        "method.predictor_dim=32",
        "method.queue_size=512",
    ],
    "dcl": ["method.dim=16"],
    "distill": ["method.teacher=timm:none", "method.hidden_dim=32"],
    "ressl": ["method.queue_size=512", "method.dim=16", "method.hidden_dim=32"],
    "wmse": ["method.dim=8", "method.hidden_dim=32", "method.whitening_size=16"],
    "deepcluster_v2": [
        "method.dim=16",
        "method.hidden_dim=32",
        "method.num_prototypes=[12,10]",
        "method.iterations=3",
    ],
    "tico": ["method.dim=16", "method.hidden_dim=32"],
    "vibcreg": ["method.dim=32", "method.hidden_dim=32", "method.num_groups=4"],
    "mmcr": ["method.dim=16", "method.hidden_dim=32"],
    "nnbyol": ["method.dim=16", "method.hidden_dim=32", "method.queue_size=512"],
    "msn": ["method.dim=16", "method.hidden_dim=32", "method.num_prototypes=32"],
}
RUN = [
    "stage=pretrain",
    "data=digits",
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
    "epochs=2",
]
RUN += [
    "batch_size=256",
    "augmentation.small_size=8",
    "log_every=1",
    "device=cpu",
    "schedule.warmup_epochs=0",
]


WHOLE = slice(None)
# a ViT that learns something in seconds
SMALL_VIT = ["backbone=vit_tiny", "backbone.patch_size=4", "backbone.depth=2", "backbone.dim=96"]
SMALL_VIT += ["optimizer.base_lr=1e-3"]


def overrides(name: str, *more: str) -> list[str]:
    if name not in VITS:
        return [*RUN, f"method={name}", *SMALL.get(name, []), *more]
    words = [word for word in RUN if not word.startswith(("backbone.width", "backbone.stem"))]
    return [*words, f"method={name}", *SMALL_VIT, *SMALL[name], *more]


def resnet() -> nn.Module:
    return resnet18(stem="small", width=8)


def small_vit(depth: int = 2) -> nn.Module:
    return ViT(16, 4, 24, 3, depth=depth)


def make(name: str, backbone: Callable[[], nn.Module] = resnet, depth: int = 2) -> Method:
    """With that backbone, or a ViT of that depth if it needs patches."""
    torch.manual_seed(0)
    cfg = compose(*overrides(name))
    if name in PATCHES:
        backbone = partial(small_vit, depth)
    sizes = {"num_classes": 10, "num_images": 32}
    given = {key: value for key, value in sizes.items() if build.takes(cfg.method, key)}
    if build.takes(cfg.method, "teacher_network"):
        given = {"teacher_network": backbone()}
    method = build.construct(cfg.method, backbone=backbone(), **given)
    whole = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    method.prepare(iter([([whole, whole.flip(3)], torch.arange(32))]))
    return method


@cache
def teacher() -> Path:
    """A run whose network hasn't learnt anything, for method=distill."""
    return Path(_teacher().name)


@cache
def _teacher() -> TemporaryDirectory:
    folder = TemporaryDirectory(prefix="teacher")
    launch(compose(*RUN, "method=random", f"dir={folder.name}"))
    return folder


@cache
def num_views(name: str) -> int:
    with torch.random.fork_rng(devices=[]):  # the first call draws no more than the others
        return make(name, TwoLayers).num_views


def views_of(name: str, batch: int, step: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    sizes = [16] * num_views(name) + [8, 8] * (name in MULTI_CROP)
    return [torch.rand(batch, 3, size, size, generator=generator) for size in sizes]


def drawn(method: Method, batch: int, step: int = 0, part: slice = WHOLE) -> tuple[Tensor, ...]:
    """What the loop hands to `forward` after the labels, for a part of the batch."""
    indices = torch.arange(batch)[part]
    return method.draw(keys(0, step, indices), indices)


class TwoLayers(nn.Sequential):
    """What compiles in seconds."""

    dim = 16

    def __init__(self) -> None:
        layers = [
            (nn.Conv2d(i, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for i in (3, 16)
        ]
        super().__init__(*layers[0], *layers[1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def learnt(
    name: str,
    compiled: bool,
    device: str = "cpu",
    num_steps: int = 2,
    after_step: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """The loss and each gradient of a few steps over a change of epoch."""
    method = make(name, TwoLayers, depth=1).to(device).train()
    if compiled:
        torch._dynamo.reset()
        compile_(method, torch.device(device))
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    found = {}
    for step in range(num_steps):
        torch.manual_seed(step)
        method.begin(2 * step / num_steps, 2)
        views = views_of(name, 16, step)
        if name in VITS:  # small views, another minute to compile, go the way of DINO's
            views = views[: num_views(name)]
        views = [view.to(device) for view in views]
        more = [value.to(device) for value in drawn(method, 16, step)]
        loss = method(views, torch.arange(16, device=device) % 10, *more)["loss"]
        optimizer.zero_grad()
        loss.backward()
        found |= {
            f"{step} {key}": p.grad.clone() for key, p in trained.items() if p.grad is not None
        }
        found[f"{step} loss"] = loss.detach().clone()
        optimizer.step()
        method.update((step + 1) / num_steps)
        after_step()
    return found


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    """The names of what differs. A gradient that a norm takes out is nothing but rounding."""
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(value.norm() for value in expected.values())
    return {
        key
        for key in found
        if (found[key] - expected[key]).norm() > 1e-3 * expected[key].norm() + rounding
    }


def optimizer_of(method: Method, batch_size: int, *overrides: str) -> torch.optim.Optimizer:
    """With its rates noted, as `fit` does."""
    optimizer = build.construct(
        compose(*overrides).optimizer, params=method.param_groups(), batch_size=batch_size
    )
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer
