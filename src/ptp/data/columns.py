"""What a dataset holds, seen from its column names and some of its rows, and what to do with it by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from ptp.config import Mode
from ptp.data.chats import ROLE_OF_NAME
from ptp.errors import DataError

USER_TURNS = "turns"
"""A list of strings under this name holds the user's turns only (MT-bench, Spec-Bench), not alternating ones."""

CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", USER_TURNS, "data")
"""Usual names of a column of chats, the best first."""

PROMPT_NAMES = ("prompt", "question", "instruction", "problem", "query")
TEXT_NAMES = (
    *PROMPT_NAMES,
    *("text", "content", "document", "article", "story", "body", "code", "description", "input", "sentence"),
)
"""Usual names of columns of prompts and of texts, the best first. Prompts come first: beside a question, "text" mostly
holds the whole example with its answer."""

FIRST_MESSAGE = {"messages": "[0][content]", "sharegpt": "[0][value]", "alternating": "[0]"}
"""Kinds of chats, and how a prompt scheme takes the text of the first message from each."""

TOOL_NAMES = ("tools", "functions")
"""Usual names of a column of tool definitions."""

LONG_TEXT = 2000
"""Median number of characters above which texts are documents to learn rather than prompts to answer."""


@dataclass(frozen=True)
class Shape:
    """What a dataset holds.

    kind: chats as OpenAI "messages", "sharegpt" or "alternating" strings; a "text" column; or several "columns", none
    of them obviously the text. column: that of the chats or the text. columns: what holds text and may stand in a
    prompt scheme, the best first; of a column of string lists that is the first string, written "turns[0]". roles:
    role names as they occur. has_assistant: whether the assistant speaks in a chat. tools: the column of tool
    definitions. long: whether the text column holds documents rather than prompts.
    """

    kind: Literal["messages", "sharegpt", "alternating", "text", "columns"]
    column: str | None
    columns: tuple[str, ...]
    roles: tuple[str, ...] = ()
    has_assistant: bool = False
    tools: str | None = None
    long: bool = False


def recognise(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> Shape:
    """The shape of a dataset with such columns and rows. Raises `DataError` if none holds chats or text."""
    values = {column: [row.get(column) for row in rows] for column in columns}
    texts = _texts(values)
    names = tuple(sorted(texts, key=lambda name: (_rank(name, TEXT_NAMES), -_length(texts[name]))))
    for column in sorted(columns, key=lambda column: _rank(column, CHAT_NAMES)):
        if (kind := _chat_kind(column, values[column])) is None:
            continue
        roles = _roles(values[column], "role" if kind == "messages" else "from")
        speaks = kind == "alternating" or any(ROLE_OF_NAME.get(role.lower()) == "assistant" for role in roles)
        tools = next((name for name in columns if name.lower() in TOOL_NAMES and any(values[name])), None)
        return Shape(kind, column, names, roles, speaks, tools)
    if not names:
        found = ", ".join(f"{column} ({_type(values[column])})" for column in columns)
        raise DataError(f"no column holds chats or text; columns: {found or 'none'}")
    best = names[0]
    if best not in columns or (len(names) > 1 and best.lower() not in TEXT_NAMES):
        return Shape("columns", None, names)
    return Shape("text", best, names, long=best.lower() not in PROMPT_NAMES and _length(texts[best]) > LONG_TEXT)


def default_mode(shape: Shape) -> Mode:
    """The base model answers chats and prompts; documents are learnt as they are."""
    if shape.kind in FIRST_MESSAGE:
        return "prompt-distill"
    return "fixed" if shape.long else "prompt-scheme-distill"


def default_scheme(shape: Shape) -> str:
    """A prompt scheme to begin with: the best text column, or the first message of chats."""
    if shape.kind in FIRST_MESSAGE:
        return "{" + f"{shape.column}{FIRST_MESSAGE[shape.kind]}" + "}"
    if {"instruction", "input"} <= set(shape.columns):
        # Alpaca's form: the input is what the instruction speaks of.
        return "{instruction}\n\n{input}"
    return "{" + shape.columns[0] + "}"


def _texts(values: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """The texts of every column that holds some, by what a prompt scheme calls them."""
    found = {}
    for column, cells in values.items():
        texts = [cell for cell in cells if isinstance(cell, str)]
        if any(text.strip() for text in texts) and len(texts) == sum(cell is not None for cell in cells):
            found[column] = texts
        elif cells and all(isinstance(cell, list) and cell and _all_strings(cell) for cell in cells):
            found[f"{column}[0]"] = [cell[0] for cell in cells]
    return found


def _chat_kind(column: str, cells: Sequence[Any]) -> Literal["messages", "sharegpt", "alternating"] | None:
    chats = [cell for cell in cells if cell is not None]
    if not any(chats) or not all(isinstance(chat, list) for chat in chats):
        return None
    turns = [turn for chat in chats for turn in chat]
    if _all_strings(turns):
        return "alternating" if column.lower() in CHAT_NAMES and column.lower() != USER_TURNS else None
    if not all(isinstance(turn, Mapping) for turn in turns):
        return None
    if all(turn.get("role") is not None for turn in turns):
        return "messages"
    return "sharegpt" if all(turn.get("from") is not None for turn in turns) else None


def _roles(chats: Sequence[Any], key: str) -> tuple[str, ...]:
    """Role names in order of appearance."""
    turns = [turn for chat in chats for turn in chat or () if isinstance(turn, Mapping)]
    return tuple(dict.fromkeys(str(turn[key]) for turn in turns))


def _all_strings(parts: Sequence[object]) -> bool:
    return all(isinstance(part, str) for part in parts)


def _rank(name: str, known: Sequence[str]) -> int:
    return known.index(name.lower()) if name.lower() in known else len(known)


def _length(texts: Sequence[str]) -> float:
    return median(len(text) for text in texts)


def _type(cells: Sequence[object]) -> str:
    return next((type(cell).__name__ for cell in cells if cell is not None), "empty")
