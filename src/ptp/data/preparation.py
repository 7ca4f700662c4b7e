"""Rows of a dataset → documents: prompts to be answered, chats with assistant turns to learn, texts to learn.

A row that gives nothing (too long, empty, refused by the chat template) is left out and counted by its reason. What
says that the settings do not fit the data, such as a missing column or an unknown role, is a `DataError`.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ptp.config import DataConfig
from ptp.data.chats import TemplateError, chat_document, chat_prompts, encode, render, to_messages, to_tools
from ptp.data.documents import Document, Span, content_group
from ptp.errors import DataError

Row = Mapping[str, Any]

BATCH_CHARACTERS = 1 << 20
"""Texts of so many characters go to the tokenizer together: it works on them in parallel, but hands out lists."""


@dataclass
class Preparation:
    """How rows become documents, and how many did not.

    max_tokens: longer prompts are left out, longer chats cut off, longer texts cut into pieces. end_token_ids: the
    model's. left_out: counts by reason, filled as documents are made.
    """

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    end_token_ids: Sequence[int]
    left_out: Counter[str] = field(default_factory=Counter)

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        """Documents of all rows, in order; prompts have no trained span. Raises `DataError` as the module says."""
        numbered = enumerate(rows, start=1)
        made = {
            "prompt-scheme-distill": self._scheme_prompts,
            "prompt-distill": self._chat_prompts,
            "full-chat": self._chats,
            "fixed": self._texts,
        }[self.data.mode](numbered)
        # A prompt keeps its number whether or not others before it are left out.
        for number, document in enumerate(made):
            if document is not None:
                last = document.spans[-1][1] - 1 if document.spans else -1
                finished = last >= 0 and int(document.ids[last]) in self.end_token_ids
                yield replace(document, number=number, finished=finished)

    def _scheme_prompts(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Document | None]:
        scheme = self.data.prompt_scheme
        if isinstance(scheme, str):
            texts = (fill(scheme, row, number) for number, row in rows)
            for text, ids in self._encoded(texts):
                yield self._prompt(ids, text)
            return
        for number, row in rows:
            turns = [{"role": turn.role, "content": fill(turn.content, row, number)} for turn in scheme]
            yield self._chat_prompt(turns, _content(turns), tools=None)

    def _chat_prompts(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Document | None]:
        for number, row in rows:
            messages = self._messages(row, number)
            prompts = chat_prompts(messages, self.data.turns)
            if not prompts:
                self.left_out["nothing to answer"] += 1
            for prompt in prompts:
                yield self._chat_prompt(prompt, _content(messages), self._tools(row, number))

    def _chat_prompt(self, turns: list[dict[str, Any]], content: str, tools: Any) -> Document | None:
        """The prompt that a chat's turns make; an assistant's turn at its end is left open."""
        before, opening = turns, ""
        if turns and turns[-1]["role"] == "assistant":
            before, opening = turns[:-1], turns[-1]["content"]
        try:
            text = render(self.tokenizer, before, generation_prompt=True, tools=tools) + opening
        except TemplateError as error:
            self.left_out[str(error)] += 1
            return None
        return self._prompt(encode(self.tokenizer, text), content)

    def _prompt(self, ids: Sequence[int], content: str) -> Document | None:
        if not 0 < len(ids) <= self.max_tokens:
            self.left_out[f"longer than {self.max_tokens} tokens" if ids else "empty"] += 1
            return None
        return Document(np.asarray(ids, np.int32), (), group=content_group(content))

    def _chats(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Document | None]:
        for number, row in rows:
            messages = self._messages(row, number)
            try:
                ids, spans = chat_document(self.tokenizer, messages, self.end_token_ids, tools=self._tools(row, number))
            except TemplateError as error:
                self.left_out[str(error)] += 1
                continue
            kept = cut_spans(spans, self.max_tokens)
            if not kept:
                self.left_out["no assistant turn" + (f" in {self.max_tokens} tokens" if spans else "")] += 1
                continue
            group = content_group(_content(messages))
            yield Document(np.asarray(ids[: self.max_tokens], np.int32), kept, group=group)

    def _texts(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Document | None]:
        texts = (self._text(row, number) for number, row in rows)
        for text, encoded in self._encoded(texts):
            ids = [*encoded, *self._end_token(encoded)] if text else []
            if len(ids) < 2:
                self.left_out["empty"] += 1
                continue
            for begin in range(0, len(ids), self.max_tokens):
                piece = np.asarray(ids[begin : begin + self.max_tokens], np.int32)
                # Pieces are held out one by one: a data set may be a single book.
                yield Document(piece, ((1, len(piece)),), group=content_group(piece.tobytes().hex()))

    def _text(self, row: Row, number: int) -> str:
        value = column(row, self.data.column, number)
        if not isinstance(value, str | None):
            raise DataError(f"row {number}: column '{self.data.column}' holds {type(value).__name__}; expected text")
        return value or ""

    def _end_token(self, ids: Sequence[int]) -> Sequence[int]:
        """What is to be added to a text for it to end as the model ends one."""
        if not self.end_token_ids or (ids and ids[-1] in self.end_token_ids):
            return ()
        own = self.tokenizer.eos_token_id
        return (own if own in self.end_token_ids else self.end_token_ids[0],)

    def _encoded(self, texts: Iterator[str]) -> Iterator[tuple[str, list[int]]]:
        for batch in batches(texts, BATCH_CHARACTERS):
            # Not verbose: that texts are longer than the model's context is no matter, they are cut.
            encoded = self.tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
            yield from zip(batch, encoded, strict=True)

    def _messages(self, row: Row, number: int) -> list[dict[str, Any]]:
        cell = column(row, self.data.column, number)
        try:
            messages = to_messages([] if cell is None else cell, self.data.roles)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
        return [message for message in messages if not (self.data.drop_system and message["role"] == "system")]

    def _tools(self, row: Row, number: int) -> Any:
        if self.data.tools is None:
            return None
        cell = column(row, self.data.tools, number, "data.tools")
        try:
            return to_tools(cell)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None


def column(row: Row, name: str, number: int, setting: str = "data.column") -> Any:
    """A row's value in the column that a setting names. Raises `DataError` naming the columns there are."""
    if name not in row:
        raise DataError(f"row {number} has no column '{name}' ({setting}); it has: {', '.join(sorted(row))}")
    return row[name]


def fill(scheme: str, row: Row, number: int) -> str:
    """A prompt scheme, a format string over the columns, filled with a row; a cell without a value is empty text."""
    try:
        return _Cells().vformat(scheme, (), {name: "" if cell is None else cell for name, cell in row.items()})
    except KeyError as missing:
        columns = ", ".join(sorted(row))
        raise DataError(f"row {number} has no column {missing} for the prompt scheme; it has: {columns}") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise DataError(f"the prompt scheme {scheme!r} is not a format string over the columns: {error}") from None


class _Cells(string.Formatter):
    """Fills in what a row holds; attributes lead from a cell to the program, which a scheme has no business with."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if "." in re.sub(r"\[[^]]*\]", "", field_name):
            raise ValueError(f"{{{field_name}}} asks for an attribute; parts of a cell are written {{column[part]}}")
        return super().get_field(field_name, args, kwargs)


def described(left_out: Counter[str]) -> str:
    """Reasons and counts in one line."""
    return "; ".join(f"{count:,} {reason}" for reason, count in left_out.most_common()) or "none"


def batches(texts: Iterable[str], num_characters: int) -> Iterator[list[str]]:
    """Texts in lists of at least so many characters together, but for the last."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= num_characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def cut_spans(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The parts of spans before `length`."""
    return tuple((first, min(last, length)) for first, last in spans if first < length)


def _content(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a chat says, for its group; data sets put times and the like beside what is said."""
    return json.dumps(messages, sort_keys=True, default=str)
