"""Runs one stage, in this process or in several."""

import atexit
import gc
import io
import json
import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

from omegaconf import DictConfig, OmegaConf

from ssl_bench import console
from ssl_bench.config import build
from ssl_bench.data.pool import default_workers
from ssl_bench.errors import (
    Abandoned,
    Collapsed,
    Diverged,
    Interrupted,
    UserError,
    told_if_full,
)
from ssl_bench.runtime.device import check_compiler, pick_device

log = logging.getLogger(__name__)


def launch(cfg: DictConfig) -> dict[str, float]:
    """Run the stage of `cfg`, and return its metrics.

    It runs in this process, in `cfg.devices` new ones, or in those that torchrun or srun started.
    """
    from ssl_bench.runtime import distributed

    if cfg.compile:
        check_compiler()
    cfg = _settled(build.at_home(cfg))
    single = getattr(build.locate(cfg.stage._target_, "stage"), "single_process", False)
    if cfg.devices > 1 and distributed.launched() is None and not single:
        return _spawn(cfg)
    return _run(cfg)


def _settled(cfg: DictConfig) -> DictConfig:
    """cfg with the settings that the weights decide filled in, so that config.yaml states them.

    They are the checkpoint, where `pretrained` is a run directory (a later look might find a newer
    one), a mean or std that is null, and the file and digest of a teacher.
    """
    from ssl_bench.augment.views import IMAGENET_MEAN, IMAGENET_STD
    from ssl_bench.runs import weights

    method = OmegaConf.to_container(cfg.method, resolve=True) if cfg.get("method") else {}
    source, decided = cfg.pretrained, weights.with_teacher(method)
    if source is not None and Path(source).is_dir():
        decided["pretrained"] = source = str(weights.find(source))
    look = OmegaConf.to_container(cfg.augmentation, resolve=True) if cfg.get("augmentation") else {}
    if unsaid := [key for key in ("mean", "std") if key in look and look[key] is None]:
        theirs = weights.look(weights.find(source)) if source is not None else {}
        imagenet = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
        decided["augmentation"] = look | {key: theirs.get(key) or imagenet[key] for key in unsaid}
    if not decided:
        return cfg
    return build.literal(OmegaConf.to_container(cfg, resolve=True) | decided)


@told_if_full()
def _run(cfg: DictConfig) -> dict[str, float]:
    import torch

    from ssl_bench.runs import code, identity, units, weights
    from ssl_bench.runs.run import Run
    from ssl_bench.runtime import distributed, memory, precision

    console.choose(cfg.verbosity)
    world = distributed.launched() or distributed.World(0, 0, 1, 1)
    device = pick_device(cfg.device, world.local_rank)
    if device.type == "cpu":
        memory.keep_freed()
        if world.local_size > 1:
            torch.set_num_threads(max(1, default_workers() // world.local_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives allocate memory
    memory.reset_peak(device)
    precision.prepare(cfg.precision, device, tells=world.rank == 0)
    plain = OmegaConf.to_container(cfg, resolve=True)
    if distributed.launched():  # torchrun or srun chose the number, which may change the result
        plain["devices"] = world.size
    if cfg.pretrained is not None:  # a zoo name becomes its file
        plain["pretrained"] = str(weights.find(cfg.pretrained))
    tracker = partial(build.construct, cfg.tracking, directory=Path(cfg.dir or "."), config=plain)
    with distributed.process_group(device), Run(plain, device, tracker) as run:
        if run.summary is not None:
            then = identity.config(run.directory)
            split = getattr(build.locate(cfg.stage._target_, "stage"), "split", None)
            run.check_data(split and partial(split, cfg))
            late = [
                f"{key}={plain[key]}"
                for key in ("save_best", "keep")
                if key in then and then[key] != plain[key]
            ]
            if said := code.changed(identity.environment(run.directory), code.own(plain)):
                log.warning("%s since %s ran: its result is that of the old code", said, cfg.dir)
            log.info(
                "%s is finished already (%s)%s; to run it again, delete it or choose another dir=",
                cfg.dir,
                units.headline(run.summary, 60).replace("  ", ", "),
                f", too late for {' '.join(late)}" if late else "",
                extra={"result": True},
            )
            return run.summary
        try:
            metrics = build.construct(cfg.stage, cfg=cfg, run=run)
            if run.paused:
                return metrics
            run.finish(metrics)
        except torch.OutOfMemoryError as error:
            said = ". ".join(str(error).split(". ")[:3])  # without the allocator's details
            raise UserError(
                f"batch_size={cfg.batch_size} doesn't fit: {said}. Type a smaller batch_size=, "
                "precision=bf16, more devices=, or source=host, which leaves the images to the host"
            ) from None
        return run.summary


def _spawn(cfg: DictConfig) -> dict[str, float]:
    """`cfg.devices` ranks on this machine, by torch's elastic launcher."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if cfg.device.startswith("cuda:"):
        raise UserError(
            f"device={cfg.device} is one GPU, and devices={cfg.devices} need as many: "
            "type device=cuda"
        )
    device = pick_device(cfg.device, 0)  # here, so that a mistake is reported before ranks start
    if device.type == "cuda" and cfg.devices > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"devices={cfg.devices}: torch sees {gpus} GPUs here; choose at most devices={gpus}"
        )
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signals = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR2"]  # the last is Slurm's warning
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        signals.append("SIGHUP")
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cfg.devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle=",".join(signals),
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            plain = OmegaConf.to_container(cfg, resolve=True)
            with _without_main():
                ranks = elastic_launch(settings, _rank)
                results = ranks(json.dumps(plain), folder, console.Handler.aside)
        except ChildFailedError as error:
            for message in sorted(Path(folder).glob("*.json")):
                kind, said = json.loads(message.read_text(encoding="utf-8"))
                kinds = {one.__name__: one for one in (Diverged, Collapsed)}
                raise kinds.get(kind, UserError)(said) from None
            codes = [failure.exitcode for failure in error.failures.values()]
            if killed := [signal.Signals(-code).name for code in codes if code < 0]:
                raise UserError(
                    f"one of the {cfg.devices} processes was ended by {killed[0]}, often for want "
                    "of memory; the same command continues from the last state saved"
                ) from None
            signum = max(codes) - 128
            if signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
                raise Interrupted(signum) from None
            raise RuntimeError(f"a process failed: {error.format_msg()}") from None
        # the launcher has passed the signal on, and waited for the ranks to save
        except SignalException as stop:
            raise Interrupted(stop.sigval) from None
    return results[0]


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start now don't run the main program again, as multiprocessing has them do.

    It may be a script that has called `ssl_bench.train`, and each of them would call it again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _rank(config: str, folder: str, aside: bool) -> dict[str, float]:
    from ssl_bench.runtime import distributed

    signal.signal(signal.SIGUSR2, lambda *_: None)  # before and after `Run` handles it: go on
    rank = distributed.launched().rank
    set_up_logging(quiet=rank > 0)
    console.Handler.aside = aside
    try:
        return _run(build.literal(json.loads(config)))
    except Abandoned:
        raise SystemExit(2) from None  # the rank that failed reports its error
    except UserError as error:
        # By file: the launcher passes on a child's exception only as text for developers.
        told = json.dumps([type(error).__name__, str(error)])
        Path(folder, f"{rank}.json").write_text(told, encoding="utf-8")
        raise SystemExit(2) from None
    except Interrupted as stop:
        raise SystemExit(128 + stop.signum) from None


def leave_fast() -> None:
    """Have this process end without a last search for cyclic garbage.

    With torch imported, that search took 1.3 s of the 1.6 s that every command needed to exit.
    """
    atexit.register(gc.freeze)


def set_up_logging(quiet: bool = False) -> None:
    """Log to stderr (`console`). quiet: warnings only.

    A character that a terminal can't show, such as "±" in ASCII, is printed as its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = console.Handler()
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("ssl_bench")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)
