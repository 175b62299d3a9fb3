"""Stage verify: a table or a result from the content that it stands on."""

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
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.report import grouping, tables
from ssl_bench.report.tables import plain
from ssl_bench.runs import checkpoint, identity, layout, record, weights
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run, environment
from ssl_bench.stages.report import open_data

READS = ("runs", "data.name", "data.root", "data.cache", "data.workers")
REPEATED = ("pretrain", "lincls", "knn", "finetune")  # by rerun
WEIGHTS = (".pt", ".pth", ".tar", ".safetensors", ".onnx")
# of top-1, in points, between machines or versions; on the same CPU the numbers are the same
TOLERANCE = 0.5
SPEED = ("images_per_second", "memory_gb", "data_wait", "hours")  # no result


class Finding(NamedTuple):
    what: str
    state: Literal["whole", "missing", "differs"]
    note: str = ""


def verify(
    cfg: DictConfig,
    run: Run,
    what: Place | list[Place] | None = None,
    rerun: bool = False,
    max_minutes: PositiveFloat = 10,
) -> dict[str, float]:
    """Print a line for each thing that `what` stands on, and whether that is whole, missing, or
    differs.

    what: runs, folders of them, files of weights, results files, Markdown with their tables; null:
    `cfg.runs`. `cfg.runs`: where the runs are that tables were made of, and those that evaluations
    stand on, if they have moved. rerun: runs are done again where they took less than `max_minutes`
    each. Returns counts; UserError where something differs.
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
    counts = {
        state: sum(one.state == state for one in found) for state in ("whole", "missing", "differs")
    }
    if counts["differs"]:
        first = next(one for one in found if one.state == "differs")
        raise UserError(f"{counts['differs']} of {len(found)} differ: {first.what}: {first.note}")
    return counts


verify.single_process = True


def _of(cfg: DictConfig, path: Path, known: Sequence[Ran], minutes: float) -> list[Finding]:
    if path.is_dir():
        below = sorted(
            {
                file.parent
                for file in path.rglob("metrics.jsonl")
                if file.with_name("config.yaml").exists()
            }
        )
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
    """By its list, and by what is in it."""
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
    """Its files, its checkpoints, its configuration, what it stands on, its data, its code; again,
    if minutes.
    """
    found = list(_files(folder))
    try:
        ran = Ran.read(folder)
    except UserError as error:
        return (
            found
            if any(one.state == "differs" for one in found)
            else [Finding(str(folder), "differs", str(error))]
        )
    found += [
        *_checkpoints(ran),
        *_below(ran, known),
        *_data(cfg, ran),
        _code(ran.environment, str(folder)),
    ]
    if minutes and ran.summary is not None:
        found.append(_again(cfg, ran, known, minutes))
    return found


def _files(folder: Path) -> Iterator[Finding]:
    sums, bad = files.listed(folder), []
    for name in sums:
        if not (folder / name).is_file():
            # of the checkpoint a later command may need nothing: who deletes it to save room loses
            # no result
            bad.append(Finding(str(folder / name), "missing", f"{files.SUMS} names it"))
            continue
        try:
            files.check(folder / name)
        except UserError as error:
            bad.append(Finding(str(folder / name), "differs", str(error).partition(": ")[2]))
    yield from bad
    if sums and not bad:
        yield Finding(str(folder), "whole", f"{len(sums)} files, as {files.SUMS} says")
    if not sums:
        why = "made by an earlier version" if (folder / "summary.json").exists() else "not finished"
        yield Finding(f"{folder}: digests of its files", "missing", why)


def _checkpoints(ran: Ran) -> Iterator[Finding]:
    """Whole, and of this configuration."""
    ours = {
        Identity(ran.config, weights=ran.stands_on).key,
        identity.left_by(ran.config, ran.directory).key,
    }
    for path in layout.complete(ran.directory):
        try:
            content = checkpoint.read(path)
        except UserError as error:
            yield Finding(str(path), "differs", str(error).partition(": ")[2])
            continue
        if isinstance(content, dict) and content.get("run") in ours:
            yield Finding(
                str(path),
                "whole",
                f"step {content['step']:,} of this configuration and these weights",
            )
        elif _same_code(ran.environment):
            yield Finding(str(path), "differs", "it is of another configuration than config.yaml's")
        else:
            yield Finding(
                f"{path}: of this configuration?",
                "missing",
                "another version named runs in another way",
            )


def _below(ran: Ran, known: Sequence[Ran]) -> Iterator[Finding]:
    """What it stands on: by content, where it was or among the known runs."""
    if not (source := ran.config.get("pretrained")):
        return
    what = f"{ran.directory}: pretrained={source}"
    if not ran.stands_on:
        yield Finding(what, "missing", f"no {layout.WEIGHTS} says which it was")
    elif path := _weights(ran, known):
        yield Finding(what, "whole", f"sha256 {ran.stands_on[:16]}..., now {path}")
    elif Path(source).is_file():
        now = files.digest(Path(source))
        yield Finding(
            what,
            "differs",
            f"its sha256 is {now[:8]}..., not {ran.stands_on[:8]}..., of when it began",
        )
    else:
        yield Finding(
            what, "missing", f"sha256 {ran.stands_on[:16]}...; runs= says where it may be"
        )


def _weights(ran: Ran, known: Sequence[Ran]) -> Path | None:
    """The file that it stands on, wherever that is."""
    source = Path(ran.config["pretrained"])
    likely = [source, *(one.directory / "checkpoints" / source.name for one in known)]
    return next(
        (path for path in likely if path.is_file() and files.digest(path) == ran.stands_on), None
    )


def _data(cfg: DictConfig, ran: Ran) -> Iterator[Finding]:
    """The images by their fingerprint: names, sizes, labels."""
    for split, facts in ran.inputs.items():
        what = f"{ran.directory}: images of '{split}'"
        try:
            images = open_data(cfg, ran).split(split)
        except (ValueError, OSError) as error:
            yield Finding(what, "missing", f"{error}; data= and data.root= say where they are")
            continue
        if (now := images.fingerprint) == facts["fingerprint"]:
            yield Finding(what, "whole", f"{facts['images']:,}, fingerprint {now[:16]}")
        else:
            yield Finding(
                what, "differs", f"fingerprint {now[:16]}, was {facts['fingerprint'][:16]}"
            )
        if (packed := store.place(images, cfg.data.cache)).is_dir():
            said = store.damage(packed)
            yield Finding(f"{what}, packed in {packed}", "differs" if said else "whole", said)


def _same_code(then: dict[str, Any]) -> bool:
    now = environment()
    return bool(then.get("git_commit")) and all(
        then.get(key) == now[key] for key in ("git_commit", "packages")
    )


def _code(then: dict[str, Any], whose: str) -> Finding:
    """The code at hand, or at least in the history of this checkout. Other code is no fault of a
    result.
    """
    now, commit, before = environment(), str(then.get("git_commit")), then.get("packages")
    what = f"{whose}: code"
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return Finding(what, "missing", "no commit is recorded")
    here = now["packages"]
    packages = before.items() if isinstance(before, dict) else ()
    other = [
        f"{name} {was}, here {here.get(name)}" for name, was in packages if was != here.get(name)
    ]
    if commit != now["git_commit"]:
        command = [
            "git",
            "-C",
            str(Path(ssl_bench.__file__).parent),
            "cat-file",
            "-e",
            f"{commit}^{{commit}}",
        ]
        there = not subprocess.run(command, capture_output=True).returncode
        where = "which git checkout brings back" if there else "which isn't in this history"
        other.insert(0, f"commit {commit[:7]}, {where}")
    if then.get("git_dirty"):
        other.append("with changes that were not committed")
    return (
        Finding(what, "missing", "; ".join(other))
        if other
        else Finding(what, "whole", f"commit {commit[:7]}")
    )


# -- again -----------------------------------------------------------------------------------------


def _again(cfg: DictConfig, ran: Ran, known: Sequence[Ran], minutes: float) -> Finding:
    """The run once more, by its own configuration in a temporary folder; its numbers compared."""
    what, expected = f"{ran.directory}: again", 60 * ran.values.get("hours", 0)
    if ran.stage not in REPEATED:
        return Finding(what, "missing", f"stage={ran.stage} is not done again: its runs are")
    if expected > minutes:
        return Finding(
            what,
            "missing",
            f"it took {expected:.0f} minutes: type stage.max_minutes={expected * 1.5:.0f}",
        )
    weights = _weights(ran, known) if ran.config.get("pretrained") else None
    if ran.config.get("pretrained") and weights is None:
        return Finding(what, "missing", "what it stands on isn't here")
    print(f"{ran.directory}: again, {expected:.1f} minutes when it ran")
    place = ran.directory / "config.yaml"
    nodes = {
        key: build.found(ran.config, key, cfg, place)
        for key in build.SUPPLIED
        if ran.config.get(key)
    }
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
    then = {key: value for key, value in ran.summary.items() if key not in SPEED}
    if all(again.get(key) == value for key, value in then.items()):
        shown = ", ".join(f"{key} {value:.6g}" for key, value in then.items())
        return Finding(what, "whole", f"the same to the last digit: {shown}")
    key = next((key for key in then if key.endswith("top1")), next(iter(then)))
    note, now = f"{key} {again.get(key, float('nan')):.6g}, was {then[key]:.6g}", environment()
    same = _same_code(ran.environment) and all(
        ran.environment.get(key) == now[key]
        for key in ("platform", "python", "cpu_threads", "gpus")
    )
    close = key.endswith("top1") and abs(again.get(key, float("nan")) - then[key]) <= TOLERANCE
    if close and (not same or now["gpus"]):
        return Finding(
            what,
            "whole",
            f"{note}: within {TOLERANCE} points, on another machine or by other versions",
        )
    return Finding(what, "differs", note)


# -- tables ----------------------------------------------------------------------------------------


def of_page(path: Path, known: Sequence[Ran]) -> Iterator[Finding]:
    """Each table between its marks is what its file gives, and each file stands on what it says."""
    text = path.read_text(encoding="utf-8")
    made_of = []
    for block in tables.BLOCK.finditer(text):
        what = f"{path}: table of {block[2]}"
        try:
            same = tables.fill(block[0], path.parent) == block[0]
        except UserError as error:
            yield Finding(what, "differs", str(error))
            continue
        yield (
            Finding(what, "whole")
            if same
            else Finding(
                what,
                "differs",
                f"not what the file gives: ssl-bench stage=report stage.readme={path}",
            )
        )
        made_of.append(path.parent / block[2])
    for table in dict.fromkeys(made_of):
        yield from of_table(table, known)
    if not tables.BLOCK.search(text):
        yield Finding(f"{path}: tables", "missing", "none is marked by <!-- results: FILE.json -->")


def of_table(path: Path, known: Sequence[Ran]) -> Iterator[Finding]:
    """Its rows made again from the runs that it names by content, as far as these are known."""
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
        runs = (
            [there[one["key"]] for one in named if one["key"] in there]
            if named
            else list(there.values())
        )
        if named and len(runs) < len(named):
            yield Finding(
                what,
                "missing",
                f"{len(named) - len(runs)} of its {len(named)} runs are not among runs=",
            )
        elif runs:
            yield _row(what, row, runs)


def _named(what: str, one: dict[str, Any], ran: Ran | None) -> Iterator[Finding]:
    """A run of a row, by the digests that the file has of it."""
    if ran is None:
        return
    now = record.evidence(ran)
    other = [
        key
        for key in ("summary", "weights", "stands_on", "images")
        if one[key] and now[key] != one[key]
    ]
    if not other:
        yield Finding(what, "whole", f"in {ran.directory}")
    elif any(now[key] for key in other):
        yield Finding(what, "differs", f"{', '.join(other)} of {ran.directory} are others now")
    else:
        yield Finding(what, "missing", f"{', '.join(other)} of {ran.directory}")


def _row(what: str, row: dict[str, Any], runs: Sequence[Ran]) -> Finding:
    """Its values, made again."""
    made = [
        one["values"]
        for board in grouping.boards(runs)
        for one in board.rows
        if one["stage"] == row.get("stage")
    ]
    if row["values"] in made:
        return Finding(what, "whole", f"the same from its runs, n = {row.get('n')}")
    ordered = dict.fromkeys([row.get("metric"), *row["values"]])  # first what it is judged by
    differing = [
        key for key in ordered if all(one.get(key) != row["values"].get(key) for one in made)
    ]
    metric = next(iter([*differing, *row["values"]]))
    then, *now = (
        " ".join(f"{x:.6g}" for x in one.get(metric, ())) for one in (row["values"], *made)
    )
    return Finding(what, "differs", f"{metric} {then}, from its runs {', '.join(now) or 'none'}")
