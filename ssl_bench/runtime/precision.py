"""The meaning of `precision=`: in which type products are, and how float16 gradients survive."""

import logging
import warnings
from pathlib import Path

import torch

from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# what Linux calls the instructions of a CPU, of x86 and ARM, that multiply in that type
INSTRUCTIONS = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
FLAGS = Path("/proc/cpuinfo")  # Linux alone has it


def instructions(precision: str) -> set[str] | None:
    """Those of this CPU for products in `precision`. None: not known here, or not needed."""
    if precision not in INSTRUCTIONS or not FLAGS.is_file():
        return None
    return INSTRUCTIONS[precision] & set(FLAGS.read_text().split())


def emulated(precision: str, device: torch.device) -> bool:
    """Has this CPU to compute products in `precision` by others, many times more slowly?"""
    return device.type == "cpu" and instructions(precision) == set()


def prepare(precision: str, device: torch.device, tells: bool = True) -> None:
    """Set torch's switches for this process. UserError for bfloat16 on a GPU that emulates it;
    one that `tells` warns of a CPU that does."""
    if tells and emulated(precision, device):
        log.warning(
            "precision=%s: this CPU has no instructions for it and emulates it, which is up to 17 "
            "times slower than precision=fp32",
            precision,
        )
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    # torch.compile advises tf32, which is the user's choice
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are static
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # torch's default is true
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise UserError(
                f"precision=bf16: {name} has no bfloat16; type precision=fp16, "
                "which is as fast there"
            )


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def gradient_scaler(
    precision: str, device: torch.device, optimizer: torch.optim.Optimizer
) -> torch.amp.GradScaler:
    """Scales the loss in fp16, so that gradients don't underflow, and skips steps that overflow.

    To skip, the host waits for the device. A fused kernel would not, but torch's SGD, if its first
    step is skipped, goes on with momentum that was never initialised (torch 2.14, `_fused_sgd`).
    """
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if scaler.is_enabled():
        optimizer._step_supports_amp_scaling = False
    return scaler
