"""Which code a run has: the digest of the package, how it differs from its commit, and a copy."""

import hashlib
import json
import shutil
import stat
import subprocess
import sysconfig
import uuid
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ssl_bench.runs import sweep

PACKAGE = Path(__file__).parents[1]
COMMIT = "ssl_bench-copied.json"  # beside a copy of the package: what git said of the original


@cache
def digest() -> str:
    """Identifies the package by the content of its modules, as they are when it is asked first."""
    # a link in a checkout, a folder in a copy and in a wheel
    modules = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "conf" not in path.parents]
    return _digest(modules, PACKAGE)


def _digest(files: Iterable[Path], root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def own(config: Mapping[str, Any]) -> dict[str, str]:
    """{name of a module or package of the user's own that a node of `config` names: its digest}.

    Installed ones are left out: they have versions.
    """
    nodes = [node for node in config.values() if isinstance(node, Mapping)]
    targets = [node["_target_"] for node in nodes if isinstance(node.get("_target_"), str)]
    standard = Path(sysconfig.get_path("stdlib"))
    found = {}
    for name in sorted({target.partition(".")[0] for target in targets} - {PACKAGE.name}):
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is None or not spec.origin:
            continue
        file = Path(spec.origin)
        installed = {"site-packages", "dist-packages"} & {*file.parts}
        if file.suffix == ".py" and not installed and not file.is_relative_to(standard):
            modules = file.parent.rglob("*.py") if spec.submodule_search_locations else [file]
            found[name] = _digest(modules, file.parent)
    return found


def changed(environment: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """Which of these modules (`own`) the run of this environment.json had otherwise; "": none."""
    before = environment.get("own_code")
    if not isinstance(before, Mapping):
        return ""
    names = [name for name in now if before.get(name, now[name]) != now[name]]
    return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} changed" if names else ""


def copied(folder: Path) -> Path:
    """Copy the package as it is now into a folder below `folder`, and return that for PYTHONPATH.

    What starts later has this code, whatever becomes of the package meanwhile.
    """
    partial = folder / f"code.{uuid.uuid4().hex}"
    skipped = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(PACKAGE, partial / PACKAGE.name, ignore=skipped)
    for path in partial.rglob("*"):
        if path.is_dir():  # of an installation that is read-only
            path.chmod(path.stat().st_mode | stat.S_IRWXU)
    (partial / COMMIT).write_text(json.dumps(commit() | {"changes": changes()}))
    files = [path for path in partial.rglob("*") if path.is_file()]
    copy = folder / f"code-{_digest(files, partial)[:8]}"
    sweep.settle(partial, copy)
    return copy


def _said() -> dict[str, Any]:
    """What is kept of the package that this is a copy of; {}: it is none."""
    note = PACKAGE.with_name(COMMIT)
    return json.loads(note.read_text()) if note.is_file() else {}


def commit() -> dict[str, Any]:
    """{"git_commit": hash, "git_dirty": differs anything in its repository?}; "" without git."""
    if said := _said():
        return {key: said[key] for key in ("git_commit", "git_dirty")}
    dirty = bool(git("status", "--porcelain"))
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}


def git(*command: str) -> str:
    """What git says of the folder of the package; "" where there is no git, or no repository."""
    words = ["git", "-C", str(PACKAGE), *command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout.strip()


def changes() -> str:
    """How the package differs from its commit: git's patch, and new files; "": it doesn't."""
    if said := _said():
        return said["changes"]
    patch = git("diff", "--no-ext-diff", "--no-color", "HEAD", "--", ".")
    new = git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py").split("\0")
    texts = [
        f"new file: {name}\n{(PACKAGE / name).read_text(encoding='utf-8', errors='replace')}"
        for name in new
        if name
    ]
    return "".join(f"{text}\n" for text in (patch, *texts) if text)


def of(environment: Mapping[str, Any]) -> list[str]:
    """The digests of the code that a run had, the newest first; empty if that isn't known.

    environment: from its environment.json. Several: it was continued with other code.
    """
    earlier = environment.get("earlier_code")
    found = [environment.get("code"), *(earlier if isinstance(earlier, list) else ())]
    return list(dict.fromkeys(str(one) for one in found if one))
