"""data=imagenet: the trees that unpacking gives, and the ground truth of a flat val/."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from photograph_sets import WNIDS, samples, write_tree
from scipy.io import savemat

from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.formats.imagenet import ImageNet
from ssl_bench.errors import UserError

# in another order than that of the WNIDs, as the devkit's are
DEVKIT = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[3], 4: WNIDS[1]}
CLASSES = [2, 0, 0, 3, 1]  # of the images of val, in their order


def write_meta(path: Path) -> None:
    """The devkit's table: classes, and one that has subclasses."""
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in DEVKIT.items()]
    rows.append((5, "n00001740", "entity", "gloss", 3))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    synsets = np.array(rows, [*kinds, ("num_children", "O")]).reshape(-1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": synsets})


def write_solution(path: Path, classes: list[int] = CLASSES) -> None:
    """Kaggle's: in no order, a box or several for an image."""
    lines = [
        f"ILSVRC2012_val_{number:08},{WNIDS[label]} 85 1 499 272 {WNIDS[label]} 1 2 3 4 \n"
        for number, label in enumerate(classes, start=1)
    ]
    path.write_text("ImageId,PredictionString\n" + "".join(reversed(lines)))


def write_devkit(folder: Path) -> None:
    write_meta(folder / "meta.mat")
    numbers = {wnid: number for number, wnid in DEVKIT.items()}
    lines = [f"{numbers[WNIDS[label]]}\n" for label in CLASSES]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))


def write_flat(folder: Path) -> None:
    folder.mkdir(parents=True)
    by_class = {label: data for _, data, label in samples("val", 1)}
    for number, label in enumerate(CLASSES, start=1):
        (folder / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(by_class[label])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/WNID and a flat val/, without ground truth."""
    write_tree(tmp_path / "imagenet/train", samples("train", 2))
    write_flat(tmp_path / "imagenet/val")
    return tmp_path / "imagenet"


def data_of(root: Path, **options) -> ImageNet:
    return ImageNet(str(root), cache=str(root.parent / "cache"), workers=1, **options)


def fails(message: str, root: Path, split: str = "val") -> None:
    with pytest.raises(UserError, match=message) as raised:
        data_of(root).split(split)
    assert "\n" not in str(raised.value)


def test_val_in_folders_is_what_folder_reads(root: Path) -> None:
    """Also the packed images are shared."""
    shutil.rmtree(root / "val")
    write_tree(root / "val", samples("val", 1))
    data, folder = data_of(root), Folder(str(root), cache=str(root.parent / "cache"))
    assert data.class_names == list(WNIDS)
    assert data.num_classes == 4
    for name in ("pretrain", "train", "val"):
        ours, theirs = data.split(name), folder.split(name)
        assert (ours.fingerprint, ours.store_name) == (theirs.fingerprint, theirs.store_name)
    assert data.split("val").labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("place", ["kaggle", "devkit", "devkit unpacked", "in val"])
def test_a_flat_val_with_its_ground_truth(root: Path, place: str) -> None:
    """The devkit's numbers aren't ours."""
    if place == "kaggle":
        write_solution(root / "LOC_val_solution.csv")
    elif place == "in val":
        write_solution(root / "val/LOC_val_solution.csv")
    else:
        write_devkit(root / ("ILSVRC2012_devkit_t12/data" if "unpacked" in place else ""))
    data = data_of(root)
    split = data.split("val")
    assert split.labels.tolist() == CLASSES
    images = dict(enumerate(data for _, data, _ in samples("val", 1)))
    for index, label in enumerate(CLASSES):
        assert split.file(index) == images[label]
        assert split.where(index).endswith(f"ILSVRC2012_val_{index + 1:08}.JPEG")
    assert data.split("train").labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("typed", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree(root: Path, tmp_path: Path, typed: str) -> None:
    top = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    top.parent.mkdir(parents=True)
    root.rename(top)
    (top / "test").mkdir()
    write_solution(tmp_path / "kaggle" / typed / "LOC_val_solution.csv")
    data = data_of(tmp_path / "kaggle" / typed)
    assert data.split("pretrain").length == 8
    assert data.split("val").labels.tolist() == CLASSES


def test_a_copy_is_the_same_and_other_labels_are_not(root: Path, tmp_path: Path) -> None:
    write_solution(root / "LOC_val_solution.csv")
    shutil.copytree(root, tmp_path / "copy/there")
    here, there = (data_of(at).split("val") for at in (root, tmp_path / "copy/there"))
    assert here.fingerprint == there.fingerprint
    write_solution(root / "LOC_val_solution.csv", [*CLASSES[:-1], 0])
    assert data_of(root).split("val").fingerprint != here.fingerprint


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    fails(r"no WNID folders, and no ground truth is in .*: put LOC_val_solution\.csv", root)
    assert data_of(root).split("pretrain").length == 8  # which needs none
    truth = root / "ILSVRC2012_validation_ground_truth.txt"
    write_devkit(root)
    (root / "meta.mat").unlink()
    fails("meta.mat, which says what they mean, isn't beside it", root)
    (root / "meta.mat").write_bytes(b"MATLAB 5.0")
    fails(r"meta\.mat isn't the devkit's table of classes", root)
    write_devkit(root)
    truth.write_text(truth.read_text().replace("1\n", "5\n"))  # a class with subclasses
    fails(r"line 1 of .*ground_truth.txt is '5', which is no ILSVRC2012_ID", root)
    truth.write_text("1\n2\n")
    fails(r"says no class of ILSVRC2012_val_00000003\.JPEG", root)
    (root / "val/A.JPEG").write_bytes(b"")
    fails(r"has A\.JPEG, and a flat val/ holds ILSVRC2012_val_00000001", root)
    shutil.rmtree(root / "val")
    fails(r"no val/ in .*; unpack ILSVRC2012_img_val\.tar there", root)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/ILSVRC2012_img_train.tar").touch()
    fails(r"no train/ in .*: unpack ILSVRC2012_img_train\.tar", tmp_path / "empty")


def test_wrong_ground_truth_is_named(root: Path) -> None:
    solution = root / "LOC_val_solution.csv"
    solution.write_text("image,label\n")
    fails(r"doesn't begin with ImageId,PredictionString", root)
    solution.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,57\n")
    fails(r"line 2 of .* is 'ILSVRC2012_val_00000001,57'; expected an image and its WNID", root)
    write_solution(solution, CLASSES[:-1])
    fails(r"says no class of ILSVRC2012_val_00000005\.JPEG", root)
    write_solution(solution)
    shutil.rmtree(root / "train" / WNIDS[1])
    fails(rf"is of class {WNIDS[1]}, which train/ lacks", root)


def test_train_is_folders_of_wnids(root: Path) -> None:
    (root / "train/cats").mkdir()
    fails(r"has the folder 'cats', which is no WNID such as n01440764; data=folder", root, "train")
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train/n01440764.tar").touch()
    fails(r"has n01440764\.tar: unpack each archive into a folder for each class", root, "train")
