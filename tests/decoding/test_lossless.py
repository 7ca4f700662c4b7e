"""Whatever the adapter drafts, the text is the base model's own."""

import random
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from ptp.calibration import NUM_BINS, Calibration
from ptp.config import PTPConfig
from ptp.decoding import session
from ptp.decoding.decoder import Decoder, Generation
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.model.auxiliary import EMBEDDINGS
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

NUM_MODELS, REQUESTS_EACH = 72, 7
PROMPT = [5, 3, 0, 4]


@pytest.fixture(scope="module")
def bases(tiny_llama: Callable, tiny_gpt2: Callable) -> list[PreTrainedModel]:
    """Many tokens, few tokens (drafts are often right by chance), learned positions that end, eager attention."""
    return [tiny_llama(40), tiny_llama(6, seed=1), tiny_gpt2(24, context=64), tiny_llama(12, seed=2, attention="eager")]


def random_model(bases: list[PreTrainedModel], random_adapter: Callable, seed: int) -> tuple[PreTrainedModel, PTPModel]:
    rng = random.Random(seed)
    base = rng.choice(bases)
    config = PTPConfig(
        variant=rng.choice(["categorical", "one_hot"]),
        window=rng.randint(1, 24),
        auxiliary=rng.choice(list(EMBEDDINGS)),
        auxiliary_size=rng.choice([2, 8]),
        anchor=rng.choice(["none", "first", "all"]),
        lora_rank=rng.choice([1, 4]),
        pick=rng.choice(["soft", "exact"]),
        chain=rng.choice([0, 1, 2, 5]),
        chain_size=rng.choice([4, 16]),
        continuation=rng.random() < 0.7,
    )
    torch.manual_seed(seed)
    model = random_adapter(PTPModel(deepcopy(base), config), std=rng.choice([0.0, 0.1, 1.0, 10.0]), seed=seed)
    fall = rng.choice([0.3, 0.9, 1.0])
    model.survival = tuple(fall**k for k in range(1, config.num_drafts + 1))
    if config.continues:
        model.continued = tuple((fall * rng.choice([0.0, 0.6, 1.0])) ** k for k in range(1, config.window + 1))
    if rng.random() < 0.5:
        tried = torch.full((config.num_curves, NUM_BINS), 20.0)
        model.calibration = Calibration.of(tried, tried * torch.rand(tried.shape))
    return base, model


def random_request(rng: random.Random, vocab_size: int) -> tuple[SamplingRule, int, dict]:
    permutation = tuple(rng.sample(range(vocab_size), vocab_size))
    rule = SamplingRule(
        temperature=rng.choice([0.0, 0.3, 1.0, rng.uniform(0.05, 1.5)]),
        top_k=rng.choice([0, 1, 3, 50]),
        top_p=rng.choice([0.5, 1.0]),
        order=rng.choice(["vocabulary", "probability", permutation]),
    )
    request = {
        "prompt_ids": rng.choices(range(vocab_size), k=rng.choice([1, 1, 2, rng.randint(3, 30)])),
        "max_new_tokens": round(100 ** rng.random()),
        "seed": rng.randrange(2**40),
        "sequence": rng.randrange(1000),
        "end_token_ids": rng.choice([[], [1], rng.sample(range(vocab_size), 3)]),
    }
    return rule, rng.choice([0, 1, 2, 3, rng.randint(4, 80)]), request


def check_bookkeeping(generation: Generation, budget: int, request: dict, u: Tensor) -> None:
    assert 0 < len(generation.token_ids) <= request["max_new_tokens"]
    ended = [token in request["end_token_ids"] for token in generation.token_ids]
    assert not any(ended[:-1])
    assert generation.finish_reason == ("stop" if ended[-1] else "length")
    assert generation.u == u[: len(generation.token_ids)].tolist()
    for step in generation.steps:
        assert 0 <= step.num_accepted <= step.num_drafts <= budget
        assert step.num_accepted <= len(step.token_ids) <= step.num_accepted + 1
    assert generation.tokens_per_call == len(generation.token_ids) / generation.num_calls


@pytest.mark.parametrize("seed", range(NUM_MODELS))
def test_the_text_is_what_plain_sampling_writes(
    bases: list[PreTrainedModel], random_adapter: Callable, seed: int
) -> None:
    base, model = random_model(bases, random_adapter, seed)
    rng = random.Random(1000 + seed)
    for _ in range(REQUESTS_EACH):
        rule, budget, request = random_request(rng, base.config.vocab_size)
        plain = make_request(base, **request)
        generation = Decoder(model, rule, budget).generate(**request)
        assert generation.token_ids == decode_plainly(base, plain, rule), (model.ptp_config, rule, budget, request)
        check_bookkeeping(generation, budget, request, plain.u)


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_a_long_prompt_runs_ahead_in_chunks(
    bases: list[PreTrainedModel], random_adapter: Callable, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(session, "PREFILL_CHUNK", 4)
    base = bases[0]
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=variant)))
    for length in range(1, 14):
        prompt = list(range(length))
        request = make_request(base, prompt, 12, seed=length)
        expected = decode_plainly(base, request, SamplingRule())
        assert Decoder(model).generate(prompt, 12, seed=length).token_ids == expected


def test_the_same_seed_and_sequence_give_the_same_text_whatever_the_budget(
    bases: list[PreTrainedModel], random_adapter: Callable
) -> None:
    model = random_adapter(PTPModel(deepcopy(bases[0]), PTPConfig()))
    texts = [Decoder(model, budget=budget).generate(PROMPT, 40, 3, 7).token_ids for budget in (0, 1, 5, 24, 80)]
    assert texts == texts[:1] * 5
    assert Decoder(model).generate(PROMPT, 40, 3, 8).token_ids != texts[0]
    assert Decoder(model).generate(PROMPT, 40, 4, 7).token_ids != texts[0]


def test_a_text_ends_with_the_model_s_context(bases: list[PreTrainedModel], random_adapter: Callable) -> None:
    base = bases[2]
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig()))
    generation = Decoder(model, budget=40).generate(PROMPT, 500, end_token_ids=[])
    assert len(PROMPT) + len(generation.token_ids) == base.config.n_positions
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_decoding_is_transformers_greedy_generation(tiny_llama: Callable, attention: str) -> None:
    base = tiny_llama(attention=attention)
    request, prompt = make_request(base, PROMPT, 40, seed=0), torch.tensor([PROMPT])
    expected = base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)[
        0, len(PROMPT) :
    ].tolist()
    assert decode_plainly(base, request, SamplingRule(temperature=0)) == expected


def expected_pairs(base: PreTrainedModel, prompt: list[int]) -> np.ndarray:
    """(V, V) probabilities of the first two tokens after a prompt."""
    size = base.config.vocab_size
    with torch.no_grad():
        first = base(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        prompts = torch.tensor([[*prompt, token] for token in range(size)])
        second = base(input_ids=prompts).logits[:, -1].double().softmax(-1)
    return (first.unsqueeze(1) * second).numpy()


@pytest.mark.parametrize("order", ["vocabulary", "probability"])
def test_many_texts_together_follow_the_base_model_s_distribution(
    bases: list[PreTrainedModel], random_adapter: Callable, order: str
) -> None:
    base, num_texts = bases[1], 1000
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(window=4)))
    decoder = Decoder(model, SamplingRule(order=order), budget=6)
    observed = np.zeros((base.config.vocab_size,) * 2)
    for sequence in range(num_texts):
        first, second = decoder.generate(PROMPT, 2, seed=9, sequence=sequence, end_token_ids=[]).token_ids
        observed[first, second] += 1
    expected = expected_pairs(base, PROMPT) * num_texts
    common = expected >= 5
    counts = [np.append(table[common], table[~common].sum()) for table in (observed, expected)]
    assert stats.chisquare(*counts).pvalue > 1e-3
