"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptp.errors import DataError


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place to write a file or directory, which gets its name when the block ends well and else goes.

    Raises `DataError` where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Left by a process that was killed and had our number, as in a container that is started again.
        _remove(temporary)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; what is stored so far is kept") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of lines, which is made if it is not there. Raises `DataError` where the disk refuses."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
