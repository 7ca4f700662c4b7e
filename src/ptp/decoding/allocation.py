"""How many drafts to verify and how wide to make each branch of the next call (METHOD §4, step 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise, zip_longest
from operator import mul
from typing import Protocol


@dataclass(frozen=True)
class Allocation:
    """num_drafts: drafts the call verifies. widths: positions of each branch b = 0 … num_drafts.

    seconds: of the drafts 0 … num_drafts − 1, those beside which their second candidate is verified.
    """

    num_drafts: int
    widths: tuple[int, ...]
    seconds: tuple[int, ...] = ()

    def num_positions(self, lead: int) -> int:
        """Positions the call spends; a branch with any draft spends `lead` more (1 in O-PTP, 0 in C-PTP)."""
        return self.num_drafts + len(self.seconds) + sum(width + lead for width in self.widths if width)


class Measured(Protocol):
    """What knows how often drafts are right, under the names of `Profile`."""

    @property
    def survival(self) -> Sequence[float]: ...

    @property
    def continued(self) -> Sequence[float]: ...

    @property
    def second(self) -> float: ...


@dataclass(frozen=True)
class Profile:
    """What a branch of w positions yields and costs.

    survival: s_1 … s_L of the acceptance profile, s_w being the chance that the first w drafts of a branch are all
    accepted, if each has a position. lead: positions a branch spends before its first draft. continued: the same as
    survival of drafts none of which has a position (see `ptp.model.proposal.Continuation`); empty if there are no such.
    second: the chance that the second candidate is right where a draft is wrong. verifying: what verifying a draft
    costs, in tokens.
    """

    survival: tuple[float, ...]
    lead: int = 0
    continued: tuple[float, ...] = ()
    second: float = 0.0
    verifying: float = 0.0

    @classmethod
    def of(cls, measured: Measured, lead: int) -> Profile:
        """What a model, its training, or held-out windows say of drafts."""
        return cls(tuple(measured.survival), lead, tuple(measured.continued), measured.second)

    def rates(self, width: int) -> list[float]:
        """Of each draft of a branch of so many positions, the chance that it is right if those before it are."""
        return [*_rates(self.survival)[:width], *_rates(self.continued)[width:]]

    def seconds(self, width: int) -> list[float]:
        """Of each of these drafts, the chance that its second candidate is right if those before it are."""
        return [(1 - rate) * self.second for rate in self.rates(width)]

    @cached_property
    def expected(self) -> list[float]:
        """H(0) … H(L): tokens that branches of so many positions yield, net of what verifying their drafts costs.

        Without continued drafts and costs, H(w) = s_1 + … + s_w.
        """
        return [
            sum(max(0.0, reached - self.verifying) for reached in accumulate(self.rates(width), mul))
            for width in range(len(self.survival) + 1)
        ]

    @cached_property
    def gains(self) -> list[float]:
        """H(1) − H(0), H(2) − H(1) and so on: what each further position of a branch yields."""
        return [after - before for before, after in pairwise(self.expected)]

    @cached_property
    def openings(self) -> list[int]:
        """With room for 0 … L positions, how many a branch opens with: those of the best (H(w) − H(0)) / (w + lead).

        A lead makes the first draft dear; behind the opening, each further draft yields less for its position.
        """
        means = [0.0, *(total / (w + self.lead) for w, total in enumerate(accumulate(self.gains), 1))]
        return [max(range(room + 1), key=means.__getitem__) for room in range(len(means))]


def _rates(survival: Sequence[float]) -> list[float]:
    """Each chance given that what is before it has come true."""
    return [after / before if before > 0 else 0.0 for before, after in pairwise([1.0, *survival])]


def fixed(budget: int) -> list[float]:
    """The price of positions under a budget: nothing, and no more can be had."""
    return [0.0] * (budget + 1)


def allocate(
    confidences: Sequence[float],
    profile: Profile,
    price: Sequence[float],
    remaining: int,
    seconds: Sequence[float] = (),
) -> Allocation:
    """Spend positions where they are expected to yield most tokens, as long as that is worth their price.

    confidences: c_1 … c_m of the drafts at hand. seconds: a_1 … a_m, the chances that their second candidates are
    right in their place, each at most c_j and 1 − c_j; or nothing. price: what spending 0 … n positions costs, in
    tokens, n being the most; it never falls (see `fixed` for a budget). remaining: tokens still to be written; nothing
    beyond them is drafted.

    Verifying draft j yields S_j = c_1···c_j tokens in this call, and its second candidate S_{j−1}·a_j; widening branch
    b to w yields P_b·(H(w) − H(w − 1)) in the next, P_b = S_b·(1 − c_{b+1} − a_{b+1}) being the chance that exactly b
    drafts are accepted and no second candidate, whether that is verified in the end or not. Gains for a position fall
    along an open branch, as profiles are, so that next to nothing is lost by taking the largest first; what is left in
    front of an opening that does not fit is spent as well as it can be. Where drafts are left out, a branch behind them
    is too, the last branch is likelier, and widths are found anew.

    Which drafts are verified is not chosen for the sum of both gains: a call that drops its drafts for a wide branch
    promises as much, one call later, and then would do so again.

    Three drafts with c = 0.9, 0.8, 0.1 and survival 0.5, 0.25, no lead: gains of drafts 0.9 0.72 0.07, of branches
    0: 0.05 0.03, 1: 0.09 0.05, 2: 0.32 0.16, 3: 0.04 0.02; a budget of 5 verifies two drafts and gives branch 2 its
    two drafts; with the third draft unverified, branch 2 stands for everything accepted.
    """
    most, length = len(price) - 1, len(profile.survival)
    reached = [1.0, *accumulate(confidences[: max(0, min(remaining - 1, most))], mul)]
    instead = [before * chance for before, chance in zip(reached[:-1], seconds, strict=False)]
    # The call after branch b came true writes one token of its own and needs no more drafts than are then left.
    room = [max(0, min(length, remaining - 2 - branch)) for branch in range(len(reached))]
    found = _spend(0, reached, instead, room, profile, price)
    if (num_drafts := found.num_drafts) < len(reached) - 1:
        found = _spend(num_drafts, reached[: num_drafts + 1], instead[:num_drafts], room, profile, price[num_drafts:])
    return found


NEGLIGIBLE = 1e-6
"""A chance that may be nothing but rounding."""

VERIFY = -1
"""In place of a branch: verify the next draft. Less one for each, the second candidates of the drafts."""


def _spend(
    num_drafts: int,
    reached: list[float],
    instead: list[float],
    room: list[int],
    profile: Profile,
    price: Sequence[float],
) -> Allocation:
    """The best call if the first `num_drafts` drafts are verified, and paid for, already.

    reached: the chances that 0, 1, … drafts are right; instead: of each, that its second candidate is and all before.
    """
    gains, lead, most = profile.gains, profile.lead, len(price) - 1
    lost = [*reached[1:], 0.0]
    chances = [now - after - other for now, after, other in zip_longest(reached, lost, instead, fillvalue=0.0)]
    widths, tokens, spent = [0] * len(chances), 0.0, 0
    seconds: list[int] = []
    best, taken = -price[0], Allocation(num_drafts, tuple(widths[: num_drafts + 1]))
    # Best gain for a position first; of each branch, what it would take next.
    offers = [(-gain, VERIFY - 1 - place) for place, gain in enumerate(instead[:num_drafts]) if gain > 0]
    if num_drafts < len(reached) - 1 and reached[num_drafts + 1] > 0:
        offers.append((-reached[num_drafts + 1], VERIFY))
    for branch, chance in enumerate(chances):
        if chance > NEGLIGIBLE and (opening := profile.openings[room[branch]]):
            offers.append((-chance * sum(gains[:opening]) / (opening + lead), branch))
    heapify(offers)
    while offers and spent < most:
        gain, branch = heappop(offers)
        following = 0.0
        if branch < VERIFY:
            seconds, tokens, spent = [*seconds, VERIFY - 1 - branch], tokens - gain, spent + 1
        elif branch == VERIFY:
            num_drafts, tokens, spent = num_drafts + 1, tokens - gain, spent + 1
            following = reached[num_drafts + 1] if num_drafts + 1 < len(reached) else 0.0
            if num_drafts <= len(instead) and instead[num_drafts - 1] > 0:
                heappush(offers, (-instead[num_drafts - 1], VERIFY - num_drafts))
        else:
            width = widths[branch]
            after = width + 1 if width else min(profile.openings[room[branch]], most - spent - lead)
            if after > width:
                widths[branch] = after
                tokens += chances[branch] * sum(gains[width:after])
                spent += after - width if width else after + lead
                following = chances[branch] * gains[after] if after < room[branch] else 0.0
        if following > 0:
            heappush(offers, (-following, branch))
        if tokens - price[spent] > best:
            best = tokens - price[spent]
            taken = Allocation(num_drafts, tuple(widths[: num_drafts + 1]), tuple(sorted(seconds)))
    return taken
