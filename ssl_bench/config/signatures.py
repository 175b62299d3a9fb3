"""What a constructor accepts, read from its source.

A configuration is checked before anything runs. Importing the constructors would import torch, and
two seconds are a long wait for a line that says "did you mean". Only where the source isn't plain
enough is the constructor imported.
"""

import ast
import builtins
import gc
import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from ssl_bench.config.renamed import current

# Modules that may be imported to evaluate an annotation: quick ones.
LIGHT = ("typing", "pydantic", "collections.abc", "ssl_bench.config.fields")


class Parameter(NamedTuple):
    annotation: Any
    required: bool


class NoConstructor(Exception):
    """What a dotted path leads to is no class and no function."""


class _NotPlain(Exception):
    pass


def locate(path: str) -> Callable:
    """The class or function with this dotted path. ImportError, AttributeError, ValueError."""
    module, _, name = current(path).rpartition(".")
    collecting = gc.isenabled()
    gc.disable()  # torch's objects are never freed; searching them took a quarter of its import
    try:
        found = import_module(module)
    finally:
        if collecting:
            gc.enable()
    return getattr(found, name)


@cache
def parameters(path: str, supplied: tuple[str, ...]) -> dict[str, Parameter]:
    """The parameters of the class or function with this dotted path, but for the `supplied`.

    ImportError, AttributeError, ValueError, SyntaxError, NoConstructor.
    """
    module, _, name = current(path).rpartition(".")
    try:
        return _Module(module).parameters(name, supplied)
    except _NotPlain:
        target = locate(path)
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise NoConstructor(f"a value of type {type(target).__name__}")
    function = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(function, include_extras=True)
    return {
        name: Parameter(hints.get(name, Any), parameter.default is parameter.empty)
        for name, parameter in inspect.signature(target).parameters.items()
        if name not in supplied
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }


@cache
def constant(path: str, name: str) -> Any:
    """The literal called `name` in the module of the class or function with this dotted path.

    None: there is none. It may refer to literals of other modules. ImportError, ValueError.
    """
    module = current(path).rpartition(".")[0]
    try:
        return _Module(module).literal(name)
    except _NotPlain:
        return None


def _marks(decorator: ast.expr) -> bool:
    """Is it one that gives back what it is given?"""
    return isinstance(decorator, ast.Name) and decorator.id == "single_process"


class _Module:
    """The definitions at the top level of a source file."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            raise _NotPlain
        self.defined: dict[str, ast.stmt] = {}
        try:
            body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
        except SyntaxError:  # who imports it says where
            raise _NotPlain from None
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                self.defined |= {alias.asname or alias.name: node for alias in node.names}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.defined[node.targets[0].id] = node

    def parameters(self, name: str, supplied: tuple[str, ...]) -> dict[str, Parameter]:
        match self.defined.get(name):
            case ast.ImportFrom(module=origin, level=0) if origin:
                return _Module(origin).parameters(name, supplied)
            case ast.ClassDef(decorator_list=[]) as node:
                functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                if inits := [item for item in functions if item.name == "__init__"]:
                    return self._of(inits[0].args, supplied)
                if node.bases and isinstance(node.bases[0], ast.Name):
                    return self.parameters(node.bases[0].id, supplied)
            case ast.FunctionDef() as node if all(map(_marks, node.decorator_list)):
                return self._of(node.args, supplied)
        raise _NotPlain

    def _of(self, args: ast.arguments, supplied: tuple[str, ...]) -> dict[str, Parameter]:
        if args.vararg or args.kwarg:
            raise _NotPlain
        positional = args.posonlyargs + args.args
        optional = positional[len(positional) - len(args.defaults) :]
        keyword_only = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        optional += [arg for arg, default in keyword_only if default]
        found = {}
        for arg in positional + args.kwonlyargs:
            if arg.arg not in ("self", *supplied):
                annotation = self._value(arg.annotation) if arg.annotation else Any
                found[arg.arg] = Parameter(annotation, required=arg not in optional)
        return found

    def literal(self, name: str) -> Any:
        match self.defined.get(name):
            case ast.ImportFrom(module=origin, level=0) if origin:
                return _Module(origin).literal(name)
            case ast.Assign(value=value):
                names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
                literals = {name: self.literal(name) for name in names}
                return eval(ast.unparse(value), {"__builtins__": {}}, literals)
        raise _NotPlain

    def _value(self, expression: ast.expr) -> Any:
        """The type that an annotation stands for."""
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        return eval(ast.unparse(expression), {name: self._named(name) for name in names})

    def _named(self, name: str) -> Any:
        match self.defined.get(name):
            case ast.ImportFrom(module=origin) if origin in LIGHT:
                return getattr(import_module(origin), name)
            case ast.Assign(value=value):
                return self._value(value)
            case None if hasattr(builtins, name):
                return getattr(builtins, name)
        raise _NotPlain
