"""Images that are too few for a member of a sweep are told before any member starts."""

import logging
from pathlib import Path

import pytest
from commands import complaint, compose
from conftest import Command

from ssl_bench.data.formats import listing
from ssl_bench.errors import UserError
from ssl_bench.methods.byol import BYOL
from ssl_bench.runtime import distributed
from ssl_bench.stages import _images

SMALL = ["data=synthetic", "data.image_size=16", "backbone.width=8", "backbone.stem=small"]
SMALL += ["data.num_unlabeled=100", "data.num_train=100", "data.num_val=40"]
LONG = ["method=moco_v2", "method.queue_size=65536"]
QUEUE = "method.queue_size=65536 is larger than the dataset (100 images)"
CASES = {
    "queue": (["stage=pretrain", *LONG, "batch_size=32"], QUEUE),
    "queue on two": (["stage=pretrain", *LONG, "batch_size=32", "devices=2"], QUEUE),
    "batch": (
        ["stage=pretrain", "method=simclr"],
        "batch_size=256 is larger than the dataset (100 training images): choose at most "
        "batch_size=100",
    ),
    "prototypes": (
        ["stage=pretrain", "method=deepcluster_v2", "batch_size=64"],
        "method.num_prototypes=[3000, 3000, 3000]: an epoch has 64 images",
    ),
    "norm": (["stage=pretrain", "method=byol", "batch_size=1"], "batch norm needs two images"),
    "labels": (
        ["stage=lincls", "stage.labels_per_class=60", "batch_size=2"],
        "choose at most stage.labels_per_class=",
    ),
    "batch of labels": (
        ["stage=finetune", "stage.labels_per_class=2"],
        "batch_size=256 is larger than the dataset (",
    ),
    "bank": (["stage=knn", "stage.labels_per_class=60"], "choose at most stage.labels_per_class="),
}


@pytest.mark.parametrize(("words", "said"), CASES.values(), ids=CASES)
def test_what_is_too_few(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as told:
        _images.check(compose(*words, *SMALL), {})
    assert said in str(told.value)


@pytest.mark.parametrize("method", ["moco_v2", "deepcluster_v2", "wmse", "supervised", "distill"])
def test_enough_images_pass_on_two_processes_as_on_one(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ssl_bench.stages._images")
    words = ["stage=pretrain", f"method={method}", "batch_size=8", "method.queue_size=64"]
    words = words if method == "moco_v2" else words[:-1]
    own = {"deepcluster_v2": ["method.num_prototypes=[8]"], "distill": ["method.teacher=/x"]}
    own["wmse"] = ["batch_size=64", "method.dim=16", "method.whitening_size=64"]
    for devices in (1, 2, 4):
        cfg = compose(*words, *SMALL, *own.get(method, []), f"devices={devices}")
        _images.check(cfg, {})
        skipped = [line for line in caplog.messages if "isn't checked without" in line]
        assert bool(skipped) == (method == "distill")  # whose teacher isn't there
    assert distributed.world_size() == 1


def test_every_member_is_told_at_once(ssl_bench: Command, tmp_path: Path) -> None:
    words = ["-m", "stage=pretrain", *SMALL, "batch_size=32,128", "seed=0,1", *LONG]
    result = ssl_bench(*words)
    assert complaint(result).splitlines() == [
        "nothing was started.",
        f"{QUEUE}, so that every image would meet its own old key as a negative: choose at most "
        "method.queue_size=100",
        "batch_size=128 is larger than the dataset (100 training images): choose at most "
        "batch_size=100",
    ]
    assert "BatchNorm" not in result.stderr
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_images_elsewhere_and_many_are_left_to_the_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links are followed; of a folder that looks empty here nothing is said for jobs elsewhere."""
    root, linked = tmp_path / "photos", tmp_path / "linked"
    (root / "a").mkdir(parents=True)
    for number in range(3):
        (root / "a" / f"{number}.png").touch()
    linked.mkdir()
    (linked / "a").symlink_to(root / "a")
    (linked / "circle").symlink_to(linked)
    words = ["stage=pretrain", "data=folder", "batch_size=32"]
    _images.check(compose(*words, "data.root=/not/here"), {})
    here = compose(*words, f"data.root={root}")
    with pytest.raises(UserError, match=r"larger than the dataset \(3 training images\)"):
        _images.check(here, {})
    for folder in (root, linked):
        assert listing.holds_more(folder, 2)
        assert not listing.holds_more(folder, 3)
    monkeypatch.setattr(_images, "QUICK", 2)
    _images.check(here, {})
    (empty := tmp_path / "empty").mkdir()
    unmounted = compose(*words, f"data.root={empty}")
    _images.check(unmounted, {}, sure=False)
    with pytest.raises(UserError, match="no images under"):
        _images.check(unmounted, {})
    shards = compose("stage=pretrain", "data=webdataset", f"data.root={empty}")
    _images.check(shards, {})  # all of which would be read


class Looking(BYOL):
    def check(self, num_images: int, local_batch: int) -> None:
        super().check(num_images, local_batch)
        assert float(next(self.backbone.parameters()).detach().sum()) != 0


def test_a_method_that_looks_at_its_weights_is_left_to_the_run() -> None:
    words = ["stage=pretrain", "method=byol", f"method._target_={__name__}.Looking"]
    _images.check(compose(*words, *SMALL, "batch_size=8"), {})


def test_a_job_that_sees_other_folders_is_not_asked(ssl_bench: Command) -> None:
    """In a container, or with files that are copied to its node first; here is no Slurm."""
    words = ["launcher=slurm", "stage=pretrain", *SMALL, "method=simclr", "seed=0,1"]
    assert "batch_size=256 is larger than the dataset" in complaint(ssl_bench(*words))
    for elsewhere in ("container=[apptainer,exec,x.sif]", "stage_in=[x.sqf]"):
        result = ssl_bench(*words, f"hydra.launcher.{elsewhere}")
        assert result.returncode != 0
        assert "larger than the dataset" not in result.stderr
