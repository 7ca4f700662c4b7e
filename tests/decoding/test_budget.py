"""A measured budget: as many tokens a second as the best fixed budget, and never much fewer than plain decoding."""

import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ptp.cache import SlotCache
from ptp.config import PTPConfig
from ptp.decoding import latency as latency_module
from ptp.decoding.allocation import Profile, allocate
from ptp.decoding.budget import FixedBudget, Latency, MeasuredBudget, Policy
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

POSITIONS = (0, 4, 8, 16, 32, 64)


def latency_of(*seconds: float) -> Latency:
    """Of calls of one text and of eight, bound by the positions of all texts together."""
    alone = np.interp(8 * np.array(POSITIONS) + 8, 1 + np.array(POSITIONS), seconds)
    slope = (seconds[-1] - seconds[-2]) / (POSITIONS[-1] - POSITIONS[-2])
    together = alone + np.maximum(8 * np.array(POSITIONS) + 8 - 65, 0) * slope
    return Latency({1: dict(zip(POSITIONS, seconds, strict=True)), 8: dict(zip(POSITIONS, together, strict=True))})


FLAT = latency_of(1.0, 1.0, 1.01, 1.02, 1.05, 1.1)
"""Bound by reading weights: positions cost next to nothing."""
STEEP = latency_of(1.0, 3.0, 5.0, 9.0, 17.0, 33.0)
"""Bound by arithmetic: every further position costs half a call."""
GENTLE = latency_of(1.0, 1.2, 1.35, 1.6, 2.2, 3.4)


class Simulation:
    """Decoding without a model: drafts are right with the chances that they claim, times `truth`."""

    def __init__(self, policy: Policy, latency: Latency, accuracy: float, truth: float, seed: int = 0) -> None:
        self.policy, self.seconds, self.truth = policy, latency.of(1, 64), truth
        self.rng, self.accuracy = random.Random(seed), accuracy

    def tokens_per_second(self, num_calls: int, lead: int = 1) -> float:
        tokens, seconds = 0, 0.0
        confidences: list[float] = []
        for _ in range(num_calls):
            plan = allocate(confidences, self.policy.profile(1), self.policy.price(1), 10**6)
            accepted = 0
            while accepted < plan.num_drafts and self.rng.random() < confidences[accepted] * self.truth:
                accepted += 1
            positions = plan.num_positions(lead)
            tokens, seconds = tokens + accepted + 1, seconds + self.seconds[positions]
            # Easy and hard places: what a draft claims differs from window to window.
            sure = min(1.0, self.accuracy * self.rng.choice([0.5, 1.2]))
            confidences = [sure] * plan.widths[accepted]
            self.policy.learn(accepted + 1, positions, [confidences], [len(confidences)])
        return tokens / seconds


def profile(accuracy: float, length: int = 7, lead: int = 1) -> Profile:
    each = (min(1.0, accuracy * 0.5), min(1.0, accuracy * 1.2))
    return Profile(tuple(sum(chance**k for chance in each) / 2 for k in range(1, length + 1)), lead)


@pytest.mark.parametrize("latency", [FLAT, GENTLE, STEEP], ids=["flat", "gentle", "steep"])
@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.8])
def test_it_is_about_as_fast_as_the_best_fixed_budget(latency: Latency, accuracy: float) -> None:
    fixed = [
        Simulation(FixedBudget(profile(accuracy), budget), latency, accuracy, 1.0).tokens_per_second(3000)
        for budget in (0, 2, 4, 8, 12, 16, 24, 40, 64)
    ]
    measured = MeasuredBudget(profile(accuracy), latency, 64)
    assert Simulation(measured, latency, accuracy, 1.0).tokens_per_second(3000) > 0.95 * max(fixed)


@pytest.mark.parametrize("latency", [FLAT, GENTLE, STEEP], ids=["flat", "gentle", "steep"])
@pytest.mark.parametrize("promised", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("truth", [0.0, 0.2, 1.0])
def test_whatever_the_profile_promises_it_is_never_much_slower_than_plain_decoding(
    latency: Latency, promised: float, truth: float
) -> None:
    measured = MeasuredBudget(profile(promised), latency, 64)
    plain = 1 / latency.seconds[1][0]
    assert Simulation(measured, latency, promised, truth).tokens_per_second(3000) > 0.95 * plain


def test_it_spends_more_where_positions_are_cheaper() -> None:
    spent = []
    for latency in (FLAT, GENTLE, STEEP):
        policy = MeasuredBudget(profile(0.8), latency, 64)
        for _ in range(100):
            policy.learn(3, 20, [[]], [0])
        plan = allocate([0.8] * 7, policy.profile(1), policy.price(1), 10**6)
        spent.append(plan.num_positions(1))
    assert spent[0] > spent[1] > spent[2]


def test_more_texts_in_a_call_leave_fewer_positions_for_each() -> None:
    policy = MeasuredBudget(profile(0.8), GENTLE, 64)
    plans = [allocate([], policy.profile(number), policy.price(number), 10**6) for number in (1, 8)]
    assert plans[0].num_positions(1) > plans[1].num_positions(1)


CURVES = st.dictionaries(st.integers(0, 600), st.floats(1e-4, 10), min_size=1)


@given(st.dictionaries(st.integers(1, 40), CURVES, min_size=1), st.integers(1, 60))
def test_a_larger_call_never_counts_as_faster(curves: dict[int, dict[int, float]], num_texts: int) -> None:
    latency = Latency(curves)
    found, more = (np.array(latency.of(number, 700)) for number in (num_texts, num_texts + 1))
    assert (np.diff(found) >= 0).all() and (found > 0).all()
    assert (more >= found * (1 - 1e-9)).all()


def test_a_latency_is_what_was_measured_and_a_straight_line_between() -> None:
    latency = Latency({1: {0: 1.0, 2: 2.0}, 4: {0: 2.0, 2: 5.0}})
    assert latency.of(1, 4) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert latency.of(4, 2) == [2.0, 3.5, 5.0]
    assert latency.of(2, 2) == pytest.approx([4 / 3, 2 + 1 / 6, 3.0])
    assert latency.of(7, 0) == pytest.approx([3.0])


def test_where_drafts_in_decoding_are_worse_than_on_held_out_windows_fewer_are_made() -> None:
    """The text there is harder: a branch stands where a draft was wrong."""
    spent = []
    for confidence in (0.8, 0.3):
        policy = MeasuredBudget(profile(0.8), GENTLE, 64)
        for _ in range(200):
            policy.learn(2, 20, [[confidence] * 7], [7])
        spent.append(allocate([], policy.profile(1), policy.price(1), 10**6).num_positions(1))
    assert spent[0] > spent[1]


@pytest.fixture
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(20)


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_text_is_the_same_and_the_machine_is_measured_once(
    base: PreTrainedModel,
    random_adapter: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variant: str,
    batch_size: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=variant, window=5)))
    prompts = [[1, 2, 3], [4], [5, 6]]
    for _ in range(2):
        decoder = Decoder(model, SamplingRule(), budget="auto")
        texts = decoder.generate_batch(prompts, 30, seed=4, batch_size=batch_size)
        for number, prompt in enumerate(prompts):
            request = make_request(base, prompt, 30, 4, number)
            assert texts[number].token_ids == decode_plainly(base, request, SamplingRule())
        # Whoever measures again is caught.
        monkeypatch.setattr(latency_module, "_measure_stretch", None)
    (kept,) = (tmp_path / "ptp" / "latency").iterdir()
    kept.write_text("torn")
    with pytest.raises(TypeError):
        Decoder(model, SamplingRule(), budget="auto")


def test_calls_are_measured_by_the_positions_that_they_have(
    base: PreTrainedModel, random_adapter: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Drafts that are as good as certain, as those of much noise, leave nothing to spend positions on.
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(window=8)), std=0.1)
    seen = []
    read = PTPModel.read

    def spy(self: PTPModel, inputs: object, positions: object, *rest: object, **named: object) -> object:
        seen.append(positions.numel())  # type: ignore[attr-defined]
        return read(self, inputs, positions, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(PTPModel, "read", spy)
    latency = Decoder(model, SamplingRule(), budget="auto").policy.latency
    assert list(latency.seconds) == [1, 4, 16]
    for number, curve in latency.seconds.items():
        assert min(curve) == 0 and max(curve) > 10
        assert number * (1 + max(curve)) in seen


def test_a_model_that_drafts_nothing_has_nothing_to_measure(base: PreTrainedModel, random_adapter: Callable) -> None:
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant="one_hot", window=1)))
    assert Decoder(model, SamplingRule(), budget="auto").policy.most == 0


def test_measuring_a_model_of_a_long_context_takes_the_memory_of_short_texts(
    tiny_llama: Callable, random_adapter: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = tiny_llama(20)
    base.config.max_position_embeddings = 10**6
    reserved = []
    monkeypatch.setattr(SlotCache, "reserve", spied(SlotCache.reserve, reserved))
    Decoder(random_adapter(PTPModel(base, PTPConfig(window=5))), SamplingRule(), budget="auto")
    assert 0 < max(reserved) < 400


def spied(reserve: Callable, seen: list[int]) -> Callable:
    def noting(self: SlotCache, capacity: int) -> None:
        seen.append(capacity)
        reserve(self, capacity)

    return noting
