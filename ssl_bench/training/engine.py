"""The only loops: `fit` trains, `evaluate` measures."""

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.data.source import Source
from ssl_bench.errors import Interrupted
from ssl_bench.evaluate.health import collapse, health
from ssl_bench.methods.base import Method
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed, memory
from ssl_bench.runtime.precision import autocast, gradient_scaler
from ssl_bench.runtime.seeding import fold, seed_torch
from ssl_bench.training.optim import clip_, freeze_, schedule_
from ssl_bench.training.schedule import Schedule

log = logging.getLogger(__name__)


def fit(
    model: Method,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    source: Source,
    views: Callable[[Tensor, Tensor], list[Tensor]],
    run: Run,
    *,
    epochs: int,
    seed: int,
    precision: str = "fp32",
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train for `epochs`, from where the run's checkpoint stands. Returns the last line logged
    (rank 0).
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    scaler = gradient_scaler(precision, run.device, optimizer)
    state = {"model": model, "optimizer": optimizer} | (
        {"scaler": scaler} if scaler.is_enabled() else {}
    )
    per_epoch, total = source.steps_per_epoch, epochs * source.steps_per_epoch
    start = run.restore(**state)
    parallel = distributed.data_parallel(model, run.device)
    model.train()
    since, clock, waited = start, time.perf_counter(), 0.0  # of the last log line
    diverged, warned = torch.zeros((), dtype=torch.int64, device=run.device), False

    def check(done: int, saving: bool) -> None:
        # When saving not the loss alone: its gradient may have spoilt the weights, and good
        # checkpoints are few.
        saved = model.state_dict().values() if saving else ()
        finite = torch.stack([diverged == 0, *(value.isfinite().all() for value in saved)]).all()
        # it halves with each step that it skips, from 65,536
        if not finite or scaler.get_scale() < 1:
            run.diverge(int(diverged) or done)

    def batches() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        done = start
        try:
            for batch in source.stream(start, total):
                yield batch
                done = batch[0] + 1
        # while images didn't come: between two steps, of which the first is whole
        except Interrupted:
            if done > start:
                check(done, saving=True)
                run.save(done, **state)
            run.interrupt(done)

    for step, images, labels, indices in run.progress(batches(), start, total):
        epoch, done, last, at = step // per_epoch, step + 1, step + 1 == total, step / per_epoch
        # All of what varies is a function of the step: nothing of it is saved, and a restart
        # repeats it exactly.
        seed_torch(fold(seed, "step", step, distributed.rank()), run.device)
        schedule_(optimizer, schedule(at, epochs), at, epochs)
        model.begin(at, epochs)

        with torch.no_grad():
            batch = views(images, keys(seed, epoch, indices))
        with autocast(precision, run.device):
            output = parallel(batch, labels)
        embeddings = output.pop("embeddings", None)
        optimizer.zero_grad()
        scaler.scale(output["loss"]).backward()
        scaler.unscale_(optimizer)
        clip_(optimizer)
        freeze_(optimizer, at)
        scaler.step(optimizer)
        scaler.update()
        model.update(done / total)

        # The first step whose loss isn't finite, noted without waiting for the device. In float16
        # that may be one step, which the scaler skips.
        if not scaler.is_enabled():
            diverged = diverged.where((diverged > 0) | output["loss"].detach().isfinite(), done)
        stop, logging_now = run.stopping(done), run.every("log", done) or last
        saving = run.every("save", done) or last or stop
        if logging_now or saving:  # the host sync
            check(done, saving)
        line: dict[str, float] = {}
        if logging_now:
            line = {name: distributed.mean(value.detach()).item() for name, value in output.items()}
            now = time.perf_counter()
            line |= {
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": nn.utils.get_total_norm(
                    [p.grad for p in model.parameters() if p.grad is not None]
                ).item(),
                "images_per_second": (done - since) * source.batch_size / (now - clock),
                "data_wait": (source.wait_seconds - waited) / (now - clock),
                "memory_gb": memory.peak(run.device),
            }
            since, clock, waited = done, now, source.wait_seconds
            # in float16 a step may overflow
            if embeddings is not None and embeddings.isfinite().all():
                line = health(embeddings) | line  # a method may know better
                if run.is_main and at >= 1 and not warned and (told := collapse(line)):
                    log.warning("step %s: the run has collapsed: %s", f"{done:,}", told)
                    warned = True
        if evaluate and (last or (done % per_epoch == 0 and run.every("eval", done // per_epoch))):
            distributed.share_buffers(model)
            line |= evaluate()
            model.train()
        if line:
            run.log(
                done, {"epoch": done / per_epoch, "images_seen": done * source.batch_size, **line}
            )
        if saving:
            run.save(done, **state)
        if stop and not last:
            run.interrupt(done)
    return run.last_line()
