"""The pages of the documentation: their blocks, spans and commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "docs", "paper-checkpoints", "src/ptp/starter")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def load_script(name: str, folder: str = "docs") -> Any:
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page.read_text(encoding="utf-8")))


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks in these languages."""
    return [code for language, code in fenced(page.read_text(encoding="utf-8")) if language in languages]


@dataclass(frozen=True)
class Command:
    """A program and its arguments. output: the file that its standard output goes to."""

    words: tuple[str, ...]
    output: str | None = None


def commands(shell: str) -> Iterator[Command]:
    """The commands of a block, in order; all that a page may use of a shell are comments, `\\` at line ends and `>`."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        if ">" in words[-2:-1]:
            yield Command(tuple(words[:-2]), words[-1])
        elif words:
            assert not {"|", "||", "&", "&&", ";", "<", ">"} & set(words), f"write it as simple commands: {line}"
            yield Command(tuple(words))
