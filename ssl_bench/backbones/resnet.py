"""Feature extractors: images (B, 3, H, W) -> features (B, dim), with the width of the features as `.dim`.

One that doesn't take images of every size says why by `.refuses(size)`. `.classifier_keys()`, where a backbone has it:
what the names of the classifier's tensors begin with in a state dict of the whole network.
"""

import difflib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench.errors import UserError

Stem = Literal["imagenet", "small"]
Positions = Literal["learned", "sincos"]
Init = Literal["torchvision", "moco_v3"]


def _resnet(block_name: str, layers: list[int], stem: Stem, width: int, zero_init_residual: bool) -> nn.Module:
    from torchvision.models import resnet

    block = getattr(resnet, block_name)

    class ResNet(resnet.ResNet):
        """torchvision's network without `fc`: its own names, its own initialisation."""

        def __init__(self) -> None:
            super().__init__(block, layers, zero_init_residual=zero_init_residual)
            self.fc = nn.Identity()
            self.dim = 8 * width * block.expansion
            if stem == "small":
                # CIFAR stem (SimCLR, arXiv:2002.05709, B.9): a 3x3 convolution of stride 1, and no pooling.
                self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
                self.maxpool = nn.Identity()
            elif width != 64:
                self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            if width != 64:
                self.bn1 = nn.BatchNorm2d(width)
            if stem == "small" or width != 64:
                nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

        def _make_layer(self, block: type, planes: int, *args, **kwargs) -> nn.Sequential:
            if planes == 64:  # the first stage follows conv1, whose width is ours
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *args, **kwargs)

    return ResNet()


def resnet18(stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-18, dim = 8 * width (512). `stem="small"` is for images of about 32 pixels.

    zero_init_residual: each block starts as the identity, by a last batch norm of weight 0 (Goyal et al.,
    arXiv:1706.02677, section 5.1).
    """
    return _resnet("BasicBlock", [2, 2, 2, 2], stem, width, zero_init_residual)


def resnet34(stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-34, dim = 8 * width (512)."""
    return _resnet("BasicBlock", [3, 4, 6, 3], stem, width, zero_init_residual)


def resnet50(stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-50, dim = 32 * width (2048)."""
    return _resnet("Bottleneck", [3, 4, 6, 3], stem, width, zero_init_residual)


def resnet101(stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-101, dim = 32 * width (2048)."""
    return _resnet("Bottleneck", [3, 4, 23, 3], stem, width, zero_init_residual)


def _vit(
    image_size: int, patch_size: int, dim: int, num_heads: int, positions: Positions, frozen_patches: bool, init: Init
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
            tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches.flatten(2).mT], dim=1)
            tokens = tokens + self.positions(*patches.shape[2:])
            return self.encoder.ln(self.encoder.layers(self.encoder.dropout(tokens)))[:, 0]

        def refuses(self, size: int) -> str | None:
            return f"is no multiple of backbone.patch_size={patch_size}" if size % patch_size else None

        def positions(self, rows: int, columns: int) -> Tensor:
            """(1, 1 + rows * columns, dim): interpolated where the grid isn't that of `image_size` (DINO's authors)."""
            embedding = self.encoder.pos_embedding
            side = image_size // patch_size
            if (rows, columns) == (side, side):
                return embedding
            grid = embedding[:, 1:].mT.unflatten(2, (side, side))
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
            return torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)

    if image_size % patch_size:
        raise UserError(f"backbone.patch_size={patch_size} does not divide backbone.image_size={image_size}")
    return ViT()


@torch.no_grad()
def _init_as_moco_v3(network: nn.Module) -> None:
    """Xavier's uniform for linear layers, also query, key, value each, and patches (the authors' vits.py 31-47)."""

    def uniform_(weight: Tensor, inputs: int, outputs: int) -> None:
        nn.init.uniform_(weight, -((6 / (inputs + outputs)) ** 0.5), (6 / (inputs + outputs)) ** 0.5)

    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            uniform_(module.in_proj_weight, module.embed_dim, module.embed_dim)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            uniform_(module.weight, module.in_features, module.out_features)
            nn.init.zeros_(module.bias)
    uniform_(network.conv_proj.weight, network.conv_proj.weight[0].numel(), network.conv_proj.out_channels)
    nn.init.zeros_(network.conv_proj.bias)
    nn.init.normal_(network.class_token, std=1e-6)


def _sincos(side: int, dim: int) -> Tensor:
    """(1 + side * side, dim): none for the class token; sines and cosines of row and of column, a quarter each, of
    wavelengths 2 pi to 20,000 pi (the authors' vits.py 53-69)."""
    place = torch.arange(side, dtype=torch.float32)
    angles = torch.outer(place, 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4)))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    grid = torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])


def vit_tiny(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
) -> nn.Module:
    """ViT-T (Touvron et al., arXiv:2012.12877, table 1), dim = 192.

    positions: of patches; "sincos" are fixed. frozen_patches: their projection stays as initialised. Both, and `init`,
    are MoCo v3's (arXiv:2104.02057, section 4.1).
    """
    return _vit(image_size, patch_size, 192, 3, positions, frozen_patches, init)


def vit_small(
    image_size: PositiveInt,
    patch_size: PositiveInt = 16,
    positions: Positions = "learned",
    frozen_patches: bool = False,
    init: Init = "torchvision",
) -> nn.Module:
    """ViT-S (Touvron et al., arXiv:2012.12877, table 1), dim = 384. See `vit_tiny`."""
    return _vit(image_size, patch_size, 384, 6, positions, frozen_patches, init)


def timm(model: str, options: dict[str, Any] | None = None) -> nn.Module:
    """Any model of the timm package by its name, as initialised there; options: of its constructor.

    UserError: timm isn't installed, or has no such model.
    """
    try:
        from timm import create_model, list_models
    except ImportError:
        raise UserError("backbone=timm needs the timm package: pip install 'ssl_bench[timm]'") from None
    if model not in (known := list_models()):
        close = difflib.get_close_matches(model, known, n=3)
        raise UserError(
            f"backbone.model={model}: timm has no such model; did you mean {', '.join(close) or 'another'}?"
        )
    options = options or {}
    if "num_classes" in options:
        raise UserError(f"backbone.options has num_classes={options['num_classes']}: leave it out; a backbone has none")

    def plan(**changed: Any) -> nn.Module:
        """The same network without weights: quick to make, and its forward pass computes shapes only."""
        with torch.device("meta"):
            return create_model(model, **{"num_classes": 0} | options | changed).eval()

    def why_not(size: int, **changed: Any) -> str | None:
        try:
            with torch.no_grad():
                plan(**changed)(torch.empty(1, 3, size, size, device="meta"))
        except Exception as error:  # of any kind: each family has its own way to say no, or none
            return (str(error).strip() or f"{type(error).__name__}").splitlines()[0].rstrip(".")
        return None

    def refuses(size: int) -> str | None:
        if (reason := why_not(size)) is None:
            return None
        helpful = [option for option in ANY_SIZE if why_not(size, **option) is None]
        mend = f", but not with backbone.options={{{_typed(options | helpful[0])}}}" if helpful else ""
        return f"fails in {model} ({reason}){mend}"

    def classifier_keys() -> tuple[str, ...]:
        whole = plan(num_classes=1000).state_dict()
        return tuple(key for key in whole if key not in network.state_dict())

    try:
        network = create_model(model, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not options:
            raise
        raise UserError(
            f"backbone.options={{{_typed(options)}}}: not for timm's {model} ({str(error).partition(chr(10))[0]})"
        ) from None
    network.dim = network.head_hidden_size  # not num_features: that is before the layers which some heads begin with
    network.refuses, network.classifier_keys = refuses, classifier_keys
    return network


# Options of timm's constructors with which a network takes images of any size.
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})


def _typed(options: dict[str, Any]) -> str:
    """As one types them between braces."""
    return ",".join(
        f"{key}:{str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
    )


class Pixels(nn.Module):
    """The image itself as the feature: the floor of every table. Without parameters."""

    def __init__(self, image_size: PositiveInt) -> None:
        super().__init__()
        self.image_size, self.dim = image_size, 3 * image_size * image_size

    def refuses(self, size: int) -> str | None:
        return f"is not backbone.image_size={self.image_size}" if size != self.image_size else None

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)
