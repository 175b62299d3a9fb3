"""Errors of Hydra and OmegaConf, which fill paragraphs, in one line that says what to type."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ssl_bench.config import typed
from ssl_bench.config.choices import CONF, folders
from ssl_bench.errors import UserError, closest, unknown
from ssl_bench.shell import quote, quoted

KEYLESS = ConfigKeyError | ConfigAttributeError
SEARCH = (
    "an interval is for a search: add -m hydra/sweeper=optuna (pip install hydra-optuna-sweeper)"
)
# what Hydra says where several values are given for one
SEVERAL = r"(?:Ambiguous value for argument|Sweep parameters) '([^=]+)=(.+?)'"


def message(error: Exception, words: Sequence[str] | None = None) -> str:
    """An error of Hydra's, OmegaConf's or ours in one line.

    words: the command line that was composed; None: it was no command line.
    """
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OverrideParseException):
        key, mark, value = str(error.override).partition("=")
        if value and (line := _no_sweep(key, value, text)):
            return f"{error.override}: {line}"
        if not mark and (meant := _choices_of(key, words or ())):
            return f"{key}: not KEY=VALUE; did you mean {' or '.join(meant)}?"
        as_text = quoted(_as_texts(key, value)) if mark else "'KEY=\"VALUE\"'"
        return (
            f"{error.override}: not KEY=VALUE; put quotes around a VALUE with special characters: "
            f"type {as_text}"
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = [f"{group}={option}" for option in error.options]
        line = unknown("choice", f"{group}={choice}", options)
        if "did you mean" in line:
            return line
        return f"{line}. One of your own, DIR/{group}/{choice}.yaml, is found by --config-dir=DIR"
    if several := re.match(SEVERAL, text):
        return _several(several[1], several[2], words)
    composing = re.match(r"In '(.+)': .+ raised while composing config:", text)
    file = f"{composing[1]}.yaml: " if composing else ""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, KEYLESS) and cause.parent_node is not None:
        return file + _unknown_key(cause)
    if file and isinstance(cause, OmegaConfBaseException):
        return f"{file}{cause.full_key}: {str(cause).splitlines()[0]}"
    return ": ".join([text.splitlines()[0], *str(error.__cause__ or "").splitlines()[:1]])


def no_name(words: Sequence[str]) -> str:
    """A line about the first override that chooses by a number or null, not by name; "": none does.

    Hydra would end with a traceback. words: a command line.
    """
    conf = folders(words)
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            continue  # an option, or what Hydra will report
        group = override.key_or_group
        if override.is_delete() or not (conf[0] / group).is_dir() or "." in group:
            continue
        value = override.value()
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        values = [part for one in values for part in (one if isinstance(one, list) else [one])]
        if not any(one is None or isinstance(one, int | float) for one in values):
            continue
        files = [file for folder in conf for file in sorted((folder / group).glob("*.yaml"))]
        instead = " (leave it out for none)" if group == "experiment" else ""
        return unknown("choice", word, [f"{group}={file.stem}" for file in files]) + instead
    return ""


def _choices_of(name: str, words: Sequence[str]) -> list[str]:
    """GROUP=NAME for every group that has this choice, stages first."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        return []
    groups = {file.parent.name for conf in folders(words) for file in conf.glob(f"*/{name}.yaml")}
    return [f"{group}={name}" for group in sorted(groups, key=lambda one: (one != "stage", one))]


def _as_texts(key: str, value: str) -> str:
    """An override whose value Hydra can't read, with that value quoted.

    Each entry of a list is quoted, if Hydra reads the result; else the whole value.
    """
    if value.startswith("[") and value.endswith("]"):
        entry = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\[[^][]*\]|[^,])+"""
        entries = filter(None, map(str.strip, re.findall(entry, value[1:-1])))
        texts = [text if text[0] in "\"'" else typed.quote(text) for text in entries]
        with suppress(HydraException):
            return OverridesParser.create().parse_override(f"{key}=[{','.join(texts)}]").input_line
    return f"{key}={typed.quote(value)}"


# Hydra's functions of several values, and how each may be typed.
SWEEPS = {"choice": "choice(0,1)", "range": "range(0,3)", "interval": "interval(0,1)"}
SWEEPS |= {"glob": "glob('*')", "shuffle": "shuffle(0,1)", "sort": "sort(1,0)"}


def _no_sweep(key: str, value: str, said: str) -> str:
    """What is wrong with several values that Hydra can't read, and what to type; "": not several.

    said: Hydra's words.
    """
    if re.fullmatch(r"[^\[\](){}'\"]*", value) and re.search(r"(^|,)\s*(,|$)", value):
        some = ",".join(filter(None, map(str.strip, value.split(","))))
        at = "nothing stands before or after a comma"
        return f"{at}: type {quoted(f'{key}={some}')}" if some else f"{at}: type {key}=..."
    call = re.fullmatch(r"(\w+)\((.*)\)", value)
    if call is None or call[1] not in SWEEPS:
        return ""
    texts = f"{call[1]}({','.join(map(typed.quote, call[2].split(',')))})"
    if call[1] == "glob":  # its patterns have brackets
        with suppress(HydraException):
            one = OverridesParser.create().parse_override(f"{key}={texts}").input_line
            return f"a pattern with special characters is quoted: type {quoted(one)}"
    why = re.search(r"while evaluating '.*': (.+)", said)
    reason = why[1] if why else f"{call[1]}() can't be read"
    return f"{reason}: type {quoted(f'{key}={SWEEPS[call[1]]}')}, say"


def _several(key: str, value: str, command: Sequence[str] | None) -> str:
    """One line about several values where one is wanted.

    Another mistake of the command is reported in its place: -m wouldn't mend it.
    """
    one = quoted(f'{key}="{value}"')
    if command is None:
        return f"{key}={value}: give one value; or quote one with a comma: {one}"
    args = get_args_parser().parse_args(command)
    words = []
    if args.config_dir:
        words.append(f"hydra.searchpath=[{quote(f'file://{os.path.abspath(args.config_dir)}')}]")
    try:
        with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
            for override in parsed(args.overrides):
                if not override.is_sweep_override():
                    words.append(override.input_line)
                elif override.is_discrete_sweep() and (first := first_value(override)) is not None:
                    words.append(f"{override.get_key_element()}={first}")
            hydra.compose("config", words)
    except (HydraException, OmegaConfBaseException) as other:
        return message(other, command)
    if args.cfg:
        return f"{key}={value}: --cfg shows one configuration: give one value"
    if value.startswith("interval("):
        return f"{key}={value}: {SEARCH}"
    return (
        f"{key}={value}: several values are for a sweep: add -m; or quote one with a comma: {one}"
    )


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    """One line about a key that isn't there, with the keys that are in its place."""
    parent = error.full_key.rpartition(".")[0]
    names = [str(name) for name in error.parent_node if not str(name).startswith("_")]
    if not names:
        new = f"; a new one has a +: type +{error.full_key}=" if parent.startswith("hydra.") else ""
        return f"{error.full_key}: no such key; {parent} has none{new}"
    if not parent and (places := _places(error.full_key, error.parent_node)):
        return f"{error.full_key}: no such key; did you mean {' or '.join(places)}?"
    valid = [f"{parent}.{name}" if parent else name for name in names]
    line = unknown("key", error.full_key, valid)
    at_root = not parent and "did you mean" not in line
    if at_root and (places := _places(error.full_key, error.parent_node, close=True)):
        return f"{error.full_key}: no such key; did you mean {' or '.join(places)}?"
    target = OmegaConf.to_container(error.parent_node).get("_target_") if parent else None
    if target is not None and not str(target).startswith("ssl_bench."):
        line += f". An argument of your own {parent}._target_ has a +: +{error.full_key}="
    return line


def lacking(error: Exception, words: Sequence[str]) -> list[str]:
    """The keys among overrides that their configuration lacks, by this error of Hydra's."""
    cause = error.__cause__ or error.__context__
    if not isinstance(cause, KEYLESS) or not cause.full_key:
        return []
    keys = {typed.key_of(word) for word in words}
    return [key for key in keys if f"{key}.".startswith(f"{cause.full_key}.")]


def by_member(error: Exception, words: Sequence[str]) -> list[str]:
    """The words of a sweep over choices, in which the key that one of them lacks is a member's own.

    Before a sweep Hydra composes it with the default of what is swept, which may lack the keys of
    what was chosen. It then doesn't see either that a launcher makes it a sweep. [] where that
    isn't what is wrong.
    """
    launchers = {word.partition("=")[2] for word in words if typed.key_of(word) == "launcher"}
    is_sweep = {"-m", "--multirun"} & {*words}
    if re.match(SEVERAL, str(error)) and launchers - {"local"} and not is_sweep:
        return ["-m", *words]
    if not (keys := lacking(error, words)) or not any(map(_sweeps_choices, words)):
        return []
    made = []
    for word in words:
        key, _, value = word.partition("=")
        made.append(f"{key}=choice({value})" if typed.key_of(word) in keys else word)
    try:
        changed = [OverridesParser.create().parse_override(word) for word in {*made} - {*words}]
    except HydraException:
        return []
    return made if changed and all(one.is_sweep_override() for one in changed) else []


def _sweeps_choices(word: str) -> bool:
    """Is it several choices of a group?"""
    if word.startswith("-") or not (CONF / typed.key_of(word)).is_dir():
        return False
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


def by_choice(
    typed_words: Sequence[str], members: Sequence[tuple[Sequence[str], Sequence[str]]]
) -> str:
    """What to type for a sweep in which a key is one of some choices alone; "": it isn't so.

    typed_words: of the command line. members: (overrides, the keys among them that they lack).
    """
    foreign = [frozenset(keys) for _, keys in members]
    if len({*foreign}) < 2 or frozenset.intersection(*foreign):
        return ""  # a key that none has is a slip
    for place in range(len(members[0][0])):
        lacks: dict[str, set[frozenset[str]]] = {}
        for (words, _), keys in zip(members, foreign, strict=True):
            lacks.setdefault(words[place], set()).add(keys)
        if len(lacks) > 1 and all(len(several) == 1 for several in lacks.values()):
            break
    else:
        return ""
    kinds: dict[frozenset[str], list[str]] = {}  # values by what they lack
    for word, (keys,) in lacks.items():
        kinds.setdefault(keys, []).append(word)
    choice = typed.key_of(words[place])
    named = [] if any(typed.key_of(word) == "sweep" for word in typed_words) else ["sweep=NAME"]
    commands = []
    for keys, several in kinds.items():
        values = ",".join(word.partition("=")[2] for word in several)
        own = [
            f"{choice}={values}" if typed.key_of(word) == choice else word
            for word in typed_words
            if typed.key_of(word) not in keys
        ]
        commands.append(" ".join(["  ssl-bench", *map(quoted, own), *named]))
    said = []
    for key in sorted(frozenset.union(*foreign)):
        without = [word for word, (lacked,) in lacks.items() if key in lacked]
        said.append(f"{key} is no key of {', '.join(without)}")
    grows = "a sweep grows with each command that names it: type"
    return "\n".join([f"{'; '.join(said)}; {grows}", *commands])


def _places(key: str, root: DictConfig, close: bool = False) -> list[str]:
    """The keys of groups, and of the launcher, that end with a key that isn't at the root.

    close: with the one of their keys that is closest to it.
    """
    groups = [*(str(name) for name in root if name != "hydra"), "hydra.launcher", "hydra.sweeper"]
    nodes = {
        name: OmegaConf.select(root, name, throw_on_resolution_failure=False) for name in groups
    }
    nodes = {name: node for name, node in nodes.items() if OmegaConf.is_dict(node)}
    if close:
        every = {str(one) for node in nodes.values() for one in node}
        key = closest(key, sorted(every))
    return [f"{name}.{key}" for name, node in nodes.items() if key in node]


def parsed(words: list[str]) -> list[Override]:
    """Overrides, parsed; a glob() looks among the choices of the present configuration."""
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(words)


def first_value(override: Override) -> str | None:
    """The first value of an override, or the override itself if it isn't a list of values.

    None: it gives no value.
    """
    if not override.is_discrete_sweep():
        return override.input_line
    return next(iter(override.sweep_string_iterator()), None)
