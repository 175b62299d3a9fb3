"""Linear classification of cached features, for `lincls`.

A grid of classifiers is trained, and one of them chosen without the val split.
"""

import csv
import logging
import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import EvalView, Views
from ssl_bench.data.source import FeatureSource, Source
from ssl_bench.data.store import size
from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import extract_all
from ssl_bench.evaluate.passes import evaluate
from ssl_bench.methods.probe import IGNORED, LinearGrid
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.shell import listed
from ssl_bench.stages._training import check_optimizer, train
from ssl_bench.training.optim import scaled_lr

log = logging.getLogger(__name__)

RECIPE = {"base_lr": 30.0, "weight_decay": 0.0}  # the values of conf/optimizer/lincls.yaml
CHUNK = 256  # held-out images scored at once


class GridOptions(NamedTuple):
    """The options that stage=lincls has with stage.features=cached alone."""

    copies: int = 0
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-4)
    holdout: float = 0.2

    @property
    def cells(self) -> list[tuple[float, float]]:
        return list(product(self.lrs, self.weight_decays))


def check_options(cfg: DictConfig, options: GridOptions) -> None:
    """UserError for settings of the training that would be ignored or can't work."""
    if cfg.get("ema") is not None:
        raise UserError(
            f"ema={cfg.ema:g} is for one classifier, and stage.features=cached trains a grid of "
            "them: type ema=null, or stage.features=official"
        )
    for key, tried in (("base_lr", "lrs"), ("weight_decay", "weight_decays")):
        if (value := cfg.optimizer[key]) not in (RECIPE[key], *getattr(options, tried)):
            raise UserError(
                f"optimizer.{key}={value:g} would be ignored: stage.features=cached tries "
                f"stage.{tried}={listed(getattr(options, tried))}; type stage.{tried}=[{value:g}], "
                "with others to try"
            )
    check_optimizer(cfg, "lr", "weight_decay")
    lr, decay = max(options.lrs), max(options.weight_decays)
    if (shrink := scaled_lr(lr, cfg.batch_size, cfg.optimizer.scaling) * decay) >= 1:
        raise UserError(
            f"stage.weight_decays has {decay:g} and stage.lrs {lr:g}: a step would take "
            f"{shrink:.3g} times the weights from the weights; leave out the largest of either"
        )


def check_unused(options: GridOptions) -> None:
    """UserError for an option that was typed and that the official protocol doesn't have."""
    for key, default in GridOptions()._asdict().items():
        if (value := getattr(options, key)) != default:
            shown = listed(value) if isinstance(value, tuple) else value
            raise UserError(
                f"stage.{key}={shown} would be ignored: it is for stage.features=cached; add that"
            )


def check_holdout(holdout: float, exam: bool) -> None:
    """UserError for a share to hold out, where nothing is to be chosen."""
    if not exam and holdout != GridOptions().holdout:
        raise UserError(
            f"stage.holdout={holdout:g} would be ignored: "
            "one cell leaves nothing to choose; leave it out"
        )


def train_grid(
    cfg: DictConfig,
    run: Run,
    grid: LinearGrid,
    options: GridOptions,
    held: Tensor,
    source: Source,
    test: Source,
    views: Views,
    test_view: EvalView,
) -> dict[str, float]:
    """Train a pair of heads for each cell (lr, weight decay), choose a pair by an exam, measure it.

    held: (N,), which images are held out for the exam. One head of a pair (see LinearGrid) learns
    without them, and is examined on their test views. The pair with most right answers is chosen; a
    small exam has ties, which the lower cross-entropy decides. Its other head, which learnt from
    all images, is measured on val, once, at the end: nothing else depends on the val split. Without
    held-out images there is one cell and no exam. Both heads are trained in one `fit`: those of the
    exam cost little, and a restart has one checkpoint to continue from.

    copies=0 trains on features of test views, which cost one pass; copies=k on features of the
    augmented views that the first k epochs of the official protocol draw, in turn. With k=epochs
    this is that protocol.

    Returns what `evaluate` does and, with an exam, holdout_top1 (percent), lr (as in stage.lrs:
    before scaling) and weight_decay. Writes grid.csv of the exam. The features stay in the memory
    of every process: 25,600 images x 2048 are 0.2 GB a copy.
    """
    labels = torch.from_numpy(source.labels[source.rows])
    backbone, cells = grid.train().backbone, options.cells

    shown_clean, shown_drawn = source.shown_as(test_view), source.shown_as(views)
    clean = extract_all(
        cfg.precision, run, backbone, shown_clean, lambda x, _: test_view(x), "features"
    )
    drawn = []
    for epoch in range(options.copies):
        draw, title = _draw(views, cfg.seed, epoch), f"features, copy {epoch + 1}"
        copy = extract_all(cfg.precision, run, backbone, shown_drawn, draw, title, epoch)
        drawn.append(copy)
    shown = drawn or [clean]
    log.info(
        "cached %s features of each of %s images, and of %s augmented copies, %s",
        *(clean.shape[1], f"{len(labels):,}", len(drawn), size((len(drawn) + 1) * clean.nbytes)),
    )
    if len(cells) > 1:
        log.info(
            "%s classifiers learn at once (stage.lrs x stage.weight_decays, not optimizer.*)",
            len(cells),
        )
        log.info(
            "a line has loss and accuracy of the one that is best so far on %s held-out images, "
            "and the lr of the first",
            f"{held.sum():,}",
        )
    if isinstance(grid.norm, nn.BatchNorm1d):
        grid.standardise(shown)
    rank, world = distributed.rank(), distributed.world_size()
    targets = torch.stack([labels, labels.masked_fill(held, IGNORED)], dim=1)
    features = FeatureSource(shown, targets, cfg.batch_size, cfg.seed, run.device, rank, world)
    questions = clean[held][rank::world].split(CHUNK)
    answers = labels[held][rank::world].split(CHUNK)
    exam = list(zip(questions, answers, strict=True))

    def score(x: Tensor, y: Tensor) -> Tensor:
        return grid.score(x.to(run.device), y.to(run.device)).cpu().double()

    def measure(_: nn.Module) -> dict[str, float]:
        best, line = 0, {}
        if held.any():
            scores = sum(score(x, y) for x, y in exam)
            right, loss = (distributed.total(scores) / held.sum()).T.tolist()
            best = max(range(len(cells)), key=lambda cell: (right[cell], -loss[cell]))
            line["holdout_top1"] = 100 * right[best]
            if grid.finished and run.is_main:
                report(run, options, right, loss, best, int(held.sum()))
        grid.choose(best)
        mine, accuracy = distributed.mean(grid.seen)[:, best].tolist()
        line |= {"loss": mine, "accuracy": accuracy}
        if grid.finished:
            lr, decay = cells[best]
            line |= {"lr": lr, "weight_decay": decay}
            line |= evaluate(grid, test.epoch_pass(), test_view)
        return line

    groups = []
    for (lr, decay), pair in zip(cells, grid.pairs(), strict=True):
        scaled = scaled_lr(lr, cfg.batch_size, cfg.optimizer.scaling)
        groups.append({"params": pair, "lr": scaled, "weight_decay": decay})
    measures = ("holdout_top1",) if held.any() else ()
    return train(
        cfg, run, grid, features, lambda batch, keys: [batch], measure, groups, measures=measures
    )


def _draw(views: Views, seed: int, epoch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The view that the official protocol shows of each image in this epoch."""
    return lambda images, indices: views(images, keys(seed, epoch, indices))[0]


def report(
    run: Run, options: GridOptions, right: list[float], loss: list[float], best: int, asked: int
) -> None:
    """Write the grid to the log and to grid.csv, with a warning if the best is at its edge.

    right, loss: the share of right answers and the cross-entropy of each cell. best: the cell that
    was chosen. asked: the number of held-out images.
    """
    scores = zip(options.cells, right, loss, strict=True)
    rows = [(*cell, 100 * share, value) for cell, share, value in scores]
    with open(run.directory / "grid.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("lr", "weight_decay", "holdout_top1", "holdout_loss"), *rows])
    log.info("top-1 (%) on held-out images, a line for each lr, a column for each weight decay:")
    log.info("%10s%s", "", "".join(f"{decay:>10g}" for decay in options.weight_decays))
    for lr in options.lrs:
        log.info("%10g%s", lr, "".join(f"{top1:>10.1f}" for rate, _, top1, _ in rows if rate == lr))
    lr, decay, top1, _ = rows[best]
    # the standard error of a share that was measured on so many images
    error = 100 * math.sqrt(right[best] * (1 - right[best]) / asked)
    log.info(
        "chosen: lr %g, weight decay %g (%.1f ± %.1f on %s held-out images)",
        *(lr, decay, top1, error, f"{asked:,}"),
    )
    if len(options.lrs) > 1 and lr in (min(options.lrs), max(options.lrs)):
        advice = "the best may lie outside; add one beyond it"
        log.warning("lr %g is at the edge of stage.lrs: %s", lr, advice)
