"""How many drafts to verify and how wide to make each branch of the next call (METHOD §4, step 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
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
    """Spend positions where they are expected to yield most tokens, as long as that is worth their price.

    confidences: c_1 … c_m of the drafts at hand. price: what spending 0 … n positions costs, in tokens, n being the
    most; it never falls (see `fixed` for a budget). remaining: tokens still to be written; nothing beyond them is
    drafted.

    Verifying draft j yields S_j = c_1···c_j tokens in this call; widening branch b to w yields P_b·s_w in the next,
    P_b = S_b·(1 − c_{b+1}) being the chance that exactly b drafts are accepted. Gains for a position fall along an open
    branch, so taking the largest first is exact for whatever number of positions they sum to; what is left in front of
    an opening that does not fit is spent as well as it can be. S_j ≥ P_j·s_w means that no branch is opened behind an
    unverified draft. Without the drafts left out, the last branch is likelier, and widths are found anew.

    Which drafts are verified is not chosen for the sum of both gains: a call that drops its drafts for a wide branch
    promises as much, one call later, and then would do so again.

    Three drafts with c = 0.9, 0.8, 0.1 and survival 0.5, 0.25, no lead: gains of drafts 0.9 0.72 0.07, of branches
    0: 0.05 0.03, 1: 0.09 0.05, 2: 0.32 0.16, 3: 0.04 0.02; a budget of 5 verifies two drafts and gives branch 2 its
    two drafts; with the third draft unverified, branch 2 stands for everything accepted.
    """
    most, length = len(price) - 1, len(profile.survival)
    reached = [1.0, *accumulate(confidences[: max(0, min(remaining - 1, most))], mul)]
    # The call after branch b came true writes one token of its own and needs no more drafts than are then left.
    room = [max(0, min(length, remaining - 2 - branch)) for branch in range(len(reached))]
    num_drafts, widths = _spend(reached[1:], _exactly(reached), room, profile, price)
    if num_drafts < len(reached) - 1:
        _, widths = _spend([], _exactly(reached[: num_drafts + 1]), room, profile, price[num_drafts:])
    return Allocation(num_drafts, tuple(widths[: num_drafts + 1]))


def _exactly(reached: list[float]) -> list[float]:
    """The chances that exactly 0, 1, … drafts are accepted, of those that so many at least are."""
    return [this - after for this, after in zip(reached, [*reached[1:], 0.0], strict=True)]


VERIFY = -1
"""In place of a branch: verify the next draft."""


def _spend(
    drafts: list[float], chances: list[float], room: list[int], profile: Profile, price: Sequence[float]
) -> tuple[int, list[int]]:
    """How many drafts, of these gains, to verify and how wide to make branches that come true with these chances."""
    expected, survival, lead, most = profile.expected, profile.survival, profile.lead, len(price) - 1
    num_drafts, widths, tokens, spent = 0, [0] * len(chances), 0.0, 0
    best, taken = -price[0], (0, widths.copy())
    # Best gain for a position first; of each branch, what it would take next.
    offers = [(-drafts[0], VERIFY)] if drafts and drafts[0] > 0 else []
    for branch, chance in enumerate(chances):
        if chance > 0 and (opening := profile.openings[room[branch]]):
            offers.append((-chance * expected[opening] / (opening + lead), branch))
    heapify(offers)
    while offers and spent < most:
        gain, branch = offers[0]
        following = 0.0
        if branch == VERIFY:
            num_drafts, tokens, spent = num_drafts + 1, tokens - gain, spent + 1
            following = drafts[num_drafts] if num_drafts < len(drafts) else 0.0
        else:
            width = widths[branch]
            after = width + 1 if width else min(profile.openings[room[branch]], most - spent - lead)
            if after > width:
                widths[branch] = after
                tokens += chances[branch] * (expected[after] - expected[width])
                spent += after - width if width else after + lead
                following = chances[branch] * survival[after] if after < room[branch] else 0.0
        if following > 0:
            heapreplace(offers, (-following, branch))
        else:
            heappop(offers)
        if tokens - price[spent] > best:
            best, taken = tokens - price[spent], (num_drafts, widths.copy())
    return taken
