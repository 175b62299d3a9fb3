"""Data sets of Hugging Face: what `datasets` saved to a disk, and parquet files.

Both are read by pyarrow, whose formats they are: `datasets` takes seconds to import in each process
that reads, and no part of its work is needed here. Images are the bytes that were put there.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import PositiveInt

from ssl_bench.config.fields import BitDepth, Place, ValueRange
from ssl_bench.data.formats.base import Digests, ImageFiles, folder_at, hashed
from ssl_bench.data.formats.patterns import matching
from ssl_bench.data.store import OnError, Split
from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

STATE = "state.json"  # which save_to_disk writes beside a split's Arrow files
PARQUET = ("data/{}-*.parquet", "{}-*.parquet", "{}/*.parquet", "{}.parquet")  # files of a split
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream; without it pyarrow reads what is there
KEPT = 256 * 2**20  # bytes of row groups that a process keeps: some of 100 images, or 100 MB
LARGE = 2**30  # bytes of a row group that each process that reads had better not hold
_reading = threading.Lock()


class HuggingFace(ImageFiles):
    """A folder of save_to_disk, or parquet files: a column of images, and one of class numbers.

    train, val, pretrain: a split by its name, or its parquet files (see `patterns`); "pretrain" is
    train without its labels unless it has rows of its own. image: the column of the images; None:
    the only one. label: that of the class numbers.
    """

    listed_at_once = False

    def __init__(
        self,
        root: Place,
        train: Place | list[Place] = "train",
        val: Place | list[Place] = "validation",
        pretrain: Place | list[Place] | None = None,
        image: str | None = None,
        label: str = "label",
        image_size: PositiveInt | None = None,
        max_side: PositiveInt | None = None,
        draft: bool = False,
        bit_depth: BitDepth | None = None,
        value_range: ValueRange | None = None,
        on_error: OnError = "raise",
        cache: Place | None = None,
        workers: PositiveInt | None = None,
    ):
        super().__init__(
            image_size, max_side, draft, bit_depth, value_range, on_error, cache, workers
        )
        self.root, self.image, self.label = root, image, label
        self.named = {"train": train, "val": val, "pretrain": pretrain}
        self._tables: dict[str, Table] = {}
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                "data=huggingface needs the pyarrow package: pip install 'ssl_bench[huggingface]'"
            ) from None

    @property
    def class_names(self) -> Sequence[str]:  # type: ignore[override]
        table = self._labelled()
        return table.class_names(self.label) if table else []

    @property
    def num_classes(self) -> int | None:
        if (table := self._labelled()) is None:
            return None
        return len(self.class_names) or int(table.labels(self.label).max()) + 1

    def _labelled(self) -> "Table | None":
        """The split train; None: it has no labels, or there are only rows for "pretrain"."""
        try:
            table = self._table("train")
        except UserError:
            if self.named["pretrain"] is None:
                raise
            return None
        return table if self.label in table.schema.names else None

    def reads_singly(self, name: str) -> bool:
        return not self._table(self._source(name)).is_parquet

    def _list(self, name: str) -> Split:
        table = self._table(self._source(name))
        rows = table.rows(self.image)
        labels = None if name == "pretrain" else table.labels(self.label)
        if name == "val":
            trained = self._table("train")
            if both := sorted({*table.files} & {*trained.files}):
                raise UserError(
                    f"{both[0]} is of data.val= and of data.train=: what is measured on must not "
                    "be trained on"
                )
            if table.class_names(self.label) != self.class_names:
                raise UserError(
                    f"the classes of column {self.label!r} are others in data.val= than in "
                    "data.train=: both must number them in the same way"
                )
        if labels is not None and labels.max() >= (classes := self.num_classes or 0):
            raise UserError(
                f"{rows(int(labels.argmax()))} has label {labels.max()}, and the classes of "
                f"data.train= end at {classes - 1}"
            )
        return self._split(name, "rows", table.digests(), labels, self._decoder(rows), rows)

    def _source(self, name: str) -> str:
        return "train" if name == "pretrain" and self.named["pretrain"] is None else name

    def _table(self, name: str) -> "Table":
        if name not in self._tables:
            root, named = folder_at(self.root), self.named[name]
            assert named is not None
            self._tables[name] = Table(root, _files(root, named, f"data.{name}"))
        return self._tables[name]


def _files(root: Path, named: str | Sequence[str], key: str) -> list[Path]:
    """The files of a split: of Arrow, or of parquet. UserError where there are none."""
    if not isinstance(named, str) or "*" in named or named.endswith(".parquet"):
        return matching(root, named, ".parquet", key)
    if (saved := _saved(root, named)) is not None:
        return saved
    for form in PARQUET:
        if found := sorted(root.glob(form.format(named))):
            return found
    others = ", ".join(_splits(root))
    advice = f"it has {others}: type one of these" if others else "data.root= sets the folder"
    raise UserError(
        f"{key}={named}: no such split in {root}; {advice}, or the split's files: "
        f"'{key}=FOLDER/*.parquet'"
    )


def _saved(root: Path, named: str) -> list[Path] | None:
    """The Arrow files of a split that save_to_disk wrote; None: there is none."""
    folder = root / named
    if not (folder / STATE).is_file():
        folder = root  # which may be a single data set, not one of several splits
        if not (folder / STATE).is_file() or named != _only_split(folder):
            return None
    try:
        return [folder / file["filename"] for file in _state(folder)["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder / STATE} isn't what save_to_disk writes: save it again") from None


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{folder / STATE} is damaged: save the data set again")
    return state


def _only_split(folder: Path) -> str:
    """The name of the split that a folder of save_to_disk is; few say so, the rest is train."""
    return str(_state(folder).get("_split") or "train")


def _splits(root: Path) -> list[str]:
    """The names of splits that a folder seems to have."""
    saved = [path.parent.name for path in root.glob(f"*/{STATE}")]
    if (root / STATE).is_file():
        saved.append(_only_split(root))
    found = [path for form in PARQUET[:2] for path in root.glob(form.format("*"))]
    return sorted({*saved, *(path.name.partition("-")[0] for path in found)})


class Group(NamedTuple):
    """Rows that are read at once."""

    file: int
    number: int  # in its file
    rows: int


class Table:
    """Files with the same columns, one after the other."""

    def __init__(self, root: Path, files: list[Path]):
        self.root, self.files = root, files
        self.is_parquet = files[0].suffix == ".parquet"
        self.groups: list[Group] = []
        self.schema: Any = None
        for number, path in enumerate(files):
            with _whole(path):
                opened = _open(path)
                if not self.is_parquet and not _ends(path):
                    raise UserError(f"{path} is no whole Arrow file (no end): copy it again")
                schema = opened.schema_arrow if self.is_parquet else opened.schema
                if self.schema is None:
                    self.schema = schema
                if schema.names != self.schema.names:
                    raise UserError(f"{path} has other columns than {files[0]}: leave one out")
                self.groups += self._groups(number, opened)

    def _groups(self, number: int, opened: Any) -> list[Group]:
        if not self.is_parquet:
            return [Group(number, 0, opened.num_rows)]
        groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        if groups and (largest := max(group.total_byte_size for group in groups)) > LARGE:
            log.warning(
                "%s has row groups of %.1f GB, which each process that reads holds: write it anew "
                "with row_group_size=100",
                *(self.files[number], largest / 1e9),
            )
        return [Group(number, i, group.num_rows) for i, group in enumerate(groups)]

    def digests(self) -> Digests:
        names = [os.path.relpath(file, self.root) for file in self.files]
        stats = [file.stat() for file in self.files]
        known = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats, strict=True)]
        content = hashed(*((name, size) for name, size, _ in known))
        return Digests(hashed(*known), content, sum(size for _, size, _ in known))

    def rows(self, column: str | None) -> "Rows":
        """The images in a column; None: the only one that has images."""
        fields = {field.name: field.type for field in self.schema if _holds_images(field.type)}
        if column is None and len(fields) == 1:
            (column,) = fields
        if column is None or column not in fields:
            what = "which column has the images" if column is None else f"data.image={column}"
            known = ", ".join(f"{field.name} ({field.type})" for field in self.schema)
            raise UserError(
                f"{what}? Those of {self.files[0]} are {known}: type data.image= one that has the "
                "bytes of image files"
            )
        paths = tuple(map(str, self.files))
        return Rows(paths, self.groups, column, _is_struct(fields[column]))

    def labels(self, column: str) -> np.ndarray:
        """int64 (N,). UserError where there aren't class numbers."""
        import pyarrow as pa

        if column not in self.schema.names:
            raise UserError(
                f"{self.files[0]} has no column {column!r}, but {', '.join(self.schema.names)}: "
                "type data.label= the one with the class numbers; without, there is only "
                "stage=pretrain"
            )
        if not pa.types.is_integer(kind := self.schema.field(column).type):
            raise UserError(
                f"column {column!r} of {self.files[0]} is of type {kind}, and labels are class "
                "numbers from 0: type data.label= another one, or make it a ClassLabel "
                "(class_encode_column)"
            )
        parts = []
        for path in self.files:
            with _whole(path):
                opened = _open(path)
                if self.is_parquet:
                    opened = opened.read(columns=[column], use_threads=False)
                values = opened.column(column)
                if values.null_count or (len(values) and pa.compute.min(values).as_py() < 0):
                    raise UserError(
                        f"column {column!r} of {path} has rows without a class number (null or "
                        "-1): only stage=pretrain can use them (data.pretrain=)"
                    )
                parts.append(values.to_numpy().astype(np.int64))
        return np.concatenate(parts)

    def class_names(self, label: str) -> list[str]:
        """Those of a ClassLabel, which `datasets` writes into the schema; empty: there are none."""
        try:
            info = json.loads(self.schema.metadata[b"huggingface"])["info"]
            names = info["features"][label]["names"]
        except (KeyError, TypeError, ValueError):
            return []
        whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if whole else []


class Rows:
    """Images in a column of files, by their index; worker processes open what they read."""

    def __init__(self, files: tuple[str, ...], groups: list[Group], column: str, is_struct: bool):
        """is_struct: the column has structs, whose "bytes" are the images."""
        self.files, self.column, self.is_struct = files, column, is_struct
        self.groups = np.array(groups, np.int64).reshape(-1, 3)
        self.starts = np.concatenate([[0], self.groups[:, 2].cumsum()])
        self._kept: dict[int, Any] = {}  # the column in some groups, those read last at the end

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __call__(self, index: int) -> str:
        files = self.groups[:, 0]
        file = files[self._group(index)]
        return f"image {index - self.starts[np.searchsorted(files, file)]} of {self.files[file]}"

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def read(self, index: int) -> bytes:
        group = self._group(index)
        with _reading:
            if group not in self._kept:
                self._keep(group)
            column = self._kept[group] = self._kept.pop(group)
        value = column[index - int(self.starts[group])]
        if self.is_struct and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            raise ValueError("it has no bytes, at most a path: save it with the images in it")
        return value.as_py()

    def _keep(self, group: int) -> None:
        file, number, _ = self.groups[group].tolist()
        opened = _open(self.files[file])
        if not self.files[file].endswith(".parquet"):
            self._kept[group] = opened.column(self.column)  # mapped into memory, not read
            return
        names = [f"{self.column}.bytes" if self.is_struct else self.column]
        read = opened.read_row_group(number, columns=names, use_threads=False)
        self._kept[group] = read.column(self.column)
        while len(self._kept) > 1 and sum(part.nbytes for part in self._kept.values()) > KEPT:
            del self._kept[next(iter(self._kept))]


def _open(path: str | Path) -> Any:
    """A ParquetFile, or the table of an Arrow file, mapped into memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if str(path).endswith(".parquet"):
        return pq.ParquetFile(path, memory_map=True)
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _ends(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(END), os.SEEK_END)
        return file.read() == END


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """UserError for a file that isn't what its name says."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        kind = "parquet" if path.suffix == ".parquet" else "Arrow"
        said = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is no whole {kind} file ({said}): copy it again") from None


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _holds_images(kind: Any) -> bool:
    """Is a column of this type one of the bytes of files, or of structs with these?"""
    import pyarrow as pa

    if _is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
