import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression
from torch import Tensor

from ptp.calibration import NUM_BINS, PRIOR_DRAFTS, Calibration, ascending, confidence_bin
from ptp.errors import ConfigError

CENTRES = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
counts = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1)), min_size=NUM_BINS, max_size=NUM_BINS)


def counted(confidences: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts tried and right by bin, (1, NUM_BINS)."""
    place = confidence_bin(confidences)
    return tuple(torch.bincount(place, weights, NUM_BINS).unsqueeze(0) for weights in (torch.ones_like(right), right))


def drafts(num_drafts: int, power: float, seed: int) -> tuple[Tensor, Tensor]:
    """Confidences, and whether drafts are right: with chance confidence to the power given."""
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(num_drafts, generator=generator)
    return confidences, (torch.rand(num_drafts, generator=generator) < confidences**power).float()


def log_loss(chances: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy(chances.clamp(1e-4, 1 - 1e-4), right))


def test_a_confidence_that_is_the_chance_stays_about_as_it_is() -> None:
    calibration = Calibration.of(*counted(*drafts(100_000, 1.0, seed=0)))
    inside = torch.linspace(0.03, 0.97, 50)
    assert (calibration(inside) - inside).abs().max() < 0.02


@pytest.mark.parametrize("power", [3.0, 0.4])
def test_one_that_is_too_high_or_too_low_becomes_the_share_that_was_right(power: float) -> None:
    calibration = Calibration.of(*counted(*drafts(100_000, power, seed=0)))
    inside = torch.linspace(0.1, 0.95, 50)
    assert (calibration(inside) - inside).abs().max() > 0.15
    assert (calibration(inside) - inside**power).abs().max() < 0.02


def test_where_nothing_was_tried_a_confidence_stays_as_it_is() -> None:
    inside = torch.linspace(0.03, 0.97, 50)
    untried = torch.zeros(1, NUM_BINS)
    assert torch.allclose(Calibration.of(untried, untried)(inside), inside)


def test_bins_are_equal_parts_of_the_unit_interval_and_certainty_is_in_the_last() -> None:
    assert confidence_bin(torch.tensor([0.0, 0.049, 0.051, 0.999, 1.0])).tolist() == [0, 0, 1, 19, 19]


def test_few_drafts_move_a_chance_less_than_many() -> None:
    place = NUM_BINS // 2
    chances = []
    for num_tried in (0, 1, 10, 1000):
        tried = torch.nn.functional.one_hot(torch.tensor([place]), NUM_BINS) * num_tried
        chances.append(Calibration.of(tried, 0 * tried)(CENTRES[place]).item())
    assert chances == sorted(chances, reverse=True)
    assert len(set(chances)) == 4
    assert chances[2] > PRIOR_DRAFTS * CENTRES[0] / (10 + PRIOR_DRAFTS)


@given(counts, st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30))
def test_a_higher_confidence_is_never_worth_less_and_none_is_sure(
    bins: list[tuple[int, float]], confidences: list[float]
) -> None:
    tried = torch.tensor([[num_tried for num_tried, _ in bins]])
    right = (tried * torch.tensor([share for _, share in bins])).floor()
    chances = Calibration.of(tried, right)(torch.tensor(sorted(confidences)))
    assert (chances.diff() >= -1e-6).all()
    assert ((chances > 0) & (chances < 1)).all()


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.5, 100)), min_size=1, max_size=25))
def test_curves_are_scipy_s_isotonic_regression(pairs: list[tuple[float, float]]) -> None:
    hits, weights = (np.array(values) for values in zip(*pairs, strict=True))
    expected = isotonic_regression(hits / weights, weights=weights).x
    assert ascending(hits.tolist(), weights.tolist()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("power", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("num_drafts", [0, 30, 300, 3000])
def test_on_drafts_it_has_not_seen_it_is_never_much_worse_and_soon_better(num_drafts: int, power: float) -> None:
    held_out, right = drafts(20_000, power, seed=1)
    before = log_loss(held_out, right)
    after = np.mean(
        [log_loss(Calibration.of(*counted(*drafts(num_drafts, power, seed)))(held_out), right) for seed in range(2, 7)]
    )
    assert after < before + 0.02
    if num_drafts >= 300 and power != 1.0:
        assert after < before - 0.02


def test_each_window_is_read_from_the_curve_of_what_it_foresaw() -> None:
    calibration = Calibration(curves=((0.1, 0.3), (0.5, 0.9)))
    confidences = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0]])
    chances = calibration(confidences, curve=torch.tensor([[False], [True]]))
    assert torch.allclose(chances, torch.tensor([[0.1, 0.1, 0.2, 0.3], [0.5, 0.5, 0.7, 0.9]]))


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([[0.5]], "two or more ascending chances in (0, 1); got (0.5,)"),
        ([[0.0, 0.5]], "two or more ascending chances in (0, 1); got (0.0, 0.5)"),
        ([[0.5, 1.0]], "two or more ascending chances in (0, 1); got (0.5, 1.0)"),
        ([[0.1, 0.2], [0.1, 0.2, 0.3]], "of one length; got [2, 3]"),
    ],
)
def test_what_cannot_be_a_curve_is_one_clear_line(curves: list[list[float]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Calibration(curves=curves)
    assert message in str(error.value) and "\n" not in str(error.value)
