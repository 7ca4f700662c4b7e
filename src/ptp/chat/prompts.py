"""Messages to the tokens that ask for the next answer, in the model's chat template or as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ptp.data.chats import Message, TemplateError, encode, render
from ptp.errors import ConfigError, DataError


def user(text: str) -> Message:
    """What a user says, without the white space around it. Raises `DataError` if it is nothing."""
    if not text.strip():
        raise DataError("the prompt is empty; give some text to answer")
    return {"role": "user", "content": text.strip()}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], known: Sequence[int] = ()) -> list[int]:
    """Token ids that ask for the answer to a chat.

    known: the tokens of the chat up to the last answer, as they were read and written. Where the chat begins with
    their text, they stay as they are: a model's tokens need not be those that the tokenizer makes of its text, and keys
    that are cached serve only for the same ones. Raises `TemplateError` if the template refuses the chat.
    """
    whole = encode(tokenizer, render(tokenizer, messages, generation_prompt=True))
    if not known:
        return whole
    # Both decoded: what a tokenizer adds or drops, as a space at the beginning, is then the same.
    before, text = _decoded(tokenizer, known), _decoded(tokenizer, whole)
    if not text.startswith(before):
        return whole
    continued = [*known, *encode(tokenizer, text[len(before) :])]
    return continued if _decoded(tokenizer, continued) == text else whole


def check_system(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Raises `ConfigError` if the chat template has no place for a system message."""
    question = [user("?")]
    try:
        with_it = render(tokenizer, [system(text), *question], generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(f"{error}; the system message stays what it was") from None
    if with_it == render(tokenizer, question, generation_prompt=True):
        raise ConfigError("/system has no effect: this model's chat template leaves system messages out")


def system(text: str) -> Message:
    """What the model is told before the chat."""
    return {"role": "system", "content": text}


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
