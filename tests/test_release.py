"""What a release says in several places is the same in each."""

import configparser
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ssl_bench

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_one_version() -> None:
    """CITATION.cff's and the newest of CHANGELOG.md are the package's; a date of release is in
    both, or in none.
    """
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert citation["version"] == newest[1] == ssl_bench.__version__
    assert str(citation.get("date-released", "unreleased")) == newest[2]


def test_the_lock_holds_all_that_is_needed_and_names_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    # an option or a path wouldn't parse
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    for one in locked:
        assert one.url is None
        assert [spec.operator for spec in one.specifier] == ["=="], one
    versions: dict[str, list[str]] = {}
    for one in locked:
        versions.setdefault(canonicalize_name(one.name), []).append(
            next(iter(one.specifier)).version
        )
    extras = SETUP["options.extras_require"]
    needed = "\n".join(
        [
            SETUP["options"]["install_requires"],
            *(extras[x] for x in ("search", "timm", "onnx", "dashboard", "huggingface")),
        ]
    )
    for wanted in map(Requirement, filter(None, needed.splitlines())):
        for version in versions[canonicalize_name(wanted.name)]:
            assert wanted.specifier.contains(version), f"{wanted}, locked {version}: make lock"
