"""What a run is: the settings that decide its result, and the content of the weights below it.

No path is part of it, nor where or how fast it ran. From it follow the run's directory, its name
and row in tables, its group on a dashboard, and whether it may continue.
"""

import json
import math
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
from ssl_bench.errors import several
from ssl_bench.methods import splits
from ssl_bench.runs import layout

# A run may continue when these differ: they change where and how fast it runs and what it shows,
# not what it computes. (`devices` does change that in some runs: see `_by_process`.)
FREE_KEYS: tuple[str, ...] = ("dir", "sweep", "metric", "launcher", "tracking", "device", "devices")
FREE_KEYS += ("verbosity", "log_every", "save_every", "eval_every", "keep", "on_collapse")
FREE_KEYS += ("save_best", "until")
FREE_KEYS += ("data.root", "data.cache", "data.workers", "runs", "source", "stage.picture")
# Keys that are paths, in every stage that has them. Two spellings of a place are one.
PATHS = ("pretrained", "continue_from", "stage.images", "stage.out", "method.teacher")
TIMM = "timm:"  # a teacher by its name, and not by its file
KEPT_IN = {"select": "stage.features"}  # a path in this stage alone: lincls has "cached" there
# files or lists of files, relative to data.root
BELOW_ROOT: tuple[str, ...] = ("data.extra_labels", "stage.requested")
BELOW_ROOT += ("data.pretrain", "data.train", "data.val")
OVERRIDES = ("stage.protocol", "stage.rows")  # overrides that a pipeline starts its parts with
PARTS = "devices x bn_splits"
# The loss of a pretraining depends on these.
LOSS_OF = ("method", "augmentation", "batch_size", "data.name", PARTS)
NUMBER = int | float
# The types of what is read back from environment.json.
ENVIRONMENT = {"world_size": NUMBER, "gpus": list, "cpu_threads": NUMBER}
ENVIRONMENT |= {"git_commit": str, "started": str}
ORIGIN = "origin.json"  # file with the identity of the run that made the weights it started from
T = TypeVar("T")


def is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


@dataclass(frozen=True, eq=False)
class Identity:
    """What decides the result of a run, and what follows from that.

    config: plain, resolved. processes: how many took part; None: as many as `config` says.
    weights: the sha256 of the file that `pretrained` names; "": not known. below: the identity of
    the run that made this file; step: the step that it holds, unless it is the last of a finished
    run. images: {split: `data.store.Split.facts`}, as far as they are known.
    """

    config: Mapping[str, Any]
    processes: int | None = None
    weights: str = ""
    below: "Identity | None" = None
    step: int | None = None
    images: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def own(self) -> dict[str, Any]:
        """Flat {key: value} of the settings that decide the result, without `pretrained`."""
        flat: dict[str, Any] = {}

        def walk(node: object, path: str) -> None:
            if path == "pretrained" or is_free(path) or _is_ours(path, node):
                return
            if path.startswith("method.teacher"):  # its content, where that is known
                flat["method.teacher"] = self._teacher
                return
            if path == "continue_from":  # from which state, the weights say
                flat[path] = True if node else None
                return
            if isinstance(node, Mapping):
                for key, value in node.items():
                    walk(value, f"{path}.{key}" if path else str(key))
            else:
                flat[path] = plain(self._placeless(path, node))

        walk(self.config, "")
        if self.config.get("patience") is not None:  # these decide when it ends
            metric = self.config.get("save_best") or self.config.get("metric")
            flat |= {"save_best": metric, "eval_every": self.config.get("eval_every")}
        return _by_process(flat, self.config, self.processes or self.config.get("devices", 1))

    @property
    def _teacher(self) -> str | None:
        """Identifies the network that is learnt from: by its content, or as it was typed."""
        method = node(self.config, "method")
        if digest := method.get("teacher_sha256"):
            return f"sha256 {str(digest)[:16]}"
        typed = method.get("teacher")
        return typed and (typed if str(typed).startswith(TIMM) else self._place(str(typed)))

    def _placeless(self, key: str, value: Any) -> Any:
        """The value; a path in it is given its one name, however it was spelt."""
        if key in PATHS or key == KEPT_IN.get(self.stage):
            return value and self._place(value)
        if key in BELOW_ROOT and value and isinstance(value, str | list):
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
        """The one name of a path: relative to the run's directory if it is below, or absolute."""
        home = self.config.get("dir")
        return _inside(path, home, "${dir}/") if home else real(path)

    @property
    def seeds(self) -> list[int]:
        """The seed of this run, then those of the runs below it."""
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
        """What decides the result but for the seeds, as a flat {key: value}.

        The settings of the runs below are there too, under "pretrained.".
        """
        ours = {key: value for key, value in self.own.items() if key != "seed"}
        ours["pretrained"] = self.stands_on
        if self.below is None:
            return ours
        ours["pretrained"] = self.below.name
        ours["pretrained.step"] = "last" if self.step is None else self.step
        return ours | {f"pretrained.{key}": value for key, value in self.below.experiment.items()}

    @property
    def told(self) -> dict[str, Any]:
        """`experiment`, and eight digits of what tells the images, as far as they are known."""
        below = self.below.told if self.below else {}
        known = self.experiment | {f"pretrained.{key}": value for key, value in below.items()}
        for split, facts in self.images.items():
            sample = facts.get("sample")  # an earlier version wrote none
            text = _hash({"is": facts["fingerprint"], "holds": sample}) if sample else ""
            known[f"images of {split}"] = (text or facts["fingerprint"])[:8]
        return known

    @cached_property
    def key(self) -> str:
        """Hash that names this run, seed included."""
        return _hash(self.own | {"pretrained": self.stands_on})

    @cached_property
    def group(self) -> str:
        """Hash that runs share which differ in seeds alone."""
        return _hash(self.told)

    def alike(self, other: "Identity") -> bool:
        """Do they differ in seeds alone? Other images, where both are known, are a difference."""
        return _hash(self.experiment) == _hash(other.experiment) and self._same_images(other)

    def _same_images(self, other: "Identity") -> bool:
        shared = self.images.keys() & other.images.keys()
        here = all(same_images(self.images[split], other.images[split]) for split in shared)
        if self.below is None or other.below is None:
            return here
        return here and self.below._same_images(other.below)

    def line(self) -> "list[Identity]":
        """The runs that led to this one, from the bottom up, and this one."""
        return [*(self.below.line() if self.below else ()), self]

    # -- for people --------------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        return node(self.config, "stage").get("name", "")

    @property
    def name(self) -> str:
        """What a table calls the run: its method, or for an evaluation that of the pretraining."""
        if method := node(self.config, "method"):
            return method.get("name") or str(method.get("_target_")).rpartition(".")[2]
        if self.below:
            return self.below.name + (f" at step {self.step:,}" if self.step is not None else "")
        if self.config.get("pretrained"):
            return Path(self.config["pretrained"]).name.partition(".")[0]
        pixels = node(self.config, "backbone").get("name") == "pixels"
        return "raw pixels" if pixels else "random init"

    @property
    def title(self) -> str:
        """What a dashboard calls the run, like moco_v2-resnet18-digits.

        An evaluation of it is moco_v2-resnet18-digits-knn-10-labels-a-class; another training that
        starts from it is moco_v2-resnet18-digits-simclr.
        """
        words = [self.name, node(self.config, "backbone").get("name"), self.data]
        if self.below:
            words = [self.below.title]
            if self.config.get("continue_from"):
                words += ["continued"] if self.stage == "pretrain" else []
            elif self.config.get("method"):
                words.append(self.name)
            if self.data != self.below.data:
                words.append(self.data)
        if not self.config.get("method") or self.stage not in ("pretrain", ""):
            stage = node(self.config, "stage")
            cached = "cached" if stage.get("features") == "cached" else ""
            step = "" if self.step is None else f"at step {self.step}"
            words += [step, self.stage, stage.get("features_of"), cached, self.labels]
        return slug("-".join(map(str, filter(None, words))))

    @property
    def data(self) -> str:
        return node(self.config, "data").get("name", "")

    @property
    def labels(self) -> str:
        """Which part of the labels the run was given; "": all of them."""
        stage = node(self.config, "stage")
        if stage.get("labels_per_class"):
            return f"{several(stage['labels_per_class'], 'label')} a class"
        if stage.get("label_fraction"):
            return f"{100 * stage['label_fraction']:g} % of the labels"
        return ""


def node(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A node of a configuration that may be from a file; empty where it isn't a mapping."""
    return found if isinstance(found := config.get(name), Mapping) else {}


def grouped(things: Iterable[T], of: Callable[[T], Identity]) -> list[list[T]]:
    """The things in groups that differ in seeds alone, in the order of the first of each group.

    of: gives the identity of a thing.
    """
    groups: dict[str, list[list[T]]] = {}
    for thing in things:
        near = groups.setdefault(_hash(of(thing).experiment), [])
        for group in near:
            if all(of(thing)._same_images(of(other)) for other in group):
                group.append(thing)
                break
        else:
            near.append([thing])
    return [group for near in groups.values() for group in near]


def changes(before: Identity, now: Identity) -> str:
    """In words, how two runs differ in what decides their results; "": in nothing."""
    then, here = before.own, now.own
    differing = sorted(key for key in then.keys() | here.keys() if then.get(key) != here.get(key))
    said = [f"{key} was {then.get(key)}, is {here.get(key)}" for key in differing[:8]]
    known = before.weights and now.weights
    if before.weights != now.weights if known else before.place != now.place:
        was, is_now = (one.config.get("pretrained") for one in (before, now))
        anew = f"pretrained={was} holds other weights now"
        said.append(anew if was == is_now else f"pretrained was {was}, is {is_now}")
    return "; ".join(said)


def other_losses(several: Iterable[Identity]) -> list[str]:
    """The keys that the loss depends on and in which the runs differ.

    Where there are any, the loss can't tell which pretraining is better: temperature or queue_size
    change its scale, and the easier the views, the smaller it is.
    """
    values: dict[str, set[str]] = {}
    for one in several:
        for key in (key for key in one.own if key.startswith(LOSS_OF)):
            values.setdefault(key, set()).add(json.dumps(one.own[key]))
    return sorted(key for key, different in values.items() if len(different) > 1)


def config(directory: Path) -> dict[str, Any]:
    """The configuration that a run left in its directory; empty if it left none."""
    return _parsed(directory / layout.CONFIG, yaml.safe_load)


def left_by(config: Mapping[str, Any], directory: Path) -> Identity:
    """The identity of the run that left `config` in `directory`, without the run below it."""
    return known_by(config, environment(directory), inputs(directory), recorded(directory))


def known_by(
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    weights: str,
    below: Identity | None = None,
    step: int | None = None,
) -> Identity:
    """The identity of a run, from the content of the files in its directory.

    below, step: as for `Identity`, where they are known.
    """
    # Earlier versions wrote the number of torchrun's or srun's processes to environment.json alone.
    counts = (config.get("devices"), environment.get("world_size"))
    known = (count for count in counts if isinstance(count, NUMBER) and math.isfinite(count))
    count = max(map(int, known), default=1)
    return Identity(config, count, weights, below, step, inputs)


def inputs(directory: Path) -> dict[str, dict[str, Any]]:
    """The images that a run has opened: {split: `data.store.Split.facts`}.

    UserError for a damaged file.
    """
    known = _parsed(path := directory / layout.INPUTS, json.loads)
    if not all(_has(facts, {"fingerprint": str, "images": int}) for facts in known.values()):
        raise files.damaged(path)
    return known


def same_images(known: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Are the images that a run has opened those of now? An earlier version wrote down less."""
    return all(known[key] == now[key] for key in known.keys() & now.keys())


def environment(directory: Path) -> dict[str, Any]:
    """The environment that a run began in (`run.environment`), as far as it is known.

    UserError for a damaged file.
    """
    known = _parsed(path := directory / layout.ENVIRONMENT, json.loads)
    there = {key: kind for key, kind in ENVIRONMENT.items() if key in known}
    if not _has(known, there):
        raise files.damaged(path)
    return known


def _has(node: Any, kinds: Mapping[str, Any]) -> bool:
    """Is it a dict in which each of these keys has a value of its type?"""
    if not isinstance(node, dict):
        return False
    return all(isinstance(node.get(key), kind) for key, kind in kinds.items())


def recorded(directory: Path) -> str:
    """The sha256 of the weights that a run started from, as it began; "": not known."""
    known = directory / layout.WEIGHTS
    files.check(known)
    return known.read_text(encoding="utf-8", errors="replace").strip() if known.is_file() else ""


def with_origin(config: Mapping[str, Any], directory: Path) -> Identity:
    """As `left_by`, with the run below it as far as that was known at the start (`remember`)."""
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
    """Write down in the directory of a run which run made the weights that it starts from.

    That run may move later, or be deleted.
    """
    run, known = layout.run_of(weights), directory / ORIGIN
    if run is None or not (run / layout.CONFIG).is_file():
        return
    last = [layout.step_of(path) for path in layout.complete(run)[:1]]
    made = with_origin(config(run), run)
    step = older(weights, (run / layout.SUMMARY).is_file(), last)
    said = {"weights": files.digest(weights), "step": step, "run": asdict(made)}
    files.write(known, json.dumps(said, indent=1) + "\n")


def _restored(saved: Mapping[str, Any]) -> Identity:
    """An identity from its fields, as `remember` saved them. KeyError, TypeError."""
    number = int | None
    kinds = {"config": dict, "images": dict, "weights": str, "step": number, "processes": number}
    if not _has(saved, kinds):
        raise TypeError
    return Identity(**{**saved, "below": saved["below"] and _restored(saved["below"])})


def _parsed(path: Path, parser: Callable[[str], Any]) -> dict:
    return files.parse(path, parser) if path.is_file() else {}


def older(weights: Path, finished: bool, last: list[int]) -> int | None:
    """The step of a checkpoint; None: it is the last of a finished run, or not a checkpoint.

    finished: is the run finished? last: the step of its last checkpoint, if there is one.
    """
    if not weights.match("step*.pt"):
        return None
    return None if finished and last == [layout.step_of(weights)] else layout.step_of(weights)


def slug(value: object) -> str:
    """A text as part of a folder name: letters, digits, dots, dashes; at most 80 characters."""
    text = "random" if value is None else re.sub(r"^runs/", "", str(value).rstrip(os.sep))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[-80:] or "none"


def place_slug(path: object) -> str:
    """A path as part of a folder name, the same for all its spellings."""
    return slug(path if path is None else local(str(path)))


def local(path: str) -> str:
    """The one name of a path that may be moved with the current folder or its `runs`.

    It is relative to either if it lies below. What isn't a path, such as the name of known weights,
    is left as it is.
    """
    if not os.path.exists(os.path.expanduser(path)):
        return path
    for base in ("runs", "."):
        if not os.path.isabs(inside := _inside(path, base)):
            return inside
    return real(path)


def _is_ours(key: str, value: object) -> bool:
    """Is it a constructor of ours? Its node has a name, and its place in the package may change."""
    return key.endswith("_target_") and str(value).startswith("ssl_bench.")


def _by_process(flat: dict[str, Any], config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """`flat` with the number of processes, where it changes the result.

    Batch norm that isn't synchronised sees the batch in devices x method.bn_splits parts, so only
    this product counts: two processes of four parts compute what one of eight does
    (tests/runtime/test_distributed.py). In networks that aren't ours, bn_splits=null may find no
    layer to split; there the number itself counts. It does with mixup and dropout, too, which draw
    their random numbers in each process.
    """
    stage, method, backbone = (node(config, key) for key in ("stage", "method", "backbone"))
    trains = bool(method) or stage.get("name") == "finetune"
    parts = splits.resolve(flat.get("method.bn_splits", 1), count, config.get("batch_size"))
    if trains and (parts > 1 or not config.get("sync_batch_norm", True)):
        flat = {key: value for key, value in flat.items() if key != "method.bn_splits"}
        flat[PARTS] = count * parts
    drops = any("drop" in key and value for key, value in (backbone.get("options") or {}).items())
    ours = re.match(r"ssl_bench\..*\.(resnet|vit)\w*$", str(backbone.get("_target_")))
    unsure = "bn_splits" in method and method["bn_splits"] is None and not ours
    if trains and (stage.get("mixup") or drops or unsure):
        flat["devices"] = count
    return flat


def plain(value: Any) -> Any:
    """The value with 30 for 30.0: how a number is spelt is no difference."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hash(values: Mapping[str, Any]) -> str:
    """Hash of the values that aren't None: a key that is new and null leaves the hash as it was."""
    said = {key: value for key, value in values.items() if value is not None}
    return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


def real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _inside(path: str, base: str, mark: str = "") -> str:
    """The one name of a path: `mark`, then relative to `base`, if it is below; else absolute."""
    path, base = real(path), real(base)
    return mark + os.path.relpath(path, base) if Path(path).is_relative_to(base) else path


def _unquoted(value: str) -> str:
    """The value of an override without the quotes that `shell.quote` gave it."""
    quotes = value[0] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else ""
    if not quotes:
        return value

    def unescaped(found: re.Match) -> str:
        return found[1][: len(found[1]) // 2] + quotes

    return re.sub(rf"(\\*)\\{quotes}", unescaped, value[1:-1])
