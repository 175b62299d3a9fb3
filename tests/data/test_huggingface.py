"""data=huggingface: folders that `datasets` saved, parquet files, what is wrong in them."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from photograph_sets import WNIDS, Sample, rows_of, samples

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

from ssl_bench.data.formats import huggingface  # noqa: E402
from ssl_bench.data.formats.huggingface import HuggingFace  # noqa: E402
from ssl_bench.errors import UserError  # noqa: E402

FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(WNIDS))}
)


def made(some: list[Sample]) -> "datasets.Dataset":
    return datasets.Dataset.from_dict(rows_of(some), features=FEATURES)


@pytest.fixture(scope="module")
def some() -> list[Sample]:
    return samples("train", 3)


@pytest.fixture
def saved(tmp_path: Path, some: list[Sample]) -> Path:
    splits = {"train": made(some), "validation": made(samples("val", 1))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    return tmp_path / "saved"


@pytest.fixture
def hub(tmp_path: Path, some: list[Sample]) -> Path:
    """As the hub has it: groups of few rows, here five."""
    folder = tmp_path / "hub/data"
    folder.mkdir(parents=True)
    made(some[:7]).to_parquet(folder / "train-00000-of-00002.parquet", batch_size=5)
    made(some[7:]).to_parquet(folder / "train-00001-of-00002.parquet", batch_size=5)
    made(samples("val", 1)).to_parquet(folder / "validation-00000-of-00001.parquet")
    return tmp_path / "hub"


def data_of(root: Path, **options) -> HuggingFace:
    return HuggingFace(str(root), cache=str(root.parent / "cache"), workers=1, **options)


def fails(message: str, root: Path, split: str = "train", **options) -> None:
    with pytest.raises(UserError, match=message) as raised:
        data_of(root, **options).split(split)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_the_files_own_bytes_and_labels(
    request: pytest.FixtureRequest, kind: str, some: list[Sample]
) -> None:
    """In any order; from where they lie, and packed."""
    root = request.getfixturevalue(kind)
    data = data_of(root)
    assert (data.num_classes, list(data.class_names)) == (4, list(WNIDS))
    train, pretrain, val = (data.split(name) for name in ("train", "pretrain", "val"))
    assert train.labels.tolist() == [label for *_, label in some]
    assert (pretrain.labels, pretrain.store_name) == (None, train.store_name)
    assert val.labels.tolist() == [0, 1, 2, 3]
    for index in (11, 0, 6, 7, 3, *range(12)):
        assert train.file(index) == some[index][1]
    assert all(train.where(index).startswith(f"image {index} of ") for index in range(6))
    assert "00001-of-00002." in train.where(11)
    assert data.reads_singly("train") == (kind == "saved")
    for packed in (True, False):
        store = data.open_encoded("train", packed)
        assert store.is_packed == packed
        assert [bytes(store.read(row)) for row in range(12)] == [image for _, image, _ in some]
    squares = data_of(root, image_size=24).open("train")
    assert squares.images.shape == (12, 24, 24, 3)
    assert squares.images[0].std() > 10


def test_groups_are_kept_within_bounds(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data_of(hub).split("train").read.files
    assert len(rows.groups) == 3
    rows.read(0)
    kept = rows._kept[0]
    assert rows.read(4)
    assert rows._kept == {0: kept}  # not read again
    rows.read(11)
    assert set(rows._kept) == {0, 2}
    monkeypatch.setattr(huggingface, "KEPT", 0)
    rows.read(6)
    assert set(rows._kept) == {1}


def test_a_single_data_set_is_its_split(tmp_path: Path, some: list[Sample]) -> None:
    made(some).save_to_disk(tmp_path / "one")
    assert data_of(tmp_path / "one").split("pretrain").length == 12
    fails(
        r"data\.val=validation: no such split in .*; it has train: type one of these",
        tmp_path / "one",
        "val",
    )


def test_splits_by_name_and_by_files(hub: Path, some: list[Sample]) -> None:
    length = {
        "train": 12,
        "validation": 4,
        "data/train-*.parquet": 12,
        "data/train-{00000..00001}-of-00002.parquet": 12,
        "data/train-00001-of-00002.parquet": 5,
    }
    for named, expected in length.items():
        assert data_of(hub, train=named).split("train").length == expected
    both = ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"]
    assert data_of(hub, train=both).split("train").file(0) == some[7][1]
    (hub / "data").rename(hub / "train")
    assert data_of(hub).split("pretrain").length == 16  # all parquet files of the folder
    (hub / "train").rename(hub / "plain_text")
    assert data_of(hub, train="plain_text/train-*.parquet").split("train").length == 12
    assert data_of(hub, pretrain="plain_text", train="none").split("pretrain").length == 16
    unlabelled = data_of(hub, pretrain="plain_text", train="none")
    assert (unlabelled.num_classes, unlabelled.class_names) == (None, [])


def test_what_is_not_there_is_named(hub: Path, saved: Path, tmp_path: Path) -> None:
    message = r"data\.val=test: no such split in .*; it has train, validation: type one of these"
    fails(message, hub, "val", val="test")
    fails(message, saved, "val", val="test")
    fails(r"data\.root= sets the folder, or the split's files", tmp_path, "train")
    fails(r"data\.train=x/\*\.parquet: no file", hub, train="x/*.parquet")
    fails(r"is of data\.val= and of data\.train=", hub, "val", val="data/*.parquet")


def test_columns(tmp_path: Path, some: list[Sample]) -> None:
    """Binary columns are images, too; plain integers labels."""
    root = tmp_path / "plain"
    root.mkdir()
    table = pa.table(
        {
            "jpg": pa.array([image for _, image, _ in some], pa.large_binary()),
            "thumbnail": [b"x"] * 12,
            "name": [name for name, *_ in some],
            "fine": pa.array([label for *_, label in some], pa.int32()),
            "bare": [0, None, *range(10)],
        }
    )
    pq.write_table(table, root / "train.parquet", row_group_size=4)
    data = data_of(root, image="jpg", label="fine")
    split = data.split("train")
    assert (data.num_classes, data.class_names) == (4, [])
    assert split.labels.tolist() == [label for *_, label in some]
    assert [split.file(index) for index in range(12)] == [image for _, image, _ in some]
    fails(r"which column has the images\? .*thumbnail \(binary\).*: type data\.image=", root)
    fails(r"data\.image=name\? .* type data\.image= one that has", root, image="name")
    jpg = {"image": "jpg"}
    fails(r"no column 'label', but jpg, .*: type data\.label=", root, **jpg)
    fails(r"column 'name' .* is of type string, .*class_encode_column", root, label="name", **jpg)
    fails(r"'bare' .* rows without a class number .*data\.pretrain=", root, label="bare", **jpg)
    assert data_of(root, **jpg).split("pretrain").length == 12
    assert data_of(root, **jpg).num_classes is None


def test_val_has_the_classes_of_train(hub: Path, some: list[Sample]) -> None:
    val = hub / "data/validation-00000-of-00001.parquet"
    names = datasets.ClassLabel(names=[*reversed(WNIDS)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    datasets.Dataset.from_dict(rows_of(some), features=features).to_parquet(val)
    fails(r"classes of column 'label' are others in data\.val= than in data\.train=", hub, "val")
    for path in (hub / "data").glob("*.parquet"):  # without the names
        table = pq.read_table(path).replace_schema_metadata()
        if path == val:
            column = pa.array([9, *[0] * 11], pa.int64())
            table = table.set_column(table.schema.get_field_index("label"), "label", column)
        pq.write_table(table, path)
    fails(r"image 0 of .* has label 9, and the classes of data\.train= end at 3", hub, "val")


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_damaged_files_are_named(request: pytest.FixtureRequest, kind: str) -> None:
    root = request.getfixturevalue(kind)
    pattern, what = (
        ("train/data-00001*", "Arrow") if kind == "saved" else ("data/train-00001*", "parquet")
    )
    (path,) = root.glob(pattern)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:-1000], whole[:4], b"<html>404</html>" * 9):
        path.write_bytes(damaged)
        fails(rf"00001-of-00002\.\w+ is no whole {what} file \(.*\): copy it again", root)


def test_damaged_states_are_named(saved: Path) -> None:
    (saved / "train/state.json").write_text("{}")
    fails(r"train/state\.json isn't what save_to_disk writes", saved)
    (saved / "train/state.json").write_text("{")
    fails(r"train/state\.json is damaged", saved)


def test_a_row_without_bytes_is_named(tmp_path: Path, some: list[Sample]) -> None:
    images = [{"bytes": None, "path": "/x.jpg"}, None, {"bytes": some[0][1], "path": None}]
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": images}), tmp_path / "rows/train.parquet")
    with pytest.raises(UserError, match=r"image 0 of .*train\.parquet \(it has no bytes, at most"):
        data_of(tmp_path / "rows").open_encoded("pretrain", packed=True)
    store = data_of(tmp_path / "rows", on_error="skip").open_encoded("pretrain", packed=True)
    assert list(store.skipped) == [0, 1]


def test_a_copy_is_the_same_and_other_labels_are_not(
    hub: Path, tmp_path: Path, some: list[Sample]
) -> None:
    fingerprint = data_of(hub).split("train").fingerprint
    shutil.copytree(hub, tmp_path / "copy/there")
    assert data_of(tmp_path / "copy/there").split("train").fingerprint == fingerprint
    made([*some[7:11], (*some[11][:2], 0)]).to_parquet(
        hub / "data/train-00001-of-00002.parquet", batch_size=5
    )
    assert data_of(hub).split("train").fingerprint != fingerprint


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_workers_get_names_alone_and_import_no_torch(
    request: pytest.FixtureRequest, kind: str
) -> None:
    read = data_of(request.getfixturevalue(kind)).split("train").encoded
    expected = read(5)
    job = pickle.dumps(read)  # after a read: what is open stays here
    assert len(job) < 2000
    script = (
        "import pickle, sys; read = pickle.load(sys.stdin.buffer)\n"
        "print(len(read(5)), {'torch', 'datasets'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], input=job, capture_output=True, check=True
    )
    assert result.stdout.decode().split() == [str(len(expected)), "set()"]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pyarrow package: pip install 'ssl_bench\[huggingface\]'"):
        data_of(tmp_path)


def test_large_groups_are_told(
    hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface, "LARGE", 1000)
    data_of(hub).split("train")
    assert "write it anew with row_group_size=100" in caplog.text
    assert np.array_equal(data_of(hub).split("val").labels, [0, 1, 2, 3])
