"""CIFAR-10 and CIFAR-100."""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from ssl_bench.config.fields import Place
from ssl_bench.data.formats.base import Dataset, folder_at
from ssl_bench.data.formats.records import check_range, names_in, records_of
from ssl_bench.data.store import OnError, Split
from ssl_bench.errors import UserError

FOLDERS = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
IMAGES = 50_000  # that a pretraining sees


class CIFAR(Dataset):
    """CIFAR-10 or CIFAR-100 (32x32), the *binary* version, unpacked in ROOT.

    "pretrain" is train without its labels. https://www.cs.toronto.edu/~kriz/cifar.html
    """

    def __init__(
        self,
        root: Place,
        num_classes: Literal[10, 100],
        image_size: Literal[32] = 32,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(image_size, on_error, cache, workers)
        self.root = root
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        file = {10: "batches.meta.txt", 100: "fine_label_names.txt"}[self.num_classes]
        places = (Path(self.root) / FOLDERS[self.num_classes], Path(self.root))
        return names_in((place / file for place in places), self.num_classes)

    def _list(self, name: str) -> Split:
        train = name != "val"
        folder = FOLDERS[self.num_classes]
        if self.num_classes == 10:
            label_bytes = 1
            files = ["test_batch.bin"]
            if train:
                files = [f"data_batch_{batch}.bin" for batch in range(1, 6)]
        else:
            label_bytes = 2  # coarse label, fine label
            files = ["train.bin" if train else "test.bin"]
        paths = [self._file(folder, file) for file in files]
        records, digests = records_of(paths, label_bytes + 3 * 32 * 32, 32, (1, 2, 0))
        labels = None
        if name != "pretrain":
            rows = [np.memmap(path, np.uint8, "r").reshape(-1, records.record) for path in paths]
            labels = np.concatenate([row[:, label_bytes - 1] for row in rows]).astype(np.int64)
            check_range(labels, self.num_classes, paths[0].parent)
        images = f"{self.num_classes}-{'train' if train else 'test'}"
        return self._split(name, images, digests, labels, records, records.where)

    def _file(self, folder: str, name: str) -> Path:
        root = folder_at(self.root)
        for path in (root / folder / name, root / name):
            if path.is_file():
                return path
        archive = f"cifar-{self.num_classes}-binary.tar.gz"
        python = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[self.num_classes]
        found = ""
        if python.is_dir():
            found = f"{python} is the python version, a pickle, which is not read; "
        raise UserError(
            f"no {folder}/{name} in {root}; {found}unpack {archive} (from "
            "https://www.cs.toronto.edu/~kriz/cifar.html) there, or set data.root= to where it is"
        )
