"""A text as it is written: characters that are whole, up to where a stop string may have begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ptp.evaluation.colour import Piece

CONTEXT = 6
"""Last tokens of a prompt that tell how the first token behind it reads, such as with or without a space."""


class TextStream:
    """Turns a text's tokens into the pieces that may be shown, none of which is ever taken back.

    A character waits for its last byte, and what may be the beginning of a stop string for what follows. A stop string
    ends the text, and neither it nor anything behind is shown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.decoding = self._decoding(prompt_ids)
        self.incomplete: list[int] = []
        self.held: list[Piece] = []
        self.num_characters = 0
        self.is_stopped = False

    def push(self, token: int, call: int, accepted: bool) -> list[Piece]:
        """Add a token; what may be shown now. call, accepted: see `ptp.evaluation.colour.Piece`."""
        self.incomplete.append(token)
        try:
            text = self.decoding.step(self.tokenizer, token)
        except Exception:  # the library has no class of its own for it
            # Some decoders, such as WordPiece's, write a token otherwise once they see the next.
            self.decoding = self._decoding(())
            text = self.decoding.step(self.tokenizer, token)
        if text is None:
            return []
        self.incomplete = []
        return self._show(Piece(text, call, accepted))

    def end(self, call: int, accepted: bool) -> list[Piece]:
        """What is left when no token comes any more: all that was held, half a character as the tokenizer has it."""
        rest = self.tokenizer.decode(self.incomplete, skip_special_tokens=True)
        shown = self._show(Piece(rest, call, accepted)) if rest else []
        if not self.is_stopped:
            shown += self.held
        self.held = []
        return shown

    def _show(self, piece: Piece) -> list[Piece]:
        self.num_characters += len(piece.text)
        self.held.append(piece)
        text = "".join(held.text for held in self.held)
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        self.is_stopped = bool(places)
        num_shown = min(places) if places else len(text) - self._num_open(text)
        shown = list(_cut(self.held, 0, num_shown))
        self.held = [] if places else list(_cut(self.held, num_shown, len(text)))
        return shown

    def _num_open(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)

    def _decoding(self, prompt_ids: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=list(prompt_ids[-CONTEXT:]), skip_special_tokens=True)


def _cut(pieces: Sequence[Piece], start: int, end: int) -> Iterator[Piece]:
    """The characters [start, end) of pieces that are read as one text."""
    for piece in pieces:
        part = piece.text[max(0, start) : max(0, end)]
        if part:
            yield Piece(part, piece.call, piece.accepted)
        start, end = start - len(piece.text), end - len(piece.text)
