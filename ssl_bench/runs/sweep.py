"""A sweep on disk: its members as composed, what became of them, and the table of their results.

SWEEP/.members/NAME.json     a member: overrides, resolved configuration, directory, Slurm job
SWEEP/.members/NAME.failed   why its last attempt failed
SWEEP/.members/NAME.starts   of a Slurm job, what it had saved when it started last
SWEEP/.members/NAME.pretrain.json   of a pipeline, its pretraining, which starts before the rest
SWEEP/.members/NAME.dropped  in place of NAME.json: the member is no part of the sweep any more
SWEEP/.members/conf-HASH/    the YAML files as they were, for the stages that compose more
SWEEP/.members/code-HASH/    the package as it was, from which members run
SWEEP/NAME/                  its run directory
SWEEP/table.md, table.csv    the results of all members; see `report.sweeps.sweep_table`
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import yaml

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.config.typed import key_of, select
from ssl_bench.errors import UserError
from ssl_bench.runs import identity, layout, metrics, watch
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.metrics import MetricsFile

FIRST = ".pretrain"  # the name of a pipeline's pretraining ends so; other names end with a hash
DROPPED = ".dropped"
NAMED = 80  # characters of a member's name, but for the eight digits at its end
STARTS = 3  # of a job that take up its time and save nothing, before it isn't requeued any more


@dataclass
class Member:
    """A member of a sweep, as it is written to its file."""

    file: Path
    overrides: list[str]
    config: dict  # plain and resolved: what it will run, whatever becomes of the YAML files
    cwd: str
    conf: str  # the folder with the copy of those files
    job: str | None = None  # its last Slurm job

    @classmethod
    def load(cls, file: Path) -> "Member":
        """The member in a file. UserError for a file that is damaged or isn't a member's."""
        values = files.parse(file, json.loads)
        try:
            made = cls(file, **values)
            job = () if made.job is None else (made.job,)
            texts = [made.cwd, made.conf, *job, *made.overrides]
            assert all(isinstance(text, str) for text in texts)
            assert build.is_of_run(made.config)
        except (TypeError, AttributeError, AssertionError):
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
        """The directory of its run: in the folder of the sweep, unless `dir=` put it elsewhere.

        The folder may have moved since the member was composed.
        """
        chosen, home = Path(self.cwd, self.config["dir"]), self.file.parents[1]
        if self.name == f"{chosen.parent.name}.{chosen.name}":  # a pipeline's pretraining
            return home / chosen.parent.name / chosen.name
        return home / self.name if chosen.name == self.name else chosen

    @property
    def first(self) -> "Member | None":
        """The pretraining of a pipeline that runs it apart from its evaluations, or None."""
        file = self.file.with_name(f"{self.name}{FIRST}.json")
        return Member.load(file) if file.exists() else None

    @property
    def is_first(self) -> bool:
        """Is it the pretraining of a pipeline?"""
        return self.name.endswith(FIRST)

    @property
    def whole_lock(self) -> Path:
        """Of a pipeline's pretraining, the lock of the pipeline, which may run it itself."""
        return self.directory.parent / self.lock.name

    @property
    def is_reached(self) -> bool:
        """Is there nothing left that must have finished before it starts?"""
        return (first := self.first) is None or first.result() is not None

    @property
    def under_way(self) -> tuple[Path, int]:
        """(directory, epochs) of its run or, of a pipeline, of the part that runs now."""
        own = self.directory / layout.METRICS
        if own.exists() and own.stat().st_size:  # what lies below are evaluations of it
            return self.directory, self.config["epochs"]
        parts = [path for path in self._below(layout.METRICS) if path.stat().st_size]
        newest = max(parts, key=lambda path: path.stat().st_mtime_ns, default=None)
        if newest is None:
            return self.directory, self.config["epochs"]
        config = files.parse(place := newest.with_name(layout.CONFIG), yaml.safe_load)
        if not isinstance(epochs := config.get("epochs"), int):
            raise files.damaged(place)
        return newest.parent, epochs

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What its run has logged; empty for a pipeline, whose parts log."""
        logged = self.directory / layout.METRICS
        return MetricsFile.read(logged) if logged.is_file() else []

    @property
    def paused(self) -> bool:
        """Has its run stopped at the epoch `until`, with more to do?"""
        if (until := self.config.get("until")) is None or not self.has_state:
            return False
        lines = self.lines
        return bool(lines) and lines[-1].get("epoch", 0) >= until

    @property
    def has_state(self) -> bool:
        """Has its run, or a part of it, saved anything?"""
        return any(layout.has_state(path.parent) for path in self._below(layout.CONFIG))

    def _below(self, name: str) -> list[Path]:
        """The files of this name in its directory, but for a pretraining that runs apart."""
        apart = first.directory if (first := self.first) else None
        found = self.directory.glob(f"**/{name}")
        return [path for path in found if path.parent != apart]

    @property
    def lock(self) -> Path:
        return self.directory / ".lock"

    @property
    def output(self) -> Path | None:
        """Where the output of its process or Slurm job is; None: it has none of its own."""
        path = self.file.with_suffix(".log")
        if self.job:
            path = self.file.parents[1] / ".submitit" / self.job
        if not path.exists():
            return None
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    @property
    def failure(self) -> str | None:
        """Why its last attempt failed; None: it didn't."""
        said = self._said
        return said["reason"] if said and said.get("job") == self.job else None  # else an earlier's

    def fail(
        self, reason: str, rank: int = 0, diverged: bool = False, collapsed: bool = False
    ) -> None:
        """Write down why it failed, unless another rank has: that one is why the others fail.

        diverged: it would again, as long as its configuration is this one. collapsed: and
        on_collapse=stop.
        """
        said = {"reason": reason, "rank": rank, "job": self.job}
        if diverged:
            said["diverged"] = Identity(self.config).key
        if collapsed:
            said["on_collapse"] = "stop"
        with suppress(FileExistsError), open(self._failed, "x", encoding="utf-8") as file:
            json.dump(said, file)

    @property
    def diverged(self) -> bool:
        """Has a run of this configuration diverged, or collapsed where that is to stop it?

        Then none is started until it is asked for.
        """
        said = self._said
        same = bool(said) and said.get("diverged") == Identity(self.config).key
        return same and said.get("on_collapse") in (None, self.config.get("on_collapse"))

    @property
    def _said(self) -> dict[str, Any]:
        """What `fail` wrote; empty: nothing. UserError: the file is damaged."""
        try:
            said = json.loads(self._failed.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):  # no such file, or still being written
            return {}
        if not isinstance(said, dict) or not isinstance(said.get("reason"), str):
            raise files.damaged(self._failed)
        return said

    @property
    def dropped(self) -> bool:
        """Was it taken out of the sweep?"""
        return self.file.suffix == DROPPED

    def drop(self) -> None:
        """Take it out of the sweep, until it is taken back; its directory stays."""
        self.file = self.file.rename(self.file.with_suffix(DROPPED))

    def take_back(self) -> None:
        self.file = self.file.rename(self.file.with_suffix(".json"))

    def forget_failure(self) -> None:
        self._failed.unlink(missing_ok=True)
        self._starts.unlink(missing_ok=True)

    def count_starts(self, in_vain: bool, packed: Sequence[str]) -> int:
        """How many starts of its job in a row have saved nothing; in_vain: is this one of them?

        packed: what changes with the packing of images, which is worth a start, too.
        """
        saved = sorted(
            str(path.relative_to(self.directory))
            for name in ("checkpoints/*.pt", layout.SUMMARY)
            for path in self.directory.glob(f"**/{name}")
        )
        saved += packed
        known = files.parse(self._starts, json.loads) if self._starts.exists() else {}
        if known and not isinstance(known.get("in_vain"), int):
            raise files.damaged(self._starts)
        before = known["in_vain"] if known.get("saved") == saved else 0
        files.write(self._starts, json.dumps({"saved": saved, "in_vain": before + in_vain}))
        return before + in_vain

    @property
    def _starts(self) -> Path:
        return self.file.with_suffix(".starts")

    @property
    def _failed(self) -> Path:
        return self.file.with_suffix(".failed")

    def result(self) -> dict[str, float] | None:
        """The result of its run, if that is finished and ran with this configuration.

        None if `data.root` is another one: the run itself then compares the images.
        """
        if (summary := metrics.summary(self.directory)) is None:
            return None
        if (ran := self._read(layout.CONFIG, yaml.safe_load)) is None or self._changes(ran):
            return None
        roots = (identity.node(one, "data").get("root") or "." for one in (ran, self.config))
        then, now = map(identity.real, roots)
        return summary if then == now else None

    @property
    def conflict(self) -> str:
        """In words, how the run in its directory differs from it; "": it doesn't."""
        ran = self._read(layout.CONFIG, yaml.safe_load)
        return self._changes(ran) if ran is not None and layout.has_state(self.directory) else ""

    @property
    def stale(self) -> bool:
        """Did its run start from other weights than `pretrained` means now?"""
        known, source = identity.recorded(self.directory), self.config.get("pretrained")
        weights = layout.weights_of(Path(self.cwd, source)) if known and source else None
        return weights is not None and files.digest(weights) != known

    def _changes(self, ran: dict) -> str:
        """How the configuration `ran` differs from the member's, in words.

        The settings that the weights decided at the launch don't count: which file `pretrained` is,
        a mean and std that were null, and the teacher (`launch.process`).
        """
        look, then = (config.get("augmentation") or {} for config in (self.config, ran))
        decided = [key for key in ("mean", "std") if key in look and look[key] is None]
        look = look | {key: then.get(key) for key in decided}
        method = dict(identity.node(self.config, "method"))
        if method.get("teacher") and not method.get("teacher_sha256"):
            method["teacher_sha256"] = identity.node(ran, "method").get("teacher_sha256")
        before = identity.left_by(ran | {"pretrained": None}, self.directory)
        mine = {"pretrained": None, "augmentation": look, "method": method or None}
        now = Identity(self.config | mine)
        return identity.changes(before, now)

    def _read(self, name: str, parse: Callable[[str], Any]) -> Any:
        path = self.directory / name
        return files.parse(path, parse) if path.is_file() else None

    def value(self, key: str) -> str:
        """The value of a key as it was typed or, if it wasn't, from the configuration."""
        if key in self.choices:
            return self.choices[key]
        node = select(self.config, key)
        if isinstance(node, dict):
            node = node.get("name", "")
        return "" if node is None else str(node)

    @cached_property
    def choices(self) -> dict[str, str]:
        """{key: value} of its overrides, without those that don't name it."""
        pairs = [(key_of(word), word.partition("=")[2]) for word in self.overrides]
        return {key: value for key, value in pairs if not identity.is_free(key)}


def name(overrides: Sequence[str]) -> str:
    """The name of a member: readable, of bounded length, and the same wherever it runs.

    Of too many words the first are left out, so that what is swept should come last (`swept_last`).
    """
    words = [word for word in overrides if not identity.is_free(key_of(word))]
    digest = blake2b("\n".join(sorted(words)).encode(), digest_size=4).hexdigest()
    shown = _shown(words)
    while len(shown) > 1 and len("-".join(shown)) > NAMED:
        shown.pop(0)
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(shown))
    if len(text) > NAMED:  # a list, say, which another may differ from at its begin
        text = f"{text[: NAMED // 2 - 1]}..{text[1 - NAMED // 2 :]}"
    return f"{identity.slug(text)}-{digest}"


def _shown(words: Sequence[str]) -> list[str]:
    """Overrides as a name has them: the last part of the key and, of a path, of the value."""
    pairs = [word.partition("=")[::2] for word in words]
    ends = [(key.rpartition(".")[2], value.rstrip("/").rpartition("/")[2]) for key, value in pairs]
    return [f"{key}-{end}" for key, end in ends]


def swept_last(overrides: Sequence[str], shared: Collection[str]) -> list[str]:
    """Overrides of a member, the shared ones first if a name hasn't room for all of them.

    The method goes next to the swept ones: commands of one sweep may differ in it. A key that is
    typed twice keeps its order: the last holds.
    """
    named = [word for word in overrides if not identity.is_free(key_of(word))]
    keys = {key_of(word) for word in overrides}
    if len("-".join(_shown(named))) <= NAMED or len(keys) < len(overrides):
        return [*overrides]
    return sorted(overrides, key=lambda word: (word not in shared, key_of(word) == "method"))


def members(folder: Path) -> list[Member]:
    files = sorted((folder / ".members").glob("*.json"))
    return [Member.load(file) for file in files if not file.stem.endswith(FIRST)]


def has_members(folder: Path) -> bool:
    """Are there any, or any that were dropped? A command that was refused leaves none."""
    written = (folder / ".members").iterdir()
    return any(path.suffix in (".json", DROPPED) for path in written)


def with_firsts(members: Iterable[Member]) -> list[Member]:
    """The members, and before each pipeline its pretraining, where that runs apart."""
    return [one for member in members for one in (member.first, member) if one]


def dropped(folder: Path) -> list[Member]:
    """Those that were taken out of the sweep, and stay so until they are taken back."""
    return [Member.load(file) for file in sorted((folder / ".members").glob(f"*{DROPPED}"))]


# -- what became of them ---------------------------------------------------------------------------


class State(NamedTuple):
    """The state of a member, and a note on it.

    name: finished, running, pending, failed, diverged, dropped (neither starts by itself), paused
    (`until`), stopped (it will continue), waiting, not reached (what comes before it has failed),
    or Slurm's word.
    """

    name: str
    note: str = ""

    def __str__(self) -> str:
        if self.note.startswith(f"{self.name} "):  # diverged at step 2
            return self.note
        return ": ".join(filter(None, self))


_EACH = ("--noheader", "--array")  # a line for each job of an array


def states(members: Sequence[Member]) -> list[State]:
    jobs = [one.job for one in with_firsts(members) if one.job]
    queue = (queued(jobs) or {}) if jobs else {}
    ended = accounted(jobs) if jobs else {}
    return [_state(member, queue, ended) for member in members]


def _state(member: Member, queue: dict[str, State], ended: dict[str, str]) -> State:
    if member.result() is not None:
        lines = member.lines if member.config.get("patience") else []
        return State("finished", watch.ended_early(member.config, lines))
    if member.job in queue and not is_hopeless(queue[member.job]):
        return queue[member.job]
    if locked(member.lock):
        return State("running")
    if member.dropped:
        return State("dropped")
    if (first := member.first) and first.result() is None:
        begun = _state(first, queue, ended)
        says_itself = str(begun) == begun.note
        said = f"its pretraining {'' if says_itself else 'is '}{begun}"
        if begun.name in ("pending", "running", "stopped", "waiting"):
            return State("waiting", said)
        return State("not reached", said)
    if reason := member.failure:
        return State(
            "diverged" if member.diverged else "failed",
            "; ".join(filter(None, [reason, _see(member)])),
        )
    if (word := ended.get(member.job or "", "completed")) != "completed":
        said = _last_words(member)
        advice = _ADVICE.get("out_of_memory" if _OUT_OF_MEMORY.search(said) else word)
        return State(word, "; ".join(filter(None, [advice, said, _see(member)])))
    if member.paused:
        epochs = f"{member.config['until']} of {member.config['epochs']}"
        return State("paused", f"after epoch {epochs}")
    return State("stopped" if member.has_state else "waiting")


# how jobs end that are ended by Slurm: what to type
_ADVICE = {
    "out_of_memory": "type a larger hydra.launcher.mem_gb",
    "timeout": "Slurm ended it at hydra.launcher.timeout_min, before it had saved its state: "
    "type more, or a larger hydra.launcher.signal_delay_s",
    "deadline": "Slurm ended it at its deadline",
}
# what slurmstepd says; the word for the job is then often that for how its script ended
_OUT_OF_MEMORY = re.compile(r"exceeded (job|step) memory limit|oom.kill|out of memory", re.I)


def _last_words(member: Member) -> str:
    """The last line of what its job has said: an error of its setup, or of Slurm itself."""
    folder = member.output
    logs = [*folder.glob("*.err"), *folder.glob("*.out")] if folder else []
    told = [log for log in logs if log.stat().st_size]
    for log in sorted(told, key=lambda log: log.stat().st_mtime_ns, reverse=True):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        # srun only says then that it ends the task
        if words := [line for line in said if not line.startswith("srun: ")] or said:
            return words[-1][:200]
    return ""


def _see(member: Member) -> str:
    return f"see {member.output}" if member.output else ""


def queued(jobs: Iterable[str]) -> dict[str, State] | None:
    """{job: state} of those of these jobs that wait or run; None: Slurm doesn't answer.

    They may be another user's.
    """
    asked = sorted({job.partition("_")[0] for job in jobs})
    # of a single job that it no longer knows, squeue says that its number is invalid
    lines = _ask("squeue", f"--jobs={','.join([*asked, *asked])}", *_EACH, "--format=%i|%T|%r")
    if lines is None:
        return None
    queue = {}
    for line in lines:
        job, state, reason = line.split("|")
        queue[job] = State(state.lower(), "" if reason == "None" else reason)
    return queue


def settle(partial: Path, folder: Path) -> None:
    """Give a whole folder of `.members` its name, which its content decides.

    Another command may have been faster: then that one stays. OSError.
    """
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():
            raise


def submitted_from(folder: Path) -> set[str]:
    """The jobs of this user whose batch script was in this folder, and that wait or run."""
    pairs = (line.split("|", 1) for line in _ask("squeue", "--me", *_EACH, "--format=%i|%o") or [])
    return {job for job, script in pairs if Path(script).parent.resolve() == folder.resolve()}


def is_hopeless(state: State | None) -> bool:
    """Is it the state of a job that Slurm will never start, since one before it has failed?"""
    return state is not None and state.note == "DependencyNeverSatisfied"


def cancel(jobs: Iterable[str | None]) -> None:
    if several := [job for job in jobs if job]:
        _ask("scancel", *several)


def accounted(jobs: Sequence[str]) -> dict[str, str]:
    """How jobs ended, like {job: "timeout"}, from Slurm's accounting.

    For want of that, from what it remembers for some minutes.
    """
    said = _ask("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", ",".join(jobs))
    if not said:
        asked = ",".join([*jobs, *jobs])
        said = _ask("squeue", f"--jobs={asked}", *_EACH, "--states=all", "--format=%i|%T")
    pairs = (line.split("|", 1) for line in said or [])
    return {job: state.split()[0].lower() for job, state in pairs}


def _ask(*command: str) -> list[str] | None:
    """The lines that a command of Slurm's prints; None: it isn't here, or doesn't answer."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines() if result.returncode == 0 else None


def locked(path: Path) -> bool:
    """Does a process hold this lock, that of a run directory?"""
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True


def twin(config: Mapping, members: Mapping[str, Sequence[Member]]) -> Member | None:
    """The member that computes the same as `config`, in whatever words it was typed; or None.

    members: `by_key` of the sweep's members.
    """
    alike, asked = members.get(_key(config), ()), Identity(config)
    for member in alike:
        if Identity(member.config).stands_on == asked.stands_on:
            return member
    source = config.get("pretrained")
    weights = layout.weights_of(Path(source)) if alike and source else None
    if weights is None:
        return None
    digest = files.digest(weights)  # the same weights may lie elsewhere by now
    return next((one for one in alike if identity.recorded(one.directory) == digest), None)


def by_key(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Members in groups that differ, if at all, in the weights that they start from."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(_key(member.config), []).append(member)
    return found


def _key(config: Mapping) -> str:
    return Identity({**config, "pretrained": None}).key
