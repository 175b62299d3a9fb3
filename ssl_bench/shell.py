"""How a path or value is quoted in a line that a shell, or our own command line, will read."""

import re
import shlex
from collections.abc import Iterable

# $NAME, ${NAME} and ${NAME:-DEFAULT}; neither $(COMMAND) nor $1
VARIABLE = re.compile(r"(\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*(?::-[\w./-]*)?\}))", re.ASCII)


def quoted(text: str, variables: bool = False) -> str:
    """One word of a shell, all of it literal; but for the $VARIABLES in it, where its reader was
    promised these.
    """
    if not variables:
        return shlex.quote(text)
    parts = VARIABLE.split(text)  # every other one is a variable
    return (
        "".join(f'"{part}"' if i % 2 else shlex.quote(part) for i, part in enumerate(parts) if part)
        or "''"
    )


def quote(value: str) -> str:
    """A value as an override has it, with quotes where Hydra's grammar wouldn't read it as a plain
    text.
    """
    if re.fullmatch(r"[\w./-]+", value, re.ASCII):
        return value
    # else an interpolation, in quotes, too
    value = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    return in_quotes(value, "'")


def in_quotes(value: str, mark: str) -> str:
    """As Hydra's grammar has it: these quotes in the value and what precedes them are escaped, and
    nothing else.
    """
    inside = re.sub(
        rf"(\\*)({mark}|\Z)", lambda found: 2 * found[1] + (f"\\{mark}" if found[2] else ""), value
    )
    return mark + inside + mark


def override(key: str, value: object) -> str:
    """KEY=VALUE to be typed: quoted for Hydra, then for the shell."""
    return quoted(f"{key}={quote(str(value))}")


def listed(values: Iterable[float]) -> str:
    """As one types it."""
    return f"[{','.join(f'{value:g}' for value in values)}]"
