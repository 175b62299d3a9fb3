"""Memory of this process, or of its GPU."""

import ctypes
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed() -> None:
    """Let glibc keep large freed blocks.

    It would give them back to the system and get the next ones page by page: a fifth of a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 2**30)


def reset_peak(device: torch.device) -> None:
    """Let `peak` count from now on; some systems can only count from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        with suppress(OSError):
            CLEAR.write_text("5")


def peak(device: torch.device) -> float:
    """The most memory in use so far, in GB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = STATUS.read_text() if STATUS.exists() else ""
    line = re.search(r"VmHWM:\s+(\d+) kB", status)
    if line:  # gVisor has no such line
        return int(line[1]) * 1024 / 1e9
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return used * unit / 1e9
