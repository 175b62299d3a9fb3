"""Torch's switches, which belong to the whole process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def as_at_start() -> Iterator[None]:
    """Torch's default type and device are those of a new process; gradients are on, autocast off.

    What the program had set of these, what runs set of products, and the generators' states are put
    back afterwards. Deterministic algorithms and anomaly mode are left to the program.
    """
    dtype, matmul = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    begun = torch.cuda.is_initialized()
    used = torch.cuda.device_count() if begun else 0
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
    if torch.cuda.is_initialized() and not begun:
        torch.cuda.manual_seed_all(torch.initial_seed())  # as a program that begins to use it


def reset() -> None:
    """As torch is imported: what runs set of products, and generators that nobody has seeded."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, True
    torch.seed()
