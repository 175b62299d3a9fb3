"""A fault of torch's convolutions on CPUs, and the way around it."""

import torch
from torch import Tensor, nn

SIMD = 8  # float32 values of an AVX2 register


def narrow(module: nn.Module) -> list[nn.Conv2d]:
    """Its strided 1x1 convolutions of fewer than 8 channels.

    In channels_last their gradient is written beyond its memory on a CPU with AVX2 and without
    AVX-512 (oneDNN in torch 2.14.1, `jit_1x1:avx2`): a ResNet-18 of width 4 ends with "double free
    or corruption", or learns from damaged numbers.
    """
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    strided = (one for one in layers if one.kernel_size == (1, 1) and max(one.stride) > 1)
    return [layer for layer in strided if layer.in_channels // layer.groups < SIMD]


def guard_(module: nn.Module) -> None:
    """Have those of `narrow` read contiguous images and weights. To be called once the module has
    its memory format.
    """
    for layer in narrow(module):
        layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
        layer.register_forward_pre_hook(_contiguous)


def _contiguous(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # `contiguous` returns images of one pixel as they are, with the strides of channels_last
    return (given[0].clone(memory_format=torch.contiguous_format), *given[1:])
