"""What positions are worth: a number set by hand, or what a call's time on this machine makes of them (METHOD §4, 5).

A policy gives the price of spending positions on a text, in tokens, for which `allocate` finds the best call. Under a
fixed budget positions cost nothing, up to their number. Measured, n positions cost the tokens that their time would
have yielded otherwise: rate · (t(n) − t(0)), t being the time of a call and the rate the tokens a second that decoding
yields, learnt from its own calls. Where that rate falls behind plain decoding's, calls are plain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Protocol

import numpy as np

from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.allocation import Profile, fixed

PLAIN = [0.0]
"""The price list of plain decoding: no positions are to be had."""

MEMORY = 64
"""Calls over which the rate is averaged."""

PRIOR = 2
"""Calls that the profile's promise counts for."""

PROBATION = 16
"""Calls after each of which drafting must have paid."""

PAUSE = 512
"""Calls that stay plain after drafting did not pay, twice as many each time: probations then cost next to nothing."""

DOUBT = 1.1
"""How many times plain decoding's rate held-out windows must promise for drafting to begin: decoding keeps less."""

PRIOR_WINDOWS = 16
"""Windows that the acceptance profile counts for beside those that decoding itself has seen."""

TINY = 1e-30
"""In place of no draft at all, in a denominator."""


class Policy(Protocol):
    """How a decoder prices positions. most: positions of a text that a call may spend."""

    most: int

    def price(self, num_texts: int) -> Sequence[float]:
        """What spending 0 … n positions on each of so many texts costs, in tokens."""

    def profile(self, num_texts: int) -> Profile:
        """What branches yield, net of what verifying their drafts will cost."""

    def learn(
        self, num_tokens: int, num_positions: int, confidences: Sequence[Sequence[float]], widths: Sequence[int]
    ) -> None:
        """What a call yielded: tokens of all its texts, and of each the confidences of its new drafts.

        num_positions: what each text could spend, the last of its tokens not counted. widths: of each text, how many of
        the new drafts have a position of their own.
        """


class FixedBudget:
    """At most so many positions for each text, whatever they cost."""

    def __init__(self, profile: Profile, budget: int) -> None:
        self.most, self._profile, self._price = budget, profile, fixed(budget)

    def price(self, num_texts: int) -> Sequence[float]:
        return self._price

    def profile(self, num_texts: int) -> Profile:
        return self._profile

    def learn(
        self, num_tokens: int, num_positions: int, confidences: Sequence[Sequence[float]], widths: Sequence[int]
    ) -> None:
        pass


@dataclass(frozen=True)
class Latency:
    """Seconds of calls as measured, by their number of texts and by the positions that each text spends."""

    seconds: Mapping[int, Mapping[int, float]]

    def of(self, num_texts: int, most: int) -> list[float]:
        """Seconds of calls of so many texts, each of which spends 0 … most positions; straight lines between."""
        # A text has a position of its own besides, which counts where nothing but a proportion is known.
        own = np.arange(1.0, most + 2)
        curves = [_line(own, {1 + positions: s for positions, s in curve.items()}) for curve in self.seconds.values()]
        number = np.array([float(num_texts)])
        seconds = [_line(number, dict(zip(self.seconds, column, strict=True)))[0] for column in np.transpose(curves)]
        return np.maximum.accumulate(seconds).tolist()


def _line(at: np.ndarray, points: Mapping[int, float]) -> np.ndarray:
    """A rising line through points, continued as it ends; in proportion, if there is one point only."""
    x = np.array(sorted(points))
    # None less than that of a smaller call: a larger one was measured the faster by chance.
    y = np.maximum.accumulate([points[key] for key in x])
    if len(x) == 1:
        return y * at / x
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.interp(at, x, y) + np.maximum(at - x[-1], 0) * slope


@dataclass
class _Rate:
    """What calls of so many texts have yielded of late. times: seconds of a call whose texts spend 0 … most."""

    tokens: float
    seconds: float
    times: list[float]
    num_texts: int
    num_calls: int = 0
    pause: int = 0
    next_pause: int = PAUSE
    price: list[float] = field(default_factory=list)
    profile: Profile | None = None

    @property
    def now(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def plain(self) -> float:
        """Tokens a second of plain decoding."""
        return self.num_texts / self.times[0]


class MeasuredBudget:
    """As many positions as the time of a call on this machine makes worth it; none where drafting does not pay.

    profile: the acceptance profile of held-out windows. What decoding itself drafts soon counts for more: it drafts
    where drafts failed before, which is where the text is hard to foresee. most: positions of a text that a call may
    spend at most.
    """

    def __init__(self, profile: Profile, latency: Latency, most: int) -> None:
        self.most, self.lead, self.second, self.latency = most, profile.lead, profile.second, latency
        # Of drafts with a position and of continued ones: how many there were with all before them right, and how many
        # of those were right.
        reached = [PRIOR_WINDOWS * np.array([1.0, *survival]) for survival in (profile.survival, profile.continued)]
        self._asked, self._right = [each[:-1].copy() for each in reached], [each[1:].copy() for each in reached]
        self._rates: dict[int, _Rate] = {}

    def price(self, num_texts: int) -> Sequence[float]:
        rate = self._rate(num_texts)
        return PLAIN if rate.pause else rate.price

    def profile(self, num_texts: int) -> Profile:
        profile = self._rate(num_texts).profile
        assert profile is not None
        return profile

    def learn(
        self, num_tokens: int, num_positions: int, confidences: Sequence[Sequence[float]], widths: Sequence[int]
    ) -> None:
        rate = self._rate(len(confidences))
        if rate.pause:
            rate.pause -= 1
            rate.num_calls = 0
            return
        fade = 1 - 1 / MEMORY
        rate.tokens = rate.tokens * fade + num_tokens
        rate.seconds = rate.seconds * fade + rate.times[min(num_positions, self.most)]
        rate.num_calls += 1
        for window, width in zip(confidences, widths, strict=True):
            self._learn_profile(window, width)
        if rate.num_calls % PROBATION == 0:
            if rate.now < rate.plain:
                rate.pause, rate.next_pause = rate.next_pause, 2 * rate.next_pause
                # What comes after the pause is judged by itself.
                rate.tokens, rate.seconds = PRIOR * rate.num_texts, PRIOR * rate.times[0]
            self._reprice(rate)

    def _learn_profile(self, confidences: Sequence[float], width: int) -> None:
        """Count drafts for as much as they claim, the first `width` of them as those that have a position."""
        reached = np.fromiter(accumulate(confidences, mul, initial=1.0), float)
        for kind, own in enumerate((slice(0, width), slice(width, len(confidences)))):
            self._asked[kind][own] += reached[:-1][own]
            self._right[kind][own] += reached[1:][own]

    def _profile(self, verifying: float = 0.0) -> Profile:
        """The acceptance profile so far."""
        survival, continued = (
            tuple(np.cumprod(right / np.maximum(asked, TINY)).tolist())
            for asked, right in zip(self._asked, self._right, strict=True)
        )
        return Profile(survival, self.lead, continued, self.second, verifying)

    def _rate(self, num_texts: int) -> _Rate:
        """The rate so far; to begin with, what the profile promises of the best fixed budget."""
        if num_texts not in self._rates:
            times = self.latency.of(num_texts, self.most)
            budgets = sorted({0, *np.linspace(2, self.most, 12).round().astype(int).tolist()})
            profile = self._profile()
            tokens = {budget: num_texts * simulated_tokens_per_call(profile, budget, 50) for budget in budgets}
            best = max(budgets, key=lambda budget: tokens[budget] / times[budget])
            rate = self._rates[num_texts] = _Rate(PRIOR * tokens[best], PRIOR * times[best], times, num_texts)
            if rate.now < DOUBT * rate.plain:
                rate.pause = PAUSE
            self._reprice(rate)
        return self._rates[num_texts]

    def _reprice(self, rate: _Rate) -> None:
        rate.price = [rate.now * (seconds - rate.times[0]) / rate.num_texts for seconds in rate.times]
        # A draft that is proposed costs a position once more, when it is verified.
        rate.profile = self._profile(verifying=rate.price[-1] / max(1, self.most))
