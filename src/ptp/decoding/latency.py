"""How long a call of so many positions takes, measured once for a model on a machine and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
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

CALLS = ((1, (0, 2, 4, 8, 12, 16, 24, 32, 48, 64)), (8, (8, 24, 64)))
"""What is measured: texts of a call, and positions that each may spend."""

ROUNDS, SECONDS = 9, 6.0
"""Calls of each kind, the median of which counts, and the time after which no further round begins."""

LONGEST = 0.5
"""Seconds of a call beyond which larger ones are not tried: a call that long grows in proportion to its positions."""

CONTEXT = 128
"""Prompt tokens, at most, that the measured calls stand behind."""


class _Meter(FixedBudget):
    """A budget of which every call spends as much as it is told to, and that notes how many positions it had."""

    budget = num_positions = 0

    def price(self, num_texts: int) -> Sequence[float]:
        return fixed(self.budget)

    def learn(self, num_texts: int, num_tokens: int, num_positions: int) -> None:
        self.num_positions = num_positions


def measure_latency(make_session: Callable[[Policy, int], Session], request: Request, profile: Profile) -> Latency:
    """Time calls of sessions, the whole of each step, in rounds.

    make_session: of a policy and a number of slots. request: of a prompt, with room for two windows.
    """
    started = time.perf_counter()
    times: dict[int, list[float]] = {}
    too_long: set[tuple[int, int]] = set()
    most = max(budget for _, budgets in CALLS for budget in budgets)
    # Drafts are so likely to be right that there is always something to spend on.
    profile = Profile(tuple(0.9**k for k in range(1, len(profile.survival) + 1)), profile.lead)
    sessions = {num_texts: make_session(_Meter(profile, most), num_texts) for num_texts, _ in CALLS}
    for number in range(ROUNDS + 1):
        for num_texts, budgets in CALLS:
            for budget in budgets:
                if any(num_texts * budget > texts * spent for texts, spent in too_long):
                    continue
                positions, seconds = _timed_step(sessions[num_texts], request, budget, len(profile.survival))
                if number:
                    times.setdefault(positions, []).append(seconds)
                elif seconds > LONGEST and budget:
                    too_long.add((num_texts, budget))
        if number > 1 and time.perf_counter() - started > SECONDS:
            break
    found = {positions: statistics.median(values) for positions, values in sorted(times.items())}
    return Latency(tuple(found), tuple(found.values()))


def _timed_step(session: Session, request: Request, budget: int, num_drafts: int) -> tuple[int, float]:
    """Positions and seconds of one step, in which every slot's text has drafts at hand and spends the budget."""
    meter = session.policy
    assert isinstance(meter, _Meter)
    meter.budget = budget
    while not session.is_full:
        text = session.enter(request)
        text.drafts = [0] * min(num_drafts, budget // 4)
        text.confidences = [0.9] * len(text.drafts)
    begun = time.perf_counter()
    session.step()
    seconds = time.perf_counter() - begun
    for text in session.texts:
        session.leave(text)
    return meter.num_positions, seconds


def kept_latency(model: PTPModel, compiled: bool, measure: Callable[[], Latency]) -> Latency:
    """The latency of a model's calls on this machine, from the user's cache directory or measured and kept there."""
    path = _cache_directory() / f"{_key(model, compiled)}.json"
    try:
        return Latency(**{name: tuple(values) for name, values in json.loads(path.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    latency = measure()
    try:
        write_atomically(path, json.dumps(asdict(latency)).encode())
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
