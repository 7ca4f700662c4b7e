"""Chats in any usual form → messages, prompts to be answered, and tokens with the spans that the assistant generates.

A span runs from the end of the generation prompt to the end token that closes the turn, both as the chat template
writes them. In ChatML, where the model's end token is <|im_end|>:

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello ! <|im_end|> \\n
                                                                    [─────────────────)
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ptp.config import Turns
from ptp.errors import ConfigError, DataError

Message = dict[str, Any]
"""One message as chat templates take it: "role" and "content", and for some "tool_calls", "reasoning_content", …"""

Range = tuple[int, int]
"""Half-open [start, end), in characters or in tokens."""

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
    "tool": ("tool", "function", "observation", "ipython"),
}
"""Roles as chat templates know them, and the names that datasets give them."""

ROLE_OF_NAME = {name: role for role, names in ROLES.items() for name in names}

ASKING = ("user", "tool")
"""Roles that the assistant answers."""

PRIVATE_USE = range(0xE000, 0xF900)
"""Characters that Unicode gives no meaning, so that no template treats them as anything but content."""

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(DataError):
    """A chat template cannot show one chat; others may still be fine."""


def to_messages(value: object, roles: Mapping[str, str] | None = None) -> list[Message]:
    """The messages of one conversation: OpenAI's, ShareGPT's, or texts in turn, of which the user has the first.

    Role names become those of `ROLES`; `roles` adds names or overrides them. Keys without a value are left out, since
    Arrow fills them in; so are empty tool calls, which templates would write. A content in parts that are all texts
    becomes one text, a line each: not every template reads parts. All other keys are kept.
    Raises `DataError` for an unknown role and for anything else than a list of messages.
    """
    known = {**ROLE_OF_NAME, **{name.lower(): role for name, role in (roles or {}).items()}}
    if unknown := set(known.values()) - set(ROLES):
        raise ConfigError(f"data.roles maps to {unknown.pop()!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"expected a list of messages; got {type(value).__name__}")
    if all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(value)]
    return [_message(turn, number, known) for number, turn in enumerate(value, start=1)]


def _message(turn: object, number: int, known: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping) or not ({"role", "from"} & turn.keys()):
        found = f"keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else type(turn).__name__
        raise DataError(f"message {number}: expected the keys role and content, or from and value; got {found}")
    rest = {key: item for key, item in turn.items() if item is not None and (key != "tool_calls" or item)}
    name = rest.pop("role", None) or rest.pop("from", None)
    role = known.get(str(name).lower())
    if role is None:
        raise DataError(
            f"message {number} has the unknown role {name!r}; known: {', '.join(known)}; map it in data.roles"
        )
    if "content" not in rest and "value" in rest:
        rest = {"content": rest.pop("value"), **rest}
    parts = rest.get("content")
    if isinstance(parts, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        rest["content"] = "\n".join(str(part.get("text")) for part in parts)
    return {"role": role, **rest}


def to_tools(value: object) -> list[dict[str, Any]] | None:
    """Tool definitions as chat templates take them: a list of JSON schemas, or one written as a JSON string.

    None, if there are none. Keys without a value are left out at every depth, since Arrow fills them in.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"tool definitions: not valid JSON ({error.msg})") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"tool definitions: expected a list of JSON objects; got {str(value)[:60]!r}")
    return [_without_nulls(tool) for tool in value]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool, tools: Any = None
) -> str:
    """The chat as the tokenizer's template writes it, special tokens included.

    Raises `DataError` if there is no template, `TemplateError` with the template's words if it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give one with --chat-template FILE")
    # Most templates would write an empty message, or "None".
    if any("content" not in message and "tool_calls" not in message for message in messages):
        raise TemplateError("a message has neither content nor tool calls")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=generation_prompt, tokenize=False
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise TemplateError(f"the chat template refuses the chat: {' '.join(str(error).split())}") from None
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered chat; the template has already written its BOS, if the model has one."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_prompts(messages: Sequence[Message], turns: Turns) -> list[list[Message]]:
    """The beginnings of a chat that wait for an answer: before each assistant turn, and the whole chat if it does.

    A beginning waits for an answer if its last message, system messages aside, is a user's or a tool's.
    """
    ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"] + [len(messages)]
    prompts = [list(messages[:end]) for end in ends if _asks(messages[:end])]
    return prompts[:1] if turns == "first" else prompts


def _asks(messages: Sequence[Message]) -> bool:
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    return bool(spoken) and spoken[-1] in ASKING


def chat_document(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], end_token_ids: Sequence[int], *, tools: Any = None
) -> tuple[list[int], list[Range]]:
    """Token ids of a whole chat, and the token spans that the assistant generates, in order and never empty.

    A span includes the model's end token if one closes the turn, and nothing after it. A token that reaches from the
    generation prompt into the answer is outside, since the model would not generate it. An assistant turn before any
    user or tool message answers nothing and has no span, unless the template marks it.
    Raises `TemplateError` if the template refuses the chat or hides where a turn begins or ends, `DataError` if the
    tokenizer does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed for chats")
    text = render(tokenizer, messages, generation_prompt=False, tools=tools)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    ends = [end for _, end in offsets]
    # Some tokenizers do not count the white space a token begins with.
    begins = [min(begin, before) for (begin, _), before in zip(offsets, [0, *ends[:-1]], strict=True)]
    closings = [(begins[place], ends[place]) for place, token in enumerate(ids) if token in end_token_ids]

    if GENERATION_MARKER.search(tokenizer.get_chat_template(tools=tools)):
        answers = _marked_answers(tokenizer, messages, tools, text, closings)
    else:
        answers = _found_answers(partial(render, tokenizer, tools=tools), messages, text, closings)
    spans = []
    for start, end in answers:
        first, last = bisect_left(begins, start), bisect_left(begins, end)
        while last > first and ends[last - 1] > end:
            last -= 1
        if first < last:
            spans.append((first, last))
    return ids, spans


def _marked_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, text: str, closings: Sequence[Range]
) -> list[Range]:
    """What the template marks as generated, in characters, up to the end token that follows."""
    special: dict[str, Any] = tokenizer.special_tokens_map
    # In characters; transformers' mask of tokens also counts one that only reaches into the answer.
    rendered: Any = render_jinja_template(
        [list(messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **special,
    )
    _, (marked,) = rendered
    return [(start, _closed(text, start, end, closings)) for start, end in marked]


def _found_answers(
    write: Callable[..., str], messages: Sequence[Message], text: str, closings: Sequence[Range]
) -> list[Range]:
    """Where the assistant's turns stand in the text that `write` makes of the chat, in characters."""
    answers = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not any(earlier["role"] in ASKING for earlier in messages[:place]):
            continue
        prompt = write(messages[:place], generation_prompt=True)
        if not text.startswith(prompt):
            raise TemplateError(
                "the chat template rewrites earlier turns as the chat goes on, so answers cannot be found in it; leave "
                "out what it rewrites (system messages with --drop-system, reasoning) or choose mode prompt-distill"
            )
        start = len(prompt)
        if "tool_calls" in message:
            # Every template writes calls in its own way; their end token comes before the next message's content.
            limit = len(text) if place + 1 == len(messages) else _edge(write, messages, place + 1, text, "start")
            end = next((end for begin, end in closings if start <= begin < limit), -1)
            if end < 0:
                raise TemplateError("no end token of the model closes a tool call in the chat template")
        else:
            end = _closed(text, start, _edge(write, messages, place, text, "end"), closings)
        answers.append((start, end))
    return answers


def _edge(
    write: Callable[..., str], messages: Sequence[Message], place: int, text: str, edge: Literal["start", "end"]
) -> int:
    """Where a message's content starts or ends in the text of the chat: seen by putting another content in its place.

    To search for the content would not do: it may stand elsewhere too, be trimmed, or be empty.
    """
    mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in text)
    marked = [*messages[:place], {**messages[place], "content": mark}, *messages[place + 1 :]]
    before, found, after = write(marked, generation_prompt=False).partition(mark)
    # Only the side asked for: a template may take reasoning out of a content and write it before.
    if not found or not (text.startswith(before) if edge == "start" else text.endswith(after)):
        raise TemplateError("the chat template does not show where a message stands; choose mode prompt-distill")
    return len(before) if edge == "start" else len(text) - len(after)


def _closed(text: str, start: int, end: int, closings: Sequence[Range]) -> int:
    """The end of the answer text[start:end] with the end token that is its last or follows it, white space aside."""
    bare = start + len(text[start:end].rstrip())
    begin, closed = next(((b, e) for b, e in closings if b >= start and e >= bare), (end, end))
    return end if text[bare:begin].strip() else closed
