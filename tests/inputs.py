"""Inputs that anyone can regenerate, for comparison with recorded numbers."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def U(name: str, *shape: int) -> Tensor:
    """float64 in [-1, 1): SplitMix64 of i = 1, 2, ... in C order, offset by the name's CRC-32."""
    i = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = i * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy(2 * ((z >> np.uint64(11)) / 2**53) - 1).reshape(shape)


def official_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state of a torchvision ResNet with parameters by recipe, buffers as initialised."""
    state = {
        key: value.double() if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    for name, parameter in network.named_parameters():
        u = U("encoder." + name, *parameter.shape)
        if parameter.dim() >= 2:
            state[name] = u * (6 / parameter[0].numel()) ** 0.5
        else:
            state[name] = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
    return state
