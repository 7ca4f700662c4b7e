"""A chat with a model, or texts completed one by one: what is said, how, and the session that writes it.

    text ── prompt_ids: template ──► tokens ── request: settings ──► session ── step ──► pieces of verified text
              ▲                                                                              │
              └────────────────────────── messages, tokens as they are ◄─────────────────────┘

The tokens of an answer stay as the model wrote them, so the keys of all turns before serve in the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ptp.chat.figures import Figures, Turn, plain_speed
from ptp.chat.prompts import check_system, prompt_ids, system, user
from ptp.chat.settings import Settings
from ptp.data.chats import Message
from ptp.decoding.decoder import Decoder
from ptp.decoding.session import Step
from ptp.decoding.verification import num_common
from ptp.errors import ConfigError, DataError, DecodingError
from ptp.evaluation.colour import Piece
from ptp.files import write_atomically
from ptp.layer_kinds import context_length
from ptp.model.ptp_model import PTPModel
from ptp.streaming import TextStream


def never() -> bool:
    """Nobody stops the answer."""
    return False


class Chat:
    """What has been said, and how the next answer is written.

    templated: whether texts are a user's turns in the tokenizer's chat template; else each is completed by itself.
    turns: the answers so far. plain_speed: tokens per second of plain decoding, once measured.

    Answer n of a chat (from 0) is the sequence n of the seed, so the same texts under the same settings give the same
    chat, and no two answers share a u.
    """

    def __init__(
        self, model: PTPModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, templated: bool
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} cannot decode a text as it comes; a fast tokenizer is needed")
        self.model, self.tokenizer, self.templated = model, tokenizer, templated
        self.system: str | None = None
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self.plain_speed: float | None = None
        self.settings = settings
        self._check(settings)
        # Each request says its rule.
        self.decoder = Decoder(model, budget=settings.budget)
        self.session = self.decoder.session(1)

    @property
    def context(self) -> int | None:
        """Tokens that the model's context holds, if its configuration says so."""
        return context_length(self.model.base_model.config)

    @property
    def is_full(self) -> bool:
        """Whether the last answer reached the end of the context."""
        if not self.turns or self.context is None:
            return False
        return len(self.turns[-1].request.prompt_ids) + len(self.turns[-1].token_ids) >= self.context

    def answer(self, text: str, stopped: Callable[[], bool] = never) -> Generator[Piece]:
        """Write the answer to a text: verified tokens, as each call settles them.

        stopped: asked before each call; if so, what is written stays as the answer. It also stays where a call fails
        or is broken off (Ctrl-C), with its cache given up. Where no token was written, the text was never said.
        Raises `DecodingError` if the context has no room, `TemplateError` if the template refuses the chat.
        """
        ids = self._prompt_ids(text)
        request = self.settings.request(self.model.base_model, self.tokenizer, ids, sequence=len(self.turns))
        # A completion goes on from its prompt, an answer begins anew: with or without a space.
        stream = TextStream(self.tokenizer.backend_tokenizer, () if self.templated else ids)
        steps, seconds, shown = list[Step](), list[float](), list[Piece]()
        num_reused = num_common(self.session.kept[0], ids[:-1])
        try:
            begun = time.perf_counter()
            entered = self.session.enter(request)
            while not stopped():
                ((_, step),) = self.session.step()
                seconds.append(time.perf_counter() - begun)
                steps.append(step)
                for index, token in enumerate(step.token_ids):
                    for piece in stream.push(token, len(steps), index < step.num_accepted):
                        shown.append(piece)
                        yield piece
                if step.finish_reason is not None:
                    break
                begun = time.perf_counter()
            else:
                self.session.leave(entered)
            for piece in stream.end(len(steps), accepted=False):
                shown.append(piece)
                yield piece
        except BaseException:
            self.session = self.decoder.session(1)
            raise
        finally:
            if steps:
                self.turns.append(Turn(request, steps, seconds, num_reused))
                self.messages += [user(text) if self.templated else {"role": "user", "content": text}]
                self.messages += [{"role": "assistant", "content": "".join(piece.text for piece in shown)}]

    def _prompt_ids(self, text: str) -> list[int]:
        if not self.templated:
            return list(self.tokenizer(text)["input_ids"])
        known = [*self.turns[-1].request.prompt_ids, *self.turns[-1].token_ids] if self.turns else []
        before = [] if self.system is None else [system(self.system)]
        ids = prompt_ids(self.tokenizer, [*before, *self.messages, user(text)], known)
        if self.context is not None and len(ids) >= self.context:
            raise DecodingError(
                f"the chat would be {len(ids)} tokens long, and the model's context is {self.context}: "
                f"{'/reset begins a new one' if self.turns else 'shorten the message'}"
            )
        return ids

    def measure_plain_speed(self) -> None:
        """Time plain decoding behind the last prompt, unless it has been timed under these settings."""
        if self.plain_speed is None and self.turns:
            request = self.turns[-1].request
            self.plain_speed = plain_speed(self.model.base_model, request, self.settings.rule)

    def reset(self) -> None:
        """Begin a new chat. System message and settings stay, and so does what was measured."""
        self.messages, self.turns = [], []

    def tell(self, text: str | None) -> None:
        """Set the system message, which holds for the whole chat from now on, or take it away."""
        if not self.templated:
            raise ConfigError("/system has no effect: texts are completed as they are, without a chat template")
        if text is not None:
            check_system(self.tokenizer, text)
        self.system = text

    def set(self, name: str, value: str) -> None:
        """Change a setting. Raises `ConfigError` or `DecodingError` for one that cannot be; then nothing changes."""
        settings = self.settings.changed(name, value)
        self._check(settings)
        if settings.budget != self.settings.budget:
            self.decoder = Decoder(self.model, budget=settings.budget)
            self.session = self.decoder.session(1)
        self.settings, self.plain_speed = settings, None

    def _check(self, settings: Settings) -> None:
        settings.request(self.model.base_model, self.tokenizer, [0])

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the chat as OpenAI's messages, {"messages": [{"role": …, "content": …}, …]}: a data set of one row."""
        if not self.messages:
            raise DataError("there is nothing to save yet")
        if not path.parent.is_dir():
            raise DataError(f"there is no directory {path.parent} to save {path.name} in")
        if path.exists() and not (overwrite and path.is_file()):
            hint = "; /save --overwrite replaces it" if path.is_file() else " and no file"
            raise DataError(f"{path} is there already{hint}")
        before = [] if self.system is None else [system(self.system)]
        chat = json.dumps({"messages": [*before, *self.messages]}, ensure_ascii=False) + "\n"
        write_atomically(path, chat.encode("utf-8", errors="replace"))

    @property
    def figures(self) -> Figures:
        """Of all answers since the chat began."""
        return Figures.of(self.turns)
