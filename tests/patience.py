"""How long a test waits for what should happen. It costs only where it never does: a busy machine
takes minutes for what takes seconds.
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 300  # seconds


def wait(happened: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """No longer than the process runs, if there is one that makes it happen."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process and process.poll() is not None:
            said = process.stderr.read() if process.stderr else ""
            raise AssertionError(f"ended by {process.returncode}: {said}")
        assert time.monotonic() < deadline, f"still waiting after {PATIENCE} s"
        time.sleep(0.02)


def count_lines(path: Path) -> int:
    """Of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
