"""The soft pick: the exact one at no blur, the likeliest token at much, and a chance in between."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp import soft_pick as module
from ptp.sampling import SamplingRule, interval, pick, warp
from ptp.soft_pick import MOST_LIKELY, chances, negative_log_chance, probabilities, soft_pick, upper_edges

VOCAB = 12
PERMUTATION = tuple(int(i) for i in torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)))
ORDERS = st.sampled_from(["vocabulary", "probability", PERMUTATION])
SEEDS = st.integers(0, 2**32)


def drawn(seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    """Logits (rows, VOCAB) and u (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, VOCAB, generator=generator), torch.rand(rows, generator=generator)


def intervals_of(logits: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    probs = probabilities(logits, rule)
    upper = upper_edges(probs, rule.order)
    return upper - probs, upper


def picked(logits: Tensor, u: Tensor, blur: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    probs = probabilities(logits, rule)
    return soft_pick(probs, None if rule.temperature == 0 else upper_edges(probs, rule.order), u, blur)


def loss_of(logits: Tensor, tokens: Tensor, u: Tensor, blur: Tensor, rule: SamplingRule) -> Tensor:
    probs = probabilities(logits, rule)
    return negative_log_chance(probs, upper_edges(probs, rule.order), tokens, u, blur)


@given(SEEDS, ORDERS, st.floats(0.2, 2))
def test_intervals_are_those_of_the_rule(seed: int, order: str | tuple[int, ...], temperature: float) -> None:
    logits, _ = drawn(seed)
    rule = SamplingRule(temperature=temperature, order=order)
    lower, upper = intervals_of(logits, rule)
    for token in range(VOCAB):
        expected = interval(warp(logits, rule), torch.full((len(logits),), token))
        torch.testing.assert_close((lower[:, token], upper[:, token]), expected, atol=1e-5, rtol=0)


@given(SEEDS, ORDERS)
def test_without_blur_it_is_the_pick(seed: int, order: str | tuple[int, ...]) -> None:
    logits, u = drawn(seed)
    rule = SamplingRule(order=order)
    lower, upper = intervals_of(logits, rule)
    distance = torch.minimum((lower - u[:, None]).abs(), (upper - u[:, None]).abs()).amin(-1)
    tokens, confidences = (part[..., 0] for part in picked(logits, u, torch.full_like(u, 1e-6), rule))
    clear = distance > 1e-4
    assert torch.equal(tokens[clear], pick(warp(logits, rule), u)[clear])
    assert (confidences[clear] > 0.99).all()


@given(SEEDS, ORDERS)
def test_with_much_blur_chances_are_the_distribution(seed: int, order: str | tuple[int, ...]) -> None:
    logits, u = drawn(seed)
    lower, upper = intervals_of(logits, SamplingRule(order=order))
    found = chances(upper - lower, upper, u, torch.full_like(u, 100.0))
    torch.testing.assert_close(found, logits.softmax(-1), atol=2e-3, rtol=0)


@given(SEEDS, st.floats(1e-3, 10), ORDERS)
def test_chances_of_all_tokens_sum_to_one(seed: int, blur: float, order: str | tuple[int, ...]) -> None:
    logits, u = drawn(seed)
    lower, upper = intervals_of(logits, SamplingRule(order=order))
    found = chances(upper - lower, upper, u, torch.full_like(u, blur))
    torch.testing.assert_close(found.sum(-1), torch.ones(len(u)), atol=1e-3, rtol=0)
    assert (found >= 0).all()


@given(SEEDS, st.floats(1e-3, 1), st.sampled_from([0.5, 0.7]))
def test_the_loss_is_minus_log_of_the_chance_that_is_proposed(seed: int, blur: float, temperature: float) -> None:
    logits, u = drawn(seed)
    rule, blurs = SamplingRule(temperature=temperature), torch.full_like(u, blur)
    for tokens, confidences in zip(*(part.unbind(-1) for part in picked(logits, u, blurs, rule)), strict=True):
        loss = loss_of(logits, tokens, u, blurs, rule)
        torch.testing.assert_close((-loss).exp(), confidences, atol=1e-4, rtol=0)


@given(SEEDS, ORDERS, st.floats(1e-3, 1))
def test_the_two_that_are_picked_are_the_two_of_the_greatest_chance(
    seed: int, order: str | tuple[int, ...], blur: float
) -> None:
    logits, u = drawn(seed)
    rule, blurs = SamplingRule(order=order, temperature=0.7), torch.full_like(u, blur)
    tokens, found = picked(logits, u, blurs, rule)
    lower, upper = intervals_of(logits, rule)
    every = chances(upper - lower, upper, u, blurs)
    assert (tokens[:, 0] != tokens[:, 1]).all()
    torch.testing.assert_close(found, every.topk(2).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, every.gather(1, tokens), atol=1e-5, rtol=0)


@given(SEEDS, ORDERS, st.integers(2, VOCAB))
def test_only_the_likeliest_tokens_are_picked(seed: int, order: str | tuple[int, ...], most: int) -> None:
    logits, u = drawn(seed)
    rule, blurs = SamplingRule(order=order), torch.full_like(u, 0.01)
    with mock.patch.object(module, "MOST_LIKELY", most):
        _, found = picked(logits, u, blurs, rule)
    lower, upper = intervals_of(logits, rule)
    every = chances(upper - lower, upper, u, blurs)
    among = every.masked_fill(logits < logits.topk(most).values[:, -1:], -1)
    torch.testing.assert_close(found, among.topk(2).values, atol=1e-5, rtol=0)


def test_what_is_left_out_of_a_large_vocabulary_is_worth_no_draft() -> None:
    """Even of a distribution as flat as half the probability in its tail."""
    generator = torch.Generator().manual_seed(0)
    logits, u = 2 * torch.randn(200, 2000, generator=generator), torch.rand(200, generator=generator)
    blurs = torch.full_like(u, 0.02)
    lower, upper = intervals_of(logits, SamplingRule())
    assert (upper - lower).topk(MOST_LIKELY).values.sum(-1).mean() < 0.6
    every = chances(upper - lower, upper, u, blurs).max(-1)
    tokens, found = picked(logits, u, blurs, SamplingRule())
    left_out = tokens[:, 0] != every.indices
    assert (every.values[left_out] < 0.1).all()
    assert (every.values - found[:, 0]).mean() < 0.01


@given(SEEDS, st.floats(1e-3, 10), st.floats(0, 1, exclude_max=True))
def test_the_loss_is_exact_for_tokens_of_hardly_any_chance(seed: int, blur: float, u: float) -> None:
    logits = (10 * drawn(seed, 1)[0]).squeeze(0)
    edges = torch.cat([torch.zeros(1), logits.double().softmax(-1).cumsum(-1)]).tolist()

    def rise(start: float, end: float) -> float:
        """σ(end) − σ(start)."""
        return -math.expm1(start - end) / ((1 + math.exp(-end)) * (1 + math.exp(start)))

    for token in range(VOCAB):
        start, end = edges[token : token + 2]
        if end - start < 1e-12 or (end - u) / blur < -600 or (start - u) / blur > 600:
            continue  # beyond what the check itself can tell
        expected = math.log(rise(-u / blur, (1 - u) / blur)) - math.log(rise((start - u) / blur, (end - u) / blur))
        found = loss_of(logits, torch.tensor(token), torch.tensor(u), torch.tensor(blur), SamplingRule())
        # An edge itself is rounded, and blur magnifies that.
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5 + 1e-6 / blur)


def test_a_token_of_hardly_any_chance_is_learnt_all_the_same() -> None:
    logits, blur = torch.tensor([30.0, 0.0, -5.0], requires_grad=True), torch.tensor(1e-3)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(200):
        loss = loss_of(logits, torch.tensor(2), torch.tensor(0.5), blur, SamplingRule())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01


def test_a_greedy_rule_takes_the_likeliest_token_whatever_u_is() -> None:
    logits, u = drawn(0)
    tokens, _ = picked(logits, u, torch.full_like(u, 0.1), SamplingRule(temperature=0))
    assert torch.equal(tokens, logits.topk(2).indices)


def test_a_greedy_token_is_the_surer_the_further_the_second_is_behind_it_for_the_blur_there_is() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.98, 0.01, 0.01]]).log()
    blur = torch.tensor([0.1, 0.001, 0.1, 0.1])
    _, confidences = picked(logits, torch.rand(4), blur, SamplingRule(temperature=0))
    assert confidences[:, 0].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1, 0.5, 1], abs=1e-4)
    torch.testing.assert_close(confidences.sum(-1), torch.ones(4))


def test_one_token_s_chances_by_hand() -> None:
    # Two tokens with a half each, u at the edge between them: either is as likely, whatever the blur.
    widths, upper = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 1.0])
    for blur in (0.01, 0.1, 1.0):
        assert chances(widths, upper, torch.tensor(0.5), torch.tensor(blur)).tolist() == pytest.approx([0.5, 0.5])
    # A blur of 0.1 and u 0.1 in front of the edge: σ(1) of the way, but for what the ends cut off.
    ends = torch.sigmoid(torch.tensor(6.0)) - torch.sigmoid(torch.tensor(-4.0))
    expected = (torch.sigmoid(torch.tensor(1.0)) - torch.sigmoid(torch.tensor(-4.0))) / ends
    found = chances(widths, upper, torch.tensor(0.4), torch.tensor(0.1))
    assert found.tolist() == pytest.approx([float(expected), 1 - float(expected)])


def test_learning_moves_an_edge_towards_where_it_lies_and_blur_to_how_far_off_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4000, generator=generator)
    noisy_edge = 0.3 + 0.05 * torch.randn(4000, generator=generator)
    tokens = (u >= noisy_edge).long()
    logits, raw = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logits, raw], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        blur = raw.exp().expand_as(u)
        loss_of(logits.expand(4000, 2), tokens, u, blur, SamplingRule()).mean().backward()
        optimizer.step()
    assert float(logits.detach().softmax(-1)[0]) == pytest.approx(0.3, abs=0.01)
    # A logistic distribution of scale s deviates by s · π / √3 = 1.81 s.
    assert float(raw.detach().exp()) == pytest.approx(0.05 / 1.81, rel=0.25)


@given(SEEDS)
def test_gradients_are_finite_for_tokens_far_from_u(seed: int) -> None:
    logits, u = drawn(seed)
    logits.requires_grad_()
    blur = torch.full_like(u, 1e-3).requires_grad_()
    for token in range(VOCAB):
        loss = loss_of(logits, torch.full((len(u),), token), u, blur, SamplingRule())
        gradients = torch.autograd.grad(loss.sum(), [logits, blur])
        assert all(gradient.isfinite().all() for gradient in gradients)
