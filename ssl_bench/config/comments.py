"""What the YAML files, signatures and docstrings say of keys. Of ours, nothing is imported."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from ssl_bench.config import build
from ssl_bench.config.choices import CONF
from ssl_bench.config.fields import InEpochs, is_path
from ssl_bench.config.renamed import current


class Key(NamedTuple):
    """A key of a YAML file: its dotted path, its value as it is written, what is said of it."""

    path: str
    value: str
    comment: str


def keys(text: str) -> list[Key]:
    """The keys of a YAML file whose values are no mappings of several lines, in their order.

    A comment belongs to the key on its line; a line of comment at the indentation of the next key
    to that one; one further to the right goes on with the one above it.
    """
    found: list[Key] = []
    above: list[str] = []  # lines of comment for the key to come
    parents: list[tuple[int, str]] = []
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line[:1] not in ("#", "")), len(lines))
    for place in range(start, len(lines)):
        line = lines[place]
        if match := re.match(r"( *)# ?(.*)", line):
            following = next((one for one in lines[place:] if not re.match(r" *(#|$)", one)), "")
            indent = len(following) - len(following.lstrip())
            if len(match[1]) <= indent or not found:
                above.append(match[2])
            else:
                last = found[-1]
                found[-1] = last._replace(comment=f"{last.comment} {match[2].strip()}")
            continue
        match = re.match(r"( *)([\w ]+|override [\w/]+):(?: +(.*))?$", line)
        if not match or line.lstrip().startswith("- "):
            if line.strip() and found:  # an item of a list, or a value's next line
                found[-1] = found[-1]._replace(value=f"{found[-1].value}\n{line}".strip("\n"))
            continue
        indent, name, rest = len(match[1]), match[2], match[3] or ""
        while parents and parents[-1][0] >= indent:
            parents.pop()
        value, comment = split_comment(rest)
        value = re.sub(r"\$\{queue:(\d+)\}", r"\1", value)  # as it is for most data sets
        path = ".".join([*(parent for _, parent in parents), name])
        parents.append((indent, name))
        if above:
            comment, above = " ".join([*above, comment]).strip(), []
        found.append(Key(path, value, comment))
    inner = {key.path.rpartition(".")[0] for key in found}
    return [key for key in found if key.value or key.comment or key.path not in inner]


def split_comment(text: str) -> tuple[str, str]:
    """(value, comment) of what stands behind a key's colon."""
    match = re.match(r"""((?:"[^"]*"|'[^']*'|[^#"']|(?<! )#)*?)(?:(?:^| +)# ?(.*))?$""", text)
    assert match, text
    return match[1].strip(), (match[2] or "").strip()


def spoken(hint: Any) -> str:
    """A type in words: Annotated[float, Gt(0)] is "number > 0"."""
    if is_path(hint) and get_origin(hint) is Annotated:
        return "path"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [*bounds(arguments[1:])]
        if [limit[:2] for limit in limits] == ["≥ ", "≤ "]:
            limits = [f"from {limits[0][2:]} to {limits[1][2:]}"]
        return " ".join([spoken(arguments[0]), ", ".join(limits)]).strip()
    if origin is Literal:
        return listed([f"`{value}`" for value in arguments])
    if origin in (Union, UnionType):
        return listed([*map(spoken, arguments)])
    if origin is tuple:
        if arguments[-1:] == (Ellipsis,):
            return f"list of {spoken(arguments[0])}"
        return f"[{', '.join(map(spoken, arguments))}]"
    if origin is list:
        kind = spoken(arguments[0])
        return f"list of {kind}" + ("s" if kind in ("path", "number", "integer") else "")
    if origin is dict:
        return "mapping"
    names = {NoneType: "`null`", bool: "`true` or `false`", int: "integer", float: "number"}
    names |= {str: "text", Any: "any", dict: "mapping", list: "list"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def listed(words: list[str]) -> str:
    """a, b or c"""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def spoken_field(field: FieldInfo) -> str:
    """The type of a key of conf/config.yaml."""
    hint = field.annotation
    return spoken(Annotated[hint, *field.metadata] if field.metadata else hint)


def bounds(metadata: Iterable[Any]) -> Iterator[str]:
    """The limits among pydantic's annotations of a type."""
    for one in metadata:
        if isinstance(one, InEpochs):
            yield "(in epochs)"
        for part in getattr(one, "metadata", [one]):
            for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
                if (limit := getattr(part, name, None)) is not None:
                    yield f"{sign} {limit}"


def docstring(path: str) -> str:
    """That of the class or function with this dotted path, read from its source; "": none."""
    module, _, name = current(path).rpartition(".")
    spec = find_spec(module)
    if spec is None or not (spec.origin or "").endswith(".py"):
        return ""
    body = ast.parse(Path(str(spec.origin)).read_text()).body
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return docstring(f"{node.module}.{alias.name}")
    return ""


def told(doc: str, names: Iterable[str]) -> dict[str, str]:
    """What a docstring says of parameters: "k: the neighbours. holdout: the share"."""
    some = "|".join(map(re.escape, names))
    text = " ".join(doc.split())
    parts = re.split(rf"(?:^|(?<=[.;:] ))((?:{some})(?:, (?:{some}))*): ", text) if some else [text]
    found: dict[str, str] = {}
    for heads, words in zip(parts[1::2], parts[2::2], strict=True):
        words = re.split(r" (?=UserError|ValueError|Returns )", words)[0].strip()
        found |= {name: words.rstrip(".") for name in heads.split(", ")}
    return found


def heading(text: str) -> Iterator[str]:
    """The lines of comment at the top of a YAML file, but for Hydra's own."""
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return (line for line in lines if not line.startswith("# @package"))


def title(text: str) -> str:
    """The first sentence of a YAML file's comment."""
    lines = takewhile(lambda line: not line.startswith("#   "), heading(text))
    words = " ".join(line[1:].strip() for line in lines)
    return re.split(r"(?<=[^.\s]{2}[.:]) |(?<=\)[.:]) ", words)[0].rstrip(":")


def choices(group: str, folder: Path = CONF) -> dict[str, str]:
    """{choice: the text of its file}."""
    return {path.stem: path.read_text() for path in sorted((folder / group).glob("*.yaml"))}


def node_of(group: str, text: str) -> tuple[dict[str, Any], list[Key], list[Key]]:
    """(the group's own mapping, its keys without the group's name, the keys outside of it)."""
    content, found = yaml.safe_load(text) or {}, keys(text)
    if not text.startswith("# @package _global_"):
        return content, found, []
    prefix = f"{group}."
    own = [
        key._replace(path=key.path[len(prefix) :])
        for key in found
        if key.path[: len(prefix)] == prefix
    ]
    return content.get(group) or {}, own, [key for key in found if not key.path.startswith(prefix)]


def below(text: str, known: Mapping[str, str]) -> list[str]:
    """The files of its group that a file builds on, the nearest first. known: the `choices`."""
    found: list[str] = []
    for entry in (yaml.safe_load(text) or {}).get("defaults") or []:
        if isinstance(entry, str) and entry in known:
            found += [entry, *below(known[entry], known)]
    return found


def target(group: str, text: str, known: Mapping[str, str]) -> str:
    """The dotted path of the constructor that a file names, or one that it builds on; "": none."""
    texts = (text, *(known[base] for base in below(text, known)))
    targets = (node_of(group, one)[0].get("_target_") for one in texts)
    return next((path for path in targets if path not in (None, "???")), "")


def brings(content: dict[str, Any]) -> list[str]:
    """The choices of other groups that a file makes, as they are typed."""
    entries = [entry for entry in content.get("defaults") or [] if isinstance(entry, dict)]
    made = [(key, choice) for entry in entries for key, choice in entry.items() if choice]
    return [f"{key.removeprefix('override ').lstrip('/')}={choice}" for key, choice in made]


class Setting(NamedTuple):
    """A key of a choice as it is typed, its type, its value in the file, what is said of it."""

    key: str
    hint: Any
    value: str
    meaning: str


def settings(group: str, text: str, known: Mapping[str, str]) -> list[Setting]:
    """Those of the group's own node, and what its file leaves to the constructor.

    These have a +, where conf/config.yaml has none of that name; a file that builds on others
    leaves them to these.
    """
    _, own, _ = node_of(group, text)
    path, bases = target(group, text, known), below(text, known)
    types = build.parameters(path, group) if path else {}
    said = told(docstring(path), types) if types else {}
    for base in reversed(bases):
        _, theirs, _ = node_of(group, known[base])
        said |= {key.path: key.comment for key in theirs if key.comment}
    hints = {name: parameter.annotation for name, parameter in types.items()}
    found = [
        Setting(
            f"{group}.{key.path}",
            hints.get(key.path),
            key.value,
            key.comment or said.get(key.path, ""),
        )
        for key in own
        if key.path not in ("name", "_target_", "defaults")
    ]
    if bases:
        return found
    there = {key.path.partition(".")[0] for key in own}
    left = [name for name in types if group != "stage" and name not in there]
    shared = {key.path: key for key in keys((CONF / "config.yaml").read_text())}
    for name in left:
        if key := shared.get(f"{group}.{name}"):
            found.append(Setting(key.path, hints[name], key.value, key.comment))
        else:
            found.append(Setting(f"+{group}.{name}", hints[name], "", said.get(name, "")))
    return found


def also_set(group: str, text: str) -> list[Key]:
    """The keys outside of the group's own node that a file sets."""
    _, _, others = node_of(group, text)
    return [key for key in others if not key.path.startswith("defaults")]
