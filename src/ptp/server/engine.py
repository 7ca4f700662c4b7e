"""Continuous batching: a thread that owns a decoding session, and answers whoever asks as slots become free.

    submit ──► waiting ── a slot is free ──► session ── step ──► listener(Call), one for each call, the last with totals
    cancel ──────┴────────────────────────────┘   └─ failed ──► listener(Failure), for the texts concerned

Whatever a listener is told is told on this thread; it must not wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from ptp.decoding.call import Text
from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import Request
from ptp.decoding.session import Step
from ptp.decoding.verification import Logprobs
from ptp.evaluation.colour import Piece
from ptp.server.metrics import Metrics
from ptp.streaming import TextStream

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """So many answers are open that no more can wait."""


class Closing(Exception):
    """The server is shutting down."""


@dataclass(frozen=True)
class Token:
    """A verified token. offset: characters of the text before it. logprobs: where the request asks for them."""

    id: int
    offset: int
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Totals:
    """Of a finished text. seconds: from its slot to its last token. tokens_per_second: behind its first call.

    tokens_per_second is None for a text of one call.
    """

    num_tokens: int
    num_calls: int
    num_draft_tokens: int
    num_accepted_tokens: int
    seconds: float
    tokens_per_second: float | None

    @property
    def tokens_per_call(self) -> float:
        return self.num_tokens / self.num_calls


@dataclass(frozen=True)
class Call:
    """What one model call adds to a text. pieces: what may be shown now; of a held-back text, later than its tokens.

    num_drafts, num_accepted: draft tokens verified, and accepted. finish_reason, totals: of a text's last call.
    """

    pieces: list[Piece]
    tokens: list[Token]
    num_drafts: int
    num_accepted: int
    finish_reason: str | None = None
    totals: Totals | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Failure:
    """A text ends without an answer. is_closing: because the server shuts down, else because a call failed."""

    is_closing: bool = False


Listener = Callable[[Call | Failure], None]


class Answer:
    """A request that waits or is being answered. stop: strings that end its text."""

    def __init__(self, request: Request, stop: Sequence[str], listener: Listener) -> None:
        self.request, self.stop, self.listener = request, stop, listener
        self.is_cancelled = False
        self.stream: TextStream | None = None
        self.arrived = time.perf_counter()
        self.entered = self.first_call_ended = 0.0
        self.num_first = self.num_tokens = self.num_calls = self.num_draft_tokens = self.num_accepted_tokens = 0

    def add(self, step: Step) -> Call:
        """What a step makes of the text; tokens behind a stop string do not count."""
        assert self.stream is not None
        self.num_calls += 1
        pieces: list[Piece] = []
        tokens: list[Token] = []
        for place, token in enumerate(step.token_ids):
            told = step.logprobs[place] if step.logprobs else None
            tokens.append(Token(token, self.stream.num_characters, told))
            pieces += self.stream.push(token, self.num_calls, place < step.num_accepted)
            if self.stream.is_stopped:
                break
        finish_reason = step.finish_reason
        if finish_reason and not self.stream.is_stopped:
            pieces += self.stream.end(self.num_calls, len(step.token_ids) <= step.num_accepted)
        if self.stream.is_stopped:
            finish_reason = "stop"
        num_accepted = min(step.num_accepted, len(tokens))
        self.num_tokens += len(tokens)
        self.num_draft_tokens += step.num_drafts
        self.num_accepted_tokens += num_accepted
        now = time.perf_counter()
        if self.num_calls == 1:
            self.num_first, self.first_call_ended = self.num_tokens, now
        totals = self._totals(now) if finish_reason else None
        return Call(pieces, tokens, step.num_drafts, num_accepted, finish_reason, totals)

    def _totals(self, now: float) -> Totals:
        num_later = self.num_tokens - self.num_first
        return Totals(
            num_tokens=self.num_tokens,
            num_calls=self.num_calls,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            seconds=now - self.entered,
            tokens_per_second=num_later / (now - self.first_call_ended) if num_later else None,
        )


class Engine:
    """Answers up to `num_slots` requests at a time while up to `max_waiting` others wait."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, metrics: Metrics, num_slots: int = 8, max_waiting: int = 64
    ) -> None:
        self.decoder, self.tokenizer, self.metrics = decoder, tokenizer, metrics
        self.num_slots, self.max_open = num_slots, num_slots + max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._running: dict[Text, Answer] = {}
        self._num_open = 0
        self._is_closing = self._is_stopped = False
        self._session = decoder.session(num_slots)
        self._thread = threading.Thread(target=self._run, name="ptp-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def num_open(self) -> int:
        """Answers that wait or are in the making."""
        return self._num_open

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take no more requests and give those up that wait; texts in the making go on. May be called by a signal."""
        self._is_closing = True

    def stop(self) -> None:
        """Give up all that is open, and end the thread."""
        self._is_closing = self._is_stopped = True
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check_room(self, num_answers: int = 1) -> None:
        """Raises `QueueFull` or `Closing` if so many answers would not be taken now."""
        if self._is_closing:
            raise Closing
        if self._num_open + num_answers > self.max_open:
            raise QueueFull

    def submit(self, answers: Sequence[Answer]) -> None:
        """Take all of them, or none: raises `QueueFull` or `Closing`."""
        with self._changed:
            self.check_room(len(answers))
            self._num_open += len(answers)
            self._waiting.extend(answers)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Give up those that are still open; their slots are free from the next call on, and nothing more is told."""
        with self._changed:
            for answer in answers:
                answer.is_cancelled = True
            self._changed.notify()

    def _run(self) -> None:
        while self._has_work():
            try:
                self._give_up_cancelled()
                self._admit()
                if self._running:
                    self._step()
            except Exception:
                logger.exception("the engine failed; all texts in the making are given up")
                for text in list(self._running):
                    self._end(text, "error", Failure())
                self._session = self.decoder.session(self.num_slots)
        self._close_all([*self._running.values(), *self._waiting])

    def _has_work(self) -> bool:
        """Wait for something to do; False when the thread is to end."""
        with self._changed:
            while not (self._waiting or self._running or self._is_stopped):
                self._changed.wait()
            return not self._is_stopped

    def _give_up_cancelled(self) -> None:
        for text in [text for text, answer in self._running.items() if answer.is_cancelled]:
            self._session.leave(text)
            self._end(text, "abort")
        with self._changed:
            gone = [answer for answer in self._waiting if answer.is_cancelled or self._is_closing]
            self._waiting = deque(answer for answer in self._waiting if answer not in gone)
        self._close_all(gone)

    def _admit(self) -> None:
        while self._waiting and not self._session.is_full:
            with self._changed:
                answer = self._waiting.popleft()
                self.metrics.waiting.set(len(self._waiting))
            answer.entered = time.perf_counter()
            try:
                answer.stream = TextStream(self.tokenizer, answer.request.prompt_ids, answer.stop)
                self._running[self._session.enter(answer.request)] = answer
            except Exception:
                logger.exception("a request failed as it entered")
                self._settle(answer, "error", Failure())
                self._move_to_new_session()
            else:
                self.metrics.prompt_tokens.inc(len(answer.request.prompt_ids))
                self.metrics.running.set(len(self._running))

    def _step(self) -> None:
        try:
            settled = self._session.step()
        except Exception:
            logger.exception("a call of %d texts failed; each goes on alone for one call", len(self._running))
            self._step_each_alone()
            return
        for text, step in settled:
            self._tell(text, step)

    def _step_each_alone(self) -> None:
        """The next call of each text by itself: who fails again is given up, the others then go on together."""
        for text in list(self._running):
            alone = self.decoder.session(1)
            try:
                moved = alone.enter(text.request, text.tokens[len(text.request.prompt_ids) :])
                ((_, step),) = alone.step()
            except Exception:
                logger.exception("a text's call failed; its request is given up")
                self._end(text, "error", Failure())
                continue
            text.tokens = moved.tokens
            self._tell(text, step)
        self._move_to_new_session()

    def _move_to_new_session(self) -> None:
        """What a call that failed has left of the old one cannot be relied on."""
        texts, self._session = self._running, self.decoder.session(self.num_slots)
        self._running = {
            self._session.enter(text.request, text.tokens[len(text.request.prompt_ids) :]): answer
            for text, answer in texts.items()
        }

    def _tell(self, text: Text, step: Step) -> None:
        """Hand on what a call settled."""
        answer = self._running[text]
        call = answer.add(step)
        self.metrics.called(len(call.tokens), call.num_drafts, call.num_accepted)
        now = time.perf_counter()
        if answer.num_calls == 1:
            self.metrics.first_token.observe(now - answer.arrived)
        if call.finish_reason is None:
            answer.listener(call)
            return
        if text in self._session.texts:
            self._session.leave(text)
        self.metrics.whole.observe(now - answer.arrived)
        if call.totals and call.totals.tokens_per_second:
            self.metrics.token.observe(1 / call.totals.tokens_per_second)
        self._end(text, call.finish_reason, call)

    def _end(self, text: Text, reason: str, event: Call | Failure | None = None) -> None:
        answer = self._running.pop(text)
        self.metrics.running.set(len(self._running))
        self._settle(answer, reason, event)

    def _close_all(self, answers: Sequence[Answer]) -> None:
        """Give up answers whose clients went away, or which the server's end leaves open."""
        for answer in answers:
            self._settle(answer, "abort", None if answer.is_cancelled else Failure(is_closing=True))
        self.metrics.waiting.set(len(self._waiting))

    def _settle(self, answer: Answer, reason: str, event: Call | Failure | None) -> None:
        with self._changed:
            self._num_open -= 1
        self.metrics.ended(reason)
        if event is not None and not answer.is_cancelled:
            answer.listener(event)
