"""What is promised of any model, kept on two real ones."""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.model.ptp_model import PTPModel, end_token_ids
from ptp.sampling import SamplingRule

ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
PROMPTS = ["Once upon a time, there was a little", "Lily"]
RULES = [
    SamplingRule(),
    SamplingRule(temperature=0),
    SamplingRule(temperature=0.7, top_k=50, top_p=0.95),
    SamplingRule(temperature=1.2, top_p=0.9, order="probability"),
]


@pytest.fixture(scope="module", params=["stories260K", "babyllama"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    directory = ASSETS / "models" / request.param
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent; set PTP_ASSETS to the folder that holds models/{request.param}")
    yield str(directory)


@pytest.fixture(scope="module")
def base(name: str) -> PreTrainedModel:
    return load_base_model(name, "float32").eval()


@pytest.fixture(scope="module")
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(name)


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_decoder_writes_what_plain_sampling_writes(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    random_adapter: Callable,
    rule: SamplingRule,
    variant: str,
) -> None:
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=variant, window=8, lora_rank=4)), std=0.02)
    for sequence, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        request = make_request(base, ids, 48, seed=5, sequence=sequence)
        generation = Decoder(model, rule, budget=16).generate(ids, 48, seed=5, sequence=sequence)
        assert generation.token_ids == decode_plainly(base, request, rule)


def test_with_the_gate_shut_the_model_is_the_base_model_bit_for_bit(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, random_adapter: Callable
) -> None:
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(lora_rank=4)))
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        expected, found = (m(input_ids=ids, use_cache=True) for m in (base, model.base_model))
    assert torch.equal(found.logits, expected.logits)
    for layer, expected_layer in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, expected_layer.keys)
        assert torch.equal(layer.values, expected_layer.values)


def test_both_end_tokens_end_a_text(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert set(end_token_ids(base)) == {1, 2}
    ids = tokenizer(PROMPTS[0])["input_ids"]
    request = make_request(base, ids, 60, seed=0)
    assert request.end_token_ids == {1, 2}
