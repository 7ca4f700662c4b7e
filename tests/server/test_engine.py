"""Requests come and go; a failure is its own request's alone."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from model_server import wait_for
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import Request, make_request
from ptp.decoding.session import Session, Step
from ptp.server.engine import Answer, Call, Closing, Engine, Failure, QueueFull
from ptp.server.metrics import Metrics
from ptp.streaming import TextStream

PROMPT = [5, 6, 7]


class Asked:
    """An answer, and what its listener is told."""

    def __init__(self, request: Request, stop: list[str] | None = None) -> None:
        self.told: queue.Queue[Call | Failure] = queue.Queue()
        self.answer = Answer(request, stop or [], self.told.put)

    def result(self) -> list[int] | Failure:
        """All tokens, once the text has ended; or that it failed."""
        token_ids: list[int] = []
        while True:
            event = self.told.get(timeout=60)
            if isinstance(event, Failure):
                return event
            token_ids += [token.id for token in event.tokens]
            if event.finish_reason:
                return token_ids


@pytest.fixture
def asked(decoder: Decoder) -> Callable[..., Asked]:
    def make(seed: int, max_new_tokens: int = 40, processor: LogitsProcessor | None = None) -> Asked:
        request = make_request(decoder.model.base_model, PROMPT, max_new_tokens, seed, end_token_ids=[])
        return Asked(replace(request, processors=LogitsProcessorList([processor] if processor else [])))

    return make


@pytest.fixture
def alone(decoder: Decoder, asked: Callable[..., Asked]) -> Callable[..., list[int]]:
    """What the decoder alone writes."""
    return lambda seed, max_new_tokens=40: decoder.answer(asked(seed, max_new_tokens).answer.request).token_ids


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture
def make_engine(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Engine]:
    def make(num_slots: int = 3, max_waiting: int = 50) -> Engine:
        return Engine(decoder, tokenizer.backend_tokenizer, Metrics("m"), num_slots, max_waiting)

    return make


class FailsBehind(LogitsProcessor):
    """Fails once a text has so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] >= self.num_tokens:
            raise RuntimeError("no grammar takes this text")
        return scores


def test_what_stands_behind_a_stop_string_does_not_count(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_tokens_to_ids([*"abcd"])
    answer = Answer(make_request(decoder.model.base_model, PROMPT, 40, 0), ["b"], print)
    answer.stream = TextStream(tokenizer.backend_tokenizer, PROMPT, answer.stop)
    call = answer.add(Step(tokens, [0.5] * 4, num_accepted=3, num_drafts=3))
    assert [token.id for token in call.tokens] == tokens[:2]
    assert (call.text, call.num_accepted, call.finish_reason) == ("a", 2, "stop")
    assert (call.totals.num_tokens, call.totals.num_accepted_tokens, call.totals.num_draft_tokens) == (2, 2, 3)


def test_more_texts_than_slots_are_each_what_they_are_alone(
    make_engine: Callable, asked: Callable, alone: Callable
) -> None:
    with running(make_engine(num_slots=3)) as engine:
        texts = [asked(seed, 10 + 3 * seed) for seed in range(12)]
        for text in texts:
            engine.submit([text.answer])
        assert [text.result() for text in texts] == [alone(seed, 10 + 3 * seed) for seed in range(12)]
    assert engine.num_open == 0


@pytest.mark.parametrize("num_tokens", [3, 12])
def test_a_failure_ends_its_own_request_alone(
    make_engine: Callable, asked: Callable, alone: Callable, num_tokens: int
) -> None:
    with running(make_engine(num_slots=3)) as engine:
        bad = asked(1, 40, FailsBehind(num_tokens))
        others = [asked(seed) for seed in (4, 5, 6, 7)]
        engine.submit([others[0].answer, bad.answer, *(other.answer for other in others[1:])])
        assert bad.result() == Failure()
        assert [other.result() for other in others] == [alone(seed) for seed in (4, 5, 6, 7)]


def test_a_call_that_fails_once_harms_nobody(
    make_engine: Callable, asked: Callable, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, num_calls = Session.step, 0

    def step(session: Session) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls in (1, 6):
            for layer in session.cache.layers:
                layer.keys.fill_(torch.nan)  # as half a call may leave it
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(session)

    monkeypatch.setattr(Session, "step", step)
    with running(make_engine(num_slots=3)) as engine:
        texts = [asked(seed) for seed in range(5)]
        engine.submit([text.answer for text in texts])
        found = [text.result() for text in texts]
    monkeypatch.undo()
    assert found == [alone(seed) for seed in range(5)]


def test_a_request_that_cannot_enter_fails_alone(
    make_engine: Callable, asked: Callable, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session._reserve

    def reserve(session: Session, num_tokens: int) -> None:
        if num_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(session, num_tokens)

    monkeypatch.setattr(Session, "_reserve", reserve)
    with running(make_engine(num_slots=3)) as engine:
        texts = [asked(1), asked(2, max_new_tokens=200), asked(3)]
        engine.submit([text.answer for text in texts])
        found = [text.result() for text in texts]
    assert found == [alone(1), Failure(), alone(3)]


def test_a_cancelled_text_frees_its_slot_and_is_told_nothing_more(make_engine: Callable, asked: Callable) -> None:
    with running(make_engine(num_slots=1)) as engine:
        endless, next_one, waiting = (
            Asked(replace(asked(0, 200).answer.request, end_token_ids=frozenset())) for _ in "123"
        )
        engine.submit([endless.answer, next_one.answer, waiting.answer])
        endless.told.get(timeout=60)
        engine.cancel([waiting.answer, endless.answer])
        next_one.told.get(timeout=60)
        assert endless.answer.num_tokens < 200
        wait_for(lambda: engine.num_open == 1)
        num_told = endless.told.qsize()
        assert isinstance(next_one.result(), list)
        assert endless.told.qsize() == num_told
        assert waiting.told.empty()


def test_a_full_queue_takes_all_of_a_request_or_nothing(make_engine: Callable, asked: Callable) -> None:
    engine = make_engine(num_slots=1, max_waiting=2)
    engine.submit([asked(0).answer])
    with pytest.raises(QueueFull):
        engine.submit([asked(seed).answer for seed in range(3)])
    assert engine.num_open == 1
    engine.submit([asked(seed).answer for seed in range(2)])
    with pytest.raises(QueueFull):
        engine.check_room()
    with running(engine):
        wait_for(lambda: engine.num_open == 0)
        engine.check_room(3)


def test_who_waits_when_the_server_closes_is_told_and_who_has_begun_goes_on(
    make_engine: Callable, asked: Callable, alone: Callable
) -> None:
    with running(make_engine(num_slots=1)) as engine:
        begun, waiting = asked(1), asked(2)
        engine.submit([begun.answer, waiting.answer])
        first = begun.told.get(timeout=60)
        engine.close()
        assert waiting.result() == Failure(is_closing=True)
        rest = begun.result()
        assert [token.id for token in first.tokens] + rest == alone(1)
        with pytest.raises(Closing):
            engine.submit([asked(3).answer])
        assert not engine.is_alive


def test_stopping_tells_everybody_who_is_left(make_engine: Callable, asked: Callable) -> None:
    with running(make_engine(num_slots=1)) as engine:
        texts = [asked(seed, 200) for seed in range(3)]
        engine.submit([text.answer for text in texts])
        texts[0].told.get(timeout=60)
        engine.stop()
    assert all(text.result() == Failure(is_closing=True) for text in texts[1:])
    assert engine.num_open == 0
