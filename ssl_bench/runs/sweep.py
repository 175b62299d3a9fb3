"""A sweep on disk: its members as composed, what became of them, and the table of their results.

SWEEP/.members/NAME.json     a member: overrides, resolved configuration, directory, Slurm job
SWEEP/.members/NAME.failed   why its last attempt failed
SWEEP/.members/conf-HASH/    the YAML files as they were, for the stages that compose more
SWEEP/NAME/                  its run directory
SWEEP/table.md, table.csv    the results of all members; see `report.sweeps.sweep_table`
"""

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import yaml

from ssl_bench import files
from ssl_bench.config.typed import key_of
from ssl_bench.errors import UserError
from ssl_bench.runs import identity, layout
from ssl_bench.runs.identity import Identity


@dataclass
class Member:
    file: Path
    overrides: list[str]
    config: dict  # plain and resolved: what it will run, whatever becomes of the YAML files
    cwd: str
    conf: str  # folder of those files
    job: str | None = None

    @classmethod
    def load(cls, file: Path) -> "Member":
        values = files.parse(file, json.loads)
        try:
            made = cls(file, **values)
            texts = [made.cwd, made.conf, made.job or "", made.config["dir"], *made.overrides]
            assert all(isinstance(text, str) for text in texts)
        except (TypeError, KeyError, AssertionError):
            raise UserError(f"{file}: not a member of a sweep; delete it") from None
        return made

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in asdict(self).items() if key != "file"}
        files.write(self.file, json.dumps(values, indent=1))

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def directory(self) -> Path:
        """Of its run: in the folder of the sweep, wherever that is by now, unless `dir=` put it
        elsewhere.
        """
        chosen = Path(self.cwd, self.config["dir"])
        return self.file.parents[1] / self.name if chosen.name == self.name else chosen

    @property
    def under_way(self) -> tuple[Path, int]:
        """The directory of its run, or of a pipeline's newest part, and the epochs of that."""
        parts = [path for path in self.directory.glob("**/metrics.jsonl") if path.stat().st_size]
        newest = max(parts, key=lambda path: path.stat().st_mtime_ns, default=None)
        if newest is None or newest.parent == self.directory:
            return self.directory, self.config["epochs"]
        return newest.parent, files.parse(newest.with_name("config.yaml"), yaml.safe_load)["epochs"]

    @property
    def has_state(self) -> bool:
        """Has its run, or a part of it, saved anything?"""
        return any(layout.has_state(path.parent) for path in self.directory.glob("**/config.yaml"))

    @property
    def lock(self) -> Path:
        return self.directory / ".lock"

    @property
    def output(self) -> Path | None:
        """Of the process or the Slurm job that it has of its own."""
        path = (
            self.file.parents[1] / ".submitit" / self.job
            if self.job
            else self.file.with_suffix(".log")
        )
        if not path.exists():
            return None
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    @property
    def failure(self) -> str | None:
        try:
            return json.loads(self._failed.read_text(encoding="utf-8"))["reason"]
        except (FileNotFoundError, json.JSONDecodeError):  # not there, or not yet
            return None

    def fail(self, reason: str, rank: int = 0) -> None:
        """The first rank to fail has the cause; the others fail because it has left."""
        with suppress(FileExistsError), open(self._failed, "x", encoding="utf-8") as file:
            json.dump({"reason": reason, "rank": rank, "job": self.job}, file)

    def forget_failure(self) -> None:
        self._failed.unlink(missing_ok=True)

    @property
    def _failed(self) -> Path:
        return self.file.with_suffix(".failed")

    def result(self) -> dict[str, float] | None:
        """What its run has come to, if it is finished and was run as configured here."""
        if (summary := self._read("summary.json", json.loads)) is None:
            return None
        if (ran := self._read("config.yaml", yaml.safe_load)) is None or self._changes(ran):
            return None
        then, now = (
            identity.real(config["data"].get("root") or ".") for config in (ran, self.config)
        )
        return summary if then == now else None  # else it looks itself

    @property
    def conflict(self) -> str:
        """In words, how what was run in its directory differs from it."""
        ran = self._read("config.yaml", yaml.safe_load)
        return self._changes(ran) if ran is not None and layout.has_state(self.directory) else ""

    @property
    def stale(self) -> bool:
        """Did it stand on other weights than `pretrained` means now?"""
        known, source = identity.recorded(self.directory), self.config.get("pretrained")
        weights = layout.weights_of(Path(self.cwd, source)) if known and source else None
        return weights is not None and files.digest(weights) != known

    def _changes(self, ran: dict) -> str:
        """But for what the weights decided when it was launched: there is the very file, and how
        images looked.
        """
        look, then = (config.get("augmentation") or {} for config in (self.config, ran))
        look = look | {
            key: then.get(key) for key in ("mean", "std") if key in look and look[key] is None
        }
        before = identity.left_by(ran | {"pretrained": None}, self.directory)
        return identity.changes(
            before, Identity(self.config | {"pretrained": None, "augmentation": look})
        )

    def _read(self, name: str, parse: Callable[[str], Any]) -> Any:
        path = self.directory / name
        return files.parse(path, parse) if path.is_file() else None

    def value(self, key: str) -> str:
        """Of an override, or of the configuration where this member has none."""
        if key in self.choices:
            return self.choices[key]
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return (
            str(node.get("name", ""))
            if isinstance(node, dict)
            else ""
            if node is None
            else str(node)
        )

    @cached_property
    def choices(self) -> dict[str, str]:
        return {
            key_of(word): word.partition("=")[2]
            for word in self.overrides
            if not identity.is_free(key_of(word))
        }


def name(overrides: Sequence[str]) -> str:
    """Of the member with these overrides: readable, bounded, and the same wherever it runs."""
    words = [word for word in overrides if not identity.is_free(key_of(word))]
    digest = blake2b("\n".join(sorted(words)).encode(), digest_size=4).hexdigest()
    pairs = (word.partition("=") for word in words)
    # Of a path what it ends in, or there would be no room for it.
    shown = [
        f"{key.rpartition('.')[2]}-{value.rstrip('/').rpartition('/')[2]}"
        for key, _, value in pairs
    ]
    # what is swept tends to come last on the command line
    while len(shown) > 1 and len("-".join(shown)) > 80:
        shown.pop(0)
    return f"{identity.slug('-'.join(shown))}-{digest}"


def members(folder: Path) -> list[Member]:
    return [Member.load(file) for file in sorted((folder / ".members").glob("*.json"))]


# -- what became of them ---------------------------------------------------------------------------


class State(NamedTuple):
    # finished, running, pending, failed, stopped (it will continue), waiting, or Slurm's word
    name: str
    note: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, self))


def states(members: Sequence[Member]) -> list[State]:
    jobs = [member.job for member in members if member.job]
    queue = (queued() or {}) if jobs else {}
    ended = accounted(jobs) if jobs else {}
    return [_state(member, queue, ended) for member in members]


def _state(member: Member, queue: dict[str, State], ended: dict[str, str]) -> State:
    if member.result() is not None:
        return State("finished")
    if member.job in queue:
        return queue[member.job]
    if locked(member.lock):
        return State("running")
    if reason := member.failure:
        return State("failed", "; ".join(filter(None, [reason, _see(member)])))
    if (word := ended.get(member.job or "", "completed")) != "completed":
        return State(word, _see(member))
    return State("stopped" if member.has_state else "waiting")


def _see(member: Member) -> str:
    return f"see {member.output}" if member.output else ""


def queued() -> dict[str, State] | None:
    """This user's jobs that Slurm will run or is running; None where it doesn't answer."""
    lines = _ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r")
    if lines is None:
        return None
    queue = {}
    for line in lines:
        job, state, reason = line.split("|")
        queue[job] = State(state.lower(), "" if reason == "None" else reason)
    return queue


def accounted(jobs: Sequence[str]) -> dict[str, str]:
    """How Slurm's accounting says that jobs ended, where there is one: {job: "timeout"}."""
    lines = _ask("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", ",".join(jobs)) or []
    return {
        job: state.split()[0].lower() for job, _, state in (line.partition("|") for line in lines)
    }


def _ask(*command: str) -> list[str] | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines() if result.returncode == 0 else None


def locked(path: Path) -> bool:
    """Is a run at work in the directory of this lock?"""
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True


def twin(config: Mapping, members: Mapping[str, Sequence[Member]]) -> Member | None:
    """Who computes the same, by whatever words; members: `by_key` of those there are."""
    alike, asked = members.get(_key(config), ()), Identity(config)
    for member in alike:
        if Identity(member.config).stands_on == asked.stands_on:
            return member
    source = config.get("pretrained")
    weights = layout.weights_of(Path(source)) if alike and source else None  # which may have moved
    return next(
        (
            one
            for one in alike
            if weights and identity.recorded(one.directory) == files.digest(weights)
        ),
        None,
    )


def by_key(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Members that differ, if at all, in what they stand on."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(_key(member.config), []).append(member)
    return found


def _key(config: Mapping) -> str:
    return Identity({**config, "pretrained": None}).key
