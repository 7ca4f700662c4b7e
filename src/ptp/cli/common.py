"""What every command shares: errors in one line, progress on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptp.errors import PTPError

console = Console(stderr=True)


def run(command: Callable[[], object]) -> None:
    """Run a command's program; a user's error is one line on standard error and exit code 2."""
    quiet_libraries()
    try:
        command()
    except PTPError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def quiet_libraries() -> None:
    """Keep other libraries' bars and notices off the terminal unless asked for."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with time left on standard error; yields a function of (done, in all)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
