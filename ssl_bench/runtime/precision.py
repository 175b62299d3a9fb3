"""The meaning of `precision=`: in which type products are, and how float16 gradients survive."""

import warnings

import torch

from ssl_bench.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(precision: str, device: torch.device) -> None:
    """Set torch's switches for this process. UserError for bfloat16 on a GPU that emulates it."""
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
