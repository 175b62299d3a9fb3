"""What a person reads while something runs: on a terminal rows above live bars, elsewhere lines.

All of it goes through `logging`, so that log.txt has it too. `extra` of a record may say how it is
shown: `brief`, a shorter line; and on a terminal `cells`, in place of the line: a row under column
heads, or, with `title`, a panel ({} for nothing: the bars say it); `heading`, True: the begin of a
part; `result`, True: verbosity=quiet shows it, too.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

LOG_SECONDS = 10  # between two lines of a bar, where there is no terminal
REDRAWN = 0.2  # seconds between two looks at a bar: steps may take a tenth of a millisecond

Verbosity = Literal["quiet", "normal", "full"]
Item = TypeVar("Item")

log = logging.getLogger(__name__)


def on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """1:02:03, or 2 d 1:02:03."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hour}:{minute:02}:{second:02}"


class Handler(logging.Handler):
    """Shows on stderr what is logged."""

    verbosity: Verbosity = "normal"
    aside = False  # of this process: see `aside`

    def emit(self, record: logging.LogRecord) -> None:
        warning, own = record.levelno >= logging.WARNING, vars(record)
        if self.aside and self.verbosity != "full" and not warning:
            return
        if self.verbosity == "quiet" and not (warning or own.get("result")):
            return
        told = own.get("brief") if self.verbosity != "full" else None
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        try:
            if not on_terminal():
                print(at, told or record.getMessage(), file=sys.stderr, flush=True)
                return
            from ssl_bench import terminal

            cells = own.get("cells") if self.verbosity != "full" else None
            if own.get("heading"):
                terminal.heading(record.getMessage())
            elif cells is None:
                terminal.line(at, told or record.getMessage(), warning)
            elif title := own.get("title"):
                terminal.panel(title, cells)
            elif cells:
                terminal.row(cells)
        except (OSError, ValueError):  # the terminal is gone, the disk full: the work goes on
            pass


def choose(verbosity: Verbosity) -> None:
    """quiet: results and warnings alone. full: of each step all that log.txt has."""
    for handler in logging.getLogger("ssl_bench").handlers:
        if isinstance(handler, Handler):
            handler.verbosity = verbosity


@contextmanager
def aside() -> Iterator[None]:
    """A console shows warnings and bars of what runs within, which its caller sums up in a line;
    with verbosity=full everything.
    """
    before, Handler.aside = Handler.aside, True
    try:
        yield
    finally:
        Handler.aside = before


class Bar:
    """How far something is: a live bar on a terminal, elsewhere a line in the log now and then.

    total: None where it isn't known. begun: how much an earlier command has done. silence: seconds
    that must pass without a line where what is counted logs lines of its own.
    """

    def __init__(
        self,
        total: float | None,
        title: str,
        *,
        unit: str = "images",
        begun: float = 0,
        shown: bool = True,
        silence: float = 0,
    ) -> None:
        self.total, self.title, self.unit, self.begun, self.done = total, title, unit, begun, begun
        self.began = self._looked = time.monotonic()
        self._shown, self._silence = shown, silence
        self._task = None
        if shown and on_terminal():
            from ssl_bench import terminal

            self._live = terminal.live
            self._task = self._live.begin(title, total, begun)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._live.end(self._task)
            self._task = None

    @property
    def rate(self) -> float:
        """A second, on average since the begin; 0 before anything was done."""
        return (self.done - self.begun) / max(time.monotonic() - self.began, 1e-9)

    @property
    def left(self) -> str:
        """See `left_after`."""
        return self.left_after(self.done)

    def left_after(self, done: float) -> str:
        """The time left at the mean rate, once so much is done; "" where it isn't known."""
        if self.total is None or done <= self.begun:
            return ""
        mean = (time.monotonic() - self.began) / (done - self.begun)
        return duration((self.total - done) * mean)

    @property
    def doing(self) -> str:
        """34/120 steps  1.23 steps/s  0:01:10 left."""
        of = "" if self.total is None else f"/{_count(self.total)}"
        speed = f"{self.rate:,.0f}" if self.rate >= 100 else f"{self.rate:.3g}"
        words = [
            f"{_count(self.done)}{of} {self.unit}",
            f"{speed}/s",
            self.left and f"{self.left} left",
        ]
        return "  ".join(filter(None, words))

    def add(self, count: float = 1) -> None:
        self.done += count
        waited = time.monotonic() - self._looked
        if self._task is not None and waited > REDRAWN:
            self._looked = time.monotonic()
            self._live.update(self._task, completed=self.done, doing=self.doing)
        elif self._task is None and self._shown and waited > max(LOG_SECONDS, self._silence):
            self._looked = time.monotonic()
            log.info("%s: %s", self.title, self.doing)

    def say(self, text: str) -> None:
        """A line below the bars of a terminal; elsewhere it was logged."""
        if self._task is not None:
            self._live.headline = text
        else:
            self._looked = time.monotonic()

    def follow(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each counts as done when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.add()


def _count(number: float) -> str:
    return f"{number:,.0f}"
