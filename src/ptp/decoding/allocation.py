"""How many drafts to verify and how wide to make each branch of the next call (METHOD §4, step 4)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """num_drafts: drafts the call verifies. widths: drafts each branch b = 0 … num_drafts proposes."""

    num_drafts: int
    widths: tuple[int, ...]

    def num_positions(self, lead: int) -> int:
        """Positions the call spends; a branch with any draft spends `lead` more (1 in O-PTP, 0 in C-PTP)."""
        return self.num_drafts + sum(width + lead for width in self.widths if width)


def allocate(
    confidences: Sequence[float], survival: Sequence[float], budget: int, remaining: int, lead: int = 0
) -> Allocation:
    """Spend `budget` positions where they are expected to yield most tokens.

    confidences: c_1 … c_m of the drafts at hand. survival: s_1 … s_L of the acceptance profile, s_w being the chance
    that the first w drafts of a branch are all accepted, so that H(w) = s_1 + … + s_w. remaining: tokens still to be
    written; nothing beyond them is drafted. lead: positions a branch spends before its first draft.

    Verifying draft j yields S_j = c_1···c_j tokens in this call; widening branch b to w yields P_b·s_w in the next,
    P_b = S_b·(1 − c_{b+1}) being the chance that exactly b drafts are accepted. All gains fall along a branch, so
    taking the largest first is exact (with a lead, nearly so), and S_j ≥ P_j·s_w means that no branch is opened
    behind an unverified draft.

    Three drafts with c = 0.9, 0.8, 0.1 and survival 0.5, 0.25: gains of drafts 0.9 0.72 0.07, of branches
    0: 0.05 0.03, 1: 0.09 0.05, 2: 0.32 0.16, 3: 0.04 0.02; a budget of 5 verifies two drafts and gives branch 2 its
    two drafts; with the third draft unverified, branch 2 stands for everything accepted.
    """
    confidences = list(confidences)[: max(0, min(budget, remaining - 1))]
    if budget == 0 or not survival:
        return Allocation(len(confidences), (0,) * (len(confidences) + 1))
    allocation = _greedy(confidences, survival, budget, remaining, lead)
    if allocation.num_drafts < len(confidences):
        # Without the drafts left out, the last branch is likelier than was assumed.
        allocation = _greedy(confidences[: allocation.num_drafts], survival, budget, remaining, lead)
    return allocation


def _greedy(
    confidences: Sequence[float], survival: Sequence[float], budget: int, remaining: int, lead: int
) -> Allocation:
    reached = [1.0]
    for confidence in confidences:
        reached.append(reached[-1] * confidence)
    exactly = [r - after for r, after in zip(reached, [*reached[1:], 0.0], strict=True)]
    # The call after branch b came true writes one token of its own and needs no more drafts than are then left.
    room = [min(len(survival), remaining - 2 - branch) for branch in range(len(reached))]
    widths = [0]
    # Best gain first; verifying a draft opens the next draft and the branch behind it.
    gains: list[tuple[float, int, int]] = []
    _offer_draft(gains, reached, 1)
    _offer_position(gains, exactly, survival, room, 0, 0)
    while gains and budget > 0:
        _, branch, width = heapq.heappop(gains)
        if width == VERIFY:
            budget -= 1
            widths.append(0)
            _offer_draft(gains, reached, branch + 1)
            _offer_position(gains, exactly, survival, room, branch, 0)
            continue
        cost = 1 + (lead if width == 0 else 0)
        if cost <= budget:
            budget -= cost
            widths[branch] += 1
            _offer_position(gains, exactly, survival, room, branch, width + 1)
    return Allocation(len(widths) - 1, tuple(widths))


VERIFY = -1
"""In place of a width: the item verifies a draft."""


def _offer_draft(gains: list[tuple[float, int, int]], reached: list[float], draft: int) -> None:
    if draft < len(reached) and reached[draft] > 0:
        heapq.heappush(gains, (-reached[draft], draft, VERIFY))


def _offer_position(
    gains: list[tuple[float, int, int]],
    exactly: list[float],
    survival: Sequence[float],
    room: list[int],
    branch: int,
    width: int,
) -> None:
    if width < room[branch] and exactly[branch] * survival[width] > 0:
        heapq.heappush(gains, (-exactly[branch] * survival[width], branch, width))
