"""What this machine can do, and what is missing for what: `ssl-bench doctor`, without a traceback
even where torch can't be imported.
"""

import importlib.metadata as metadata
import logging
import os
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from packaging.requirements import Requirement

from ssl_bench import __version__
from ssl_bench.errors import UserError

DEVELOPMENT = ("test", "bench")  # extras of those who change the program


def examine() -> Iterator[tuple[str, str]]:
    """Lines (what, how it is), as they are found out. What fails says so in its line."""
    yield "ssl-bench", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    for name, look in LOOKS.items():
        try:
            yield from ((name, line) for line in look())
        except Exception as error:  # of a driver, a library, a server: any
            yield name, f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for name, missing in extras().items():
        told = f"missing: pip install {' '.join(map(repr, missing))}" if missing else "ok"
        yield f"extra {name}", told


def show() -> None:
    """Print it, as lines of two columns, no wider than the terminal."""
    before, width = "", shutil.get_terminal_size((120, 0)).columns
    for what, how in examine():
        for line in _wrapped(how, max(40, width - 18)):
            print(f"{'' if what == before else what:<18}{line}", flush=True)
            before = what


def _wrapped(text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return wrapped or [""]


def extras() -> dict[str, list[str]]:
    """{extra: the requirements of it that this environment doesn't satisfy}."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires("ssl_bench") or []:
        wanted = Requirement(line)
        for extra in metadata.metadata("ssl_bench").get_all("Provides-Extra") or []:
            if extra in DEVELOPMENT or not wanted.marker:
                continue
            if extra not in str(wanted.marker) or not wanted.marker.evaluate({"extra": extra}):
                continue
            missing = found.setdefault(extra, [])
            try:
                version = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                version = ""
            if not version or not wanted.specifier.contains(version, prereleases=True):
                wanted.marker = None
                missing.append(str(wanted))
    return found


def _torch() -> Iterator[str]:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    yield f"{torch.__version__} for {built}, torchvision {metadata.version('torchvision')}"


def _devices() -> Iterator[str]:
    import torch

    from ssl_bench.data.pool import default_workers

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"cpu: {default_workers()} cores for this process, {memory / 1e9:.0f} GB of memory"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"cuda:{index}: {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    if torch.backends.mps.is_available():
        yield "mps"
    if not torch.cuda.is_available() and Path("/dev/nvidia0").exists():
        yield "a GPU is here, and this torch can't use it: see nvidia-smi"


def _precisions() -> Iterator[str]:
    import torch

    from ssl_bench.runtime import precision

    if torch.cuda.is_available():
        names = ["fp32", "tf32"] if torch.cuda.get_device_capability() >= (8, 0) else ["fp32"]
        if torch.cuda.is_bf16_supported(including_emulation=False):
            names.append("bf16 (the fast one)")
            yield ", ".join([*names, "fp16"])
        else:
            yield ", ".join([*names, "fp16 (the fast one; this GPU has no bf16)"])
        return
    native = precision.instructions("bf16")
    if native is None:
        yield "fp32, bf16"
    elif native:
        yield f"fp32, bf16 (natively: {', '.join(sorted(native))})"
    else:
        yield "fp32 (the fast one; this CPU emulates bf16, many times more slowly)"


def _compile() -> Iterator[str]:
    from ssl_bench.runtime.device import check_compiler

    try:
        check_compiler()
        yield "compile=true finds a C++ compiler and Python's headers"
    except UserError as error:
        yield str(error)


def _decoders() -> Iterator[str]:
    from PIL import Image, features

    Image.init()
    formats = [name for name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") if name in Image.OPEN]
    turbo = "with" if features.check_feature("libjpeg_turbo") else "without"
    yield f"Pillow {metadata.version('pillow')}, {turbo} libjpeg-turbo: {', '.join(formats)}, ..."
    import_module("simplejpeg")
    yield f"simplejpeg {metadata.version('simplejpeg')}, for JPEGs of any size"


def _disk() -> Iterator[str]:
    from ssl_bench.data.store import cache_folder, free_bytes

    folder = cache_folder("stores")
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield (
        f"{folder.parent}: {free_bytes(folder) / 1e9:.1f} GB free, {kept / 1e9:.1f} GB packed; "
        "data.cache= or $SSL_BENCH_CACHE name another place"
    )
    yield f"runs, below {Path.cwd()}: {free_bytes(Path.cwd()) / 1e9:.1f} GB free"


def _slurm() -> Iterator[str]:
    programs = ("sbatch", "srun", "squeue", "scontrol")
    if absent := [name for name in programs if shutil.which(name) is None]:
        yield f"no {', '.join(absent)}: launcher=slurm is for the login node of a cluster"
        return
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10)
    yield f"{version.stdout.strip() or 'found'}: launcher=slurm"


def _wandb() -> Iterator[str]:
    from ssl_bench.runs.tracking import choose_mode

    logger = logging.getLogger("wandb")
    before, logger.disabled = logger.disabled, True
    try:
        mode = choose_mode("auto")
    finally:
        logger.disabled = before
    said = {"online": "logged in", "offline": "no login, runs stay offline: wandb login"}
    yield f"{metadata.version('wandb')}, {said.get(mode, mode)}"


LOOKS: dict[str, Callable[[], Iterator[str]]] = {
    "torch": _torch,
    "device=": _devices,
    "precision=": _precisions,
    "compile=": _compile,
    "decoders": _decoders,
    "disk": _disk,
    "Slurm": _slurm,
    "W&B": _wandb,
}
