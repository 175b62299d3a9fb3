"""Which labels a classifier learns from, and which are held out to choose by."""

import logging

import numpy as np

from ssl_bench.data.formats.base import Dataset
from ssl_bench.data.store import Split
from ssl_bench.errors import UserError, several
from ssl_bench.runtime.seeding import fold

log = logging.getLogger(__name__)


def hold_out(
    labels: np.ndarray,
    share: float,
    seed: int,
    chooser: str = "stage.features=cached",
    instead: str = "stage.features=official",
) -> np.ndarray:
    """Mask (N,) of a share of each class's images, drawn by seed: at least one and not all.

    labels: (N,). chooser, instead: for the error, who needs the images and what to type without
    them.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise UserError(
            f"{chooser} chooses by held-out labels, and class {classes[counts.argmin()]} has one "
            f"image to learn from: give each class two or more, or type {instead}"
        )
    held = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, counts, strict=True):
        rng = np.random.default_rng(fold(seed, "holdout", int(label)))
        chosen = min(max(round(share * count), 1), count - 1)
        held[rng.choice(np.flatnonzero(labels == label), chosen, replace=False)] = True
    return held


def labelled(
    data: Dataset, per_class: int | None, fraction: float | None, seed: int
) -> tuple[Split, np.ndarray | None]:
    """The split to learn from, and which of its images (see `few_labels`).

    UserError if that split, or the one to measure on, isn't there.
    """
    split = data.split("train")
    data.split("val")
    return split, few_labels(split.labels, per_class, fraction, seed)


def few_labels(
    labels: np.ndarray, per_class: int | None, fraction: float | None, seed: int
) -> np.ndarray | None:
    """Sorted positions of the labelled images to learn from, drawn by seed; None stands for all.

    labels: (N,). per_class: so many of each class. fraction: this share of each class, as SimCLR's
    1 % and 10 % (arXiv:2002.05709, section 6), rounded, but at least one image. UserError if all
    labels are of one class.
    """
    check_classes(labels)
    if per_class is None and fraction is None:
        return None
    if per_class is not None and fraction is not None:
        raise UserError(
            f"stage.labels_per_class={per_class} and stage.label_fraction={fraction:g}: "
            "give one of the two"
        )
    classes, counts = np.unique(labels, return_counts=True)
    if per_class is not None:
        fewest = counts.min()
        if fewest < per_class:
            raise UserError(
                f"stage.labels_per_class={per_class}: class {classes[counts.argmin()]} has "
                f"{several(int(fewest), 'image')}: choose at most stage.labels_per_class={fewest}"
            )
        wanted = np.full(len(classes), per_class)
    else:
        wanted = np.maximum(np.round(fraction * counts).astype(int), 1)
        total = wanted.sum()
        if total > 1.5 * fraction * len(labels):
            raise UserError(
                f"stage.label_fraction={fraction:g} of {len(labels):,} images is "
                f"{fraction * len(labels):.0f}, and one of each class makes {total:,}: "
                "choose a larger share, or type stage.labels_per_class=1"
            )
    chosen = []
    for label, number in zip(classes, wanted, strict=True):
        members = np.flatnonzero(labels == label)
        rng = np.random.default_rng(fold(seed, "labels", int(label)))
        chosen.append(rng.choice(members, number, replace=False))
    return np.sort(np.concatenate(chosen))


def log_share(few: np.ndarray | None, labels: np.ndarray) -> None:
    """Say how many labels these are, unless they are all."""
    if few is not None:
        share = 100 * len(few) / len(labels)
        log.info("%s of %s labels, %.3g %%", f"{len(few):,}", f"{len(labels):,}", share)


def check_classes(labels: np.ndarray) -> None:
    if labels.min() == labels.max():
        raise UserError(
            f"all {len(labels):,} labelled images are of one class, "
            "and what tells nothing apart is always right: give data.root= a data set of two "
            "classes or more"
        )
