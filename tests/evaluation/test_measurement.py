"""The end of a training tells what decoding reached, and says so where validation promised otherwise."""

import random
from dataclasses import replace

import pytest

from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.allocation import Profile
from ptp.decoding.decoder import Generation, Step
from ptp.evaluation.measurement import NOTABLE, Measurement, described

PROFILE = Profile((0.8, 0.6, 0.4), lead=1)
FOUND = Measurement(
    budget=24,
    num_prompts=32,
    num_tokens=3000,
    num_calls=1500,
    tokens_per_call=2.0,
    standard_error=0.05,
    simulated=2.1,
    simulated_short=2.05,
)
CHANCE, OTHER_TEXT, HARDER, SHORT, EASIER = "chance", "did not write", "a draft was refused", "no drafts yet", "easier"


def generation(*tokens_of_calls: int) -> Generation:
    steps = [Step([5] * tokens, [0.5] * tokens, tokens - 1, tokens - 1) for tokens in tokens_of_calls]
    num_tokens = sum(tokens_of_calls)
    return Generation([5] * num_tokens, [0.5] * num_tokens, steps, "length")


def reasons(found: Measurement, learnt_from_itself: bool = True) -> set[str]:
    """Which of the known reasons are given."""
    _, *lines = described(found, learnt_from_itself)
    assert not lines or lines[0].startswith("measured lies")
    known = (CHANCE, OTHER_TEXT, HARDER, SHORT, EASIER)
    given = [next(words for words in known if words in line) for line in lines[1:]]
    assert len(given) == len(set(given))
    return set(given)


def test_tokens_per_call_are_all_tokens_over_all_calls() -> None:
    found = Measurement.of([generation(1, 3, 4), generation(1, 1)], PROFILE, budget=6)
    assert (found.num_prompts, found.num_tokens, found.num_calls) == (2, 10, 5)
    assert found.tokens_per_call == 2.0
    assert found.simulated == simulated_tokens_per_call(PROFILE, 6)


def test_the_standard_error_is_the_spread_over_other_choices_of_prompts() -> None:
    rng = random.Random(0)
    texts = [generation(*(rng.choice([1, 1, 2, 4]) for _ in range(rng.randrange(5, 40)))) for _ in range(40)]
    found = Measurement.of(texts, PROFILE, budget=6)
    again = [Measurement.of(rng.choices(texts, k=40), PROFILE, 6).tokens_per_call for _ in range(200)]
    mean = sum(again) / len(again)
    spread = (sum((value - mean) ** 2 for value in again) / len(again)) ** 0.5
    assert found.standard_error == pytest.approx(spread, rel=0.2)


def test_one_prompt_has_no_standard_error() -> None:
    found = Measurement.of([generation(1, 2)], PROFILE, budget=6)
    assert found.standard_error is None
    assert "standard error" not in next(described(found, True))


def test_texts_of_few_calls_are_expected_to_have_fewer_tokens_in_each() -> None:
    short, long = (Measurement.of([generation(*[2] * calls)] * 2, PROFILE, 6) for calls in (4, 40))
    assert short.simulated_short < long.simulated_short < long.simulated == short.simulated
    assert Measurement.of([generation(1)], PROFILE, 6).simulated_short == 1


@pytest.mark.parametrize(("share", "is_said"), [(0.5, True), (0.84, True), (0.86, False), (1.14, False), (1.16, True)])
def test_a_difference_of_more_than_15_percent_is_said_and_no_smaller_one(share: float, is_said: bool) -> None:
    line, *more = described(replace(FOUND, tokens_per_call=share * FOUND.simulated), True)
    assert f"measured {share * FOUND.simulated:.2f}" in line
    assert "simulated from the windows 2.10" in line
    assert bool(more) == is_said
    assert NOTABLE == 0.15
    if is_said:
        assert more[0].startswith(f"measured lies {abs(share - 1):.0%} {'below' if share < 1 else 'above'} simulated")


def test_the_reasons_are_those_that_can_apply() -> None:
    below, above = replace(FOUND, tokens_per_call=1.2), replace(FOUND, tokens_per_call=3.0)
    assert reasons(below) == {HARDER, SHORT}
    assert reasons(replace(below, simulated_short=2.1)) == {HARDER}
    assert reasons(replace(below, standard_error=0.5)) == {HARDER, SHORT, CHANCE}
    assert reasons(replace(below, standard_error=None)) == {HARDER, SHORT, CHANCE}
    assert reasons(below, learnt_from_itself=False) == {HARDER, SHORT, OTHER_TEXT}
    assert reasons(above) == {EASIER}
    assert reasons(above, learnt_from_itself=False) == {EASIER, OTHER_TEXT}
    assert reasons(FOUND, learnt_from_itself=False) == set()
