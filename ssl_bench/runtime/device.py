"""The device of a process, and what compiling for it takes."""

import logging
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_bench.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def pick_device(name: str, local_rank: int) -> "torch.device":
    """The device of this process. UserError if it isn't there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        slurm = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS")
        if name == "cpu" and (Path("/dev/nvidia0").exists() or slurm) and not hidden:
            log.warning(
                "device=auto: on the CPU, because torch %s, built for CUDA %s, "
                "can't use the GPU %s (see nvidia-smi)",
                *(torch.__version__, torch.version.cuda),
                f"that Slurm gave this job, {slurm}" if slurm else "here",
            )
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device={name}: torch {torch.__version__} sees no GPU here; "
            "use device=cpu or device=auto"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: not available here; use device=cpu or device=auto")
    if name != "cuda":
        return torch.device(name)
    gpus = torch.cuda.device_count()
    if local_rank >= gpus > 1:
        raise UserError(
            f"{local_rank + 1} processes or more on this machine, and torch sees {gpus} GPUs: "
            "start one each"
        )
    # With one visible GPU a task, as Slurm may arrange it, every local rank has GPU 0.
    return torch.device("cuda", local_rank % gpus)


def check_compiler() -> None:
    """UserError unless torch.compile finds what it calls: on the CPU, and for a GPU by Triton."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if not any(shutil.which(name) for name in compilers if name):
        raise UserError(
            "compile=true needs a C++ compiler, and finds none: apt-get install g++, "
            "or type compile=false"
        )
    header = sysconfig.get_path("include")
    if not Path(header, "Python.h").exists():
        raise UserError(
            f"compile=true needs Python's headers, and finds none in {header}: "
            "apt-get install python3-dev, or type compile=false"
        )
