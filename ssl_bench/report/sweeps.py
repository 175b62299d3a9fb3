"""A sweep for people: the state of its members, and the table of their results."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_bench import files
from ssl_bench.report.grouping import Group, differences, groups, ranked
from ssl_bench.report.tables import cell, markdown
from ssl_bench.runs import layout, sweep
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.record import Ran, find
from ssl_bench.runs.sweep import Member, State
from ssl_bench.runs.units import mean_std, spoken


def overview(members: Sequence[Member], states: Sequence[State], metric: str | None = None) -> str:
    """Markdown with a line for each member: state, step, the newest value of a metric.

    metric: None for the one that each member names.
    """
    rows = []
    for member, state in zip(members, states, strict=True):
        part, epochs = member.under_way
        lines = MetricsFile.read(path) if (path := part / layout.METRICS).exists() else []
        step = value = ""
        shown = metric or member.config["metric"]
        if lines:
            done, epoch = lines[-1]["step"], lines[-1]["epoch"]
            of = f"{part.relative_to(member.directory)}: " if part != member.directory else ""
            step = f"{of}{done:,}/{round(done / epoch * epochs):,}"
        having = [line for line in lines if shown in line]
        result = (having[-1] if having else {}) | (member.result() or {})
        if shown in result:
            value = f"{shown} {spoken(shown, result[shown])}"
        rows.append([member.name, state.name, step, value, " ".join(state.note.split())])
    return markdown(["member", "state", "step", "metric", ""], rows)


COST = ("images_per_second", "memory_gb")  # columns that a table has if runs measured them


def sweep_table(folder: Path, metric: str | None = None) -> str:
    """Write table.md and table.csv of a sweep; returns table.md, or "" if no run has the metric.

    The rows are those of a report (`groups`), with what tells them apart on the command line and,
    if YAML files were edited between commands, in the configuration. metric: None for the one that
    the members name.
    """
    members = {member.directory.resolve(): member for member in sweep.members(folder)}
    if not members:  # all were dropped
        return ""
    # not the runs within a pipeline, which is the member
    runs = [ran for ran in find([folder]) if ran.directory.resolve() in members]
    member_of = {ran: members[ran.directory.resolve()] for ran in runs}
    metric, able, rows = ranked(groups(runs), metric)
    if not any(row.values(metric) for row in rows):
        return ""
    keys = _told_apart(rows, member_of)
    if not able:  # in the order of what was typed
        order = sorted(range(len(rows)), key=lambda i: [words[i] for words in keys.values()])
        rows = [rows[i] for i in order]
        keys = {key: [words[i] for i in order] for key, words in keys.items()}
    choices = [[words[i] for words in keys.values()] for i in range(len(rows))]
    numbers = [row.row(metric) for row in rows]
    others = _both_stages(rows, metric)
    costs = [key for key in COST if any(row.values(key) for row in rows)]
    columns = [metric, *others, "n", *costs]
    shown = [
        [*words, *(cell(row, column) for column in columns)]
        for words, row in zip(choices, numbers, strict=True)
    ]
    text = markdown([*keys, *columns], shown, right=len(columns))
    file = io.StringIO()
    writer = csv.writer(file)
    spreads = [f"{key} {what}" for key in (metric, *others) for what in ("mean", "std")]
    writer.writerow([*keys, *spreads, *COST, "finished", "members"])
    for group, words, row in zip(rows, choices, numbers, strict=True):
        measured = [group.values(key) or [math.nan] for key in (metric, *others)]
        spread = [value for values in measured for value in mean_std(values)]
        means = [mean_std(group.values(key) or [math.nan])[0] for key in COST]
        writer.writerow([*words, *spread, *means, row["n"], row["members"]])
    files.write(folder / "table.md", text + "\n")
    files.write(folder / "table.csv", file.getvalue())
    return text


def _both_stages(rows: Sequence[Group], metric: str) -> list[str]:
    """The further results of pipelines: those of the other evaluations, and of the pretraining."""
    of_pipelines = [row for row in rows if row.stage == "pipeline"]
    known = [key for row in of_pipelines for ran in row.runs for key in ran.summary or ()]
    return [key for key in dict.fromkeys(known) if key not in (metric, *COST)]


def _told_apart(rows: Sequence[Group], members: Mapping[Ran, sweep.Member]) -> dict[str, list[str]]:
    """{key: its value in each row} of the keys in which rows differ.

    They are overrides and, for rows with the same overrides, what differs in the configuration.
    """
    choices = [key for member in members.values() for key in member.choices]
    of_row = [[members[ran] for ran in row.runs] for row in rows]
    found = {}
    for key in dict.fromkeys(key for key in choices if key != "seed"):
        values = [_values(key, members_of_one) for members_of_one in of_row]
        if len(set(values)) > 1:
            found[key] = values
    if "pretrained" in found:
        found = _by_settings(found, rows)
    typed = list(zip(*found.values(), strict=True)) or [()] * len(rows)
    for words in {words for words in typed if typed.count(words) > 1}:
        alike = [row.runs[0] for row, mine in zip(rows, typed, strict=True) if mine == words]
        edited = differences(alike).keys() - found.keys()
        everywhere = differences([row.runs[0] for row in rows])
        found |= {key: everywhere[key] for key in sorted(edited)}
    return found


def _by_settings(found: dict[str, list[str]], rows: Sequence[Group]) -> dict[str, list[str]]:
    """`found` with the settings of the pretrainings in place of their long paths, if these tell."""
    everywhere = differences([row.runs[0] for row in rows])
    below = {key: words for key, words in everywhere.items() if key.startswith("pretrained.")}
    told = set(zip(*below.values(), strict=True))
    if len(told) < len(set(found["pretrained"])):
        return found
    return {key: words for key, words in found.items() if key != "pretrained"} | below


def _values(key: str, members: Sequence[sweep.Member]) -> str:
    """The values of a key in one row: several if they name pretrainings of several seeds."""
    words = list(dict.fromkeys(member.value(key) for member in members))
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
