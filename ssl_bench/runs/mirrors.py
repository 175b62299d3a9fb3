"""TensorBoard, MLflow, and several trackers at once. What they have is what `metrics.jsonl` has."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ssl_bench import files
from ssl_bench.config.build import construct
from ssl_bench.runs import identity
from ssl_bench.runs.tracking import Tracker, WandbTracker, named, prefix_of, redacted

log = logging.getLogger(__name__)

PARAM_LENGTH, PARAMS = 6000, 100  # what MLflow takes of a value, and at once


class _Mirror:
    """A tracker that a run survives: what it can't do is said once, and it stops."""

    title = ""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory, self.config = Path(directory).resolve(), config
        self.what = identity.with_origin(config, self.directory)
        self.prefix = prefix_of(self.what)
        self._stopped = False

    def log_checkpoint_file(self, path: str | Path) -> None:
        """Nothing: they keep no checkpoints."""

    def attempt(self, call: Callable[[], object]) -> None:
        if self._stopped:
            return
        try:
            call()
        except Exception as error:  # whatever it is: metrics.jsonl has everything
            self._stopped = True
            log.warning("%s stopped: %s: %s", self.title, type(error).__name__, error)


class TensorBoardTracker(_Mirror):
    """Event files in `<directory>/tensorboard`: `tensorboard --logdir runs`.

    A run that continues goes on in the same folder; of steps that it does again the last ones count
    (TensorBoard's purge_step).
    """

    title = "TensorBoard"

    def __init__(self, *, directory: Path, config: dict[str, Any]) -> None:
        super().__init__(directory, config)
        self._writer: Any = None

    def _open(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.directory / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=step, flush_secs=10)
            text = json.dumps(redacted(self.config), indent=2)
            self._writer.add_text("config", f"```json\n{text}\n```", step)
        return self._writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        def write() -> None:
            for name, value in named(self.prefix, metrics).items():
                self._open(step).add_scalar(name, value, step)

        self.attempt(write)

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        def write() -> None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._open(step).add_image(self.prefix + name, pixels, step, dataformats="HWC")

        self.attempt(write)

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        self.attempt(lambda: self._writer and self._writer.close())


class MLflowTracker(_Mirror):
    """A run of MLflow: parameters, metrics, pictures as artifacts.

    uri: of the server or the database; None: $MLFLOW_TRACKING_URI, else MLflow's default. The id in
    `<directory>/mlflow_id` makes a restart continue the same run; steps that it does again are not
    logged twice.
    """

    title = "MLflow"

    def __init__(
        self,
        uri: str | None = None,
        experiment: str = "ssl_bench",
        name: str | None = None,
        tags: tuple[str, ...] = (),
        *,
        directory: Path,
        config: dict[str, Any],
    ) -> None:
        super().__init__(directory, config)
        self._client: Any = None
        self._id, self._logged = "", set[str]()
        self._reached = self._last = 0  # steps: until which an earlier attempt came, and the newest
        self.attempt(lambda: self._begin(uri, experiment, name, tags))

    def _begin(
        self, uri: str | None, experiment: str, name: str | None, tags: Sequence[str]
    ) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):  # MLflow sets their levels when it is imported
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._client = MlflowClient(uri)
        known = self.directory / "mlflow_id"
        if known.is_file():
            self._id = known.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            earlier = self._client.get_metric_history(self._id, "epoch")
            self._reached = self._last = max((metric.step for metric in earlier), default=0)
            return
        found = self._client.get_experiment_by_name(experiment)
        home = found.experiment_id if found else self._client.create_experiment(experiment)
        title = name or f"{self.what.title} {self.what.group[:6]}"
        self._id = self._client.create_run(home, run_name=title).info.run_id
        words = {"stage": self.what.stage, "directory": str(self.directory)}
        words |= dict.fromkeys(tags, "")
        flat = ((key, str(value)[:PARAM_LENGTH]) for key, value in _flat(redacted(self.config)))
        params = [Param(key, value) for key, value in flat]
        self._client.log_batch(self._id, tags=[RunTag(*item) for item in words.items()])
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[start : start + PARAMS])
        self.directory.mkdir(parents=True, exist_ok=True)
        files.write(known, self._id + "\n")  # last: what isn't whole is begun anew

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._reached:
            self.attempt(lambda: self._write(step, named(self.prefix, metrics)))

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        self._logged |= {*metrics}
        self._last = step
        now = time.time_ns() // 1_000_000  # ms
        items = (Metric(name, value, now, step) for name, value in metrics.items())
        self._client.log_batch(self._id, metrics=[*items])

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        self.attempt(lambda: self._client.log_artifact(self._id, str(path)))

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        """status: see `WandbTracker.close`."""
        ended = {"finished": "FINISHED", "preempted": "KILLED"}.get(status, "FAILED")

        def finish() -> None:
            rest = {k: v for k, v in named(self.prefix, summary).items() if k not in self._logged}
            if rest and status == "finished":
                self._write(self._last, rest)
            self._client.set_terminated(self._id, ended)

        self.attempt(finish)


class Several:
    """`tracking=several`: each of `names`, by the settings below its name."""

    def __init__(
        self,
        names: tuple[Literal["wandb", "tensorboard", "mlflow"], ...],
        wandb: dict[str, Any],
        tensorboard: dict[str, Any],
        mlflow: dict[str, Any],
        *,
        directory: Path,
        config: dict[str, Any],
    ) -> None:
        known: dict[str, tuple[type, dict[str, Any]]] = {
            "wandb": (WandbTracker, wandb),
            "tensorboard": (TensorBoardTracker, tensorboard),
            "mlflow": (MLflowTracker, mlflow),
        }
        self._trackers: list[Tracker] = []
        for kind, options in (known[name] for name in dict.fromkeys(names)):
            # whatever class a file names, it is this one
            node = options | {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
            self._trackers.append(construct(node, directory=directory, config=config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        for tracker in self._trackers:
            tracker.log_image(step, name, path)

    def log_checkpoint_file(self, path: str | Path) -> None:
        for tracker in self._trackers:
            tracker.log_checkpoint_file(path)

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.close(status, summary)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
