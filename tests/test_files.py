import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ptp.errors import DataError
from ptp.files import appearing, write_atomically

HALF_WAY = """
import sys
from pathlib import Path
from ptp.files import appearing
with appearing(Path(sys.argv[1])) as temporary:
    if sys.argv[2] == "directory":
        temporary.mkdir()
        (temporary / "part").write_text(sys.argv[3])
    else:
        temporary.write_text(sys.argv[3])
    print("half way", flush=True)
    sys.stdin.readline()
"""
KINDS = ["file", "directory"]


def half_way(path: Path, kind: str, text: str = "half") -> subprocess.Popen[str]:
    """Another process that has written `text` and waits for a line before it ends the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, str(path), kind, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    return process


def fill(temporary: Path, kind: str, text: str) -> None:
    if kind == "directory":
        temporary.mkdir()
        (temporary / "part").write_text(text)
    else:
        temporary.write_text(text)


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for written in (b"first", b"second"):
        write_atomically(tmp_path / "file", written)
        assert (tmp_path / "file").read_bytes() == written
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_appears_when_the_block_ends_and_folders_above_it_are_made(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a" / "b" / "new"
    with appearing(path) as temporary:
        fill(temporary, kind, "all")
        assert not path.exists()
    assert content(path) == "all"
    assert names(path.parent) == ["new"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_nothing_and_keeps_its_error(
    tmp_path: Path, kind: str, error: type[BaseException]
) -> None:
    with pytest.raises(error, match=r"^stop$"), appearing(tmp_path / "new") as temporary:
        fill(temporary, kind, "half")
        raise error("stop")
    assert names(tmp_path) == []


def test_what_was_there_stays_when_its_replacement_fails(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(RuntimeError), appearing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_leaves_nothing_under_the_name_and_nothing_in_the_way(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new"
    process = half_way(path, kind)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not path.exists()
    # After a restart of a container the next process may well have the same number.
    for left in tmp_path.iterdir():
        left.rename(left.with_name(left.name.replace(str(process.pid), str(os.getpid()))))
    assert len(names(tmp_path)) == 1
    with appearing(path) as temporary:
        fill(temporary, kind, "all")
    assert content(path) == "all"
    assert names(tmp_path) == ["new"]


def test_of_two_processes_that_write_one_file_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "new"
    first, second = half_way(path, "file", "first"), half_way(path, "file", "second")
    for process, text in ((second, "second"), (first, "first")):
        _, errors = process.communicate("\n")
        assert (process.returncode, errors) == (0, "")
        assert content(path) == text
    assert names(tmp_path) == ["new"]


def test_of_two_processes_that_write_one_directory_the_first_one_counts_and_the_other_is_told(tmp_path: Path) -> None:
    path = tmp_path / "new"
    first, second = half_way(path, "directory", "first"), half_way(path, "directory", "second")
    first.communicate("\n")
    assert first.returncode == 0
    _, errors = second.communicate("\n")
    assert f"DataError: cannot write {path}:" in errors
    assert content(path) == "first"
    assert names(tmp_path) == ["new"]


def test_a_disk_that_refuses_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(DataError, match=r"^cannot write .*; what is stored so far is kept$") as caught:
        write_atomically(tmp_path / "file" / "below", b"content")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]
