"""One stage, in as many processes as it wants."""

import io
import json
import logging
import signal
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssl_bench.config import build
from ssl_bench.data.pool import default_workers
from ssl_bench.errors import Abandoned, Interrupted, UserError
from ssl_bench.runtime.device import check_compiler, pick_device

log = logging.getLogger(__name__)


def launch(cfg: DictConfig) -> dict[str, float]:
    """Run cfg's stage: in this process, in `cfg.devices` new ones, or as one of those that torchrun
    or srun started.
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
    """cfg with all that the weights decide, which the run then says in its config.yaml: the very
    file in place of a run directory, where there may be a newer one when the next looks; a mean and
    std that are null.
    """
    from ssl_bench.augment.views import IMAGENET_MEAN, IMAGENET_STD
    from ssl_bench.runs import weights

    source, decided = cfg.pretrained, {}
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


def _run(cfg: DictConfig) -> dict[str, float]:
    import torch

    from ssl_bench.runs import units, weights
    from ssl_bench.runs.run import Run
    from ssl_bench.runtime import distributed, memory, precision

    world = distributed.launched() or distributed.World(0, 0, 1, 1)
    device = pick_device(cfg.device, world.local_rank)
    if device.type == "cpu":
        memory.keep_freed()
        if world.local_size > 1:
            torch.set_num_threads(max(1, default_workers() // world.local_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives put what they need
    memory.reset_peak(device)
    precision.prepare(cfg.precision, device)
    plain = OmegaConf.to_container(cfg, resolve=True)
    if distributed.launched():  # elsewhere than here: their number may change the result
        plain["devices"] = world.size
    if cfg.pretrained is not None:  # of a zoo name, too
        plain["pretrained"] = str(weights.find(cfg.pretrained))
    tracker = partial(build.construct, cfg.tracking, directory=Path(cfg.dir or "."), config=plain)
    with distributed.process_group(device), Run(plain, device, tracker) as run:
        if run.summary is not None:
            split = getattr(build.locate(cfg.stage._target_, "stage"), "split", None)
            run.check_data(split and partial(split, cfg))
            values = ", ".join(
                f"{key} {units.spoken(key, value)}" for key, value in run.summary.items()
            )
            log.info(
                "%s is finished already (%s); to run it again, delete it or choose another dir=",
                cfg.dir,
                values,
            )
            return run.summary
        try:
            run.finish(build.construct(cfg.stage, cfg=cfg, run=run))
        except torch.OutOfMemoryError as error:
            said = ". ".join(str(error).split(". ")[:3])  # then follow the allocator's details
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
    device = pick_device(cfg.device, 0)  # here and not in the ranks: a mistake is told sooner
    if device.type == "cuda" and cfg.devices > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"devices={cfg.devices}: torch sees {gpus} GPUs here; choose at most devices={gpus}"
        )
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signals = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR2"]  # the last is Slurm's warning
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
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
            results = elastic_launch(settings, _rank)(json.dumps(plain), folder)
        except ChildFailedError as error:
            for message in sorted(Path(folder).glob("*.json")):
                raise UserError(json.loads(message.read_text(encoding="utf-8"))) from None
            status = max(failure.exitcode for failure in error.failures.values())
            if killed := [
                -failure.exitcode for failure in error.failures.values() if failure.exitcode < 0
            ]:
                raise UserError(
                    f"one of the {cfg.devices} processes was ended by "
                    f"{signal.Signals(killed[0]).name}, often for want of memory; the same command "
                    "continues from the last state saved"
                ) from None
            if status - 128 in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
                raise Interrupted(status - 128) from None
            raise RuntimeError(f"a process failed: {error.format_msg()}") from None
        # it has passed the signal on, and waited for the ranks to save
        except SignalException as stop:
            raise Interrupted(stop.sigval) from None
    return results[0]


def _rank(config: str, folder: str) -> dict[str, float]:
    from ssl_bench.runtime import distributed

    signal.signal(signal.SIGUSR2, lambda *_: None)  # outside of a run it must not end this process
    rank = distributed.launched().rank
    set_up_logging(quiet=rank > 0)
    try:
        return _run(build.literal(json.loads(config)))
    except Abandoned:
        raise SystemExit(2) from None  # the other one is told of
    except UserError as error:
        # Told by file: of a child's exception the launcher passes on only text meant for
        # developers.
        Path(folder, f"{rank}.json").write_text(json.dumps(str(error)), encoding="utf-8")
        raise SystemExit(2) from None
    except Interrupted as stop:
        raise SystemExit(128 + stop.signum) from None


def set_up_logging(quiet: bool = False) -> None:
    """Log lines of ours to stderr, above a progress bar where there is one. quiet: warnings only.

    A terminal that lacks a character, as "±" in ASCII, is shown its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = _Console()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("ssl_bench")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)


class _Console(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=self.stream)
