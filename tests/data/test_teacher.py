import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ptp.data.packing import Completion
from ptp.data.store import CompletionStore, Provenance
from ptp.data.teacher import batches_by_length, sample_completions
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
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


@pytest.fixture(scope="module")
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(24)


def sampled(
    base: PreTrainedModel, rule: SamplingRule, places: list[int], ends: list[int] = ENDS, num: int = 20
) -> list[Completion]:
    """Completions of the prompts at some places, whose sequence numbers are 100 + place."""
    return sample_completions(
        base,
        [PROMPTS[place] for place in places],
        rule,
        seed=SEED,
        sequences=[100 + place for place in places],
        max_new_tokens=num,
        end_token_ids=ends,
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_stored_intervals_hold_the_u_that_picked_each_token(
    base: PreTrainedModel, tmp_path: Path, rule: SamplingRule
) -> None:
    provenance = Provenance(base_fingerprint="", rule=rule, seed=SEED, max_new_tokens=20, prompts_fingerprint="")
    store = CompletionStore(tmp_path, provenance)
    places = list(range(len(PROMPTS)))
    store.append([100 + place for place in places], sampled(base, rule, places))
    stored = CompletionStore(tmp_path)
    num_tokens = 0
    for sequence, completion in stored:
        start = completion.prompt_length
        assert completion.ids[:start].tolist() == PROMPTS[sequence - 100]
        tokens, positions = torch.from_numpy(completion.ids[start:]).long(), torch.arange(start, len(completion))
        u = uniform(SEED, sequence, positions)
        lower, upper = torch.from_numpy(completion.lower), torch.from_numpy(completion.upper)
        assert torch.all((lower <= u) & (u < upper))
        # And they are the intervals of these tokens in the base model's own distribution.
        with torch.no_grad():
            logits = base(input_ids=torch.from_numpy(completion.ids).long()[None]).logits[0, start - 1 : -1]
        distribution = warp(logits, stored.provenance.rule)
        assert torch.equal(pick(distribution, u), tokens)
        torch.testing.assert_close(torch.stack(interval(distribution, tokens)), torch.stack([lower, upper]))
        num_tokens += len(tokens)
    assert num_tokens > 40 or rule.temperature == 0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_completion_is_what_its_prompt_alone_gives_whatever_the_batch(
    base: PreTrainedModel, rule: SamplingRule
) -> None:
    expected = [
        decode_plainly(base, make_request(base, prompt, 20, SEED, 100 + place, ENDS), rule)
        for place, prompt in enumerate(PROMPTS)
    ]
    for places in ([0, 1, 2, 3, 4, 5, 6, 7], [4, 0], [7, 3, 2, 5], [6]):
        for place, completion in zip(places, sampled(base, rule, places), strict=True):
            assert completion.ids[len(PROMPTS[place]) :].tolist() == expected[place]


def test_a_completion_ends_with_the_first_of_several_end_tokens_or_is_cut_off(base: PreTrainedModel) -> None:
    completions = sampled(base, SamplingRule(), list(range(len(PROMPTS))), num=12)
    for completion in completions:
        written = completion.ids[completion.prompt_length :]
        ended = np.isin(written, ENDS)
        assert not ended[:-1].any()
        assert completion.finished == ended[-1]
        assert completion.finished or len(written) == 12
    assert {completion.finished for completion in completions} == {True, False}
    last = {int(completion.ids[-1]) for completion in completions if completion.finished}
    assert len(last) > 1


def test_without_an_end_token_every_completion_is_cut_off(base: PreTrainedModel) -> None:
    for completion in sampled(base, SamplingRule(), [0, 4, 2], ends=[], num=5):
        assert len(completion) == completion.prompt_length + 5
        assert not completion.finished


def test_equal_prompts_of_different_sequences_are_completed_differently(base: PreTrainedModel) -> None:
    first, second = sampled(base, SamplingRule(), [1, 5], ends=[])
    assert first.ids.tolist() != second.ids.tolist()


def test_a_completion_ends_with_the_model_s_context(tiny_gpt2: Callable) -> None:
    base = tiny_gpt2(24, context=16)
    prompts = [[3, 4], list(range(3, 15))]
    completions = sample_completions(
        base, prompts, SamplingRule(), seed=SEED, sequences=[0, 1], max_new_tokens=40, end_token_ids=[]
    )
    for sequence, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected = decode_plainly(base, make_request(base, prompt, 40, SEED, sequence, []), SamplingRule())
        assert completion.ids[len(prompt) :].tolist() == expected
        assert not completion.finished


def test_batches_hold_everything_once_with_neighbours_in_length_together() -> None:
    lengths = [random.Random(number).randint(1, 50) for number in range(23)]
    batches = list(batches_by_length(lengths, 5))
    assert sorted(i for batch in batches for i in batch) == list(range(23))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths)


def test_a_model_with_eager_attention_is_sampled_as_plain_decoding_samples_it(tiny_llama: Callable) -> None:
    base, rule = tiny_llama(24, attention="eager"), SamplingRule()
    for place, completion in enumerate(sampled(base, rule, list(range(len(PROMPTS))))):
        expected = decode_plainly(base, make_request(base, PROMPTS[place], 20, SEED, 100 + place, ENDS), rule)
        assert completion.ids[len(PROMPTS[place]) :].tolist() == expected
