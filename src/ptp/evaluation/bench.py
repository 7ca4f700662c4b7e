"""Speed of ways of decoding on the same questions, taken in turn within one run (METHOD §5).

requests ── each by every method, in turn ──► rounds ── by task and method ──► figures
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from ptp.decoding.requests import Request
from ptp.evaluation.methods import PLAIN, Answer, Call, Method

Spread = tuple[float, float]

OVERALL = "overall"
"""Beside the tasks: all questions."""


class Trial(NamedTuple):
    """What a method wrote, and the seconds it took at each repetition; all of them write the same."""

    answer: Answer
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Round:
    """One prompt answered by every method. question: its number; the turns of a question are rounds of their own.

    trials: by method, the plain loop's among them.
    """

    question: int
    task: str
    request: Request
    trials: dict[str, Trial]


@dataclass(frozen=True)
class Figures:
    """What a method reached over the questions of a task, or over all.

    tokens_per_call: τ, tokens over calls of the base model, bonus tokens included; Spec-Bench's mean accepted tokens.
    acceptance_rate: accepted over drafted tokens, null if there were none. acceptance_by_position: of the calls with
    drafts, the share that accepted the first, the second, … as vLLM counts it. tokens_per_second: median over
    questions, and its quartiles. speedup: see `speedups`; median over repetitions, and its range. speedup_quartiles:
    over questions, of the ratio of tokens per second to those of the plain loop. overhead: τ / speed-up − 1.
    ms_per_call: median over prompts of their time by their calls, the assistant's calls and all else included.
    """

    num_questions: int
    num_tokens: int
    num_calls: int
    num_draft_tokens: int
    num_accepted_tokens: int
    tokens_per_call: float
    acceptance_rate: float | None
    acceptance_by_position: list[float]
    tokens_per_second: float
    tokens_per_second_quartiles: Spread
    speedup: float
    speedup_range: Spread
    speedup_quartiles: Spread
    overhead: float
    ms_per_call: float

    @classmethod
    def of(cls, rounds: Sequence[Round], method: str) -> Figures:
        """Count what a method did in these rounds, and measure it against the plain loop."""
        trials = [played.trials[method] for played in rounds]
        calls = [call for trial in trials for call in trial.answer.calls]
        num_tokens = sum(len(trial.answer.token_ids) for trial in trials)
        num_drafts, num_accepted = (sum(counts) for counts in zip(*calls, strict=True))
        speeds, plain_speeds = (tokens_per_second(rounds, name, statistics.median) for name in (method, PLAIN))
        by_repetition = speedups(rounds, method)
        speedup, tokens_per_call = statistics.median(by_repetition), num_tokens / len(calls)
        return cls(
            num_questions=len(speeds),
            num_tokens=num_tokens,
            num_calls=len(calls),
            num_draft_tokens=num_drafts,
            num_accepted_tokens=num_accepted,
            tokens_per_call=tokens_per_call,
            acceptance_rate=num_accepted / num_drafts if num_drafts else None,
            acceptance_by_position=acceptance_by_position(calls),
            tokens_per_second=statistics.median(speeds.values()),
            tokens_per_second_quartiles=quartiles(list(speeds.values())),
            speedup=speedup,
            speedup_range=(min(by_repetition), max(by_repetition)),
            speedup_quartiles=quartiles([speeds[question] / plain_speeds[question] for question in speeds]),
            overhead=tokens_per_call / speedup - 1,
            ms_per_call=1000 * statistics.median(statistics.median(t.seconds) / len(t.answer.calls) for t in trials),
        )


def take_turns(
    methods: Mapping[str, Method],
    request: Request,
    repetitions: int,
    first: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Trial]:
    """Answer one request by every method, again and again.

    They take turns, so that a machine that slows down slows them all. first: which of them begins; at the next
    repetition it is the next one, so that none always goes first.
    """
    names = list(methods)
    answers: dict[str, Answer] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        start = (first + repetition) % len(names)
        for name in names[start:] + names[:start]:
            begun = clock()
            answers[name] = methods[name](request)
            seconds[name].append(clock() - begun)
    return {name: Trial(answers[name], tuple(seconds[name])) for name in names}


def figures(rounds: Sequence[Round]) -> dict[str, dict[str, Figures]]:
    """Figures by task and method: `OVERALL`, and each task if there are several."""
    tasks = list(dict.fromkeys(played.task for played in rounds))
    groups = {OVERALL: rounds}
    if len(tasks) > 1:
        groups |= {task: [played for played in rounds if played.task == task] for task in tasks}
    return {task: {name: Figures.of(group, name) for name in rounds[0].trials} for task, group in groups.items()}


def tokens_per_second(
    rounds: Sequence[Round], method: str, choose: Callable[[Sequence[float]], float]
) -> dict[int, float]:
    """Of each question by number, its turns taken together. choose: of the repetitions' seconds, one."""
    tokens: Counter[int] = Counter()
    seconds: defaultdict[int, float] = defaultdict(float)
    for played in rounds:
        answer, taken = played.trials[method]
        tokens[played.question] += len(answer.token_ids)
        seconds[played.question] += choose(taken)
    return {question: tokens[question] / seconds[question] for question in tokens}


def speedups(rounds: Sequence[Round], method: str) -> list[float]:
    """The speed-up at each repetition, as Spec-Bench defines it: the mean over questions of tokens per second, divided
    by the same mean of the plain loop."""

    def speed(name: str, repetition: int) -> float:
        return statistics.mean(tokens_per_second(rounds, name, itemgetter(repetition)).values())

    num_repetitions = len(rounds[0].trials[method].seconds)
    return [speed(method, repetition) / speed(PLAIN, repetition) for repetition in range(num_repetitions)]


def acceptance_by_position(calls: Sequence[Call]) -> list[float]:
    """Of the calls that had drafts, the share that accepted the first, the second, … (vLLM).

    A call accepts drafts from the first on, so the shares fall; a position that a call had no draft for counts as
    refused. Calls with (drafts, accepted) (2, 2), (1, 0), (3, 1), (0, 0): 2/3, 1/3, 0.
    """
    with_drafts = [call for call in calls if call.num_drafts]
    longest = max((call.num_drafts for call in with_drafts), default=0)
    return [sum(call.num_accepted > place for call in with_drafts) / len(with_drafts) for place in range(longest)]


def quartiles(values: Sequence[float]) -> Spread:
    """The lower and the upper; of a single value, itself twice."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper
