"""What a terminal shows of a run: a view that is drawn anew in place, or plain lines where stdout is a file.

The view is drawn by a thread of rich, from numbers that the run has logged; no step waits for it or for a device.
"""

import os
import sys
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dmdr_train.tracking.progress import Progress


class View(Protocol):
    """Shows the progress of a run."""

    def logged(self) -> None:
        """New values were logged."""

    def close(self) -> None:
        """The run ends."""


def open_view(progress: Progress) -> View:
    """The live view where stdout is a terminal that moves its cursor and shows blocks, otherwise plain lines."""
    blocks = (sys.stdout.encoding or "").lower().startswith("utf")
    live = sys.stdout.isatty() and blocks and os.environ.get("TERM") not in ("dumb", "unknown")
    return LiveView(progress) if live else PlainLines(progress)


class PlainLines:
    """Prints a line for each logged row."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def logged(self) -> None:
        now = self.progress
        values = [f"{name} {value}" for name, value, _ in now.shown()]
        facts = [f"step {now.step} of {now.steps}", now.stage, now.pace, *values]
        print(", ".join(filter(None, facts)), flush=True)

    def close(self) -> None: ...


class LiveView:
    """Draws the progress in place, twice a second; what is printed meanwhile appears above it."""

    def __init__(self, progress: Progress, console: Console | None = None):
        self.progress = progress
        self.live = Live(
            console=console or Console(file=sys.stdout),
            get_renderable=self.drawn,
            refresh_per_second=2,
            redirect_stderr=sys.stderr.isatty(),
        )
        self.live.start()

    def logged(self) -> None: ...

    def close(self) -> None:
        self.live.stop()

    def drawn(self) -> RenderableType:
        """The view: the bar, a line for each value, and the last warnings."""
        now = self.progress
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=now.steps, completed=now.step, width=30)
        head.add_row(Text(now.stage, style="bold"), f"step {now.step} of {now.steps}", bar, now.pace)
        values = Table.grid(padding=(0, 2))
        values.add_column(style="dim")
        values.add_column(justify="right")
        values.add_column(style="cyan", no_wrap=True)
        for row in now.shown():
            values.add_row(*row)
        return Group(head, values, *(Text(f"! {text}", style="yellow") for text in tuple(now.warnings)))
