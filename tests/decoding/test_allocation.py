import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ptp.decoding.allocation import Allocation, Profile, allocate, fixed

chances = st.floats(0, 1)
confidences = st.lists(chances, max_size=6)
survivals = st.lists(chances, max_size=5).map(lambda steps: np.cumprod(steps).tolist())


def expected_tokens(drafts: list[float], survival: list[float], widths: tuple[int, ...]) -> float:
    """The objective: Σ_j S_j accepted in this call, and Σ_b P_b · H(w_b) in the next."""
    reached = np.cumprod([1.0, *drafts])
    exactly = reached * (1 - np.append(drafts, 0.0))
    profile = np.concatenate([[0.0], np.cumsum(survival)])
    return float(reached[1:].sum() + sum(p * profile[w] for p, w in zip(exactly, widths, strict=True)))


def with_continued(steps: list[tuple[float, float]]) -> Profile:
    """A profile of (rate, share of that rate which a continued draft has) for each place."""
    rates, shares = np.array(steps).T if steps else np.empty((2, 0))
    return Profile(tuple(np.cumprod(rates).tolist()), 0, tuple(np.cumprod(rates * shares).tolist()))


def allocated(drafts: list[float], survival: list[float], budget: int, remaining: int, lead: int = 0) -> Allocation:
    return allocate(drafts, Profile(tuple(survival), lead), fixed(budget), remaining)


def possible(num_drafts: int, length: int, budget: int, remaining: int, lead: int) -> Iterator[tuple[int, ...]]:
    """Every choice of widths that spends at most a budget, beside the drafts verified."""
    rooms = [range(min(length, max(0, remaining - 2 - branch)) + 1) for branch in range(num_drafts + 1)]
    for widths in product(*rooms):
        if Allocation(num_drafts, widths).num_positions(lead) <= budget:
            yield widths


@pytest.mark.parametrize(
    ("budget", "remaining", "expected"),
    [
        (5, 99, Allocation(2, (0, 1, 2))),
        (2, 99, Allocation(2, (0, 0, 0))),
        (9, 99, Allocation(3, (1, 2, 2, 1))),
        (99, 99, Allocation(3, (2, 2, 2, 2))),
        (99, 3, Allocation(2, (1, 0, 0))),
        (99, 1, Allocation(0, (0,))),
        (0, 99, Allocation(0, (0,))),
    ],
)
def test_the_docstring_s_three_drafts(budget: int, remaining: int, expected: Allocation) -> None:
    assert allocated([0.9, 0.8, 0.1], [0.5, 0.25], budget, remaining) == expected


@given(
    st.lists(chances, max_size=3),
    st.lists(chances, min_size=1, max_size=3).map(lambda steps: np.cumprod(steps).tolist()),
    st.integers(0, 8),
    st.integers(1, 6),
)
def test_no_other_widths_yield_more_for_the_drafts_verified(
    drafts: list[float], survival: list[float], budget: int, remaining: int
) -> None:
    allocation = allocated(drafts, survival, budget, remaining)
    verified = drafts[: allocation.num_drafts]
    ways = possible(len(verified), len(survival), budget, remaining, lead=0)
    best = max(expected_tokens(verified, survival, widths) for widths in ways)
    assert expected_tokens(verified, survival, allocation.widths) == pytest.approx(best, abs=1e-5)


@given(
    st.lists(chances, max_size=3),
    st.lists(chances, min_size=1, max_size=3).map(lambda steps: np.cumprod(steps).tolist()),
    st.lists(st.floats(0, 0.5), max_size=8).map(sorted),
    st.integers(1, 6),
)
def test_where_every_position_is_dearer_than_the_last_no_other_widths_are_worth_more(
    drafts: list[float], survival: list[float], steps: list[float], remaining: int
) -> None:
    price = np.cumsum([0.0, *steps]).tolist()
    allocation = allocate(drafts, Profile(tuple(survival)), price, remaining)
    verified = drafts[: allocation.num_drafts]
    worth = {
        widths: expected_tokens(verified, survival, widths)
        - price[Allocation(len(verified), widths).num_positions(lead=0)]
        for widths in possible(len(verified), len(survival), len(steps), remaining, lead=0)
    }
    assert worth[allocation.widths] == pytest.approx(max(worth.values()), abs=1e-5)


def expected_continued(drafts: list[float], profile: Profile, widths: tuple[int, ...]) -> float:
    """The objective where every branch drafts to the end, with positions or without."""
    reached = np.cumprod([1.0, *drafts])
    exactly = reached * (1 - np.append(drafts, 0.0))
    yields = [np.cumprod(profile.rates(width)).sum() for width in widths]
    return float(reached[1:].sum() + exactly @ yields)


@given(
    st.lists(chances, max_size=3),
    st.lists(st.tuples(st.floats(0.1, 1), chances), min_size=1, max_size=3),
    st.integers(0, 8),
)
def test_where_each_position_gains_less_than_the_one_before_no_other_widths_yield_more_than_continued_drafts(
    drafts: list[float], steps: list[tuple[float, float]], budget: int
) -> None:
    profile = with_continued(steps)
    assume(profile.gains == sorted(profile.gains, reverse=True) and profile.gains[-1] >= 0)
    allocation = allocate(drafts, profile, fixed(budget), 99)
    verified = drafts[: allocation.num_drafts]
    ways = possible(len(verified), len(steps), budget, 99, lead=0)
    best = max(expected_continued(verified, profile, widths) for widths in ways)
    assert expected_continued(verified, profile, allocation.widths) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("lead", "continued"), [(1, False), (0, True)])
def test_next_to_nothing_is_lost_against_all_other_widths(lead: int, continued: bool) -> None:
    """With a lead, or continued drafts, gains for a position need not fall along a branch."""
    rng = random.Random(0)
    lost = []
    for _ in range(300):
        drafts = [rng.random() for _ in range(rng.randint(0, 3))]
        found = with_continued([(rng.uniform(0.3, 0.95), rng.uniform(0.7, 1)) for _ in range(3)])
        profile = replace(found, lead=lead, continued=found.continued if continued else ())
        budget = rng.randint(2, 10)
        allocation = allocate(drafts, profile, fixed(budget), 99)
        verified = drafts[: allocation.num_drafts]
        ways = possible(len(verified), 3, budget, 99, lead)
        best = max(expected_continued(verified, profile, widths) for widths in ways)
        lost.append(1 - expected_continued(verified, profile, allocation.widths) / best)
    assert max(lost) < 0.1 and np.mean(lost) < 2e-3


def test_positions_that_yield_no_more_than_continued_drafts_are_not_spent() -> None:
    survival = (0.8, 0.5, 0.2)
    assert allocate([0.9], Profile(survival, 0, survival), fixed(20), 99) == Allocation(1, (0, 0))


@given(st.lists(st.tuples(chances, chances), max_size=5), st.floats(0, 0.5))
def test_a_branch_is_worth_its_drafts_that_are_worth_being_verified(
    steps: list[tuple[float, float]], verifying: float
) -> None:
    profile = with_continued(steps)
    priced = Profile(profile.survival, 0, profile.continued, verifying=verifying)
    for width, expected in enumerate(priced.expected):
        reached = np.cumprod(profile.rates(width))
        assert expected == pytest.approx(np.maximum(reached - verifying, 0).sum())


def test_the_second_candidate_of_an_uncertain_draft_comes_before_drafts_far_behind_it() -> None:
    drafts, seconds = [0.5, 0.9, 0.5], [0.4, 0.1, 0.3]
    gains = {"drafts": [0.5, 0.45, 0.225], "seconds": [0.4, 0.05, 0.135]}
    found = [allocate(drafts, Profile(()), fixed(budget), 99, seconds) for budget in range(7)]
    assert [(plan.num_drafts, plan.seconds) for plan in found] == [
        (0, ()),
        (1, ()),
        (2, ()),
        (2, (0,)),
        (3, (0,)),
        (3, (0, 2)),
        (3, (0, 1, 2)),
    ]
    assert sorted(gains["drafts"] + gains["seconds"], reverse=True) == [0.5, 0.45, 0.4, 0.225, 0.135, 0.05]
    assert allocate(drafts, Profile(()), fixed(6), 3, seconds) == Allocation(2, (0, 0, 0), (0, 1))


@given(
    st.lists(st.tuples(chances, chances), max_size=3),
    st.lists(st.floats(0.1, 1), max_size=2).map(lambda steps: np.cumprod(steps).tolist()),
    st.integers(0, 8),
    st.integers(1, 6),
)
def test_no_other_widths_and_second_candidates_yield_more_for_the_drafts_verified(
    pairs: list[tuple[float, float]], survival: list[float], budget: int, remaining: int
) -> None:
    drafts = [max(pair) / 2 for pair in pairs]
    seconds = [min(pair) / 2 for pair in pairs]
    allocation = allocate(drafts, Profile(tuple(survival)), fixed(budget), remaining, seconds)
    assert allocation.num_positions(0) <= budget
    assert allocation.num_drafts <= remaining - 1
    assert all(place < allocation.num_drafts for place in allocation.seconds)
    number = allocation.num_drafts
    reached = np.cumprod([1.0, *drafts[:number]])
    instead = reached[:-1] * seconds[:number]
    exactly = reached - np.append(reached[1:], 0) - np.append(instead, 0)
    profile = np.concatenate([[0.0], np.cumsum(survival)])

    def worth(widths: tuple[int, ...], places: Iterable[int]) -> float:
        return float(sum(instead[place] for place in places) + exactly @ profile[list(widths)])

    best = max(
        worth(widths, places)
        for widths in possible(number, len(survival), budget, remaining, lead=0)
        for count in range(number + 1)
        for places in combinations(range(number), count)
        if Allocation(number, widths, places).num_positions(0) <= budget
    )
    assert worth(allocation.widths, allocation.seconds) == pytest.approx(best, abs=1e-5)


def test_drafts_at_hand_are_not_dropped_for_as_many_new_ones() -> None:
    survival = [0.706, 0.517, 0.407, 0.312, 0.225, 0.159, 0.108]
    assert allocated([0.72] * 4, survival, 8, 1000, lead=1).num_drafts == 4


@given(confidences, survivals, st.integers(0, 20), st.integers(1, 12), st.integers(0, 1))
def test_a_call_never_exceeds_its_budget(
    drafts: list[float], survival: list[float], budget: int, remaining: int, lead: int
) -> None:
    allocation = allocated(drafts, survival, budget, remaining, lead)
    opened = [width for width in allocation.widths if width]
    assert allocation.num_positions(lead) == allocation.num_drafts + sum(opened) + lead * len(opened) <= budget
    assert allocation.num_drafts <= len(drafts)
    assert len(allocation.widths) == allocation.num_drafts + 1
    assert all(0 <= width <= len(survival) for width in allocation.widths)


@given(confidences, survivals, st.integers(0, 20), st.integers(1, 12), st.integers(0, 1))
def test_nothing_is_drafted_beyond_the_tokens_that_remain(
    drafts: list[float], survival: list[float], budget: int, remaining: int, lead: int
) -> None:
    allocation = allocated(drafts, survival, budget, remaining, lead)
    assert allocation.num_drafts <= remaining - 1
    assert all(branch + 1 + width <= remaining for branch, width in enumerate(allocation.widths) if width)


@given(st.integers(1, 30), st.integers(0, 1))
def test_sure_drafts_are_all_verified_and_only_the_last_branch_is_widened(budget: int, lead: int) -> None:
    allocation = allocated([1.0] * 4, [0.9**w for w in range(1, 9)], budget, 99, lead)
    assert allocation.num_drafts == min(4, budget)
    assert not any(allocation.widths[:-1])
    left = budget - allocation.num_drafts - lead
    assert allocation.widths[-1] == min(8, max(0, left))


@given(survivals.filter(bool), st.integers(0, 20))
def test_drafts_that_cannot_be_right_are_not_verified(survival: list[float], budget: int) -> None:
    assert allocated([0.0, 0.9], survival, budget, 99).num_drafts == 0


def test_a_branch_pays_for_its_lead_once() -> None:
    survival = [0.5, 0.25, 0.125]
    assert allocated([], survival, 1, 99, lead=1) == Allocation(0, (0,))
    assert allocated([], survival, 2, 99, lead=1) == Allocation(0, (1,))
    assert allocated([], survival, 4, 99, lead=1) == Allocation(0, (3,))
    assert allocated([], survival, 4, 99, lead=0) == Allocation(0, (3,))


def test_without_a_profile_every_affordable_draft_is_verified_and_none_proposed() -> None:
    assert allocated([0.5, 0.5], [], 9, 99) == Allocation(2, (0, 0, 0))
