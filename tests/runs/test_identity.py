"""What a run is: the same for every spelling of its paths, wherever it lies; another where its
result would be.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import checkpoint, classified, classified_from, pretrained
from omegaconf import OmegaConf

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.report import grouping
from ssl_bench.runs import identity, record, sweep
from ssl_bench.runs.identity import Identity, changes
from ssl_bench.runs.run import Run
from ssl_bench.runs.tracking import NoTracker
from ssl_bench.shell import quote


def of(*overrides: str, **more: object) -> Identity:
    return Identity(OmegaConf.to_container(compose(*overrides), resolve=True) | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to start from, with what the spellings need: real/target, deep/, a link to real."""
    root = tmp_path_factory.mktemp("place")
    for folder in ("real/target", "deep"):
        (root / folder).mkdir(parents=True)
    (root / "link").symlink_to("real")
    return root


# How a person may write the folder real/target, started from its grandparent.
SPELLINGS = (
    "real/target",
    "./real/target",
    "real/target/",
    "real//target",
    "deep/../real/target",
    "link/target",
)
SPELLINGS += ("{root}/real/target", "{root}/link/target", "~/real/target", "~/real/./target/")
# Every key that is a path, and a command that has it.
KEYS = {
    "pretrained": ["stage=lincls"],
    "dir": ["stage=pipeline"],
    "data.root": ["stage=lincls", "data=folder"],
    "data.cache": ["stage=pretrain"],
    "stage.images": ["stage=predict"],
    "stage.out": ["stage=export", "pretrained=x"],
    "stage.features": ["stage=select", "data=folder", "data.root=/images"],
    "runs": ["stage=export", "pretrained=x"],
}


@settings(max_examples=60)
@given(st.sampled_from(sorted(KEYS)), st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
def test_two_spellings_of_a_path_are_one_run(place: Path, key: str, one: str, other: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place))
        first, second = (
            of(
                *KEYS[key],
                *(["dir=x"] if key != "dir" else []),
                f"{key}={quote(text.format(root=place))}",
            )
            for text in (one, other)
        )
        assert not changes(first, second)
        assert (first.key, first.group) == (second.key, second.group)
        assert identity.place_slug(one.format(root=place)) == identity.place_slug(
            other.format(root=place)
        )


def test_shards_are_known_by_their_names_below_the_root() -> None:
    """A class of the user's own may take such a key for something else."""
    command = ["stage=lincls", "dir=x", "data=webdataset"]
    one, moved, other = (
        of(*command, f"data.root=/{root}", f'data.train="{train}"')
        for root, train in (("a", "t-*.tar"), ("b", "/b/./t-*.tar"), ("a", "u-*.tar"))
    )
    assert not changes(one, moved)
    assert changes(one, other) == "data.train was ['t-*.tar'], is ['u-*.tar']"
    own = {"data": {"name": "own", "root": "/a", "train": True}}
    assert of(*command, "data.root=/a", **own).own["data.train"] is True


def test_two_spellings_of_a_number_are_one_run() -> None:
    command = ["stage=lincls", "dir=x"]
    typed = [
        of(*command, f"optimizer.base_lr={text}", f"augmentation.mean=[{text},0,0]")
        for text in ("30", "30.0", "3e1")
    ]
    assert len({one.key for one in typed}) == len({one.group for one in typed}) == 1
    assert of(*command, "stage.normalize=true").key != of(*command, "stage.normalize=false").key


def test_another_place_is_another_run() -> None:
    for key in ("pretrained", "stage.images", "stage.out", "stage.features"):
        one, other = (of(*KEYS[key], "dir=x", f"{key}=/{text}") for text in "ab")
        assert changes(one, other) == f"{key} was /a, is /b"


@pytest.mark.parametrize("home", ["runs/x", "a b's/[x]"])
def test_a_pipeline_is_the_same_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """Its rows name its own directory."""
    monkeypatch.chdir(tmp_path)
    command = ["experiment=quickstart"]
    relative, absolute, moved = (
        of(*command, f"dir={quote(text)}")
        for text in (home, f"{tmp_path}/{home}", f"/elsewhere/{home}")
    )
    assert relative.own["stage.rows.pretrained"] == ["pretrained=${dir}/pretrain"]
    assert relative.key == absolute.key == moved.key
    assert relative.key != of(*command, f"dir={quote(home)}", "seed=1").key


def test_where_the_code_lies_is_no_part_of_it_unless_it_is_another_code() -> None:
    before, moved, mine = (
        of("stage=pretrain", f"method._target_={path}", "dir=x")
        if path
        else of("stage=pretrain", "dir=x")
        for path in ("", "ssl_bench.methods.momentum_contrast.MoCo", "mine.Mine")
    )
    assert before.key == moved.key != mine.key
    assert "_target_" not in " ".join(before.own)


OTHERWISE = [
    "seed=1",
    "epochs=7",
    "batch_size=128",
    "precision=bf16",
    "compile=true",
    "zero_init_residual=true",
]
OTHERWISE += [
    "method.temperature=0.3",
    "optimizer.base_lr=0.1",
    "schedule.warmup_epochs=1",
    "augmentation.hue=0.2",
]
OTHERWISE += [
    "backbone.width=32",
    "data.image_size=64",
    "data.on_error=skip",
    "stage.online_images=7",
]


@pytest.mark.parametrize("word", OTHERWISE)
def test_what_is_computed_otherwise_is_another_run(word: str) -> None:
    before, now = of("stage=pretrain", "dir=x"), of("stage=pretrain", "dir=x", word)
    assert before.key != now.key
    assert f"{word.partition('=')[0]} was " in changes(before, now)
    assert (before.group == now.group) is (word == "seed=1")


def test_a_new_key_that_is_null_leaves_older_runs_what_they_were() -> None:
    now = of("stage=pretrain", "dir=x")
    before = Identity({key: value for key, value in now.config.items() if key != "pretrained"})
    newer = Identity({**now.config, "method": {**now.config["method"], "new": None}})
    assert before.key == now.key == newer.key


# -- how many processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "counts"),
    [
        (["stage=pretrain", "method=moco_v2", "method.bn_splits=1"], True),
        (["stage=pretrain", "method=moco_v1", "method.bn_splits=1"], True),
        (["stage=pretrain", "method=byol", "sync_batch_norm=false"], True),
        (["stage=pretrain", "method=byol"], False),
        (["stage=pretrain", "method=simclr"], False),
        (
            [
                "stage=pretrain",
                "method=simclr",
                "backbone=timm",
                "+backbone.options.drop_path_rate=0.1",
            ],
            True,
        ),
        (["stage=pretrain", "method=moco_v2"], False),  # bn_splits=null makes the parts eight
        # unless there is nothing that it can split
        (["stage=pretrain", "method=moco_v2", "backbone=timm"], True),
        (["stage=lincls"], False),
        (["stage=knn"], False),
        (["stage=finetune"], False),
        (["stage=finetune", "stage.mixup=0.2"], True),
        (["stage=finetune", "sync_batch_norm=false"], True),
        (["stage=pipeline", "method=moco_v2", "method.bn_splits=1"], True),
        (["stage=pipeline", "method=simclr"], False),
    ],
)
def test_the_number_of_processes_counts_where_it_changes_the_result(
    command: list[str], counts: bool
) -> None:
    if "backbone=timm" in command:
        command = [*command, "backbone.model=resnet18"]
    one, two = (of(*command, "dir=x", f"devices={count}") for count in (1, 2))
    assert (one.key != two.key) is counts
    assert bool(changes(one, two)) is counts
    assert (one.group != two.group) is counts


def test_parts_of_batch_norm_are_what_counts() -> None:
    """tests/runtime/test_distributed.py proves that two processes of four parts compute what one of
    eight does.
    """
    alike = [
        of("stage=pretrain", "dir=x", f"devices={devices}", f"method.bn_splits={splits}")
        for devices, splits in (
            (1, 8),
            (2, 4),
            (8, 1),
            (1, "null"),
            (2, "null"),
            (4, "null"),
            (8, "null"),
        )
    ]
    assert len({one.key for one in alike}) == 1
    fewer = of("stage=pretrain", "dir=x", "devices=1", "method.bn_splits=4")
    assert changes(fewer, alike[0]) == "devices x bn_splits was 4, is 8"


@pytest.mark.parametrize(("method", "refused"), [("moco_v2", True), ("simclr", False)])
def test_begun_with_two_processes_and_continued_with_one(
    tmp_path: Path, method: str, refused: bool
) -> None:
    def run(devices: int) -> Run:
        words = [f"method={method}", "stage=pretrain", f"dir={tmp_path}/run", f"devices={devices}"]
        words += ["method.bn_splits=1"] if method == "moco_v2" else []
        return Run(
            OmegaConf.to_container(compose(*words), resolve=True), torch.device("cpu"), NoTracker
        )

    with run(2) as first:
        first.save(1, model=torch.nn.Linear(1, 1))
    if refused:
        with pytest.raises(
            UserError, match="another configuration: devices x bn_splits was 2, is 1"
        ):
            run(1).__enter__()
    else:
        with run(1) as again:
            assert again.restore(model=torch.nn.Linear(1, 1)) == 1


def test_one_tasks_and_two_tasks_runs_are_two_rows(tmp_path: Path) -> None:
    """Also of runs from before, whose configuration doesn't say that torchrun had started two."""
    for seed, world in enumerate((1, 1, 2, 2), start=1):
        ran = pretrained(
            tmp_path / f"p{seed}", f"seed={seed}", "method.bn_splits=1", loss=float(seed)
        )
        (ran.directory / "environment.json").write_text(json.dumps({"world_size": world}))
    (board,) = grouping.boards(record.find([tmp_path]))
    assert [(group.name, group.values("loss")) for group in board.groups] == [
        ("moco_v2 devices x bn_splits=1", [1.0, 2.0]),
        ("moco_v2 devices x bn_splits=2", [3.0, 4.0]),
    ]


# -- content ---------------------------------------------------------------------------------------


def standing_on(directory: Path, weights: str | Path) -> Run:
    words = ["stage=lincls", f"dir={directory}", f"pretrained={quote(str(weights))}"]
    return Run(
        OmegaConf.to_container(compose(*words), resolve=True), torch.device("cpu"), NoTracker
    )


def test_the_same_weights_elsewhere_and_other_weights_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").write_text("first")
    with standing_on(tmp_path / "run", "weights") as begun:
        begun.save(1, model=torch.nn.Linear(1, 1))
    shutil.copy("weights", "copy")
    Path("moved").mkdir()
    shutil.copy("weights", "moved/weights")
    for spelling in (tmp_path / "weights", "copy", "moved/weights"):
        with standing_on(tmp_path / "run", spelling) as again:
            assert again.restore(model=torch.nn.Linear(1, 1)) == 1
    os.utime("copy", (0, 0))
    Path("copy").write_text("second")
    with pytest.raises(
        UserError, match=r"another configuration: pretrained was moved/weights, is copy\. Choose"
    ):
        standing_on(tmp_path / "run", "copy").__enter__()


def test_a_checkpoint_of_another_run_is_refused_and_one_of_before_is_not(tmp_path: Path) -> None:
    """Which named its run by a number; the configuration beside it has been compared."""
    with Run({"dir": str(tmp_path / "run"), "seed": 0}, torch.device("cpu"), NoTracker) as run:
        path = run.checkpoint.save(1, model=torch.nn.Linear(1, 1))
        for name, usable in (("12345678901234567890", True), ("0123456789abcdef", False)):
            content = torch.load(path, weights_only=True) | {"run": name}
            torch.save(content, path)
            if usable:
                assert run.restore(model=torch.nn.Linear(1, 1)) == 1
            else:
                with pytest.raises(UserError, match="none of its 1 checkpoints can be used"):
                    run.restore(model=torch.nn.Linear(1, 1))


def test_other_images_are_another_experiment(tmp_path: Path) -> None:
    """data.root is in no identity: two folders of images are told by their fingerprints and by what
    some files hold, where these are known.
    """
    seen = [{"fingerprint": "a"}, {"fingerprint": "a"}, {"fingerprint": "b"}, None]
    seen += [{"fingerprint": "c", "sample": "x"}, {"fingerprint": "c", "sample": "y"}]
    for seed, images in enumerate(seen, start=1):
        pretrained(tmp_path / f"p{seed}", f"seed={seed}", loss=float(seed))
        facts = {} if images is None else {"pretrain": images | {"images": 1}}
        (tmp_path / f"p{seed}" / "inputs.json").write_text(json.dumps(facts))
    (board,) = grouping.boards(record.find([tmp_path]))
    values = sorted(group.values("loss") for group in board.groups)
    assert values == [[1.0, 2.0, 4.0], [3.0], [5.0], [6.0]]
    assert len({group.name for group in board.groups}) == 4


def test_a_twin_of_a_sweep_is_known_by_what_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = checkpoint(pretrained(tmp_path / "runs" / "p"), 80, b"weights").parents[1]

    def config(place: object, *words: str) -> dict:
        words = ["stage=lincls", f"pretrained={place}", "dir=runs/sweeps/lincls/member", *words]
        return OmegaConf.to_container(compose(*words), resolve=True)

    one = sweep.Member(
        tmp_path / "runs/sweeps/lincls/.members/member.json",
        [],
        config("runs/p"),
        str(tmp_path),
        "",
    )
    known = sweep.by_key([one])
    for spelling in ("runs/p/", made, "./runs/../runs/p"):
        assert sweep.twin(config(spelling), known) is one
    assert sweep.twin(config("runs/p", "seed=1"), known) is None
    shutil.copytree("runs/p", "other")
    # it hasn't begun: nothing is known of its weights
    assert sweep.twin(config("other"), known) is None
    one.directory.mkdir(parents=True)
    (one.directory / "pretrained.sha256").write_text(
        files.digest(made / "checkpoints" / "step0000000080.pt")
    )
    assert sweep.twin(config("other"), known) is one
    assert not one.stale
    monkeypatch.chdir(made)
    without = config("runs/p") | {"pretrained": None}  # stands on nothing, wherever it is started
    assert sweep.twin(without, known) is None
    monkeypatch.chdir(tmp_path)
    checkpoint(record.Ran.read(made), 120, b"it went on")
    assert one.stale  # or the sweep would answer with what an older checkpoint came to
    assert sweep.twin(config("other"), known) is one


def test_evaluations_of_a_file_that_was_copied_are_one_row(tmp_path: Path) -> None:
    for seed, name in enumerate(("official.pth.tar", "copy.pth.tar")):
        (tmp_path / name).write_bytes(b"weights")
        classified_from(tmp_path / f"l{seed}", 50.0 + seed, tmp_path / name, f"seed={seed}")
    (tmp_path / "third.pth.tar").write_bytes(b"others")
    classified_from(tmp_path / "third", 40.0, tmp_path / "third.pth.tar")
    classified(tmp_path / "random", 30.0)
    (board,) = grouping.boards(record.find([tmp_path]))
    assert [group.values("val_top1") for group in board.groups] == [[50.0, 51.0], [40.0], [30.0]]


def test_which_network_of_a_file_is_part_of_a_run() -> None:
    """And a key that is null leaves runs from before it what they were."""
    plain = {"stage": {"name": "knn"}, "pretrained": "x.pth"}
    one, other = (Identity(plain | {"pretrained_prefix": name}) for name in ("student", "teacher"))
    assert one.key != other.key
    assert not one.alike(other)
    assert changes(one, other) == "pretrained_prefix was student, is teacher"
    assert Identity(plain).key == Identity(plain | {"pretrained_prefix": None}).key
