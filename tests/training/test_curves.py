from itertools import pairwise

import pytest

from ptp.training.curves import MOST_POINTS, curves


def test_curves_are_the_log_s_own_figures_at_their_steps() -> None:
    log = [
        {"loss": 3.0, "learning_rate": 1e-4, "correct": 0.5, "accuracy/0": 0.7, "tokens_per_second": 900, "step": 10},
        {"eval_loss": 3.5, "eval_correct": 0.4, "eval_accuracy/0": 0.6, "eval_accuracy/1": 0.2, "step": 10},
        {"loss": 2.0, "learning_rate": 1e-4, "correct": 0.8, "accuracy/0": 0.8, "tokens_per_second": 950, "step": 20},
        {"eval_loss": 2.5, "eval_correct": 0.7, "eval_accuracy/0": 0.7, "eval_accuracy/1": 0.3, "step": 20},
        {"train_loss": 2.5, "train_runtime": 7.0, "step": 20},
    ]
    assert curves(log) == {
        "loss": [(10, 3.0), (20, 2.0)],
        "correct": [(10, 0.5), (20, 0.8)],
        "tokens_per_second": [(10, 900.0), (20, 950.0)],
        "eval_loss": [(10, 3.5), (20, 2.5)],
        "eval_correct": [(10, 0.4), (20, 0.7)],
        "eval_accuracy/0": [(10, 0.6), (20, 0.7)],
        "eval_accuracy/1": [(10, 0.2), (20, 0.3)],
    }


def test_nothing_logged_gives_no_curve() -> None:
    assert curves([]) == {}


@pytest.mark.parametrize("length", [1, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 100_000, 100_001])
def test_a_long_training_keeps_evenly_spaced_points_up_to_its_end(length: int) -> None:
    points = curves({"step": step, "loss": 1 / step} for step in range(1, length + 1))["loss"]
    assert len(points) <= MOST_POINTS
    assert points[-1] == (length, 1 / length)
    steps = [step for step, _ in points]
    assert len({after - before for before, after in pairwise(steps)}) <= 1
    assert len(points) == length or length > MOST_POINTS
    assert len(points) > MOST_POINTS / 2 or length <= MOST_POINTS / 2
