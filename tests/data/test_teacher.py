import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ptp.data import teacher
from ptp.data.documents import Document, Documents, save_shard, shard_name
from ptp.data.teacher import Prompt, find_batch_size, halving, sample_completions
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.errors import ConfigError
from ptp.sampling import SamplingRule, interval, pick, uniform, warp

SEED = 7
PERMUTATION = tuple(random.Random(0).sample(range(24), 24))
RULES = [
    SamplingRule(),
    SamplingRule(temperature=0.7, top_k=10, top_p=0.9),
    SamplingRule(temperature=1.3, order="probability"),
    SamplingRule(top_p=0.8, order=PERMUTATION),
    SamplingRule(temperature=0),
    SamplingRule(top_k=1000),
]
PROMPTS = [[0], [0, 3, 4], [5] * 9, [6, 7], list(range(3, 20)), [0, 3, 4], [8, 9, 10, 11], [12]]
ENDS = [1, 9, 17]
PER_PROMPT = 2


@pytest.fixture(scope="module")
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(24)


def wanted(prompts: Sequence[Sequence[int]] = PROMPTS, per_prompt: int = PER_PROMPT) -> list[Prompt]:
    """Completions of prompt i, of group 500 + i, have the numbers 100 + i, 100 + i + len(prompts), …"""
    return [
        Prompt(np.array(ids, np.int32), range(100 + i, 100 + i + len(prompts) * per_prompt, len(prompts)), 500 + i)
        for i, ids in enumerate(prompts)
    ]


def sampled(base: PreTrainedModel, rule: SamplingRule, prompts: Sequence[Prompt], **changes: Any) -> list[Document]:
    options = {"max_length": 100, "max_new_tokens": 14, "end_token_ids": ENDS, "batch_size": 5} | changes
    return sample_completions(base, prompts, rule, seed=SEED, **options)


def plainly(
    base: PreTrainedModel, rule: SamplingRule, prompts: Sequence[Prompt], ends: Sequence[int] = ENDS, num: int = 14
) -> dict[int, list[int]]:
    """Prompt and completion of every number, each decoded by itself."""
    return {
        number: prompt.ids.tolist()
        + decode_plainly(base, make_request(base, prompt.ids.tolist(), num, SEED, number, ends), rule)
        for prompt in prompts
        for number in prompt.numbers
    }


def tokens_by_number(documents: Sequence[Document]) -> dict[int, list[int]]:
    return {document.number: document.ids.tolist() for document in documents}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_stored_intervals_hold_the_u_that_picked_each_token(
    base: PreTrainedModel, tmp_path: Path, rule: SamplingRule
) -> None:
    save_shard(tmp_path / shard_name(0), sampled(base, rule, wanted()))
    num_tokens = 0
    for document in Documents.load(tmp_path):
        start = document.prompt_length
        tokens, positions = torch.from_numpy(document.ids[start:]).long(), torch.arange(start, len(document))
        u = uniform(SEED, document.number, positions)
        lower, upper = torch.from_numpy(document.lower), torch.from_numpy(document.upper)
        assert torch.all((lower <= u) & (u < upper))
        # And they are the intervals of these tokens in the base model's own distribution.
        with torch.no_grad():
            logits = base(input_ids=torch.from_numpy(document.ids).long()[None]).logits[0, start - 1 : -1]
        distribution = warp(logits, rule)
        assert torch.equal(pick(distribution, u), tokens)
        torch.testing.assert_close(
            torch.stack(interval(distribution, tokens)), torch.stack([lower, upper]), rtol=1e-4, atol=1e-4
        )
        num_tokens += len(tokens)
    assert num_tokens > 50 or rule.temperature == 0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_completion_is_what_plain_decoding_gives_whatever_the_batch(
    base: PreTrainedModel, rule: SamplingRule
) -> None:
    expected = plainly(base, rule, wanted())
    for batch_size in (4, 64):
        assert tokens_by_number(sampled(base, rule, wanted(), batch_size=batch_size)) == expected
    some = wanted()[3:6]
    assert tokens_by_number(sampled(base, rule, some)) == {n: expected[n] for prompt in some for n in prompt.numbers}


@settings(max_examples=12)
@given(st.data())
def test_any_prompts_and_limits_give_what_plain_decoding_gives(base: PreTrainedModel, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    prompts = wanted([[(7 * i + j) % 24 for j in range(length)] for i, length in enumerate(lengths)], per_prompt=2)
    num, batch_size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    ends = data.draw(st.sampled_from([[], [1], list(range(0, 24, 3))]))
    rule = data.draw(st.sampled_from(RULES))
    documents = sampled(base, rule, prompts, max_new_tokens=num, end_token_ids=ends, batch_size=batch_size)
    assert tokens_by_number(documents) == plainly(base, rule, prompts, ends, num)


def test_documents_say_their_prompt_number_group_and_whether_an_end_token_ended_them(base: PreTrainedModel) -> None:
    documents = sampled(base, SamplingRule(), wanted(), max_new_tokens=12)
    assert [document.number for document in documents] == list(range(100, 100 + PER_PROMPT * len(PROMPTS)))
    for document in documents:
        place = (document.number - 100) % len(PROMPTS)
        start, end = len(PROMPTS[place]), len(document)
        assert document.group == 500 + place
        assert document.spans == ((start, end),)
        assert document.ids.dtype == np.int32
        assert document.ids[:start].tolist() == PROMPTS[place]
        ended = np.isin(document.ids[start:], ENDS)
        assert not ended[:-1].any()
        assert document.finished == ended[-1]
        assert document.finished or end - start == 12
        for edges in (document.lower, document.upper):
            assert edges.dtype == np.float32
            assert len(edges) == end - start
    assert {document.finished for document in documents} == {True, False}
    assert len({int(document.ids[-1]) for document in documents if document.finished}) > 1


def test_equal_calls_give_equal_bits_and_other_batch_sizes_intervals_equal_but_for_rounding(
    base: PreTrainedModel,
) -> None:
    first, again, other = (sampled(base, SamplingRule(), wanted(), batch_size=size) for size in (7, 7, 3))
    for one, two, three in zip(first, again, other, strict=True):
        assert one.lower.tobytes() == two.lower.tobytes()
        assert one.upper.tobytes() == two.upper.tobytes()
        assert one.ids.tolist() == two.ids.tolist() == three.ids.tolist()
        np.testing.assert_allclose(one.lower, three.lower, atol=1e-5)


def test_logits_that_are_not_numbers_end_sampling_in_one_clear_line(tiny_llama: Callable) -> None:
    base = tiny_llama(40)
    base.lm_head.weight.data[3, 0] = torch.inf
    with pytest.raises(ConfigError, match="the base model's logits are not numbers"):
        sampled(base, SamplingRule(), wanted())


def test_completions_of_one_prompt_differ(base: PreTrainedModel) -> None:
    documents = sampled(base, SamplingRule(), wanted([[0, 3, 4]], per_prompt=6), end_token_ids=[])
    assert len({document.ids.tobytes() for document in documents}) == 6


@pytest.mark.parametrize("max_new_tokens", [None, 40])
def test_a_text_is_cut_at_the_longest_length_asked_for_and_at_the_model_s_context(
    tiny_gpt2: Callable, max_new_tokens: int | None
) -> None:
    base = tiny_gpt2(24, context=16)
    prompts = wanted([[3, 4], list(range(3, 15)), [5] * 15])
    expected = plainly(base, SamplingRule(), prompts, [], 40)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end_token_ids": []}
    documents = sampled(base, SamplingRule(), prompts, **options)
    assert tokens_by_number(documents) == expected
    assert {len(document) for document in documents} == {16}
    shorter = sampled(base, SamplingRule(), prompts[:2], max_length=13, **options)
    assert tokens_by_number(shorter) == {n: expected[n][:13] for prompt in prompts[:2] for n in prompt.numbers}
    assert not any(document.finished for document in documents + shorter)


def test_a_model_with_eager_attention_is_sampled_as_plain_decoding_samples_it(tiny_llama: Callable) -> None:
    base, rule = tiny_llama(24, attention="eager"), SamplingRule()
    assert tokens_by_number(sampled(base, rule, wanted())) == plainly(base, rule, wanted())


def test_no_slot_is_empty_or_wasted_while_a_completion_waits(base: PreTrainedModel) -> None:
    reports: list[tuple[int, int]] = []
    documents = sampled(
        base, SamplingRule(), wanted(), batch_size=6, progress=lambda done, tokens: reports.append((done, tokens))
    )
    rows = [num_tokens for _, num_tokens in reports]
    assert reports[-1][0] == len(documents)
    assert sum(rows) == sum(len(document) - document.prompt_length for document in documents)
    assert rows == sorted(rows, reverse=True)
    last = max(step for step, num_rows in enumerate(rows) if num_rows == 6)
    assert last > max(len(document) - document.prompt_length for document in documents)
    assert rows[-1] < 6


class Calls:
    """Shapes (rows, tokens) of the calls of a model."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.hook = base.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize(("most_tokens", "num_calls"), [(8192, 8), (24, 11)])
def test_a_prompt_is_prefilled_once_with_as_many_others_as_the_bounds_allow(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, most_tokens: int, num_calls: int
) -> None:
    monkeypatch.setattr(teacher, "PREFILL_TOKENS", most_tokens)
    prompts = wanted([[3] * (3 + i) for i in range(16)], per_prompt=2)
    with Calls(base) as calls:
        sampled(base, SamplingRule(), prompts, batch_size=4 * teacher.AHEAD)
    prefills = [shape for shape in calls.shapes if shape[1] > 1]
    # Prompts of 3 … 18 tokens, two at a time to prefill four completions ahead; or while two have at most 24 tokens.
    assert sum(rows for rows, _ in prefills) == 16
    assert all(rows * width <= most_tokens for rows, width in prefills)
    assert len(prefills) == num_calls


def test_the_batch_size_fills_half_the_free_memory_and_no_more(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keys and values of one key-value head of 16 float32 in two layers.
    row_bytes = 2 * 2 * 16 * 4 * 1000
    for free in (10 * row_bytes, 1000 * row_bytes):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        rows = find_batch_size(base, 1000, limit=1 << 20)
        assert rows.bit_count() == 1
        assert rows * row_bytes <= free / 2 < 3 * rows * row_bytes
    assert find_batch_size(base, 1000, limit=100) == 64
    assert find_batch_size(base, 10**9, limit=100) == 1


def test_a_batch_that_does_not_fit_is_tried_again_with_half_as_many_rows(base: PreTrainedModel) -> None:
    def refuse(base: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = base.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        room = 3
        found, batch_size = halving(lambda size: sampled(base, SamplingRule(), wanted(), batch_size=size), 16)
        assert batch_size == 2
        room = 0
        with pytest.raises(ConfigError, match="a single completion does not fit in the GPU's memory"):
            halving(lambda size: sampled(base, SamplingRule(), wanted(), batch_size=size), 4)
    finally:
        hook.remove()
    assert tokens_by_number(found) == plainly(base, SamplingRule(), wanted())
