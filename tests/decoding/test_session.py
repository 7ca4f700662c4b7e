"""Texts decoded together are what each would be alone, whoever comes and goes."""

import random
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from transformers import PreTrainedModel

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request, make_request
from ptp.decoding.session import PREFILL_CHUNK, Session, Text
from ptp.errors import DecodingError
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

RULE = SamplingRule(temperature=0.8)


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def base(request: pytest.FixtureRequest, tiny_llama: Callable, tiny_gpt2: Callable) -> PreTrainedModel:
    # Few tokens: drafts are often right by chance, and by other numbers in each text.
    return tiny_llama(6, seed=1) if request.param == "llama" else tiny_gpt2(6, context=128)


@pytest.fixture(params=["categorical", "one_hot"])
def decoder(request: pytest.FixtureRequest, base: PreTrainedModel, random_adapter: Callable) -> Decoder:
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=request.param, window=6)), std=0.3)
    model.survival = tuple(0.8**k for k in range(1, model.ptp_config.num_drafts + 1))
    return Decoder(model, RULE, budget=14)


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(6), k=rng.randint(1, 30)) for _ in range(count)]


def alone(base: PreTrainedModel, request: Request) -> list[int]:
    return decode_plainly(base, request, RULE)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_writes_what_each_prompt_gets_alone(decoder: Decoder, base: PreTrainedModel, batch_size: int) -> None:
    prompts = some_prompts(10)
    found = decoder.generate_batch(prompts, 40, seed=5, end_token_ids=[2], batch_size=batch_size)
    for number, (prompt, generation) in enumerate(zip(prompts, found, strict=True)):
        request = make_request(base, prompt, 40, 5, number, end_token_ids=[2])
        assert generation.token_ids == alone(base, request)
        assert generation.u == request.u[: len(generation.u)].tolist()
        assert generation.num_calls >= len(generation.token_ids) - generation.num_accepted_tokens
    assert sum(generation.num_accepted_tokens for generation in found) > 0
    assert len({len(generation.token_ids) for generation in found}) > 3  # they leave at different times


def test_texts_come_and_go_at_any_time(decoder: Decoder, base: PreTrainedModel) -> None:
    rng = random.Random(1)
    waiting = [make_request(base, prompt, 30, 9, i, end_token_ids=[2]) for i, prompt in enumerate(some_prompts(24, 1))]
    session, expected, given_up = decoder.session(4), {}, 0
    entered: list[Text] = []
    while waiting or session.texts:
        while waiting and not session.is_full and rng.random() < 0.6:
            entered.append(session.enter(waiting.pop()))
        if session.texts and rng.random() < 0.1:
            session.leave(rng.choice(session.texts))  # a client that went away
            given_up += 1
        if session.texts:
            session.step()
    assert given_up
    for text in entered:
        expected = alone(base, text.request)
        written = text.tokens[len(text.request.prompt_ids) :]
        assert written == expected[: len(written)]
        assert (text.request.finish_reason(text.tokens) is not None) == (written == expected)


def test_a_full_session_turns_another_text_away_and_keeps_those_it_has(decoder: Decoder, base: PreTrainedModel) -> None:
    session = decoder.session(1)
    text = session.enter(make_request(base, [1, 2], 5, 0))
    with pytest.raises(DecodingError, match="all 1 slots are taken"):
        session.enter(make_request(base, [1], 5, 0))
    assert session.texts == [text]


class Counting(Session):
    """Counts the prompt tokens that are computed."""

    computed = 0

    def _prefill(self, text: Text, slot: int, num_tokens: int) -> None:
        self.computed += num_tokens
        super()._prefill(text, slot, num_tokens)


def chat(decoder: Decoder, num_slots: int = 2) -> Counting:
    return Counting(decoder.model, decoder.rule, decoder.head, decoder.policy, num_slots)


def written(session: Session, request: Request) -> list[int]:
    text = session.enter(request)
    while text in session.texts:
        session.step()
    return text.tokens[len(request.prompt_ids) :]


def test_a_chat_s_next_turn_computes_only_what_is_new(decoder: Decoder, base: PreTrainedModel) -> None:
    session, history = chat(decoder), [1, 5, 3]
    for turn in range(5):
        before = session.computed
        request = make_request(base, history, 12, 3, turn, end_token_ids=[])
        answer = written(session, request)
        assert answer == alone(base, request)
        if turn:
            # The last answer's last token, and the user's two, of which the very last is left to the first call.
            assert session.computed - before == 2
        history = [*history, *answer, 4, turn % 6]


@pytest.mark.parametrize("kept", [0, 1, 5, 14, 15, 16])
def test_a_history_that_was_edited_is_reused_up_to_the_edit(decoder: Decoder, base: PreTrainedModel, kept: int) -> None:
    session, prompt = chat(decoder), [1, 5, 3, 0]
    answer = written(session, make_request(base, prompt, 12, 3, end_token_ids=[]))
    history = prompt + answer
    edited = [*history[:kept], *((token + 1) % 6 for token in history[kept:]), 2, 2]
    before = session.computed
    request = make_request(base, edited, 12, 3, 1, end_token_ids=[])
    assert written(session, request) == alone(base, request)
    # The last token of a text is never cached: no call has had it as input.
    assert session.computed - before == len(edited) - 1 - min(kept, len(history) - 1)


def test_a_prompt_that_was_answered_before_is_not_computed_again(decoder: Decoder, base: PreTrainedModel) -> None:
    session, request = chat(decoder), make_request(base, [1, 2, 3, 4], 6, 3)
    first, before = written(session, request), session.computed
    assert written(session, request) == first
    assert session.computed == before


def test_prompts_longer_than_a_chunk_join_a_batch(
    decoder: Decoder, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptp.decoding.session.PREFILL_CHUNK", 4)
    assert PREFILL_CHUNK > 4
    prompts = some_prompts(5, seed=3)
    for number, generation in enumerate(decoder.generate_batch(prompts, 8, seed=2, end_token_ids=[], batch_size=2)):
        assert generation.token_ids == alone(base, make_request(base, prompts[number], 8, 2, number, end_token_ids=[]))


def test_no_prompts_are_no_texts(decoder: Decoder) -> None:
    assert decoder.generate_batch([]) == []


def test_padding_beside_a_longer_text_leaves_no_nan(decoder: Decoder, base: PreTrainedModel) -> None:
    session = decoder.session(3)
    for number, prompt in enumerate(([1], [2] * 40, [3, 4])):
        session.enter(make_request(base, prompt, 20, 1, number, end_token_ids=[]))
    session.step()
    assert all(
        torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all() for layer in session.cache.layers
    )
