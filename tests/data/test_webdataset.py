"""data=webdataset: what shards hold, how a list of it is kept, damaged shards."""

import gzip
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from photograph_sets import Sample, samples, write_shards, write_tar

from ssl_bench.data.formats import patterns
from ssl_bench.data.formats.webdataset import WebDataset
from ssl_bench.errors import UserError


@pytest.fixture(scope="module")
def some() -> list[Sample]:
    return samples("train", 3)


@pytest.fixture
def root(tmp_path: Path, some: list[Sample]) -> Path:
    write_shards(tmp_path / "shards", "train", some)
    write_shards(tmp_path / "shards", "val", samples("val", 1), shards=1)
    return tmp_path / "shards"


def data_of(root: Path, **options) -> WebDataset:
    options = {"train": "train-*.tar", "val": "val-*.tar"} | options
    return WebDataset(str(root), cache=str(root.parent / "cache"), workers=1, **options)


def fails(message: str, root: Path, split: str = "train", **options) -> None:
    with pytest.raises(UserError, match=message) as raised:
        data_of(root, **options).split(split)
    assert "\n" not in str(raised.value)


def test_the_files_own_bytes_and_labels(root: Path, some: list[Sample]) -> None:
    """From where they lie in their shards, and packed."""
    data = data_of(root)
    assert data.num_classes == 4
    train, pretrain, val = (data.split(name) for name in ("train", "pretrain", "val"))
    assert train.labels.tolist() == [label for *_, label in some]
    assert (pretrain.labels, pretrain.store_name) == (None, train.store_name)
    assert val.labels.tolist() == [0, 1, 2, 3]
    assert train.nbytes == sum(len(image) for _, image, _ in some)
    for index, (name, image, _) in enumerate(some):
        assert train.file(index) == image
        assert train.where(index) == f"{root}/train-{index // 4:03}.tar/{name}.jpg"
    for packed in (True, False):
        store = data.open_encoded("train", packed)
        assert store.is_packed == packed
        assert [bytes(store.read(row)) for row in range(12)] == [image for _, image, _ in some]
    squares = data_of(root, image_size=24).open("train")
    assert squares.images.shape == (12, 24, 24, 3)
    assert squares.images[0].std() > 10


def test_patterns(root: Path) -> None:
    """Each shard once, in the order that was typed."""

    def names(*typed: str) -> list[str]:
        found = patterns.matching(root, list(typed), ".tar", "data.train")
        return [path.name for path in found]

    every = [f"train-{number:03}.tar" for number in range(3)]
    assert names("train-*.tar") == names("train-{000..002}.tar") == every
    assert names("train-001.tar", "train-{000..001}.tar") == [every[1], every[0]]
    assert names(".") == [*every, "val-000.tar"]
    assert names(str(root / "val-*.tar")) == ["val-000.tar"]
    assert list(patterns.ranged("a{8..10}-{0..1}")) == [
        f"a{number}-{other}" for number in (8, 9, 10) for other in (0, 1)
    ]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("test-*.tar", r"data\.train=test-\*\.tar: no file .*; type a file, a glob"),
        ("train-{000..003}.tar", r"no file .*/train-003\.tar"),
        ("https://x/train-{0..9}.tar", r"a disk or a mounted file system: fetch them"),
        ("*.tar", r"val-000\.tar is of data\.val= and of data\.train="),
    ],
)
def test_patterns_that_name_no_file(root: Path, typed: str, message: str) -> None:
    fails(message, root, "val" if typed == "*.tar" else "train", train=typed)


def test_no_patterns(root: Path) -> None:
    fails(r"no shards for 'val': .*: data\.val='val-\*\.tar'", root, "val", val=None)
    nothing = {"train": None, "val": None}
    fails(r"data\.train='train-\*\.tar', or data\.pretrain=", root, "pretrain", **nothing)
    data = data_of(root, pretrain="*.tar", **nothing)
    assert data.num_classes is None
    assert (data.split("pretrain").length, data.split("pretrain").labels) == (16, None)


def test_members_as_the_library_groups_them(
    tmp_path: Path, some: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    """Labels before or behind, in folders, upper case; what is passed over is told."""
    (_, one, _), (_, two, _), *_ = some
    files = [
        ("a/x.cls", b"1\n"),
        ("a/x.JPG", one),
        ("a/x.seg.png", b"mask"),
        ("b/x.jpg", two),
        ("b/x.txt", b"a fish"),
        ("b/x.json", b'{"cls": 0, "other": 7}'),
        ("c.cls", b"5"),
        (".hidden", b""),
    ]
    write_tar(tmp_path / "shards/0.tar", files)
    with caplog.at_level("INFO"):
        split = data_of(tmp_path / "shards", train="0.tar").split("train")
    assert split.labels.tolist() == [1, 0]
    assert [split.file(0), split.file(1)] == [one, two]
    for kind in (".seg.png", ".txt", "file without an image", "file not named"):
        assert f"{kind}" in caplog.text
    fails(
        "a/x.JPG has no label: a .json with 'other'", tmp_path / "shards", train=".", label="other"
    )


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ((), r"x\.jpg has no label: a \.cls, or a \.json with 'label' or 'cls', must follow"),
        ((("y.cls", b"1"),), r"x\.jpg has no label"),
        ((("x.cls", b"cat"),), r"its label is no class number from 0; type data\.label="),
        ((("x.cls", b"-1"),), r"its label is no class number"),
        ((("x.json", b'{"label": 1.5}'),), r"its label is no class number"),
        ((("x.json", b'{"label": '),), r"its label is no class number"),
        ((("x.png", b"1"),), r"x\.jpg and x\.png are one sample, of two images"),
        ((("x.jpg", b"1"),), r"holds x\.jpg twice"),
    ],
)
def test_labels_are_checked(
    tmp_path: Path, some: list[Sample], beside: tuple, message: str
) -> None:
    write_tar(tmp_path / "shards/0.tar", [("x.jpg", some[0][1]), *beside])
    fails(message, tmp_path / "shards", train="0.tar")
    if "label" in message:
        split = data_of(tmp_path / "shards", train="0.tar").split("pretrain")
        assert split.length == 1


def test_val_has_the_classes_of_train(root: Path, some: list[Sample]) -> None:
    write_tar(root / "val-000.tar", [("x.jpg", some[0][1]), ("x.cls", b"4")])
    fails(r"x\.jpg has label 4, and those of data\.train= end at 3", root, "val")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, 5000), r"train-001\.tar is no whole tar file \(unexpected end"),
        # between two members, where tarfile alone sees the end
        (lambda path: cut(path, _end_of_a_member(path)), r"001\.tar is no whole .*ends or is dam"),
        (lambda path: cut(path, 0), r"001\.tar is no whole tar file"),
        (lambda path: path.write_bytes(b"<html>404</html>" * 99), r"001\.tar is no whole tar file"),
        (lambda path: _overwrite(path), r"001\.tar is no whole tar file .* damaged at byte [1-9]"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), r"001\.tar is compr"),
    ],
)  # fmt: skip
def test_damaged_shards_are_named(root: Path, damage, message: str) -> None:
    damage(root / "train-001.tar")
    fails(message, root)
    fails(message, root, "pretrain", on_error="skip")


def _end_of_a_member(path: Path) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[2].offset


def _overwrite(path: Path) -> None:
    """Another header than the first."""
    with open(path, "r+b") as file:
        file.seek(_end_of_a_member(path))
        file.write(b"\1" * 512)


def test_a_damaged_image_is_named_by_its_shard(root: Path, some: list[Sample]) -> None:
    files = [("x.jpg", some[0][1][:3000]), ("x.cls", b"0"), ("y.jpg", some[1][1]), ("y.cls", b"0")]
    write_tar(root / "train-000.tar", files)
    with pytest.raises(UserError, match=r"cannot decode .*train-000\.tar/x\.jpg"):
        data_of(root).open_encoded("train", packed=True)
    store = data_of(root, on_error="skip").open_encoded("train", packed=True)
    assert list(store.skipped) == [0]


def test_the_list_is_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until a shard changes; a damaged list is made anew."""

    def said() -> bool:
        caplog.clear()
        with caplog.at_level("INFO"):
            assert data_of(root).split("train").labels.tolist() == labels
        return "listing 'train': 3 shards" in caplog.text

    labels = data_of(root).split("train").labels.tolist()
    assert not said()
    (kept,) = [path for path in (root.parent / "cache").glob("webdataset-*.npz")]
    data = bytearray(kept.read_bytes())
    data[200] ^= 255
    kept.write_bytes(data)
    assert said()
    assert not said()
    shutil.copy(root / "train-001.tar", root / "new")  # with another time
    (root / "new").rename(root / "train-001.tar")
    assert said()


def test_a_copy_is_the_same_wherever_its_shards_begin(
    root: Path, tmp_path: Path, some: list[Sample]
) -> None:
    fingerprint = data_of(root).split("train").fingerprint
    shutil.copytree(root, tmp_path / "copy/there")
    assert data_of(tmp_path / "copy/there").split("train").fingerprint == fingerprint
    write_shards(tmp_path / "other", "train", some, shards=2)
    assert data_of(tmp_path / "other").split("train").fingerprint == fingerprint
    other = [*some[:-1], (*some[-1][:2], 0)]
    write_shards(tmp_path / "others", "train", other)
    assert data_of(tmp_path / "others").split("train").fingerprint != fingerprint


def test_a_shard_that_became_shorter_is_told(root: Path) -> None:
    data = data_of(root)
    split = data.split("train")
    cut(root / "train-002.tar", 3000)
    with pytest.raises(UserError, match=r"train-002\.tar.*shorter than it was when it was listed"):
        data.open_encoded("train", packed=False)
    (root / "train-002.tar").unlink()
    with pytest.raises(UserError, match="cannot read an image"):
        data.open_encoded("train", packed=False)
    assert split.length == 12


def test_workers_get_little_and_import_no_torch(root: Path) -> None:
    """1.28 million members are arrays of 72 MB, which workers share."""
    read = data_of(root).split("train").encoded
    buffers: list = []
    job = pickle.dumps(read, protocol=5, buffer_callback=buffers.append)
    # a row, where its name ends, and the name itself
    assert sum(len(buffer.raw()) for buffer in buffers) <= 12 * (28 + 8 + 24) + 8
    assert len(job) < 2000
    script = (
        "import pickle, sys; read = pickle.load(sys.stdin.buffer)\n"
        "print(len(read(0)), {'torch', 'PIL.Image'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(read), capture_output=True, check=True
    )
    assert result.stdout.decode().split() == [str(len(read(0))), "set()"]


def test_json_needs_no_key_of_ours(tmp_path: Path, some: list[Sample]) -> None:
    files = []
    for number, (name, image, label) in enumerate(some):
        known = json.dumps({"class_index": label, "label": "fish"}).encode()
        files += [(f"{name}.jpg", image), (f"{name}.json", known), (f"{name}.cls", b"%d" % number)]
    write_tar(tmp_path / "shards/0.tar", files)
    split = data_of(tmp_path / "shards", train="0.tar", label="class_index").split("train")
    assert np.array_equal(split.labels, [label for *_, label in some])
