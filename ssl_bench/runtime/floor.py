"""What a training could be at most: the operations of a step, and the rate of a matrix product."""

import copy
import logging
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from ssl_bench.runtime.precision import AUTOCAST, emulated

log = logging.getLogger(__name__)

SIDES = {"cpu": 1024, "cuda": 4096}  # of square matrices that are large enough for the full rate


def step_flops(model: nn.Module, arguments: tuple) -> int | None:
    """Floating-point operations of a forward and a backward pass, as torch counts them.

    The passes are those of a copy without numbers (torch's fake tensors): nothing is computed, no
    state or random number moves. None: the model looks at numbers, or at other processes.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch.utils._pytree import tree_map_only
    from torch.utils.flop_counter import FlopCounterMode

    mode = FakeTensorMode()
    try:
        with FakeCopyMode(mode):
            copied = copy.deepcopy(model)
        given = tree_map_only(Tensor, mode.from_tensor, arguments)
        with mode, FlopCounterMode(display=False) as counter:
            copied(*given)["loss"].backward()
    except Exception as error:  # whatever it is: the training doesn't need the count
        log.debug("the operations of a step can't be counted: %s", error)
        return None
    return counter.get_total_flops()


@cache
def matmul_rate(device: torch.device, precision: str) -> float | None:
    """Operations a second of a large matrix product, the best of a few; None: not measured here.

    In the precision that the products of a training have, once for a process. A CPU that emulates
    it has no rate that bounds a training: its products are slower than its convolutions.
    """
    if (side := SIDES.get(device.type)) is None or emulated(precision, device):
        return None
    a, b = (torch.rand(2, side, side, device=device) - 0.5).to(AUTOCAST.get(precision)).unbind()
    wait: Callable[[], None]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(6):  # the first is a warm-up
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
