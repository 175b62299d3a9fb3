"""The only place where configuration becomes objects.

A node is checked against its constructor's signature, then constructed.
"""

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    create_model,
)

from ssl_bench import shell
from ssl_bench.config import signatures, typed
from ssl_bench.config.choices import CONF, yaml_below
from ssl_bench.config.fields import InEpochs, Place, is_path
from ssl_bench.config.renamed import current
from ssl_bench.errors import UserError, unknown

log = logging.getLogger(__name__)

BOOLEAN = "should be true or false"
# what makes a data set of a class of a user's own
OWN = "ssl_bench.data.formats.own.Own"
# Of `SUPPLIED`, what every constructor of the group is called with; the rest it may lack.
HANDED = {
    "method": ("backbone",),
    "optimizer": ("params", "batch_size"),
    "tracking": ("directory", "config"),
    "stage": ("cfg", "run"),
}
# What the code hands to a group's constructor; everything else comes from its YAML node.
SUPPLIED = {
    "data": (),
    "backbone": (),
    "method": ("backbone", "num_classes", "batch_size", "num_images", "teacher_network"),
    "augmentation": (),
    "optimizer": ("params", "batch_size"),
    "schedule": (),
    "tracking": ("directory", "config"),
    "stage": ("cfg", "run"),
}


class Root(BaseModel):
    """The keys of conf/config.yaml outside its groups.

    Strict: they are used as they were typed, and 2.0 is no number of epochs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    seed: NonNegativeInt
    dir: Annotated[Place, Field(min_length=1)] | None
    epochs: PositiveInt
    batch_size: PositiveInt
    pretrained: Annotated[Place, Field(min_length=1)] | None
    pretrained_prefix: Annotated[str, Field(min_length=1)] | None = None
    continue_from: Place | None = None  # a member of a sweep may be older than the key
    runs: Place | list[Place] | None
    sweep: Annotated[
        str,
        Field(
            pattern=r"^\w[\w.-]*$",
            description="a name of letters, digits, . _ and -, for the folder runs/sweeps/NAME",
        ),
    ]
    metric: str | None
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
            description="auto, cpu, mps, cuda or, for one GPU of several, like cuda:1",
        ),
    ]
    devices: PositiveInt
    source: Literal["auto", "resident", "host", "streamed"]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    sync_batch_norm: bool
    zero_init_residual: bool
    compile: bool
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    accumulate: Annotated[int, Field(ge=2)] | None = None
    compress: Literal["bf16"] | None = None
    verbosity: Literal["quiet", "normal", "full"] = "normal"
    log_every: PositiveInt
    eval_every: NonNegativeInt
    save_every: PositiveInt
    on_collapse: Literal["warn", "stop"] = "warn"
    keep: PositiveInt | Literal["all", "last", "best", "backbone"] = 2
    patience: PositiveInt | None = None
    save_best: Annotated[str, Field(min_length=1)] | None = None
    until: PositiveInt | None = None


def check(cfg: DictConfig, quoted: Mapping[str, str] | None = None) -> None:
    """UserError with every mistake of the configuration, one a line.

    quoted: {key: what was typed for it, as a text} (`typed.quoted`). Of the code, only the modules
    of the constructors are read.
    """
    if missing := sorted(_missing(OmegaConf.to_container(cfg))):
        raise UserError("; ".join(f"{key} needs a value: type {key}=..." for key in missing))
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    nodes = {key: node for key, node in plain.items() if key in SUPPLIED and isinstance(node, dict)}
    for group, node in nodes.items():
        if not isinstance(path := node.get("_target_", ""), str) or "." not in (path or "."):
            raise UserError(
                f"{group}._target_={path}: name a class or a function, like my_module.MyOwn"
            )
    roots = {key: value for key, value in plain.items() if key not in SUPPLIED}
    problems = _problems(Root, roots, "", quoted or {})
    if other := _other_recipe(nodes):
        problems.append(other)
        del nodes["backbone"]  # it may have keys of the recipe that this backbone lacks
    within = {
        f"{group}.{key}": node
        for group in nodes
        for key, node in nodes[group].items()
        if isinstance(node, dict) and "_target_" in node  # tracking=several
    }
    for group, node in (nodes | within).items():
        try:
            schema = _schema(node.get("_target_"), group, SUPPLIED[group.partition(".")[0]])
        except UserError as error:
            problems.append(str(error))
        else:
            if group == "data" and not _is_ours(node["_target_"]) and node.get("name") in _names():
                log.warning(
                    "data.name=%s is the name of other images, and tables would call these by it: "
                    "type data=own data.name=...",
                    node["name"],
                )
            wrong = _problems(schema, _arguments(node, schema), f"{group}.", quoted or {})
            problems += wrong or _too_late(schema, node, group, plain)
    if not problems and (rest := plain["batch_size"] % plain["devices"]):
        nearest = plain["batch_size"] - rest + plain["devices"]
        problems.append(
            f"batch_size={plain['batch_size']} is global, and can't be divided among "
            f"devices={plain['devices']} processes: choose a multiple, like batch_size={nearest}"
        )
    problems += _unsafe_names(nodes)
    if not problems:
        problems += [*_no_weights(plain), *indivisible(plain), *_wrong_start(plain)]
        problems += _wrong_keep(plain)
    if problems:
        raise UserError("\n".join(problems))


def _unsafe_names(nodes: Mapping[str, dict[str, Any]]) -> list[str]:
    """A line for each name that can't be part of a directory's, as the places of runs have it."""
    shown = [group for group in ("method", "backbone", "data") if group in nodes]
    names = {f"{group}.name": str(nodes[group].get("name", group)) for group in shown}
    return [
        f"{key}={name[:40]}: a name is letters, digits, dots and dashes, at most 80"
        for key, name in names.items()
        if not re.fullmatch(r"\w[\w.-]{0,79}", name)
    ]


def _no_weights(config: Mapping) -> list[str]:
    """A line if the stage's module says that it NEEDS_WEIGHTS, and there are none."""
    stage = config["stage"]
    needs = signatures.constant(stage["_target_"], "NEEDS_WEIGHTS")
    if not needs or config["pretrained"] is not None:
        return []
    said = f"stage={stage['name']} needs weights: type pretrained=..."
    return [f"{said} (a run directory, a file, a zoo name)"]


def indivisible(config: Mapping) -> list[str]:
    """A line for each argument that should divide another number, and doesn't.

    The module of its constructor says in DIVIDES which one: a key of the same node, or the batch,
    of which each process has a share. config: plain, resolved.
    """
    lines, batch, devices = [], config["batch_size"], config["devices"]
    for group in SUPPLIED:
        node = config.get(group) or {}
        divides = signatures.constant(node["_target_"], "DIVIDES") if "_target_" in node else None
        for name, what in (divides or {}).items():
            value, of, key = node.get(name), node.get(what), f"{group}.{name}"
            others = [f"{group}.{what}"]
            if what.startswith("batch_size"):
                of = batch // devices if what == "batch_size / devices" else batch
                others = what.split(" / ")
            numbers = isinstance(value, int) and isinstance(of, int)
            if numbers and value and of % value and typed.is_read(config, key):
                said = f"the {of} images of a process" if len(others) > 1 else f"{others[0]}={of}"
                lines.append(
                    f"{key}={value} does not divide {said}: "
                    f"change one of {', '.join([key, *others])}"
                )
    return lines


def _wrong_keep(config: Mapping) -> list[str]:
    """A line if a finished run is to keep what it hasn't, or less than its users need."""
    keep, stage = config.get("keep"), config["stage"]["name"]
    if keep == "best" and config.get("save_best") is None and config.get("patience") is None:
        return [
            "keep=best needs a metric by which a state is the best: add save_best=knn_top1, which "
            "stage=pretrain reads, or type keep=last"
        ]
    if keep == "backbone" and stage not in ("pretrain", "pipeline", "average"):
        return [
            f"keep=backbone is for pretrainings: what stage={stage} learns is more: type keep=last"
        ]
    return []


def _wrong_start(config: Mapping) -> list[str]:
    """A line if the schedule begins at an epoch at which it can't."""
    schedule, epochs = config.get("schedule") or {}, config["epochs"]
    if not (start := schedule.get("start_epoch", 0)):
        return []
    if config.get("continue_from") is None:
        return [
            f"schedule.start_epoch={start:g} is for a training that goes on: "
            "add continue_from=RUN, or leave it out"
        ]
    if start >= epochs:
        return [
            f"schedule.start_epoch={start:g} isn't reached within epochs={epochs}: "
            f"type a smaller value, or epochs={int(start) + 1} or more"
        ]
    if (warmup := schedule.get("warmup_epochs", 0)) >= epochs - start:
        return [
            f"schedule.warmup_epochs={warmup:g} isn't reached from schedule.start_epoch={start:g} "
            f"within epochs={epochs}: type a smaller value, or more epochs"
        ]
    return []


def _other_recipe(nodes: Mapping[str, dict[str, Any]]) -> str | None:
    """What to type instead of a method whose recipe is for another kind of backbone, or None."""
    method, backbone = (nodes.get(group, {}).get("name") for group in ("method", "backbone"))
    vit = str(backbone).startswith("vit_")
    if method == "moco_v3" and vit:
        return (
            f"method=moco_v3 is a recipe for ResNets: with backbone={backbone} "
            "type method=moco_v3_vit"
        )
    if method == "moco_v3_vit" and not vit:
        return (
            f"method=moco_v3_vit is a recipe for backbone=vit_*: with backbone={backbone} "
            "type method=moco_v3"
        )
    target = nodes.get("method", {}).get("_target_")
    if not vit and target and signatures.constant(target, "HIDES_PATCHES"):
        return (
            f"method={method} hides patches, which backbone={backbone} hasn't: "
            "type backbone=vit_tiny, backbone=vit_small or backbone=vit_base"
        )
    return None


def at_home(cfg: DictConfig) -> DictConfig:
    """A copy, not resolved, in which a leading ~ of whatever the schema calls a path is home."""
    made, plain = cfg.copy(), OmegaConf.to_container(cfg)
    hints = get_type_hints(Root, include_extras=True)
    places = {name: plain.get(name) for name, hint in hints.items() if is_path(hint)}
    for group, supplied in SUPPLIED.items():
        node = plain.get(group) or {}
        if "_target_" not in node:
            continue
        for name, (hint, _) in signatures.parameters(node["_target_"], supplied).items():
            if is_path(hint):
                places[f"{group}.{name}"] = node.get(name)
    for key, value in places.items():
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(made, key, os.path.expanduser(value))
        elif isinstance(value, list):
            OmegaConf.update(made, key, [os.path.expanduser(path) for path in value])
    return made


def construct(node: Mapping, **supplied: Any) -> Any:
    """The object that a checked node describes: `_target_` called with its other keys.

    supplied: further arguments, from the code.
    """
    resolved = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    plain = dict(resolved)
    path, target = plain["_target_"], locate(plain["_target_"], "node")
    own = not supplied and _gives_items(target)  # a stage gives items, too: its results
    schema = _schema(path, "data" if own else "node", tuple(supplied))
    values = schema.model_validate(_arguments(plain, schema))
    arguments = {key: getattr(values, key) for key in values.model_fields_set}
    if own:
        theirs, ours = signatures.parameters(path, ()), _packing()
        made = {key: value for key, value in arguments.items() if key in theirs}
        packing = {key: value for key, value in arguments.items() if key in ours}
        return signatures.locate(OWN)(target, made, **packing)
    return target(**arguments, **supplied)


def _is_ours(path: str) -> bool:
    return current(path).startswith("ssl_bench.")


@cache
def _names() -> set[str]:
    """The names of our data sets, but for the one that is for a user's own."""
    return {path.stem for path in (CONF / "data").glob("*.yaml")} - {"own"}


def _gives_items(target: Callable) -> bool:
    """Is it a data set as torch has them, and not one of our `Dataset`s or a list of modules?

    Or a function that says that it returns one. torch's own Dataset, by which it may call that, has
    no __len__.
    """
    made, has = target, ["__getitem__", "__len__"]
    if inspect.isfunction(target):
        made, has = _returned(target), has[:1]
    if not inspect.isclass(made) or any(hasattr(made, name) for name in ("split", "forward")):
        return False
    return all(hasattr(made, name) for name in has)


def _returned(function: Callable) -> Any:
    """The class that the annotation of a function promises; None: there is none."""
    try:
        promised = get_type_hints(function).get("return")
    except Exception:  # of names that are for the type checker alone, or whatever it holds
        return None
    return get_origin(promised) or promised


def _packing() -> dict[str, signatures.Parameter]:
    """The keys of the data set that is made of a user's own, beside the user's arguments."""
    return signatures.parameters(OWN, ("make", "arguments"))


def takes(node: Mapping, name: str) -> bool:
    """Does the constructor of a checked node have this parameter?"""
    return name in signatures.parameters(node["_target_"], ())


def wanted(node: Mapping, **offers: Callable[[], Any]) -> dict[str, Any]:
    """Of the arguments that are offered, those that the constructor of a checked node has."""
    return {name: offer() for name, offer in offers.items() if takes(node, name)}


def locate(path: str, group: str) -> Callable:
    """The class or function with this dotted path, imported. UserError.

    The current folder is searched too, for a user's own modules.
    """
    with _told(path, group):
        return signatures.locate(path)


def parameters(path: str, group: str) -> dict[str, signatures.Parameter]:
    """Those of a constructor of the group, but for what it is handed. UserError."""
    with _told(path, group):
        return signatures.parameters(path, SUPPLIED.get(group, ()))


@contextmanager
def _told(path: str | None, group: str) -> Iterator[None]:
    if _permitted is not None:
        _permit(path, group, _permitted)
    try:
        yield
    except signatures.NoConstructor as error:
        raise UserError(f"{group}._target_={path} is {error}: name a class or a function") from None
    except SyntaxError as error:
        where = f"line {error.lineno} of {error.filename}"
        raise UserError(f"{group}._target_={path}: {error.msg}, in {where}") from None
    except (ImportError, AttributeError, ValueError) as error:
        line = f"{group}._target_={path}: can't be imported ({error})"
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            line += (
                "; modules are looked for in the folder where you type the command "
                f"({os.getcwd()}) and among installed packages, not in that of --config-dir"
            )
        raise UserError(line) from None


# -- what comes from elsewhere is data -------------------------------------------------------------

# The (group, dotted path) pairs that this process may call, if it runs the configuration of a file;
# None in a process that composed its own configuration.
_permitted: set[tuple[str, str]] | None = None
# Options of timm that fetch or unpickle what they name.
FETCHING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def read_back(
    place: Path, text: str | bytes, parser: Callable[[str | bytes], Any]
) -> dict[str, Any]:
    """A configuration from a file, as plain data whose groups are mappings. UserError."""
    try:
        config = parser(text)
        groups = [config[group] for group in SUPPLIED if config.get(group) is not None]
    except Exception:  # errors of yaml and json have no common class
        groups = [None]
    if not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{place}: its configuration is damaged: put it back, or delete it")
    return config


# Without these keys, and the name of its stage, a configuration isn't that of a run.
NEEDED = {"dir", "device", "seed", "epochs", "batch_size"}


def is_of_run(config: Mapping) -> bool:
    """Has a configuration from a file what one of a run has, each key with a value of its type?

    It may be of another version, which has keys and words of its own and lacks others.
    """
    if not all(isinstance(config.get(key), str) for key in ("dir", "device")):
        return False
    if not isinstance(typed.select(config, "stage.name"), str):
        return False
    known = config.keys() & Root.model_fields.keys()
    if not known >= NEEDED:
        return False
    try:
        _left(frozenset(known)).model_validate(dict(config))
    except ValidationError as error:
        words = ("literal_error", "string_pattern_mismatch")
        bounds = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
        # a key of several possible types has an error for each
        fine: dict[Any, bool] = {}
        for one in error.errors():
            is_word = one["type"] in words and isinstance(one["input"], str)
            key = one["loc"][0]
            fine[key] = fine.get(key, False) or is_word or one["type"] in bounds
        return all(fine.values())
    return True


@cache
def _left(keys: frozenset[str]) -> type[BaseModel]:
    """Root with these keys alone; others may be there."""
    hints = get_type_hints(Root, include_extras=True)
    fields: dict[str, Any] = {key: (hints[key], ...) for key in keys}
    return create_model("Left", __config__=ConfigDict(strict=True), **fields)


def found(config: Mapping, group: str, cfg: DictConfig, place: Path) -> dict[str, Any]:
    """The node of `group` in a configuration that was read from `place`, for `construct`.

    The node chooses among our constructors and those named in a --config-dir or in `cfg`, which
    this command composed. UserError for any other: the writer of a file must not choose which code
    runs.
    """
    node = config.get(group)
    if not isinstance(node, Mapping) or not isinstance(path := node.get("_target_"), str):
        raise UserError(f"{place}: names no {group}")
    permitted = _permitted if _permitted is not None else _ours() | named(cfg)
    _permit(path, group, permitted, place)
    options = node.get("options")
    if isinstance(options, Mapping) and (fetching := sorted(set(FETCHING) & options.keys())):
        raise UserError(
            f"{place}: {group}.options.{fetching[0]} fetches or unpickles what it names: "
            "take it out"
        )
    return dict(node)


def named(cfg: DictConfig) -> set[tuple[str, str]]:
    """The (group, dotted path) of every constructor that this command names.

    Such a name stands in `cfg`, in the overrides that it holds, or in the YAML of --config-dir.
    """
    plain = OmegaConf.to_container(cfg)
    paths = _targets(plain)
    for word in _texts(plain):  # overrides, in the rows of a pipeline
        if override := re.fullmatch(r"\+{0,2}(\w+)\._target_=(\S+)", word):
            paths.add((override[1], current(override[2])))
    if GlobalHydra.instance().is_initialized():
        for element in GlobalHydra.instance().config_loader().get_search_path().get_path():
            if element.path.startswith("file://"):
                paths |= _targets_below(Path(element.path.removeprefix("file://")))
    return paths


def strange(cfg: DictConfig) -> list[str]:
    """The constructors that `cfg` names and that aren't ours, each as an override.

    A process that runs this `cfg` from a file is given them (`restrict`).
    """
    return sorted(f"{group}._target_={path}" for group, path in named(cfg) - _ours())


def restrict(words: Iterable[str]) -> None:
    """Limit this process to our constructors and those in `words`, whatever a file says.

    words: overrides, as `strange` returns them.
    """
    global _permitted
    pairs = (word.partition("._target_=") for word in words)
    _permitted = _ours() | {(group, path) for group, _, path in pairs}


def literal(config: Mapping) -> DictConfig:
    """Plain data as a configuration without interpolations: "${" in a file stands for itself."""

    def escaped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: escaped(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [escaped(item) for item in value]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return OmegaConf.create(escaped(config))


def _permit(
    path: str | None, group: str, permitted: set[tuple[str, str]], place: Path | None = None
) -> None:
    path = current(path) if path else path
    known_path = any(path == known for _, known in permitted)
    if (group, path) in permitted or (group == "node" and known_path):
        return
    where = f"{place}: " if place else ""
    raise UserError(
        f"{where}{group}._target_={path} is not ours, and this command doesn't name it: "
        "it is not called. If it is your own, add --config-dir=DIR with the YAML that names it"
    )


@cache
def _ours() -> set[tuple[str, str]]:
    return _targets_below(CONF)


def _targets_below(folder: Path) -> set[tuple[str, str]]:
    """The constructors that the choices of a folder name; its files aren't composed.

    A run that lies there names none: it may come from elsewhere.
    """
    paths: set[tuple[str, str]] = set()
    for file in yaml_below(folder):
        try:
            text = file.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # if the file is chosen, Hydra reports it
        header = re.match(r"#\s*@package\s+(\S+)", text)
        own = file.parent.relative_to(folder).as_posix()
        package = header[1] if header else own
        group = package.removeprefix("_global_").removeprefix(".").replace("_group_", own)
        if isinstance(content, dict):
            paths |= _targets({group: content} if group in SUPPLIED else content)
    return paths


def _targets(config: Any) -> set[tuple[str, str]]:
    nodes = ((group, config.get(group)) for group in SUPPLIED)
    paths = ((group, node.get("_target_")) for group, node in nodes if isinstance(node, Mapping))
    return {(group, current(path)) for group, path in paths if isinstance(path, str)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _arguments(node: dict, schema: type[BaseModel]) -> dict:
    """The keys of a node that are arguments: `name` only where the constructor takes it."""
    left_out = ("_target_",) if "name" in schema.model_fields else ("_target_", "name")
    return {key: value for key, value in node.items() if key not in left_out}


def _schema(path: str | None, group: str, supplied: tuple[str, ...]) -> type[BaseModel]:
    with _told(path, group):
        parameters = signatures.parameters(path or "", supplied)
    if group == "data" and not _is_ours(str(path)):
        target = locate(str(path), group)
        if _gives_items(target):
            theirs = {key: value for key, value in parameters.items() if key != "split"}
            parameters = theirs | _packing()
        elif not inspect.isclass(target):
            if "image_size" not in parameters:  # which whoever makes one of our `Dataset`s takes
                raise UserError(
                    f"data._target_={path} doesn't say that it gives a data set: annotate it, "
                    f"def {str(path).rpartition('.')[2]}(...) -> torch.utils.data.Dataset, or name "
                    "a class"
                )
        elif not hasattr(target, "split"):
            lacking = [name for name in ("__len__", "__getitem__") if not hasattr(target, name)]
            raise UserError(
                f"data._target_={path} has no {' and no '.join(lacking) or 'images'}: "
                "a data set has __len__, and __getitem__ for (image, label)"
            )
    _check_handed(str(path), group)
    return _model(str(path), tuple(parameters.items()))


def _check_handed(path: str, group: str) -> None:
    """UserError for a user's own constructor that can't be called as others of its group are."""
    handed = HANDED.get(group.partition(".")[0], ())
    if not handed or _is_ours(path):
        return
    lacking = handed - signatures.parameters(path, ()).keys()
    kinds = inspect.signature(locate(path, group)).parameters.values() if lacking else ()
    if lacking and not any(one.kind is one.VAR_KEYWORD for one in kinds):
        names = " and no ".join(name for name in handed if name in lacking)
        raise UserError(
            f"{group}._target_={path} takes no {names}: each of its group is called with "
            f"{', '.join(handed)}"
        )


# A sweep's members have their constructors in common, and pydantic takes ms for each.
@lru_cache(maxsize=256)
def _model(name: str, parameters: tuple[tuple[str, signatures.Parameter], ...]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        key: (annotation, ... if required else None) for key, (annotation, required) in parameters
    }
    config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # what is learnt by such a number isn't finite either
    )
    return create_model(name, __config__=config, **fields)


def _missing(node: object, path: str = "") -> Iterator[str]:
    """The keys without a value in a configuration that isn't resolved."""
    if node == "???":
        yield path
    items: Iterable[tuple[Any, object]] = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    for key, value in items:
        yield from _missing(value, f"{path}.{key}" if path else str(key))


def _problems(
    schema: type[BaseModel], values: dict, prefix: str, quoted: Mapping[str, str]
) -> list[str]:
    try:
        made = schema.model_validate(values)
    except ValidationError as error:
        # A key of several possible types has a mistake for each: keep the first, with the words
        # that would do, or the one that asks for a text.
        found: dict[str, Mapping] = {}
        for detail in error.errors():
            key = prefix + ".".join(map(str, _place(detail, values)))
            if key not in found or detail["type"] == "string_type":
                found[key] = detail
            elif detail["type"] == "literal_error" and found[key]["type"] != "string_type":
                words = f"{found[key]['msg']}, or {detail['ctx']['expected']}"
                found[key] = {**found[key], "msg": words}
        return [_problem(key, detail, schema, prefix, quoted) for key, detail in found.items()]
    respelt = (
        _respelt(f"{prefix}{key}", value, getattr(made, key)) for key, value in values.items()
    )
    return list(chain.from_iterable(respelt))


def _respelt(key: str, given: Any, made: Any) -> Iterator[str]:
    """A line for each value that a constructor would take for another: no for false, '1' for 1.

    A run is named by what was typed, and the same run would have two names. 1.0 and 1 are one
    (`identity.plain`).
    """
    if isinstance(given, list) and isinstance(made, list | tuple):
        for index, (one, other) in enumerate(zip(given, made, strict=True)):
            yield from _respelt(f"{key}.{index}", one, other)
    elif isinstance(given, dict) and isinstance(made, Mapping):
        for name, value in given.items():
            yield from _respelt(f"{key}.{name}", value, made.get(name))
    elif isinstance(made, bool):
        if not isinstance(given, bool):
            yield f"{key}={given}: {BOOLEAN}"
    elif isinstance(made, int | float) and type(given) in (bool, str):
        instead = "" if isinstance(given, bool) else f": type {key}={made}"
        yield f"{key}={given!r}: should be a number{instead}"


def _place(detail: Mapping, values: Any) -> Iterator[str | int]:
    """The keys and indices of a mistake, without the type names that pydantic puts in between."""
    for part in detail["loc"]:
        in_list = isinstance(values, list) and isinstance(part, int)
        in_dict = isinstance(values, dict) and (part in values or detail["type"] == "missing")
        if in_list or in_dict:
            yield part
            there = part < len(values) if in_list else part in values
            values = values[part] if there else None


def _too_late(schema: type[BaseModel], node: dict, group: str, config: Mapping) -> list[str]:
    """A line for each setting in epochs that the stage reads and that `epochs` doesn't reach."""
    problems, epochs = [], config.get("epochs")
    if not isinstance(epochs, int):  # `Root` reports it
        return []
    for name, field in schema.model_fields.items():
        for mark in (part for part in field.metadata if isinstance(part, InEpochs)):
            value, key = float(node.get(name, 0)), f"{group}.{name}"
            late = value > max(epochs, 0) or (value == epochs > 0 and not mark.or_at_the_end)
            if late and typed.is_read(config, key):
                enough = int(value) + (not mark.or_at_the_end)
                problems.append(
                    f"{key}={value:g} isn't reached within epochs={epochs}: "
                    f"type a smaller value, like {key}=0, or epochs={enough} or more"
                )
    return problems


def _problem(
    key: str, detail: Mapping, schema: type[BaseModel], prefix: str, quoted: Mapping[str, str]
) -> str:
    if detail["type"] == "extra_forbidden":
        names = [*schema.model_fields, *(SUPPLIED if schema is Root else ())]
        return unknown("key", key, [prefix + name for name in names])
    if detail["type"] == "missing":
        return f"{key} needs a value: type {key}=..."
    if detail["type"] == "string_type":
        given = detail["input"]
        if isinstance(given, list):  # a text in brackets was typed
            given = f"[{','.join(map(str, given))}]"
        as_text = shell.quoted(f"{key}={quoted.get(key, typed.quote(str(given)))}")
        return f"{key}={given}: should be a text; quote it: {as_text}"
    if detail["type"] in ("bool_type", "bool_parsing"):
        return f"{key}={detail['input']}: {BOOLEAN}"
    if detail["type"] == "string_pattern_mismatch":  # each pattern has a description
        field = schema.model_fields[key.removeprefix(prefix)]
        return f"{key}={detail['input']}: should be {field.description}"
    said = detail["msg"].removeprefix("Value error, ")
    message = said if detail["type"] == "value_error" else said[0].lower() + said[1:]
    return f"{key}={detail['input']}: {message}"
