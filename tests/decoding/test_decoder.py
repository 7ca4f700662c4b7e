import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from math import ceil, prod

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptp.calibration import Calibration
from ptp.config import PTPConfig
from ptp.decoding.call import Outcome, Text
from ptp.decoding.decoder import Decoder
from ptp.decoding.drafting import Drafter
from ptp.decoding.layout import RowLayout
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.decoding.session import Session
from ptp.errors import DecodingError
from ptp.model.proposal import propose, tokens_before
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

PROMPT = [5, 3, 0, 4]
NOTHING_BEFORE = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)
"""A bonus token, and none that a model without a chain is to know before it."""


@pytest.fixture(scope="module")
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(40)


class OracleSession(Session):
    """Drafts that are right but for a share `wrong` of them. truths: the texts to come, by their first token ids."""

    truth: list[int]
    wrong: float

    def _call(self, texts: Sequence[Text], layouts: Sequence[RowLayout], reach: Sequence[int]) -> list[Outcome]:
        outcomes = []
        for text, outcome in zip(texts, super()._call(texts, layouts, reach), strict=True):
            begin = text.num_written + outcome.verified.num_accepted + 1
            drafts = self.truth[begin : begin + len(outcome.drafts)]
            drafts = [(token + (self.rng.random() < self.wrong)) % 40 for token in drafts]
            sure = [1 - self.wrong / 2] * len(drafts)
            outcomes.append(replace(outcome, drafts=drafts, confidences=sure, seconds=[]))
        return outcomes


class OracleDecoder(Decoder):
    """Drafts that are right but for a share `wrong` of them."""

    kind: type[OracleSession] = OracleSession

    def __init__(self, model: PTPModel, truth: list[int], budget: int, wrong: float = 0.0) -> None:
        super().__init__(model, SamplingRule(), budget)
        self.truth, self.wrong = truth, wrong

    def session(self, num_slots: int = 1) -> Session:
        session = self.kind(self.model, self.rule, self.drafter, self.policy, num_slots)
        session.truth, session.wrong, session.rng = self.truth, self.wrong, random.Random(sum(self.truth))
        return session


@pytest.fixture(params=["categorical", "categorical, continued", "one_hot"])
def model(request: pytest.FixtureRequest, base: PreTrainedModel, random_adapter: Callable) -> PTPModel:
    variant, _, continued = request.param.partition(", ")
    config = PTPConfig(variant=variant, window=8, continuation=bool(continued))
    return random_adapter(PTPModel(deepcopy(base), config))


@pytest.mark.parametrize(("budget", "num_tokens"), [(40, 1), (40, 2), (40, 9), (40, 60), (10, 60), (1, 7), (0, 7)])
def test_drafts_that_are_always_right_take_as_few_calls_as_the_window_and_budget_allow(
    model: PTPModel, budget: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptp.decoding.drafting.LEAST_CHANCE", 0)
    truth = Decoder(model, SamplingRule(), budget=0).generate(PROMPT, num_tokens, end_token_ids=[]).token_ids
    generation = OracleDecoder(model, truth, budget).generate(PROMPT, num_tokens, end_token_ids=[])
    assert generation.token_ids == truth
    assert all(step.num_accepted == step.num_drafts for step in generation.steps)

    calls, written, drafts = 0, 0, 0
    while written < num_tokens:
        calls += 1
        drafts = min(drafts, budget, num_tokens - written - 1)
        written += drafts + 1
        room = budget if model.continuation is not None else max(0, budget - drafts - model.ptp_config.lead)
        drafts = min(model.ptp_config.num_drafts, room)
    assert generation.num_calls == calls
    if budget == 40:
        assert calls == 1 + ceil((num_tokens - 1) / (model.ptp_config.num_drafts + 1))


@pytest.mark.parametrize("budget", [0, 1, 10, 40])
def test_drafts_that_are_never_right_cost_nothing_but_one_call_a_token(model: PTPModel, budget: int) -> None:
    truth = Decoder(model, SamplingRule(), budget=0).generate(PROMPT, 30, end_token_ids=[]).token_ids
    generation = OracleDecoder(model, truth, budget, wrong=1.0).generate(PROMPT, 30, end_token_ids=[])
    assert generation.token_ids == truth
    assert generation.num_calls == 30
    assert generation.num_accepted_tokens == 0
    assert (generation.num_draft_tokens > 0) == (budget > model.ptp_config.lead)


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_behind_drafts_that_are_hardly_ever_right_no_further_turn_is_taken(
    base: PreTrainedModel, random_adapter: Callable, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptp.decoding.drafting.LEAST_CHANCE", 0.3)
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=variant, window=8)), std=0.1)
    session = Decoder(model, SamplingRule(), 40).session()
    text = session.enter(make_request(base, PROMPT, 40, seed=0, end_token_ids=[]))
    lengths = set()
    while session.texts:
        session.step()
        assert prod(text.confidences[:-1]) >= 0.3
        if text.confidences and prod(text.confidences) >= 0.3:
            # Nothing but the window's or the text's end ended these.
            assert len(text.drafts) == min(model.ptp_config.num_drafts, text.num_remaining - 1)
        lengths.add(len(text.drafts))
    assert len(lengths) > 2
    assert text.tokens == PROMPT + decode_plainly(base, text.request, SamplingRule())


@pytest.mark.parametrize("wrong", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("budget", [3, 12, 60])
def test_drafts_that_are_partly_right_are_accepted_up_to_the_first_error(
    model: PTPModel, budget: int, wrong: float
) -> None:
    generations = []
    for seed in range(4):
        truth = Decoder(model, SamplingRule(), 0).generate(PROMPT, 60, seed=seed, end_token_ids=[]).token_ids
        generation = OracleDecoder(model, truth, budget, wrong).generate(PROMPT, 60, seed=seed, end_token_ids=[])
        assert generation.token_ids == truth
        assert generation.num_calls == 60 - generation.num_accepted_tokens
        generations.append(generation)
    accepted = sum(generation.num_accepted_tokens for generation in generations)
    assert 0 < accepted < sum(generation.num_draft_tokens for generation in generations)


@pytest.mark.parametrize("end", [0, 3, 5, 8])
def test_a_text_is_cut_at_an_end_token_in_the_midst_of_right_drafts(model: PTPModel, end: int) -> None:
    truth = Decoder(model, SamplingRule(), budget=0).generate(PROMPT, 20, end_token_ids=[]).token_ids
    stops = [truth[end], 39]
    generation = OracleDecoder(model, truth, 40).generate(PROMPT, 20, end_token_ids=stops)
    length = next(i + 1 for i, token in enumerate(truth) if token in stops)
    assert generation.token_ids == truth[:length]
    assert generation.finish_reason == "stop"
    assert sum(len(step.token_ids) for step in generation.steps) == len(generation.u) == length


class SecondSession(OracleSession):
    """Drafts that are all wrong, beside second candidates that are right."""

    def _call(self, texts: Sequence[Text], layouts: Sequence[RowLayout], reach: Sequence[int]) -> list[Outcome]:
        return [
            replace(
                outcome,
                drafts=[(token + 1) % 40 for token in outcome.drafts],
                seconds=[(token, 0.4) for token in outcome.drafts],
                confidences=[0.5] * len(outcome.drafts),
            )
            for outcome in super()._call(texts, layouts, reach)
        ]


class SecondDecoder(OracleDecoder):
    kind = SecondSession


@pytest.mark.parametrize("budget", [2, 3, 12])
def test_a_second_candidate_that_is_right_saves_a_call(
    base: PreTrainedModel, random_adapter: Callable, budget: int
) -> None:
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(window=8)), std=0.1)
    for num_tokens in (1, 2, 30, 31):
        truth = Decoder(model, SamplingRule(), 0).generate(PROMPT, num_tokens, end_token_ids=[]).token_ids
        generation = SecondDecoder(model, truth, budget).generate(PROMPT, num_tokens, end_token_ids=[])
        assert generation.token_ids == truth
        # The first call has no drafts; each of the others yields a second candidate and what stands behind it.
        assert generation.num_calls == 1 + ceil((num_tokens - 1) / 2)
        assert generation.num_accepted_tokens == (num_tokens - 1) // 2


class SpySession(OracleSession):
    """Keeps what was proposed, one logits row after the other, with the number of the bonus token before it."""

    def _call(self, texts: Sequence[Text], layouts: Sequence[RowLayout], reach: Sequence[int]) -> list[Outcome]:
        self.proposed.clear()
        outcomes = super()._call(texts, layouts, reach)
        if outcomes[0].drafts:
            # All positions of the one text's branch at once, or one after the other.
            rows, *numbers = zip(*self.proposed, strict=True)
            logits = torch.cat([part.flatten(0, -2) for part in rows])
            u, tokens = (torch.cat([part.flatten() for part in parts]) for parts in numbers)
            self.seen.append((logits, u, tokens, texts[0].num_written + outcomes[0].verified.num_accepted))
        return outcomes


class SpyDecoder(OracleDecoder):
    kind = SpySession
    proposed: list[tuple[Tensor, Tensor, Tensor]]

    def session(self, num_slots: int = 1) -> Session:
        session = super().session(num_slots)
        session.proposed, session.seen = self.proposed, self.seen
        return session


@torch.no_grad()
@pytest.mark.parametrize(
    ("chain", "pick", "most_tabled"),
    [(0, "exact", 0), (0, "soft", 0), (1, "exact", 0), (3, "soft", 0), (3, "soft", 10**6)],
)
@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
@pytest.mark.parametrize("anchor", ["none", "first", "all"])
def test_a_branch_that_came_true_is_the_training_window_behind_the_same_context(
    base: PreTrainedModel,
    random_adapter: Callable,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    anchor: str,
    chain: int,
    pick: str,
    most_tabled: int,
) -> None:
    monkeypatch.setattr("ptp.decoding.drafting.MOST_TABLED", most_tabled)
    monkeypatch.setattr("ptp.decoding.drafting.LEAST_CHANCE", 0)
    num_tokens = 40
    config = PTPConfig(
        variant=variant, anchor=anchor, window=8, chain=chain, chain_size=16, pick=pick, continuation=False
    )
    model = random_adapter(PTPModel(deepcopy(base), config), std=0.1)
    truth = Decoder(model, SamplingRule(), budget=0).generate(PROMPT, num_tokens, seed=4, end_token_ids=[])
    decoder = SpyDecoder(model, truth.token_ids, budget=24, wrong=0.3)
    decoder.proposed, decoder.seen = [], []

    def spied(config: PTPConfig, rule: SamplingRule, logits: Tensor, u: Tensor, *blur: Tensor) -> tuple[Tensor, Tensor]:
        found = propose(config, rule, logits, u, *blur)
        decoder.proposed.append((logits, u, found[0]))
        return found

    monkeypatch.setattr("ptp.decoding.drafting.propose", spied)
    decoder.generate(PROMPT, num_tokens, seed=4, end_token_ids=[])
    assert len(decoder.seen) > 3
    lead = config.lead
    for logits, numbers, proposed, bonus in decoder.seen:
        # A chain knows the drafts it made itself, and in training those of the text.
        text = PROMPT + truth.token_ids[: bonus + 1] + proposed[lead:].tolist()
        start, room = len(PROMPT) + bonus, len(proposed) - lead
        ids = torch.tensor([text + [0] * 8])
        # Intervals of no width are the numbers themselves.
        u = torch.tensor([([0.0] * len(PROMPT) + truth.u + [0.0] * 50)[: ids.shape[1]]])
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        output = model(
            ids=ids,
            document=torch.zeros_like(ids),
            positions=positions,
            span=torch.zeros_like(ids),
            starts=torch.tensor([[start]]),
            z=torch.zeros(1, 1, 9),
            lower=u,
            upper=u,
        )
        before = tokens_before(ids, positions, start + 1 - lead + torch.arange(8).unsqueeze(0), chain)
        window = model.logits(model.chained(output.windows, before))[0, lead : lead + room]
        torch.testing.assert_close(logits[lead:], window, rtol=1e-3, atol=1e-3)
        if start + room < len(PROMPT) + num_tokens:
            assert torch.equal(numbers[lead:], output.u[0, 0, 1 : 1 + room])


def drafter_of(model: PTPModel) -> Drafter:
    """Of a model whose window states are logits already."""
    return Drafter(model, lambda states: states)


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_drafts_and_confidences_are_read_from_the_branch_with_the_numbers_of_their_own_places(
    base: PreTrainedModel, variant: str
) -> None:
    model = PTPModel(deepcopy(base), PTPConfig(variant=variant, pick="exact", chain=0))
    lead = torch.zeros(model.ptp_config.lead, 4)
    logits = torch.tensor([[1.0, 1.0, 0.0, -9.0], [0.0, 2.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    u = torch.tensor([0.1, 0.5, 0.999])
    rows = torch.cat([lead, logits]).unsqueeze(0)
    numbers = torch.cat([lead[:, 0], u]).unsqueeze(0)
    found = drafter_of(model)([SamplingRule()], rows, None, numbers, *NOTHING_BEFORE)
    drafts, confidences = (values[0, :, 0].tolist() for values in found)
    probs = logits.softmax(-1)
    expected = probs.argmax(-1).tolist()
    if variant == "categorical":
        expected = [int((row.cumsum(0) <= number).sum()) for row, number in zip(probs, u, strict=True)]
    assert drafts == expected
    expected = [row[token].item() for row, token in zip(probs, drafts, strict=True)]
    assert confidences == pytest.approx(expected, abs=1e-6)


def test_a_one_hot_branch_that_foresaw_the_bonus_token_is_trusted_by_a_curve_of_its_own(base: PreTrainedModel) -> None:
    model = PTPModel(deepcopy(base), PTPConfig(variant="one_hot", chain=0))
    model.calibration = Calibration(curves=((0.1, 0.2), (0.8, 0.9)))
    rows = torch.tensor([[0.0, 9.0], [50.0, 0.0]]).expand(2, 2, 2)  # they expect token 1, and draft token 0
    bonus, rules = torch.tensor([[1], [0]]), [SamplingRule()] * 2
    before = bonus[:, :0]
    drafts, confidences = drafter_of(model)(rules, rows, None, torch.zeros(2, 2), bonus, before)
    assert drafts.flatten().tolist() == [0, 0]
    assert confidences.flatten().tolist() == pytest.approx([0.9, 0.2])


def test_a_categorical_branch_has_one_curve(base: PreTrainedModel) -> None:
    model = PTPModel(deepcopy(base), PTPConfig(pick="exact", chain=0))
    model.calibration = Calibration(curves=((0.1, 0.2),))
    rows = torch.tensor([[[50.0, 0.0]]])
    found = drafter_of(model)([SamplingRule()], rows, None, torch.zeros(1, 1), *NOTHING_BEFORE)
    assert found[1].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt must be a sequence of at least one token id; got shape (0,)"),
        ([[1, 2]], {}, "the prompt must be a sequence of at least one token id; got shape (1, 2)"),
        ([[1, 2], [3]], {}, "the prompt must be a sequence of token ids; got list"),
        ("a text", {}, "the prompt must be token ids; got a text: give what the tokenizer makes of it"),
        ([0, 40], {}, "prompt ids must lie in [0, 40); got 0 … 40"),
        ([-1, 2], {}, "prompt ids must lie in [0, 40); got -1 … 2"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ([1] * 512, {}, "the prompt has 512 tokens and the model's context is 512: shorten it to 511 at most"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_clear_line(
    model: PTPModel, prompt: Sequence, settings: dict, message: str
) -> None:
    with pytest.raises(DecodingError) as error:
        Decoder(model).generate(prompt, **settings)
    assert str(error.value) == message


@pytest.mark.parametrize("rule", [SamplingRule(), SamplingRule(temperature=0)])
@pytest.mark.parametrize("budget", [0, 10])
def test_logits_that_are_not_numbers_end_a_text_in_one_clear_line(
    model: PTPModel, budget: int, rule: SamplingRule
) -> None:
    """The base model goes wrong behind one token, which its text comes to in time."""
    request = make_request(model.base_model, PROMPT, 40, seed=1)
    text = decode_plainly(model.base_model, request, rule)
    broken = next(token for token in text if token not in PROMPT)
    model.base_model.set_input_embeddings(deepcopy(model.base_model.get_input_embeddings()))
    model.base_model.get_input_embeddings().weight.data[broken] = torch.nan
    behind = len(PROMPT) + text.index(broken) + 1
    with pytest.raises(DecodingError, match=f"the base model's logits behind {behind} tokens are not numbers"):
        decode_plainly(model.base_model, request, rule)
    with pytest.raises(DecodingError, match=f"the base model's logits behind {behind} tokens are not numbers"):
        Decoder(model, rule, budget).generate(PROMPT, 40, seed=1)


def test_steps_stream_verified_tokens_as_they_are_settled(model: PTPModel) -> None:
    decoder = Decoder(model)
    request = make_request(model.base_model, PROMPT, 20, seed=2)
    steps: Iterator = decoder.steps(request)
    streamed = [token for step in steps for token in step.token_ids]
    assert streamed == decoder.generate(PROMPT, 20, seed=2).token_ids


def test_the_end_tokens_default_to_all_of_the_generation_config(base: PreTrainedModel) -> None:
    base = deepcopy(base)
    base.generation_config.eos_token_id = [1, 7]
    assert make_request(base, PROMPT, 5, seed=0).end_token_ids == {1, 7}
    base.generation_config.eos_token_id = 3
    assert make_request(base, PROMPT, 5, seed=0).end_token_ids == {3}
    base.generation_config.eos_token_id = None
    assert make_request(base, PROMPT, 5, seed=0).end_token_ids == frozenset()
