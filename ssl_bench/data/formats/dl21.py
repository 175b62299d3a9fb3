"""Numbered PNG files with label tensors."""

import functools
import math
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from ssl_bench.config.fields import BitDepth, Place, ValueRange
from ssl_bench.data.formats.base import Dataset, digests_of, folder_at, load_indices, values_of
from ssl_bench.data.formats.listing import Passed, is_service
from ssl_bench.data.formats.paths import Joined, Numbered
from ssl_bench.data.store import OnError, Split
from ssl_bench.errors import UserError


class DL21(Dataset):
    """Numbered PNG files: ROOT/unlabeled/{i}.png, and the same in ROOT/train and ROOT/val.

    The labels are in ROOT/{split}_label_tensor.pt (int64).

    `extra_labels`: "request_NN.csv,label_NN.pt" or a list of the two, relative to ROOT: indices
    into unlabeled/ (one a line) and their labels. These images are appended to the train split.
    """

    def __init__(
        self,
        root: Place,
        image_size: PositiveInt = 96,
        extra_labels: Place | list[Place] | None = None,
        bit_depth: BitDepth | None = None,
        value_range: ValueRange | None = None,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root, self.values = root, values_of(bit_depth, value_range)
        if isinstance(extra_labels, str):
            self.extra = extra_labels.split(",")
        else:
            self.extra = list(extra_labels or [])
        if len(self.extra) not in (0, 2):
            raise UserError(
                f"data.extra_labels={extra_labels} names {len(self.extra)} files; "
                "give an index file and a label file: "
                "data.extra_labels=[request_18.csv,label_18.pt]"
            )

    @functools.cached_property
    def num_classes(self) -> int | None:
        if not Path(self.root, "train_label_tensor.pt").exists():
            return None
        return int(max(labels.max(initial=0) for labels in self._train_labels)) + 1

    @functools.cached_property
    def _train_labels(self) -> list[np.ndarray]:
        files = ["train_label_tensor.pt", *(name.strip() for name in self.extra[1:])]
        return [_load_labels(folder_at(self.root) / name) for name in files]

    def _list(self, name: str) -> Split:
        folder = "unlabeled" if name == "pretrain" else name
        paths, stats = _list_numbered(folder_at(self.root, folder))
        if name == "pretrain":
            return self._split(name, folder, digests_of(stats), None, self._decoder(paths), paths)
        if name == "val":
            labels = _load_labels(folder_at(self.root) / "val_label_tensor.pt")
            if labels.max(initial=0) >= (self.num_classes or math.inf):
                raise UserError(
                    f"val_label_tensor.pt in {self.root} has label {labels.max()} and the train "
                    f"labels end at {self.num_classes - 1}; both must number the classes in the "
                    "same way"
                )
        else:
            labels = self._train_labels[0]
        if len(labels) != len(paths):
            raise UserError(
                f"{folder}_label_tensor.pt in {self.root} has {len(labels)} labels for "
                f"{len(paths)} images; they must be as many"
            )
        if name == "train" and self.extra:
            file = folder_at(self.root) / self.extra[0].strip()
            chosen = load_indices(file, "data.extra_labels= names an index file and a label file")
            if len(chosen) != len(self._train_labels[1]):
                raise UserError(
                    f"{self.extra[0]} has {len(chosen)} indices and {self.extra[1]} has "
                    f"{len(self._train_labels[1])} labels; data.extra_labels= needs two files that "
                    "belong together"
                )
            unlabeled = Numbered(folder_at(self.root, "unlabeled"), 0)
            stats = np.concatenate([stats, _stat_chosen(unlabeled, chosen, self.extra[0])])
            paths = Joined(paths, unlabeled, chosen)
            labels = np.concatenate(self._train_labels)
        return self._split(name, folder, digests_of(stats), labels, self._decoder(paths), paths)


def _list_numbered(folder: Path) -> tuple[Numbered, np.ndarray]:
    """The files 0.png ... of a folder, and int64 (n, 3): number, size, mtime in ns."""
    number = re.compile(r"(0|[1-9]\d{0,17})\.png").fullmatch
    passed = Passed()

    def numbered(entries: Iterator[os.DirEntry]) -> Iterator[tuple[int, os.stat_result]]:
        for entry in entries:
            if match := number(entry.name):
                yield int(match[1]), entry.stat()
            elif is_service(entry.name):
                passed.add("hidden or service file", entry.name)
            else:
                passed.add("file not named NUMBER.png", entry.name)

    with os.scandir(folder) as entries:
        rows = ((i, status.st_size, status.st_mtime_ns) for i, status in numbered(entries))
        flat = np.fromiter(chain.from_iterable(rows), np.int64)
    passed.tell(folder)
    stats = flat.reshape(-1, 3)
    stats = stats[np.argsort(stats[:, 0])]
    wrong = np.flatnonzero(stats[:, 0] != np.arange(len(stats)))
    if len(wrong):
        raise UserError(
            f"{folder / f'{wrong[0]}.png'} is missing, though the folder goes up to "
            f"{stats[-1, 0]}.png; files must be numbered 0, 1, 2, ... without a gap"
        )
    if len(stats) == 0:
        raise UserError(
            f"no files 0.png, 1.png, ... in {folder}; data.root= sets where the data set is"
        )
    return Numbered(folder, len(stats)), stats


def _stat_chosen(paths: Numbered, chosen: np.ndarray, source: str) -> np.ndarray:
    """int64 (n, 3) of the chosen files: number, size, mtime in ns. source: the file naming them."""
    rows = []
    for index in chosen.tolist():
        try:
            status = os.stat(paths(index))
        except OSError:
            raise UserError(
                f"{source} asks for {paths(index)}, which is not there; "
                "does it belong to this data set?"
            ) from None
        rows.append((index, status.st_size, status.st_mtime_ns))
    return np.array(rows, np.int64).reshape(-1, 3)


def _load_labels(path: Path) -> np.ndarray:
    """int64 (n,) from a tensor file; UserError for anything else, and for negative labels."""
    import torch

    if not path.is_file():
        raise UserError(
            f"no label file {path}; labelled stages need it, data.root= sets where the data set is"
        )
    try:
        labels = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that isn't one of its own
        raise UserError(
            f"{path} is not a tensor file of torch ({type(error).__name__}); expected int64 labels"
        ) from None
    if not isinstance(labels, torch.Tensor):
        raise UserError(
            f"{path} holds a {type(labels).__name__}; expected a one-dimensional int64 tensor"
        )
    if labels.dtype != torch.int64 or labels.ndim != 1:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise UserError(
            f"{path} holds a tensor of {found}; expected a one-dimensional int64 tensor"
        )
    if len(labels) and labels.min() < 0:
        raise UserError(f"{path} has the label {int(labels.min())}; labels count from 0")
    return labels.numpy()
