"""The directory of a run that isn't given one: the same for the same command, for no other."""

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_bench.config import build, typed
from ssl_bench.errors import UserError
from ssl_bench.launch.continuing import merged
from ssl_bench.runs import identity, layout, sweep

# keys whose values the default places show
SHOWN = ("experiment", "method", "backbone", "data", "stage.strategy")
GROUPS = (*build.SUPPLIED, "experiment", "settings")
# keys that tell commands apart though they are no part of a configuration, or not of a run's result
ALWAYS = ("experiment", "settings", "data.root")
# keys of a backbone that its weights fit to no other value of
SHAPE = ("stem", "width", "model", "patch_size")
LONGEST = 120  # characters of the part of a path that tells commands apart
# a text that can be told from the key that follows it: a number, or a word without a dash
PLAIN = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?|[A-Za-z_][\w.]*")


def place(default: str, config: DictConfig) -> str:
    """The directory of the run of this command.

    default: the place of the command that changes nothing but what this names. Of a sweep's member
    the place is in the folder of the sweep instead. Otherwise, what the command changed of the
    defaults comes before the last part: runs/moco_v2-resnet18-digits/batch_size-64/seed0. Values
    that were typed but are the default, and keys that leave the result alone (log_every, device),
    name nothing. config: the whole configuration, not resolved.
    """
    if not HydraConfig.initialized():
        return default
    command = HydraConfig.get()
    words = tuple(OmegaConf.to_container(command.overrides.task))
    if command.mode == RunMode.MULTIRUN:
        return os.path.join(command.sweep.dir, sweep.name(words))
    return _of_its_images(_by_words(default, config, words), config)


def _by_words(default: str, config: DictConfig, words: tuple[str, ...]) -> str:
    """The place that follows from the words of a command alone."""
    command = HydraConfig.get()
    network = _network(config)
    named = tuple(word for word in words if word in network or _names(default, word))
    changed = [word for word in words if word not in named]
    if changed:
        sources, main = str(command.runtime.config_sources), command.job.config_name
        about_hydra = tuple(OmegaConf.to_container(command.overrides.hydra))  # its searchpath, say
        # a value is compared with what it would be under the same choices
        choices = tuple(word for word in words if word in named or typed.key_of(word) in GROUPS)
        try:
            usual, chosen = (
                _plain(merged(_composed(main, (*about_hydra, *some), sources), some))
                for some in (named, choices)
            )
            values = [word for word in changed if word not in choices]
            changed = telling([word for word in choices if word not in named], usual, chosen)
            changed += telling(values, chosen, _plain(config))
        except (UserError, TypeError, ValueError, AttributeError, OmegaConfBaseException):
            return default  # a mistake, which the check of the configuration puts in words
    if not (name := slug(changed, identity.node(config, "data").get("name", ""))):
        return default
    return os.path.join(os.path.dirname(default), name, os.path.basename(default))


def _of_its_images(path: str, config: DictConfig) -> str:
    """`path`, or the place beside it where that has a run of other images.

    Folders of one name are one place, wherever they have moved, until two of them have been used.
    """
    root = typed.select(config, "data.root")
    folder, last = os.path.split(path)
    beside = Path(folder).parent.glob(f"{glob.escape(os.path.basename(folder))}-images-*")
    taken = {one: of for one in (Path(folder), *sorted(beside)) if (of := _opened(one, last))}
    if not isinstance(root, str) or not taken:
        return path
    for one, (theirs, _) in taken.items():
        if isinstance(theirs, str) and identity.real(theirs) == identity.real(root):
            return str(one / last)
    try:
        data = json.dumps(OmegaConf.to_container(build.at_home(build.literal(_plain(config))).data))
        for one, (_, known) in taken.items():
            if all(identity.same_images(known[name], _facts(data, name)) for name in known):
                return str(one / last)
        now = _facts(data, min(known))  # the split that such a run opens first
    except (UserError, TypeError, ValueError, OSError, OmegaConfBaseException):
        return path  # a mistake, which the run puts in words
    if "sample" not in now:
        return path
    told = f"{now['fingerprint']}{now['sample']}"
    return f"{folder}-images-{blake2b(told.encode(), digest_size=4).hexdigest()}/{last}"


def _opened(folder: Path, last: str) -> tuple[object, dict[str, dict[str, Any]]] | None:
    """The data.root of a run in `folder`, and the images that it has opened; None: none has.

    Of that of `last`, if it has. A damaged one is left to whoever runs it.
    """
    of_pipelines = folder.glob(f"*/pretrain/{layout.INPUTS}")
    runs = [path.parent for path in (*folder.glob(f"*/{layout.INPUTS}"), *of_pipelines)]
    for run in sorted(runs, key=lambda run: (last not in run.parts, run)):
        with suppress(UserError):
            if inputs := identity.inputs(run):
                return identity.node(identity.config(run), "data").get("root"), inputs
    return None


@lru_cache(maxsize=8)  # a command asks for its place several times
def _facts(data: str, split: str) -> dict[str, Any]:
    """`Split.facts` of a split of the data set that this JSON describes.

    {"images": None}: it has no such split.
    """
    cfg = build.literal({"data": json.loads(data)})
    try:
        return build.construct(cfg.data).split(split).facts()
    except UserError:
        return {"images": None}


def telling(words: Sequence[str], usual: Mapping, config: Mapping) -> list[str]:
    """The words that change what decides the result, or where the images are."""
    ours, theirs = identity.Identity(config).own, identity.Identity(usual).own
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    if identity.PARTS in differing:
        differing |= {
            key
            for key in ("devices", "method.bn_splits")
            if typed.select(config, key) != typed.select(usual, key)
        }

    def tells(key: str) -> bool:
        return any(other == key or other.startswith(key + ".") for other in differing)

    keys = {typed.key_of(word): word for word in words}  # of a key typed twice the last holds
    told = {key: word for key, word in keys.items() if tells(key) or key in ALWAYS}
    return [_as_resolved(key, word, config) for key, word in told.items()]


def slug(words: Sequence[str], data: str = "") -> str:
    """A folder name for overrides, whatever their order; "": there are none.

    It ends with a hash where it would be too long, or the same for others. data: the name of the
    images, which says enough of a data.root that ends with it.
    """
    shown, short, whole, exact = [], [], [], True
    for word in sorted(words, key=typed.key_of):
        key, _, value = word.partition("=")
        key, value = key.lstrip("+"), value.strip("'\"")
        if key == "data.root":  # images may move: a folder of the same name is the same place
            value = os.path.basename(identity.real(value))
            if value == data:
                continue
            key = "root"
        exact &= PLAIN.fullmatch(value) is not None and re.fullmatch(r"[\w.]+", key) is not None
        whole.append(f"{key}={value}")
        shown.append(f"{key}-{value}" if value else key)
        short.append(shown[-1][key.rfind(".") + 1 :])
    text = "-".join(shown)
    if not text or (exact and len(text) <= LONGEST):
        return text
    digest = blake2b("\n".join(whole).encode(), digest_size=4).hexdigest()
    words_alone = re.sub(r"[^\w.]+", "-", "-".join(short), flags=re.ASCII)
    return f"{words_alone[: LONGEST - 9].strip('-.')}-{digest}".lstrip("-")


def _as_resolved(key: str, word: str, config: Mapping) -> str:
    """The override with its value as it is in the configuration: 0.1 for 1e-1."""
    value = typed.select(config, key)
    if key in ALWAYS or isinstance(value, Mapping) or word.startswith("~"):
        return word
    value = identity.plain(value)
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def below(pretrained: object, what: str, network: str, data: str) -> str:
    """Resolver: where an evaluation of `pretrained` stands, without what tells its seeds apart.

    That is in the directory of the run measured, if this is below the current folder, and otherwise
    in one beside it: runs/lincls-resnet50-digits/moco_v2_800ep.
    """
    run = layout.run_at(Path(os.path.expanduser(str(pretrained)))) if pretrained else None
    home = os.path.relpath(identity.real(str(run)), identity.real(".")) if run else ".."
    if home.split(os.sep)[0] in ("..", "."):
        words = "-".join(filter(None, (what, network, data)))
        return f"runs/{words}/{path_slug(pretrained)}"
    file = Path(os.path.expanduser(str(pretrained)))
    if file.name == layout.BEST:
        file = layout.weights_of(file) or file
    step = f"-at-step-{layout.step_of(file)}" if file.match("step*.pt") else ""
    return os.path.join(home, "-".join(filter(None, (what, data))) + step)


def path_slug(path: object) -> str:
    """Resolver: a path as a folder name, with a hash where that may be another's, too."""
    text = identity.place_slug(path)
    local = str(path) if path is None else identity.local(str(path))
    there = path is not None and os.path.exists(os.path.expanduser(str(path)))
    in_runs = there and Path(identity.real(str(path))).is_relative_to(identity.real("runs"))
    if re.fullmatch(r"[\w.]+", local) and not there:  # the name of known weights
        return text
    if in_runs and re.fullmatch(r"[^/]+/seed\d+", local):
        return text
    local = f"runs/{local}" if in_runs else local
    start = re.sub(r"[^\w.]+", "-", local, flags=re.ASCII)[:80].strip("-.")
    return f"{start}-{blake2b(local.encode(), digest_size=4).hexdigest()}"


def began(pretrained: object, continue_from: object) -> str:
    """Resolver: the part of a directory's name that says what a training began with."""
    if continue_from is not None:
        return f"-continued-from-{path_slug(continue_from)}"
    return f"-from-{path_slug(pretrained)}" if pretrained is not None else ""


def _network(config: DictConfig) -> list[str]:
    """The overrides that only repeat which network the measured run had: none other can be read."""
    source = config.get("pretrained")
    run = layout.run_at(Path(os.path.expanduser(source))) if isinstance(source, str) else None
    if run is None or config.stage.get("name") == "pretrain":
        return []
    return network(identity.node(identity.config(run), "backbone"))


def network(node: Mapping[str, Any]) -> list[str]:
    """The overrides that give this backbone: its name and its shape."""
    keys = [key for key in SHAPE if key in node]
    return [f"backbone={node.get('name')}", *(f"backbone.{key}={node[key]}" for key in keys)]


def _names(default: str, word: str) -> bool:
    """Does the default place tell this override from others of its key?"""
    key, value = typed.key_of(word), word.partition("=")[2]
    if key in ("pretrained", "continue_from", "stage.images"):
        return True
    if key == "seed":
        return default.endswith(f"seed{value}")
    if key == "stage":
        return True
    if key == "stage.last":
        return default.endswith(f"last{value}")
    parts = rf"(^|[/-]){re.escape(value)}([/-]|$)"
    return key in SHOWN and re.search(parts, default) is not None


@cache
def _composed(name: str, words: tuple[str, ...], sources: str) -> DictConfig:
    """The configuration that these overrides alone would make.

    sources: names the folders of YAML files.
    """
    hydra = GlobalHydra.instance().hydra
    return hydra.compose_config(name, list(words), RunMode.RUN, with_log_configuration=False)


def _plain(config: DictConfig) -> Mapping:
    own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    OmegaConf.set_readonly(own, False)
    OmegaConf.set_struct(own, False)
    own.dir = "."
    return OmegaConf.to_container(own, resolve=True)
