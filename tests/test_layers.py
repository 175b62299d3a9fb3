"""The house's rooms, read from the imports. `python tests/test_layers.py` counts them."""

import ast
import re
from pathlib import Path

import grimp
import pytest

import ssl_bench

ROOT = Path(ssl_bench.__file__).parent
PLUGINS = ROOT.parent / "hydra_plugins"
MODULES = sorted([*ROOT.rglob("*.py"), *PLUGINS.rglob("*.py")])

# Which room may know which others. Each knows itself, and `__init__.py`, which has the version, is
# known to all.
ROOMS = {
    "errors": (),
    "shell": (),
    "files": ("errors",),
    "terminal": (),
    "console": ("terminal",),
    "config": ("errors", "shell"),
    "runtime": ("errors",),
    "backbones": ("errors",),
    "augment": ("config", "errors", "runtime"),
    "methods": ("augment", "backbones", "config", "errors", "runtime"),
    "data": ("augment", "config", "console", "errors", "files", "runtime"),
    "runs": ("config", "console", "data", "errors", "files", "methods", "runtime", "shell"),
    "evaluate": ("console", "data", "errors", "files", "runs", "runtime"),
    "training": ("augment", "config", "data", "errors", "evaluate", "methods", "runs", "runtime"),
    "report": ("errors", "files", "runs"),
    "launch": (
        "augment",
        "config",
        "console",
        "data",
        "errors",
        "report",
        "runs",
        "runtime",
        "shell",
    ),
    "doctor": ("data", "errors", "runs", "runtime"),
    "stages": (
        *(
            "augment",
            "config",
            "console",
            "data",
            "doctor",
            "errors",
            "evaluate",
            "files",
            "launch",
            "methods",
            "report",
            "runs",
        ),
        *("runtime", "shell", "training"),
    ),
    "hydra_plugins": ("launch",),
    "command": ("config", "doctor", "errors", "hydra_plugins", "launch"),
    "__main__": ("command",),
    "api": (
        "command",
        "config",
        "console",
        "data",
        "errors",
        "launch",
        "runtime",
        "shell",
        "stages",
    ),
}
# Libraries that not every room may know: where a configuration stops, and who else has the network
# or other processes.
LIBRARIES = {
    "hydra": ("api", "config", "hydra_plugins", "launch", "stages", "command"),
    "omegaconf": ("api", "config", "launch", "stages", "command"),
    "wandb": ("runs.tracking",),
    "wandb_workspaces": ("report.dashboard",),
    "torch.distributed": ("runtime.distributed", "launch.process"),
}
# of the room that composes and constructs, those below know the types of arguments alone
BELOW = ("augment", "data", "methods", "training")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def room(module: str) -> str:
    """runs of ssl_bench.runs.tracking; "" of ssl_bench itself."""
    return module.removeprefix("ssl_bench").removeprefix(".").partition(".")[0]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Who reaches itself."""

    def reached(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            todo += (new := graph[todo.pop()] - found)
            found |= new
        return found

    return [start for start in graph if start in reached(start)]


_BUILT = grimp.build_graph(
    *("ssl_bench", "hydra_plugins.ssl_bench_launchers"),
    cache_dir=None,
    exclude_type_checking_imports=True,
)
GRAPH = {module: _BUILT.find_modules_directly_imported_by(module) for module in _BUILT.modules}
ARROWS: dict[str, set[str]] = {}
for _module, _others in GRAPH.items():
    ARROWS.setdefault(room(_module), set()).update(
        {room(other) for other in _others} - {room(_module), ""}
    )


def test_each_module_is_in_a_room_of_the_table() -> None:
    assert ARROWS.keys() - {"", "conf"} == ROOMS.keys()


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_knows_those_of_the_table_and_no_others(name: str) -> None:
    assert ARROWS[name] == set(ROOMS[name])


@pytest.mark.parametrize("graph", [GRAPH, ARROWS], ids=["modules", "rooms"])
def test_no_imports_go_in_circles(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_has_its_place(library: str) -> None:
    for path in MODULES:
        if any(found == library or found.startswith(library + ".") for found in imports(path)):
            name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
            assert {room(name), name.removeprefix("ssl_bench.")} & set(LIBRARIES[library]), name


def test_what_lies_below_knows_types_alone_of_configuration() -> None:
    for module, others in GRAPH.items():
        if room(module) in BELOW:
            assert {other for other in others if room(other) == "config"} <= {
                "ssl_bench.config.fields"
            }, module


def test_what_is_constructed_was_composed_or_is_vetted() -> None:
    """A node that was read back from disk goes through `build.found`, which knows whose
    constructors may be called.
    """
    vetted = re.compile(
        r"(?:weights\.unfilled\()?"
        r"(self\._)?(cfg\.\w+|config\['\w+'\]|now|node|build\.found\(.*\))(?: \| \{.*\})?\)?"
    )
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "build.construct",
                "construct",
            ):
                assert vetted.fullmatch(ast.unparse(node.args[0])), f"{path}: {ast.unparse(node)}"


def test_pickles_are_never_read() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                ), path


if __name__ == "__main__":
    arrows = sum(map(len, ARROWS.values()))
    print(
        f"{len(GRAPH)} modules in {len(ARROWS)} rooms, {arrows} arrows between them, "
        f"{len(circles(GRAPH))} in circles"
    )
