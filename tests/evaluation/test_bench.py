"""Figures of a benchmark are those that Spec-Bench and vLLM define, of methods that took turns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp.decoding.requests import Request
from ptp.evaluation.bench import (
    OVERALL,
    Figures,
    Round,
    Trial,
    acceptance_by_position,
    figures,
    quartiles,
    speedups,
    take_turns,
)
from ptp.evaluation.methods import PLAIN, PTP, Answer, Call, Method

REQUEST = Request([3], 8, frozenset(), torch.zeros(8))


def trial(calls: list[tuple[int, int]], *seconds: float) -> Trial:
    """Calls as (drafts, accepted)."""
    return Trial(Answer([5] * sum(accepted + 1 for _, accepted in calls), [Call(*call) for call in calls]), seconds)


def plain(num_tokens: int, *seconds: float) -> Trial:
    return trial([(0, 0)] * num_tokens, *seconds)


ROUNDS = [
    # One question of two turns: 12 tokens in 3 seconds by the plain loop, in 1 second by PTP.
    Round(0, "chat", REQUEST, {PTP: trial([(0, 0), (3, 3), (2, 0)], 0.5, 0.25), PLAIN: plain(6, 1, 1)}),
    Round(0, "chat", REQUEST, {PTP: trial([(4, 2), (2, 2)], 0.5, 0.25), PLAIN: plain(6, 2, 2)}),
    # 4 tokens, 1 a second; 2 a second.
    Round(1, "code", REQUEST, {PTP: trial([(0, 0), (1, 0), (1, 1)], 2, 1), PLAIN: plain(4, 4, 4)}),
]


def test_speed_up_is_the_mean_over_questions_of_tokens_per_second_over_the_same_of_the_plain_loop() -> None:
    third = Round(2, "code", REQUEST, {PTP: trial([(0, 0)] * 3, 3, 1.5), PLAIN: plain(3, 1, 1)})
    # (12 / 1 + 4 / 2 + 3 / 3) / (12 / 3 + 4 / 4 + 3 / 1), and the second repetition twice as fast.
    assert speedups([*ROUNDS, third], PTP) == [pytest.approx(15 / 8), pytest.approx(30 / 8)]
    assert speedups(ROUNDS, PLAIN) == [1, 1]


def test_figures_of_all_questions() -> None:
    found = Figures.of(ROUNDS, PTP)
    assert (found.num_questions, found.num_tokens, found.num_calls) == (2, 16, 8)
    assert (found.num_draft_tokens, found.num_accepted_tokens) == (13, 8)
    assert found.tokens_per_call == 2
    assert found.acceptance_rate == 8 / 13
    # Of six calls with drafts: (3, 3) (2, 0) (4, 2) (2, 2) (1, 0) (1, 1).
    assert found.acceptance_by_position == [4 / 6, 3 / 6, 1 / 6, 0]
    # From the median seconds, 0.75 of the first question and 1.5 of the second.
    assert found.tokens_per_second == (12 / 0.75 + 4 / 1.5) / 2
    assert found.speedup == pytest.approx(4.2)
    assert found.speedup_range == (pytest.approx(2.8), pytest.approx(5.6))
    ratios = (12 / 0.75 / 4, 4 / 1.5)
    assert found.speedup_quartiles == pytest.approx(quartiles(ratios))
    assert found.overhead == pytest.approx(2 / 4.2 - 1)
    assert found.ms_per_call == pytest.approx(1000 * sorted([0.375 / 3, 0.375 / 2, 1.5 / 3])[1])


def test_plain_decoding_drafts_nothing_and_is_its_own_measure() -> None:
    found = Figures.of(ROUNDS, PLAIN)
    assert (found.tokens_per_call, found.speedup, found.overhead) == (1, 1, 0)
    assert (found.acceptance_rate, found.acceptance_by_position) == (None, [])


def test_figures_come_by_task_and_of_a_single_task_once() -> None:
    found = figures(ROUNDS)
    assert list(found) == [OVERALL, "chat", "code"]
    assert all(list(methods) == [PTP, PLAIN] for methods in found.values())
    assert found["chat"][PTP] == Figures.of(ROUNDS[:2], PTP)
    assert found["code"][PTP].tokens_per_call == 4 / 3
    assert list(figures(ROUNDS[2:])) == [OVERALL]


@given(st.lists(st.integers(0, 6).flatmap(lambda drafts: st.tuples(st.just(drafts), st.integers(0, drafts)))))
def test_the_shares_by_position_fall_and_count_every_accepted_draft_once(pairs: list[tuple[int, int]]) -> None:
    shares = acceptance_by_position([Call(*pair) for pair in pairs])
    num_with_drafts = sum(drafts > 0 for drafts, _ in pairs)
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) * num_with_drafts == pytest.approx(sum(accepted for _, accepted in pairs))
    assert len(shares) == max((drafts for drafts, _ in pairs), default=0)


@given(st.lists(st.floats(0.1, 100), min_size=1))
def test_quartiles_lie_among_the_values(values: list[float]) -> None:
    lower, upper = quartiles(values)
    assert min(values) <= lower * (1 + 1e-12)
    assert lower <= upper <= max(values) * (1 + 1e-12)


def test_methods_take_turns_and_each_begins_as_often() -> None:
    now, order = 0.0, []

    def method(name: str, seconds: float) -> Method:
        def write(request: Request) -> Answer:
            nonlocal now
            assert request is REQUEST
            now += seconds
            order.append(name)
            return Answer([len(order)], [Call(0, 0)])

        return write

    methods = {"a": method("a", 1), "b": method("b", 20), "c": method("c", 300)}
    trials = take_turns(methods, REQUEST, repetitions=3, first=1, clock=lambda: now)
    assert "".join(order) == "bca" + "cab" + "abc"
    assert {name: trial.seconds for name, trial in trials.items()} == {
        "a": (1, 1, 1),
        "b": (20, 20, 20),
        "c": (300, 300, 300),
    }
    assert list(trials) == list(methods)
