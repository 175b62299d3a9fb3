"""Torch's switches, which belong to the whole process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def as_at_start() -> Iterator[None]:
    """Torch as a new process has it: its defaults, gradients, no autocast.

    What the program had set before, and the states of its generators, are put back afterwards.
    """
    dtype, matmul = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    used = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(used)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = cudnn
