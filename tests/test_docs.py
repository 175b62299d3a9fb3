"""What the README and the pages of docs/ tell people to type is right."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import CHOICES, CONF, GROUPS, compose
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ssl_bench.backbones.resnet import resnet18
from ssl_bench.config import build, comments, typed
from ssl_bench.report import tables
from ssl_bench.stages import _images

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
README = TEXTS["README.md"]
# the comments of these become the reference
RECIPES = [path.read_text() for path in sorted((ROOT / "conf").rglob("*.yaml"))]


def fenced(text: str, kind: str) -> list[str]:
    """The blocks of code of this kind, without the indentation of a list or a tab around them."""
    blocks = re.findall(rf"^( *)```{kind}\n(.*?)^\1```", text, re.M | re.S)
    return [re.sub(f"^{indent}", "", block, flags=re.M) for indent, block in blocks]


# `ssl-bench ...`, less its comment, in fenced blocks and in running text; not transcripts, which
# begin with $
COMMANDS = {
    re.sub(r"\s+# .*", "", command)
    for text in TEXTS.values()
    for command in [
        *re.findall(r"^ *(?:\w+=\w+ )?ssl-bench (.+)$", text, re.M),
        *re.findall(r"`(?:\w+=\w+ )?ssl-bench ([^`]+)`", text),
    ]
}
COMMANDS |= {
    re.split(r"  +|\s\(", command)[0]
    for text in RECIPES
    for command in re.findall(r"^# +ssl-bench (.+)$", text, re.M)
}
PYTHON = [
    pytest.param(block, id=f"{name} {place}")
    for name, text in TEXTS.items()
    for place, block in enumerate(fenced(text, "python"))
]
# options of Hydra and shorthands, which compose nothing; choices of a folder that isn't there
NOT_COMPOSED = ("--help", "--config-dir", "-sc ", "...")


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader of these commands has written."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_module.py").write_text(
        "class MyImages(list):\n    def __init__(self, root: str, split: str) -> None: ...\n"
    )


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_command_composes(command: str) -> None:
    if any(option in command for option in NOT_COMPOSED):
        return
    words = [
        word
        for word in shlex.split(re.sub("^doctor$", "stage=doctor", command))
        if word[0] not in "-$" and word != "job" and not word.startswith("hydra/sweeper")
    ]
    words = [re.sub(r"=interval\(([^,]+),.*", r"=\1", word) for word in words]
    # of what is swept, the first value, which may be a list itself
    words = [re.sub(r"^([^=]+)=([^\[,]+|\[[^\]]*\]),.*", r"\1=\2", word) for word in words]
    words = [word for word in words if not word.startswith("hydra.sweeper")]
    cfg = compose(*words)
    build.check(cfg)
    assert not typed.in_vain(OmegaConf.to_container(cfg), words)
    if cfg.stage.name in ("pretrain", "pipeline") and not command.startswith("experiment="):
        check_runs(cfg)


def check_runs(cfg: DictConfig) -> None:
    """With the images that the command has: those it brings, or a small folder of the reader's."""
    if "root" in cfg.data:
        assert cfg.method.get("queue_size", 0) <= 5000 or cfg.data.name not in ("folder", "own")
    else:
        _images.check(cfg, {})


@pytest.mark.parametrize("block", PYTHON)
def test_python_compiles_and_what_it_takes_from_us_is_there(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "ssl_bench" or hasattr(import_module("ssl_bench"), node.attr)


def test_a_loop_of_ones_own_runs() -> None:
    (_, block) = fenced(TEXTS["docs/how-to/python.md"], "python")
    names: dict[str, object] = {}
    exec(block, names)
    assert names["output"]["loss"].isfinite()  # type: ignore[index]


def test_the_methods_of_the_tutorial_learn() -> None:
    """Each with the values of its YAML; they are run as commands in test_walkthrough.py."""
    page = TEXTS["docs/tutorials/method.md"]
    for code, text in zip(fenced(page, "python"), fenced(page, "yaml"), strict=True):
        names: dict[str, Any] = {}
        exec(code, names)
        node = yaml.safe_load(text)["method"]
        constructor = names[node.pop("_target_").removeprefix("my_module.")]
        assert re.sub(r"(?<!^)(?=[A-Z])", "_", constructor.__name__).lower() == node.pop("name")
        method = constructor(resnet18(width=8, stem="small"), **node)
        optimizer = torch.optim.SGD(method.param_groups(), 0.1)
        method.check(num_images=2000, local_batch=8)
        before = {key: value.clone() for key, value in method.state_dict().items()}
        output = method([torch.rand(8, 3, 16, 16) for _ in range(method.num_views)])
        output["loss"].backward()
        optimizer.step()
        method.update(progress=0.5)
        assert output.pop("embeddings").shape == (2, 8, node["dim"])
        assert all(value.isfinite() and value.dim() == 0 for value in output.values())
        # all of it learns, follows or is filled
        parts = {key.partition(".")[0] for key in before}
        after = method.state_dict()
        moved = {key.partition(".")[0] for key in before if not after[key].equal(before[key])}
        assert moved == parts


def test_the_map_of_a_folder_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = fenced(TEXTS["docs/tutorials/folder.md"], "python")
    names = [f"{number}.png" for number in range(8)]
    for name in names:
        Image.new("RGBA", (5, 4)).save(tmp_path / name)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "images.csv").write_text("\n".join(["image", *names]))
    np.save(tmp_path / "features" / "features.npy", np.random.default_rng(0).normal(size=(8, 3)))
    monkeypatch.chdir(tmp_path)
    exec(block.replace("/photos/", ""), {})
    assert Image.open("map.png").size == (1600, 900)


def test_every_choice_of_the_readmes_groups_is_named() -> None:
    """In its group's own row: another group may have a choice of that name. The other groups are in
    the reference, which is generated.
    """
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.M))
    assert rows.keys() == {"stage", "method", "backbone", "data"}
    for group, choice in CHOICES:
        if group in rows:
            assert f"`{choice}`" in rows[group], f"{group}={choice}"


@pytest.mark.parametrize("name", [*TEXTS, "CONTRIBUTING.md"])
def test_links_lead_to_files(name: str) -> None:
    """As the files lie here; those of the site are checked where it is built: `make docs`."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    here = [link for link in links if not re.match(r"https?:", link)]
    for link in here:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            text = target.read_text()
            headings = re.findall(r"^#+ (.*)$", text.lower(), re.M)
            assert anchor in [re.sub(r"[^\w-]", "", one.replace(" ", "-")) for one in headings]


def test_the_tables_are_made_from_the_committed_results() -> None:
    with_tables = [path for path in PAGES if tables.BLOCK.search(path.read_text())]
    assert len(with_tables) >= 2
    for path in with_tables:
        text = path.read_text()
        advice = f"ssl-bench stage=report stage.readme={path.relative_to(ROOT)}"
        assert tables.fill(text, path.parent) == text, advice


def test_the_readme_is_short() -> None:
    assert README.count("\n") < 150


def prose(text: str) -> Iterator[list[str]]:
    """The lines of each paragraph and item of a list; no code, tables, headings or HTML."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^ *([#|<!].*|=== .*)$", "", text, flags=re.M)
    for block in re.split(r"\n(?:[ \t]*\n)+|\n(?= *(?:[-*]|\d+\.) )", text):
        yield [line.strip() for line in block.splitlines()]


WRITTEN = {**TEXTS, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}


@pytest.mark.parametrize("name", WRITTEN)
def test_lines_of_prose_are_full(name: str) -> None:
    """None is longer than 125 columns, and none ends where the next word would have fitted."""
    for lines in prose(WRITTEN[name]):
        for line, following in pairwise([*lines, ""]):
            first = re.match(r"(`[^`]*`|[^\s`])*", following)
            assert first
            assert len(line) <= 125, line
            assert not following or len(line) + 1 + len(first[0]) > 90, line


@pytest.mark.parametrize("name", TEXTS)
def test_code_fits_the_column_of_the_site(name: str) -> None:
    """Commands and YAML wrap there; see docs/extra.css."""
    for block in fenced(TEXTS[name], "python"):
        assert max(map(len, block.splitlines())) <= 100
    for block in fenced(TEXTS[name], "text"):
        assert max(map(len, block.splitlines())) <= 120


def test_a_placeholder_says_what_to_put_there() -> None:
    for name, text in TEXTS.items():
        if "URL_OF_THIS_REPOSITORY" in text:
            assert re.search(r"URL_OF_THIS_REPOSITORY`\s(stands|by)", text), name


# --- the generated reference ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs" / "hooks")
        return import_module("reference")


def test_every_key_of_every_choice_is_in_the_reference(reference: ModuleType) -> None:
    pages = reference.pages()
    for group, choice in CHOICES:
        if group in ("experiment", "launcher"):
            continue  # shown as they are
        text = (CONF / group / f"{choice}.yaml").read_text()
        node, own, _ = comments.node_of(group, text)
        found = {key.path.partition(".")[0] for key in own}
        assert found == node.keys(), f"{group}={choice}"
        part = pages[f"reference/{group}.md"].partition(f"\n## {choice}\n")[2].partition("\n## ")[0]
        for key in node.keys() - {"name", "_target_", "defaults"}:
            assert f"| `{group}.{key}" in part, f"{group}={choice}: {key}"
    keys = yaml.safe_load((CONF / "config.yaml").read_text()).keys()
    shared = keys - {"defaults", "hydra", "data"}
    assert all(f"| `{key}` |" in pages["reference/shared.md"] for key in shared)


def test_every_key_of_the_reference_has_a_meaning(reference: ModuleType) -> None:
    for name, page in reference.pages().items():
        rows = re.findall(r"^\| `[^|]*` \|.*\|$", page, re.M)
        assert not [row for row in rows if not row.split(" | ")[-1].strip(" |")], name


def test_every_choice_is_in_the_reference(reference: ModuleType) -> None:
    page = reference.pages()["reference/index.md"]
    assert set(GROUPS) == reference.GROUPS.keys()
    assert all(f"[`{choice}`]({group}.md#" in page for group, choice in CHOICES)


def test_comments_belong_to_their_keys() -> None:
    text = """# of the file
a: 1  # of a
b:
  # above c
  c: [1, 2]   # beside c
              # goes on
  d: "x # y"  # of d
e: 3
"""
    assert comments.keys(text) == [
        ("a", "1", "of a"),
        ("b.c", "[1, 2]", "above c beside c goes on"),
        ("b.d", '"x # y"', "of d"),
        ("e", "3", ""),
    ]


def test_types_in_words() -> None:
    fields = build.Root.model_fields
    said = comments.spoken_field
    assert said(fields["epochs"]) == "integer > 0"
    assert said(fields["ema"]) == "number > 0, < 1 or `null`"
    assert said(fields["precision"]) == "`fp32`, `tf32`, `bf16` or `fp16`"
    assert said(fields["runs"]) == "path, list of paths or `null`"
