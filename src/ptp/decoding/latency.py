"""How long a call of so many positions takes, measured once for a model on a machine and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from ptp.decoding.allocation import Profile, fixed
from ptp.decoding.budget import FixedBudget, Latency, Policy
from ptp.decoding.requests import Request
from ptp.decoding.session import Session
from ptp.errors import DataError
from ptp.files import write_atomically
from ptp.model.ptp_model import PTPModel

logger = logging.getLogger(__name__)

CALLS = {1: (0, 2, 4, 8, 12, 16, 24, 40, 64), 4: (0, 4, 12, 32), 16: (0, 4, 16)}
"""What is measured: positions that a text may spend, by the number of texts in a call."""

STRETCH = 5
"""Calls of a kind in succession, as in decoding; the first finds the processor as another kind left it, and does not
count."""

ROUNDS, SECONDS = 5, 6.0
"""Stretches of each kind, the median of whose calls counts, and the time after which no further round begins."""

LONGEST = 0.5
"""Seconds of a call beyond which larger ones are not tried: a call that long grows in proportion to its positions."""

CONTEXT = 128
"""Prompt tokens, at most, that the measured calls stand behind."""


class _Meter(FixedBudget):
    """A budget of which every call spends as much as it is told to, and that notes how many positions that were."""

    budget, num_positions = 0, -1

    def price(self, num_texts: int) -> Sequence[float]:
        return fixed(self.budget)

    def learn(
        self, num_tokens: int, num_positions: int, confidences: Sequence[Sequence[float]], widths: Sequence[int]
    ) -> None:
        self.num_positions = num_positions


@dataclass
class _Kind:
    """Calls alike, as they were measured."""

    num_texts: int
    budget: int
    positions: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure_latency(
    make_session: Callable[[Policy, int], Session], requests: Sequence[Request], profile: Profile
) -> Latency:
    """Time the calls of decoding, the whole of each step, by what they spend; all kinds take turns.

    make_session: of a policy and a number of slots. requests: texts to write, as many as there are in a call and with
    room for a stretch of calls.
    """
    started = time.perf_counter()
    # Drafts are so likely to be right that there is always something to spend on.
    sure = tuple(0.9**k for k in range(1, len(profile.survival) + 1))
    profile = Profile(sure, profile.lead, tuple(0.5**k for k in range(1, len(profile.continued) + 1)), profile.second)
    most = max(max(budgets) for budgets in CALLS.values())
    sessions = {num_texts: make_session(_Meter(profile, most), num_texts) for num_texts in CALLS}
    kinds = [_Kind(num_texts, budget) for num_texts, budgets in CALLS.items() for budget in budgets]
    for number in range(ROUNDS + 1):
        for kind in kinds:
            _measure_stretch(sessions[kind.num_texts], requests, kind)
            if number == 0 and kind.budget and kind.seconds[-1] > LONGEST:
                size = kind.num_texts * kind.budget
                kinds = [other for other in kinds if other.num_texts * other.budget <= size]
            if number == 0:
                kind.positions, kind.seconds = [], []  # what runs for the first time is slow
        if number > 1 and time.perf_counter() - started > SECONDS:
            break
    return Latency({n: _curve(kind for kind in kinds if kind.num_texts == n) for n in CALLS})


def _curve(kinds: Iterable[_Kind]) -> dict[int, float]:
    """Seconds by positions; short windows make calls alike whatever they may spend."""
    found: dict[int, list[float]] = {}
    for kind in kinds:
        found.setdefault(statistics.median_low(kind.positions), []).extend(kind.seconds)
    return {positions: statistics.median(seconds) for positions, seconds in found.items()}


def _measure_stretch(session: Session, requests: Sequence[Request], kind: _Kind) -> None:
    """Add calls of a kind to it, a stretch of them or as many as do not take too long."""
    meter = session.policy
    assert isinstance(meter, _Meter)
    meter.budget = kind.budget
    _begin(session, requests[: kind.num_texts])
    for number in range(STRETCH):
        if not session.is_full:
            _begin(session, requests[: kind.num_texts])
        begun = time.perf_counter()
        session.step()
        seconds = time.perf_counter() - begun
        if number or seconds > LONGEST:
            kind.positions.append(meter.num_positions)
            kind.seconds.append(seconds)
        if seconds > LONGEST:
            break


def _begin(session: Session, requests: Sequence[Request]) -> None:
    """Begin all texts anew, and read their prompts."""
    for text in session.texts:
        session.leave(text)
    for request in requests:
        session.enter(request)
    session.step()


def kept_latency(model: PTPModel, compiled: bool, measure: Callable[[], Latency]) -> Latency:
    """The latency of a model's calls on this machine, from the user's cache directory or measured and kept there."""
    path = _cache_directory() / f"{_key(model, compiled)}.json"
    try:
        found = json.loads(path.read_text())
        return Latency({int(n): {int(x): float(y) for x, y in curve.items()} for n, curve in found.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    latency = measure()
    try:
        write_atomically(path, json.dumps(latency.seconds).encode())
    except DataError as error:
        logger.warning("the time of calls will be measured again: %s", error)
    return latency


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptp" / "latency"


def _key(model: PTPModel, compiled: bool) -> str:
    """What the time of a call depends on."""
    device = model.device
    parts = [
        model.base_model.config.to_json_string(),
        str(model.dtype),
        model.ptp_config.model_dump_json(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} {platform.machine()}",
        f"{compiled} {platform.node()} {torch.get_num_threads()} {torch.__version__} {transformers.__version__}",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
