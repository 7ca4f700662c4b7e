"""The text of tokens as they come."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ptp.errors import DataError

INVALID_PREFIX = "Invalid prefix"
"""How `DecodeStream` says that bytes which had been letters have become none by those behind them."""


class TokenTexts:
    """What each token adds to a text. A character of several tokens comes with its last; special tokens add nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} cannot decode a text as it comes; a fast tokenizer is needed")
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.shown = ""
        self._stream = DecodeStream(skip_special_tokens=True)

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token: int) -> str:
        """What one more token adds."""
        self.token_ids.append(token)
        try:
            piece = self._stream.step(self.tokenizer.backend_tokenizer, token)
        except Exception as error:  # the library has no class of its own for it
            if not str(error).startswith(INVALID_PREFIX):
                raise
            # Only in a text that is none, as an untrained model's.
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self.tokenizer.backend_tokenizer, token)
        self.shown += piece or ""
        return piece or ""

    def rest(self) -> str:
        """What is held back when no more tokens come: bytes that are no whole character."""
        text = self.text
        return text[len(self.shown) :] if text.startswith(self.shown) else ""
