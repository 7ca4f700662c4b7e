"""Write docs/cli.md from the program's own help: `python docs/make_cli.py`; `--check` only compares.

The help is rendered without rich's boxes and colours, at a fixed width, so that it reads the same in any terminal.
Other versions of typer may word it slightly differently; the page names the one it was made with.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from ptp.cli.main import app

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
WIDTH = 100


def commands() -> dict[str, Any]:
    """Every command by what one types: "ptp", "ptp demo", …, "ptp_train", …"""
    group = get_command(app)
    found = {"ptp": group, **{f"ptp {name}": command for name, command in group.commands.items()}}
    aliases = (script for script in scripts() if script != "ptp")
    return found | {alias: found[alias.replace("_", " ")] for alias in aliases}


def scripts() -> list[str]:
    """Programs that the package installs."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"])


def help_text(name: str) -> str:
    """The help of a command in plain text."""
    command = commands()[name]
    command.rich_markup_mode = None
    context = command.context_class(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return command.get_help(context).rstrip()


def page() -> str:
    """The whole of docs/cli.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Commands"
    yield ""
    yield f"<!-- Written by docs/make_cli.py with typer {typer.__version__}. Do not edit. -->"
    yield ""
    yield "Results go to standard output; progress and notes go to standard error. Exit code 0: done. 1: `ptp verify`,"
    yield "`ptp bench` or `ptp demo` found a text that differs from plain decoding. 2: the input was wrong, said in one"
    yield "line."
    for name in commands():
        if name in scripts() and name != "ptp":
            continue
        yield from ("", f"## {name}", "")
        alias = name.replace(" ", "_")
        if alias != name and alias in scripts():
            yield from (f"Also installed as `{alias}`.", "")
        yield from ("```text", help_text(name), "```")


def main() -> None:
    """Write the page, or say that it has drifted."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/cli.md differs from the program's help; run python docs/make_cli.py")


if __name__ == "__main__":
    main()
