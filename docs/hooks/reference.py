"""The pages below reference/: every key of every group, from conf/*.yaml, its comments, and the
signatures and docstrings of the constructors that it names; and every metric. Nothing is imported
that needs torch: signatures are read from the source.
"""

import json
import re
from itertools import groupby
from pathlib import Path

import yaml

from ssl_bench.config import build, typed
from ssl_bench.config.comments import (
    CONF,
    also_set,
    below,
    brings,
    choices,
    heading,
    keys,
    settings,
    spoken,
    spoken_field,
    target,
    title,
)
from ssl_bench.runs import units

ROOT = Path(__file__).parents[2]
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


def place(value: str) -> str:
    """The directory of a run, as a person would write its pattern: RUN/lincls/seedSEED."""
    inner = value.removeprefix("${run_dir:").removesuffix("}").strip('"')
    begin = re.sub(r"\$\{below:\$\{\w+\},((?:[\w-]|\$\{[\w.]+\})+),[^/]*\}", r"RUN/\1", inner)
    begin = re.sub(r"\$\{began:[^/]*\}", "", begin).replace(
        "${path_slug:${stage.images}}", "IMAGES"
    )
    return code(re.sub(r"\$\{([\w.]+)\}", lambda key: _word(key[1]), begin))


def _word(key: str) -> str:
    """What stands for a key in a pattern: METHOD for method.name, SEED for seed."""
    return key.removesuffix(".name").rpartition(".")[2].upper()


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


def shared_meaning(path: str) -> str:
    """What conf/config.yaml says of a key, or where those of a group are described."""
    group = path.partition(".")[0]
    if group in GROUPS:
        return f"see [{group}=]({group}.md)"
    told_of = {key.path: key.comment for key in keys((CONF / "config.yaml").read_text())}
    return plain(told_of.get(path, ""))


def section(group: str, choice: str, text: str) -> list[str]:
    """The part of a group's page on one choice."""
    lines = [f"## {choice}", *header(text)]
    if group in ("experiment", "launcher"):
        body = re.sub(r"\A(#.*\n)+", "", text)
        return [*lines, "```yaml", body.rstrip(), "```", ""]
    known = choices(group)
    if path := target(group, text, known):
        lines += [f"Constructor: `{path}`", ""]
    if bases := below(text, known):
        lines += [f"Builds on `{group}={bases[0]}` and changes", ""]
    if made := brings(yaml.safe_load(text)):
        lines += [f"It chooses {', '.join(map(code, made))}, unless you choose others.", ""]
    if reads := typed.reads(path) if group == "stage" and path else None:
        shared = ", ".join(f"`{name}`" for name in sorted(reads))
        lines += [f"It reads the [shared keys](shared.md) {shared}, and refuses any other.", ""]
    rows = []
    for key, hint, value, meaning in settings(group, text, known):
        kind = spoken(hint) if hint else ""
        new = "(typed with a +)" if key.startswith("+") else ""
        rows.append([code(key), kind, default(value), plain(f"{meaning} {new}".strip())])
    lines += table(HEAD, rows) if rows else []
    if others := also_set(group, text):
        rows = [
            [
                code(key.path),
                place(key.value) if key.path == "dir" else code(key.value),
                plain(key.comment) or shared_meaning(key.path),
            ]
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


def metrics_page() -> str:
    """What `units` says of each metric."""
    lines = ["# Metrics", ""]
    lines += [
        "The console, tables, pages and trackers name a metric alike, and you type the same name: "
        "`metric=probe_top1`. Files hold shares as fractions where a table shows percents of "
        "`accuracy`, `data_wait` and `mfu`. A method may also log terms of its own loss.",
        "",
    ]
    rows = [
        [code(key), unit.label.removeprefix(key).strip(" ()"), plain(units.about(key))]
        for key, unit in units.UNITS.items()
    ]
    return "\n".join([*lines, *table(["metric", "shown in", "meaning"], rows)])


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
    made["reference/metrics.md"] = metrics_page()
    made["reference/shared.md"] = shared_page()
    made["reference/index.md"] = index_page()
    made["tutorials/notebook.md"] = notebook_page(ROOT / "examples" / "from_python.ipynb")
    return made
