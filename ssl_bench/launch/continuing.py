"""continue_from=RUN: a training that goes on from the whole state of another one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.base import SCMode

from ssl_bench.config import build, typed
from ssl_bench.config.choices import folders
from ssl_bench.config.renamed import current
from ssl_bench.errors import UserError, several
from ssl_bench.runs import identity, layout, metrics
from ssl_bench.shell import override

# of an augmentation that is chosen anew: the network has learnt from images of this size and look
LOOK = ("image_size", "mean", "std")
BROUGHT = ("augmentation", "optimizer", "schedule")  # groups that a method brings, when chosen
# stages that train nothing, of a run of any stage, and whose configuration is that run's
AS_IT_WAS = ("average",)
GROUPS = ("data", "backbone", "method", *BROUGHT)
ROOTS: tuple[str, ...] = (
    "batch_size",
    "epochs",
    "seed",
    "precision",
    "sync_batch_norm",
    "zero_init_residual",
)
ROOTS += ("ema", "accumulate", "log_every", "eval_every", "save_every", "keep", "on_collapse")
ROOTS += ("patience", "save_best")


def with_choices(words: Sequence[str]) -> list[str]:
    """The words of a command, and the choices of groups of the run that it goes on from.

    So that keys of that run's method, say, are keys of the command. UserError.
    """
    sources = [word.partition("=")[2] for word in words if typed.key_of(word) == "continue_from"]
    run = _run_at(sources[0].strip("'\"")) if len(sources) == 1 else None
    if run is None:
        return [*words]
    keys = {typed.key_of(word) for word in words}
    places = folders(words)
    chosen = []
    for group, name in _names(identity.config(run)).items():
        free = group not in keys and not ("method" in keys and group in BROUGHT)
        if free and any((folder / group / f"{name}.yaml").is_file() for folder in places):
            chosen.append(f"{group}={name}")
    return [*words, *chosen]


def _run_at(source: str) -> Path | None:
    """The directory of the run that `continue_from` means; None: it means none."""
    file = layout.weights_of(Path(source).expanduser())
    return layout.run_at(file) if file else None


def _names(ran: Mapping) -> dict[str, str]:
    """{group: name of the choice} of a run's configuration."""
    names = {group: identity.node(ran, group).get("name") for group in GROUPS}
    return {group: name for group, name in names.items() if isinstance(name, str)}


def checked(cfg: DictConfig, words: Sequence[str], quoted: Mapping[str, str]) -> DictConfig:
    """`continued`, as `build.check` has found it right. UserError; another method is told first."""
    made = continued(cfg, words)
    try:
        build.check(made, quoted)
    except UserError as error:
        if other := _other_method(made):
            raise UserError(f"{other}\n{error}") from None
        raise
    return made


def _other_method(cfg: DictConfig) -> str:
    """A line if another class of method is to go on from a run; "": it is the same.

    It brings settings of its own, and mending them would be in vain where its tensors are others.
    """
    source = cfg.get("continue_from")
    run = _run_at(source) if isinstance(source, str) else None
    before = identity.node(identity.config(run), "method") if run else {}
    now = cfg.get("method") or {}
    if not before or current(str(before.get("_target_"))) == current(str(now.get("_target_"))):
        return ""
    return (
        f"continue_from={source}: a run of method={before.get('name')}; method={now.get('name')} "
        "goes on from it only if its tensors are the same: leave method= out, or type pretrained= "
        "to begin with its backbone alone"
    )


def continued(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """`merged`, once there is something left to do. UserError."""
    made = merged(cfg, words)
    if made is not cfg and made.stage.name not in AS_IT_WAS:
        _check_epochs(made, Path(made.pretrained))
    return made


def merged(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """`cfg` in which all that wasn't typed is as in the run that `cfg.continue_from` names.

    words: the overrides of the command. A group that was chosen (augmentation=simclr) is as it was
    composed, but for the size and look of the images; of the others single keys that were typed are
    changed. UserError.
    """
    source = cfg.get("continue_from")
    if source is None or not isinstance(source, str):
        return cfg  # the check of the configuration refuses other types
    keys = {typed.key_of(word) for word in words}
    others = ("pretrained", "pretrained_prefix", "experiment") if "continue_from" in keys else ()
    for other in others:
        if other in keys and f"{other}=null" not in words:
            raise UserError(
                f"{other}= beside continue_from={source}, which says what to begin with: "
                "type one of the two"
            )
    file, run = layout.weights_of(Path(source).expanduser()), _run_at(source)
    if file is None or run is None:
        if "continue_from" not in keys:
            raise UserError(f"pretrained={source}: no run with a checkpoint; name its directory")
        raise UserError(
            f"continue_from={source}: no run with a checkpoint; name a run directory or a "
            "checkpoint in one (if it has moved since this run began, type dir=, too), or type "
            "pretrained= to begin with the backbone of a file"
        )
    place = run / layout.CONFIG
    ran = build.read_back(place, place.read_bytes(), yaml.safe_load)
    stage = (ran.get("stage") or {}).get("name")
    if cfg.stage.get("name") not in (stage, *AS_IT_WAS):
        raise UserError(
            f"continue_from={source}: a run of stage={stage}; stage={cfg.stage.get('name')} goes "
            "on from its own kind alone: type pretrained= for its weights"
        )
    # to choose what the run had is to leave it as it was
    restated = {f"{group}={name}" for group, name in _names(ran).items()}
    keys = {typed.key_of(word) for word in words if word not in restated}
    made = cfg.copy()
    OmegaConf.set_readonly(made, False)
    with open_dict(made):
        for group in GROUPS:
            if group in keys or ("method" in keys and group in BROUGHT):
                if group == "augmentation":
                    look = OmegaConf.to_container(build.literal(ran.get(group) or {}))
                    _keep_look(made.augmentation, look, keys)
                continue
            node = build.literal(build.found(ran, group, cfg, place))
            for word in words:
                _change(node, group, word, cfg)
            made[group] = node
        if stage == made.stage.name:  # its constructor is this command's, whatever the file says
            for key in made.stage.keys() & ran["stage"].keys() - {"_target_", "name"}:
                if f"stage.{key}" not in keys:
                    made.stage[key] = _as_text(ran["stage"][key])
        for key in ROOTS:
            if key not in keys and key in ran:
                made[key] = _as_text(ran[key])
        made.pretrained = str(file)
        made.continue_from = source
    return made


def _as_text(value: Any) -> Any:
    """A value of a file, in which "${" stands for itself."""
    return OmegaConf.to_container(build.literal({"value": value}))["value"]


def _keep_look(node: DictConfig, before: Mapping, keys: set[str]) -> None:
    """Give a node of an augmentation the size and look of images before, unless they are typed."""
    for key in LOOK:
        if key in before and key in node and f"augmentation.{key}" not in keys:
            node[key] = before[key]


def _change(node: DictConfig, group: str, word: str, cfg: DictConfig) -> None:
    """Change in a node what an override of one of its keys changes in `cfg`."""
    key = typed.key_of(word)
    if not key.startswith(group + "."):
        return
    inside = key.removeprefix(group + ".")
    if word.startswith("~"):
        parent, _, last = inside.rpartition(".")
        there = OmegaConf.select(node, parent) if parent else node
        if OmegaConf.is_dict(there):
            there.pop(last, None)
        return
    value = OmegaConf.select(cfg, key)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True, structured_config_mode=SCMode.DICT)
    OmegaConf.update(node, inside, value, force_add=True)


def _check_epochs(cfg: DictConfig, file: Path) -> None:
    """UserError if the state in the file has done all epochs."""
    run = layout.run_of(file)
    steps = run and metrics.per_epoch(run)
    done = layout.step_of(file) / steps if steps else 0
    if isinstance(cfg.epochs, int) and done >= cfg.epochs:
        more = override("epochs", 2 * cfg.epochs)
        raise UserError(
            f"continue_from={cfg.continue_from} has done {several(done, 'epoch')}, and "
            f"epochs={cfg.epochs} is the total: type more, like {more}"
        )
