"""The demo's promises, on its tiny size: it goes on where it was killed, and a second run only decodes."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PATIENCE = 240


def demo(directory: Path) -> list[str]:
    return [sys.executable, "-m", "ptp.cli.main", "demo", "--tiny", "--directory", str(directory)]


def kill_when(directory: Path, reached: Callable[[], bool]) -> None:
    """Start the demo and kill it without warning as soon as `reached` holds."""
    process = subprocess.Popen(demo(directory), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the demo ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def run(directory: Path) -> str:
    result = subprocess.run(demo(directory), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_demo_goes_on_where_it_was_killed_and_a_second_run_only_decodes(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    kill_when(directory, lambda: (directory / "prompts.jsonl").exists())
    kill_when(directory, lambda: (directory / "teacher" / "config.json").exists())
    teacher = (directory / "teacher" / "model.safetensors").stat().st_mtime_ns
    kill_when(directory, lambda: any((directory / "completions").glob("shard-*")))
    shard = (directory / "completions" / "shard-00000.safetensors").stat().st_mtime_ns
    first = run(directory)
    adapter = (directory / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    second = run(directory)
    assert (directory / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert (directory / "completions" / "shard-00000.safetensors").stat().st_mtime_ns == shard
    assert (directory / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    for output in (first, second):
        assert re.search(r"mismatches +0$", output, re.MULTILINE)
    # The same seed gives the same texts in the same calls; only the clock differs.
    tau = re.compile(r"tokens per call +([\d.]+)")
    assert tau.search(first).group(1) == tau.search(second).group(1)
    assert "</html>" in (directory / "report.html").read_text()
