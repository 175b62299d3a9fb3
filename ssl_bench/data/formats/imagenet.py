"""ImageNet as its archives, and Kaggle's, unpack it."""

import csv
import functools
import os
import re
from pathlib import Path

import numpy as np

from ssl_bench.data.formats.base import folder_at
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.formats.listing import subfolders
from ssl_bench.data.store import Split
from ssl_bench.errors import UserError

WNID = re.compile(r"n\d{8}")
NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})(\.JPEG)?", re.IGNORECASE)
BELOW = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # of ROOT, where train/ and val/ may be
SOLUTION = "LOC_val_solution.csv"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
DEVKIT = "ILSVRC2012_devkit_t12/data"


class ImageNet(Folder):
    """ImageNet-1k (ILSVRC 2012), or some of its classes: ROOT/train/WNID/*.JPEG and ROOT/val.

    val/ has the folders of train/, or all images side by side, and their classes in Kaggle's
    SOLUTION or in the devkit's TRUTH and META. Classes are numbered in the sorted order of their
    WNIDs, as torchvision numbers them (and not by the devkit's ILSVRC2012_ID).
    """

    kind = "folder"  # the same packed images serve both

    def _top(self) -> Path:
        root = folder_at(self.root)
        for below in BELOW:
            if any(name.casefold() == "train" for name in subfolders(root / below)):
                return root / below
        packed = sorted(path.name for path in root.glob("*.tar*"))
        advice = f"unpack {packed[0]}, or set" if packed else "set"
        raise UserError(
            f"no train/ in {root}, nor in {BELOW[1]} below it: {advice} data.root= to where "
            "train/WNID/*.JPEG are"
        )

    @functools.cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The WNIDs."""
        train = self._part("train")
        names = subfolders(train)
        if wrong := [name for name in names if not WNID.fullmatch(name)]:
            raise UserError(
                f"{train} has the folder {wrong[0]!r}, which is no WNID such as n01440764; "
                "data=folder takes classes of any name"
            )
        if not names:
            packed = sorted(path.name for path in train.glob("n*.tar"))
            what = f"{packed[0]}: unpack each archive into" if packed else "no folders: it needs"
            raise UserError(f"{train} has {what} a folder for each class, n01440764/ and so on")
        return names

    def _list(self, name: str) -> Split:
        folder = self._part("val")
        if name != "val" or subfolders(folder):
            return super()._list(name)
        if not folder.is_dir():
            raise UserError(
                f"no val/ in {self._top()}; unpack ILSVRC2012_img_val.tar there, and stages that "
                "measure can use it"
            )
        paths, digests, _ = self._listed(folder, None)
        labels = self._truth(folder, [os.path.basename(paths(i)) for i in range(len(paths))])
        return self._split(name, "val", digests, labels, self._decoder(paths), paths)

    def _truth(self, folder: Path, images: list[str]) -> np.ndarray:
        """int64 (N,): the class numbers of these images of a flat val/."""
        root = Path(self.root)
        places = [root, self._top(), folder, root / "data", root / DEVKIT]
        found = [place / name for name in (SOLUTION, TRUTH) for place in places]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            raise UserError(
                f"{folder} has no WNID folders, and no ground truth is in {root}: put {SOLUTION} "
                f"(Kaggle) there, or {TRUTH} with {META} of ILSVRC2012_devkit_t12"
            )
        known = _solution(path) if path.name == SOLUTION else _devkit(path)
        numbers = {wnid: number for number, wnid in enumerate(self.class_names)}
        labels = np.zeros(len(images), np.int64)
        for i, image in enumerate(images):
            if (match := NUMBERED.fullmatch(image)) is None:
                raise UserError(
                    f"{folder} has {image}, and a flat val/ holds ILSVRC2012_val_00000001.JPEG "
                    "and so on: move it away, or sort all into WNID folders"
                )
            wnid = known.get(int(match[1]))
            if wnid is None:
                raise UserError(f"{path} says no class of {image}: it belongs to other images")
            if wnid not in numbers:
                raise UserError(
                    f"{path} says that {image} is of class {wnid}, which train/ lacks: val/ needs "
                    "the same classes"
                )
            labels[i] = numbers[wnid]
        return labels


def _solution(path: Path) -> dict[int, str]:
    """{number of an image of val: WNID}, of Kaggle's file."""
    known = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        if next(rows, [])[:2] != ["ImageId", "PredictionString"]:
            raise UserError(f"{path} doesn't begin with ImageId,PredictionString: is it Kaggle's?")
        for line, row in enumerate(rows, start=2):
            match = NUMBERED.fullmatch(row[0]) if len(row) == 2 else None
            wnid = row[1].partition(" ")[0] if match else ""  # then the corners of a box
            if match is None or not WNID.fullmatch(wnid):
                raise UserError(
                    f"line {line} of {path} is '{','.join(row)[:60]}'; expected an image and its "
                    "WNID: ILSVRC2012_val_00000001,n01751748 ..."
                )
            known[int(match[1])] = wnid
    return known


def _devkit(path: Path) -> dict[int, str]:
    """{number of an image of val: WNID}, of the devkit's list and the table beside it."""
    meta = path.with_name(META)
    if not meta.is_file():
        raise UserError(
            f"{path} has the devkit's own numbers of classes, and {META}, which says what they "
            "mean, isn't beside it: put it there"
        )
    wnids = _wnids(meta)
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    known = {}
    for number, text in enumerate(lines, start=1):
        if not text.isdecimal() or int(text) not in wnids:
            raise UserError(
                f"line {number} of {path} is '{text[:40]}', which is no ILSVRC2012_ID of {meta}"
            )
        known[number] = wnids[int(text)]
    return known


def _wnids(meta: Path) -> dict[int, str]:
    """{ILSVRC2012_ID: WNID} of the devkit's table, of classes without subclasses."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in np.atleast_1d(synsets)
            if row["num_children"] == 0
        }
    except Exception as error:  # scipy raises many types for a file that isn't MATLAB's
        raise UserError(
            f"{meta} isn't the devkit's table of classes ({type(error).__name__}): copy it again"
        ) from None
