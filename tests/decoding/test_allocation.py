import random
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given
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
    assert expected_tokens(verified, survival, allocation.widths) == pytest.approx(best, abs=1e-9)


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
    assert worth[allocation.widths] == pytest.approx(max(worth.values()), abs=1e-9)


def test_with_a_lead_next_to_nothing_is_lost_against_all_other_widths() -> None:
    rng = random.Random(0)
    lost = []
    for _ in range(300):
        drafts = [rng.random() for _ in range(rng.randint(0, 3))]
        survival = np.cumprod([rng.uniform(0.3, 0.95) for _ in range(3)]).tolist()
        budget = rng.randint(2, 10)
        allocation = allocated(drafts, survival, budget, 99, lead=1)
        verified = drafts[: allocation.num_drafts]
        ways = possible(len(verified), 3, budget, 99, lead=1)
        best = max(expected_tokens(verified, survival, widths) for widths in ways)
        lost.append(1 - expected_tokens(verified, survival, allocation.widths) / best)
    assert max(lost) < 0.1 and np.mean(lost) < 2e-3


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
