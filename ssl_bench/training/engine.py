"""`fit`: the loop that every training goes through."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.data.source import Source
from ssl_bench.errors import Interrupted, UserError
from ssl_bench.evaluate.health import MOVING, WATCHED, WATCHES, Following, Watch, health, variety
from ssl_bench.methods.base import Method, Output
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed, floor, memory
from ssl_bench.runtime.precision import autocast, gradient_scaler
from ssl_bench.runtime.seeding import fold, seed_torch
from ssl_bench.training.accumulation import EMBEDDINGS, joined, parts
from ssl_bench.training.average import Average
from ssl_bench.training.optim import clip_, freeze_, schedule_
from ssl_bench.training.schedule import Schedule

log = logging.getLogger(__name__)

LINES = 10  # of the log of a training, at least, or one for each of fewer epochs
COUNTED = 500  # steps: for a shorter training the operations of one aren't worth a second's count


def fit(
    model: Method,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    source: Source,
    views: Callable[[Tensor | list[Tensor], Tensor], list[Tensor]],
    run: Run,
    *,
    epochs: int,
    seed: int,
    precision: str = "fp32",
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    average: Average | None = None,
    accumulate: int = 1,
    compress: str | None = None,
    on_collapse: Literal["warn", "stop"] = "warn",
) -> dict[str, float]:
    """Train up to `epochs` from the run's checkpoint on. Returns the last line logged (rank 0).

    It ends before where the run says so: at its `until`, to go on later, or for want of progress
    (`patience`). evaluate: given the model, or the network of the average if there is one.
    accumulate: in how many parts the model sees a batch. compress: see `distributed.data_parallel`.
    on_collapse: of the embeddings that a method gives (`health.Watch`); to stop is to save and to
    raise UserError.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    scaler = gradient_scaler(precision, run.device, optimizer)
    state = {"model": model, "optimizer": optimizer}
    if scaler.is_enabled():
        state["scaler"] = scaler
    if average is not None:
        state["ema"] = average
    per_epoch = source.steps_per_epoch
    total, end = epochs * per_epoch, run.end_of(per_epoch, epochs)
    rarest = per_epoch * max(1, epochs // LINES)  # steps between two lines of the log, at most
    start = run.restore(**state) or run.carry_over(per_epoch, **state)
    if run.rate_before is not None:
        peak = max(group["initial_lr"] for group in optimizer.param_groups)
        now, at_end = (peak * schedule(at, epochs) for at in (start / per_epoch, epochs))
        log.info(
            "learning rate: was %.4g at epoch %g, goes on at %.4g there, ends at %.4g at epoch %s",
            *(run.rate_before, start / per_epoch, now, at_end, epochs),
        )
    parallel = distributed.data_parallel(model, run.device, compress)
    model.train()
    if accumulate > 1:
        model.in_parts(accumulate)
    if start == 0:  # again, if the run is stopped before its first state is saved
        with autocast(precision, run.device):
            model.prepare(first_epoch(source, views, run, seed))
    meter = Meter(model, optimizer, source, run, start, total)
    # the first step whose loss wasn't finite; 0 while there is none
    diverged = torch.zeros((), dtype=torch.int64, device=run.device)

    def check(done: int, saving: bool) -> None:
        """End the run if it has diverged. Waits for the device."""
        # Good checkpoints are few, and a gradient may have spoilt the weights while the loss was
        # finite: before saving, look at the weights too.
        saved = model.state_dict().values() if saving else ()
        finite = torch.stack([diverged == 0, *(value.isfinite().all() for value in saved)]).all()
        # The scale starts at 65,536 and halves with each step that the scaler skips.
        if not finite or scaler.get_scale() < 1:
            run.diverge(int(diverged) or done)

    def batches() -> Iterator[tuple[int, Tensor | list[Tensor], Tensor, Tensor]]:
        done = start
        try:
            for batch in source.stream(start, end):
                yield batch
                done = batch[0] + 1
        except Interrupted:  # while waiting for images: the last step is whole, the next not begun
            if done > start:
                check(done, saving=True)
                run.save(done, **state)
            run.interrupt(done)

    for step, images, labels, indices in run.progress(batches(), start, total):
        done = step + 1
        last = done == end
        epoch = step // per_epoch
        at = step / per_epoch  # epochs, with their fraction

        # Whatever changes from step to step is a function of the step: none of it is saved, and a
        # restart repeats it exactly.
        seed_torch(fold(seed, "step", step, distributed.rank()), run.device)
        schedule_(optimizer, schedule(at, epochs), at, epochs)
        model.begin(at, epochs)

        with torch.no_grad():
            image_keys = keys(seed, epoch, indices)
            batch = views(images, image_keys)
            drawn = model.draw(image_keys, indices)
            if accumulate > 1:
                with autocast(precision, run.device):
                    drawn = (*drawn, *model.ahead(batch))

        optimizer.zero_grad()
        outputs: list[Output] = []
        for part in parts(batch, labels, drawn, accumulate):
            # gradients travel between processes with the last part
            with distributed.apart(parallel, len(outputs) + 1 < accumulate):
                with autocast(precision, run.device):
                    outputs.append(_with_loss(parallel(*part), model))
                scaler.scale(outputs[-1]["loss"] / accumulate).backward()
        output = joined(outputs)
        embeddings = output.pop(EMBEDDINGS, None)

        scaler.unscale_(optimizer)
        clip_(optimizer)
        freeze_(optimizer, at)
        scaler.step(optimizer)
        scaler.update()
        model.update(done / total)
        run.step = done
        if average is not None:
            average.update()

        # Noted on the device, without waiting for it. In float16 a single step may overflow, which
        # the scaler skips.
        if not scaler.is_enabled():
            diverged = diverged.where((diverged > 0) | output["loss"].detach().isfinite(), done)

        stop = run.stopping(done)
        evaluating = last or (done % per_epoch == 0 and run.every("eval", done // per_epoch))
        judging = evaluating and run.watches
        logging_now = run.every("log", done, rarest) or last or judging
        saving = run.every("save", done) or last or stop or judging
        if logging_now or saving:
            check(done, saving)

        line: dict[str, float] = {}
        # at the first step, too: a collapse is told by what was there before
        looked = logging_now or done % WATCHED == 0 or done == start + 1
        if logging_now:
            line = meter.measure(done, at, output, embeddings)
            line |= meter.mfu(line["images_per_second"], precision, part, accumulate)
        elif looked:
            meter.watch(done, at, output, embeddings)
        asked = on_collapse == "stop" and looked and not last
        collapsed = asked and distributed.any_rank(bool(meter.collapsed))
        if evaluate and evaluating:
            network = model if average is None else average.network
            distributed.share_buffers(network)
            line |= evaluate(network)
            model.train()
        if line:
            progress = {"epoch": done / per_epoch, "images_seen": done * source.batch_size}
            run.log(done, progress | line)
        if collapsed and not saving:
            check(done, saving=True)
        if saving or collapsed:
            run.save(done, **state)
        if collapsed:
            run.collapse(done, meter.collapsed)
        if judging and run.keep_best(done):
            break
        if stop and not last:
            run.interrupt(done)
    else:
        if end < total:
            run.pause(max(start, end), total)
    return run.last_line()


def first_epoch(
    source: Source,
    views: Callable[[Tensor | list[Tensor], Tensor], list[Tensor]],
    run: Run,
    seed: int,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The views and the indices of each batch of epoch 0, for `Method.prepare`."""
    steps = source.steps_per_epoch
    log.info("before the first step all images are looked at once, in %s batches", f"{steps:,}")
    for step, images, _, indices in source.stream(0, steps):
        seed_torch(fold(seed, "prepare", step, distributed.rank()), run.device)
        with torch.no_grad():
            shown = views(images, keys(seed, 0, indices))
        yield shown, indices
        if run.stopping(step):
            run.interrupt()


def _with_loss(output: Any, model: Method) -> Output:
    """UserError for what a method of the user's own returns without a loss."""
    if not isinstance(output, dict) or not isinstance(output.get("loss"), Tensor):
        given = (
            f"the keys {', '.join(output)}" if isinstance(output, dict) else type(output).__name__
        )
        raise UserError(
            f"{type(model).__name__}.forward returns {given}: it must return a dictionary with the "
            "tensor 'loss'"
        )
    return output


class Meter:
    """Measures what a log line says of the training; its speeds are since the line before."""

    def __init__(
        self,
        model: Method,
        optimizer: torch.optim.Optimizer,
        source: Source,
        run: Run,
        start: int,
        total: int,
    ) -> None:
        self.model, self.optimizer, self.source, self.run = model, optimizer, source, run
        # at the line before
        self.step, self.clock, self.waited = start, time.perf_counter(), source.wait_seconds
        self.watching = Watch(loses=model.split == "train")
        for line in MetricsFile.read(run.metrics.path) if run.is_main else ():
            self.watching.see(line)  # before it was stopped
        self.warned: set[str] = set()
        self.collapsed = ""  # how, by what this process has seen
        self.following = Following(model)
        # A teacher has moved by then; at the end of training it may stand still.
        self.follows_at: tuple[float, float] | None
        self.follows_at = (start + min(source.steps_per_epoch, MOVING), 0.9 * total)
        self.start = start
        # of a step; None: not counted (yet)
        self.flops: int | None = None
        self.counting = model.split == "pretrain" and total - start >= COUNTED

    def measure(
        self, step: int, epoch: float, output: dict[str, Tensor], embeddings: Tensor | None
    ) -> dict[str, float]:
        """The line after `step` steps. output: this step's scalars; embeddings: (V, N, D)."""
        # averaged over the processes, which waits for the device: before the clock is read
        line = {name: distributed.mean(value.detach()).item() for name, value in output.items()}
        now = time.perf_counter()
        seconds = now - self.clock
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        line |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": nn.utils.get_total_norm(gradients).item(),
            "images_per_second": (step - self.step) * self.source.batch_size / seconds,
            "data_wait": (self.source.wait_seconds - self.waited) / seconds,
            "memory_gb": memory.peak(self.run.device),
        }
        self.step, self.clock, self.waited = step, now, self.source.wait_seconds
        self._check_teacher(step)
        if embeddings is None or not embeddings.isfinite().all():  # a step in float16 may overflow
            return line
        line = health(embeddings) | line  # a method may know better
        self._tell(step, epoch, line)
        return line

    def mfu(
        self, images_per_second: float, precision: str, arguments: tuple, parts: int
    ) -> dict[str, float]:
        """Model FLOPs utilization: the operations of a step at this rate, over those of a product.

        arguments: what the model was given in one of the `parts` of a batch. {} where they can't be
        counted, as with several processes, which wait for each other.
        """
        if not self.counting or distributed.world_size() > 1:
            return {}
        began = time.perf_counter()
        if self.flops is None:
            counted = floor.step_flops(self.model, arguments)
            self.counting, self.flops = counted is not None, counted
        rate = floor.matmul_rate(self.run.device, precision)
        self.clock += time.perf_counter() - began  # which isn't the training's
        if self.flops is None or rate is None:
            return {}
        return {"mfu": self.flops * parts * images_per_second / self.source.batch_size / rate}

    def watch(
        self, step: int, epoch: float, output: dict[str, Tensor], embeddings: Tensor | None
    ) -> None:
        """Look for a collapse after `step` steps of which no line is made. As for `measure`."""
        self._check_teacher(step)
        if embeddings is not None and self.run.is_main and embeddings.isfinite().all():
            own = {key: value.item() for key, value in output.items() if key in WATCHES}
            self._tell(step, epoch, variety(embeddings) | own)  # a method may know better

    def _tell(self, step: int, epoch: float, line: dict[str, float]) -> None:
        """Warn, once of each kind, of embeddings that collapse."""
        if not self.run.is_main:
            return
        for what, told in self.watching(line, epoch).items():
            why = self.watching.cause(line, self.following)
            self.collapsed = f"{what}: {told}; {why}" if why else f"{what}: {told}"
            if what not in self.warned:
                log.warning("step %s: the run %s", f"{step:,}", self.collapsed)
                self.warned.add(what)

    def _check_teacher(self, step: int) -> None:
        """Warn, once, of a momentum teacher that no step has moved."""
        if self.follows_at is None or step < self.follows_at[0]:
            return
        _, last = self.follows_at
        if step <= last and self.following.stand_still() and self.run.is_main:
            log.warning(
                "step %s: the momentum teacher stands still: no weight of it has moved since step "
                "%s, and the student's have: its targets are those of a network that learns nothing"
                " (is method.momentum less than 1?)",
                f"{step:,}",
                f"{self.start:,}",
            )
        self.follows_at = None
