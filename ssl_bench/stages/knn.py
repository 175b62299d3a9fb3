"""Stage knn: classification by the nearest neighbours of frozen features."""

import csv
import logging
from itertools import product
from typing import Annotated

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.config.fields import FeaturesOf, Resize, Share
from ssl_bench.console import Bar
from ssl_bench.data.source import Source, fits
from ssl_bench.errors import UserError
from ssl_bench.evaluate import calibration
from ssl_bench.evaluate.features import extract_all
from ssl_bench.evaluate.labels import hold_out, labelled, log_share
from ssl_bench.evaluate.neighbours import QUERIES, nearest, vote
from ssl_bench.evaluate.readout import read_out_
from ssl_bench.runs import layout
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.stages import IMAGES, LOOK, PRETRAINED, RUN, _images
from ssl_bench.stages._labels import check_unseen
from ssl_bench.stages._lincls_grid import check_holdout
from ssl_bench.stages._pretrained import check_directory, load_pretrained, log_result
from ssl_bench.stages._training import (
    check_sizes,
    make_test_view,
    on_device,
    open_source,
)

log = logging.getLogger(__name__)

Cell = tuple[int, float]  # k, temperature
# for the error of a hold_out that can't be made: who chooses, and what to type instead
CHOICE = ("stage=knn", "one of each: stage.k=[20] stage.temperatures=[0.07]")


READS = (*RUN, *IMAGES, *LOOK, "devices", "data", "backbone", *PRETRAINED)
IDLE = {"pretrained=null": ("pretrained_prefix",)}


def knn(
    cfg: DictConfig,
    run: Run,
    labels_per_class: PositiveInt | None = None,
    label_fraction: Share | None = None,
    features_of: FeaturesOf | None = None,
    test_resize: Resize = 256 / 224,
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 5, 10, 20, 50, 100, 200),
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.03, 0.07, 0.2),
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2,
) -> dict[str, float]:
    """Returns top-1, top-5 and the calibration error of votes (percent) on the val split.

    Features are those of test views, of the tokens `features_of` (`read_out_`). k and temperature
    are chosen by an exam on held-out images of the training split; the rest of the split is the
    bank of neighbours there. For the result the bank is the whole training split, and nothing else
    depends on the val split. Also returns k, temperature and holdout_top1 (percent), and writes
    grid.csv and reliability.json. One k and one temperature need no exam. See
    `neighbours.weighted_knn`.
    """
    check_directory(cfg)
    if cfg.metric == "val_top5" and max(k) < 5:
        raise UserError(
            f"metric=val_top5: stage.k={list(k)} has no five neighbours, to vote for five classes: "
            "type a larger stage.k"
        )
    check_holdout(holdout, exam := chooses(cfg.stage))
    data = build.construct(cfg.data)
    split, subset = labelled(data, labels_per_class, label_fraction, cfg.seed)
    log_share(subset, split.labels)
    labels = split.labels if subset is None else split.labels[subset]
    if exam:
        check_unseen(cfg, split, *CHOICE)
    room = len(labels)  # images of the bank
    if exam:
        room -= hold_out(labels, holdout, cfg.seed, *CHOICE).sum()
    cells = list(product([number for number in k if number <= room], temperatures))
    if not cells:
        raise UserError(
            f"stage.k={list(k)}: more than the {room:,} images of the bank; "
            f"choose at most stage.k=[{room}]"
        )
    if left_out := ", ".join(str(number) for number in k if number > room):
        log.info("k %s left out: more than the %s images of the bank", left_out, f"{room:,}")
    backbone = on_device(load_pretrained(cfg), run).eval()
    check_sizes(cfg, backbone)
    read_out_(backbone, features_of)
    view = make_test_view(cfg, run, test_resize)
    source = open_source(cfg, run, data, "train", view, subset)
    test = open_source(cfg, run, data, "val", view)

    def features(images: Source, title: str) -> Tensor:
        return extract_all(cfg.precision, run, backbone, images, lambda x, _: view(x), title)

    bank = features(source, "features of train")
    labels, result, best = torch.from_numpy(source.labels[source.rows]), {}, cells[0]
    if exam:
        held = torch.from_numpy(hold_out(source.labels[source.rows], holdout, cfg.seed, *CHOICE))
        questions, others = (bank[held], labels[held]), (bank[~held], labels[~held])
        scores = quality(run, *questions, *others, data.num_classes, cells)
        best = max(cells, key=lambda cell: scores[cell][0])  # the first of equals
        result["holdout_top1"] = scores[best][0]
        if run.is_main:
            report(run, {cell: top1 for cell, (top1, *_) in scores.items()}, best, int(held.sum()))
            if best[0] == max(k) > min(k):
                advice = "the best may lie beyond; add a larger one to stage.k"
                log.warning("k %d is the largest tried: %s", best[0], advice)
    queries = features(test, "features of val")
    targets = torch.from_numpy(test.labels[test.rows])
    top1, top5, bins = quality(run, queries, targets, bank, labels, data.num_classes, [best])[best]
    result |= {"k": best[0], "temperature": best[1], "val_top1": top1}
    if max(k) >= 5:  # fewer have no five classes to vote for; by what is tried, not by the best
        result["val_top5"] = top5
    result["val_ece"] = calibration.expected_error(bins)
    if run.is_main:
        files.write(run.directory / layout.RELIABILITY, calibration.dumped(bins) + "\n")
    log_result(run, result)
    return result


_images.counted(knn)  # no decorator: the signature is read from the source


def chooses(stage: DictConfig) -> bool:
    """Does this stage choose by held-out labels?"""
    return len(stage.k) * len(stage.temperatures) > 1


knn.chooses, knn.choice = chooses, CHOICE


def quality(
    run: Run,
    queries: Tensor,
    targets: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    cells: list[Cell],
) -> dict[Cell, tuple[float, float, Tensor]]:
    """Top-1 and top-5 (percent) of queries (M, D) by a bank (N, D), and the bins of
    `calibration.binned`, for each cell.

    Each process computes its share. Only classes that have a vote count among the five. A share of
    the votes is taken for a probability.
    """
    if fits(bank.nbytes, run.device):
        bank = bank.to(run.device)  # once, not for each block of queries
    rank, world = distributed.rank(), distributed.world_size()
    most = max(number for number, _ in cells)
    right = torch.zeros(len(cells), 2, dtype=torch.float64)
    bins = torch.zeros(len(cells), 3, calibration.BINS, dtype=torch.float64)
    share = queries[rank::world].split(QUERIES), targets[rank::world].split(QUERIES)
    with Bar(
        len(queries[rank::world]), "neighbours", unit="queries", shown=run.is_main
    ) as progress:
        for block, wanted in zip(*share, strict=True):
            similarities, rows = nearest(block.to(run.device), bank, most)
            neighbours, wanted = labels[rows.cpu()].to(run.device), wanted.to(run.device)
            for i, (number, temperature) in enumerate(cells):
                near, classes = similarities[:, :number], neighbours[:, :number]
                votes = vote(near, classes, num_classes, temperature)
                top = votes.topk(min(5, num_classes))
                hits = (top.indices == wanted[:, None]) & (top.values > 0)
                right[i] += torch.stack([hits[:, 0].sum(), hits.sum()]).cpu()
                bins[i] += calibration.binned(votes, wanted)
            progress.add(len(block))
    percent = (100 * distributed.total(right) / len(queries)).tolist()
    return {
        cell: (top1, top5, mine)
        for cell, (top1, top5), mine in zip(cells, percent, distributed.total(bins), strict=True)
    }


def report(run: Run, scores: dict[Cell, float], best: Cell, asked: int) -> None:
    """Write the exam to the log and to grid.csv.

    scores: top-1 of each cell. best: the cell that was chosen. asked: number of held-out images.
    """
    rows = [(*cell, top1) for cell, top1 in scores.items()]
    with open(run.directory / "grid.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("k", "temperature", "holdout_top1"), *rows])
    numbers, temperatures = (list(dict.fromkeys(values)) for values in zip(*scores, strict=True))
    grid = "a line for each k, a column for each temperature"
    log.info("top-1 (%%) on %s held-out images, %s:", f"{asked:,}", grid)
    log.info("%10s%s", "", "".join(f"{temperature:>10g}" for temperature in temperatures))
    for number in numbers:
        row = [f"{scores[number, temperature]:>10.1f}" for temperature in temperatures]
        log.info("%10d%s", number, "".join(row))
    log.info("chosen: k %d, temperature %g", *best)
