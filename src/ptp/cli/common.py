"""What every command shares: errors in one line, progress on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ptp.errors import PTPError
from ptp.processes import rank
from ptp.stages import Progress

# Brackets in a path or in a template's message are no markup.
console = Console(stderr=True, markup=False, highlight=False)

SECONDS_PER_LINE = 10
"""Between lines of progress in a log."""


def note(text: str) -> None:
    """A line on standard error, not broken where a terminal is narrow."""
    console.print(text, soft_wrap=True)


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
    # Set at all, it keeps tokenizers from warning at every fork; no child of ours tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@contextmanager
def resumable() -> Iterator[None]:
    """A block that goes on where it was stopped: Ctrl-C says so."""
    try:
        yield
    except KeyboardInterrupt:
        note("stopped; what is done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(prefix: str = "") -> Iterator[Progress]:
    """Bars with time left on standard error, one for each thing reported; yields the `ptp.stages.Progress` to call.

    Only the first of several processes draws; tokens reported along the way are shown as tokens per second. Where
    standard error is no terminal, there is a line every `SECONDS_PER_LINE` instead.
    """
    is_first = rank() == 0
    bars = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not (is_first and console.is_terminal),
    )
    tasks: dict[str, TaskID] = {}
    num_tokens, started = 0, time.monotonic()
    noted = started

    def report(what: str, done: int, total: int, tokens: int = 0) -> None:
        nonlocal num_tokens, started, noted
        if not tasks:
            # Not before: where nothing is reported, an error would come after an empty line.
            bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(f"{prefix}{what}", total=total, speed="")
            num_tokens, started = 0, time.monotonic()
        num_tokens += tokens
        speed = f"{num_tokens / (time.monotonic() - started):,.0f} tokens/s" if num_tokens else ""
        bars.update(tasks[what], completed=done, total=total, speed=speed)
        if is_first and not console.is_terminal and time.monotonic() - noted > SECONDS_PER_LINE:
            noted = time.monotonic()
            note(f"{prefix}{what} {done:,}/{total:,} {speed}".rstrip())

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
