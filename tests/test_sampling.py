from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ptp.errors import ConfigError
from ptp.sampling import (
    NO_PICK,
    Distribution,
    SamplingRule,
    draw,
    inside,
    interval,
    philox_4x32,
    pick,
    probability,
    token_intervals,
    uniform,
    warp,
)


@st.composite
def logits(draw: st.DrawFn, vocab_size: int | None = None) -> Tensor:
    """(rows, V): smooth, tied (integer-valued), peaked on one token, or with impossible tokens."""
    size = vocab_size or draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(draw(st.integers(1, 3)), size, generator=generator) * draw(st.sampled_from([0.1, 1.0, 3.0]))
    kind = draw(st.sampled_from(["smooth", "tied", "peaked", "impossible"]))
    if kind == "tied":
        values = values.round()
    if kind == "peaked":
        values[:, draw(st.integers(0, size - 1))] += 200
    if kind == "impossible":
        possible = torch.rand(values.shape, generator=generator) < 0.5
        possible[:, draw(st.integers(0, size - 1))] = True
        values = values.masked_fill(~possible, -torch.inf)
    return values


@st.composite
def logits_and_rule(draw: st.DrawFn) -> tuple[Tensor, SamplingRule]:
    values = draw(logits())
    size = values.shape[1]
    order = draw(st.one_of(st.sampled_from(["vocabulary", "probability"]), st.permutations(range(size)).map(tuple)))
    rule = SamplingRule(
        temperature=draw(st.one_of(st.just(0.0), st.floats(0.1, 3.0))),
        top_k=draw(st.one_of(st.just(0), st.integers(1, size + 5))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(0.01, 1.0), st.sampled_from([1e-9, 0.25, 0.5, 0.75]))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.sampled_from([1e-9, 0.05, 1.0]))),
        order=order,
    )
    return values, rule


def dense(distribution: Distribution, vocab_size: int) -> Tensor:
    """Probabilities as a (..., vocab_size) tensor."""
    shape = (*distribution.probs.shape[:-1], vocab_size)
    return distribution.probs.new_zeros(shape).scatter_add_(-1, distribution.token_ids, distribution.probs)


def as_transformers_warps(values: Tensor, rule: SamplingRule) -> Tensor:
    if rule.temperature == 0:
        return torch.nn.functional.one_hot(values.argmax(-1), values.shape[1]).float()
    scores = TemperatureLogitsWarper(rule.temperature)(None, values)
    if rule.top_k:
        scores = TopKLogitsWarper(rule.top_k)(None, scores)
    if rule.top_p < 1:
        # Their sort leaves the order of ties open; stable is one of the outcomes it allows.
        with mock.patch("torch.sort", partial(torch.sort, stable=True)):
            scores = TopPLogitsWarper(rule.top_p)(None, scores)
    if rule.min_p:
        scores = MinPLogitsWarper(rule.min_p)(None, scores)
    return scores.softmax(-1)


def every_interval(values: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor, Tensor]:
    """Token, lower and upper, each (V, rows)."""
    distribution = warp(values, rule)
    tokens = torch.arange(values.shape[1]).unsqueeze(1).expand(-1, values.shape[0])
    pairs = [interval(distribution, row) for row in tokens]
    return tokens, torch.stack([lower for lower, _ in pairs]), torch.stack([upper for _, upper in pairs])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.5}, "temperature must be 0 (greedy) or a number from 0.0001 up; got -0.5"),
        ({"temperature": float("inf")}, "temperature must be 0 (greedy) or a number from 0.0001 up; got inf"),
        ({"temperature": float("nan")}, "temperature must be 0 (greedy) or a number from 0.0001 up; got nan"),
        ({"top_k": -1}, "top_k must be 0 (off) or a positive count of tokens; got -1"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1]; got 0.0"),
        ({"top_p": 1.3}, "top_p must lie in (0, 1]; got 1.3"),
        ({"min_p": -0.1}, "min_p must lie in [0, 1]; got -0.1"),
        ({"min_p": 1.5}, "min_p must lie in [0, 1]; got 1.5"),
        ({"min_p": float("nan")}, "min_p must lie in [0, 1]; got nan"),
        ({"order": "random"}, "order must be 'vocabulary', 'probability' or a permutation; got 'random'"),
        ({"order": (0, 2)}, "order must hold each of 0 … 1 once; got 2 other numbers"),
    ],
)
def test_a_setting_out_of_range_is_one_clear_line(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingRule(**setting)
    assert str(error.value) == message


def test_a_rule_survives_json() -> None:
    rule = SamplingRule(temperature=0.7, top_k=50, top_p=0.95, min_p=0.1, order=(2, 0, 1))
    assert SamplingRule(**rule.model_dump(mode="json")) == rule


def test_a_rule_stored_before_there_was_min_p_is_one_without() -> None:
    rule = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)
    stored = {key: value for key, value in rule.model_dump(mode="json").items() if key != "min_p"}
    assert SamplingRule(**stored) == rule
    assert rule.min_p == 0


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_only_a_rule_that_truncates_nothing_gives_every_token_an_interval(setting: dict) -> None:
    assert SamplingRule().gives_all_tokens
    assert not SamplingRule(**setting).gives_all_tokens
    (name, value), *_ = setting.items()
    assert f"{name.replace('_', '-')} {value}" in str(SamplingRule(**setting))


@given(logits_and_rule())
def test_warp_is_what_transformers_samples_from(case: tuple[Tensor, SamplingRule]) -> None:
    values, rule = case
    found = dense(warp(values, rule), values.shape[1])
    torch.testing.assert_close(found, as_transformers_warps(values, rule), rtol=1e-5, atol=1e-7)


@given(logits_and_rule())
def test_tokens_too_unlikely_for_top_p_need_not_be_sorted(case: tuple[Tensor, SamplingRule]) -> None:
    values, rule = case
    with mock.patch("ptp.sampling.FEW", 0):
        found = warp(values, rule)
    torch.testing.assert_close(dense(found, values.shape[1]), as_transformers_warps(values, rule))
    assert (found.upper[..., -1] == 1).all()


def test_no_rows_are_no_distributions() -> None:
    assert warp(torch.empty(0, 5000), SamplingRule(top_p=0.9)).probs.shape[0] == 0


def test_of_many_tokens_top_p_sorts_few() -> None:
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 4
    rule = SamplingRule(temperature=0.7, top_p=0.9)
    found = warp(values, rule)
    assert found.token_ids.shape[1] < 2500
    torch.testing.assert_close(dense(found, 5000), as_transformers_warps(values, rule))


@given(logits_and_rule())
def test_a_rule_that_is_compiled_gives_the_same(case: tuple[Tensor, SamplingRule]) -> None:
    """Compiled, no value is looked at to leave work out."""
    values, rule = case
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        found = warp(values, rule)
    torch.testing.assert_close(dense(found, values.shape[1]), dense(warp(values, rule), values.shape[1]))


@given(logits_and_rule())
def test_a_distribution_sums_to_one_and_its_last_edge_is_exactly_one(case: tuple[Tensor, SamplingRule]) -> None:
    values, rule = case
    distribution = warp(values, rule)
    assert (distribution.upper[:, -1] == 1).all()
    assert (distribution.upper.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(distribution.probs.sum(-1), torch.ones(len(values)))


@given(logits_and_rule(), st.floats(0, 1))
def test_pick_inverts_interval(case: tuple[Tensor, SamplingRule], z: float) -> None:
    values, rule = case
    distribution = warp(values, rule)
    tokens, lower, upper = every_interval(values, rule)
    for u in (lower, torch.nextafter(upper, lower), inside(lower, upper, torch.tensor(z))):
        for token, low, high, number in zip(tokens, lower, upper, u, strict=True):
            some = high > low
            assert torch.equal(pick(distribution, number.clamp(max=1 - 2**-24))[some], token[some])


@given(logits_and_rule(), st.floats(0, 1 - 2**-24, width=32))
def test_draw_is_pick_and_the_interval_of_what_it_picked_to_the_bit(
    case: tuple[Tensor, SamplingRule], number: float
) -> None:
    values, rule = case
    distribution = warp(values, rule)
    # Also where intervals begin, whose u must not count to the entry before.
    for u in (torch.full((len(values),), number), distribution.upper[:, 0].clamp(max=1 - 2**-24)):
        token, lower, upper = draw(distribution, u)
        assert torch.equal(token, pick(distribution, u))
        assert torch.equal(torch.stack([lower, upper]), torch.stack(interval(distribution, token)))
        assert ((lower <= u) & (u < upper)).all()


@given(logits_and_rule(), st.sampled_from(["tied", "few"]), st.data())
def test_a_row_has_the_same_intervals_to_the_bit_beside_rows_whose_ties_reach_beyond_top_k(
    case: tuple[Tensor, SamplingRule], kind: str, data: st.DataObject
) -> None:
    values, rule = case
    other = torch.zeros(1, values.shape[1])
    if kind == "few":
        other[:, 1:] = -torch.inf
    token = torch.tensor(data.draw(st.integers(0, values.shape[1] - 1)))
    for row in values:
        beside = warp(torch.cat([row[None], other]), rule)
        first = [edge[0] for edge in interval(beside, token.expand(2))]
        assert first == list(interval(warp(row, rule), token))


@given(logits_and_rule(), st.data())
def test_intervals_of_sequences_are_those_of_each_token_after_the_logits_before_it(
    case: tuple[Tensor, SamplingRule], data: st.DataObject
) -> None:
    values, rule = case
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sequences = values[torch.randint(len(values), (rows, length), generator=generator)]
    ids = torch.randint(values.shape[1], (rows, length), generator=generator)
    wanted = torch.rand(rows, length, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    wanted[:, 0] = False
    with mock.patch("ptp.sampling.INTERVAL_ROWS", data.draw(st.integers(1, 8))):
        lower, upper = token_intervals(sequences, lambda rows: rows, ids, wanted, rule)
    assert lower.dtype == upper.dtype == torch.float32
    for row, place in np.ndindex(rows, length):
        expected = interval(warp(sequences[row, place - 1], rule), ids[row, place]) if wanted[row, place] else (0, 0)
        assert (lower[row, place], upper[row, place]) == expected


def test_intervals_of_long_sequences_are_computed_in_parts_that_bound_their_memory() -> None:
    sequences, ids = torch.zeros(2, 40, 5), torch.zeros(2, 40, dtype=torch.int64)
    wanted = torch.arange(40).expand(2, -1) > 0
    with mock.patch("ptp.sampling.INTERVAL_ROWS", 10), mock.patch("ptp.sampling.warp", side_effect=warp) as warped:
        lower, upper = token_intervals(sequences.bfloat16(), lambda rows: rows, ids, wanted, SamplingRule())
    assert sum(len(call.args[0]) for call in warped.call_args_list) == wanted.sum()
    assert all(len(call.args[0]) <= 10 for call in warped.call_args_list)
    # A fifth has no exact number in bfloat16.
    assert ((upper - lower)[wanted] == torch.tensor(0.2)).all()


@given(logits_and_rule())
def test_intervals_tile_the_unit_interval(case: tuple[Tensor, SamplingRule]) -> None:
    values, rule = case
    _, lower, upper = every_interval(values, rule)
    for low, high in zip(lower.T, upper.T, strict=True):
        edges = sorted((a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True) if b > a)
        assert edges[0][0] == 0
        assert edges[-1][1] == 1
        assert [b for _, b in edges[:-1]] == [a for a, _ in edges[1:]]


@given(logits_and_rule())
def test_a_token_without_mass_has_an_empty_interval_and_others_one_as_wide_as_their_probability(
    case: tuple[Tensor, SamplingRule],
) -> None:
    values, rule = case
    distribution = warp(values, rule)
    tokens, lower, upper = every_interval(values, rule)
    mass = torch.stack([probability(distribution, row) for row in tokens])
    assert torch.equal(mass.T, dense(distribution, values.shape[1]))
    assert torch.equal(lower[mass == 0], upper[mass == 0])
    torch.testing.assert_close(upper - lower, mass, rtol=0, atol=1e-6)


@given(logits())
def test_probability_order_puts_the_likeliest_first_and_ties_by_id(values: Tensor) -> None:
    distribution = warp(values, SamplingRule(order="probability"))
    probs, ids = distribution.probs, distribution.token_ids
    assert ((probs[:, :-1] > probs[:, 1:]) | ((probs[:, :-1] == probs[:, 1:]) & (ids[:, :-1] < ids[:, 1:]))).all()


@given(logits_and_rule())
def test_orders_differ_in_where_a_token_lies_not_in_its_probability(case: tuple[Tensor, SamplingRule]) -> None:
    values, rule = case
    found = dense(warp(values, rule), values.shape[1])
    by_id = warp(values, rule.model_copy(update={"order": "vocabulary"}))
    assert torch.equal(found, dense(by_id, values.shape[1]))
    assert (by_id.token_ids.diff(dim=-1) > 0).all()


def test_a_permutation_says_which_token_comes_first() -> None:
    distribution = warp(torch.zeros(4), SamplingRule(order=(3, 1, 0, 2)))
    assert distribution.token_ids.tolist() == [3, 1, 0, 2]
    assert pick(distribution, torch.tensor(0.1)) == 3


def test_greedy_takes_the_likeliest_token_whatever_u_and_the_smallest_id_of_ties() -> None:
    distribution = warp(torch.tensor([1.0, 3.0, 3.0]), SamplingRule(temperature=0))
    assert [int(pick(distribution, torch.tensor(u))) for u in (0.0, 0.5, 1 - 2**-24)] == [1, 1, 1]
    assert interval(distribution, torch.tensor(1)) == (0, 1)


def test_top_p_keeps_the_token_that_crosses_the_threshold_and_of_ties_the_larger_ids() -> None:
    quarters = torch.zeros(4)
    kept = {p: dense(warp(quarters, SamplingRule(top_p=p)), 4).nonzero().flatten().tolist() for p in (0.5, 0.51, 1e-9)}
    assert kept == {0.5: [2, 3], 0.51: [1, 2, 3], 1e-9: [3]}


def test_top_k_keeps_every_token_tied_at_its_threshold() -> None:
    distribution = warp(torch.tensor([1.0, 0.0, 1.0, 2.0, -1.0]), SamplingRule(top_k=2))
    assert dense(distribution, 5).nonzero().flatten().tolist() == [0, 2, 3]


@given(logits())
def test_greedy_ties_go_to_the_smallest_id(values: Tensor) -> None:
    picked = pick(warp(values, SamplingRule(temperature=0)), torch.zeros(len(values)))
    assert picked.tolist() == [row.index(max(row)) for row in values.tolist()]


@given(logits_and_rule())
def test_bfloat16_logits_are_warped_in_float32(case: tuple[Tensor, SamplingRule]) -> None:
    values, rule = case
    narrow, wide = warp(values.bfloat16(), rule), warp(values.bfloat16().float(), rule)
    assert narrow.upper.dtype == torch.float32
    assert torch.equal(narrow.upper, wide.upper)
    assert torch.equal(narrow.token_ids, wide.token_ids)


@given(logits_and_rule(), st.sampled_from([torch.nan, torch.inf]), st.floats(0, 1, exclude_max=True), st.data())
def test_no_token_is_picked_from_what_is_not_a_number(
    case: tuple[Tensor, SamplingRule], broken: float, u: float, data: st.DataObject
) -> None:
    values, rule = case
    row = data.draw(st.integers(0, len(values) - 1))
    whole, values = values, values.clone()
    values[row, data.draw(st.integers(0, values.shape[1] - 1))] = broken
    numbers = torch.full((len(values),), u, dtype=torch.float32).clamp(max=1 - 2**-24)
    expected = pick(warp(whole, rule), numbers)
    expected[row] = NO_PICK
    assert torch.equal(pick(warp(values, rule), numbers), expected)
    assert torch.equal(draw(warp(values, rule), numbers)[0], expected)
    values[row] = -torch.inf
    assert torch.equal(pick(warp(values, rule), numbers), expected)


def test_leading_dimensions_do_not_matter() -> None:
    values, rule = torch.randn(2, 3, 5, 17), SamplingRule(temperature=0.8, top_k=9, top_p=0.9)
    u = torch.rand(2, 3, 5)
    tokens = pick(warp(values, rule), u)
    one_by_one = [pick(warp(row, rule), x) for row, x in zip(values.view(-1, 17), u.view(-1), strict=True)]
    assert tokens.view(-1).tolist() == torch.stack(one_by_one).tolist()


unit_floats = st.floats(0, 1, width=32)


@given(unit_floats, unit_floats, unit_floats)
def test_inside_never_leaves_the_interval(a: float, b: float, z: float) -> None:
    lower, upper = torch.tensor(sorted((a, b)), dtype=torch.float32)
    u = inside(lower, upper, torch.tensor(z, dtype=torch.float32))
    assert lower <= u < upper or lower == u == upper or lower == upper == 1
    assert u < 1


@pytest.mark.parametrize("order", ["vocabulary", "probability"])
def test_some_token_is_picked_where_a_token_too_unlikely_for_float32_lies_behind_all_mass(order: str) -> None:
    distribution = warp(torch.tensor([0.0, 1.0, -40.0]), SamplingRule(order=order))
    lower, upper = interval(distribution, torch.tensor(2))
    assert lower == upper == 1
    assert pick(distribution, inside(lower, upper, torch.tensor(0.5))) != 2


@pytest.mark.parametrize("order", ["vocabulary", "probability", (4, 2, 0, 5, 1, 3)])
def test_picks_with_the_stream_follow_the_probabilities(order: str | tuple[int, ...]) -> None:
    num, values = 20_000, torch.tensor([0.0, 1.0, -3.0, 2.0, 0.5, 0.0])
    distribution = warp(values.expand(num, -1), SamplingRule(order=order, top_p=0.95))
    observed = np.bincount(pick(distribution, uniform(7, 0, torch.arange(num))), minlength=6)
    expected = dense(distribution, 6)[0].double().numpy()
    some = expected > 0
    assert not some.all()
    assert not observed[~some].any()
    assert stats.chisquare(observed[some], expected[some] / expected.sum() * num).pvalue > 1e-3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], words: str
) -> None:
    result = philox_4x32(tuple(torch.tensor(word) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in result) == words


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
)
def test_a_number_is_the_same_in_any_batch(seed: int, sequences: list[int], positions: list[int]) -> None:
    table = uniform(seed, torch.tensor(sequences).unsqueeze(1), torch.tensor(positions))
    assert table.dtype == torch.float32
    assert table.shape == (len(sequences), len(positions))
    alone = [[float(uniform(seed, sequence, position)) for position in positions] for sequence in sequences]
    assert table.tolist() == alone
    flipped = uniform(seed, torch.tensor(sequences).flip(0).unsqueeze(0), torch.tensor(positions).unsqueeze(1))
    assert torch.equal(flipped.T.flip(0), table)
    by_row = [uniform(seed, sequence, torch.tensor(positions)) for sequence in sequences]
    assert torch.equal(torch.stack(by_row), table)


def test_seed_sequence_and_position_all_count_beyond_32_bits() -> None:
    big = 2**32
    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (big, 0, 0), (0, big, 0), (0, 0, big)]
    assert len({float(uniform(*name)) for name in names}) == len(names)


@pytest.mark.parametrize("axis", ["seed", "sequence", "position"])
def test_the_stream_is_uniform_along_every_axis(axis: str) -> None:
    count = torch.arange(20_000)
    if axis == "seed":
        numbers = torch.stack([uniform(seed, 3, 5) for seed in range(2000)])
    else:
        numbers = uniform(11, count, 5) if axis == "sequence" else uniform(11, 3, count)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert stats.kstest(numbers.double().numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / len(numbers) ** 0.5
