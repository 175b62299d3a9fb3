"""A run: its directory, device, metrics, tracker and checkpoint, opened and closed in one place."""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml

from ssl_bench import __version__, files
from ssl_bench.config.build import construct
from ssl_bench.console import Bar, duration
from ssl_bench.data.store import Split
from ssl_bench.errors import Abandoned, Collapsed, Diverged, Interrupted, UserError, stop, writable
from ssl_bench.runs import code, identity, layout, metrics, units, watch
from ssl_bench.runs.checkpoint import Checkpoint, carry_over, complete, name_of, step_of
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.tracking import Tracker
from ssl_bench.runtime import distributed
from ssl_bench.shell import override

log = logging.getLogger(__name__)

CONSOLE = 108  # characters of a line of a step, beside the time of day
SILENT = 60  # seconds of slow steps between two lines of a log
STALLED = 10  # seconds that the last step before a stop may wait for its images


class Run:
    """What a stage runs in. A stage whose `dir` is null leaves nothing behind.

    config: the resolved configuration as plain data. make_tracker: called on rank 0, after the
    directory was checked.
    """

    def __init__(
        self, config: dict, device: torch.device, make_tracker: Callable[[], Tracker]
    ) -> None:
        self.leaves = config["dir"] is not None  # does it leave anything behind?
        self._directory = Path(config["dir"] or ".")
        self.device = device
        self.is_main = distributed.rank() == 0
        self.step = 0  # the newest that is done
        self.summary: dict | None = None  # the final metrics, of an earlier command too
        self.paused = False  # did it stop where `until` says, with more to do?
        self._config = config
        self._make_tracker = make_tracker
        self.status = "failed"  # until the stage has ended well
        self._last: dict[str, float] = {}  # the values that were logged last
        self._told = 0  # the epoch of the last row on a terminal
        self.to_come: Collection[str] = ()  # metrics that have a column before they are measured
        self._mistaken = False  # was it ended by a UserError?
        self._signum = 0  # the last signal that asked for a stop
        self._at_once = False  # would nothing be lost by stopping now?
        # the learning rate at which the run ended that this one has just gone on from
        self.rate_before: float | None = None

    @property
    def directory(self) -> Path:
        """Everything that it writes is in there. AssertionError for a run that leaves nothing."""
        assert self.leaves, "a stage with dir: null writes nothing"
        return self._directory

    # -- opening and closing -----------------------------------------------------------------------

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            if self.leaves:
                self._open(self.directory, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            # for log.txt; `command.main` prints it to the console
            log.debug("%s", error or kind.__name__)
            self.status = "preempted" if kind is Interrupted else "failed"
            self._mistaken = kind is UserError
        self._stack.close()
        if kind is None and self._signum:  # it came too late to stop this run
            outer = signal.getsignal(self._signum)
            ours = outer is stop or isinstance(getattr(outer, "__self__", None), Run)
            if ours and callable(outer):
                outer(self._signum, None)

    def _open(self, directory: Path, stack: ExitStack) -> None:
        if self.is_main:
            fresh = [path for path in (directory, *directory.parents) if not path.exists()]
            stack.enter_context(self._claim(directory))  # a killed process loses the lock
            if fresh:
                stack.callback(self._discard, *fresh)
        distributed.barrier()
        what = identity.Identity(self._config, weights=identity.recorded(directory))
        self.checkpoint = Checkpoint(directory, what.key, self._config.get("keep", 2))
        self.summary = metrics.summary(directory)
        if self.summary is not None:
            if self.is_main:
                self.checkpoint.settle()  # a kill may have come before it
            return
        if self.is_main:
            self._write_environment(directory)
            stack.enter_context(_log_to(directory / "log.txt"))
            self.metrics = MetricsFile(directory / layout.METRICS)
            stack.callback(self.metrics.close)
        if threading.current_thread() is threading.main_thread():
            watched = [signal.SIGTERM, signal.SIGINT]
            # the terminal was closed; nohup ignores that
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                watched.append(signal.SIGHUP)
            # Slurm's warning, if somebody handles it once the state is saved
            if callable(signal.getsignal(signal.SIGUSR2)):
                watched.append(signal.SIGUSR2)
            for signum in watched:
                stack.callback(signal.signal, signum, signal.signal(signum, self._on_signal))
            stack.callback(signal.alarm, 0)

    @cached_property
    def tracker(self) -> Tracker:
        """The tracker, made when first used: a stage that only starts others has none."""
        tracker = self._make_tracker()
        self._stack.callback(lambda: tracker.close(self.status, self.summary or {}))
        return tracker

    def finish(self, summary: dict) -> None:
        """Write down what the stage has returned: the run's result, which marks it as finished."""
        self.summary, self.status = summary, "finished"
        if self.leaves and self.is_main:
            text = json.dumps(summary, indent=2) + "\n"
            folders = (f"{layout.CHECKPOINTS}/", f"{layout.BEST}/")
            own = [name for name in layout.own(self.directory) if not name.startswith(folders)]
            sums = files.sums_of(self.directory, own)
            for path, made in self.checkpoint.final().items():
                sums[path.relative_to(self.directory).as_posix()] = files.digest(made)
            sums[layout.SUMMARY] = hashlib.sha256(text.encode()).hexdigest()
            files.seal(self.directory, sums)  # first: a run with a summary counts as finished
            files.write(self.directory / layout.SUMMARY, text)
            self.checkpoint.settle()
            if "tracker" in vars(self) and (states := layout.states(self.directory)):
                self.tracker.log_checkpoint_file(states[0])
            self._tell_best()
            log.info("finished: %s", self.directory, extra={"result": True})

    def _tell_best(self) -> None:
        if (what := watch.watched(self._config)) is None:
            return
        if top := watch.best(self._config, MetricsFile.read(self.metrics.path)):
            value = units.spoken(what.metric, top.value)
            log.info(
                "the best %s, %s, was at step %s: %s",
                *(what.metric, value, f"{top.step:,}", self.directory / layout.BEST),
                extra={"result": True},
            )

    def pause(self, step: int, total: int) -> None:
        """Note that the run stops at `until`, before its end; the state is saved."""
        self.paused, self.status = True, "preempted"
        if self.is_main:
            log.info(
                "paused after step %s of %s, as until=%s says; the same command with a later "
                "until=, or without, goes on",
                *(f"{step:,}", f"{total:,}", self._config["until"]),
                extra={"result": True},
            )

    def _claim(self, directory: Path) -> filelock.AcquireReturnProxy:
        """Prepare the directory and return its lock, which this process holds from now on.

        UserError for a directory that is in use, can't be written, or holds another run.
        """
        with writable("dir", directory):
            directory.mkdir(parents=True, exist_ok=True)
            held = self._acquire(directory)
            self._check_same(directory)
            # these files may be those of another configuration, of which nothing was saved
            if not layout.has_state(directory):
                for name in (layout.WEIGHTS, identity.ORIGIN, layout.INPUTS):
                    (directory / name).unlink(missing_ok=True)
            if not (directory / layout.SUMMARY).exists():  # the files of a finished run stay
                (directory / files.SUMS).unlink(missing_ok=True)
                self._write_config(directory, self._config)
                if self._config.get("pretrained"):
                    files.write(directory / layout.WEIGHTS, self._weights)
                    identity.remember(Path(self._config["pretrained"]), directory)
        return held

    def _acquire(self, directory: Path) -> filelock.AcquireReturnProxy:
        lock = filelock.FileLock(directory / ".lock", timeout=60)
        try:
            return lock.acquire(timeout=0)
        except filelock.Timeout:
            self._check_same(directory)  # another configuration is refused without waiting
            log.info("%s is in use by another process: waiting for a minute", directory)
        try:
            return lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"dir={directory} is in use by another process: wait, or choose another dir="
            ) from None

    def _write_environment(self, directory: Path) -> None:
        """And, where the code isn't that of its commit, how it differs from it, beside that."""
        now = environment()
        if own := code.own(self._config):
            told = json.dumps([now["code"], own]).encode()
            now |= {"own_code": own, "code": hashlib.sha256(told).hexdigest()[:16]}
        then = identity.environment(directory) if layout.has_state(directory) else {}
        if said := code.changed(then, own):
            log.warning("%s since this run began: it goes on with the new code", said)
        now["earlier_code"] = [one for one in code.of(then) if one != now["code"]]
        files.write(directory / layout.ENVIRONMENT, json.dumps(now, indent=2) + "\n")
        if now["git_dirty"] and (patch := code.changes()):
            files.write(directory / layout.PATCH.format(now["code"][:8]), patch)

    def _write_config(self, directory: Path, config: Mapping[str, Any]) -> None:
        files.write(directory / layout.CONFIG, yaml.safe_dump(dict(config), sort_keys=False))

    def _check_same(self, directory: Path) -> None:
        """UserError if the directory holds another run: other settings or other weights below it.

        The weights are compared by their content: another training may have written to their path.
        """
        known = directory / layout.CONFIG
        if not known.exists() or not layout.has_state(directory):
            return
        before = identity.left_by(files.parse(known, yaml.safe_load), directory)
        now = identity.Identity(self._config, weights=self._weights)
        if shown := identity.changes(before, now):
            raise UserError(
                f"dir={directory} holds a run with another configuration: {shown}. "
                f"{self._instead(directory, shown)}"
            )

    def _instead(self, directory: Path, shown: str) -> str:
        """What to type for a configuration that isn't that of the directory."""
        more = re.fullmatch(r"epochs was (\d+), is (\d+)", shown)
        if not more or int(more[2]) < int(more[1]) or self._config["stage"]["name"] != "pretrain":
            return "Choose another dir=, or delete it"
        goes_on = f"{override('continue_from', directory)} epochs={more[2]}"
        return f"To train it further, type {goes_on} without dir=; else choose another dir="

    @cached_property
    def _weights(self) -> str:
        """The sha256 of the weights that the run starts from; "": it starts from none."""
        source = self._config.get("pretrained")
        return files.digest(Path(source)) if source else ""

    def _discard(self, directory: Path, *above: Path) -> None:
        """Delete the directory of a run that a UserError ended before its first step.

        Reports would stumble over it. above: the folders that were made for it.
        """
        if not self._mistaken or self.metrics.path.stat().st_size:
            return
        if not any(path.is_dir() for path in directory.iterdir()):
            shutil.rmtree(directory)
            with suppress(OSError):  # another run has come to lie there
                for folder in above:
                    folder.rmdir()

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        first_warning = signum == signal.SIGUSR2 and not self._signum
        if first_warning and callable(signal.getsignal(signal.SIGALRM)):
            # seconds until it is too late to finish a step
            signal.alarm(int(os.environ.get("SSL_BENCH_GRACE", 0)))
        self._signum = signum
        if self._at_once:
            self.interrupt()
        again = " (Ctrl-C again: now)" if signum == signal.SIGINT else ""
        log.info("%s: stopping after this step%s", signal.Signals(signum).name, again)

    # -- while it runs -----------------------------------------------------------------------------

    def every(self, what: str, step: int, most: int | None = None) -> bool:
        """Is it time to `what`: "log" or "save" after this step, or "eval" after this epoch?

        most: the longest interval, whatever the configuration says.
        """
        interval = self._config[f"{what}_every"]
        return bool(interval) and step % min(interval, most or interval) == 0

    @property
    def signalled(self) -> bool:
        """Did a signal arrive on this rank? For work in which the ranks don't meet."""
        return self._signum != 0

    def stopping(self, step: int) -> bool:
        """Did a signal arrive, on any rank? Several ranks ask each other every few steps."""
        if distributed.world_size() == 1 or step % 10 == 0:
            return distributed.any_rank(self.signalled)
        return False

    def restore(self, **state: object) -> int:
        """Load the newest checkpoint and return its step; 0: there is none.

        Lines that were logged after it are dropped, since they will be logged again.
        """
        step = self.checkpoint.restore(**state)
        if self.is_main:
            self.metrics.truncate(step)
            if step:
                log.info("continuing after step %s", f"{step:,}")
            self._mend_best(step)
        return step

    def _mend_best(self, step: int) -> None:
        """The best state again as the lines have it, where a kill came between the two.

        step: the one restored; later ones will be done again.
        """
        for path in layout.best(self.directory):
            if step_of(path) > step:
                path.unlink()
        if not self.watches:  # the lines of a long run take a while to read
            return
        top = watch.best(self._config, MetricsFile.read(self.metrics.path))
        if top and top.step == step and not (self.directory / layout.BEST / name_of(step)).exists():
            self.checkpoint.keep_as_best(step)

    def carry_over(self, per_epoch: int, **state: Any) -> int:
        """Begin with the state of the run that `continue_from` names; returns the step, or 0.

        It is the step of that run or, if the epochs have other numbers of steps, the one in the
        same epoch. per_epoch: steps. 0: there is no such run.
        """
        if (source := self._config.get("continue_from")) is None:
            return 0
        file = Path(self._config["pretrained"])
        before = layout.run_of(file)
        assert before, "the command has looked for it (launch.continuing)"
        theirs = identity.node(identity.config(before), "optimizer").get("_target_")
        ours = identity.node(self._config, "optimizer").get("_target_")
        if theirs != ours:
            log.info("another optimizer than that of %s: its state begins anew", source)
        taken = {key: part for key, part in state.items() if key != "optimizer" or theirs == ours}
        step = carry_over(file, f"continue_from={source}", **taken)
        if (steps := metrics.per_epoch(before)) and steps != per_epoch:
            step = round(step * per_epoch / steps)
        if self.is_main:
            logged = before / layout.METRICS
            lines = MetricsFile.read(logged) if logged.is_file() else []
            reached = layout.step_of(file)
            rates = [line["lr"] for line in lines if "lr" in line and line["step"] <= reached]
            self.rate_before = rates[-1] if rates else None
            seen = {"epoch": step / per_epoch, "images_seen": step * self._config["batch_size"]}
            self.metrics.log(step, seen)
            self.tracker.log(step, seen)
            log.info("going on from %s after step %s, epoch %g", file, f"{step:,}", seen["epoch"])
        return step

    def save(self, step: int, **state: object) -> None:
        if self.is_main:
            self.checkpoint.save(step, **state)

    @property
    def watches(self) -> bool:
        """Does a metric decide which state is the best (`save_best`, `patience`)?"""
        return watch.watched(self._config) is not None

    def keep_best(self, step: int) -> bool:
        """After an evaluation whose state was saved: keep it if it is the best so far.

        Returns whether `patience` ends the run, the same on all ranks. UserError where nothing
        measures the metric.
        """
        ends = False
        if self.is_main and (what := watch.watched(self._config)):
            lines = MetricsFile.read(self.metrics.path)
            if what.metric not in lines[-1]:
                raise UserError(
                    f"nothing measures {what.metric}: type save_best= with one of "
                    f"{', '.join(sorted(lines[-1].keys() - {'step', 'epoch', 'images_seen'}))}"
                )
            top = watch.best(self._config, lines)
            if top and top.step == step:
                self.checkpoint.keep_as_best(step)
            why = watch.exhausted(self._config, lines)
            if why and lines[-1]["epoch"] < self._config["epochs"]:  # else it ends anyway
                log.info("step %s: ends early: %s", f"{step:,}", why, extra={"result": True})
                ends = True
        return distributed.any_rank(ends)

    def end_of(self, per_epoch: int, epochs: int) -> int:
        """The step to stop at: the last, or that of the epoch `until`. per_epoch: steps."""
        until = self._config.get("until")
        return per_epoch * (epochs if until is None else min(until, epochs))

    @contextmanager
    def ends_at_once(self) -> Iterator[None]:
        """For long work before the first step: a signal stops it at once."""
        self._at_once = True
        try:
            if self._signum:
                self.interrupt()
            yield
        finally:
            self._at_once = False

    def waiting(self, seconds: float) -> None:
        """Stop, after a signal, if images haven't come for STALLED seconds.

        Each rank decides alone, since those that wait for it in a collective can't be asked. Rank 0
        saves if it is among those without images. Otherwise it ends with the group, and the steps
        since its last save are repeated.
        """
        if self._signum and seconds > STALLED:
            self.interrupt()

    def interrupt(self, step: int | None = None) -> None:
        raise Interrupted(self._signum or signal.SIGTERM, step)

    def diverge(self, step: int) -> None:
        """Stop a run whose loss or weights are not finite since this step. Diverged."""
        kept = "no state was saved yet"
        if good := complete(self.directory):
            kept = f"the last good state, of step {step_of(good[0]):,}, is kept"
        raise Diverged(
            f"diverged at step {step:,}: loss or weights are not finite; {kept}; "
            "try a lower optimizer.base_lr, a longer schedule.warmup_epochs, or precision=fp32"
        )

    def collapse(self, step: int, why: str) -> None:
        """Stop a run whose embeddings have collapsed, as `on_collapse=stop` asks. Collapsed.

        why: in words; "" on ranks that don't know it.
        """
        if not why:
            raise Abandoned("the run has collapsed, and another of its processes says how")
        raise Collapsed(
            f"stopped at step {step:,}, whose state is saved: the run {why} "
            "(on_collapse=stop; the same command with on_collapse=warn goes on)"
        )

    def log(self, step: int, line: dict[str, float]) -> None:
        if self.is_main:
            self.metrics.log(step, line)
            self.tracker.log(step, line)
            values = "  ".join(f"{key} {units.spoken(key, value)}" for key, value in line.items())
            # the bar counts this step when the next one is asked for
            total, left = int(self._bar.total or 0), self._bar.left_after(step)
            whole = f"step {step:,}/{total:,}  {values}  left {left}"
            brief = self._brief(step, total, line, left)
            extra = {"brief": brief, "cells": self._cells(step, line), "result": total == 1}
            log.info("%s", whole, extra=extra)

    def _brief(self, step: int, total: int, line: dict[str, float], left: str) -> str:
        """The line of a step for a console, as wide as it or CONSOLE; log.txt has all of it."""
        room = min(CONSOLE, shutil.get_terminal_size((120, 24)).columns - 12)
        if total == 1:  # the result of a stage that doesn't train
            begin, end = "result:", ""
        else:
            begin, end = f"step {step:,}/{total:,}  epoch {line['epoch']:.4g}", f"left {left}"
        if step == total and total > 1:
            end = f"took {duration(time.monotonic() - self._bar.began)}"
        shown = {key: value for key, value in line.items() if key not in ("epoch", "images_seen")}
        return "  ".join(
            filter(None, [begin, units.headline(shown, room - len(begin) - len(end)), end])
        )

    def _cells(self, step: int, line: dict[str, float]) -> dict[str, str] | None:
        """A row for a terminal, once an epoch and for each evaluation; {}: below the bar alone.

        None for the result of a stage that doesn't train.
        """
        if self._bar.total == 1:
            return None
        told = units.cells(line)
        self._bar.say(
            "  ".join(
                f"{head} {told[head]}{_trend(self._last.get(key), line[key])}"
                for key, head in ((key, units.unit(key).name) for key in units.ROW)
                if key in line
            )
        )
        self._last |= line
        epoch, evaluated = int(line["epoch"]), any(key.endswith("top1") for key in line)
        if not (evaluated or epoch > self._told or step == self._bar.total):
            return {}
        self._told = epoch
        columns = [key for key in units.ROW if key in self._last or key in self.to_come]
        begin = {"step": f"{step:,}", "epoch": f"{line['epoch']:.4g}"}
        return begin | {units.unit(key).name: told.get(units.unit(key).name, "") for key in columns}

    def log_image(self, step: int, name: str, path: Path) -> None:
        if self.is_main:
            self.tracker.log_image(step, name, path)

    def uses(self, split: str, now: Mapping[str, Any]) -> None:
        """Write down the images of a split (`Split.facts`). UserError if it began with others."""
        if self.is_main and self.leaves:
            known = identity.inputs(self.directory)
            same = identity.same_images(known.get(split, {}), now)
            if layout.has_state(self.directory) and not same:
                raise UserError(
                    f"dir={self.directory} holds a run of other images: its split '{split}' had "
                    f"{known[split]['images']:,}, the {now['images']:,} now are not the same. "
                    "Choose another dir=, or delete it"
                )
            if split not in known or not same:
                text = json.dumps(known | {split: now}, indent=2) + "\n"
                files.write(self.directory / layout.INPUTS, text)

    def check_data(self, split: Callable[[str], Split] | None = None) -> None:
        """UserError unless the images of a finished run are those that it would use now.

        split: gives the images of a split by its name. None: that of `data`, whose images are
        compared only where `data.root` isn't the one that the run had.
        """
        if not self.is_main or not (known := identity.inputs(self.directory)):
            return
        then = files.parse(self.directory / layout.CONFIG, yaml.safe_load)
        now = self._config["data"]
        if split is None and then["data"].get("root") == now.get("root"):
            return
        split = split or construct(now).split
        for name in known:
            self.uses(name, split(name).facts())
        sums = files.listed(self.directory)
        (self.directory / files.SUMS).unlink(missing_ok=True)  # it has the former config.yaml's
        late = {key: then[key] for key in ("save_best", "keep") if key in then}
        self._write_config(self.directory, self._config | late)
        if sums:
            files.seal(self.directory, sums | files.sums_of(self.directory, [layout.CONFIG]))

    def last_line(self) -> dict[str, float]:
        """The newest log line, on rank 0."""
        lines = MetricsFile.read(self.metrics.path) if self.is_main else []
        return {key: value for key, value in lines[-1].items() if key != "step"} if lines else {}

    def progress(self, steps: Iterable, start: int, total: int) -> Iterator:
        """`steps`, with a progress bar on a terminal; elsewhere slow steps aren't silent."""
        title, shown = str(self._config["stage"]["name"]), self.is_main and total > 1
        self._bar = Bar(total, title, unit="steps", begun=start, shown=shown, silence=SILENT)
        self._last, self._told = {}, 0
        self._stack.enter_context(self._bar)  # an exception leaves the loop, not the generator
        return self._bar.follow(steps)


def _trend(before: float | None, now: float) -> str:
    """Where a value has gone since it was told last, by more than its fifth digit."""
    if before is None or abs(now - before) <= 1e-4 * abs(before):
        return ""
    stream = sys.__stderr__  # sys.stderr is what a live bar has put in its place
    shown = stream is not None and "utf" in stream.encoding.lower()
    arrows = ("↓", "↑") if shown else ("-", "+")
    return arrows[now > before]


def environment() -> dict:
    """What a result depends on besides its configuration: versions, commit, machine."""
    names = "torch torchvision hydra-core omegaconf numpy pydantic wandb pillow"
    packages = {name: metadata.version(name) for name in names.split()}
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {"ssl_bench": __version__} | packages,
        "code": code.digest(),
        **code.commit(),
        "world_size": distributed.world_size(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk, where logging would print a traceback for each record.

        Files that must be written report it, in one line.
        """
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("ssl_bench").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("ssl_bench").removeHandler(handler)
        with suppress(OSError):
            handler.close()
