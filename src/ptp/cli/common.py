"""What every command shares: errors in one line, progress on standard error."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ptp.errors import PTPError, Terminated
from ptp.processes import rank

# Brackets in a path or in a template's message are no markup.
console = Console(stderr=True, markup=False, highlight=False)

STARTER = Path(__file__).parent.parent / "starter"
"""The small pair of base model and adapter that comes with the package; its README.md says what it is."""

SECONDS_PER_LINE = 10
"""Between lines of progress in a log."""


def budget(value: str) -> int | str:
    """An option's budget: a number of positions from 0 up, or "auto"."""
    if value == "auto" or value.isdecimal():
        return value if value == "auto" else int(value)
    raise typer.BadParameter(f"must be auto or a number from 0 up; got {value!r}")


BudgetOption = Annotated[
    Any,
    typer.Option(
        "--budget",
        parser=budget,
        metavar="INTEGER|auto",
        help="Positions a call may spend on drafts; 0 decodes plainly, auto is what pays on this machine.",
    ),
]
"""The option of commands that decode."""


AdapterArgument = Annotated[
    Path,
    typer.Argument(
        help="Experiment or adapter directory (default: the small model that comes with the package).",
        show_default=False,
    ),
]
"""The argument of commands that start with the package's own model as well."""


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
    # Where it is installed, it says at every start that another package would make it faster.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Set at all, it keeps tokenizers from warning at every fork; no child of ours tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    threading.excepthook = _thread_failed


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A file that a thread cannot write, as tensorboard's, is told by who waits for the thread."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


@contextmanager
def resumable() -> Iterator[None]:
    """A block that goes on where it was stopped: Ctrl-C says so, and a signal to end that is heeded."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        if rank() == 0:
            note("stopped; what is done is kept, and the same command goes on from there")
        # As a shell has it: 128 and the number of the signal.
        raise typer.Exit(128 + (SIGTERM if isinstance(stop, Terminated) else SIGINT)) from None


class Bars(RichProgress):
    """A bar with time left for each thing reported, and below them a table; called as a `ptp.stages.Progress`.

    Only the first of several processes shows anything; tokens reported along the way are shown as tokens per second.
    Where standard error is no terminal, there are lines instead: one for each table, and where none came for so long,
    one every `SECONDS_PER_LINE`.
    """

    table: RenderableType | None = None

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.is_first = rank() == 0
        self.bars: dict[str, TaskID] = {}
        self.num_tokens, self.begun = 0, time.monotonic()
        self.noted = self.begun
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed, left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not (self.is_first and console.is_terminal),
        )

    def __call__(self, what: str, done: int, total: int, tokens: int = 0) -> None:
        if not self.bars:
            # Not before: where nothing is reported, an error would come after an empty line.
            self.start()
        if what not in self.bars:
            self.bars[what] = self.add_task(f"{self.prefix}{what}", total=total, speed="")
            self.num_tokens, self.begun = 0, time.monotonic()
        self.num_tokens += tokens
        speed = f"{self.num_tokens / (time.monotonic() - self.begun):,.0f} tokens/s" if self.num_tokens else ""
        self.update(self.bars[what], completed=done, total=total, speed=speed)
        if time.monotonic() - self.noted > SECONDS_PER_LINE:
            self.say(f"{self.prefix}{what} {done:,}/{total:,} {speed}".rstrip())

    def show(self, table: RenderableType, line: str) -> None:
        """Put a table below the bars, in place of the one before; or note the line."""
        self.table = table
        self.say(f"{self.prefix}{line}")

    def start(self) -> None:
        standard_error = sys.stderr
        super().start()
        _redirect_logs(standard_error, sys.stderr)

    def stop(self) -> None:
        while_live = sys.stderr
        super().stop()
        _redirect_logs(while_live, sys.stderr)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table

    def say(self, line: str) -> None:
        """Note a line where no bars are drawn."""
        if self.is_first and not console.is_terminal:
            self.noted = time.monotonic()
            note(line)


def _redirect_logs(before: TextIO, now: TextIO) -> None:
    """Make every log handler that writes to the one stream write to the other: past the bars, it would tear them."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        # Among them are places of names that nothing was logged under.
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(now)


@contextmanager
def progress_bar(prefix: str = "") -> Iterator[Bars]:
    """Bars on standard error, each beginning with the prefix, from the first report until the block ends."""
    bars = Bars(prefix)
    try:
        yield bars
    finally:
        if bars.bars:
            bars.stop()
