"""Hydra launchers of our sweeps, in this process and on a workstation.

`launchers/*.yaml` choose and configure them. Hydra imports this module whenever any Hydra
application starts, so heavy modules are imported where they are used.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from ssl_bench.runs.halving import Halving, Rules
    from ssl_bench.runs.sweep import Member

log = logging.getLogger(__name__)


class _Failed(JobReturn):
    """A result that raises its exception, without first printing all overrides, as Hydra's does."""

    @property
    def return_value(self) -> Any:
        raise self._return_value


class SweepLauncher(Launcher):
    """Composes the members of a sweep, then runs those that aren't finished from these copies.

    The state of the sweep is in its files alone (`runs.sweep`).
    """

    wait = True
    shares_images: bool | None = True  # do members see the folders of here? None: most likely
    halving: Mapping[str, Any] | None = None  # the rules of `runs.halving`
    _copy: Path | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        _refuse_processes()
        from ssl_bench.runs import halving

        folder = Path(self.config.hydra.sweep.dir)
        with halving.alone(folder, self._halves):
            asked = self._launch(folder, job_overrides)
        # Here and not in Hydra's on_multirun_end, which isn't called when a member has failed.
        from ssl_bench.report import sweeps  # imports torch

        if table := sweeps.sweep_table(folder):
            print(f"\n{table}\n\n{folder / 'table.md'}, {folder / 'table.csv'}")
        return self._returns(asked)

    def _launch(self, folder: Path, job_overrides: Sequence[Sequence[str]]) -> list["Member"]:
        """Run what isn't finished of the members, which are returned."""
        begun: list[Member] = []
        try:
            with deciding(folder.absolute()):  # until Slurm, too, knows what this command starts
                self._drop_orphans(folder.absolute())
                asked, todo, under_way, elsewhere = self._decide(folder, job_overrides)
                begun = todo + under_way
                self._submit(todo, under_way)
            self._run(todo, under_way)
        except KeyboardInterrupt:
            self._tell_of_jobs(begun)
            raise
        if self.wait:
            self._wait_elsewhere(elsewhere)
        return asked

    def _code(self, folder: Path) -> Path:
        """The copy of the package, below a folder, that members run from.

        It is one for all that a command launches.
        """
        from ssl_bench.runs import code

        if self._copy is None:
            self._copy = code.copied(folder)
        return self._copy

    def _decide(
        self, folder: Path, job_overrides: Sequence[Sequence[str]]
    ) -> tuple[list["Member"], list["Member"], list["Member"], list["Member"]]:
        """The members that were asked for, and what of them is to start, under way, elsewhere.

        The last three have the pretrainings of pipelines apart. UserError.
        """
        from ssl_bench import shell
        from ssl_bench.errors import UserError, several
        from ssl_bench.launch import forecast
        from ssl_bench.runs import halving, sweep

        conf = self._freeze_files(folder.absolute() / ".members")
        there = folder.absolute()
        known = sweep.by_key([*sweep.members(there), *sweep.dropped(there)])
        asked = [
            self._compose(folder.absolute(), conf, list(overrides), known)
            for overrides in job_overrides
        ]
        if self._is_grid:
            _refuse_free(job_overrides, asked)
        self._check_metric(asked)
        if rules := halving.Rules.of(self.halving):
            self._check_rules(rules, asked)
        # a search may ask for the same member twice
        members = _not_set_aside({member.file: member for member in asked}.values(), folder)
        directories = Counter(member.directory for member in members)
        if shared := [path for path, count in directories.items() if count > 1]:
            raise UserError(
                f"dir={shared[0]} is that of several members: "
                "leave out dir=, or sweep over what tells them apart"
            )
        firsts = self._firsts([member for member in members if member.result() is None])
        parts = [part for one in members for part in (firsts.get(one.file), one) if part]
        unfinished = [part for part in parts if part.result() is None]
        # Jobs of earlier commands can't be seen from a machine without Slurm; there the locks of
        # the run directories keep members from running twice.
        jobs = [part.job for part in unfinished if part.job]
        queue = sweep.queued(jobs) if jobs and shutil.which("squeue") else {}
        if queue is None:
            raise UserError(
                "squeue doesn't answer, and earlier jobs of this sweep may still be there: "
                "try again later"
            )
        sweep.cancel(
            part.job for part in unfinished if sweep.is_hopeless(queue.get(part.job or ""))
        )
        under_way, elsewhere, todo = [], [], []
        # jobs of an earlier version are a whole pipeline each
        whole = {one.file for one in members if one.job in queue and one.first is None}
        of = {first.file: file for file, first in firsts.items()}
        for part in unfinished:
            if of.get(part.file) in whole:
                continue
            if part.job in queue and not sweep.is_hopeless(queue[part.job]):
                under_way.append(part)
            elif sweep.locked(part.lock) or (part.is_first and sweep.locked(part.whole_lock)):
                elsewhere.append(part)
            else:
                todo.append(part)
        waiting, open_ = (
            {of.get(part.file, part.file) for part in some} for some in (todo, unfinished)
        )
        for member in todo:
            if conflict := member.conflict:
                raise UserError(
                    f"{member.name} was run with another configuration: {conflict}. "
                    f"Choose another sweep=, or delete {member.directory}"
                )
        _check_starts(todo, members, self.shares_images)
        finished = [member for member in members if member.file not in open_]
        if stale := [member for member in finished if member.stale]:
            raise UserError(
                f"{stale[0].name} stands on other weights than "
                f"pretrained={stale[0].config['pretrained']} holds now: choose another sweep=, or "
                f"delete {stale[0].directory}"
            )
        counts = len(members) - len(open_), len(open_ - waiting), len(waiting)
        log.info(
            "%s, of this command's %s: %s finished, %s under way, %s to start",
            *(folder, several(len(members), "member"), *counts),
        )
        runs = shell.override("runs", folder)
        log.info("to see its members: ssl-bench stage=status %s", runs)
        for member in todo:
            member.job = None
            member.forget_failure()
            member.save()
        if len(todo) > 1:
            forecast.tell_disk(todo, folder)
        return asked, todo, under_way, elsewhere

    def _check_metric(self, members: list["Member"]) -> None:
        """UserError, before any member starts, for a metric that can't tell which is better."""
        from ssl_bench.config.typed import key_of
        from ssl_bench.errors import UserError
        from ssl_bench.runs import identity

        metric, stage = members[0].config["metric"], members[0].config["stage"]["name"]
        if self._is_grid:
            differing = identity.other_losses(identity.Identity(one.config) for one in members)
        else:
            words = {word for member in members for word in member.overrides}
            searched = map(key_of, words.difference(self.config.hydra.overrides.task))
            differing = sorted({key for key in searched if key.startswith(identity.LOSS_OF)})
            if metric is None:
                raise UserError(
                    "metric=null: a search needs what to find: "
                    f"type one of the values of stage={stage}"
                )
            direction = self.config.hydra.sweeper.get("direction")
            minimizes = getattr(direction, "name", direction) == "minimize"
            if minimizes and re.search(r"top\d$|accuracy$|top-1$", metric):
                raise UserError(
                    f"hydra.sweeper.direction=minimize would find the worst {metric}: type "
                    "hydra.sweeper.direction=maximize"
                )
        if stage == "pretrain" and "loss" in (metric or "") and differing:
            raise UserError(
                f"metric={metric} would rank runs that differ in {', '.join(differing[:4])}, and "
                "their losses are of different things: type metric=probe_top1, by labelled images, "
                "or metric=null for a table without order"
            )

    def _check_rules(self, rules: "Rules", members: list["Member"]) -> None:
        """UserError, before any member starts, for a sweep that can't be halved by these rules."""
        from ssl_bench.errors import UserError
        from ssl_bench.runs import halving, identity, watch

        key, metric = f"{halving.KEY}.metric={rules.metric}", watch.named("", rules.metric).metric
        if not self._is_grid:
            raise UserError(
                f"{key}: it is for grids; a search has to see each of its trials to the end "
                "(hydra-optuna-sweeper has no pruners): leave one of the two out"
            )
        for member in members:
            config = member.config
            if (stage := config["stage"]["name"]) != "pretrain":
                raise UserError(
                    f"{key}: it pauses pretrainings, and stage={stage} is none: "
                    "type stage=pretrain, or leave it out"
                )
            if config["until"] is not None:
                raise UserError(
                    f"until={config['until']} beside {key}, which says it: leave it out"
                )
            rules.epochs(config)
            judged = config["eval_every"] and config["stage"]["online_images"]
            if metric in ("knn_top1", "probe_top1") and not judged:
                raise UserError(
                    f"{key}: nothing measures it with eval_every={config['eval_every']} and "
                    f"stage.online_images={config['stage']['online_images']}: type 1 or more for "
                    "both, or another metric"
                )
        differing = identity.other_losses(identity.Identity(one.config) for one in members)
        if "loss" in metric and differing:
            raise UserError(
                f"{key} would compare members that differ in {', '.join(differing[:4])}, and their "
                f"losses are of different things: type {halving.KEY}.metric=knn_top1, by labelled "
                f"images, or {halving.KEY}.metric=effective_rank, without"
            )

    @contextmanager
    def _plan(
        self, todo: list["Member"], running: Sequence["Member"] = ()
    ) -> Iterator["Halving | InTurn"]:
        """What is to run next of `todo`; running: what an earlier command has started."""
        from ssl_bench.runs import halving

        if (rules := halving.Rules.of(self.halving)) is None:
            yield InTurn(todo)
            return
        folder = Path(self.config.hydra.sweep.dir)
        plan = halving.Halving(folder, rules, todo, running)
        yield plan
        log.info("halving: %s; see %s", plan.summary(), folder / halving.FILE)

    @property
    def _halves(self) -> bool:
        return bool(self.halving and self.halving["metric"] is not None)

    @property
    def _is_grid(self) -> bool:
        return self.config.hydra.sweeper._target_.endswith("BasicSweeper")

    def _wait_elsewhere(self, members: list["Member"]) -> None:
        """Wait for the members that processes of other commands run."""
        from ssl_bench.runs import sweep

        def busy() -> bool:
            return any(sweep.locked(member.lock) for member in members)

        if busy():
            log.info("waiting for what other processes run here; Ctrl-C stops only the waiting")
        while busy():
            time.sleep(1)

    def _drop_orphans(self, folder: Path) -> None:
        """End what a command that was killed has started, and no member knows of."""

    def _submit(self, todo: list["Member"], under_way: list["Member"]) -> None:
        """Hand `todo` over to whoever starts it, if that is another program. UserError."""

    @abstractmethod
    def _run(self, todo: list["Member"], under_way: list["Member"]) -> None:
        """Start `todo`, and return when all of `todo` and `under_way` have ended."""

    def _tell_of_jobs(self, members: list["Member"]) -> None:
        """Log which of the members another program runs, though this command is interrupted."""

    def _compose(
        self, folder: Path, conf: Path, overrides: list[str], known: dict[str, list["Member"]]
    ) -> "Member":
        """The member with these overrides.

        known: `sweep.by_key` of the sweep's members. One that was typed in other words but is the
        same run is taken instead, so that nothing runs twice.
        """
        from ssl_bench.config import build
        from ssl_bench.errors import UserError
        from ssl_bench.launch.composing import without_hydra
        from ssl_bench.launch.continuing import continued
        from ssl_bench.runs import sweep
        from ssl_bench.runs.sweep import Member, name, twin

        # what the sweeper chose comes last, as on a command line: a name has room for so many words
        shared = self.config.hydra.overrides.task
        if self._is_grid:
            overrides = sweep.swept_last(overrides, shared)
        else:
            overrides.sort(key=lambda word: word not in shared)
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        HydraConfig.instance().set_config(cfg)  # for the resolver of `dir`
        own = continued(without_hydra(cfg), overrides)
        if not self._is_grid:  # `command.Check` has checked the members of a grid
            build.check(own)
        config = OmegaConf.to_container(build.at_home(own), resolve=True)
        if config["dir"] is None:
            raise UserError(
                f"stage={config['stage']['name']} leaves nothing behind: "
                "it can't be part of a sweep"
            )
        own_name = name(overrides)
        config["devices"] = self._processes(config["devices"])
        if (other := twin(config, known)) and Path(config["dir"]).name == own_name:
            # Only the name and directory are the other's: what runs is what was composed here.
            here = json.dumps(config["dir"])[1:-1]
            there = json.dumps(str(Path(config["dir"]).with_name(other.name)))[1:-1]
            config = json.loads(json.dumps(config).replace(here, there))
            return replace(other, config=config, cwd=os.getcwd(), conf=str(conf))
        file = folder / ".members" / f"{own_name}.json"
        if (aside := file.with_suffix(sweep.DROPPED)).exists():
            file = aside
        job = Member.load(file).job if file.exists() else None
        return Member(file, overrides, config, os.getcwd(), str(conf), job)

    def _firsts(self, members: Sequence["Member"]) -> dict[Path, "Member"]:
        """The pretrainings of those that are pipelines, by the files of these.

        UserError for a pipeline whose rows are mistaken. Those that differ in nothing that the rows
        read are checked once.
        """
        from ssl_bench.config import build
        from ssl_bench.runs.sweep import FIRST, Member

        checked: set[str] = set()
        by_stage: dict[Any, list[Member]] = {}  # a user's own stage may be a pipeline, too
        for member in members:
            target = member.config["stage"].get("_target_")
            stage: Any = build.locate(target, "stage") if target else None
            if not hasattr(stage, "pretrainings"):
                continue
            by_stage.setdefault(stage, []).append(member)
            read = [member.config.get(key) for key in stage.read_by_parts]
            read.append(member.config["method"].get("_target_"))
            text = json.dumps(read, sort_keys=True).replace(member.config["dir"], "")
            if text not in checked:
                stage.check_parts(build.literal(member.config))
                checked.add(text)
        firsts = {}
        for stage, several in by_stage.items():
            configs = stage.pretrainings([build.literal(member.config) for member in several])
            for member, config in zip(several, configs, strict=True):
                file = member.file.with_name(f"{member.name}{FIRST}.json")
                before = Member.load(file).job if file.exists() else None
                plain = OmegaConf.to_container(config, resolve=True)
                firsts[member.file] = replace(member, file=file, config=plain, job=before)
        return firsts

    def _processes(self, devices: int) -> int:
        """How many processes a member has: their number may change its result."""
        return devices

    def _freeze_files(self, folder: Path) -> Path:
        """A copy of the YAML files, ours and the user's, in one folder named by their hash."""
        import ssl_bench
        from ssl_bench.config.choices import yaml_below
        from ssl_bench.runs import sweep

        texts: dict[str, str] = {}
        chosen = {key.partition("/")[0] for key in self.config.hydra.runtime.choices}
        # reversed: the first folder of the search path wins
        for element in reversed(self.hydra_context.config_loader.get_search_path().get_path()):
            scheme, _, path = element.path.partition("://")
            if scheme == "file":
                root = Path(path)
            elif element.path == "pkg://ssl_bench.conf":
                root = Path(ssl_bench.__file__).with_name("conf")
            else:
                continue
            # in a checkout our launchers are behind a link
            for file in yaml_below(root, chosen, outside=scheme == "pkg"):
                texts[str(file.relative_to(root))] = file.read_text(encoding="utf-8")
        content = repr(sorted(texts.items())).encode()
        copy = folder / f"conf-{blake2b(content, digest_size=4).hexdigest()}"
        if not copy.exists():
            partial = copy.with_name(f"{copy.name}.{os.getpid()}")
            for path, text in texts.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_text(text, encoding="utf-8")
            sweep.settle(partial, copy)
        return copy

    def _returns(self, members: list["Member"]) -> list[JobReturn]:
        """For the sweeper: each member's metric, or an exception that lists the unfinished ones."""
        from ssl_bench.config.typed import key_of
        from ssl_bench.errors import UserError
        from ssl_bench.runs import sweep

        results = [member.result() for member in members]
        states = [sweep.State("finished")] * len(members)
        if None in results:
            states = sweep.states(members)
        by_name = {member.name: state for member, state in zip(members, states, strict=True)}
        fine = ("finished", "paused") if self._halves else ("finished",)
        ended = [f"{name}: {state}" for name, state in by_name.items() if state.name not in fine]
        ended = [line for line in ended if not line.endswith(": dropped")]
        only = " that have not diverged" if any(one.name == "diverged" for one in states) else ""
        failure = UserError(
            f"{len(ended)} of {len(by_name)} members are not finished; "
            f"the same command runs only those{only}:\n" + "\n".join(ended)
        )
        returns: list[JobReturn] = []
        for member, result in zip(members, results, strict=True):
            left_out = member.dropped and self._is_grid
            if by_name[member.name].name not in fine and self.wait and not left_out:
                failed = _Failed(member.overrides, status=JobStatus.FAILED, _return_value=failure)
                returns.append(failed)
                continue
            done = JobReturn(overrides=member.overrides, status=JobStatus.COMPLETED)
            if result is not None and (metric := member.config["metric"]) is not None:
                if metric in result:
                    done.return_value = float(result[metric])
                elif not self._is_grid or "metric" in map(key_of, member.overrides):
                    raise UserError(
                        f"metric={metric}: {member.name} has no such value; "
                        f"choose from {', '.join(result)}"
                    )
            returns.append(done)
        return returns


@contextmanager
def deciding(folder: Path) -> Iterator[None]:
    """Until its end, no other command of the sweep decides whom it starts, or drops orphans."""
    (folder / ".members").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".members" / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("another command is starting members of %s: waiting for it", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _not_set_aside(members: Iterable["Member"], folder: Path) -> list["Member"]:
    """Those that may start: without what was dropped and what has diverged, which is told."""
    from ssl_bench import shell

    left = []
    for member in members:
        hopeless = next((one for one in (member.first, member) if one and one.diverged), None)
        diverged = hopeless is not None and member.result() is None
        if not (member.dropped or diverged):
            left.append(member)
            continue
        again = f"{shell.override('runs', folder)} stage.again={member.name}"
        what = "was dropped"
        if hopeless and not member.dropped:
            what = f"{hopeless.failure or 'diverged'}, and would again"
        log.warning("%s %s. To start it all the same: stage=status %s", member.name, what, again)
    return left


def _refuse_processes() -> None:
    """UserError for a sweep started in several processes: each would run all the members."""
    from ssl_bench.errors import UserError

    if not {"RANK", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return
    from ssl_bench.runtime import distributed  # imports torch

    if (world := distributed.launched()) and world.size > 1:
        raise UserError(
            f"a sweep in the {world.size} processes of torchrun or srun: start it once, without "
            "these; each member then has devices=2 or more, or with launcher=slurm "
            "hydra.launcher.tasks_per_node=2, processes of its own"
        )


def _refuse_free(job_overrides: Sequence[Sequence[str]], members: Sequence["Member"]) -> None:
    """UserError for members of a grid that would be one run: they differ in keys that name none."""
    from ssl_bench.config.typed import key_of
    from ssl_bench.errors import UserError
    from ssl_bench.runs import identity

    first: dict[Path, Sequence[str]] = {}
    for member, overrides in zip(members, job_overrides, strict=True):
        differing = set(overrides) ^ set(first.setdefault(member.file, overrides))
        if free := sorted({key_of(word) for word in differing if identity.is_free(key_of(word))}):
            raise UserError(
                f"{' and '.join(free)}: no run is named by that, so several values would "
                "be one run; give one value, or each its own command and sweep="
            )


def _check_starts(
    todo: Sequence["Member"], members: Sequence["Member"], shares_images: bool | None
) -> None:
    """UserError, before any of `todo` starts, for what each of them would find out by itself.

    That is missing weights, unless one of `members` leaves them, a batch that its processes, of
    which a launcher knows the number, can't share as its method wants, and images that are too few.
    shares_images: see `SweepLauncher`.
    """
    from ssl_bench.config import build
    from ssl_bench.errors import UserError
    from ssl_bench.runs import identity, published

    made, lines = {Path(identity.real(str(one.directory))) for one in members}, []
    misfits: dict[str, list[str]] = {}
    known: dict[str, Any] = {}  # of the images that members share
    for member in todo:
        lines += build.indivisible(member.config)
        stage: Any = build.locate(member.config["stage"]["_target_"], "stage")
        asked = shares_images is not False and hasattr(stage, "check_images")
        if asked and not member.has_state:
            try:
                stage.check_images(build.literal(member.config), known, sure=bool(shares_images))
            except UserError as error:
                lines.append(str(error))
        teacher = identity.node(member.config, "method").get("teacher")
        named = {"pretrained": member.config["pretrained"], "method.teacher": teacher}
        for key, source in named.items():
            if not source or source.startswith(identity.TIMM):
                continue
            if why := published.missing(source, made):
                lines.append(why.replace("pretrained=", f"{key}=", 1))
        if source := member.config["pretrained"]:
            had = _other_network(source, identity.node(member.config, "backbone"))
            if had and source not in misfits.setdefault(had, []):
                misfits[had].append(source)
    for had, sources in misfits.items():
        one = f"pretrained={sources[0]} was"
        which = one if len(sources) == 1 else f"{len(sources)} pretrainings were"
        lines.append(f"{which} trained with {had}: type these")
    if lines:
        raise UserError("\n".join(["nothing was started.", *dict.fromkeys(lines)]))


def _other_network(source: str, backbone: Mapping[str, Any]) -> str:
    """What to type if the run of these weights surely had another network; "".

    Two of ours are the same if they have one constructor and one shape; for others, a network may
    have several names, so that only the shape of an equal name tells.
    """
    from ssl_bench.launch.place import SHAPE, network
    from ssl_bench.runs import identity, layout

    run = layout.run_at(Path(source))
    had = identity.node(identity.config(run), "backbone") if run else {}
    if not had.get("name"):
        return ""
    kinds = [str(one.get("_target_")) for one in (had, backbone)]
    ours = all(
        kind.startswith(("ssl_bench.backbones.resnet.", "ssl_bench.backbones.vit."))
        for kind in kinds
    )
    same = kinds[0] == kinds[1] if ours else had["name"] == backbone.get("name")
    reshaped = any(key in had and backbone.get(key, had[key]) != had[key] for key in SHAPE)
    return " ".join(network(had)) if (reshaped if same else ours) else ""


class Local(SweepLauncher):
    """Runs members in this process, one after the other."""

    def __init__(self, halving: Mapping[str, Any] | None = None) -> None:
        self.halving = halving

    def _processes(self, devices: int) -> int:
        from ssl_bench.runtime import distributed

        world = distributed.launched()
        return world.size if world else devices

    def _run(self, todo: list["Member"], under_way: list["Member"]) -> None:
        from ssl_bench.errors import UserError, interrupted_by
        from ssl_bench.launch.forecast import Clock
        from ssl_bench.launch.member import attempt

        clock = Clock(todo, 1, at_most=self._halves)
        # between members, and by one that has just ended
        with self._plan(todo) as plan, interrupted_by(signal.SIGTERM):
            while member := plan.next(()):
                log.info("member %s: %s", plan.say(member), member.name)
                try:
                    attempt(member)
                except UserError as error:
                    log.warning("failed: %s", error)
                except Exception:
                    log.exception("failed")
                plan.ended(member)
                clock.look([member], visible_gpus(), now=True)


class Workstation(SweepLauncher):
    """Runs several members at once, each with a GPU, if there are any, and a share of the cores.

    members_per_gpu: so many share each GPU, as small networks leave it idle.
    A member leases them as long as it lives, also if its launcher is killed: no other command puts
    a member there meanwhile.
    """

    def __init__(
        self,
        at_once: int | None,
        members_per_gpu: int = 1,
        halving: Mapping[str, Any] | None = None,
    ) -> None:
        self.at_once, self.members_per_gpu, self.halving = at_once, members_per_gpu, halving

    def _run(self, todo: list["Member"], under_way: list["Member"]) -> None:
        from ssl_bench.config import build
        from ssl_bench.errors import UserError, interrupted_by
        from ssl_bench.launch import leases
        from ssl_bench.launch.forecast import Clock

        gpus, cores = visible_gpus(), sorted(os.sched_getaffinity(0))
        packed = self.members_per_gpu
        if packed < 1 or (packed > 1 and not gpus):
            why = (
                "choose 1 or more" if gpus else "there is no GPU here: type hydra.launcher.at_once="
            )
            raise UserError(f"hydra.launcher.members_per_gpu={packed}: {why}")
        gpus = gpus * packed  # each is taken once before any is taken twice
        at_once = (len(gpus) or len(cores)) if self.at_once is None else self.at_once
        if at_once < 1 or (gpus and at_once > len(gpus)):
            raise UserError(
                f"hydra.launcher.at_once={at_once}: there are {len(gpus) // packed} GPUs here, "
                f"with hydra.launcher.members_per_gpu={packed}"
            )
        share = max(1, len(cores) // at_once)
        shares = [
            {cores[(slot * share + i) % len(cores)] for i in range(share)}
            for slot in range(len(gpus) or at_once)
        ]
        alone = len(gpus) // packed  # the names that a GPU of one member has
        places = [
            f"gpu-{gpu}" + (f"-{slot // alone + 1}" if slot >= alone else "")
            for slot, gpu in enumerate(gpus)
        ] or [
            f"cores-{slot}-{blake2b(repr(sorted(mine)).encode(), digest_size=4).hexdigest()}"
            for slot, mine in enumerate(shares)
        ]
        clock, told = Clock(todo, at_once, at_most=self._halves), False
        running: dict[subprocess.Popen, Member] = {}
        found: Member | None = None  # the next, until it has a place

        with (
            self._plan(todo) as plan,
            interrupted_by(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        ):
            try:
                while True:
                    while len(running) < at_once:
                        found = found or plan.next({one.name for one in running.values()})
                        if not found or not (taken := leases.take(places)):
                            break
                        member, found = found, None
                        slot, lease = taken
                        env = {"OMP_NUM_THREADS": str(share)} | os.environ
                        # before a checkout that is the working directory
                        copy = self._code(member.file.parent)
                        paths = [str(copy), *filter(None, [os.environ.get("PYTHONPATH")])]
                        env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
                        if gpus:
                            env["CUDA_VISIBLE_DEVICES"] = gpus[slot]
                        words = [str(member.file), *build.strange(build.literal(member.config))]
                        command = [sys.executable, "-m", "ssl_bench.launch.member", *words]
                        with open(member.file.with_suffix(".log"), "a") as output:
                            process = subprocess.Popen(
                                command,
                                env=env,
                                stdout=output,
                                stderr=output,
                                start_new_session=True,
                                pass_fds=[lease],
                            )
                        os.close(lease)  # the member has it now
                        os.sched_setaffinity(process.pid, shares[slot])  # before it has threads
                        running[process] = member
                        log.info("started: %s (see %s)", member.name, member.output)
                    if not running and not found:
                        break
                    if found and not told:
                        told = True
                        what = "GPU" if gpus else "share of the cores"
                        log.info("waiting for a %s: members of other commands hold them", what)
                    for process in [process for process in running if process.poll() is not None]:
                        member = running.pop(process)
                        tell(member, process.returncode)
                        plan.ended(member)
                    clock.look([*running.values()], gpus)
                    time.sleep(0.2)
            except BaseException:
                for process in running:
                    process.terminate()  # each saves its state
                for process in running:
                    process.wait()
                raise


class InTurn:
    """What is to run next of a sweep without rules: every member to its end, in turn.

    A pipeline can start when its pretraining has finished; if that has failed, it waits no more.
    """

    def __init__(self, members: Sequence["Member"]) -> None:
        self.waiting, self.count = list(members), len(members)

    def next(self, running: Collection[str]) -> "Member | None":
        """The first of the waiting members that can start; running: the names of others."""
        from ssl_bench.runs.sweep import FIRST

        before = {*running, *(member.name for member in self.waiting)}
        for member in [*self.waiting]:
            if f"{member.name}{FIRST}" in before:
                continue
            self.waiting.remove(member)
            if member.is_reached:
                return member
            tell(member)
        return None

    def ended(self, member: "Member") -> None:
        """Nothing follows from it."""

    def say(self, member: "Member") -> str:
        """Which of all a member is that `next` gave."""
        return f"{self.count - len(self.waiting)} of {self.count}"


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def tell(member: "Member", status: int = 0) -> None:
    """Log what became of a member; status: the exit status of its process."""
    from ssl_bench.runs import sweep

    if (result := member.result()) is not None:
        metric = member.config["metric"]
        value = f"  {metric} {result[metric]:.4g}" if metric in result else ""
        log.info("finished: %s%s", member.name, value)
    else:
        (state,) = sweep.states([member])
        how = f"  exit status {status}" if status and not state.note else ""
        log.warning("not finished: %s  %s%s", member.name, state, how)
