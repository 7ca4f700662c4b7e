"""A program in a real terminal: tmux, which is typed into and looked at."""

import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from command_line import PATIENCE

POLL = 0.05
"""Seconds between two looks."""


class Terminal:
    """One window of a tmux server of its own."""

    def __init__(self, columns: int) -> None:
        self.columns, self.socket = columns, f"ptp-{uuid.uuid4().hex}"

    def tmux(self, *arguments: object) -> str:
        command = ["tmux", "-L", self.socket, "-f", "/dev/null", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def start(self, command: Sequence[object], environment: dict[str, str]) -> None:
        # Where it is set, rich believes it rather than the terminal.
        environment = environment | {"COLUMNS": ""}
        variables = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
        # The shell outlives Ctrl-C, and what stays of the window says how the program ended.
        line = (
            f"trap : INT; {shlex.join(map(str, command))}; echo left with code $?; stty -a; exec sleep {2 * PATIENCE}"
        )
        self.tmux("new-session", "-d", "-x", self.columns, "-y", 50, *variables, "sh", "-c", line)

    def screen(self, colours: bool = False) -> str:
        """All that was shown, lines that the terminal has broken joined."""
        return self.tmux("capture-pane", "-pJ", "-S", "-", *["-e"] * colours).rstrip()

    def tail(self) -> str:
        """What the bottom of the window shows."""
        return self.tmux("capture-pane", "-pJ").rstrip()[-1000:]

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def enter(self, line: str) -> None:
        self.type(line)
        self.press("Enter")

    def paste(self, text: str) -> None:
        """Paste as terminals do, which tell the program where the pasted text begins and ends."""
        self.tmux("set-buffer", text)
        self.tmux("paste-buffer", "-p")

    def wait(self, text: str, count: int = 1) -> str:
        """The screen, once the text is there so often."""
        return self.wait_until(lambda screen: screen.count(text) >= count)

    def wait_until(self, holds: Callable[[str], object]) -> str:
        """The screen, once something holds of it."""
        deadline = time.monotonic() + PATIENCE
        while not holds(screen := self.screen()):
            assert time.monotonic() < deadline, f"waited in vain:\n{self.tail()}"
            time.sleep(POLL)
        return screen


@contextmanager
def terminal(command: Sequence[object], environment: dict[str, str], columns: int = 160) -> Iterator[Terminal]:
    """A program started in a terminal, which ends with the block."""
    window = Terminal(columns)
    window.start(command, environment)
    try:
        yield window
    finally:
        window.tmux("kill-server")
