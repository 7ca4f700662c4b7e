"""How many drafts to verify and how wide to make each branch of the next call (METHOD §4, step 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
from math import inf
from operator import mul


@dataclass(frozen=True)
class Allocation:
    """num_drafts: drafts the call verifies. widths: drafts each branch b = 0 … num_drafts proposes."""

    num_drafts: int
    widths: tuple[int, ...]

    def num_positions(self, lead: int) -> int:
        """Positions the call spends; a branch with any draft spends `lead` more (1 in O-PTP, 0 in C-PTP)."""
        return self.num_drafts + sum(width + lead for width in self.widths if width)


@dataclass(frozen=True)
class Profile:
    """What a branch of w drafts yields and costs.

    survival: s_1 … s_L of the acceptance profile, s_w being the chance that the first w drafts of a branch are all
    accepted, so that w drafts yield H(w) = s_1 + … + s_w tokens. lead: positions a branch spends before its first
    draft.
    """

    survival: tuple[float, ...]
    lead: int = 0

    @cached_property
    def expected(self) -> list[float]:
        """H(0) … H(L)."""
        return [0.0, *accumulate(self.survival)]

    @cached_property
    def openings(self) -> list[int]:
        """With room for 0 … L drafts, how many a branch opens with: those of the best H(w) / (w + lead).

        A lead makes the first draft dear; behind the opening, each further draft yields less for its position.
        """
        rates = [0.0, *(self.expected[w] / (w + self.lead) for w in range(1, len(self.expected)))]
        return [max(range(room + 1), key=rates.__getitem__) for room in range(len(rates))]


def fixed(budget: int) -> list[float]:
    """The price of positions under a budget: nothing, and no more can be had."""
    return [0.0] * (budget + 1)


def allocate(confidences: Sequence[float], profile: Profile, price: Sequence[float], remaining: int) -> Allocation:
    """Spend positions so that the tokens expected of them, less their price, are most.

    confidences: c_1 … c_m of the drafts at hand. price: what spending 0 … n positions costs, in tokens, n being the
    most; it never falls (see `fixed` for a budget). remaining: tokens still to be written; nothing beyond them is
    drafted.

    Verifying draft j yields S_j = c_1···c_j tokens in this call; widening branch b to w yields P_b·s_w in the next,
    P_b = S_b·(1 − c_{b+1}) being the chance that exactly b drafts are accepted, and the last branch standing for all.
    Every number of drafts is tried. Gains for a position fall along an open branch, so taking the largest first is
    exact for whatever number of positions they sum to; only what is left in front of an opening that does not fit is
    spent as well as it can be.

    Three drafts with c = 0.9, 0.8, 0.1 and survival 0.5, 0.25, no lead: verifying two gains 0.9 and 0.72, and their
    branches 0: 0.05 0.03, 1: 0.09 0.05, 2: 0.36 0.18. So a budget of 5 verifies both, gives branch 2 its two drafts and
    branch 1 one; verifying the third draft too would gain 0.07 in place of that 0.09.
    """
    most, length = len(price) - 1, len(profile.survival)
    confidences = confidences[: max(0, min(remaining - 1, most))]
    reached = [1.0, *accumulate(confidences, mul)]
    # The call after branch b came true writes one token of its own and needs no more drafts than are then left.
    room = [max(0, min(length, remaining - 2 - branch)) for branch in range(len(reached))]
    best, allocation = -inf, Allocation(0, (0,))
    for num_drafts in range(len(confidences), -1, -1):
        verified = sum(reached[1 : num_drafts + 1])
        if verified + profile.expected[min(length, most - num_drafts)] - price[num_drafts] <= best:
            continue  # not even with one branch that is sure to come true
        before = reached[: num_drafts + 1]
        chances = [a - b for a, b in zip(before, [*before[1:], 0.0], strict=True)]
        tokens, widths = _widen(chances, room, profile, price[num_drafts:])
        if verified + tokens > best:
            best, allocation = verified + tokens, Allocation(num_drafts, tuple(widths))
    return allocation


def _widen(
    chances: list[float], room: list[int], profile: Profile, price: Sequence[float]
) -> tuple[float, list[int]]:
    """Widths of branches that come true with these chances, and the tokens expected of them, less their price."""
    expected, survival, lead, most = profile.expected, profile.survival, profile.lead, len(price) - 1
    widths, taken = [0] * len(chances), [0] * len(chances)
    tokens, spent, best = 0.0, 0, -price[0]
    # Best rate first; of each branch, what it would take next.
    offers = []
    for branch, chance in enumerate(chances):
        if chance > 0 and (opening := profile.openings[room[branch]]):
            offers.append((-chance * expected[opening] / (opening + lead), branch))
    heapify(offers)
    while offers and spent < most:
        branch, width = offers[0][1], widths[offers[0][1]]
        after = width + 1 if width else min(profile.openings[room[branch]], most - spent - lead)
        if after <= width:
            heappop(offers)
            continue
        widths[branch] = after
        tokens += chances[branch] * (expected[after] - expected[width])
        spent += after - width if width else after + lead
        if tokens - price[spent] > best:
            best, taken = tokens - price[spent], widths.copy()
        if after < room[branch] and survival[after] > 0:
            heapreplace(offers, (-chances[branch] * survival[after], branch))
        else:
            heappop(offers)
    return best, taken
