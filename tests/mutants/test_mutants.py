"""The table of mutants still fits the program and its tests."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml
from run import ROOT, Mutant, copy, read

MUTANTS = read()


@cache
def quick(file: str) -> set[str]:
    """The tests of a file that aren't marked slow."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    assert not any(mark.startswith("pytestmark") and "slow" in mark for mark in marks), (
        f"{file} is slow"
    )
    functions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    slow = {
        node.name
        for node in functions
        for mark in node.decorator_list
        if ast.unparse(mark) == "pytest.mark.slow"
    }
    return {node.name for node in functions} - slow


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_made_and_its_tests_are_there(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutant.apply(text)  # ValueError unless every old text is there once
    assert changed != text
    (yaml.safe_load if mutant.file.endswith(".yaml") else ast.parse)(changed)
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert re.sub(r"\[.*", "", name) in quick(file), test


def test_each_has_a_name_of_its_own() -> None:
    assert not [
        name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1
    ]
    assert not [mutant.name for mutant in MUTANTS if "|" in mutant.name + mutant.kind]


def test_the_copy_is_whole(tmp_path: Path) -> None:
    """What is missing there would be imported from the program itself, where no mutant is."""
    copy(ROOT, tmp_path / "copy")
    for name in ("ssl_bench", "tests"):
        here, there = (
            {path.relative_to(root) for path in (root / name).rglob("*.py")}
            for root in (ROOT, tmp_path / "copy")
        )
        assert there == here
