"""Exceptions that aren't bugs."""

import difflib
import errno
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: no room, or no more of it for this user


class UserError(ValueError):
    """A mistake that its user can mend.

    The message says what is wrong, the value, and what to type instead. `command.main` prints it as
    one line and exits with 2; any other exception is a bug and keeps its traceback.
    """


class Abandoned(UserError):
    """Another process of the run has ended; it knows why."""


class Diverged(UserError):
    """The loss or the weights of a run aren't finite: the same run again ends the same way."""


class Collapsed(Diverged):
    """The embeddings of a run collapse, at which on_collapse=stop ends it."""


@contextmanager
def writable(key: str, place: str | Path) -> Iterator[None]:
    """UserError if `place`, which `key` of the configuration names, can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{key}={place}: can't be written ({error.strerror}); choose another {key}="
        ) from None


@contextmanager
def told_if_full() -> Iterator[None]:
    """UserError in place of an OSError that says that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f": {error.filename}" if error.filename else ""
        raise UserError(
            f"the disk is full{where}; make room and repeat the command: what it has saved stays"
        ) from error


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        after = "" if step is None else f" after step {step:,}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
        self.signum = signum


def stop(signum: int, frame: object) -> None:
    """A signal's handler, for those around runs (`interrupted_by`)."""
    raise Interrupted(signum)


@contextmanager
def interrupted_by(*signums: int) -> Iterator[None]:
    """Within it these signals raise Interrupted; in the main thread, which alone has handlers."""
    mine = signums if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, stop) for signum in mine}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def unknown(what: str, got: str, valid: list[str]) -> str:
    """One line about a key or choice that isn't there."""
    if not valid:
        return f"{got}: no such {what}; there is none"
    found = re.match(r"(.*[.=])?", got)
    head = found[0] if found else ""
    # A beginning that all valid ones have says nothing about which is close.
    shared = head if all(name.startswith(head) for name in valid) else ""
    names = [name.removeprefix(shared) for name in valid]
    hint = meant(got.removeprefix(shared), names, shared)
    return f"{got}: no such {what}; {hint}Valid: {', '.join(sorted(valid))}"


def several(count: float, what: str) -> str:
    """1 epoch, 2 epochs, 1,000 epochs."""
    shown = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{shown} {what}{'' if count == 1 else 's'}"


def meant(got: str, valid: Iterable[str], before: str = "") -> str:
    """The valid name that is closest, as a question and a space; "": none is close.

    before: what stands before the names.
    """
    close = closest(got, valid)
    return f"did you mean {before}{close}? " if close else ""


def closest(got: str, valid: Iterable[str]) -> str:
    """The valid name that is closest; "": none is close."""
    names = list(valid)
    close = difflib.get_close_matches(got, names, n=1)
    close = close or difflib.get_close_matches(got, _same_words(got, names), n=1, cutoff=0)
    return close[0] if close else ""


def _same_words(asked: str, names: list[str]) -> list[str]:
    """The names that have all words of what was asked for, as base_lr has lr, or the reverse."""
    words = {name: set(re.findall(r"[a-z]+", name.lower())) for name in (asked, *names)}
    mine = words[asked]
    return [
        name
        for name in names
        if mine and words[name] and not (mine - words[name] and words[name] - mine)
    ]
