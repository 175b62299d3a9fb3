"""Inputs too small to mean anything: one class, one image in a batch, one left over."""

from pathlib import Path

import numpy as np
import pytest
from commands import compose
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch

NETWORK = [
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
    "data.workers=1",
    "device=cpu",
    "epochs=2",
]
PRETRAIN = ["stage=pretrain", "method.queue_size=8", "stage.online_images=0"]
EVALUATIONS = {
    "lincls": ["stage=lincls"],
    "cached": ["stage=lincls", "stage.features=cached"],
    "knn": ["stage=knn", "stage.k=[1]", "stage.temperatures=[0.07]"],
    "finetune": ["stage=finetune"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/: 9 and 9 images of one class; two/: of two classes, 9 and 8 of them to train on."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for data, classes in (("one", [9]), ("two", [9, 8])):
        for split in ("train", "val"):
            for name, count in zip("ab", classes, strict=False):
                place = root / data / split / name
                place.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                        place / f"{i}.png"
                    )
    return root


def run(folders: Path, data: str, directory: Path, *words: str) -> dict[str, float]:
    return launch(
        compose("data=folder", f"data.root={folders / data}", f"dir={directory}", *NETWORK, *words)
    )


@pytest.mark.parametrize(
    "words", [*EVALUATIONS.values(), ["stage=pretrain", "method=supervised"]], ids=" ".join
)
def test_one_class(folders: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(
        UserError, match="all 9 labelled images are of one class, and what tells nothing apart is"
    ):
        run(folders, "one", tmp_path / "run", *words, "batch_size=4")
    assert not (tmp_path / "run").exists()


ONE = [
    ([*PRETRAIN, "batch_size=1"], 2),
    ([*PRETRAIN, "batch_size=4", "method.bn_splits=4"], 8),
    (["stage=pretrain", "method=supervised", "batch_size=1"], 2),
    (["stage=finetune", "batch_size=1"], 2),
    (["stage=lincls", "stage.normalize=true", "batch_size=1"], 2),
]


@pytest.mark.parametrize(("words", "enough"), ONE)
def test_one_image_in_a_batch(folders: Path, tmp_path: Path, words: list[str], enough: int) -> None:
    with pytest.raises(
        UserError, match=rf"batch_size=\d: batch norm needs .*: choose batch_size={enough} or more"
    ):
        run(folders, "two", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
    run(folders, "two", tmp_path / "run", *words, f"batch_size={enough}")


@pytest.mark.parametrize("words", [*EVALUATIONS.values(), PRETRAIN], ids=" ".join)
@pytest.mark.parametrize("batch", [1, 16])
def test_one_image_alone(folders: Path, tmp_path: Path, words: list[str], batch: int) -> None:
    """17 images in batches of 16: one is left over; and one by one where no batch norm learns."""
    if batch == 1 and words[0] in ("stage=finetune", "stage=pretrain"):
        return
    result = run(folders, "two", tmp_path / "run", *words, f"batch_size={batch}", "epochs=1")
    assert all(np.isfinite(value) for value in result.values())
