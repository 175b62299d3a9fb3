"""Rows, headings and live bars on a terminal (rich). Imported only where stderr is one."""

from collections.abc import Iterator, Mapping

from rich.box import ROUNDED
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

NARROW = 7  # characters of a column of rows, at least
BESIDE = 62  # characters of a bar's line beside the bar

terminal = Console(stderr=True, highlight=False)
_heads: list[str] = []  # of the rows that were printed last; empty after anything else


def line(at: str, text: str, warning: bool = False) -> None:
    _heads.clear()
    if warning:
        live.warning = text
    # A path that is wider than the terminal is left to it to break, so that it can be copied.
    wide = max(map(len, text.split()), default=0) > terminal.width
    shown = Text(at + " ", "dim") + Text(text, "yellow" if warning else "")
    terminal.print(shown, soft_wrap=wide)


def heading(text: str) -> None:
    _heads.clear()
    terminal.print(Rule(text, align="left", style="dim", characters="-"))


def panel(title: str, cells: Mapping[str, str]) -> None:
    """A frame with a line a cell; empty ones are left out."""
    _heads.clear()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in filter(lambda cell: cell[1], cells.items()):
        grid.add_row(name, Text(value))
    terminal.print(Panel(grid, title=title, title_align="left", box=ROUNDED))


def row(cells: Mapping[str, str]) -> None:
    """A line of a table; the heads of its columns are printed where they change.

    What the terminal has no room for is left out, from the right.
    """
    widths, room = {}, terminal.width
    for head, cell in cells.items():
        width = max(NARROW, len(head), len(cell)) + 2
        if (room := room - width) < 0:
            break
        widths[head] = width
    if not widths:
        return
    if [*widths] != _heads:
        terminal.print(Text("".join(f"{head:>{width}}" for head, width in widths.items()), "bold"))
        _heads[:] = widths
    terminal.print(Text("".join(f"{cells[head]:>{width}}" for head, width in widths.items())))


class _Part(BarColumn):
    """As wide as the terminal has room for, and at most 40."""

    def render(self, task: Task) -> ProgressBar:
        self.bar_width = min(40, max(8, terminal.width - BESIDE))
        return super().render(task)


class _Doing(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["doing"], no_wrap=True, overflow="ellipsis")


class _Live(Progress):
    """All bars of this process, at the bottom of the terminal while there are any.

    Below them: what is known of the newest step, and the last warning.
    """

    def __init__(self) -> None:
        self.headline = self.warning = ""
        columns = TextColumn("{task.description}", markup=False), _Part(), _Doing()
        super().__init__(*columns, console=terminal, refresh_per_second=2)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.headline:
            yield Text(self.headline, no_wrap=True, overflow="ellipsis")
        if self.warning:
            yield Text(f"! {self.warning}", "yellow", no_wrap=True, overflow="ellipsis")

    def begin(self, title: str, total: float | None, begun: float) -> TaskID:
        if not self.tasks:
            self.start()
        return self.add_task(title, total=total, completed=int(begun), doing="")

    def end(self, task: TaskID) -> None:
        self.remove_task(task)
        if not self.tasks:
            self.headline = self.warning = ""
            self.stop()


live = _Live()
