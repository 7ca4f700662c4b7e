"""What positions are worth: a number set by hand, or what a call's time on this machine makes of them (METHOD §4, 5).

A policy gives the price of spending positions on a text, in tokens, for which `allocate` finds the best call. Under a
fixed budget positions cost nothing, up to their number. Measured, n positions cost the tokens that their time would
have yielded otherwise: rate · (t(1 + n) − t(1)), t being the time of a call and the rate the tokens a second that
decoding yields, learnt from its own calls. Where that rate falls behind plain decoding's, calls are plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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


class Policy(Protocol):
    """How a decoder prices positions. most: positions of a text that a call may spend."""

    most: int

    def price(self, num_texts: int) -> Sequence[float]:
        """What spending 0 … n positions on each of so many texts costs, in tokens."""

    def profile(self, num_texts: int) -> Profile:
        """What branches yield, net of what verifying their drafts will cost."""

    def learn(self, num_texts: int, num_tokens: int, num_positions: int) -> None:
        """A call of so many texts, with so many positions in all, yielded so many tokens."""


class FixedBudget:
    """At most so many positions for each text, whatever they cost."""

    def __init__(self, profile: Profile, budget: int) -> None:
        self.most, self._profile, self._price = budget, profile, fixed(budget)

    def price(self, num_texts: int) -> Sequence[float]:
        return self._price

    def profile(self, num_texts: int) -> Profile:
        return self._profile

    def learn(self, num_texts: int, num_tokens: int, num_positions: int) -> None:
        pass


@dataclass(frozen=True)
class Latency:
    """Seconds of a call by its number of positions, as measured; a straight line between, and behind the last two."""

    positions: tuple[int, ...]
    seconds: tuple[float, ...]

    @cached_property
    def rising(self) -> np.ndarray:
        """The seconds, none less than those of a smaller call: a larger one was measured the faster by chance."""
        return np.maximum.accumulate(self.seconds)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        seconds = self.rising
        slope = (seconds[-1] - seconds[-2]) / (self.positions[-1] - self.positions[-2])
        beyond = np.maximum(positions - self.positions[-1], 0) * slope
        return np.interp(positions, self.positions, seconds) + beyond


@dataclass
class _Rate:
    """What calls of so many texts have yielded of late. extra: (most + 1,), seconds of 0 … n positions for a text."""

    tokens: float
    seconds: float
    plain: float
    extra: np.ndarray
    num_calls: int = 0
    pause: int = 0
    next_pause: int = PAUSE
    profile: Profile | None = None
    price: list[float] = field(default_factory=list)

    @property
    def now(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class MeasuredBudget:
    """As many positions as the time of a call on this machine makes worth it; none where drafting does not pay.

    profile: the acceptance profile; what the calls themselves yield soon counts for more. most: positions of a text
    that a call may spend at most.
    """

    def __init__(self, profile: Profile, latency: Latency, most: int) -> None:
        self.most, self._profile, self.latency = most, profile, latency
        self._rates: dict[int, _Rate] = {}

    def price(self, num_texts: int) -> Sequence[float]:
        rate = self._rate(num_texts)
        return PLAIN if rate.pause else rate.price

    def profile(self, num_texts: int) -> Profile:
        profile = self._rate(num_texts).profile
        assert profile is not None
        return profile

    def learn(self, num_texts: int, num_tokens: int, num_positions: int) -> None:
        rate = self._rate(num_texts)
        if rate.pause:
            rate.pause -= 1
            rate.num_calls = 0
            return
        fade = 1 - 1 / MEMORY
        rate.tokens = rate.tokens * fade + num_tokens
        rate.seconds = rate.seconds * fade + float(self.latency(np.array(num_positions)))
        rate.num_calls += 1
        if rate.num_calls % PROBATION == 0:
            if rate.now < rate.plain:
                rate.pause, rate.next_pause = rate.next_pause, 2 * rate.next_pause
                # What comes after the pause is judged by itself.
                rate.tokens, rate.seconds = PRIOR * num_texts, PRIOR * self._seconds(num_texts, 0)
            self._reprice(rate)

    def _seconds(self, num_texts: int, positions: int) -> float:
        return float(self.latency(np.array(num_texts * (1 + positions))))

    def _rate(self, num_texts: int) -> _Rate:
        """The rate so far; to begin with, what the profile promises of the best fixed budget."""
        if num_texts not in self._rates:
            budgets = sorted({0, *np.linspace(2, self.most, 12).round().astype(int).tolist()})
            tokens = {
                budget: num_texts * simulated_tokens_per_call(self._profile.survival, budget, self._profile.lead, 50)
                for budget in budgets
            }
            best = max(budgets, key=lambda budget: tokens[budget] / self._seconds(num_texts, budget))
            times = self.latency(num_texts * (1 + np.arange(self.most + 1)))
            rate = _Rate(
                tokens=PRIOR * tokens[best],
                seconds=PRIOR * self._seconds(num_texts, best),
                plain=num_texts / self._seconds(num_texts, 0),
                extra=(times - times[0]) / num_texts,
                pause=0 if best else PAUSE,
            )
            self._reprice(rate)
            self._rates[num_texts] = rate
        return self._rates[num_texts]

    def _reprice(self, rate: _Rate) -> None:
        rate.price = (rate.now * rate.extra).tolist()
        # A draft that is proposed costs a position once more, when it is verified.
        verifying = rate.price[-1] / max(1, self.most)
        net = tuple(max(0.0, chance - verifying) for chance in self._profile.survival)
        rate.profile = Profile(net, self._profile.lead)
