"""A sweep for people: the state of its members, and the table of their results."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from ssl_bench import files
from ssl_bench.report.grouping import Group, differences, groups, ranked
from ssl_bench.report.tables import cell, fitted, heading, markdown, width, wrapped
from ssl_bench.runs import code, identity, layout, sweep
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.record import Ran, find
from ssl_bench.runs.sweep import Member, State
from ssl_bench.runs.units import mean_std, spoken

SHOWN = 30  # at most so many characters of a step or value


def overview(members: Sequence[Member], states: Sequence[State], metric: str | None = None) -> str:
    """Counts of the states; a Markdown table with a line for each member; reasons, equal ones once.

    A member is named by the digits that its name ends with, and by what tells it from the others,
    in whose order the lines are. Columns that would be empty are left out. metric: None for the one
    that each member names.
    """
    # of a pipeline its pretraining has a line, too, and is no member
    each = [one for one, member in zip(states, members, strict=True) if not member.is_first]
    known = Counter(state.name for state in each)
    counts = ", ".join(f"{count} {name}" for name, count in known.items())
    choices = _choices(members)
    metrics = {metric or member.config.get("metric") for member in members}
    rows = []
    for member, state in zip(members, states, strict=True):
        part, epochs = member.under_way
        lines = MetricsFile.read(path) if (path := part / layout.METRICS).exists() else []
        step = value = left = ""
        shown = metric or member.config.get("metric")
        if lines:
            done, epoch = lines[-1]["step"], lines[-1].get("epoch")
            of = f"{part.relative_to(member.directory)}: " if part != member.directory else ""
            step = f"{of}{done:,}" + (f"/{round(done / epoch * epochs):,}" if epoch else "")
        having = [line for line in lines if shown in line]
        result = (having[-1] if having else {}) | (member.result() or {})
        if shown in result:
            value = spoken(shown, result[shown])
            value = value if len(metrics) == 1 else f"{shown} {value}"
        node, job = "", member.job or ""
        if state.name == "running":
            node = str(identity.environment(part).get("host", ""))
            left = _left(lines, epochs)
        step, value, node = (_cut(text, SHOWN) for text in (step, value, node))
        words = [values[member.name] for values in choices.values()] or [member.name]
        first = [_digits(member), "pretraining" if member.is_first else ""]
        rows.append([*first, *words, state.name, step, value, job, node, left])
    heads = ["", "part", *(choices or ["member"]), "state", "step"]
    heads += [str(*metrics) if len(metrics) == 1 else "metric", "job", "node", "left"]
    typed = slice(2, len(heads) - 6)
    rows.sort(key=lambda row: [_numbers_first(word) for word in row[typed]])
    columns = [column for column in zip(heads, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) + 3 for column in columns]
    longest = max(widths, default=0)
    while sum(min(one, longest) for one in widths) + 1 > width() and longest > 12:
        longest -= 1
    cells = [[_cut(text, longest - 3) for text in line] for line in zip(*columns, strict=True)]
    table = markdown(cells[0], cells[1:]) if cells else ""
    total = f"{len(each)} member{'s' if len(each) != 1 else ''}"
    parts = [f"{total}: {counts}" if counts else total, table, _reasons(members, states)]
    return "\n\n".join(filter(None, parts))


def _digits(member: Member) -> str:
    """The eight digits that its name ends with; of a pretraining, those of its pipeline."""
    found = re.search(r"-([0-9a-f]{8})(\.\w+)?$", member.name)
    return found[1] if found else member.name


def _choices(members: Sequence[Member]) -> dict[str, dict[str, str]]:
    """{the end of a key in which members differ: {name of a member: what was typed for it}}"""
    keys = dict.fromkeys(key for member in members for key in member.choices)
    found = {key: {one.name: one.choices.get(key, "") for one in members} for key in keys}
    told = {key: values for key, values in found.items() if len({*values.values()}) > 1}
    ends = Counter(key.rpartition(".")[2] for key in told)
    return {
        end if ends[end := key.rpartition(".")[2]] == 1 else key: values
        for key, values in told.items()
    }


def _numbers_first(word: str) -> tuple[bool, float, str]:
    """An order in which 0.03 comes before 0.1, and 2 before 10."""
    try:
        return False, float(word), ""
    except ValueError:
        return True, 0, word


def _left(lines: Sequence[Mapping[str, float]], epochs: int) -> str:
    """The time until a training ends, like 0:12:30, by its newest rate; "": that isn't known."""
    needed = ("images_per_second", "images_seen", "epoch")
    rated = [line for line in lines if all(line.get(key) for key in needed)]
    if not rated:
        return ""
    images = rated[-1]["images_seen"] * (epochs / rated[-1]["epoch"] - 1)
    return str(timedelta(seconds=round(images / rated[-1]["images_per_second"])))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _reasons(members: Sequence[Member], states: Sequence[State]) -> str:
    """What the states' notes say, each once, with the members that it is about."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for member, state in zip(members, states, strict=True):
        parts = " ".join(state.note.split()).split("; ")
        output = parts.pop() if parts[-1].startswith("see ") else ""
        if reason := "; ".join(parts) or output:
            groups.setdefault((state.name, reason), []).append((_digits(member), output))
    said = []
    for (name, reason), those in groups.items():
        where = next((output for _, output in those if output not in ("", reason)), "")
        digits = ", ".join(each for each, _ in those)
        said += [wrapped(str(State(name, reason))), wrapped(digits, "  ")]
        said += [wrapped(where, "  ")] if where else []
    return "\n".join(said)


COST = ("images_per_second", "memory_gb")  # columns that a table has if runs measured them


def sweep_table(folder: Path, metric: str | None = None) -> str:
    """Write table.md and table.csv of a sweep; returns the table, as far as the terminal has room
    for its columns, or "" if no run has the metric.

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
    keys |= _codes(rows)
    choices = [[words[i] for words in keys.values()] for i in range(len(rows))]
    numbers = [row.row(metric) for row in rows]
    others = _both_stages(rows, metric)
    costs = [key for key in COST if any(row.values(key) for row in rows)]
    columns = [metric, *others, "n", *costs]
    shown = [
        [*words, *(cell(row, column) for column in columns)]
        for words, row in zip(choices, numbers, strict=True)
    ]
    heads = [*keys, *map(heading, columns)]
    file = io.StringIO()
    writer = csv.writer(file)
    spreads = [f"{key} {what}" for key in (metric, *others) for what in ("mean", "std")]
    writer.writerow([*keys, *spreads, *COST, "finished", "members"])
    for group, words, row in zip(rows, choices, numbers, strict=True):
        measured = [group.values(key) or [math.nan] for key in (metric, *others)]
        spread = [value for values in measured for value in mean_std(values)]
        means = [mean_std(group.values(key) or [math.nan])[0] for key in COST]
        writer.writerow([*words, *spread, *means, row["n"], row["members"]])
    files.write(folder / "table.md", markdown(heads, shown, right=len(columns)) + "\n")
    files.write(folder / "table.csv", file.getvalue())
    return fitted(heads, shown, right=len(columns), least=len(heads) - len(costs))[0]


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


def _codes(rows: Sequence[Group]) -> dict[str, list[str]]:
    """{"code": the digests of that which the runs of each row had}; {}: it was the same for all."""
    codes = [{one[:8] for ran in row.runs for one in code.of(ran.environment)} for row in rows]
    if len(set().union(*codes)) < 2:
        return {}
    return {"code": [", ".join(sorted(each)) for each in codes]}


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
