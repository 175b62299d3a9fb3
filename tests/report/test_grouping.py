"""Runs become rows: what is one row, its name, its numbers, its place; and tables are made of
results files.
"""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
import yaml
from commands import compose, member
from hypothesis import given
from hypothesis import strategies as st
from made_runs import checkpoint, classified, classified_from, pretrained
from omegaconf import OmegaConf

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.report import grouping, page, sweeps, tables
from ssl_bench.runs import identity, layout, record, sweep, units
from ssl_bench.stages import report

ROOT = Path(__file__).parents[2]


def boards(folder: Path, metric: str | None = None) -> dict[str, grouping.Board]:
    return {board.stage: board for board in grouping.boards(record.find([folder]), metric)}


def names(board: grouping.Board) -> list[str]:
    return [group.name for group in board.groups]


def test_a_row_is_a_configuration_but_for_seed_and_place(tmp_path: Path) -> None:
    pretrained(tmp_path / "a", "seed=0", "save_every=7", loss=1.0)
    pretrained(tmp_path / "b", "seed=1", "data.cache=/elsewhere", loss=2.0)
    pretrained(tmp_path / "c", "seed=2", loss=None)
    pretrained(tmp_path / "d", "batch_size=64")
    board = boards(tmp_path)["pretrain"]
    assert names(board) == ["moco_v2 batch_size=256", "moco_v2 batch_size=64"]
    assert board.groups[0].values("loss") == [1.0, 2.0]
    assert [tables.cell(row, "n") for row in board.rows] == ["2 of 3", "1"]
    assert tables.cell(board.rows[0], "loss") == "1.500 ± 0.707"


def test_an_evaluation_is_told_by_what_it_stands_on(tmp_path: Path) -> None:
    """Seeds of one pretraining are one row, wherever they are; its costs are counted once for each
    of them.
    """
    for seed in (0, 1):
        pretrained(tmp_path / f"p{seed}", f"seed={seed}")
        for draw in (0, 1):
            where = [f"pretrained={tmp_path}/p{seed}", f"seed={draw}"]
            classified(tmp_path / f"l{seed}{draw}", 50.0 + seed + draw, *where)
    classified(tmp_path / "random", 20.0)
    classified(tmp_path / "pixels", 30.0, "backbone=pixels")
    classified(tmp_path / "official", 60.0, "pretrained=/weights/moco_v2_200ep.pth.tar")
    board = boards(tmp_path)["lincls"]
    assert names(board) == ["moco_v2_200ep", "moco_v2", "raw pixels", "random init"]
    ours = board.groups[1]
    assert (len(ours.runs), ours.pretrainings) == (4, 2)
    # or the std would be that of classifiers, and n too large
    assert ours.values("val_top1") == [50.5, 51.5]
    assert tables.cell(board.rows[1], "n") == "2"
    assert ours.values("pretraining_hours") == [2.0, 2.0]  # 720,000 images at 100 a second
    assert ours.values("pretraining_images_per_second") == [100, 100]
    assert ours.values("hours") == [2 / 3600] * 2
    assert grouping.differences([group.runs[0] for group in board.groups])["pretrained"] == [
        "/weights/moco_v2_200ep.pth.tar",
        "moco_v2",
        "null",
        "null",
    ]


def test_evaluations_of_a_single_pretraining_are_its_seeds(tmp_path: Path) -> None:
    pretrained(tmp_path / "p")
    for draw in (0, 1, 2):
        classified(
            tmp_path / f"l{draw}",
            None if draw == 2 else 50.0 + draw,
            f"pretrained={tmp_path}/p",
            f"seed={draw}",
        )
    (row,) = boards(tmp_path)["lincls"].rows
    cells = [
        tables.cell(row, column)
        for column in ("val_top1", "n", "pretrainings", "pretraining_hours")
    ]
    assert cells == ["50.5 ± 0.7", "2 of 3", "1", "2.000"]


def test_a_folder_that_has_moved_keeps_its_pretrainings(tmp_path: Path) -> None:
    pretrained(tmp_path / "runs" / "there" / "p")
    classified(tmp_path / "runs" / "there" / "l", 50.0, f"pretrained={tmp_path}/runs/there/p")
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    assert names(boards(tmp_path / "moved")["lincls"]) == ["moco_v2"]


def test_a_run_without_its_pretraining_is_what_it_was(tmp_path: Path) -> None:
    """Two pretrainings, two classifiers of each; then only the classifiers are at hand, as on
    another machine.
    """
    for seed, draw in product((0, 1), (0, 1)):
        folder = tmp_path / "p" / str(seed)
        if not draw:
            checkpoint(pretrained(folder, f"seed={seed}"), 80, b"%d" % seed)
        place = folder / "checkpoints" / "step0000000080.pt"
        made = classified_from(
            tmp_path / f"l{seed}{draw}", 50.0 + 10 * seed + draw, place, f"seed={draw}"
        )
        identity.remember(place, made.directory)
    before = boards(tmp_path)["lincls"].rows
    (tmp_path / "p").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (now,) = boards(tmp_path)["lincls"].rows
    assert (now["name"], now["n"], now["pretrainings"]) == ("moco_v2", 2, 2)
    assert before == [{**now, "values": before[0]["values"]}]
    assert now["values"]["val_top1"] == before[0]["values"]["val_top1"] == [50.5, 60.5]

    known = json.loads((origin := tmp_path / "l00" / identity.ORIGIN).read_text())
    for damaged in (3, {}):
        origin.write_text(json.dumps({**known, "run": damaged}))
        with pytest.raises(UserError, match=r"origin.json is damaged: put it back, or delete it"):
            boards(tmp_path)


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    """Started from another folder, renamed, moved: the file is the same. Trained anew in the same
    place: it isn't.
    """
    for seed in (0, 1):
        made = checkpoint(pretrained(tmp_path / f"p{seed}", f"seed={seed}"), 80, b"%d" % seed)
        classified_from(
            tmp_path / f"l{seed}", 50.0, made, place=f"runs/p{seed}/checkpoints/{made.name}"
        )
    shutil.move(tmp_path / "p0", tmp_path / "renamed")
    (group,) = boards(tmp_path)["lincls"].groups
    assert (group.name, group.pretrainings) == ("moco_v2", 2)
    assert [ran.pretraining.directory.name for ran in group.runs] == ["renamed", "p1"]
    found = record.find([tmp_path])
    assert [ran.directory.name for ran in record.measured(found, made)] == ["l1"]

    made.write_bytes(b"trained anew")
    assert not record.measured(record.find([tmp_path]), made)
    assert sorted(names(boards(tmp_path)["lincls"])) == ["moco_v2", "step0000000080"]
    made.unlink()  # a later checkpoint has taken its place: then only the place tells
    classified_from(
        tmp_path / "late", 50.0, tmp_path / "renamed" / "checkpoints" / made.name, place=str(made)
    )
    (tmp_path / "late" / "pretrained.sha256").write_text("0" * 64)
    late = [ran for ran in record.find([tmp_path]) if ran.directory.name == "late"]
    assert late[0].pretraining.directory.name == "p1"


def test_large_files_are_read_when_needed_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def told(file: BinaryIO, algorithm: str) -> SimpleNamespace:
        read.append(Path(file.name))
        return SimpleNamespace(hexdigest=lambda: file.read().decode())

    monkeypatch.setattr("hashlib.file_digest", told)
    made = [
        checkpoint(pretrained(tmp_path / f"p{seed}", f"seed={seed}"), 80, b"%d" % seed)
        for seed in (0, 1)
    ]
    record.find([tmp_path])
    classified(tmp_path / "without", 50.0, f"pretrained={made[0]}")
    assert len(record.measured(record.find([tmp_path]), made[0])) == 1
    assert not read
    for draw in (0, 1):
        classified(tmp_path / f"l{draw}", 50.0, f"pretrained={made[1]}", f"seed={draw}")
        (tmp_path / f"l{draw}" / "pretrained.sha256").write_text("1")
    assert len(record.measured(record.find([tmp_path]), made[1])) == 2
    assert read == [made[1]]


def test_an_unfinished_pretraining_is_told_from_the_finished_one(tmp_path: Path) -> None:
    begun = pretrained(tmp_path / "p", "epochs=4", loss=None)
    early, late = checkpoint(begun, 80, b"early"), checkpoint(begun, 160, b"late")
    for step, weights in ((80, early), (160, late)):
        classified_from(tmp_path / f"l{step}", step / 2, weights)
    assert record.unfinished(early) == "step 80 of 160"
    assert names(boards(tmp_path)["lincls"]) == ["moco_v2 at step 160", "moco_v2 at step 80"]

    (begun.directory / "summary.json").write_text(json.dumps({"loss": 3.0}))
    board = boards(tmp_path)["lincls"]
    assert names(board) == ["moco_v2", "moco_v2 at step 80"]
    assert grouping.differences([group.runs[0] for group in board.groups]) == {
        "pretrained.step": ["last", "80"]
    }
    assert [group.values("pretraining_hours") for group in board.groups] == [[2.0], []]
    assert record.unfinished(early) == ""
    for path in (early, late):  # to save room: the metrics still know which was the last
        path.unlink()
    (begun.directory / "metrics.jsonl").write_text(json.dumps({"step": 160, "epoch": 4.0}) + "\n")
    assert names(boards(tmp_path)["lincls"]) == ["moco_v2", "moco_v2 at step 80"]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    """The newest of those that are finished; unless they saw other images, which their
    configuration needn't say.
    """
    for place, (seed, top1, started, images) in {
        "first": (0, 50.0, "2026-01-01", "a"),
        "again": (0, 60.0, "2026-01-02", "a"),
        "broken off": (0, None, "2026-01-03", "a"),
        "other images": (0, 70.0, "2025-12-31", "b"),
        "other seed": (1, 80.0, "2025-12-31", "a"),
    }.items():
        classified(tmp_path / place, top1, f"seed={seed}")
        (tmp_path / place / "environment.json").write_text(json.dumps({"started": started}))
        (tmp_path / place / "inputs.json").write_text(
            json.dumps({"train": {"fingerprint": images, "images": 1}})
        )
    board = boards(tmp_path)["lincls"]
    assert [(group.name, sorted(group.values("val_top1"))) for group in board.groups] == [
        ("random init images of train=a", [60.0, 80.0]),
        ("random init images of train=b", [70.0]),
    ]
    runs = record.find([tmp_path])
    assert {
        ran.directory.name: newest.directory.name for ran, newest in grouping.repeated(runs).items()
    } == {
        "first": "again",
        "broken off": "again",
    }
    said = grouping.left_out(runs)
    assert said.endswith(
        f"by the newest of them. Not counted: {tmp_path}/broken off, {tmp_path}/first."
    )
    assert said in report.remarks(runs, 0, 3)
    assert said in report.write_markdown("a title", grouping.boards(runs), runs)


def test_rows_name_the_run_that_they_go_on_from(tmp_path: Path) -> None:
    """Of several seeds their folder; and nothing, where there is none."""
    for name, rate in {"short": 0.1, "long": 0.2}.items():
        for seed in (0, 1):
            words = [f"seed={seed}", f"method.temperature={rate}"]
            first = pretrained(tmp_path / name / f"seed{seed}", *words)
            state = checkpoint(first, 80, f"{name} {seed}".encode())
            more = [f"pretrained={state}", f"continue_from={first.directory}", f"seed={seed}"]
            made = pretrained(tmp_path / f"{name}-more-{seed}", *more)
            (made.directory / layout.WEIGHTS).write_text(files.digest(state))
    found = names(boards(tmp_path)["pretrain"])
    told = [re.findall(r"continue_from=(\S+)", name) for name in found]
    assert sorted(told) == [[], [], ["long"], ["short"]]


def test_names_say_what_differs(tmp_path: Path) -> None:
    pretrained(tmp_path / "a", "method=moco_v1")
    for temperature in (0.1, 0.3):
        pretrained(tmp_path / f"b{temperature}", f"method.temperature={temperature}")
        classified(
            tmp_path / f"l{temperature}", 10 * temperature, f"pretrained={tmp_path}/b{temperature}"
        )
    pretrained(tmp_path / "c", "backbone=resnet50", "method.temperature=0.1")
    found = boards(tmp_path)
    assert sorted(names(found["pretrain"])) == [
        "moco_v1",
        "moco_v2 resnet18 temperature=0.1",
        "moco_v2 resnet18 temperature=0.3",
        "moco_v2 resnet50 temperature=0.1",
    ]
    assert names(found["lincls"]) == ["moco_v2 temperature=0.3", "moco_v2 temperature=0.1"]
    differing = grouping.differences([group.runs[0] for group in found["lincls"].groups])
    assert differing == {"pretrained.method.temperature": ["0.3", "0.1"]}


def test_losses_of_different_methods_rank_nothing(tmp_path: Path) -> None:
    for name, method, loss in (("a", "moco_v1", 1.0), ("b", "moco_v2", 2.0)):
        # as in a pipeline
        pretrained(tmp_path / name, f"method={method}", "metric=pretrained top-1", loss=loss)
    board = boards(tmp_path)["pretrain"]
    assert (board.metric, board.ranked, board.has_results) == ("loss", False, True)
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    pretrained(tmp_path / "a", "method=moco_v1", loss=1.0, knn_top1=30.0)
    pretrained(tmp_path / "b", "method=moco_v2", loss=2.0, knn_top1=40.0)
    board = boards(tmp_path)["pretrain"]
    assert (board.metric, names(board)) == ("knn_top1", ["moco_v2", "moco_v1"])


def test_smaller_losses_come_first_and_another_metric_can_be_asked_for(tmp_path: Path) -> None:
    for rate, loss, rank in ((1, 2.0, 50.0), (2, 1.0, 40.0)):
        pretrained(
            tmp_path / f"{rate}", f"optimizer.base_lr={rate}", loss=loss, effective_rank=rank
        )
    assert names(boards(tmp_path)["pretrain"]) == ["moco_v2 base_lr=2", "moco_v2 base_lr=1"]
    assert names(boards(tmp_path, "effective_rank")["pretrain"]) == [
        "moco_v2 base_lr=1",
        "moco_v2 base_lr=2",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "method.temperature",
        "method.queue_size",
        "augmentation.grayscale_p",
        "batch_size",
        "method.bn_splits",
    ],
)
def test_a_loss_ranks_nothing_across_what_makes_it_another(tmp_path: Path, key: str) -> None:
    for value, loss in ((1, 2.0), (2, 1.0)):
        values = {"batch_size": 128 * value, "augmentation.grayscale_p": value / 2}
        pretrained(
            tmp_path / f"{value}", f"{key}={values.get(key, value)}", loss=loss, effective_rank=loss
        )
    for asked in (None, "loss"):
        board = boards(tmp_path, asked)["pretrain"]
        assert (board.metric, board.ranked) == ("loss", False)
        assert [group.values("loss") for group in board.groups] == [[2.0], [1.0]]
    assert boards(tmp_path, "effective_rank")["pretrain"].ranked


# -- one statistic ---------------------------------------------------------------------------------


def swept(folder: Path, overrides: list[str], top1: float | None, **lines: float) -> None:
    """A member of the sweep `folder`, of stage=lincls, finished if it has a result."""
    made = sweep.Member(
        folder / ".members" / f"{sweep.name(overrides)}.json", overrides, {}, str(folder.parent), ""
    )
    words = ["stage=lincls", *overrides, f"dir={folder / made.name}"]
    made.config = OmegaConf.to_container(compose(*words), resolve=True)
    made.save()
    if top1 is not None:
        classified(folder / made.name, top1, *overrides)


def spreads(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d ± \d+\.\d", text))


@pytest.mark.parametrize("metric", ["val_top1", "probe_top1", "top5", "pretrained top-1"])
def test_every_accuracy_has_one_decimal_beside_its_deviation(metric: str) -> None:
    assert units.shown(metric, [78.84, 74.46]) == "76.7 ± 3.1"


def test_every_place_has_one_mean_and_one_deviation(tmp_path: Path) -> None:
    """Two pretrainings of which the classifiers differ much less than the two: a sweep's table, a
    report's text, leaderboard, dots, curves, accuracies on a class.
    """
    folder = tmp_path / "sweep"
    for seed, mean in enumerate((92.0, 92.4)):
        pretrained(tmp_path / f"p{seed}", f"seed={seed}")
        for draw, delta in enumerate((-1.0, 1.0)):
            swept(folder, [f"pretrained={tmp_path}/p{seed}", f"seed={draw}"], mean + delta)
    for draw in (0, 1):
        swept(folder, [f"seed={draw}"], 50.0 + draw)
    expected = {"92.2 ± 0.3", "50.5 ± 0.7"}
    assert spreads(sweeps.sweep_table(folder)) == expected
    runs = record.find([tmp_path])
    made = grouping.boards(runs)
    assert spreads(report.write_markdown("", made, runs)) == expected
    (board,) = [one for one in made if one.stage == "lincls"]
    leaderboard = page._board(board)
    assert spreads(json.dumps(leaderboard["rows"], ensure_ascii=False)) == expected
    (charts,) = page.charts([board])["boards"]
    assert {group["shown"] for group in charts["groups"]} == expected
    dots = (units.mean_std(group["values"]) for group in charts["groups"])
    assert {f"{mean:.1f} ± {std:.1f}" for mean, std in dots} == expected
    ends = [group["curves"]["values"]["val_top1"] for group in charts["groups"]]
    assert {f"{means[-1]:.1f} ± {stds[-1]:.1f}" for _, means, stds in ends} == expected
    labels, right = np.zeros(1000, dtype=int), np.zeros(1000, dtype=int)
    details = []
    for group in board.groups:
        detail = page.Detail(group, "val", labels, ["zero"], images_id="same")
        for ran in group.runs:
            detail.predictions[ran] = np.where(
                np.arange(1000) < 10 * ran.values["val_top1"], right, 1
            )
        details.append(detail)
    (row,) = page._classes(details)["rows"]
    assert spreads(" ".join(cell["text"] for cell in row["cells"])) == expected


def test_rows_are_pooled_by_any_key(tmp_path: Path) -> None:
    """n and std are over all runs with the value; a filter finds what all of them are."""
    top1 = {}
    for lr, size, seed in product((1, 2), (64, 128), (0, 1)):
        top1[lr, size, seed] = 10.0 * lr + size / 64 + seed
        words = [f"optimizer.base_lr={lr}", f"batch_size={size}", f"seed={seed}"]
        words += [f"schedule.warmup_epochs={size // 64 - 1}", f"optimizer.weight_decay={lr}{size}"]
        classified(tmp_path / f"{lr}{size}{seed}", top1[lr, size, seed], *words)
    board = boards(tmp_path)["lincls"]
    by = {one.key: one for one in board.pooled}
    # no two rows have the same weight decay; the number of warm-up epochs goes with the batch
    assert set(by) == {"batch_size", "optimizer.base_lr"}
    assert by["batch_size"].also == ["schedule.warmup_epochs"]
    rates = by["optimizer.base_lr"]
    assert names(rates.board) == ["base_lr=2", "base_lr=1"]  # the best first
    for group, lr in zip(rates.board.groups, (2, 1), strict=True):
        mine = [value for (rate, *_), value in top1.items() if rate == lr]
        assert sorted(group.values("val_top1")) == sorted(mine)
    (charts,) = page.charts([board])["boards"]
    drawn = next(one for one in charts["by"] if one["key"] == "optimizer.base_lr")["groups"]
    assert [one["n"] for one in drawn] == [4, 4]
    assert "optimizer.base_lr=2" in drawn[0]["words"]
    assert "batch_size=" not in drawn[0]["words"]
    assert set(drawn[0]["members"]) | set(drawn[1]["members"]) == set(names(board))
    assert drawn[0]["shown"] == units.shown("val_top1", [22.0, 23.0, 21.0, 22.0])
    rows = next(one for one in page._board(board)["by"] if one["key"] == "optimizer.base_lr")[
        "rows"
    ]
    assert drawn[0]["shown"] in [cell["text"] for cell in rows[0]["cells"]]


def made_sweeps(folder: Path, place: Path) -> dict[str, list[tuple[list[str], float | None]]]:
    """name -> (overrides, result) of each member."""
    seeds = [f"pretrained={place}/p{seed}" for seed in (0, 1)]
    other = f"pretrained={place}/other"
    return {
        "seeds of one pretraining": [
            ([on, f"seed={draw}"], 50.0 + i) for i, on in enumerate(seeds) for draw in (0, 1)
        ],
        "two experiments": [([on, "seed=0"], 50.0 + i) for i, on in enumerate([*seeds, other])],
        "rates": [
            ([f"optimizer.base_lr={lr}", f"seed={s}"], lr + s) for lr in (1, 2) for s in (0, 1)
        ],
        "typed in several ways": [
            (["optimizer.base_lr=30"], 50.0),
            ([], 51.0),
            (["seed=0"], 52.0),
            (["seed=1"], 53.0),
        ],
        "not finished": [(["seed=0"], 50.0), (["seed=1"], None), (["epochs=7"], None)],
    }


@pytest.mark.parametrize("name", made_sweeps(Path(), Path()))
def test_a_sweep_and_a_report_have_the_same_rows(tmp_path: Path, name: str) -> None:
    for seed in (0, 1):
        pretrained(tmp_path / f"p{seed}", f"seed={seed}")
    pretrained(tmp_path / "other", "method=simclr")
    for overrides, top1 in made_sweeps(tmp_path, tmp_path)[name]:
        swept(tmp_path / "sweep", overrides, top1)
    lines = [line.split("|")[1:-1] for line in sweeps.sweep_table(tmp_path / "sweep").splitlines()]
    place = [cell.strip() for cell in lines[0]].index("val_top1 (%)")
    shown = [tuple(cell.strip() for cell in line[place : place + 2]) for line in lines[2:]]
    board = boards(tmp_path)["lincls"]
    assert shown == [(tables.cell(row, "val_top1"), tables.cell(row, "n")) for row in board.rows]


def test_a_stage_that_measures_nothing_has_no_table(tmp_path: Path) -> None:
    ran = pretrained(tmp_path / "p")
    shutil.copytree(tmp_path / "p", tmp_path / "export")
    changed = yaml.safe_dump(
        ran.config
        | {"stage": {"name": "export"}, "metric": None, "pretrained": str(tmp_path / "p")}
    )
    (tmp_path / "export" / "config.yaml").write_text(changed)
    (tmp_path / "export" / "summary.json").write_text("{}")
    (tmp_path / "export" / "metrics.jsonl").write_text("")
    assert {stage: board.has_results for stage, board in boards(tmp_path).items()} == {
        "export": False,
        "pretrain": True,
    }


def test_a_pipeline_is_its_members(tmp_path: Path) -> None:
    for seed in (0, 1):
        home = tmp_path / f"seed{seed}"
        pretrained(home, "experiment=quickstart", f"seed={seed}", "stage=pipeline")
        (home / "metrics.jsonl").write_text("")  # it trains nothing itself
        pretrained(home / "pretrain", f"seed={seed}")
        classified(home / "pretrained" / "seed0", 70.0 + seed, f"pretrained={home}/pretrain")
    found = boards(tmp_path)
    assert set(found) == {"lincls", "pretrain"}
    assert found["lincls"].groups[0].values("val_top1") == [70.0, 71.0]
    runs = [ran for ran in record.find([tmp_path]) if ran.holds_runs]
    # though the overrides of its members name its directory
    assert runs[0].identity.alike(runs[1].identity)


def test_a_run_with_its_evaluations_below_is_none_of_a_pipeline(tmp_path: Path) -> None:
    home = pretrained(tmp_path / "p").directory
    classified(home / "lincls-digits" / "seed0", 70.0, f"pretrained={home}")
    found = boards(tmp_path)
    assert [[run.directory for run in found[stage].groups[0].runs] for stage in found] == [
        [home / "lincls-digits" / "seed0"],
        [home],
    ]
    shutil.rmtree(home / "checkpoints", ignore_errors=True)
    assert set(boards(tmp_path)) == {"lincls", "pretrain"}


def test_members_of_a_sweep_that_have_not_begun_are_counted(tmp_path: Path) -> None:
    done = pretrained(tmp_path / "sweep" / "first", "seed=0")
    for seed in (0, 1):
        made = member(tmp_path / "sweep", None, f"seed={seed}")
        made.config = done.config | {
            "seed": seed,
            "dir": str(tmp_path / "sweep" / ("first", "second")[seed]),
        }
        made.save()
    made.fail("out of memory")
    (group,) = boards(tmp_path)["pretrain"].groups
    assert tables.cell(group.row("loss"), "n") == "1 of 2"
    assert [(ran.state.name, ran.state.note) for ran in group.runs] == [
        ("finished", ""),
        ("failed", "out of memory"),
    ]


def test_paths_without_runs(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"runs=.*nowhere: no run at or below it; name run directories"
    ):
        record.find([tmp_path / "nowhere"])
    pretrained(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text("{")
    with pytest.raises(
        UserError, match=r"a/summary\.json is damaged: put it back, .* leave this run out of runs="
    ):
        record.find([tmp_path])


# -- files and texts -------------------------------------------------------------------------------


def test_costs_are_those_of_what_it_stands_on_itself(tmp_path: Path) -> None:
    """Neighbours of features that were fine-tuned: not of the pretraining of the pretraining."""
    pretrained(tmp_path / "p")
    classified(tmp_path / "tuned", 50.0, "stage=finetune", f"pretrained={tmp_path}/p")
    classified(tmp_path / "knn", 40.0, "stage=knn", f"pretrained={tmp_path}/tuned")
    (ran,) = [one for one in record.find([tmp_path]) if one.stage == "knn"]
    assert ran.values["pretraining_val_top1"] == 50.0
    assert not [metric for metric in ran.values if metric.count("pretraining_") > 1]


def test_columns_in_order_and_only_what_is_there(tmp_path: Path) -> None:
    pretrained(tmp_path / "p", effective_rank=20.0)
    classified(tmp_path / "l", 50.0, f"pretrained={tmp_path}/p")
    found = boards(tmp_path)
    costs = ["hours", "images_per_second"]
    assert tables.columns(found["pretrain"].rows) == ["loss", "n", *costs, "effective_rank"]
    more = ["pretraining_hours", "pretraining_images_per_second"]
    assert tables.columns(found["lincls"].rows) == ["val_top1", "n", "pretrainings", *costs, *more]
    asked = tables.table(found["lincls"].rows, ["val_top1", "pretraining_effective_rank"])
    assert asked.splitlines()[0] == "|         | val_top1 (%) | pretraining effective_rank |"
    assert asked.splitlines()[2] == "| moco_v2 |         50.0 |                       20.0 |"


@pytest.mark.parametrize("metric", [one for one in units.UNITS if units.has_direction(one)])
def test_what_is_said_of_a_metric_is_how_it_is_judged(metric: str) -> None:
    said = units.about(metric)
    assert ("ower is better" in said) == units.smaller_is_better(metric)
    assert ("igher is better" in said) == (not units.smaller_is_better(metric))
    assert units.about(f"pretraining_{metric}") == f"of the pretraining: {said}"


TEXT = "# Mine\n\n<!-- results: a.json{} -->\nold\n<!-- end of results -->\n\nrest\n"
ROWS = [
    {
        "stage": "lincls",
        "name": "a|b",
        "values": {"val_top1": [50.0, 52.0], "hours": [1.0, 1.0]},
        "members": 3,
    },
    {"stage": "pretrain", "name": "b", "values": {"loss": [1.5]}},
]


def test_fill(tmp_path: Path) -> None:
    tables.save(tmp_path / "a.json", ROWS, remark="made by hand")
    filled = tables.fill(TEXT.format(" stage=lincls columns=val_top1,n"), tmp_path)
    assert filled.splitlines() == [
        "# Mine",
        "",
        "<!-- results: a.json stage=lincls columns=val_top1,n -->",
        "|      | val_top1 (%) |      n |",
        "|------|-------------:|-------:|",
        "| a\\|b |   51.0 ± 1.4 | 2 of 3 |",
        "<!-- end of results -->",
        "",
        "rest",
    ]
    assert tables.fill(filled, tmp_path) == filled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (" column=n", "a.json: column: no such option; did you mean columns?"),
        (" columns=n,val_top2", "a.json: val_top2: no such column; did you mean val_top1?"),
    ],
)
def test_fill_tells_what_is_wrong(tmp_path: Path, options: str, message: str) -> None:
    tables.save(tmp_path / "a.json", ROWS)
    with pytest.raises(UserError, match=re.escape(message)):
        tables.fill(TEXT.format(options), tmp_path)


def test_fill_needs_a_block_and_a_results_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no table to fill: write a line <!-- results: FILE\.json -->"
    ):
        tables.fill("# Mine\n", tmp_path)
    for content in (None, "{", '{"rows": [{"name": 1}]}', '{"row": []}'):
        if content:
            (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json: not a results file"):
            tables.fill(TEXT.format(""), tmp_path)


@given(st.lists(st.lists(st.floats(0, 100), max_size=4), max_size=5))
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]]
) -> None:
    path = tmp_path_factory.mktemp("results") / "a.json"
    rows = [{"name": str(i), "values": {"val_top1": mine}} for i, mine in enumerate(values)]
    tables.save(path, rows)
    assert tables.load(path) == rows
    assert tables.table(rows, tables.columns(rows))


def test_every_committed_results_file_is_one() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        rows = json.loads(path.read_text()).get("rows") or []
        # other tables may speak of stages
        if any("stage" in row for row in rows if isinstance(row, dict)):
            assert tables.load(path)


def test_a_table_has_the_columns_that_a_terminal_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads, row = ["name", "a", "b", "c"], ["x" * 20, "1" * 10, "2" * 10, "3" * 30]
    found = {}
    for columns in ("85", "84", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        text, left_out = tables.fitted(heads, [row], right=3)
        found[columns] = len(text.partition("\n")[0]), left_out
        assert text == tables.markdown(
            heads[: 4 - len(left_out)], [row[: 4 - len(left_out)]], 3 - len(left_out)
        )
    assert found == {"85": (83, []), "84": (83, []), "60": (50, ["c"])}
    text, left_out = tables.fitted(heads, [["x" * 70, *row[1:]]], right=3)
    assert (len(left_out), len(text.partition("\n")[0]) > 60) == (2, True)  # two stay
