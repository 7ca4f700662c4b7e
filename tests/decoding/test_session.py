"""Texts decoded together are what each would be alone, whoever comes and goes."""

import random
from collections.abc import Callable
from copy import deepcopy
from operator import itemgetter
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from ptp.config import PTPConfig
from ptp.decoding.call import Text
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request, make_request
from ptp.decoding.session import PREFILL_CHUNK, Session
from ptp.decoding.verification import Logprobs
from ptp.errors import ConfigError, DecodingError
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


@pytest.mark.parametrize("num_slots", [1, 4])
def test_texts_that_go_on_by_second_candidates_are_what_each_would_be_alone(
    base: PreTrainedModel, random_adapter: Callable, num_slots: int
) -> None:
    # Unsure of everything: second candidates are about as likely as the first ones.
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(window=6)), std=0.01)
    session = Decoder(model, RULE, budget=14).session(num_slots)
    num_taken = 0
    for seed in range(4):
        requests = [
            make_request(base, prompt, 40, seed, number, [], num_logprobs=2)
            for number, prompt in enumerate(some_prompts(num_slots, seed))
        ]
        told: dict[Text, list[Logprobs]] = {session.enter(request): [] for request in requests}
        while session.texts:
            for text, step in session.step():
                told[text] += step.logprobs
                num_taken += len(text.tokens) - text.num_cached == 2
        for request, text in zip(requests, told, strict=True):
            written = alone(base, request)
            assert text.tokens[len(request.prompt_ids) :] == written
            logits = base(torch.tensor([[*request.prompt_ids, *written]])).logits[0, len(request.prompt_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]
            assert [each.token for each in told[text]] == pytest.approx(expected.tolist(), abs=1e-3)
    assert num_taken > 5


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
        # Of one given up at once, the prompt's last token may look like an end.
        ended = bool(written) and text.request.finish_reason(text.tokens) is not None
        assert ended == (written == expected)


def test_a_full_session_turns_another_text_away_and_keeps_those_it_has(decoder: Decoder, base: PreTrainedModel) -> None:
    session = decoder.session(1)
    text = session.enter(make_request(base, [1, 2], 5, 0))
    with pytest.raises(DecodingError, match="all 1 slots are taken"):
        session.enter(make_request(base, [1], 5, 0))
    assert session.texts == [text]


class Counting(Session):
    """Counts the prompt tokens that are computed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.computed, self.prefill = 0, self.call.prefill
        self.call.prefill = self.counted

    def counted(self, text: Text, slot: int, num_tokens: int) -> None:
        self.computed += num_tokens
        self.prefill(text, slot, num_tokens)


def chat(decoder: Decoder, num_slots: int = 2) -> Counting:
    return Counting(decoder.model, decoder.rule, decoder.drafter, decoder.policy, num_slots)


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


MIXED = [None, SamplingRule(temperature=0), SamplingRule(temperature=1.5, top_k=3)]


@pytest.mark.parametrize("processors", [[], [RepetitionPenaltyLogitsProcessor(1.3)]], ids=["plain", "processors"])
def test_texts_of_one_batch_may_be_sampled_by_different_rules(
    decoder: Decoder, base: PreTrainedModel, processors: list[LogitsProcessor]
) -> None:
    session = decoder.session(5)
    texts = [
        session.enter(make_request(base, prompt, 30, 4, number, [2], processors=processors, rule=MIXED[number % 3]))
        for number, prompt in enumerate(some_prompts(5, seed=7))
    ]
    num_accepted = 0
    while session.texts:
        num_accepted += sum(step.num_accepted for _, step in session.step())
    assert num_accepted
    for number, text in enumerate(texts):
        expected = decode_plainly(base, text.request, MIXED[number % 3] or RULE)
        assert text.tokens[len(text.request.prompt_ids) :] == expected


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_each_text_of_a_batch_is_drafted_for_as_alone_by_its_own_rule(
    base: PreTrainedModel, random_adapter: Callable, variant: str
) -> None:
    # Of much noise, drafts would be as good as certain, and rounding would decide what a call spends positions on.
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=variant, window=6)), std=0.1)
    decoder = Decoder(model, RULE, budget=14)
    requests = [
        make_request(base, prompt, 30, 4, number, [], rule=MIXED[number % 3])
        for number, prompt in enumerate(some_prompts(5, seed=7))
    ]

    def verified(together: list[Request]) -> list[list[tuple[int, int]]]:
        """Of each text's calls, the drafts verified and accepted."""
        session = decoder.session(len(together))
        found: dict[Text, list[tuple[int, int]]] = {session.enter(request): [] for request in together}
        while session.texts:
            for text, step in session.step():
                found[text].append((step.num_drafts, step.num_accepted))
        return list(found.values())

    together = verified(requests)
    assert together == [verified([request])[0] for request in requests]
    assert sum(num_accepted for calls in together for _, num_accepted in calls) > 10


@pytest.mark.parametrize("budget", [0, 3])
def test_a_request_may_spend_less_than_the_policy_would(decoder: Decoder, base: PreTrainedModel, budget: int) -> None:
    learnt: list[int] = []
    decoder.policy.learn = lambda num_texts, num_tokens, num_positions: learnt.append(num_positions)
    session = decoder.session(2)
    thrifty = session.enter(make_request(base, [1, 2], 30, 4, 0, [], budget=budget))
    other = session.enter(make_request(base, [1, 2], 30, 4, 0, []))
    drafts: dict[Text, list[int]] = {thrifty: [], other: []}
    while thrifty in session.texts:
        for text, step in session.step():
            drafts[text].append(step.num_drafts)
    assert max(drafts[thrifty]) <= budget < max(drafts[other])
    assert other.tokens == thrifty.tokens[: len(other.tokens)]
    assert learnt == []


def told(session: Session, request: Request) -> tuple[list[int], list[Logprobs]]:
    """Tokens and what is told of them, of a request that others stand beside."""
    text, steps = session.enter(request), []
    while text in session.texts:
        steps += [step for each, step in session.step() if each is text]
    assert all(len(step.logprobs or []) == len(step.token_ids) for step in steps)
    return [token for step in steps for token in step.token_ids], [each for step in steps for each in step.logprobs]


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("num_others", [0, 2])
def test_logprobs_are_the_model_s_own_before_rule_and_processors(
    decoder: Decoder, base: PreTrainedModel, num_others: int, budget: int | None
) -> None:
    session, processors = decoder.session(3), [RepetitionPenaltyLogitsProcessor(1.3)]
    others = [session.enter(make_request(base, [5, number], 60, 1, number, [])) for number in range(num_others)]
    request = make_request(
        base, [1, 4, 2], 30, 4, 0, [], processors=processors, rule=MIXED[2], budget=budget, num_logprobs=2
    )
    token_ids, found = told(session, request)
    with torch.inference_mode():
        scores = base(torch.tensor([request.prompt_ids + token_ids])).logits[0, 2:-1].log_softmax(-1)
    best = scores.topk(2)
    assert [list(map(itemgetter(0), each.most_likely)) for each in found] == best.indices.tolist()
    assert torch.tensor([[value for _, value in each.most_likely] for each in found]).allclose(best.values, atol=1e-4)
    chosen = scores.gather(-1, torch.tensor(token_ids).unsqueeze(-1)).squeeze(-1)
    assert torch.tensor([each.token for each in found]).allclose(chosen, atol=1e-4)
    assert all(text in session.texts for text in others)


def test_a_session_without_places_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="a session needs a place for a text at least; got 0"):
        decoder.generate_batch([[1, 2]], batch_size=0)


def test_logprobs_are_told_of_the_chosen_token_alone_or_not_at_all(decoder: Decoder, base: PreTrainedModel) -> None:
    (step, *_) = decoder.answer(make_request(base, [1], 3, 4, num_logprobs=0)).steps
    assert [each.most_likely for each in step.logprobs] == [[]] * len(step.token_ids)
    assert {step.logprobs for step in decoder.answer(make_request(base, [1], 3, 4)).steps} == {None}


@pytest.mark.parametrize(
    ("option", "words"), [({"num_logprobs": 21}, r"\[0, 20\]; got 21"), ({"budget": -1}, "budget must be 0")]
)
def test_what_no_request_may_ask_for_is_refused(base: PreTrainedModel, option: dict[str, int], words: str) -> None:
    with pytest.raises(DecodingError, match=words):
        make_request(base, [1], 3, 0, **option)
