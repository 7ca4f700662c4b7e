import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp.config import PTPConfig
from ptp.sampling import SamplingRule
from ptp.soft_pick import probabilities, soft_pick, upper_edges
from ptp.training.losses import Targets, WindowLoss, divergence, log_probabilities, window_loss, window_targets

# Two documents and one padding position. The first ended by itself, 13 being its end token; the second was cut off.
IDS = torch.tensor([[10, 11, 12, 13, 20, 21, 22, 0]])
# 10 and 20 are prompts; the rule gave 22 no mass.
SPAN = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1]])
MASS = torch.tensor([[False, True, True, True, False, True, False, False]])
STARTS = torch.tensor([[1, 2, 5]])

# By variant: for each window its targets, "." outside the span, brackets around tokens without mass.
EXPECTED = {
    "one_hot": ["11 12 13", "12 13 .", "21 [22] ."],
    "categorical": ["12 13 .", "13 . .", "[22] . ."],
}
SHIFT = {"one_hot": -1, "categorical": 0}


def written(targets: Targets) -> list[str]:
    """Targets in the notation of EXPECTED."""
    rows = []
    for window in range(targets.valid.shape[1]):
        names = []
        for k, token in enumerate(targets.token_ids[0, window].tolist()):
            valid, in_span = bool(targets.valid[0, window, k]), bool(targets.in_span[0, window, k])
            names.append(str(token) if valid else f"[{token}]" if in_span else ".")
        rows.append(" ".join(names))
    return rows


@pytest.mark.parametrize("variant", EXPECTED)
def test_windows_are_trained_up_to_the_end_of_their_own_span(variant: str) -> None:
    targets = window_targets(IDS, SPAN, STARTS, MASS, window=3, shift=SHIFT[variant])
    assert written(targets) == EXPECTED[variant]
    assert torch.equal(IDS[0, targets.index], targets.token_ids)


@pytest.mark.parametrize("variant", EXPECTED)
def test_nothing_is_trained_past_the_end_of_the_pack(variant: str) -> None:
    targets = window_targets(IDS[:, :7], SPAN[:, :7], STARTS, MASS[:, :7], window=3, shift=SHIFT[variant])
    assert written(targets) == EXPECTED[variant]
    assert targets.index.max() < 7


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("one_hot", ["11 12 . .", "21 22 23 .", "22 23 . .", "30 31 . ."]),
        ("categorical", ["12 . . .", "22 23 . .", "23 . . .", "31 . . ."]),
    ],
)
def test_of_a_chat_only_what_the_assistant_says_is_trained(variant: str, expected: list[str]) -> None:
    # One document; 10 and 20 are the user's, and the turns 11 12, 21 22 23 and 30 31 the assistant's.
    ids = torch.tensor([[10, 11, 12, 20, 21, 22, 23, 30, 31]])
    span = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, 2, 2]])
    targets = window_targets(ids, span, torch.tensor([[1, 4, 5, 7]]), span >= 0, window=4, shift=SHIFT[variant])
    assert written(targets) == expected


def random_targets(generator: torch.Generator, vocab_size: int, valid_share: float = 0.6) -> Targets:
    """Two rows of three windows of four positions into packs of nine tokens."""
    shape = (2, 3, 4)
    valid = torch.rand(shape, generator=generator) < valid_share
    return Targets(
        token_ids=torch.randint(vocab_size, shape, generator=generator),
        index=torch.randint(1, 9, shape, generator=generator),
        valid=valid,
        in_span=valid,
    )


def log_softmax(row: Tensor) -> list[float]:
    values = row.double().tolist()
    total = math.fsum(math.exp(value) for value in values)
    return [value - math.log(total) for value in values]


def slow_cross_entropy(logits: Tensor, targets: Targets, weights: Tensor) -> float:
    losses = 0.0
    for b, n, k in targets.valid.nonzero().tolist():
        losses -= float(weights[k]) * log_softmax(logits[b, n, k])[int(targets.token_ids[b, n, k])]
    return losses


def slow_divergence(
    logits: Tensor, teacher_logits: Tensor, targets: Targets, temperature: float, top_k: int, weights: Tensor
) -> float:
    losses = 0.0
    for b, n, k in targets.valid.nonzero().tolist():
        row = teacher_logits[b, int(targets.index[b, n, k]) - 1].double() / temperature
        kept = row.topk(top_k).indices.tolist()
        mass = math.fsum(math.exp(float(row[token])) for token in kept)
        student = log_softmax(logits[b, n, k])
        for token in kept:
            p = math.exp(float(row[token])) / mass
            losses += float(weights[k]) * p * (math.log(p) - student[token])
    return losses


def loss_of(
    logits: Tensor, targets: Targets, weights: Tensor, teacher_logits: Tensor | None = None, **settings: Any
) -> Tensor:
    """The total of `window_loss` of states that are logits already."""
    return loss_with(PTPConfig(variant="one_hot"), logits, targets, weights, teacher_logits, **settings).total


def loss_with(
    config: PTPConfig,
    logits: Tensor,
    targets: Targets,
    weights: Tensor,
    teacher_logits: Tensor | None = None,
    **settings: Any,
) -> WindowLoss:
    """`window_loss` of states that are logits already, and of one kind."""
    if "blur" in settings:
        settings["blur"] = settings["blur"].unsqueeze(3)
    return window_loss(
        logits.unsqueeze(3),
        torch.zeros(2, 9, logits.shape[-1]) if teacher_logits is None else teacher_logits,
        targets,
        weights,
        config,
        settings.pop("rule", SamplingRule()),
        summed=lambda loss, *rows: loss(*rows, slice(None)),
        logits_of=lambda rows: rows,
        **settings,
    )


def test_cross_entropy_is_the_weighted_sum_over_valid_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    for decay in (1.0, 0.8):
        weights = decay ** torch.arange(4.0)
        expected = slow_cross_entropy(logits, targets, weights)
        assert float(loss_of(logits, targets, weights)) == pytest.approx(expected, rel=1e-5)


def test_categorical_windows_are_judged_at_the_rule_s_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    config, weights = PTPConfig(variant="categorical", pick="exact"), torch.ones(4)
    for temperature in (0.7, 1.5):
        found = loss_with(config, logits, targets, weights, rule=SamplingRule(temperature=temperature)).total
        assert float(found) == pytest.approx(slow_cross_entropy(logits / temperature, targets, weights), rel=1e-5)
    # Greedy windows are read by their likeliest token, whatever they are divided by.
    found = loss_with(config, logits, targets, weights, rule=SamplingRule(temperature=0)).total
    assert float(found) == pytest.approx(slow_cross_entropy(logits, targets, weights), rel=1e-5)


def slow_chance(probs: list[float], token: int, u: float, blur: float) -> float:
    def sigmoid(edge: float) -> float:
        return 1 / (1 + math.exp(-(edge - u) / blur))

    lower = math.fsum(probs[:token])
    return (sigmoid(lower + probs[token]) - sigmoid(lower)) / (sigmoid(1.0) - sigmoid(0.0))


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_a_soft_pick_is_judged_by_the_chance_that_its_own_u_picks_the_target(distillation: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    u, blur = (torch.rand(2, 3, 4, generator=generator) for _ in range(2))
    weights, rule = 0.8 ** torch.arange(4.0), SamplingRule(temperature=0.7)
    config = PTPConfig(variant="categorical", pick="soft")
    found = loss_with(config, logits, targets, weights, rule=rule, u=u, blur=blur, distillation=distillation)
    expected = 0.0
    for b, n, k in targets.valid.nonzero().tolist():
        probs = [math.exp(value) for value in log_softmax(logits[b, n, k] / 0.7)]
        token = int(targets.token_ids[b, n, k])
        expected -= float(weights[k]) * math.log(slow_chance(probs, token, float(u[b, n, k]), float(blur[b, n, k])))
    if distillation:
        teacher_logits = torch.zeros(2, 9, 7)
        expected += distillation * slow_divergence(logits / 0.7, teacher_logits, targets, 0.7, 7, weights)
    assert float(found.total) == pytest.approx(expected, rel=1e-4)
    assert found.predicted is not None
    probs = probabilities(logits, rule)
    tokens, confidences = soft_pick(probs, upper_edges(probs, rule.order), u, blur)
    assert torch.equal(found.predicted[0].squeeze(3), tokens * targets.valid.unsqueeze(-1))
    torch.testing.assert_close(found.predicted[1].squeeze(3), confidences * targets.valid.unsqueeze(-1))


def test_of_a_soft_pick_the_blur_learns_all_and_the_distribution_what_the_teacher_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    u, blur = (torch.rand(2, 3, 4, generator=generator) for _ in range(2))
    rule, config = SamplingRule(temperature=0.7), PTPConfig(variant="categorical", pick="soft")
    logits.requires_grad_()
    blur.requires_grad_()

    def gradients(distillation: float) -> tuple[Tensor, Tensor]:
        named = dict(rule=rule, u=u, blur=blur, distillation=distillation)
        total = loss_with(config, logits, targets, torch.ones(4), **named).total
        return torch.autograd.grad(total, [logits, blur])

    labels, both, teacher = (gradients(share) for share in (0.0, 0.3, 1.0))
    for found in (both, teacher):
        torch.testing.assert_close(found[1], labels[1])
    torch.testing.assert_close(both[0], 0.7 * labels[0] + 0.3 * teacher[0])
    # What the teacher leaves nothing of is the divergence alone.
    exact = PTPConfig(variant="categorical", pick="exact")
    apart = loss_with(exact, logits, targets, torch.ones(4), rule=rule, distillation=1.0).total
    torch.testing.assert_close(teacher[0], *torch.autograd.grad(apart, [logits]))


def test_under_a_greedy_rule_the_blur_has_a_gradient_that_moves_it_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    u, blur = (torch.rand(2, 3, 4, generator=generator) for _ in range(2))
    blur.requires_grad_()
    config, weights = PTPConfig(variant="categorical", pick="soft"), torch.ones(4)
    found = loss_with(config, logits, targets, weights, rule=SamplingRule(temperature=0), u=u, blur=blur)
    assert float(found.total.detach()) == pytest.approx(slow_cross_entropy(logits, targets, weights), rel=1e-5)
    found.total.backward()
    assert torch.equal(blur.grad, torch.zeros_like(blur))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_log_softmax_and_so_are_their_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 2, 11, generator=generator)).to(dtype).requires_grad_()
    # A token may be asked for twice.
    tokens, weights = torch.randint(11, (5, 2, 14), generator=generator), torch.rand(5, 2, 14, generator=generator)
    probs, *found = log_probabilities(logits, 0.7, tokens[..., :3], tokens[..., 3:])
    expected = (logits.float() / 0.7).log_softmax(-1)
    found = torch.cat(found, dim=-1)
    torch.testing.assert_close(found, expected.gather(-1, tokens))
    torch.testing.assert_close(probs, expected.exp())
    assert not probs.requires_grad
    gradients = [
        torch.autograd.grad((each * weights).sum(), logits)[0] for each in (found, expected.gather(-1, tokens))
    ]
    torch.testing.assert_close(*gradients)


def test_what_the_teacher_never_writes_may_have_no_probability_at_all() -> None:
    log_probs = torch.tensor([0.5, 0.5, 0.0]).log().requires_grad_()
    found = divergence(log_probs, torch.tensor([0.25, 0.75, 0.0]))
    assert float(found.detach()) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    (gradient,) = torch.autograd.grad(found, [log_probs])
    assert gradient.tolist() == [-0.25, -0.75, 0]


def test_kinds_of_drafts_are_judged_each_for_itself_by_one_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 2, 7, generator=generator), random_targets(generator, 7)
    u, blur = torch.rand(2, 3, 4, generator=generator), torch.rand(2, 3, 4, 2, generator=generator)
    teacher, asked = torch.randn(2, 9, 7, generator=generator), []

    def found(kinds: slice) -> WindowLoss:
        return window_loss(
            logits[:, :, :, kinds],
            teacher,
            targets,
            0.8 ** torch.arange(4.0),
            PTPConfig(variant="categorical", pick="soft"),
            SamplingRule(temperature=0.7),
            summed=lambda loss, *rows: loss(*rows, slice(None)),
            logits_of=lambda rows: asked.append(len(rows)) or rows,
            u=u,
            blur=blur[..., kinds],
            distillation=0.5,
        )

    both, first, second = (found(kinds) for kinds in (slice(2), slice(1), slice(1, 2)))
    torch.testing.assert_close(both.total, first.total + second.total)
    torch.testing.assert_close(both.cross_entropy, first.cross_entropy + second.cross_entropy)
    for together, *apart in zip(both.predicted, first.predicted, second.predicted, strict=True):
        torch.testing.assert_close(together, torch.cat(apart, dim=3))
    assert asked == [int(targets.valid.sum())] * 3


def test_nothing_is_predicted_where_no_u_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    config = PTPConfig(variant="categorical", pick="exact")
    assert loss_with(config, logits, targets, torch.ones(4)).predicted is None


def test_divergence_is_the_weighted_sum_of_kl_to_the_teacher_s_warped_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(2, 3, 4, 7, generator=generator), random_targets(generator, 7)
    teacher_logits = torch.randn(2, 9, 7, generator=generator)
    for decay in (1.0, 0.8):
        weights = decay ** torch.arange(4.0)
        rule = SamplingRule(temperature=0.7, top_k=3)
        expected = slow_divergence(logits, teacher_logits, targets, 0.7, 3, weights)
        alone = loss_of(logits, targets, weights, teacher_logits, rule=rule, distillation=1.0)
        assert float(alone) == pytest.approx(expected, rel=1e-5)
        # With the text's own tokens, each has its share.
        both = loss_of(logits, targets, weights, teacher_logits, rule=rule, distillation=0.3)
        labels = float(loss_of(logits, targets, weights))
        assert float(both) == pytest.approx(0.3 * expected + 0.7 * labels, rel=1e-5)


def test_divergence_from_oneself_is_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher_logits, targets = torch.randn(2, 9, 7, generator=generator), random_targets(generator, 7)
    logits = teacher_logits[torch.arange(2)[:, None, None], targets.index - 1] / 0.7
    rule = SamplingRule(temperature=0.7)
    found = loss_of(logits, targets, torch.ones(4), teacher_logits, rule=rule, distillation=1.0)
    assert float(found) == pytest.approx(0.0, abs=1e-6)


def test_a_batch_without_a_valid_target_has_loss_zero_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 7, generator=generator, requires_grad=True)
    targets = random_targets(generator, 7, valid_share=0.0)
    teacher_logits = torch.randn(2, 9, 7, generator=generator)
    loss = loss_of(logits, targets, torch.ones(4), teacher_logits, distillation=1.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()
