"""What an acceptance profile promises before anything is decoded."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import numpy as np

from ptp.decoding.allocation import Profile, allocate, fixed

SIMULATED_CALLS = 1000
"""Of a text so long that its start does not matter."""


def simulated_tokens_per_call(profile: Profile, budget: int, num_calls: int = SIMULATED_CALLS) -> float:
    """τ that decoding would reach if every draft were accepted as the profile says.

    Follows the chance that the last branch had w positions from call to call: each call verifies what the allocation
    chooses of that branch's drafts, and leaves those of the branch that comes true for the next; where a second
    candidate does, they are all continued. Confidences are the profile's own conditional rates. num_calls: calls of a
    text, the first of which has no drafts yet.
    """
    positions, price = len(profile.survival) + 1, fixed(budget)
    following, tokens = np.zeros((positions, positions)), np.ones(positions)
    for width in range(positions):
        rates = profile.rates(width)
        plan = allocate(rates, profile, price, remaining=10**6, seconds=profile.seconds(width))
        reached = [1.0, *accumulate(rates[: plan.num_drafts], mul), 0.0]
        for accepted, next_width in enumerate(plan.widths):
            exactly = reached[accepted] - reached[accepted + 1]
            instead = exactly * profile.second if accepted in plan.seconds else 0.0
            following[width, next_width] += exactly - instead
            following[width, 0] += instead
            tokens[width] += exactly * accepted + instead
    first = allocate([], profile, price, remaining=10**6)
    at_hand, total = np.eye(positions)[first.widths[0]], 1.0
    for _ in range(num_calls - 1):
        total += float(at_hand @ tokens)
        at_hand = at_hand @ following
    return total / num_calls
