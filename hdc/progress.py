"""What a running command shows: a live bar on a terminal, a line now and then in a log file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# What is printed may hold a path or a class name: [x] in it is no markup, :x: no emoji.
console = Console(markup=False, emoji=False, highlight=False)
SECONDS_BETWEEN_LINES = 20.0


class ProgressBar:
    """Counts towards `total`; `advance` takes what to show beside the bar.

    Speed and time left count from where this process began, not from where a resumed run did.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name = name
        self.total = total
        self.done = done
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, status="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def set(self, done: int, total: int) -> None:
        """Move to `done` of `total`."""
        self.total = total
        self._bar.update(self._task, total=total)
        self.advance(done - self.done)

    def advance(self, steps: int = 1, status: str | None = None) -> None:
        """Count `steps` more; `status` replaces the text beside the bar."""
        self.done += steps
        if status is None:
            self._bar.update(self._task, advance=steps)
        else:
            self._bar.update(self._task, advance=steps, status=status)
        now = time.monotonic()
        if not console.is_terminal and (
            now - self._last_line > SECONDS_BETWEEN_LINES or self.done == self.total
        ):
            self._last_line = now
            shown = self._bar.tasks[0].fields["status"]
            say(f"{self.name} {self.done}/{self.total} {shown}".rstrip())


def say(line: str, style: str = "") -> None:
    """One line as it is, above the bar if there is one; the terminal wraps it, so that a path can be copied."""
    console.print(line, style=style, soft_wrap=True)


def warn(message: str) -> None:
    """One yellow line."""
    say(f"warning: {message}", style="yellow")
