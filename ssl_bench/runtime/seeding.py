"""Seeds. Every random draw is a function of where it happens: seed, epoch, step, ...

So no state of a generator has to be saved.
"""

import hashlib
import struct

import torch


def fold(*parts: int | str) -> int:
    """Hash of the parts, 0 <= hash < 2**63: a seed for torch or NumPy that no other parts share."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return struct.unpack("<Q", digest)[0] >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators a step can draw from, in a few us; `torch.manual_seed` takes 190."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
