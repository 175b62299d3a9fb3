"""The main road: PNG files in the dl21 layout, pretrained on and classified, by the commands that a
user types.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image

from ssl_bench.backbones.resnet import resnet18
from ssl_bench.data.formats.dl21 import DL21
from ssl_bench.data.source import HostSource
from ssl_bench.data.synthetic import render, write_dl21

# past 10: 10.png comes before 2.png in the order of names
COUNTS = {"unlabeled": 23, "train": 12, "val": 11}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Synthetic images, with labels that don't follow their pattern so that a wrong order shows."""
    root = tmp_path / "data"
    sizes = {f"num_{folder}": count for folder, count in COUNTS.items()}
    write_dl21(root, **sizes, num_classes=5, image_size=16, num_request=7, workers=1)
    shuffled = torch.Generator().manual_seed(0)
    for folder in ("train", "val"):
        labels = torch.randint(5, (COUNTS[folder],), generator=shuffled)
        labels[:5] = torch.arange(5)
        torch.save(labels, root / f"{folder}_label_tensor.pt")
    return root


def pixels(root: Path, folder: str, index: int) -> np.ndarray:
    return np.asarray(Image.open(root / folder / f"{index}.png"))


@pytest.mark.parametrize(
    ("split", "folder"), [("pretrain", "unlabeled"), ("train", "train"), ("val", "val")]
)
def test_batches_hold_the_pixels_and_labels_of_their_files(
    root: Path, split: str, folder: str
) -> None:
    store = DL21(str(root), image_size=16, workers=1).open(split)
    labels = np.full(COUNTS[folder], -1)
    if split != "pretrain":
        labels = torch.load(root / f"{folder}_label_tensor.pt", weights_only=True).numpy()
    source = HostSource(store.images, store.labels, store.indices, batch_size=4, seed=3)
    seen = []
    for _, images, batch_labels, indices in source.stream(0, source.steps_per_epoch):
        for image, label, index in zip(images, batch_labels, indices.tolist(), strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(root, folder, index))
            assert label == labels[index]
            seen.append(index)
    assert len(set(seen)) == len(seen) == COUNTS[folder] // 4 * 4
    assert seen != sorted(seen)


def test_requested_labels_come_after_train_in_the_order_of_their_file(root: Path) -> None:
    store = DL21(
        str(root), image_size=16, extra_labels="request_00.csv,label_00.pt", workers=1
    ).open("train")
    requested = [int(line) for line in (root / "request_00.csv").read_text().split()]
    labels = torch.load(root / "label_00.pt", weights_only=True)
    assert len(store.images) == len(store.labels) == COUNTS["train"] + 7
    assert requested != sorted(requested)
    for row, (index, label) in enumerate(
        zip(requested, labels.tolist(), strict=True), start=COUNTS["train"]
    ):
        assert np.array_equal(store.images[row], pixels(root, "unlabeled", index))
        assert store.labels[row] == label == render(0, "pretrain", index, 16, 5)[1]


TINY = [
    "data=dl21",
    "data.root=data",
    "backbone.width=8",
    "augmentation.image_size=32",
    "batch_size=50",
]


@pytest.mark.slow
def test_the_road(ssl_bench: Command, tmp_path: Path) -> None:
    sizes = ["data.num_unlabeled=600", "data.num_train=200", "data.num_val=200"]
    ssl_bench(
        "stage=synthesize",
        "data=synthetic",
        "stage.out=data",
        "stage.num_request=100",
        *sizes,
        check=True,
    )
    assert len(list((tmp_path / "data" / "unlabeled").iterdir())) == 600

    pretrain = ["stage=pretrain", *TINY, "method.queue_size=512", "log_every=4"]
    first = ssl_bench(*pretrain, "epochs=2", "dir=pretrained", check=True)
    assert "packing pretrain: 600 images" in first.stderr
    # to judge the features by, while they are learnt
    assert "packing train: 200 images" in first.stderr
    assert "600 images, 12 steps an epoch" in first.stderr
    lines = [
        json.loads(line)
        for line in (tmp_path / "pretrained" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(4, 25, 4))
    assert lines[-1].keys() >= {
        "epoch",
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "images_per_second",
        "data_wait",
    }
    again = ssl_bench(*pretrain, "epochs=1", "dir=again", check=True)
    assert "packing" not in again.stderr

    classify = [
        "stage=lincls",
        *TINY,
        "pretrained=pretrained",
        "stage.normalize=true",
        "optimizer.base_lr=1",
    ]
    plain = ssl_bench(*classify, "epochs=2", "dir=plain", check=True)
    assert (
        f"loaded all {len(resnet18(width=8).state_dict())} tensors of the backbone from pretrained"
        in plain.stderr
    )
    assert "packing train" not in plain.stderr
    assert "packing val: 200 images" in plain.stderr
    assert " 200 images, 4 steps an epoch" in plain.stderr
    summary = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert summary.keys() >= {"val_top1", "val_top5", "val_loss"}
    assert 0 <= summary["val_top1"] <= summary["val_top5"] <= 100

    more = ssl_bench(
        *classify,
        "data.extra_labels=request_00.csv,label_00.pt",
        "epochs=1",
        "dir=more",
        check=True,
    )
    assert " 300 images, 6 steps an epoch" in more.stderr
    assert "packing train: 300 images" in more.stderr
    assert "packing val" not in more.stderr
