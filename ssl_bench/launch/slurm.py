"""Hydra launcher of our sweeps on Slurm.

Hydra imports this module whenever any Hydra application starts, so heavy modules are imported where
they are used.
"""

import logging
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import OmegaConf

from ssl_bench.launch.launchers import SweepLauncher, deciding, tell

if TYPE_CHECKING:
    from ssl_bench.launch.forecast import Clock
    from ssl_bench.launch.launchers import InTurn
    from ssl_bench.runs.halving import Halving
    from ssl_bench.runs.sweep import Member

log = logging.getLogger(__name__)

# squeue's reasons for which a job waits that will start by itself
ORDINARY = ("", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Cleaning", "Dependency")


class Slurm(SweepLauncher):
    """Runs members as a job array of submitit, with what its Hydra plugin lacks in version 1.2.

    The evaluations of pipelines are another array, in which a job starts when that of its
    pretraining has finished. evaluation: keys of this launcher that are others for these jobs.
    """

    def __init__(
        self,
        wait: bool,
        evaluation: Mapping[str, Any],
        halving: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        self.wait, self.evaluation, self.halving = wait, dict(evaluation), halving
        self._given = given
        self._prepare(**given)

    def _prepare(
        self,
        python: str | None,
        container: list[str],
        env_script: str | None,
        stage_in: list[str],
        stage_dir: str,
        setup: list[str] | None,
        teardown: list[str],
        srun_args: list[str],
        submitit_folder: str,
        max_num_timeout: int,
        max_running: int,
        **parameters: Any,
    ) -> None:
        from ssl_bench.runs.sweep import STARTS
        from ssl_bench.shell import quoted

        self.max_num_timeout, self.max_running = max_num_timeout, max_running
        self.folder = Path(submitit_folder).absolute()
        self.stage_in = [os.path.expanduser(file) for file in stage_in]
        self.shares_images = False if container or stage_in else None
        here = "python" if container else quoted(sys.executable)
        inside = here if python is None else quoted(os.path.expanduser(python), variables=True)
        words = [quoted(word, variables=True) for word in container]
        if env_script:
            script = [*_checked([env_script], "env_script"), f'exec {inside} "$0" "$@"']
            words += ["/bin/bash", "-c", quoted("\n".join(script))]
        else:
            words.append(inside)
        self.python = " ".join(words)
        delay = parameters["signal_delay_s"]
        note = f"{quoted(str(self.folder.parent))}/requeue-$SLURM_JOB_ID"
        vain = f"{quoted(str(self.folder.parent))}/vain-$SLURM_JOB_ID"
        half = (60 * parameters["timeout_min"] - delay) // 2
        additional = OmegaConf.to_container(parameters["additional_parameters"], resolve=True)
        self.parameters = parameters | {
            "additional_parameters": additional,
            "setup": [
                *_checked(setup or [], "setup"),
                f"export SSL_BENCH_GRACE={math.ceil(0.75 * delay)} SSL_BENCH_REQUEUE={note}",
                f"export SSL_BENCH_BEGAN=$(date +%s) SSL_BENCH_VAIN={vain}",
                # one may be left from a start of this job that ended before its teardown
                'rm -f -- "$SSL_BENCH_REQUEUE"',
                *(_stage(file, os.path.expanduser(stage_dir)) for file in self.stage_in),
            ],
            "teardown": [
                "status=$?",
                # The member left a note, for want of scontrol; or USR2 (12) came before Python
                # could handle it.
                'if [ -f "$SSL_BENCH_REQUEUE" ] || [ $status = 140 ]; then',
                '    rm -f -- "$SSL_BENCH_REQUEUE"',
                f"    if [ $status = 140 ] && [ $SECONDS -gt {half} ]; then",
                '        echo >> "$SSL_BENCH_VAIN"',
                f'        if [ $(wc -l < "$SSL_BENCH_VAIN") -ge {STARTS} ]; then',
                '            rm -f -- "$SSL_BENCH_VAIN"',
                f'            echo "Python was not ready within {STARTS} starts: '
                'type a larger hydra.launcher.timeout_min" >&2',
                "            exit 1",
                "        fi",
                "    fi",
                # A cancelled job doesn't count as running any more.
                '    if [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then',
                "        scontrol requeue $SLURM_JOB_ID && sleep 300",
                "    fi",
                "fi",
                *teardown,
                "exit $status",
            ],
            "srun_args": [
                "--kill-on-bad-exit=1",
                # since Slurm 22.05, srun doesn't inherit this option from sbatch
                *([f"--cpus-per-task={cpus}"] if (cpus := parameters["cpus_per_task"]) else []),
                *srun_args,
            ],
        }

    @property
    def _gpus(self) -> str | None:
        """The GPUs that a job is given, in the words of the launcher; None: it is given none."""
        given = self.parameters | self.parameters["additional_parameters"]
        keys = [key for key in ("gres", "gpus_per_node", "gpus_per_task", "gpus") if given.get(key)]
        named = [f"{key}={given[key]}" for key in keys if key != "gres" or "gpu" in given[key]]
        return " ".join(named) or None

    @property
    def _seconds(self) -> float:
        """From the start of a job to Slurm's warning of its end."""
        return 60 * self.parameters["timeout_min"] - self.parameters["signal_delay_s"]

    @property
    def _tasks(self) -> int:
        return (self.parameters["nodes"] or 1) * (self.parameters["tasks_per_node"] or 1)

    def _processes(self, devices: int) -> int:
        return self._tasks if self._tasks > 1 else devices

    def _drop_orphans(self, folder: Path) -> None:
        """Cancel jobs of this sweep that no member knows: their command was killed too early."""
        from ssl_bench.runs import sweep

        parts = sweep.with_firsts(sweep.members(folder))
        orphans = sweep.submitted_from(self.folder.parent) - {part.job for part in parts}
        if not orphans:
            return
        sweep.cancel(orphans)
        log.warning("cancelled, left by a command that was killed: %s", " ".join(sorted(orphans)))
        until = time.monotonic() + 60  # they may save first
        while sweep.queued(orphans) and time.monotonic() < until:
            time.sleep(1)

    def _submit(self, todo: list["Member"], under_way: list["Member"]) -> None:
        from ssl_bench.errors import UserError
        from ssl_bench.runs import halving

        self._refuse_names()
        if not self.wait and not self._is_grid:
            raise UserError(
                "hydra.launcher.wait=false: this sweeper chooses by results; leave it out"
            )
        if not self.wait and self._halves:
            raise UserError(
                f"hydra.launcher.wait=false: {halving.KEY} decides whenever a member has come to a "
                "rung; leave one of the two out"
            )
        for file in map(Path, self.stage_in):
            # a folder that isn't here may be on the nodes
            if "$" not in str(file) and file.parent.is_dir() and not file.exists():
                raise UserError(
                    f"hydra.launcher.stage_in: no file {file}; "
                    "give the path of what each node copies"
                )
        minutes, delay = self.parameters["timeout_min"], self.parameters["signal_delay_s"]
        if 60 * minutes <= delay:
            raise UserError(
                f"hydra.launcher.timeout_min={minutes} leaves none before Slurm's warning, "
                f"{delay} s before the end: "
                "give more minutes, or a smaller hydra.launcher.signal_delay_s"
            )
        tasks = self._tasks
        for member in todo:
            if (batch := member.config["batch_size"]) % tasks:
                raise UserError(
                    f"batch_size={batch} of {member.name} can't be divided among the {tasks} "
                    "processes of hydra.launcher.nodes and tasks_per_node: choose a multiple"
                )
        if self._halves or not todo:
            return
        self._code(todo[0].file.parent)  # before it is needed, so that all arrays have the same
        self._hand_over(todo, under_way)

    def _hand_over(self, todo: list["Member"], under_way: list["Member"]) -> None:
        """Submit `todo`, and say so. UserError, which is then the failure of those left."""
        from ssl_bench.errors import UserError

        log.info("submitting %s job%s", len(todo), "s" if len(todo) > 1 else "")
        try:
            with _uninterrupted():
                self._submit_arrays(todo, under_way)
        except UserError as error:
            for member in (member for member in todo if member.job is None):
                member.fail(f"not submitted: {error}")
            raise
        options = self.parameters["additional_parameters"]
        if elsewhere := [options[key] for key in ("output", "error") if key in options]:
            log.info("output of their batch scripts: %s", " ".join(elsewhere))

    def _run(self, todo: list["Member"], under_way: list["Member"]) -> None:
        if self._halves:
            self._halve(todo, under_way)
        elif self.wait:
            for _ in self._ended({one.job: one for one in todo + under_way}, self._clock(todo)):
                pass

    def _halve(self, todo: list["Member"], under_way: list["Member"]) -> None:
        """Submit whom the rules send on, at first and whenever a member has ended."""
        waiting = {one.job: one for one in under_way}
        with self._plan(todo, under_way) as plan:
            self._fill(plan, waiting)
            for member in self._ended(waiting, self._clock(todo)):
                plan.ended(member)
                self._fill(plan, waiting)

    def _clock(self, todo: list["Member"]) -> "Clock":
        from ssl_bench.launch.forecast import Clock

        return Clock(todo, self.max_running, at_most=self._halves)

    def _fill(self, plan: "Halving | InTurn", waiting: dict[str | None, "Member"]) -> None:
        """Submit what comes next until `max_running` are waited for, and add it to `waiting`."""
        from ssl_bench.errors import UserError

        found: list[Member] = []
        while len(waiting) + len(found) < self.max_running:
            member = plan.next({one.name for one in (*waiting.values(), *found)})
            if member is None:
                break
            member.job = None
            member.forget_failure()
            found.append(member)
        if not found:
            return
        try:
            with deciding(Path(self.config.hydra.sweep.dir).absolute()):
                self._hand_over(found, [])
        except UserError as error:
            if not waiting:
                raise
            log.warning("%s; tried again when a job has ended", error)
        waiting.update({one.job: one for one in found if one.job})

    def _tell_of_jobs(self, members: list["Member"]) -> None:
        going = [one for one in members if one.result() is None and not one.paused]
        jobs = " ".join(member.job for member in going if member.job)
        if jobs:
            log.warning(
                "the jobs go on; the same command waits for them again, this ends them: scancel %s",
                jobs,
            )

    def _submit_arrays(self, todo: list["Member"], under_way: list["Member"]) -> None:
        """Submit `todo`, and give each member its job.

        under_way: members with a job, on which some of `todo` may depend.
        """
        # a pipeline, and the pretraining that it waits for
        after = {one.file: first for one in todo if (first := one.first)}
        later = [one for one in todo if one.file in after]
        pretrainings = [one for one in todo if one.is_first]
        others = [one for one in todo if one not in later and one not in pretrainings]
        evaluations = self._for_evaluations() if later else self
        self._submit_array([*others])
        self._submit_array(pretrainings)
        jobs = {one.file: one.job for one in pretrainings}
        matching = [one for one in later if after[one.file].file in jobs]
        if matching:
            first = jobs[after[matching[0].file].file].partition("_")[0]
            # in the same order, so that task i of the one array waits for task i of the other
            kind = "aftercorr" if len(matching) > 1 else "afterok"
            evaluations._submit_array(matching, f"{kind}:{first}")
        running = {one.file: one.job for one in under_way}
        for one in (one for one in later if after[one.file].file in running):
            evaluations._submit_array([one], f"afterok:{running[after[one.file].file]}")
        evaluations._submit_array([one for one in later if one.job is None])

    def _for_evaluations(self) -> "Slurm":
        """This launcher as the jobs of evaluations need it."""
        made = copy(self)
        made._prepare(**self._given | self.evaluation)
        return made

    def _submit_array(self, members: list["Member"], dependency: str = "") -> None:
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError

        from ssl_bench.config import build
        from ssl_bench.errors import UserError
        from ssl_bench.launch.member import SlurmTask
        from ssl_bench.shell import quoted

        if not members:
            return
        try:
            init = {"slurm_max_num_timeout": self.max_num_timeout, "slurm_python": self.python}
            executor = AutoExecutor(folder=self.folder, cluster="slurm", **init)
        except RuntimeError as error:
            raise UserError(
                f"{error} This launcher needs sbatch and srun; without them: launcher=workstation"
            ) from None
        options = dict(self.parameters["additional_parameters"])
        if dependency:
            # with those of the user's own; a job whose dependency has failed leaves the queue
            options["dependency"] = ",".join(filter(None, [dependency, options.get("dependency")]))
            options["kill-on-invalid-dep"] = "yes"
        shared = OmegaConf.structured(BaseQueueConf).keys()
        # before what the user's own setup put there, and a checkout that is the working directory
        path = f'{quoted(str(self._code(members[0].file.parent)))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        setup = [*self.parameters["setup"], f"export PYTHONPATH={path} PYTHONSAFEPATH=1"]
        items = (self.parameters | {"additional_parameters": options, "setup": setup}).items()
        executor.update_parameters(
            **{key if key in shared else f"slurm_{key}": value for key, value in items}
        )
        configs = [build.literal(member.config) for member in members]
        array = [
            SlurmTask(member.file, build.strange(config), self._gpus, self._seconds)
            for member, config in zip(members, configs, strict=True)
        ]
        try:
            jobs = executor.submit_array(array)
        except FailedJobError as error:  # its text is what sbatch said
            raise UserError(
                f"{' '.join(str(error).split())}: change hydra.launcher, whose keys are sbatch's"
            ) from None
        for member, job in zip(members, jobs, strict=True):
            member.job = job.job_id
            member.save()
        first, task = jobs[0].job_id, jobs[-1].job_id.partition("_")[2]
        log.info("submitted: %s", f"{first.partition('_')[0]}_[0-{task}]" if task else first)

    def _refuse_names(self) -> None:
        """UserError for characters that can't be quoted in `#SBATCH` lines and file patterns."""
        from ssl_bench.errors import UserError

        if found := re.search(r"[%\\\n]", str(folder := self.folder.parents[1])):
            raise UserError(
                f"{found[0]!r} is in the sweep's folder, {str(folder)!r}, and Slurm takes it for a "
                "pattern of its own, or the end of a line: start from another folder, or choose "
                "another sweep="
            )
        options = self.parameters | self.parameters["additional_parameters"]
        for key, value in options.items():
            if isinstance(value, str) and "\n" in value:
                raise UserError(
                    f"hydra.launcher: {key}={value!r} has a line break, "
                    "which no option of sbatch can have"
                )

    def _ended(self, waiting: dict[str | None, "Member"], clock: "Clock") -> Iterator["Member"]:
        """Take from `waiting`, by their jobs, the members whose job has ended, until it is empty.

        That is when squeue hasn't listed it twice in a row: a job that is being requeued is missing
        for a moment.
        """
        from ssl_bench.runs import sweep

        missed = Counter[str | None]()
        began, told = time.monotonic(), set(ORDINARY)
        while waiting:
            time.sleep(min(15, 1 + (time.monotonic() - began) / 60))
            clock.look([*waiting.values()], ["a GPU"] if self._gpus else [])
            queue = sweep.queued(waiting)
            if queue is None:
                continue  # slurmctld is away for a moment
            for job in list(waiting):
                state = queue.get(job)
                if state and state.name == "pending" and state.note not in told:
                    told.add(state.note)
                    log.warning("pending: %s  %s, says squeue", waiting[job].name, state.note)
                there = state is not None and not sweep.is_hopeless(state)
                missed[job] = 0 if there else missed[job] + 1
                if missed[job] == 2:
                    member = waiting.pop(job)
                    tell(member)
                    yield member


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and requests to end come after it, for this process and those that it starts.

    sbatch may have handed its job to Slurm already, and nobody would know the number.
    """
    late = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, late)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _checked(commands: Sequence[str], key: str) -> list[str]:
    """Shell: these commands, and the end of the job where one fails, with a line that says which.

    What fails within a file that they read, or a function, doesn't count.
    """
    from ssl_bench.shell import quoted

    if not commands:
        return []
    said = f'echo "hydra.launcher.{key} failed (status $status): $what" >&2'
    ends = f"status=$?; [ ${{#BASH_SOURCE[@]}} -gt $depth ] || {{ {said}; exit 1; }}"
    lines = [line for command in commands for line in (f"what={quoted(command)}", command)]
    return ["depth=${#BASH_SOURCE[@]}", f"trap '{ends}' ERR", *lines, "trap - ERR"]


def _stage(file: str, folder: str) -> str:
    """Shell: copy a file to the disk of each node that lacks it.

    The copy has its name only once it is whole, so that one that was cut off is never used.
    """
    from ssl_bench.shell import quoted

    script = (
        f"file={quoted(file, variables=True)} folder={quoted(folder, variables=True)}\n"
        'copy="$folder/${file##*/}"\n'
        'mkdir -p -- "$folder" && wanted=$(stat -Lc "%s %Y" -- "$file") || exit 1\n'
        'if [ "$wanted" != "$(stat -Lc "%s %Y" -- "$copy" 2>/dev/null)" ]; then\n'
        '    cp -pL -- "$file" "$copy.$SLURM_JOB_ID" && mv -T -- "$copy.$SLURM_JOB_ID" "$copy"\n'
        "fi"
    )
    once_a_node = (
        "--nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --overlap"
    )
    return f"srun {once_a_node} bash -c {quoted(script)} || exit 1"
