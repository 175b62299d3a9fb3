"""What Hydra and OmegaConf say in paragraphs, in a line that says what to type."""

import os
import re
from contextlib import suppress

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ssl_bench.config import typed
from ssl_bench.errors import UserError, unknown
from ssl_bench.shell import quote, quoted

SEARCH = (
    "an interval is for a search: add -m hydra/sweeper=optuna (pip install hydra-optuna-sweeper)"
)


def message(error: Exception) -> str:
    """What Hydra says in paragraphs, in a line."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OverrideParseException):
        key, mark, value = str(error.override).partition("=")
        as_text = quoted(_as_texts(key, value)) if mark else "'KEY=\"VALUE\"'"
        return (
            f"{error.override}: not KEY=VALUE; put quotes around a VALUE with special characters: "
            f"type {as_text}"
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return unknown(
            "choice", f"{group}={choice}", [f"{group}={option}" for option in error.options]
        )
    if several := re.match(
        r"(?:Ambiguous value for argument|Sweep parameters) '([^=]+)=(.+?)'", text
    ):
        return _several(*several.groups())
    composing = re.match(r"In '(.+)': .+ raised while composing config:", text)
    file, cause = (
        f"{composing[1]}.yaml: " if composing else "",
        error.__cause__ or error.__context__,
    )
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
        return file + _unknown_key(cause)
    if file and isinstance(cause, OmegaConfBaseException):
        return f"{file}{cause.full_key}: {str(cause).splitlines()[0]}"
    return ": ".join([text.splitlines()[0], *str(error.__cause__ or "").splitlines()[:1]])


def _as_texts(key: str, value: str) -> str:
    """An override of a value that Hydra can't read: of a list with each entry as a text, where that
    is readable.
    """
    if value.startswith("[") and value.endswith("]"):
        entries = re.findall(
            r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\[[^][]*\]|[^,])+""", value[1:-1]
        )
        texts = [
            entry if entry[0] in "\"'" else typed.quote(entry)
            for entry in map(str.strip, entries)
            if entry
        ]
        with suppress(HydraException):
            return OverridesParser.create().parse_override(f"{key}=[{','.join(texts)}]").input_line
    return f"{key}={typed.quote(value)}"


def _several(key: str, value: str) -> str:
    """Of several values where one is wanted. First of another mistake: with that Hydra sees no
    sweep.
    """
    args = get_args_parser().parse_args()
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
        return message(other)
    if args.cfg:
        return f"{key}={value}: --cfg shows one configuration: give one value"
    if value.startswith("interval("):
        return f"{key}={value}: {SEARCH}"
    one = quoted(f'{key}="{value}"')
    return (
        f"{key}={value}: several values are for a sweep: add -m; or quote one with a comma: {one}"
    )


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    """One line about a key that isn't there, from the place where it was looked for."""
    parent = error.full_key.rpartition(".")[0]
    names = [str(name) for name in error.parent_node if not str(name).startswith("_")]
    if not names:
        return f"{error.full_key}: no such key; {parent} has none"
    return unknown(
        "key", error.full_key, [f"{parent}.{name}" if parent else name for name in names]
    )


def parsed(words: list[str]) -> list[Override]:
    """With the choices of this configuration, which a glob() looks among."""
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(words)


def first_value(override: Override) -> str | None:
    """The first of the values that it gives, one by one; None where there is none."""
    if not override.is_discrete_sweep():
        return override.input_line
    return next(iter(override.sweep_string_iterator()), None)
