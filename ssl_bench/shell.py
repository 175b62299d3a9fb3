"""How a path or value is quoted in a line that a shell, or our own command line, will read."""

import re
import shlex
from collections.abc import Iterable

# $NAME, ${NAME} and ${NAME:-DEFAULT}; neither $(COMMAND) nor $1
VARIABLE = re.compile(r"(\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*(?::-[\w./-]*)?\}))", re.ASCII)


def quoted(text: str, variables: bool = False) -> str:
    """The text as one word of a shell. variables: all of it is literal but its $VARIABLES."""
    if not variables:
        return shlex.quote(text)
    parts = VARIABLE.split(text)  # every other one is a variable
    words = [f'"{part}"' if i % 2 else shlex.quote(part) for i, part in enumerate(parts) if part]
    return "".join(words) or "''"


def quote(value: str) -> str:
    """A value for an override, in quotes unless Hydra's grammar reads it as plain text."""
    if re.fullmatch(r"[\w./-]+", value, re.ASCII):
        return value
    # ${...} would be an interpolation, in quotes, too
    value = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    return in_quotes(value, "'")


def in_quotes(value: str, mark: str) -> str:
    """A value in quotes, by Hydra's grammar.

    Only the mark itself is escaped, and the backslashes before it or before the end.
    """

    def escaped(found: re.Match[str]) -> str:
        return 2 * found[1] + (f"\\{mark}" if found[2] else "")

    return mark + re.sub(rf"(\\*)({mark}|\Z)", escaped, value) + mark


def override(key: str, value: object) -> str:
    """KEY=VALUE to be typed: quoted for Hydra, then for the shell."""
    return quoted(f"{key}={quote(str(value))}")


def listed(values: Iterable[float]) -> str:
    """A list of numbers as one types it: [0.1,1]."""
    return f"[{','.join(f'{value:g}' for value in values)}]"
