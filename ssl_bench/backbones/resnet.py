"""ResNets, torchvision's without their classifier."""

from typing import Literal

from pydantic import PositiveInt
from torch import nn

Stem = Literal["imagenet", "small"]


def _resnet(
    block_name: str, layers: list[int], stem: Stem, width: int, zero_init_residual: bool
) -> nn.Module:
    from torchvision.models import resnet

    block = getattr(resnet, block_name)

    class ResNet(resnet.ResNet):
        """torchvision's network without `fc`: its own names, its own initialisation."""

        def __init__(self) -> None:
            super().__init__(block, layers, zero_init_residual=zero_init_residual)
            self.fc = nn.Identity()
            self.dim = 8 * width * block.expansion
            if stem == "small":
                # CIFAR stem (SimCLR, arXiv:2002.05709, B.9): a 3x3 convolution of stride 1, and no
                # pooling.
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


def resnet18(
    stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False
) -> nn.Module:
    """ResNet-18, dim = 8 * width (512). `stem="small"` is for images of about 32 pixels.

    zero_init_residual: each block starts as the identity, by a last batch norm of weight 0 (Goyal
    et al., arXiv:1706.02677, section 5.1).
    """
    return _resnet("BasicBlock", [2, 2, 2, 2], stem, width, zero_init_residual)


def resnet34(
    stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False
) -> nn.Module:
    """ResNet-34, dim = 8 * width (512)."""
    return _resnet("BasicBlock", [3, 4, 6, 3], stem, width, zero_init_residual)


def resnet50(
    stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False
) -> nn.Module:
    """ResNet-50, dim = 32 * width (2048)."""
    return _resnet("Bottleneck", [3, 4, 6, 3], stem, width, zero_init_residual)


def resnet101(
    stem: Stem = "imagenet", width: PositiveInt = 64, zero_init_residual: bool = False
) -> nn.Module:
    """ResNet-101, dim = 32 * width (2048)."""
    return _resnet("Bottleneck", [3, 4, 23, 3], stem, width, zero_init_residual)
