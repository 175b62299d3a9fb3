"""Random numbers as a pure function of (seed, epoch, image index, view).

No generator and no state: the numbers of an image are the same on any device, in any batch and on
any number of ranks. The mixing function is that of SplitMix64 (Steele, Lea, Flood 2014, "Fast
splittable pseudorandom number generators").
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """A key for each image: indices (B,) int64 -> (B,) int64, on the device of `indices`."""
    # a single value, computed on the host, which never waits for the device
    stream = _mix(torch.tensor([_signed(seed * GOLDEN)]))
    stream = _mix(stream ^ _signed((epoch + 1) * GOLDEN)).item()
    return _mix(_mix(indices ^ stream))


def uniforms(keys: Tensor, view: int, num: int) -> Tensor:
    """`num` independent draws for each key: (B,) int64 -> (B, num) float32 in [0, 1).

    They are multiples of 2^-24: a float32 holds 24 bits exactly.
    """
    streams = _mix(keys ^ _signed((view + 1) * MIX1))
    counters = torch.arange(1, num + 1, device=keys.device) * _signed(GOLDEN)
    bits = _mix(streams[:, None] + counters)
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(MIX1)
    x = (x ^ _shift(x, 27)) * _signed(MIX2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; that of int64 fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same bits: torch has no arithmetic of uint64, and int64 wraps around."""
    return ((value + 2**63) % 2**64) - 2**63
