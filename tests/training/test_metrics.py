import pytest
import torch

from ptp.config import PTPConfig
from ptp.model.proposal import propose
from ptp.sampling import SamplingRule
from ptp.training.losses import Targets
from ptp.training.metrics import WindowMetrics

CATEGORICAL = PTPConfig(window=3, variant="categorical", continuation=False)
CONTINUED = PTPConfig(window=3, variant="categorical")

# One window a word: r right, w wrong, m right but without mass, . past the document's end.
WINDOWS = ["rrr", "rwr", "rr.", "wmr"]


def batch(windows: list[str]) -> tuple[tuple[torch.Tensor, torch.Tensor], Targets]:
    """Predictions and targets (B = number of windows, N = 1)."""
    letters = [[list(window)] for window in windows]
    token_ids = torch.tensor([[[8 if x == "w" else 5 for x in row] for row in rows] for rows in letters])
    valid = torch.tensor([[[x in "rw" for x in row] for row in rows] for rows in letters])
    in_span = torch.tensor([[[x != "." for x in row] for row in rows] for rows in letters])
    # The k-th output of a window is proposed with confidence 0.1·k + 0.02, in bin 2·k.
    confidences = (0.1 * torch.arange(token_ids.shape[-1]) + 0.02).expand(token_ids.shape)
    targets = Targets(torch.full_like(token_ids, 5), torch.ones_like(token_ids), valid, in_span)
    return (token_ids[..., None, None], confidences[..., None, None]), targets


def measured(config: PTPConfig, *batches: list[str], losses: tuple[float, ...] = (20.0,)) -> WindowMetrics:
    """Of batches of seven tokens, each with its summed loss."""
    metrics = WindowMetrics.zeros(config)
    for windows, loss in zip(batches, losses, strict=True):
        metrics = metrics + WindowMetrics.of(*batch(windows), torch.tensor(loss), torch.tensor(7), config)
    return metrics


def test_accuracy_counts_valid_predictions_by_window_index() -> None:
    metrics = measured(CATEGORICAL, WINDOWS)
    assert metrics.accuracy == pytest.approx([3 / 4, 2 / 3, 3 / 3])
    assert (metrics.num_targets, metrics.num_masked) == (10, 1)
    assert metrics.mean_loss == 2.0


def test_survival_asks_each_draft_of_the_windows_that_came_so_far_and_go_on() -> None:
    metrics = measured(CATEGORICAL, WINDOWS)
    assert metrics.survival == pytest.approx((3 / 4, 3 / 4 * 2 / 3, 3 / 4 * 2 / 3 * 1 / 1))
    assert metrics.mean_correct == pytest.approx(1.75)


def test_the_first_output_of_one_hot_windows_is_no_draft() -> None:
    metrics = measured(PTPConfig(window=3, variant="one_hot"), WINDOWS)
    assert metrics.survival == pytest.approx((2 / 3, 2 / 3 * 1 / 1))
    assert metrics.accuracy == pytest.approx([3 / 4, 2 / 3, 3 / 3])


def by_bin(sums: torch.Tensor) -> list[dict[int, int]]:
    """What is counted, of each curve by bin."""
    return [{entry: int(row[entry]) for entry in row.nonzero().flatten().tolist()} for row in sums]


def test_drafts_are_counted_by_confidence_as_long_as_those_before_them_are_right() -> None:
    metrics = measured(CATEGORICAL, WINDOWS)
    assert by_bin(metrics.sure_tried) == [{0: 4, 2: 3, 4: 1}]
    assert by_bin(metrics.sure_right) == [{0: 3, 2: 2, 4: 1}]


def test_drafts_of_one_hot_windows_are_counted_apart_where_the_first_output_is_wrong() -> None:
    # A first output whose token has no mass says nothing of either.
    metrics = measured(PTPConfig(window=3, variant="one_hot"), [*WINDOWS, "wrw", "mrr"])
    assert by_bin(metrics.sure_tried) == [{2: 1, 4: 1}, {2: 3, 4: 1}]
    assert by_bin(metrics.sure_right) == [{2: 1}, {2: 2, 4: 1}]
    after_wrong, after_right = metrics.calibration.curves
    assert after_wrong[4] < after_right[4]


def test_second_candidates_count_where_the_first_is_the_first_to_be_wrong() -> None:
    (tokens, confidences), targets = batch(WINDOWS)
    # The second candidate is right in the second window and in the last; there the first draft is wrong already.
    second = torch.tensor([[[8, 8, 8]], [[8, 5, 8]], [[8, 8, 8]], [[8, 8, 5]]])[..., None, None]
    predicted = torch.cat([tokens, second], dim=-1), confidences.repeat(1, 1, 1, 1, 2) / 2
    metrics = WindowMetrics.of(predicted, targets, torch.tensor(20.0), torch.tensor(7), CATEGORICAL)
    assert (float(metrics.missed), float(metrics.second_right), metrics.second) == (2, 1, 0.5)
    assert metrics.survival == measured(CATEGORICAL, WINDOWS).survival
    assert measured(CATEGORICAL, WINDOWS).second == 0


def test_drafts_without_positions_are_counted_apart() -> None:
    windows, continued = ["rrr", "rwr", "rr.", "wmr"], ["wrr", "rrw", "rw.", "rmw"]
    (first, targets), (second, _) = batch(windows), batch(continued)
    predicted = tuple(torch.cat(parts, dim=3) for parts in zip(first, second, strict=True))
    metrics = WindowMetrics.of(predicted, targets, torch.tensor(20.0), torch.tensor(7), CONTINUED)
    alone = measured(CATEGORICAL, windows)
    assert (metrics.survival, metrics.accuracy) == (alone.survival, alone.accuracy)
    assert metrics.continued == pytest.approx((3 / 4, 3 / 4 * 1 / 2, 0))
    assert by_bin(metrics.sure_tried) == [{0: 4, 2: 3, 4: 1}, {0: 4, 2: 2, 4: 1}]
    assert by_bin(metrics.sure_right) == [{0: 3, 2: 2, 4: 1}, {0: 3, 2: 1}]
    assert metrics.rates()["correct_continued"] == pytest.approx(sum(metrics.continued))


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_batches_measured_apart_add_up(variant: str) -> None:
    config = PTPConfig(window=3, variant=variant, continuation=False)
    whole = measured(config, WINDOWS, losses=(23.0,))
    split = measured(config, [WINDOWS[2], WINDOWS[3]], [WINDOWS[0], WINDOWS[1]], losses=(8.0, 15.0))
    assert float(split.tokens) == 2 * float(whole.tokens) == 14
    assert split.rates() == pytest.approx(whole.rates())
    assert split.survival == whole.survival
    assert split.calibration == whole.calibration
    assert whole.sure_tried.any()


def test_a_linear_function_reaches_every_sum() -> None:
    metrics = measured(CATEGORICAL, WINDOWS)
    doubled = metrics.mapped(lambda sums: 2 * sums)
    assert all(torch.equal(twice, 2 * once) for twice, once in zip(doubled.parts(), metrics.parts(), strict=True))
    assert doubled.rates() == pytest.approx(metrics.rates())


def test_targets_that_are_not_judged_have_a_loss_and_nothing_right_or_wrong() -> None:
    config = CATEGORICAL
    unjudged = WindowMetrics.of(None, batch(WINDOWS)[1], torch.tensor(20.0), torch.tensor(7), config)
    assert (unjudged.mean_loss, unjudged.num_targets, unjudged.num_masked) == (2.0, 10, 1)
    assert not unjudged.counted.any()
    assert not unjudged.tried.any()
    assert not unjudged.sure_tried.any()


def test_nothing_measured_is_zero_not_a_crash() -> None:
    metrics = WindowMetrics.zeros(CATEGORICAL)
    assert metrics.accuracy == [0, 0, 0]
    assert metrics.survival == (0, 0, 0)
    assert (metrics.mean_loss, metrics.mean_correct) == (0, 0)


def test_predictions_are_what_decoding_drafts() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).log_softmax(-1)
    rule = SamplingRule()
    edges = logits.exp().cumsum(-1)[0].tolist()
    for u, token in [(0.0, 0), (edges[0] + 0.01, 1), (edges[1] + 0.01, 2)]:
        u = torch.tensor([u])
        for variant, expected in (("categorical", token), ("one_hot", 1)):
            config = PTPConfig(variant=variant, pick="exact")
            proposed, confidence = propose(config, rule, logits + 3, u, totals=torch.tensor([3.0]))
            assert proposed.tolist() == [[expected]]
            assert confidence[0].tolist() == pytest.approx([logits.exp()[0, expected].item()])
