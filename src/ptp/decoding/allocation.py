"""How many drafts to verify and how wide to make each branch of the next call (METHOD §4, step 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


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
    def expected(self) -> np.ndarray:
        """H(0) … H(L)."""
        return np.concatenate([[0.0], np.cumsum(self.survival)])

    @cached_property
    def openings(self) -> np.ndarray:
        """(L + 1,) int64: with room for 0 … L drafts, how many a branch opens with, those of the best H(w)/(w + lead).

        A lead makes the first draft dear; behind the opening, each further draft yields less for its position.
        """
        widths = np.arange(len(self.expected))
        rates = self.expected / np.maximum(widths + self.lead, 1)
        return np.array([rates[: room + 1].argmax() for room in widths])


def fixed(budget: int) -> np.ndarray:
    """The price of positions under a budget: nothing, and no more can be had."""
    return np.zeros(budget + 1)


def allocate(
    confidences: Sequence[Sequence[float]], profile: Profile, price: np.ndarray, remaining: Sequence[int]
) -> list[Allocation]:
    """For each of B texts, spend positions so that the tokens expected of them, less their price, are most.

    confidences: of each text, c_1 … c_m of the drafts at hand. price: (n + 1,), what spending 0 … n positions on a text
    costs, in tokens; it never falls (see `fixed` for a budget). remaining: tokens still to be written of each text;
    nothing beyond them is drafted.

    Verifying draft j yields S_j = c_1···c_j tokens in this call; widening branch b to w yields P_b·s_w in the next,
    P_b = S_b·(1 − c_{b+1}) being the chance that exactly b drafts are accepted. For each number of drafts verified, the
    last branch stands for all that were accepted, and gains for a position fall along every open branch: the largest
    first is exact for whatever number of positions they sum to. What is left of a budget in front of an opening that
    does not fit goes to whatever does.

    Three drafts with c = 0.9, 0.8, 0.1 and survival 0.5, 0.25, no lead: verifying two gains 0.9 and 0.72, and their
    branches 0: 0.05 0.03, 1: 0.09 0.05, 2: 0.36 0.18. So a budget of 5 verifies both, gives branch 2 its two drafts and
    branch 1 one; verifying the third draft too would gain 0.07 in place of that 0.09.

    Axes below: text, number of drafts verified, branch, width.
    """
    most, length = len(price) - 1, len(profile.survival)
    drafts = [list(row[: max(0, min(left - 1, most))]) for row, left in zip(confidences, remaining, strict=True)]
    if not length:
        return [Allocation(len(row), (0,) * (len(row) + 1)) for row in drafts]
    num_drafts = np.array([len(row) for row in drafts])
    branches, widths = np.arange(num_drafts.max() + 1), np.arange(1, length + 1)
    reached = np.cumprod([[1.0, *row, *[0.0] * (len(branches) - len(row))] for row in drafts], axis=1)
    exactly = np.where(branches < branches[:, None], (reached[:, :-1] - reached[:, 1:])[:, None], 0.0)
    reached = reached[:, :-1]
    exactly[:, branches, branches] = reached

    # The call after branch b came true writes one token of its own and needs no more drafts than are then left.
    room = np.array(remaining)[:, None, None] - 2 - branches
    room = np.minimum(np.minimum(room, most - profile.lead - branches[:, None]), length)
    room = np.maximum(room, 0)[..., None]
    opening = profile.openings[room]
    opens = widths == opening
    gain = np.where(opens, profile.expected[opening], np.array(profile.survival)) * exactly[..., None]
    gain = np.where((widths >= np.maximum(opening, 1)) & (widths <= room), gain, 0.0).reshape(*exactly.shape[:2], -1)
    cost = np.where(opens, widths + profile.lead, 1).reshape(gain.shape)
    order = np.argsort(-gain / cost, axis=2, kind="stable")
    gain, cost = np.take_along_axis(gain, order, axis=2), np.take_along_axis(cost, order, axis=2)

    nothing = np.zeros((*gain.shape[:2], 1), np.int64)
    tokens = np.cumsum(reached, axis=1)[..., None] - 1 + np.concatenate([nothing, gain.cumsum(axis=2)], axis=2)
    spent = branches[:, None] + np.concatenate([nothing, cost.cumsum(axis=2)], axis=2)
    usable = (branches <= num_drafts[:, None])[..., None] & (spent <= most)
    usable[..., 1:] &= gain > 0
    worth = np.where(usable, tokens - price[np.minimum(spent, most)], -np.inf)

    allocations = []
    for text, best in enumerate(worth.reshape(len(worth), -1).argmax(axis=1)):
        verified, taken = divmod(int(best), worth.shape[2])
        final = [0] * (verified + 1)
        for branch, width in (divmod(item, length) for item in order[text, verified, :taken].tolist()):
            final[branch] = max(final[branch], width + 1)
        left = price[spent[text, verified, taken] :]
        if profile.lead and len(left) > 1:
            items, limits = order[text, verified, taken:].tolist(), room[text, verified, :, 0].tolist()
            _spend_rest(final, exactly[text, verified].tolist(), items, limits, profile, left)
        allocations.append(Allocation(verified, tuple(final)))
    return allocations


def _spend_rest(
    widths: list[int], exactly: list[float], items: list[int], room: list[int], profile: Profile, price: np.ndarray
) -> None:
    """Give what is left to branches in the given order of items: open one as wide as fits, or widen it by a draft.

    price: of what is left, from the positions spent on.
    """
    spent, most = 0, len(price) - 1
    for branch in (item // len(profile.survival) for item in items):
        if branch >= len(widths) or spent == most:
            continue
        before = widths[branch]
        cost = 1 if before else min(room[branch], most - spent - profile.lead) + profile.lead
        after = before + 1 if before else cost - profile.lead
        if before < after <= room[branch]:
            gain = exactly[branch] * (profile.expected[after] - profile.expected[before])
            if gain > price[spent + cost] - price[spent]:
                widths[branch], spent = after, spent + cost
