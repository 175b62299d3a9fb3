"""A sweep for people: what its members are doing, and the table of their results."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_bench import files
from ssl_bench.report.grouping import Group, differences, groups, ranked
from ssl_bench.report.tables import cell, markdown
from ssl_bench.runs import sweep
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.record import Ran, find
from ssl_bench.runs.sweep import Member, State
from ssl_bench.runs.units import mean_std


def overview(members: Sequence[Member], states: Sequence[State], metric: str | None = None) -> str:
    """A line a member: state, step, the newest value of the metric, by default of its own."""
    from ssl_bench.report import tables
    from ssl_bench.runs import units  # import numpy

    rows = []
    for member, state in zip(members, states, strict=True):
        part, epochs = member.under_way
        lines = MetricsFile.read(path) if (path := part / "metrics.jsonl").exists() else []
        step = value = ""
        shown = metric or member.config["metric"]
        if lines:
            done, epoch = lines[-1]["step"], lines[-1]["epoch"]
            of = f"{part.relative_to(member.directory)}: " if part != member.directory else ""
            step = f"{of}{done:,}/{round(done / epoch * epochs):,}"
        result = next((line for line in reversed(lines) if shown in line), {}) | (
            member.result() or {}
        )
        if shown in result:
            value = f"{shown} {units.spoken(shown, result[shown])}"
        rows.append([member.name, state.name, step, value, " ".join(state.note.split())])
    return tables.markdown(["member", "state", "step", "metric", ""], rows)


COST = ("images_per_second", "memory_gb")  # of the training, where a summary has them


def sweep_table(folder: Path, metric: str | None = None) -> str:
    """table.md and table.csv of a sweep; returns the former, or "" as long as no member has the
    metric.

    Its rows are those of a report (`groups`), with what tells them apart on the command line, or
    where YAML files were edited meanwhile, in the configuration. metric: None is what the members
    name.
    """
    members = {member.directory.resolve(): member for member in sweep.members(folder)}
    # and not those within a pipeline
    runs = [ran for ran in find([folder]) if ran.directory.resolve() in members]
    member_of = {ran: members[ran.directory.resolve()] for ran in runs}
    metric, able, rows = ranked(groups(runs), metric)
    if not any(row.values(metric) for row in rows):
        return ""
    keys = _told_apart(rows, member_of)
    if not able:  # by what was typed
        order = sorted(range(len(rows)), key=lambda i: [words[i] for words in keys.values()])
        rows, keys = (
            [rows[i] for i in order],
            {key: [words[i] for i in order] for key, words in keys.items()},
        )
    costs = [key for key in COST if any(row.values(key) for row in rows)]
    numbers = [row.row(metric) for row in rows]
    shown = [
        [
            *(words[i] for words in keys.values()),
            *(cell(row, column) for column in (metric, "n", *costs)),
        ]
        for i, row in enumerate(numbers)
    ]
    text = markdown([*keys, metric, "n", *costs], shown, right=2 + len(costs))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*keys, f"{metric} mean", f"{metric} std", *COST, "finished", "members"])
    for i, (group, row) in enumerate(zip(rows, numbers, strict=True)):
        spread = mean_std(group.values(metric) or [math.nan])
        means = [mean_std(group.values(key) or [math.nan])[0] for key in COST]
        writer.writerow(
            [*(words[i] for words in keys.values()), *spread, *means, row["n"], row["members"]]
        )
    files.write(folder / "table.md", text + "\n")
    files.write(folder / "table.csv", file.getvalue())
    return text


def _told_apart(rows: Sequence[Group], members: Mapping[Ran, sweep.Member]) -> dict[str, list[str]]:
    """{key: its value in each row}, of what differs: overrides, and what else does where these are
    the same.
    """
    keys = dict.fromkeys(
        key for member in members.values() for key in member.choices if key != "seed"
    )
    found = {
        key: [_values(key, [members[ran] for ran in row.runs]) for row in rows] for key in keys
    }
    found = {key: words for key, words in found.items() if len(set(words)) > 1}
    typed = list(zip(*found.values(), strict=True)) or [()] * len(rows)
    for words in {words for words in typed if typed.count(words) > 1}:
        alike = [row.runs[0] for row, mine in zip(rows, typed, strict=True) if mine == words]
        edited = differences(alike).keys() - found.keys()
        everywhere = differences([row.runs[0] for row in rows])
        found |= {key: everywhere[key] for key in sorted(edited)}
    return found


def _values(key: str, members: Sequence[sweep.Member]) -> str:
    """Of one row: several where they are of seeds, as of the pretrainings that it stands on."""
    words = list(dict.fromkeys(member.value(key) for member in members))
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
