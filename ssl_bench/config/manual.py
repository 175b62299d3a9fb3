"""`ssl-bench stage=lincls --help`: the keys of what is named, for a terminal of 80 columns."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_bench.config import comments, typed
from ssl_bench.errors import UserError, unknown

WIDTH = 80
LONGEST = 56  # characters of a value
# of Hydra's, and what each run is given a place by
UNSAID = ("dir", "hydra.mode")


def page(words: Sequence[str], own: Path | None) -> str:
    """What there is to type beside the choices and the shared keys in `words`; "": none is there.

    own: a --config-dir. UserError for a choice that there isn't.
    """
    shared = {key.path: key for key in comments.keys((comments.CONF / "config.yaml").read_text())}
    parts = []
    for word in words:
        group, mark, values = word.lstrip("+").partition("=")
        if mark and (comments.CONF / group).is_dir() and group != "settings":
            parts += list(_of_group(group, values, own))
        elif group in shared and group not in ("dir", "epochs"):
            parts.append("\n".join(_row(group, shared[group].value, shared[group].comment)))
    if not parts:
        return ""
    command = " ".join(["ssl-bench", *(word for word in words if not word.endswith("=")), "--cfg"])
    if len(command) > WIDTH - 26:
        command = "add --cfg"
    parts.append(
        f"All keys of the command: {command} job\n"
        "Of one key, the choices of a group: batch_size= --help, method= --help\n"
        "All else: ssl-bench --help; every key: conf/ in the repository, or make docs"
    )
    return "\n\n".join(parts)


def _of_group(group: str, values: str, own: Path | None) -> Iterator[str]:
    known = comments.choices(group) | (comments.choices(group, own) if own else {})
    names = [name.strip(" '\"") for name in values.strip("[]").split(",")]
    if names == [""]:
        titles = [f"{group}={name}  {comments.title(text)}" for name, text in known.items()]
        yield "\n".join(one if len(one) <= WIDTH else f"{one[: WIDTH - 3]}..." for one in titles)
        return
    for name in names:
        if name not in known:
            raise UserError(
                unknown("choice", f"{group}={name}", [f"{group}={one}" for one in known])
            )
        try:
            yield "\n".join(_of_choice(group, name, known))
        except yaml.YAMLError as error:
            raise UserError(f"{group}={name}: its file is no YAML ({error.args[0]})") from None


def _of_choice(group: str, name: str, known: Mapping[str, str]) -> Iterator[str]:
    text = known[name]
    content: dict[str, Any] = yaml.safe_load(text) or {}
    yield f"{group}={name}"
    yield from _heading(text)
    if bases := comments.below(text, known):
        yield ""
        yield f"It builds on {group}={bases[0]}, and changes"
    if rows := comments.settings(group, text, known):
        yield ""
        for row in rows:
            yield from _row(row.key, row.value, row.meaning)
    if others := [key for key in comments.also_set(group, text) if key.path not in UNSAID]:
        yield ""
        yield "It sets"
        for key in others:
            yield from _row(key.path, key.value, key.comment)
    brings = [word for word in comments.brings(content) if not word.startswith("hydra/")]
    yield from _list("It chooses", brings)
    if group == "stage" and (reads := typed.reads(comments.target(group, text, known))):
        yield from _list("It reads, of the other keys,", sorted(reads))


def _heading(text: str) -> Iterator[str]:
    """The comment at the top of a file: its paragraphs filled anew, its examples as they are."""
    paragraph: list[str] = []

    def filled() -> list[str]:
        return _wrapped(" ".join(paragraph), "", "") if paragraph else []

    for line in comments.heading(text):
        said = line[1:].removeprefix(" ")
        if not said.startswith("  "):
            paragraph.append(said)
            continue
        yield from filled()
        paragraph.clear()
        yield from _example(said)
    yield from filled()


def _example(line: str) -> Iterator[str]:
    """A command on several lines, if need be; other examples are columns."""
    if len(line) <= WIDTH:
        yield line
    elif line.lstrip().startswith("ssl-bench "):
        *most, last = _wrapped(line.strip(), "  ", "      ", WIDTH - 2)
        yield from (f"{one} \\" for one in most)
        yield last
    else:
        yield from _wrapped(line, "", "      ")


def _row(key: str, value: str, meaning: str) -> list[str]:
    """KEY=VALUE and what it means, further lines to the right."""
    return _wrapped(f"{key}={_shown(value)}  {meaning}".rstrip(), "", "    ")


def _shown(value: str) -> str:
    """A value as it is typed, on one line."""
    if value == "???":
        return ""
    if value.lstrip().startswith("- "):
        value = f"[{','.join(line.strip().removeprefix('- ') for line in value.splitlines())}]"
    text = re.sub(r"(?<=[,:\[{]) +|\n *(?=[\]}])", "", " ".join(value.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _list(head: str, words: Sequence[str]) -> Iterator[str]:
    if words:
        yield ""
        yield from _wrapped(f"{head} {', '.join(words)}", "", "    ")


def _wrapped(text: str, first: str, rest: str, width: int = WIDTH) -> list[str]:
    """Lines of at most `width`; the two spaces between a key and what it means stay."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
