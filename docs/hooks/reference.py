"""The pages below reference/: every key of every group, from conf/*.yaml, its comments, and the
signatures and docstrings of the constructors that it names. Nothing is imported but our own config
room, which reads signatures from the source: torch isn't needed.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import groupby, takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from ssl_bench.config import build, signatures, typed
from ssl_bench.config.fields import InEpochs, is_path
from ssl_bench.config.renamed import current

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GROUPS = {
    "stage": "What a command does.",
    "method": "How a backbone learns without labels. Each method brings the augmentation, "
    "optimizer and schedule of its authors, unless you choose others.",
    "backbone": "The network that turns images into features.",
    "data": "Where the images are and how they are laid out.",
    "augmentation": "The views of an image that a training shows.",
    "optimizer": "How weights move, with each method's recipe.",
    "schedule": "The learning rate over the training.",
    "tracking": "Where metrics go beside `metrics.jsonl`.",
    "experiment": "Complete settings of a job, with hardware, cost and expected number.",
    "launcher": "Where a command runs, never what it computes.",
}
TITLES = {"data": "data", "tracking": "tracking"}  # the others have an s

# KEY=VALUE in running text
KEY_VALUE = re.compile(r"(?<![\w/.<])((?:--)?[a-z][\w.]*=(?:\[[^\]]*\]|[^\s,;:()]*[^\s,;:().])?)")
HEAD = ["key", "type", "default", "meaning"]


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
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text()).body
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
    found = {}
    for heads, words in zip(parts[1::2], parts[2::2], strict=True):
        words = re.split(r" (?=UserError|ValueError|Returns )", words)[0].strip()
        found |= {name: words.rstrip(".") for name in heads.split(", ")}
    return found


# --- Markdown -------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text of a comment for Markdown, on one line: nothing in it is markup, KEY=VALUE is code."""
    parts = KEY_VALUE.split(" ".join(text.split()))
    return "".join(code(part) if place % 2 else escaped(part) for place, part in enumerate(parts))


def escaped(text: str) -> str:
    text = re.sub(r"([\\`*|~\[\]])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def code(text: str) -> str:
    """A value as code, in a cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if text else ""


def default(value: str) -> str:
    """A value of a key; the first of two that isn't null in words."""
    both = re.fullmatch(r"\$\{either:\$\{([\w.]+)\},(?:\$\{)?([\w.]+)\}+", value)
    return f"`{both[1]}`, or `{both[2]}` if that is `null`" if both else code(value)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Its lines, in a box that docs/extra.css folds on a narrow screen, and an empty one."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return ['<div class="keys" markdown>', "", *lines, "", "</div>", ""]


def header(text: str) -> list[str]:
    """The comment at the top of a YAML file, as Markdown: paragraphs, and commands as code."""
    said = [line[1:].removeprefix(" ") for line in heading(text)]
    found: list[str] = []
    for is_code, lines in groupby(said, lambda line: line.startswith("  ")):
        if is_code:
            found += ["", "```sh", *(line.removeprefix("  ") for line in lines), "```", ""]
        else:
            found += ["", *map(plain, lines), ""]
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


def choices(group: str) -> dict[str, str]:
    """{choice: the text of its file}."""
    return {path.stem: path.read_text() for path in sorted((CONF / group).glob("*.yaml"))}


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


def below(group: str, text: str) -> list[str]:
    """The files of the group that this one builds on, the nearest first."""
    found: list[str] = []
    for entry in (yaml.safe_load(text) or {}).get("defaults") or []:
        if isinstance(entry, str) and entry in choices(group):
            found += [entry, *below(group, choices(group)[entry])]
    return found


def shared_meaning(path: str) -> str:
    """What conf/config.yaml says of a key, or where those of a group are described."""
    group = path.partition(".")[0]
    if group in GROUPS:
        return f"see [{group}=]({group}.md)"
    told_of = {key.path: key.comment for key in keys((CONF / "config.yaml").read_text())}
    return plain(told_of.get(path, ""))


def brings(content: dict[str, Any]) -> str:
    """The choices of other groups that a file makes."""
    made = []
    for entry in content.get("defaults") or []:
        if isinstance(entry, dict):
            for key, choice in entry.items():
                name = key.removeprefix("override ").lstrip("/")
                if choice is not None:
                    made.append(f"`{name}={choice}`")
    return ", ".join(made)


def section(group: str, choice: str, text: str) -> list[str]:
    """The part of a group's page on one choice."""
    lines = [f"## {choice}", *header(text)]
    if group in ("experiment", "launcher"):
        body = re.sub(r"\A(#.*\n)+", "", text)
        return [*lines, "```yaml", body.rstrip(), "```", ""]
    node, own, others = node_of(group, text)
    bases = below(group, text)
    nodes = [node_of(group, choices(group)[base]) for base in bases]
    targets = (one.get("_target_") for one in (node, *(base for base, _, _ in nodes)))
    path = next(filter(None, targets), "???")
    types, said = {}, {}
    if path != "???":
        lines += [f"Constructor: `{path}`", ""]
        types = signatures.parameters(path, build.SUPPLIED[group])
        said = told(docstring(path), types)
    for _, theirs, _ in reversed(nodes):
        said |= {key.path: key.comment for key in theirs if key.comment}
    if bases:
        lines += [f"Builds on `{group}={bases[0]}` and changes", ""]
    if made := brings(yaml.safe_load(text)):
        lines += [f"It chooses {made}, unless you choose others.", ""]
    if reads := typed.reads(path) if group == "stage" and path != "???" else None:
        shared = ", ".join(f"`{name}`" for name in sorted(reads))
        lines += [f"It reads the [shared keys](shared.md) {shared}, and refuses any other.", ""]
    rows = []
    for key in own:
        if key.path in ("name", "_target_", "defaults"):
            continue
        hint = types.get(key.path)
        kind = spoken(hint.annotation) if hint else ""
        meaning = plain(key.comment or said.get(key.path, ""))
        rows.append([code(f"{group}.{key.path}"), kind, default(key.value), meaning])
    for name, hint in types.items():  # what the file leaves to the constructor
        if (
            group != "stage"
            and not bases
            and name not in {key.path.partition(".")[0] for key in own}
        ):
            meaning = plain(f"{said.get(name, '')} (typed with a +)".strip())
            rows.append([code(f"+{group}.{name}"), spoken(hint.annotation), "", meaning])
    lines += table(HEAD, rows) if rows else []
    others = [key for key in others if not key.path.startswith("defaults")]
    if others:
        rows = [
            [code(key.path), code(key.value), plain(key.comment) or shared_meaning(key.path)]
            for key in others
        ]
        lines += ["It also sets", "", *table(["key", "to", "meaning"], rows)]
    return lines


def group_page(group: str) -> str:
    lines = [f"# {TITLES.get(group, f'{group}s').capitalize()}: {group}=", "", GROUPS[group], ""]
    for choice, text in choices(group).items():
        lines += section(group, choice, text)
    return "\n".join(lines)


def shared_page() -> str:
    """The keys of conf/config.yaml outside of its groups."""
    text = (CONF / "config.yaml").read_text()
    fields = build.Root.model_fields
    lines = ["# Shared keys", ""]
    lines += [
        "You can type these keys with every command, whatever it chooses from the groups. A stage "
        "refuses a key that it doesn't read. `${...}` in a default is computed from other keys.",
        "",
    ]
    rows = []
    for key in keys(text):
        top = key.path.partition(".")[0]
        if top in ("defaults", "hydra"):
            continue
        kind = spoken_field(fields[key.path]) if key.path in fields else ""
        rows.append([code(key.path), kind, code(key.value), plain(key.comment)])
    return "\n".join([*lines, *table(HEAD, rows)])


def index_page() -> str:
    lines = [
        "# Reference",
        "",
        "A command is `ssl-bench` followed by choices (`GROUP=CHOICE`) and values (`KEY=VALUE`, "
        "nested: `method.queue_size=4096`). These pages are made from the YAML files in `conf/`, "
        "their comments and the signatures of the code when the site is built. "
        "`ssl-bench --cfg job` with the rest of a command prints that command's whole "
        "configuration.",
        "",
        "| group | choices |",
        "|---|---|",
    ]
    for group in GROUPS:
        names = ", ".join(f"[`{name}`]({group}.md#{slug(name)})" for name in choices(group))
        lines.append(f"| [`{group}`]({group}.md) | {names} |")
    lines += [
        "",
        "Every group shares the [other keys](shared.md), like `seed` and `batch_size`.",
        "",
    ]
    for group, about in GROUPS.items():
        lines += [f"## {group}", "", about, ""]
        for name, text in choices(group).items():
            lines.append(f"- [`{name}`]({group}.md#{slug(name)}): {plain(title(text))}")
        lines.append("")
    return "\n".join(lines)


def slug(heading: str) -> str:
    """The anchor that Python-Markdown's toc gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def notebook_page(path: Path) -> str:
    """A notebook as Markdown."""
    cells = json.loads(path.read_text())["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """{path below docs/: Markdown} of everything that is generated."""
    made = {f"reference/{group}.md": group_page(group) for group in GROUPS}
    made["reference/shared.md"] = shared_page()
    made["reference/index.md"] = index_page()
    made["tutorials/notebook.md"] = notebook_page(ROOT / "examples" / "from_python.ipynb")
    return made
