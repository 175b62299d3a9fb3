"""Which code a run has: the digest of the package, and how it differs from its commit."""

import hashlib
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


@cache
def digest() -> str:
    """Identifies the package by the content of its modules, as they are when it is asked first."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


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
