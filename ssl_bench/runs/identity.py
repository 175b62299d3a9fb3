"""What a run is: what its configuration says that decides its result, and the content of what it
stands on.

No path is part of it, nor where and how fast it ran. Its place, its name and row in tables, its
group on a dashboard and whether it may continue follow from here.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ssl_bench import files
from ssl_bench.methods import splits
from ssl_bench.runs import layout

# A run may continue when these differ: they don't change what it computes, only where, how fast,
# and what is shown. (`devices` does where each process does something by itself: see
# `_by_process`.)
FREE_KEYS = (
    "dir",
    "sweep",
    "metric",
    "launcher",
    "tracking",
    "device",
    "devices",
    "log_every",
    "save_every",
)
FREE_KEYS += ("eval_every", "data.root", "data.cache", "data.workers", "runs", "source")
# Texts that are paths, of every stage that has them. Two spellings of a place are one.
PATHS = ("pretrained", "stage.images", "stage.out")
KEPT_IN = {"select": "stage.features"}  # of lincls that is no path
BELOW_ROOT = ("data.extra_labels", "stage.requested")  # lists of files, relative to data.root
OVERRIDES = ("stage.protocol", "stage.rows")  # of a pipeline: what its evaluations are started with
PARTS = "devices x bn_splits"
# what the loss of a pretraining depends on
LOSS_OF = ("method", "augmentation", "batch_size", "data.name", PARTS)
NUMBER = int | float
ENVIRONMENT = {
    "world_size": NUMBER,
    "gpus": list,
    "cpu_threads": NUMBER,
    "git_commit": str,
    "started": str,
}
ORIGIN = "origin.json"  # in the directory of a run: the run that made what it stands on
T = TypeVar("T")


def is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


@dataclass(frozen=True, eq=False)
class Identity:
    """config: plain, resolved. processes: that took part; None is what the configuration says.

    weights: the sha256 of the file that `pretrained` names, "" where that isn't known; below: the
    run that made it; step: of it, unless it is the last of a finished run. images: the fingerprint
    of each split, where that is known.
    """

    config: Mapping[str, Any]
    processes: int | None = None
    weights: str = ""
    below: "Identity | None" = None
    step: int | None = None
    images: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def own(self) -> dict[str, Any]:
        """Flat {key: value} of what decides the result, but for what it stands on."""
        flat: dict[str, Any] = {}

        def walk(node: object, path: str) -> None:
            if path == "pretrained" or is_free(path) or _is_ours(path, node):
                return
            if isinstance(node, Mapping):
                for key, value in node.items():
                    walk(value, f"{path}.{key}" if path else str(key))
            else:
                flat[path] = _plain(self._placeless(path, node))

        walk(self.config, "")
        return _by_process(flat, self.config, self.processes or self.config.get("devices", 1))

    def _placeless(self, key: str, value: Any) -> Any:
        """The value with a path's one name in place of its spelling."""
        if key in PATHS or key == KEPT_IN.get(self.stage):
            return value and self._place(value)
        if key in BELOW_ROOT and value:
            root = node(self.config, "data").get("root") or "."
            names = [value] if isinstance(value, str) else value
            return [_inside(os.path.join(root, os.path.expanduser(name)), root) for name in names]
        if key.startswith(OVERRIDES) and isinstance(value, list):
            return [self._override(word) for word in value]
        return value

    def _override(self, word: str) -> str:
        key, _, value = word.partition("=")
        known = key.lstrip("+") in (*PATHS, "data.root", "data.cache") and value not in ("", "null")
        return f"{key}={self._place(_unquoted(value))}" if known else word

    def _place(self, path: str) -> str:
        """Below the run's own directory, or absolute."""
        home = self.config.get("dir")
        return _inside(path, home, "${dir}/") if home else real(path)

    @property
    def seeds(self) -> list[int]:
        """Its own, and those of what it stands on."""
        return [self.config.get("seed", 0), *(self.below.seeds if self.below else ())]

    @property
    def stands_on(self) -> str | None:
        """Identifies its weights: by their content or, where that isn't known, by their place."""
        return f"sha256 {self.weights[:16]}" if self.weights else self.place

    @property
    def place(self) -> str | None:
        source = self.config.get("pretrained")
        return source and self._place(source)

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """What decides the result, but for the seeds: of what it stands on, too, under
        "pretrained.".
        """
        ours = {key: value for key, value in self.own.items() if key != "seed"} | {
            "pretrained": self.stands_on
        }
        if self.below is None:
            return ours
        ours |= {
            "pretrained": self.below.name,
            "pretrained.step": "last" if self.step is None else self.step,
        }
        return ours | {f"pretrained.{key}": value for key, value in self.below.experiment.items()}

    @property
    def told(self) -> dict[str, Any]:
        """`experiment`, and the images as far as they are known."""
        below = (
            {f"pretrained.{key}": value for key, value in self.below.told.items()}
            if self.below
            else {}
        )
        return (
            self.experiment
            | below
            | {f"images of {split}": text[:8] for split, text in self.images.items()}
        )

    @cached_property
    def key(self) -> str:
        """Of this run, seed and all."""
        return _hash(self.own | {"pretrained": self.stands_on})

    @cached_property
    def group(self) -> str:
        """The same for what differs in seeds alone."""
        return _hash(self.told)

    def alike(self, other: "Identity") -> bool:
        """Do they differ in seeds alone? Other images, where both are known, are a difference."""
        return _hash(self.experiment) == _hash(other.experiment) and self._same_images(other)

    def _same_images(self, other: "Identity") -> bool:
        here = all(
            self.images[split] == other.images[split]
            for split in self.images.keys() & other.images.keys()
        )
        return here and (
            self.below is None or other.below is None or self.below._same_images(other.below)
        )

    def line(self) -> "list[Identity]":
        """The run at the bottom, from which it all came, what stands on it, ..., this one."""
        return [*(self.below.line() if self.below else ()), self]

    # -- for people --------------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        return node(self.config, "stage").get("name", "")

    @property
    def name(self) -> str:
        """The method, for an evaluation that of the pretraining."""
        if method := node(self.config, "method"):
            return method.get("name") or str(method.get("_target_")).rpartition(".")[2]
        if self.below:
            return self.below.name + (f" at step {self.step:,}" if self.step is not None else "")
        if self.config.get("pretrained"):
            return Path(self.config["pretrained"]).name.partition(".")[0]
        return (
            "raw pixels" if node(self.config, "backbone").get("name") == "pixels" else "random init"
        )

    @property
    def title(self) -> str:
        """For dashboards: moco_v2-resnet18-digits; on top of it
        moco_v2-resnet18-digits-knn-10-labels-a-class, or another training, -simclr.
        """
        words = (
            [self.below.title]
            if self.below
            else [self.name, node(self.config, "backbone").get("name"), self.data]
        )
        if self.below and self.config.get("method"):
            words.append(self.name)
        if self.below and self.data != self.below.data:
            words.append(self.data)
        if not self.config.get("method") or self.stage not in ("pretrain", ""):
            cached = "cached" if node(self.config, "stage").get("features") == "cached" else ""
            step = "" if self.step is None else f"at step {self.step}"
            words += [step, self.stage, cached, self.labels]
        return slug("-".join(map(str, filter(None, words))))

    @property
    def data(self) -> str:
        return node(self.config, "data").get("name", "")

    @property
    def labels(self) -> str:
        """Which part of the labels it was given; "" for all."""
        stage = node(self.config, "stage")
        if stage.get("labels_per_class"):
            return f"{stage['labels_per_class']} labels a class"
        return (
            f"{100 * stage['label_fraction']:g} % of the labels"
            if stage.get("label_fraction")
            else ""
        )


def node(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A node of a configuration that may have come from elsewhere; empty where there is none."""
    return found if isinstance(found := config.get(name), Mapping) else {}


def grouped(things: Iterable[T], of: Callable[[T], Identity]) -> list[list[T]]:
    """Those that differ in seeds alone together, in the order of the first of each group."""
    groups: dict[str, list[list[T]]] = {}
    for thing in things:
        near = groups.setdefault(_hash(of(thing).experiment), [])
        same = next(
            (group for group in near if all(of(thing)._same_images(of(other)) for other in group)),
            None,
        )
        if same is None:
            near.append([thing])
        else:
            same.append(thing)
    return [group for near in groups.values() for group in near]


def changes(before: Identity, now: Identity) -> str:
    """In words, what decides the result of a run and differs between two; "" where nothing does."""
    differing = sorted(
        key for key in before.own.keys() | now.own.keys() if before.own.get(key) != now.own.get(key)
    )
    said = [f"{key} was {before.own.get(key)}, is {now.own.get(key)}" for key in differing[:8]]
    known = before.weights and now.weights
    if before.weights != now.weights if known else before.place != now.place:
        was, is_now = (one.config.get("pretrained") for one in (before, now))
        anew = f"pretrained={was} holds other weights now"
        said.append(anew if was == is_now else f"pretrained was {was}, is {is_now}")
    return "; ".join(said)


def other_losses(several: Iterable[Identity]) -> list[str]:
    """The keys that make of a loss another one, and differ: it says nothing then of which
    pretraining is better.

    Of temperature or queue_size the loss has another scale, and the easier the views, the smaller
    it is.
    """
    values: dict[str, set[str]] = {}
    for one in several:
        for key in (key for key in one.own if key.startswith(LOSS_OF)):
            values.setdefault(key, set()).add(json.dumps(one.own[key]))
    return sorted(key for key, different in values.items() if len(different) > 1)


def left_by(config: Mapping[str, Any], directory: Path) -> Identity:
    """Of the run that left this configuration in this directory."""
    return known_by(config, environment(directory), inputs(directory), recorded(directory))


def known_by(
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    weights: str,
    below: Identity | None = None,
    step: int | None = None,
) -> Identity:
    """By what lies in a run's directory, and where it is known, what it stands on."""
    # Before torchrun's and srun's number was in config.yaml, environment.json alone had it.
    counts = (config.get("devices"), environment.get("world_size"))
    count = max((int(count) for count in counts if isinstance(count, NUMBER)), default=1)
    images = {split: facts["fingerprint"] for split, facts in inputs.items()}
    return Identity(config, count, weights, below, step, images)


def inputs(directory: Path) -> dict[str, dict[str, Any]]:
    """The images that a run has opened: {split: {"fingerprint": hex digits, "images": how many}}.
    UserError.
    """
    known = _parsed(path := directory / "inputs.json", json.loads)
    if not all(_has(facts, {"fingerprint": str, "images": int}) for facts in known.values()):
        raise files.damaged(path)
    return known


def environment(directory: Path) -> dict[str, Any]:
    """What a run began with besides its configuration (`run.environment`), as far as that is known.
    UserError.
    """
    known = _parsed(path := directory / "environment.json", json.loads)
    told = {key: kind for key, kind in ENVIRONMENT.items() if key in known}
    if not _has(known, told):
        raise files.damaged(path)
    return known


def _has(node: Any, kinds: Mapping[str, Any]) -> bool:
    return isinstance(node, dict) and all(
        isinstance(node.get(key), kind) for key, kind in kinds.items()
    )


def recorded(directory: Path) -> str:
    """The sha256 of what a run stands on, as it began; "" where that isn't known."""
    known = directory / layout.WEIGHTS
    files.check(known)
    return known.read_text(encoding="utf-8", errors="replace").strip() if known.is_file() else ""


def with_origin(config: Mapping[str, Any], directory: Path) -> Identity:
    """As `left_by`, and what it stands on, as far as it was known when it began; see `remember`."""
    mine = left_by(config, directory)
    known = _parsed(path := directory / ORIGIN, json.loads)
    if not known or known.get("weights") != mine.weights:
        return mine
    try:
        below = _restored(known["run"])
    except (KeyError, TypeError):
        below = None
    if below is None or not _has(known, {"step": int | None}):
        raise files.damaged(path)
    return replace(mine, below=below, step=known["step"])


def remember(weights: Path, directory: Path) -> None:
    """Leave in the directory of a run which run made the file that it stands on: that one may move,
    or be deleted.
    """
    run, known = layout.run_of(weights), directory / ORIGIN
    if run is None or not (run / "config.yaml").is_file():
        return
    last = [layout.step_of(path) for path in layout.complete(run)[:1]]
    made = with_origin(_parsed(run / "config.yaml", yaml.safe_load), run)
    step = older(weights, (run / "summary.json").is_file(), last)
    said = {"weights": files.digest(weights), "step": step, "run": asdict(made)}
    files.write(known, json.dumps(said, indent=1) + "\n")


def _restored(saved: Mapping[str, Any]) -> Identity:
    """KeyError, TypeError."""
    whole = {
        "config": dict,
        "images": dict,
        "weights": str,
        "step": int | None,
        "processes": int | None,
    }
    if not _has(saved, whole):
        raise TypeError
    return Identity(**{**saved, "below": saved["below"] and _restored(saved["below"])})


def _parsed(path: Path, parser: Callable[[str], Any]) -> dict:
    return files.parse(path, parser) if path.is_file() else {}


def older(weights: Path, finished: bool, last: list[int]) -> int | None:
    """The step of a checkpoint, unless it is the last of a finished training, as far as that is
    known.
    """
    if not weights.match("step*.pt"):
        return None
    return None if finished and last == [layout.step_of(weights)] else layout.step_of(weights)


def slug(value: object) -> str:
    """A text as part of a folder name: letters, digits, dots, dashes; at most 80."""
    text = "random" if value is None else re.sub(r"^runs/", "", str(value).rstrip(os.sep))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[-80:] or "none"


def place_slug(path: object) -> str:
    """A path as part of a folder name: the same for each of its spellings, and wherever the folder
    of the runs lies.
    """
    # the name of known weights, say
    if path is None or not os.path.exists(os.path.expanduser(str(path))):
        return slug(path)
    for base in ("runs", "."):
        if not os.path.isabs(inside := _inside(str(path), base)):
            return slug(inside)
    return slug(real(str(path)))


def _is_ours(key: str, value: object) -> bool:
    """Is it a constructor of ours? Its node has a name, and its place in the package may change."""
    return key.endswith("_target_") and str(value).startswith("ssl_bench.")


def _by_process(flat: dict[str, Any], config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The number of processes, where each does something by itself that changes the result.

    Batch norm that isn't synchronised sees the batch in devices x method.bn_splits parts, so that
    only this product counts: two processes of four parts compute what one of eight does
    (tests/runtime/test_distributed.py). In networks that aren't ours, bn_splits=null may find
    nothing that
    it can split. Mixup and the dropping of activations draw in each process.
    """
    stage, method, backbone = (node(config, key) for key in ("stage", "method", "backbone"))
    trains = bool(method) or stage.get("name") == "finetune"
    parts = splits.resolve(flat.get("method.bn_splits", 1), count, config.get("batch_size"))
    if trains and (parts > 1 or not config.get("sync_batch_norm", True)):
        flat = {key: value for key, value in flat.items() if key != "method.bn_splits"} | {
            PARTS: count * parts
        }
    drops = any("drop" in key and value for key, value in (backbone.get("options") or {}).items())
    ours = re.match(r"ssl_bench\..*\.(resnet|vit)\w*$", str(backbone.get("_target_")))
    unsure = "bn_splits" in method and method["bn_splits"] is None and not ours
    if trains and (stage.get("mixup") or drops or unsure):
        flat["devices"] = count
    return flat


def _plain(value: Any) -> Any:
    """30 for 30.0: a number's spelling is none of its own either."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hash(values: Mapping[str, Any]) -> str:
    """A key that is null is one that isn't there: new ones leave older runs what they were."""
    said = {key: value for key, value in values.items() if value is not None}
    return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


def real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _inside(path: str, base: str, mark: str = "") -> str:
    """The one name of a place: below `base` relative to it, after `mark`; else absolute."""
    path, base = real(path), real(base)
    return mark + os.path.relpath(path, base) if Path(path).is_relative_to(base) else path


def _unquoted(value: str) -> str:
    """Of an override, as `shell.quote` has it."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return re.sub(
            rf"(\\*)\\{value[0]}",
            lambda found: found[1][: len(found[1]) // 2] + value[0],
            value[1:-1],
        )
    return value
