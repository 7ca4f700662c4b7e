"""What answers cost, and what plain decoding costs beside them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from transformers import PreTrainedModel

from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request
from ptp.decoding.session import Step
from ptp.sampling import SamplingRule

BASELINE_TOKENS, BASELINE_SECONDS = 64, 2.0
"""Plain calls that are timed, and the time after which no more are made."""

FEWEST = 4
"""Plain calls without which there is no baseline."""


@dataclass(frozen=True)
class Turn:
    """An answer. seconds: of each call; the first one's include reading the prompt. num_reused: prompt tokens whose
    keys were cached. finish_reason: see `Step`; None if the user stopped it."""

    request: Request
    steps: list[Step]
    seconds: list[float]
    num_reused: int

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    @property
    def finish_reason(self) -> str | None:
        return self.steps[-1].finish_reason


@dataclass(frozen=True)
class Figures:
    """Counts of answers. Timed are all calls but each answer's first, which has a prompt to read."""

    num_tokens: int
    num_calls: int
    num_drafts: int
    num_accepted: int
    timed_tokens: int
    timed_seconds: float

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Figures:
        steps = [step for turn in turns for step in turn.steps]
        return cls(
            num_tokens=sum(len(step.token_ids) for step in steps),
            num_calls=len(steps),
            num_drafts=sum(step.num_drafts for step in steps),
            num_accepted=sum(step.num_accepted for step in steps),
            timed_tokens=sum(len(step.token_ids) for turn in turns for step in turn.steps[1:]),
            timed_seconds=sum(sum(turn.seconds[1:]) for turn in turns),
        )

    @property
    def tokens_per_second(self) -> float | None:
        """None if nothing was timed."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None

    def described(self, plain: float | None) -> str:
        """One line. plain: tokens per second of plain decoding, if it was measured."""
        parts = [
            f"{self.num_tokens:,} {'token' if self.num_tokens == 1 else 'tokens'}",
            f"{self.num_calls:,} {'call' if self.num_calls == 1 else 'calls'}",
            f"{self.num_tokens / self.num_calls:.2f} tokens per call",
        ]
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"{speed:,.1f} tokens/s")
            if plain is not None:
                parts.append(f"{speed / plain:.2f}x plain decoding")
        return ", ".join(parts)


NO_DRAFTS = (
    "no drafts: the time of calls on this machine says that they do not pay with this model; "
    "a budget makes them all the same, such as {}"
)
"""Said once where a measured budget decodes plainly, which would look like a fault; {}: how to give a budget."""


def plain_speed(base_model: PreTrainedModel, request: Request, rule: SamplingRule) -> float | None:
    """Tokens per second of the bare loop, behind the prompt of a request; None if there is room for too few of them.

    As in `Figures`, the first call does not count: it reads the prompt. The text is not used, so nothing ends it.
    """
    clocked = _Clocked(**{each.name: getattr(request, each.name) for each in fields(request)})
    decode_plainly(base_model, clocked, rule)
    num_timed = len(clocked.times) - 1
    return num_timed / (clocked.times[-1] - clocked.times[0]) if num_timed >= FEWEST else None


@dataclass(frozen=True)
class _Clocked(Request):
    """A request that notes when each of its tokens is there, and that ends when enough are."""

    times: list[float] = field(default_factory=list)

    def finish_reason(self, tokens: Sequence[int]) -> str | None:
        self.times.append(time.perf_counter())
        seconds, num_timed = self.times[-1] - self.times[0], len(self.times) - 1
        enough = num_timed >= BASELINE_TOKENS or (seconds > BASELINE_SECONDS and num_timed >= FEWEST)
        return "length" if enough else None
