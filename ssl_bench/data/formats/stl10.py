"""STL-10."""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from ssl_bench.config.fields import Place
from ssl_bench.data.formats.base import Dataset, folder_at
from ssl_bench.data.formats.records import check_range, names_in, records_of
from ssl_bench.data.store import OnError, Split
from ssl_bench.errors import UserError

IMAGES = 100_000  # that a pretraining sees


class STL10(Dataset):
    """STL-10, 96x96, 10 classes: its binary files in ROOT or ROOT/stl10_binary.

    train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin. "pretrain" is unlabeled,
    "val" is test. https://cs.stanford.edu/~acoates/stl10
    """

    num_classes = 10

    def __init__(
        self,
        root: Place,
        image_size: Literal[96] = 96,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root = root

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        places = (Path(self.root) / "stl10_binary", Path(self.root))
        return names_in((place / "class_names.txt" for place in places), self.num_classes)

    def _list(self, name: str) -> Split:
        part = {"pretrain": "unlabeled", "train": "train", "val": "test"}[name]
        images = self._file(f"{part}_X.bin")
        # columns before rows, as Matlab stores them
        records, digests = records_of([images], 3 * 96 * 96, 96, (2, 1, 0))
        labels = None
        if name != "pretrain":
            path = self._file(f"{part}_y.bin")
            labels = np.fromfile(path, np.uint8).astype(np.int64) - 1
            if len(labels) != len(records):
                raise UserError(
                    f"{path} has {len(labels)} labels for {len(records)} images; "
                    "unpack both files again"
                )
            check_range(labels, 10, path)
        return self._split(name, part, digests, labels, records, records.where)

    def _file(self, name: str) -> Path:
        root = folder_at(self.root)
        for path in (root / "stl10_binary" / name, root / name):
            if path.is_file():
                return path
        raise UserError(
            f"no {name} in {root} or {root / 'stl10_binary'}; unpack stl10_binary.tar.gz there, "
            "or set data.root= to where it is"
        )
