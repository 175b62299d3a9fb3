"""Stage verify: compare a table or a result with all the files that it was made from."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig
from pydantic import PositiveFloat

import ssl_bench
from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.config.fields import Place
from ssl_bench.data import store
from ssl_bench.errors import UserError, several
from ssl_bench.launch.process import launch
from ssl_bench.report import grouping, tables
from ssl_bench.report.tables import plain
from ssl_bench.runs import checkpoint, identity, layout, record, weights
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run, environment
from ssl_bench.stages import single_process
from ssl_bench.stages.report import open_data

READS = ("runs", "data.name", "data.root", "data.cache", "data.workers")
REPEATED = ("pretrain", "lincls", "knn", "finetune")  # stages whose runs can be done again
WEIGHTS = (".pt", ".pth", ".tar", ".safetensors", ".onnx")  # suffixes
# points of top-1 between machines or versions; on the same CPU the numbers are the same
TOLERANCE = 0.5
SPEED = (
    "images_per_second",
    "mfu",
    "memory_gb",
    "data_wait",
    "hours",
)  # they differ between equal runs


class Finding(NamedTuple):
    """What was found of one thing: a file, a run, its data, its code."""

    what: str
    state: Literal["whole", "missing", "differs"]
    note: str = ""


@single_process
def verify(
    cfg: DictConfig,
    run: Run,
    what: Place | list[Place] | None = None,
    rerun: bool = False,
    max_minutes: PositiveFloat = 10,
) -> dict[str, float]:
    """Print a line for each thing that `what` was made from: is it whole, missing, or different?

    what: runs, folders of them, files of weights, results files, Markdown with their tables; null:
    `cfg.runs`. `cfg.runs` says where the runs of tables lie, and the pretrainings of evaluations,
    if they have moved. rerun: run those again that took less than `max_minutes` each. Returns
    counts of the states; UserError if something differs.
    """
    near, paths = files.places(cfg.runs), files.places(what)
    if not near and not paths:
        raise UserError(
            "stage.what= needs a value: "
            "a run, a folder of runs, weights, a results.json or a README.md"
        )
    known = record.find(near) if near else []
    found: list[Finding] = []
    for path in paths or near:
        found += _of(cfg, path, known, max_minutes if rerun else 0)
    for one in found:
        print(plain(f"{one.state:8} {': '.join(filter(None, one[::2]))}"))
    states = [one.state for one in found]
    counts: dict[str, float] = {
        state: states.count(state) for state in ("whole", "missing", "differs")
    }
    if counts["differs"]:
        first = next(one for one in found if one.state == "differs")
        raise UserError(
            f"{states.count('differs')} of {len(found)} differ: {first.what}: {first.note}"
        )
    return counts


def _of(cfg: DictConfig, path: Path, known: Sequence[Ran], minutes: float) -> list[Finding]:
    """The findings on one of `what`; minutes: 0, or those that a run may take to be done again."""
    if path.is_dir():
        folders = sorted({file.parent for file in path.rglob(layout.METRICS)})
        below = [folder for folder in folders if (folder / layout.CONFIG).exists()]
        if not below and (exported := files.listed(path)):
            return [_file(path / name) for name in exported]
        if not below:
            raise UserError(
                f"stage.what={path}: neither a run, nor a folder of runs, nor an export"
            )
        return [finding for folder in below for finding in of_run(cfg, folder, known, minutes)]
    if not path.is_file():
        raise UserError(f"stage.what={path}: no such file or folder")
    if path.suffix == ".json":
        return list(of_table(path, known))
    if path.suffix == ".md":
        return list(of_page(path, known))
    if path.suffix in WEIGHTS:
        folder = layout.run_of(path)
        return [_file(path), *(of_run(cfg, folder, known, minutes) if folder else ())]
    raise UserError(
        f"stage.what={path}: neither weights ({', '.join(WEIGHTS)}), nor a .json or .md of results"
    )


def _file(path: Path) -> Finding:
    """Compare a file with the list of digests beside it, and with the digest in it."""
    if not path.is_file():
        return Finding(str(path), "missing", f"{files.SUMS} names it")
    try:
        sums = files.check(path)
        if path.suffix in WEIGHTS and path.suffix != ".onnx":
            weights.read(path)
    except UserError as error:
        return Finding(str(path), "differs", str(error))
    if sums is None and path.suffix == ".onnx":
        return Finding(str(path), "missing", f"no {files.SUMS} names it")
    return Finding(str(path), "whole", f"as {sums} says" if sums else "by the digest in it")


# -- a run -----------------------------------------------------------------------------------------


def of_run(
    cfg: DictConfig, folder: Path, known: Sequence[Ran], minutes: float = 0
) -> list[Finding]:
    """The findings on a run: files, checkpoints, the weights below it, data, code, and the rerun.

    known: runs among which the weights may be. minutes: as for `_of`.
    """
    found = list(_files(folder))
    try:
        ran = Ran.read(folder)
    except UserError as error:
        if any(one.state == "differs" for one in found):
            return found
        return [Finding(str(folder), "differs", str(error))]
    found += [*_checkpoints(ran), *_below(ran, known), *_data(cfg, ran)]
    found.append(_code(ran.environment, str(folder)))
    if minutes and ran.summary is not None:
        found.append(_again(cfg, ran, known, minutes))
    return found


def _files(folder: Path) -> Iterator[Finding]:
    """The files of a run, compared with its list of digests."""
    sums, bad = files.listed(folder), []
    for name in sums:
        if not (folder / name).is_file():
            # missing, not different: a checkpoint may be deleted to save room
            bad.append(Finding(str(folder / name), "missing", f"{files.SUMS} names it"))
            continue
        try:
            files.check(folder / name)
        except UserError as error:
            bad.append(Finding(str(folder / name), "differs", str(error).partition(": ")[2]))
    yield from bad
    if sums and not bad:
        yield Finding(str(folder), "whole", f"{several(len(sums), 'file')}, as {files.SUMS} says")
    if not sums:
        why = "made by an earlier version" if (folder / layout.SUMMARY).exists() else "not finished"
        yield Finding(f"{folder}: digests of its files", "missing", why)


def _checkpoints(ran: Ran) -> Iterator[Finding]:
    """The checkpoints: are they whole, and of this run?"""
    full = identity.left_by(ran.config, ran.directory)
    ours = {Identity(ran.config, weights=ran.stands_on).key, full.key}
    for path in (*layout.complete(ran.directory), *layout.best(ran.directory)):
        try:
            content = checkpoint.read(path)
        except UserError as error:
            yield Finding(str(path), "differs", str(error).partition(": ")[2])
            continue
        if isinstance(content, dict) and content.get("run") in ours:
            note = f"step {content['step']:,} of this configuration and these weights"
            yield Finding(str(path), "whole", note)
        elif _same_code(ran.environment):
            yield Finding(str(path), "differs", "it is of another configuration than config.yaml's")
        else:
            note = "another version named runs in another way"
            yield Finding(f"{path}: of this configuration?", "missing", note)


def _below(ran: Ran, known: Sequence[Ran]) -> Iterator[Finding]:
    """The weights that a run started from, by their content: where they were, or in known runs."""
    if not (source := ran.config.get("pretrained")):
        return
    what = f"{ran.directory}: pretrained={source}"
    if not ran.stands_on:
        yield Finding(what, "missing", f"no {layout.WEIGHTS} says which it was")
    elif path := _weights(ran, known):
        yield Finding(what, "whole", f"sha256 {ran.stands_on[:16]}..., now {path}")
    elif Path(source).is_file():
        now, then = files.digest(Path(source))[:8], ran.stands_on[:8]
        yield Finding(what, "differs", f"its sha256 is {now}..., not {then}..., of when it began")
    else:
        note = f"sha256 {ran.stands_on[:16]}...; runs= says where it may be"
        yield Finding(what, "missing", note)


def _weights(ran: Ran, known: Sequence[Ran]) -> Path | None:
    """The file of the weights that a run started from, wherever it is; None: not found."""
    source = Path(ran.config["pretrained"])
    for path in (source, *(one.directory / source.parent.name / source.name for one in known)):
        if path.is_file() and files.digest(path) == ran.stands_on:
            return path
    return None


def _data(cfg: DictConfig, ran: Ran) -> Iterator[Finding]:
    """The images, by their fingerprint (names, sizes, labels) and some files, and packed ones."""
    for split, facts in ran.inputs.items():
        what = f"{ran.directory}: images of '{split}'"
        try:
            images = open_data(cfg, ran).split(split)
        except (ValueError, OSError) as error:
            yield Finding(what, "missing", f"{error}; data= and data.root= say where they are")
            continue
        now = images.facts()
        if identity.same_images(facts, now):
            note = f"{facts['images']:,}, fingerprint {now['fingerprint'][:16]}"
            yield Finding(what, "whole", note)
        else:
            changed = [key for key in facts if key in now and facts[key] != now[key]]
            told = [f"{key} {str(now[key])[:16]}, was {str(facts[key])[:16]}" for key in changed]
            yield Finding(what, "differs", "; ".join(told))
        if (packed := store.place(images, cfg.data.cache)).is_dir():
            said = store.damage(packed)
            yield Finding(f"{what}, packed in {packed}", "differs" if said else "whole", said)


def _same_code(then: dict[str, Any]) -> bool:
    """Are commit and packages of this environment those of now?"""
    now = environment()
    if not then.get("git_commit"):
        return False
    return all(then.get(key) == now[key] for key in ("git_commit", "packages"))


def _code(then: dict[str, Any], whose: str) -> Finding:
    """Is the code of this environment at hand, or at least in the history of this checkout?

    Other code is missing, not different: the result may be right all the same.
    """
    now, commit, before = environment(), str(then.get("git_commit")), then.get("packages")
    what = f"{whose}: code"
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return Finding(what, "missing", "no commit is recorded")
    here = now["packages"]
    packages = before if isinstance(before, dict) else {}
    changed = [name for name, version in packages.items() if version != here.get(name)]
    other = [f"{name} {packages[name]}, here {here.get(name)}" for name in changed]
    if commit != now["git_commit"]:
        command = ["git", "-C", str(Path(ssl_bench.__file__).parent)]
        command += ["cat-file", "-e", f"{commit}^{{commit}}"]
        there = not subprocess.run(command, capture_output=True).returncode
        where = "which git checkout brings back" if there else "which isn't in this history"
        other.insert(0, f"commit {commit[:7]}, {where}")
    if then.get("git_dirty"):
        other.append("with changes that were not committed")
    if other:
        return Finding(what, "missing", "; ".join(other))
    return Finding(what, "whole", f"commit {commit[:7]}")


# -- again -----------------------------------------------------------------------------------------


def _again(cfg: DictConfig, ran: Ran, known: Sequence[Ran], minutes: float) -> Finding:
    """Run it again by its configuration, in a temporary folder, and compare the numbers."""
    what, expected = f"{ran.directory}: again", 60 * ran.values.get("hours", 0)
    if ran.stage not in REPEATED:
        return Finding(what, "missing", f"stage={ran.stage} is not done again: its runs are")
    if expected > minutes:
        advice = f"type stage.max_minutes={expected * 1.5:.0f}"
        return Finding(what, "missing", f"it took {expected:.0f} minutes: {advice}")
    weights = _weights(ran, known) if ran.config.get("pretrained") else None
    if ran.config.get("pretrained") and weights is None:
        return Finding(what, "missing", "what it stands on isn't here")
    print(f"{ran.directory}: again, {expected:.1f} minutes when it ran")
    place = ran.directory / layout.CONFIG
    groups = [group for group in build.SUPPLIED if ran.config.get(group)]
    nodes = {group: build.found(ran.config, group, cfg, place) for group in groups}
    if nodes["data"].get("name") == cfg.data.name and "root" in cfg.data:
        nodes["data"]["root"] = cfg.data.root
    nodes["data"] |= {"cache": cfg.data.cache, "workers": cfg.data.workers}
    nodes["tracking"] = {"name": "local", "_target_": "ssl_bench.runs.tracking.NoTracker"}
    with tempfile.TemporaryDirectory() as folder:
        own = {"dir": folder + "/again", "pretrained": weights and str(weights)}
        again = build.literal({**ran.config, **nodes, **own})
        build.check(again)
        summary = launch(again)
    return _compared(what, ran, summary)


def _compared(what: str, ran: Ran, again: dict[str, float]) -> Finding:
    """The result of a finished run compared with that of its rerun."""
    then = {key: value for key, value in (ran.summary or {}).items() if key not in SPEED}
    if all(again.get(key) == value for key, value in then.items()):
        shown = ", ".join(f"{key} {value:.6g}" for key, value in then.items())
        return Finding(what, "whole", f"the same to the last digit: {shown}")
    key = next((key for key in then if key.endswith("top1")), next(iter(then)))
    value, now = again.get(key, float("nan")), environment()
    note = f"{key} {value:.6g}, was {then[key]:.6g}"
    machine = ("platform", "python", "cpu_threads", "gpus")
    same_machine = all(ran.environment.get(name) == now[name] for name in machine)
    same = _same_code(ran.environment) and same_machine
    close = key.endswith("top1") and abs(value - then[key]) <= TOLERANCE
    if close and (not same or now["gpus"]):
        why = f"within {TOLERANCE} points, on another machine or by other versions"
        return Finding(what, "whole", f"{note}: {why}")
    return Finding(what, "differs", note)


# -- tables ----------------------------------------------------------------------------------------


def of_page(path: Path, known: Sequence[Ran]) -> Iterator[Finding]:
    """Is each table of a page what its results file gives? And the findings on each such file."""
    text = path.read_text(encoding="utf-8")
    made_of = []
    for block in tables.BLOCK.finditer(text):
        what = f"{path}: table of {block[2]}"
        try:
            same = tables.fill(block[0], path.parent) == block[0]
        except UserError as error:
            yield Finding(what, "differs", str(error))
            continue
        if same:
            yield Finding(what, "whole")
        else:
            advice = f"ssl-bench stage=report stage.readme={path}"
            yield Finding(what, "differs", f"not what the file gives: {advice}")
        made_of.append(path.parent / block[2])
    for table in dict.fromkeys(made_of):
        yield from of_table(table, known)
    if not tables.BLOCK.search(text):
        yield Finding(f"{path}: tables", "missing", "none is marked by <!-- results: FILE.json -->")


def of_table(path: Path, known: Sequence[Ran]) -> Iterator[Finding]:
    """The rows of a results file, made again from the runs that it names by their digests.

    known: the runs among which they may be.
    """
    rows, content = tables.load(path), tables.remarks(path)
    yield _code(content, str(path))
    there = {record.evidence(ran)["key"]: ran for ran in known if ran.summary is not None}
    unnamed = [row for row in rows if "runs" not in row]
    if unnamed and not there:
        note = f"{len(unnamed)} rows, written by an earlier version, don't name theirs: runs= may"
        yield Finding(f"{path}: its runs", "missing", note)
    for row in rows:
        what, named = f"{path}: row {row['name']} of {row.get('stage')}", row.get("runs", ())
        for one in named:
            yield from _named(f"{path}: {one['run']}", one, there.get(one["key"]))
        runs = list(there.values())
        if named:
            runs = [there[one["key"]] for one in named if one["key"] in there]
        if named and len(runs) < len(named):
            absent = f"{len(named) - len(runs)} of its {len(named)} runs"
            yield Finding(what, "missing", f"{absent} are not among runs=")
        elif runs:
            yield _row(what, row, runs)


def _named(what: str, one: dict[str, Any], ran: Ran | None) -> Iterator[Finding]:
    """A run compared with the digests that a row has of it."""
    if ran is None:
        return
    now, keys = record.evidence(ran), ("summary", "weights", "stands_on", "images")
    other = [key for key in keys if one[key] and now[key] != one[key]]
    if not other:
        yield Finding(what, "whole", f"in {ran.directory}")
    elif any(now[key] for key in other):
        yield Finding(what, "differs", f"{', '.join(other)} of {ran.directory} are others now")
    else:
        yield Finding(what, "missing", f"{', '.join(other)} of {ran.directory}")


def _row(what: str, row: dict[str, Any], runs: Sequence[Ran]) -> Finding:
    """The values of a row compared with those that its runs give now."""
    rows = [one for board in grouping.boards(runs) for one in board.rows]
    made = [one["values"] for one in rows if one["stage"] == row.get("stage")]
    if row["values"] in made:
        return Finding(what, "whole", f"the same from its runs, n = {row.get('n')}")
    ordered = dict.fromkeys([row.get("metric"), *row["values"]])  # the metric that judges it first
    values = row["values"]
    differing = [key for key in ordered if all(one.get(key) != values.get(key) for one in made)]
    metric = next(iter([*differing, *values]))
    shown = [" ".join(f"{x:.6g}" for x in one.get(metric, ())) for one in (values, *made)]
    then, now = shown[0], shown[1:]
    return Finding(what, "differs", f"{metric} {then}, from its runs {', '.join(now) or 'none'}")
