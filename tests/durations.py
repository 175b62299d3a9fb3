"""What each test costs: `make quicktest` leaves out those that durations.json lists.

`make durations` runs every test with this as a plugin, writes the list anew, and prints the twenty
that cost most. CPU seconds of a test and of the processes that it waits for, not hours by the
clock, so that a busy machine finds the same ones.
"""

import argparse
import json
import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

LIST = Path(__file__).with_suffix(".json")
QUICK = 0.3  # CPU seconds that a test may take, or what it shares with others, to be a quick one
RECORD = "TEST_DURATIONS"  # names the file to which each worker appends


def cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + waited_for.ru_utime + waited_for.ru_stime


class Clock:
    """Measures tests without the fixtures that they share, and these apart."""

    def __init__(self, path: Path) -> None:
        self.path, self.shared = path, 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest
    ) -> Iterator[None]:
        before, within = cpu_seconds(), self.shared
        result = yield
        if fixturedef.scope != "function":
            self.shared = within  # those that it asked for are part of it
            cost = cpu_seconds() - before
            self.shared += cost
            self._write(fixture_key(fixturedef), cost)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before, self.shared = cpu_seconds(), 0.0
        result = yield
        self._write(key(item), cpu_seconds() - before - self.shared)
        return result

    def _write(self, name: str, cost: float) -> None:
        with self.path.open("a") as file:  # a line at once: workers share it
            file.write(json.dumps([name, cost]) + "\n")


def fixture_key(fixture: pytest.FixtureDef) -> str:
    return f"{fixture.baseid}::{fixture.argname}"


def key(item: pytest.Item) -> str:
    """The test's id, without the group that pytest-xdist adds."""
    groups = [mark.args[0] for mark in item.iter_markers("xdist_group") if mark.args]
    for group in groups:
        if item.nodeid.endswith(f"@{group}"):
            return item.nodeid.removesuffix(f"@{group}")
    return item.nodeid


def mark(items: list[pytest.Item]) -> None:
    """Give the marker `seconds` to what the list names."""
    listed = {*json.loads(LIST.read_text())} if LIST.exists() else set()
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()  # pytest has no public way
        names = {key(item), key(item).split("[")[0]}
        names.update(fixture_key(one) for several in fixtures for one in several)
        if names & listed:
            item.add_marker(pytest.mark.seconds)


def summed_up(records: Path) -> tuple[list[str], list[tuple[float, str]]]:
    """The list, and the costs, the highest first. A test is listed by its function if all of that
    function's cases are.
    """
    costs: dict[str, float] = {}
    for line in records.read_text().splitlines():
        name, cost = json.loads(line)
        costs[name] = max(cost, costs.get(name, 0.0))
    cases: dict[str, list[str]] = defaultdict(list)
    for name in costs:
        cases[name.split("[")[0]].append(name)
    listed = []
    for function, names in cases.items():
        slow = [name for name in names if costs[name] > QUICK]
        listed += [function] if len(slow) == len(names) else slow
    return sorted(listed), sorted(((cost, name) for name, cost in costs.items()), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help=f"what the tests wrote with {RECORD}=FILE")
    listed, costs = summed_up(parser.parse_args().records)
    LIST.write_text(json.dumps(listed, indent=0, ensure_ascii=False) + "\n")
    print(f"{sum(cost for cost, _ in costs):,.0f} CPU seconds; {len(listed)} over {QUICK} s")
    for cost, name in costs[:20]:
        print(f"{cost:7.1f}  {name}")


def clock() -> Clock | None:
    return Clock(Path(os.environ[RECORD])) if RECORD in os.environ else None


if __name__ == "__main__":
    main()
