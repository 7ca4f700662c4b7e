"""What an acceptance profile promises before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptp.decoding.allocation import Profile, allocate, fixed

SIMULATED_CALLS = 1000
"""Of a text so long that its start does not matter."""


def simulated_tokens_per_call(
    survival: Sequence[float], budget: int, lead: int, num_calls: int = SIMULATED_CALLS
) -> float:
    """τ that decoding would reach if every draft were accepted as the profile says.

    Follows the chance of having m drafts at hand from call to call: each call verifies what the allocation chooses
    and leaves the chosen branch's drafts for the next. Confidences are the profile's own conditional rates. num_calls:
    calls of a text, the first of which has no drafts yet.
    """
    window = len(survival)
    rates = [s / before if before > 0 else 0.0 for s, before in zip(survival, [1.0, *survival], strict=False)]
    profile = Profile(tuple(survival), lead)
    plans = [allocate(rates[:m], profile, fixed(budget), remaining=10**6) for m in range(window + 1)]
    following, tokens = np.zeros((window + 1, window + 1)), np.ones(window + 1)
    for m, plan in enumerate(plans):
        reached = [1.0, *survival[: plan.num_drafts], 0.0]
        for accepted, width in enumerate(plan.widths):
            exactly = reached[accepted] - reached[accepted + 1]
            following[m, width] += exactly
            tokens[m] += exactly * accepted
    at_hand, total = np.eye(window + 1)[0], 0.0
    for _ in range(num_calls):
        total += float(at_hand @ tokens)
        at_hand = at_hand @ following
    return total / num_calls
