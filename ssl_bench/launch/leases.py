"""Places of this machine, a GPU or some of its cores, that one process at a time may use."""

import fcntl
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ssl_bench.errors import UserError


def take(places: Sequence[str]) -> tuple[int, int] | None:
    """Lease the first of the places that is free; None: none is.

    Returns its index, and the descriptor of a file that is locked while anybody has it open. A
    process that inherits it holds the lease as long as it lives, whatever becomes of its parent.
    UserError if the folder of leases can't be trusted.
    """
    folder = _folder()
    for index, place in enumerate(places):
        file = folder / re.sub(r"[^\w.-]", "_", place)
        lease = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lease)
        else:
            return index, lease
    return None


def _folder() -> Path:
    """Of this machine and user: GPUs are shared among all sweeps, wherever these lie."""
    folder = Path(tempfile.gettempdir(), f"ssl_bench-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder
