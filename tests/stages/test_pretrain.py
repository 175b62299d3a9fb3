"""Stage pretrain: what it measures while it learns, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import compose

from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runtime import distributed
from ssl_bench.stages.pretrain import pretrain

RUN = [
    "stage=pretrain",
    "data=dl21",
    "data.image_size=16",
    "data.workers=1",
    "backbone.width=8",
    "backbone.stem=small",
]
RUN += ["method.queue_size=8", "batch_size=8", "epochs=1", "eval_every=1", "log_every=1"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """8 unlabelled images; 2 for training of each of 3 classes."""
    write_dl21(tmp_path / "dl21", 8, 6, 3, num_classes=3, image_size=16, workers=1)
    return [
        *RUN,
        f"data.root={tmp_path}/dl21",
        f"data.cache={tmp_path}/cache",
        f"dir={tmp_path}/run",
    ]


@pytest.mark.parametrize(("broken", "judged"), [([], True), ([0], True), ([0, 1], False)])
def test_the_judges_are_pairs_that_can_be_decoded(
    command: list[str], tmp_path: Path, broken: list[int], judged: bool
) -> None:
    """The first two images are of different classes: without them one class has two."""
    for index in broken:
        (tmp_path / "dl21" / "train" / f"{index}.png").write_bytes(b"no image")
    result = launch(compose(*command, "data.on_error=skip"))
    assert ("knn_top1" in result) == judged


def test_one_image_judges_nothing(command: list[str]) -> None:
    assert "knn_top1" not in launch(compose(*command, "stage.online_images=1"))


PIXELS = ["backbone=pixels", "augmentation.image_size=8"]
VIT = ["backbone=vit_tiny", "backbone.patch_size=8"]
MISTAKES = {
    "no labels": (["method=supervised", "data=folder"], "dl21 has no labels, so no split 'train'"),
    "pixels": (
        PIXELS,
        "augmentation.image_size=8 is not backbone.image_size=16; backbone=pixels doesn't take it",
    ),
    "patches": (
        [*VIT, "augmentation.image_size=12"],
        "augmentation.image_size=12 is no multiple of backbone.patch_size=8",
    ),
    "small views": (
        [*VIT, "method=dino", "augmentation.small_size=4"],
        "augmentation.small_size=4 is no multiple of backbone.patch_size=8; "
        "backbone=vit_tiny doesn't take it",
    ),
}


@pytest.mark.parametrize(("overrides", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(command: list[str], tmp_path: Path, overrides: list[str], says: str) -> None:
    ours = [word for word in command if "queue" not in word and not word.startswith("backbone.")]
    with pytest.raises(UserError) as caught:
        launch(compose(*ours, *overrides))
    assert says in str(caught.value)
    assert not (tmp_path / "cache").exists()  # said before an image was read


@pytest.mark.parametrize("stage", ["lincls", "knn", "finetune", "select stage.budget=9"])
def test_sizes_of_the_other_stages(tmp_path: Path, stage: str) -> None:
    command = [*f"stage={stage}".split(), "data.image_size=16", *PIXELS]
    with pytest.raises(UserError, match=r"augmentation.image_size=8 is not backbone.image_size=16"):
        launch(compose(*command, f"data.cache={tmp_path}/cache", f"dir={tmp_path}/run"))
    assert not (tmp_path / "cache").exists()


def test_batch_norm_over_parts_is_not_synchronised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    run = SimpleNamespace(device=torch.device("cpu"))
    cfg = compose(
        "stage=pretrain", "sync_batch_norm=true", "method.queue_size=512", f"dir={tmp_path}"
    )
    with pytest.raises(
        UserError,
        match=r"sync_batch_norm=true.*method\.bn_splits=4.*type sync_batch_norm=false, or",
    ):
        pretrain(cfg, run)
