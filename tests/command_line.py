"""Commands as they are typed: in this process where that is enough, as programs where it is not."""

import io
import multiprocessing
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

PATIENCE = 120
"""Seconds after which a process is taken to hang."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def typed(command: Callable[[], None], *arguments: object, stdin: str = "") -> Result:
    """Run a command's entry point in this process; an error that is not a user's goes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["ptp", *map(str, arguments)]
    patches = patch.object(sys, "argv", argv), patch.object(sys, "stdin", io.StringIO(stdin))
    with patches[0], patches[1], redirect_stdout(out), redirect_stderr(err):
        try:
            command()
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def program(name: str, *arguments: object) -> Result:
    """Run a console command as a program of its own."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def notes(result: Result) -> list[str]:
    """Lines of standard error, progress bars left out."""
    return [line for line in result.err.splitlines() if not re.search(r"\d+/\d+ .* left ", line)]


def check_refused(result: Result, *words: str) -> None:
    """One line that says what is wrong, though a progress bar may have begun."""
    assert result.code == 2, result
    assert result.out == ""
    lines = notes(result)
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@contextmanager
def disk_with_room_for_files_of(size: int) -> Iterator[None]:
    """Writing more than so many bytes into a file fails inside the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def forking(command: Callable[[Path], None]) -> Callable[[Path], Any]:
    """Starts a command on a directory in a process forked from one that has imported everything: it begins at once."""
    context = multiprocessing.get_context("forkserver")
    stages = [f"ptp.{part}.{name}" for name in ("pregenerate", "train") for part in ("cli", "stages")]
    context.set_forkserver_preload([*stages, "ptp.cli.training_progress", "ptp.evaluation.measurement", "datasets"])

    def start(directory: Path) -> Any:
        process = context.Process(target=command, args=(directory,))
        process.start()
        return process

    return start
