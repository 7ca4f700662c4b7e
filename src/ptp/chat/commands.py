"""The commands of a chat: a line that begins with a slash."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path

from ptp.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """argument: what may stand behind the name, empty if nothing may."""

    name: str
    argument: str
    meaning: str


COMMANDS = (
    Command("reset", "", "begin a new chat; system message and settings stay"),
    Command("system", "TEXT", "tell the model something before the chat; - for nothing, alone to see it"),
    Command("set", "NAME VALUE", "change how answers are written; alone to see all settings"),
    Command("stats", "", "what the chat has cost so far, and what it is compared with"),
    Command("colour", "", "colour tokens by the call that wrote them, or leave it"),
    Command("save", "[--overwrite] FILE", "write the chat into a file, as OpenAI's messages in JSON"),
    Command("help", "", "show this"),
    Command("exit", "", "leave; so does Ctrl-D"),
)

ALSO = {"color": "colour", "quit": "exit"}


def parse(line: str) -> tuple[str, str] | None:
    """(name, argument) of a command, None for a line that is none. Raises `ConfigError` for one that does not exist."""
    if not line.startswith("/"):
        return None
    word, *rest = line[1:].split(maxsplit=1) or [""]
    name, argument = ALSO.get(word, word), "".join(rest).strip()
    known = {command.name: command for command in COMMANDS}
    if name not in known:
        near = difflib.get_close_matches(word, [*known, *ALSO], n=1, cutoff=0.5)
        hint = (
            f"did you mean /{near[0]}?" if near else "see /help; a message that begins with / needs a space before it"
        )
        raise ConfigError(f"unknown command /{word}; {hint}")
    if argument and not known[name].argument:
        raise ConfigError(f"/{name} takes nothing behind it; got {argument!r}")
    return name, argument


def parse_save(argument: str) -> tuple[Path, bool]:
    """(file, whether one that is there may go) of what stands behind `/save`."""
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise ConfigError(f"/save: {str(error).lower()} in {argument!r}") from None
    files = [word for word in words if word != "--overwrite"]
    if len(files) != 1:
        raise ConfigError(f"/save takes one file name, in quotes if it has spaces; got {argument or 'none'}")
    return Path(files[0]).expanduser(), len(words) > 1
