"""The house's layers, read from the imports."""

import ast
import re
from pathlib import Path

import pytest

import ssl_bench

ROOT = Path(ssl_bench.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
BELOW = ("methods", "augment", "backbones", "data", "optim", "schedule", "probe", "finetune", "evaluators", "seeding")
BELOW += ("selection", "fields", "distributed")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def layer(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def importers(*modules: str) -> set[str]:
    def uses(path: Path) -> bool:
        return any(name == module or name.startswith(module + ".") for name in imports(path) for module in modules)

    return {layer(path) for path in MODULES if uses(path)}


def test_each_library_has_its_place() -> None:
    assert importers("hydra", "omegaconf") <= {"train", "launch", "member", "stages", "build"}
    assert importers("wandb") <= {"tracking"}
    assert importers("wandb_workspaces") <= {"dashboard"}
    assert importers("torch.distributed") <= {"distributed", "launch"}


@pytest.mark.parametrize("path", [p for p in MODULES if layer(p) in BELOW], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_lies_below_knows_nothing_of_what_lies_above(path: Path) -> None:
    above = {"engine", "run", "stages", "build", "launch", "train", "tracking", "report", "results", "sweep", "member"}
    above |= {"page", "charts", "signatures", "hydra", "omegaconf", "wandb"}
    used = {name.removeprefix("ssl_bench.").split(".")[0] for name in imports(path)}
    assert not used & above


def test_what_is_constructed_was_composed_or_is_vetted() -> None:
    """A node that was read back from disk goes through `build.found`, which knows whose constructors may be called."""
    vetted = re.compile(r"(self\._)?(cfg\.\w+|config\['\w+'\]|now|node|build\.found\(.*\))(?: \| \{.*\})?")
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("build.construct", "construct"):
                assert vetted.fullmatch(ast.unparse(node.args[0])), f"{path}: {ast.unparse(node)}"


def test_pickles_are_never_read() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
