"""Trackers mirror `metrics.jsonl`, which is the truth, to a dashboard.

One may fail without hurting the run.
"""

import csv
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import identity, layout
from ssl_bench.runs import metrics as logged
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.shell import override, quoted

log = logging.getLogger(__name__)

# The axes of the charts. They mean the same in all stages, so no stage's name is put before them.
AXES = ("epoch", "images_seen")
TABLE_ROWS = 10_000  # W&B shows no more rows of a table
# What W&B accepts, from wandb 0.31.0: validate_project and validate_run_tags in
# sdk/wandb_settings.py, INVALID_URL_CHARS, NAME_MAXLEN and MAX_ARTIFACT_METADATA_KEYS in
# sdk/artifacts/_validators.py. Names of runs and groups may have 128 characters, which only the
# server says (github.com/NVIDIA-NeMo/Skills, issue 842).
NAME_LENGTH, TAG_LENGTH, METADATA = 128, 64, 100
NOT_IN_URLS = "/\\#?%:\r\n"
_SECRET = re.compile(
    r"(^|_)(api_?key|access_?key|token|password|passwd|secret|credentials?)$", re.IGNORECASE
)


def _takes(most: int, without: str = "") -> AfterValidator:
    """Validates a text that W&B would refuse only when the work is done.

    most: how many characters it may have; without: characters that it must not have.
    """

    def check(text: str) -> str:
        if not 0 < len(text.strip()) <= len(text) <= most:
            raise ValueError(f"W&B takes 1 to {most} characters, and these are {len(text)}")
        if wrong := [char for char in without if char in text]:
            raise ValueError(f"W&B takes no {' '.join(map(repr, wrong))} there")
        return text

    return AfterValidator(check)


Project = Annotated[str, _takes(NAME_LENGTH, NOT_IN_URLS)]
Entity = Annotated[str, _takes(NAME_LENGTH, NOT_IN_URLS + " ")]
Title = Annotated[str, _takes(NAME_LENGTH)]
Tag = Annotated[str, _takes(TAG_LENGTH)]


class Tracker(Protocol):
    """Mirrors a run elsewhere. Constructed on rank 0 only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def log_image(self, step: int, name: str, path: str | Path) -> None: ...
    def log_checkpoint_file(self, path: str | Path) -> None: ...
    def close(self, status: str, summary: Mapping[str, float]) -> None: ...


def prefix_of(what: Identity) -> str:
    """What the names of a run's metrics begin with: its stage."""
    return f"{what.stage}/" if what.stage else ""


def named(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with the prefix before their names, except the axes."""
    return {key if key in AXES else prefix + key: value for key, value in metrics.items()}


class NoTracker:
    """`tracking=local`: the run directory only. The arguments, given to any tracker, are unused."""

    def __init__(self, *, directory: Path | None = None, config: dict[str, Any] | None = None):
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        pass

    def log_checkpoint_file(self, path: str | Path) -> None:
        pass

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        pass


class WandbTracker:
    """Mirrors a run to Weights & Biases. It never prompts, hangs, or stops a run that has begun.

    mode: "auto" is $WANDB_MODE if set, else online with an API key (environment, netrc or W&B
    settings), else offline. WANDB_MODE=disabled is no tracking at all. Without an answer within
    20 s, an online run goes on offline. UserError: "online" without an API key, a malformed key, an
    unknown $WANDB_MODE.
    group, job_type, name: None for the identity of the run without seeds, its stage, and the
    identity with seeds (see `identity`).
    directory, config: the run's; config is plain and resolved. rebuilt: is it called by `rebuild`?

    The id in `<directory>/wandb_id` makes a restart continue the same W&B run. Its config has that
    of the pretraining, too, under "pretraining". The names of metrics begin with the stage:
    pretrain/loss. A finished run also has what the stage returned, the best of what isn't measured
    on val (pretrain/best/loss), the *.csv as tables, and as artifacts its inputs (inputs.json,
    `pretrained`) and results, between which W&B draws the lineage.
    """

    def __init__(
        self,
        project: Project = "ssl_bench",
        entity: Entity | None = None,
        group: Title | None = None,
        job_type: Title | None = None,
        name: Title | None = None,
        tags: tuple[Tag, ...] = (),
        mode: Literal["auto", "online", "offline"] = "auto",
        log_checkpoint: bool = False,
        *,
        directory: Path,
        config: dict[str, Any],
        rebuilt: bool = False,
    ):
        self.directory = Path(directory).resolve()
        self.log_checkpoint = log_checkpoint
        self._what = what = identity.with_origin(config, self.directory)
        self._prefix = prefix_of(what)
        self._step = 0  # the last one that was logged
        self._rebuilt = rebuilt
        self._files = self.directory / "wandb-synced" if rebuilt else self.directory
        self._run = None
        if (mode := choose_mode(mode)) == "disabled":
            log.info("WANDB_MODE=disabled: not tracked, as with tracking=local")
            return
        words = dict(
            project=project,
            entity=entity,
            group=group or f"{what.title}-{what.group[:6]}",
            job_type=job_type or what.stage or None,
            name=name or _name(what),
            tags=_tags(what, tags),
            config=redacted(config | ({"pretraining": what.below.config} if what.below else {})),
        )
        try:
            self._begin(mode, words)
        # whatever it is, a full disk for example: the run goes on, and so does metrics.jsonl
        except Exception as error:
            reason = _line(error)
            if rebuilt and isinstance(error, OSError):
                raise
            if rebuilt:
                raise UserError(f"{self.directory}: W&B doesn't take it ({reason})") from error
            self._run = None
            later = f"ssl-bench stage=sync runs={self.directory}"
            log.warning("W&B can't be used (%s); later: %s", reason, later)

    def _begin(self, mode: str, words: dict[str, Any]) -> None:
        self._files.mkdir(parents=True, exist_ok=True)
        import wandb

        # a rebuilt run must not carry data of the machine that rebuilds it
        machine = {"x_disable_stats": True, "x_disable_machine_info": True} if self._rebuilt else {}
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=20,  # s; the default, 90, lets a node wait for nothing
            finish_timeout=300,  # s; by default a finish without network waits for ever
            # s; at the default, 15, a killed run loses its last lines
            x_transaction_log_flush_interval=2,
            # W&B looks at the folder in which the run was started, which may be another project's
            disable_git=True,
            git_commit=_commit(self.directory),
            **machine,
        )
        place = dict(id=_run_id(self.directory), resume="allow", dir=str(self._files))
        arguments = words | place | {"settings": settings}
        wandb.finish()  # init() would return a run left open, as by a sweep's last member
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except wandb.Error as error:
            if mode != "online":
                raise
            log.warning("W&B cannot be reached (%s); this run is tracked offline", _line(error))
            wandb.teardown()  # its service still holds the id of the failed attempt
            mode = "offline"
            self._run = wandb.init(mode=mode, **arguments)
        log.info("W&B %s: %s", mode, self._run.url if mode == "online" else self._files / "wandb")
        self._run.define_metric("images_seen")
        self._run.define_metric("epoch")
        # the axis of all charts: comparable between batch sizes, unlike the step
        self._run.define_metric("*", step_metric="epoch")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._mirror(lambda run: run.log(named(self._prefix, metrics), step=step))

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        import wandb

        self._mirror(lambda run: run.log({self._prefix + name: wandb.Image(str(path))}, step=step))

    def log_checkpoint_file(self, path: str | Path) -> None:
        """Keep the file as a model artifact, if `log_checkpoint`."""
        if not self.log_checkpoint:
            return

        def keep(run: Any) -> None:
            run.log_artifact(str(path), name=f"checkpoint-{run.id}", type="model")

        with self._staging():
            self._mirror(keep)

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        """status: "finished"; "preempted", if the run will be continued; any other is a failure."""

        def finish(run: Any) -> None:
            try:
                run.summary.update(named(self._prefix, summary) | self._best())
                if status == "finished":
                    self._log_tables(run)
                    self._log_lineage(run, summary)
                if status == "preempted":
                    run.mark_preempting()
            finally:
                run.finish(exit_code=0 if status == "finished" else 1)

        with self._staging():
            self._mirror(finish)
        if self._run is not None and self._run.offline:
            folder = Path(self._run.dir).parent
            command = f"wandb sync {quoted(str(folder))}" if self._rebuilt else self._sync
            log.info("W&B was offline; once you are logged in, type: %s", command)
        self._run = None

    @property
    def _sync(self) -> str:
        return f"ssl-bench stage=sync {override('runs', self.directory)}"

    def _best(self) -> dict[str, float]:
        """The least of each loss and the greatest of each accuracy in the whole run.

        None of those on val: the best epoch would be chosen by the images that measure it.
        """
        best: dict[str, float] = {}
        path = self.directory / layout.METRICS
        for row in MetricsFile.read(path) if path.is_file() else []:
            for name, value in row.items():
                kind = re.search(r"(?:^|_)(loss|top\d|accuracy)$", name)
                if kind and not name.startswith("val_") and math.isfinite(value):
                    key = f"{self._prefix}best/{name}"
                    best[key] = (min if kind[1] == "loss" else max)(value, best.get(key, value))
        return best

    def _log_tables(self, run: Any) -> None:
        import wandb

        for path in sorted(self.directory.glob("*.csv")):
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                rows = list(islice(csv.reader(file), 1 + TABLE_ROWS))
            if rows and not rows[0][0].isdecimal():  # a request for labels has no header
                data = [[_number(cell) for cell in row] for row in rows[1:]]
                table = wandb.Table(columns=rows[0], data=data, allow_mixed_types=True)
                run.log({f"{self._prefix}tables/{path.stem}": table}, step=self._step)

    def _log_lineage(self, run: Any, summary: Mapping[str, float]) -> None:
        """Log small artifacts that stand for data, weights and result.

        Artifacts with the same content are one to W&B; so it connects runs.
        """
        for split, facts in identity.inputs(self.directory).items():
            name = f"data-{identity.slug(self._what.data or 'data')}-{split}"
            _use(run, _artifact(name, "dataset", facts["fingerprint"], facts))
        if pretrained := self._what.config.get("pretrained"):
            _use(run, _weights(Path(pretrained)))
        newest = max(self.directory.glob("checkpoints/step*.pt"), default=None)
        if newest and self._prefix != "predict/":  # whose checkpoints hold no network
            run.log_artifact(_weights(newest))
        text = json.dumps(dict(summary))
        run.log_artifact(_artifact(f"result-{run.id}", "result", text, summary))

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Have W&B keep its copies of files that it uploads below the run's own directory."""
        ours = "WANDB_DATA_DIR" not in os.environ
        if ours:
            os.environ["WANDB_DATA_DIR"] = str(self._files / "wandb")
        try:
            yield
        finally:
            if ours:
                del os.environ["WANDB_DATA_DIR"]

    def _mirror(self, call: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        # whatever it is: the run goes on without its mirror
        except Exception as error:
            if self._rebuilt:
                raise
            self._run = None
            log.warning("W&B stopped (%r); later: %s", error, self._sync)


def rebuild(run_dir: str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write one whole W&B run from the files of a run directory.

    They are `metrics.jsonl`, `config.yaml`, `summary.json` (without it the run counts as failed)
    and `*.png`. The W&B run keeps its id. Only `<run_dir>/wandb-synced` is replaced, which nothing
    else writes. UserError for damaged files, before anything is replaced.

    settings: arguments of WandbTracker; None: those of the run if it has any, else the defaults,
    in either case online if logged in.
    """
    run_dir = Path(run_dir)
    rows = MetricsFile.read(run_dir / layout.METRICS)
    config, summary = _config(run_dir), logged.summary(run_dir)
    if settings is None:
        own = of_wandb(config.get("tracking") or {}) or {}
        keys = ("project", "entity", "group", "job_type", "name", "tags")
        settings = {key: own[key] for key in keys if key in own}
    shutil.rmtree(run_dir / "wandb-synced", ignore_errors=True)
    tracker = WandbTracker(**settings, directory=run_dir, config=config, rebuilt=True)
    step = 0
    for row in rows:
        step = row.pop("step")
        tracker.log(step, row)
    for image in sorted(run_dir.glob("*.png")):
        tracker.log_image(step, image.stem, image)
    tracker.close("failed" if summary is None else "finished", summary or {})


def _config(run: Path) -> dict[str, Any]:
    import yaml

    path = run / layout.CONFIG
    return files.parse(path, yaml.safe_load) if path.is_file() else {}


def _name(what: Identity) -> str:
    seeds = " on seed ".join(map(str, what.seeds))
    return f"{what.title} {what.group[:6]}" + (f" seed {seeds}" if seeds else "")


def _tags(what: Identity, more: Sequence[str]) -> list[str]:
    """Tags that say what the run is, and `more`: each once, none longer than W&B accepts."""
    backbone = identity.node(what.config, "backbone").get("name", "")
    methods = [one.name for one in what.line() if one.config.get("method")]
    own = (what.stage, *methods, backbone, what.data)
    return list(dict.fromkeys([*(word[:TAG_LENGTH] for word in own if word), *more]))


def _commit(directory: Path) -> str | None:
    """The commit of the code that the run began with."""
    return identity.environment(directory).get("git_commit") or None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _artifact(name: str, kind: str, content: str, metadata: Mapping[str, Any]) -> Any:
    import wandb

    facts = dict(islice(metadata.items(), METADATA))
    artifact = wandb.Artifact(name[:NAME_LENGTH], type=kind, metadata=facts)
    with artifact.new_file("content.txt") as file:
        file.write(content)
    return artifact


def _weights(path: Path) -> Any:
    """The artifact of a checkpoint, the same for the run that writes it and those that read it."""
    facts = {"file": path.name}
    if run := layout.run_of(path.resolve()):
        facts["run"] = identity.with_origin(_config(run), run).title
        if (run_id := run / "wandb_id").is_file():
            return _artifact(f"weights-{run_id.read_text().strip()}", "model", path.name, facts)
    content = path.name  # a file from elsewhere, or of a run that W&B doesn't know
    if path.is_file():
        content = files.digest(path, "blake2b")
    return _artifact("weights-" + re.sub(r"[^\w.-]+", "-", path.stem), "model", content, facts)


def _use(run: Any, artifact: Any) -> None:
    """Declare an artifact as an input of the run, whether W&B has seen it or not.

    Online, `use_artifact` writes the same record for an artifact that isn't logged yet, and waits
    for an answer. Offline it refuses, though the record says all that `wandb sync` needs to know.
    """
    run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)


def _number(cell: str) -> float | str:
    try:
        return int(cell) if cell.isdecimal() else float(cell)
    except ValueError:
        return cell


def save_workspace(workspace: Any) -> str:
    """Save a workspace as a view in its project, and return its address. UserError.

    Without an entity it belongs to the account's default one.
    """
    import wandb

    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        workspace.save()
    except Exception as error:  # of many classes: no network, no such entity, no right to write
        raise UserError(
            f"W&B made no dashboard ({_line(error)}): check tracking.entity and tracking.project"
        ) from None
    return workspace.url


def check(settings: Mapping[str, Any]) -> None:
    """UserError, before the work is done, for settings of which no tracker could be made.

    settings: the node `tracking`.
    """
    if (own := of_wandb(settings)) is not None:
        choose_mode(own.get("mode", "auto"))
    for name in ("tensorboard", "mlflow"):  # a choice, its package, and the extra that has it
        asked = (
            name in settings.get("names", ()) or f".{name}tracker" in settings["_target_"].lower()
        )
        if asked and importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking={name} needs the {name} package: pip install 'ssl_bench[{name}]'"
            )


def of_wandb(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of WandbTracker in the node `tracking`; None: it isn't used."""
    if str(settings.get("_target_")).endswith("WandbTracker"):
        return settings
    names = settings.get("names") or ()
    return settings.get("wandb") if "wandb" in names else None


def choose_mode(mode: str) -> str:
    """The mode, "online", "offline" or "disabled", that `mode` means (WandbTracker). UserError."""
    # wandb reports its own errors by default; behind a firewall that drops packets, these reports
    # delay the exit
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    asked = f"tracking.mode={mode}"
    if mode == "auto" and (mode := os.environ.get("WANDB_MODE") or "auto") != "auto":
        asked = f"WANDB_MODE={mode}"
        if mode not in (choices := ("online", "offline", "disabled")):
            raise UserError(f"{asked} is unknown; unset it or choose from {', '.join(choices)}")
    if mode in ("offline", "disabled"):
        return mode
    import wandb

    wandb.finish()  # a run left open blocks login()
    # else login() prints to stderr, and asks the server who the user is
    silent = wandb.Settings(silent=True)
    # set by an earlier run of this process: login() would succeed without a key
    if wandb.setup(silent).settings.mode != "online":
        wandb.teardown()
        wandb.setup(silent)
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise UserError(
            f"{str(error).rstrip('.')}; run `wandb login`, or add tracking.mode=offline"
        ) from None
    if mode == "online" and not logged_in:
        raise UserError(
            f"{asked}, but W&B has no API key; run `wandb login`, or add tracking.mode=offline"
        )
    return "online" if logged_in else "offline"


def _run_id(directory: Path) -> str:
    path = directory / "wandb_id"
    if not path.is_file():
        files.write(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


def redacted(node: Any) -> Any:
    """The config with "***" for every string whose key names a secret."""
    if isinstance(node, dict):
        secret = {key for key in node if _SECRET.search(str(key)) and isinstance(node[key], str)}
        return {key: "***" if key in secret else redacted(node[key]) for key in node}
    return [redacted(item) for item in node] if isinstance(node, list | tuple) else node
