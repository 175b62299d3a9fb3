"""Where large data lives: the same photographs give the same result from each place."""

import json
import re
from pathlib import Path

import pytest
from conftest import Command
from photograph_sets import WNIDS, rows_of, samples, write_shards, write_tree

SHOWN = ["augmentation.image_size=32", "backbone.width=8", "batch_size=8", "tracking=local"]
PRETRAIN = ["stage=pretrain", *SHOWN, "method.queue_size=16", "method.bn_splits=1", "epochs=1"]
PRETRAIN += ["log_every=1"]
DATA = {
    "folder": ["data.root=tree"],
    "imagenet": ["data.root=tree"],
    "webdataset": ["data.root=shards", "data.train=train-*.tar", "data.val=val-*.tar"],
    "huggingface": ["data.root=saved"],
    "parquet": ["data.root=hub", "data.val=data/validation-*.parquet"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes in each layout, the images in one order."""
    root = tmp_path_factory.mktemp("places")
    some = {"train": samples("train", 6), "val": samples("val", 3)}
    for split in some:
        write_tree(root / "tree" / split, some[split])
        write_shards(root / "shards", split, some[split])
    return root


def save(root: Path) -> None:
    """The same by Hugging Face's own library."""
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=list(WNIDS))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    made = {
        name: datasets.Dataset.from_dict(rows_of(samples(split, count)), features=features)
        for name, split, count in (("train", "train", 6), ("validation", "val", 3))
    }
    datasets.DatasetDict(made).save_to_disk(root / "saved")
    (root / "hub/data").mkdir(parents=True)
    for name, rows in made.items():
        rows.to_parquet(root / f"hub/data/{name}-00000-of-00001.parquet", batch_size=5)


def last_line(run: Path) -> dict[str, float]:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: line[key] for key in ("loss", "knn_top1", "probe_top1")}


@pytest.fixture
def here(places: Path, tmp_path: Path) -> Path:
    for path in places.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def expected(ssl_bench: Command, here: Path) -> dict[str, float]:
    ssl_bench(*PRETRAIN, "data=folder", *DATA["folder"], "dir=by-folder", check=True)
    return last_line(here / "by-folder")


@pytest.mark.parametrize("kind", ["imagenet", "webdataset", "huggingface", "parquet"])
def test_each_gives_what_folder_gives(
    ssl_bench: Command, here: Path, expected: dict[str, float], kind: str
) -> None:
    """Packed and streamed, in a pretraining and in an evaluation; shards are as good as packed."""
    if kind in ("huggingface", "parquet"):
        save(here)
    data = [f"data={'huggingface' if kind == 'parquet' else kind}", *DATA[kind]]
    said = ssl_bench(*PRETRAIN, *data, "dir=run", check=True).stderr
    by_itself = "where they are, indexed in" if kind == "webdataset" else "packed in"
    assert re.search(rf"pretrain: 24 pictures as they are, [\d.]+ [kM]B, {by_itself}", said)
    assert last_line(here / "run") == expected
    said = ssl_bench(*PRETRAIN, *data, "dir=host", "source=host", check=True).stderr
    assert re.search(r"pretrain: 24 pictures as they are, [\d.]+ [kM]B, packed in", said)
    assert last_line(here / "host") == expected
    said = ssl_bench(*PRETRAIN, *data, "dir=streamed", "source=streamed", check=True).stderr
    assert re.search(
        r"pretrain: 24 pictures as they are, [\d.]+ [kM]B, where they are, indexed in", said
    )
    assert ("type source=host, and data.cache=" in said) == (kind == "parquet")
    assert last_line(here / "streamed") == expected
    top1 = []
    for words in (["data=folder", *DATA["folder"]], data):
        knn = ["stage=knn", *words, *SHOWN, "pretrained=by-folder", f"dir=knn{len(top1)}"]
        ssl_bench(*knn, check=True)
        summary = json.loads((here / knn[-1].removeprefix("dir=") / "summary.json").read_text())
        top1.append(summary["val_top1"])
    assert top1[0] == top1[1]
    squares = ["data.image_size=32", "dir=squares", "eval_every=0"]
    said = ssl_bench(*PRETRAIN, *data, *squares, check=True).stderr
    assert re.search(r"pretrain: 24 images, [\d.]+ [kM]B, on", said)


def test_a_mistake_is_one_line(ssl_bench: Command, here: Path) -> None:
    for words, line in (
        (["data=webdataset", "data.root=shards"], "data=webdataset has no shards for 'pretrain'"),
        (["data=imagenet", "data.root=shards"], "no train/ in shards, nor in ILSVRC/Data/CLS-LOC"),
    ):
        said = ssl_bench(*PRETRAIN, *words, "dir=run")
        assert said.returncode == 2
        assert line in said.stderr
        assert "Traceback" not in said.stderr


def test_an_unlabelled_pretraining_on_shards(ssl_bench: Command, here: Path) -> None:
    """A range in quotes, as it is typed; the folder may move."""
    words = [*PRETRAIN, "data=webdataset", 'data.pretrain="train-{000..001}.tar"', "dir=run"]
    said = ssl_bench(*words, "data.root=shards", check=True).stderr
    assert "pretrain: 16 pictures as they are" in said
    assert "no labels, so knn_top1 and probe_top1 won't be logged" in said
    (here / "shards").rename(here / "moved")
    again = ssl_bench(*words, "data.root=moved", check=True).stderr
    assert "finished" in again
