"""Trees of image files, with or without class folders."""

import functools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from ssl_bench.config.fields import BitDepth, Place, ValueRange
from ssl_bench.data.formats.base import Digests, ImageFiles, folder_at
from ssl_bench.data.formats.listing import list_tree, subfolders
from ssl_bench.data.formats.paths import Paths
from ssl_bench.data.store import OnError, Split
from ssl_bench.errors import UserError

log = logging.getLogger(__name__)


class Folder(ImageFiles):
    """Any tree of images.

    With class folders ROOT/train/<class> and ROOT/val/<class> (in upper case, too) it is labelled,
    the classes in sorted order, and "pretrain" is train without its labels; otherwise all images
    under ROOT are "pretrain". UserError if folders at any depth have the names of a training and a
    held-out split.
    """

    def __init__(
        self,
        root: Place,
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
        self.root = root
        self._trees: dict[Path, tuple[Paths, Digests, dict[str, int]]] = {}

    @functools.cached_property
    def class_names(self) -> list[str]:
        """Empty when unlabelled."""
        names = subfolders(self._part("train"))
        return names if subfolders(self._part("val")) else []

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) or None

    def _top(self) -> Path:
        """The folder with train/ and val/."""
        return folder_at(self.root)

    def _part(self, name: str) -> Path:
        """ROOT/train or ROOT/val, in the case that the folder has."""
        root = self._top()
        found = [folder for folder in subfolders(root) if folder.casefold() == name]
        if len(found) > 1:
            raise UserError(f"{root} has {found[0]}/ and {found[1]}/: leave one of the two there")
        return root / (found[0] if found else name)

    def _listed(self, folder: Path, guarded: int | None) -> tuple[Paths, Digests, dict[str, int]]:
        """What `list_tree` says; listed once, since pretrain and train may be of one folder."""
        if folder not in self._trees:
            self._trees[folder] = list_tree(folder, guarded=guarded)
        return self._trees[folder]

    def _list(self, name: str) -> Split:
        root = folder_at(self.root)
        if not self.class_names:
            if name != "pretrain":
                alone = [part for part in ("train", "val") if subfolders(self._part(part))]
                raise UserError(
                    f"{root} has no labels, so no split '{name}', only 'pretrain'; "
                    "labelled data lie in train/<class>/ and val/<class>/"
                    + (f", and here is {alone[0]}/<class>/ alone" if alone else "")
                )
            paths, digests, _ = list_tree(root, guarded=0)
            return self._split(name, "all", digests, None, self._decoder(paths), paths)
        folder = self._part("val" if name == "val" else "train")
        if unknown := sorted(set(subfolders(folder)) - set(self.class_names)):
            raise UserError(
                f"val/ has the class {unknown[0]!r}, which train/ lacks; "
                "both need the same class folders"
            )
        guarded = None if name == "val" else 1  # from 1 on, since a class may be called "test"
        paths, digests, counts = self._listed(folder, guarded)
        if "" in counts:
            raise UserError(
                f"{folder} has images outside the class folders; move them into one or away"
            )
        empty = [class_name for class_name in self.class_names if not counts.get(class_name)]
        if name != "val" and empty:
            raise UserError(f"no images in {folder / empty[0]}; fill or remove that class folder")
        labels = None
        if name != "pretrain":
            numbers = [self.class_names.index(class_name) for class_name in counts]
            labels = np.repeat(numbers, list(counts.values())).astype(np.int64)
        images = "val" if name == "val" else "train"
        return self._split(name, images, digests, labels, self._decoder(paths), paths)


class Images(Folder):
    """Every image under ROOT as "pretrain", whatever the folders are called, for stage=predict."""

    class_names = ()

    def _list(self, name: str) -> Split:
        paths, digests, _ = list_tree(Path(self.root), key="stage.images")
        split = self._split(name, "all", digests, None, self._decoder(paths), paths)
        return replace(split, name=Path(self.root).name or "images")  # as the person calls it
