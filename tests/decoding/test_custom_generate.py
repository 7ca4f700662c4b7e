"""transformers' own `generate` writes the same with an adapter, and the model comes out as it went in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, Family
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TopKLogitsWarper,
)

import ptp
from ptp import AdapterError, ConfigError, PTPConfig, PTPModel, SamplingRule
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request

PAD = 2
IDS = torch.tensor([[PAD, PAD, 5, 6, 7], [4, 5, 6, 7, 8], [PAD, PAD, PAD, PAD, 9]])
"""Prompts of three lengths, padded on the left."""
BATCH = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
LENGTHS = [3, 5, 1]


@pytest.fixture(scope="module")
def adapter(tiny_llama: Callable, random_adapter: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("custom_generate") / "adapter"
    random_adapter(PTPModel(tiny_llama(), PTPConfig(window=4, lora_rank=2)), std=0.2).save_pretrained(directory)
    return directory


@pytest.fixture
def model(tiny_llama: Callable) -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {letter: number for number, letter in enumerate("~!_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"[:40])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_")


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


class Favour(LogitsProcessor):
    """Favours a token by how many stand before it, padding included."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 10 + input_ids.shape[1] % 3] += 3
        return scores


class Until(StoppingCriteria):
    """Ends a text with a token above 30."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] > 30


def rows_allow(row: int, ids: Tensor) -> list[int]:
    return list(range(3 + 10 * row, 13 + 10 * row))


GREEDY: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "an end token soon": {"eos_token_id": [9, 31, 34]},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[34], [31, 9]]},
    "min_new_tokens": {"min_new_tokens": 10, "eos_token_id": [9, 31, 34]},
    "min_length": {"min_length": 12, "eos_token_id": [9, 31, 34]},
    "max_length": {"max_length": 17, "max_new_tokens": None},
    "forced ends": {"forced_eos_token_id": 7},
    "suppressed": {"suppress_tokens": [34, 31], "begin_suppress_tokens": [9]},
    "a bias": {"sequence_bias": {(9,): -5.0, (31,): 2.0}},
    "an early end": {"exponential_decay_length_penalty": (4, 1.5)},
    "a prefix function by row": {"prefix_allowed_tokens_fn": rows_allow},
    "a processor": {"logits_processor": LogitsProcessorList([Favour()])},
    "normalised": {"renormalize_logits": True, "repetition_penalty": 1.5},
    "an end token and a criterion": {"stopping_criteria": [Until()]},
    "a criterion in place of its own": {"stopping_criteria": StoppingCriteriaList([Until()]), "max_new_tokens": 7},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3)},
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_text_is_that_of_generate(model: LlamaForCausalLM, adapter: Path, case: str) -> None:
    options = {"max_new_tokens": 20} | GREEDY[case]
    if "generation_config" in options:
        del options["max_new_tokens"]
    expected = model.generate(**BATCH, **options)
    assert torch.equal(model.generate(**BATCH, **options, custom_generate=ptp.custom_generate(adapter, 8)), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_writes_the_same_and_is_left_as_it_was(
    family: Family, random_adapter: Callable, tmp_path: Path
) -> None:
    model = family.make()
    random_adapter(PTPModel(family.make(), PTPConfig(window=4, lora_rank=2)), std=0.2).save_pretrained(tmp_path)
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 16}
    expected = model.generate(**batch)
    assert torch.equal(model.generate(**batch, custom_generate=ptp.custom_generate(tmp_path, 8)), expected)
    assert torch.equal(model(ids).logits, family.make()(ids).logits)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_weights_that_are_trained_between_calls_count(kind: str, random_adapter: Callable, tmp_path: Path) -> None:
    make = next(family.make for family in FAMILIES if family.name == "GPT-NeoX")
    random_adapter(PTPModel(make(), PTPConfig(window=4, lora_rank=2)), std=0.2).save_pretrained(tmp_path)
    model, faster = make(), ptp.custom_generate(tmp_path, 8)
    before = model.generate(IDS[1:2], max_new_tokens=16, custom_generate=faster)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"dense_4h_to_h.{kind}"):
                parameter.neg_().add_(torch.linspace(-3, 3, parameter.shape[-1]))
    after = model.generate(IDS[1:2], max_new_tokens=16)
    assert not torch.equal(after, before)
    assert torch.equal(model.generate(IDS[1:2], max_new_tokens=16, custom_generate=faster), after)


SAMPLED: list[tuple[dict[str, Any], SamplingRule]] = [
    ({"top_k": 0}, SamplingRule()),
    ({}, SamplingRule(top_k=50)),
    ({"temperature": 0.6, "top_k": 12, "top_p": 0.8}, SamplingRule(temperature=0.6, top_k=12, top_p=0.8)),
    ({"temperature": 1.4, "top_k": 0, "min_p": 0.05}, SamplingRule(temperature=1.4, min_p=0.05)),
    ({"top_k": 0, "temperature": 0.6, "renormalize_logits": True}, SamplingRule(temperature=0.6)),
]


@pytest.mark.parametrize(("options", "rule"), SAMPLED)
def test_each_row_is_what_plain_sampling_writes_with_its_u(
    model: LlamaForCausalLM, adapter: Path, options: dict[str, Any], rule: SamplingRule
) -> None:
    written = model.generate(
        **BATCH,
        **options,
        do_sample=True,
        max_new_tokens=20,
        custom_generate=ptp.custom_generate(adapter, 8),
        seed=5,
    )
    for row, length in enumerate(LENGTHS):
        request = make_request(model, IDS[row, -length:], 20, seed=5, sequence=row)
        plain = decode_plainly(model, request, rule)
        padding = [PAD] * (written.shape[1] - IDS.shape[1] - len(plain))
        assert written[row, IDS.shape[1] :].tolist() == plain + padding


def test_a_processor_of_the_same_kind_as_the_rule_s_acts_as_well(model: LlamaForCausalLM, adapter: Path) -> None:
    options = {"do_sample": True, "top_k": 30, "max_new_tokens": 12, "logits_processor": [TopKLogitsWarper(1)]}
    written = model.generate(**BATCH, **options, custom_generate=ptp.custom_generate(adapter, 8))
    assert torch.equal(written, model.generate(**BATCH, max_new_tokens=12))


def test_torch_s_generator_decides_where_no_seed_is_given(model: LlamaForCausalLM, adapter: Path) -> None:
    faster = ptp.custom_generate(adapter, 8)

    def sample(seed: int | None = None) -> list[Any]:
        if seed is not None:
            torch.manual_seed(seed)
        return model.generate(**BATCH, do_sample=True, max_new_tokens=12, custom_generate=faster).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample() != sample(2)


def test_no_random_number_of_the_caller_s_is_used_up_but_a_seed(model: LlamaForCausalLM, adapter: Path) -> None:
    before = torch.get_rng_state()
    faster = ptp.custom_generate(adapter, 8)
    model.generate(**BATCH, max_new_tokens=3, custom_generate=faster)
    model.generate(**BATCH, do_sample=True, max_new_tokens=3, custom_generate=faster, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_return_sequences_are_texts_of_their_own(model: LlamaForCausalLM, adapter: Path) -> None:
    written = model.generate(
        IDS[1:2],
        do_sample=True,
        max_new_tokens=12,
        num_return_sequences=3,
        custom_generate=ptp.custom_generate(adapter, 8),
        seed=5,
        eos_token_id=None,
    )
    texts = [
        decode_plainly(model, make_request(model, IDS[1], 12, 5, row, []), SamplingRule(top_k=50)) for row in range(3)
    ]
    assert written[:, 5:].tolist() == texts
    assert len(set(map(tuple, texts))) == 3


def test_the_model_comes_out_as_it_went_in(model: LlamaForCausalLM, adapter: Path, tiny_llama: Callable) -> None:
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].requires_grad_(False)

    def state() -> Any:
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        return modules, [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]

    before = state()
    faster = ptp.custom_generate(adapter, 8)
    for seed in (1, 2):
        model.generate(**BATCH, do_sample=True, max_new_tokens=8, custom_generate=faster, seed=seed)
    assert state() == before
    fresh = tiny_llama()
    for (name, mine), (_, other) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert torch.equal(model.eval()(IDS).logits, fresh(IDS).logits)
    assert torch.equal(model.generate(**BATCH, max_new_tokens=9), fresh.generate(**BATCH, max_new_tokens=9))


def test_a_model_goes_on_with_other_weights_dtypes_and_adapters(
    model: LlamaForCausalLM, adapter: Path, tiny_llama: Callable
) -> None:
    first, second = ptp.custom_generate(adapter, 8), ptp.custom_generate(adapter, 4)
    expected = model.generate(**BATCH, max_new_tokens=9)
    for faster in (first, second, first):
        assert torch.equal(model.generate(**BATCH, max_new_tokens=9, custom_generate=faster), expected)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    changed = model.generate(**BATCH, max_new_tokens=9)
    assert not torch.equal(changed, expected)
    assert torch.equal(model.generate(**BATCH, max_new_tokens=9, custom_generate=first), changed)
    model = tiny_llama()
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        plain = model.generate(**BATCH, max_new_tokens=9)
        assert torch.equal(model.generate(**BATCH, max_new_tokens=9, custom_generate=first), plain)
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(AdapterError, match="was made for"):
        model.generate(**BATCH, max_new_tokens=9, custom_generate=first)


def test_a_streamer_gets_what_generate_gives_it(model: LlamaForCausalLM, adapter: Path) -> None:
    options = BATCH | {"max_new_tokens": 20, "eos_token_id": [9, 31, 34]}
    expected, got = Recorder(), Recorder()
    model.generate(**options, streamer=expected)
    model.generate(**options, streamer=got, custom_generate=ptp.custom_generate(adapter, 8))
    assert got.got == expected.got
    assert got.got[-1] == "end"


def test_tokens_are_streamed_as_they_are_verified(model: LlamaForCausalLM, adapter: Path) -> None:
    class Impatient(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.got) == 4:
                raise KeyboardInterrupt

    seen: list[int] = []

    class Watching(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids.shape[1])
            return scores

    options: dict[str, Any] = {"max_new_tokens": 400, "eos_token_id": None, "logits_processor": [Watching()]}
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS[1:2], **options, streamer=Impatient(), custom_generate=ptp.custom_generate(adapter, 8))
    # Three tokens, and what the call that verified the third could have besides.
    assert max(seen) < 5 + 3 + 8
    assert "base" not in dict(model.named_modules())["model.layers.0.mlp.down_proj"]._modules


def test_a_dictionary_holds_the_sequences_and_how_they_were_written(model: LlamaForCausalLM, adapter: Path) -> None:
    faster = ptp.custom_generate(adapter, 8)
    out = model.generate(**BATCH, max_new_tokens=9, return_dict_in_generate=True, custom_generate=faster)
    assert torch.equal(out.sequences, model.generate(**BATCH, max_new_tokens=9))
    for row, generation in zip(out.sequences[:, 5:].tolist(), out.generations, strict=True):
        assert row[: len(generation.token_ids)] == generation.token_ids
        assert generation.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"max_time": 1.0}, "max_time=1.0"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 3)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)}, "attention_mask"),
        ({"position_ids": torch.arange(5).expand(3, 5) + 1}, "position_ids"),
        ({"inputs_embeds": torch.zeros(3, 5, 32)}, "inputs_embeds"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    model: LlamaForCausalLM, adapter: Path, options: dict[str, Any], words: str
) -> None:
    faster = ptp.custom_generate(adapter, 8)
    with pytest.raises(ConfigError, match=words) as refused:
        model.generate(**{**BATCH, "max_new_tokens": 4, **options}, custom_generate=faster)
    assert "\n" not in str(refused.value)


def test_a_cache_that_holds_a_text_is_refused(model: LlamaForCausalLM, adapter: Path) -> None:
    cache = model(IDS[1:2, :3], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="past_key_values"):
        model.generate(IDS[1:2], past_key_values=cache, custom_generate=ptp.custom_generate(adapter, 8))


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(adapter: Path, tiny_llama: Callable) -> None:
    other = tiny_llama(seed=1)
    with pytest.raises(AdapterError, match="was made for"):
        other.generate(IDS, custom_generate=ptp.custom_generate(adapter, 8))
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in tiny_llama().named_parameters()]


def test_a_ptp_model_serves_the_model_it_is_around_and_no_other(
    model: LlamaForCausalLM, adapter: Path, tiny_llama: Callable
) -> None:
    expected = model.generate(**BATCH, max_new_tokens=9)
    around = PTPModel.from_pretrained(adapter, model)
    faster = ptp.custom_generate(around, 8)
    assert torch.equal(model.generate(**BATCH, max_new_tokens=9, custom_generate=faster), expected)
    with pytest.raises(AdapterError, match="another model"):
        tiny_llama().generate(**BATCH, max_new_tokens=9, custom_generate=faster)
    with pytest.raises(AdapterError, match="carries an adapter already"):
        model.generate(**BATCH, max_new_tokens=9, custom_generate=ptp.custom_generate(adapter, 8))


def test_rows_of_different_lengths_need_a_token_to_fill_them(model: LlamaForCausalLM, adapter: Path) -> None:
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ptp.DecodingError, match="pad_token_id"):
        model.generate(
            **BATCH, max_new_tokens=20, stopping_criteria=[Until()], custom_generate=ptp.custom_generate(adapter, 8)
        )


# By name: what transformers loads from an adapter's directory, or from the hub.


def test_generate_by_directory_writes_the_same(
    model: LlamaForCausalLM, adapter: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = BATCH | {"max_new_tokens": 20, "repetition_penalty": 1.2}
    options |= {"stop_strings": ["a", "fg"], "tokenizer": tokenizer, "eos_token_id": [9, 31, 34]}
    named = {"custom_generate": str(adapter), "trust_remote_code": True, "budget": 8}
    expected, got = Recorder(), Recorder()
    plain = model.generate(**options, streamer=expected)
    for _ in range(2):
        got.got.clear()
        assert torch.equal(model.generate(**options, **named, streamer=got), plain)
        assert got.got == expected.got
    sampled = model.generate(**BATCH, **named, do_sample=True, max_new_tokens=9, seed=3)
    again = ptp.custom_generate(adapter, 8)
    assert torch.equal(
        sampled, model.generate(**BATCH, do_sample=True, max_new_tokens=9, custom_generate=again, seed=3)
    )


def test_stop_strings_work_as_criteria(
    model: LlamaForCausalLM, adapter: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    strings = list("abcdefghA")
    plain = model.generate(**BATCH, max_new_tokens=20, stop_strings=strings, tokenizer=tokenizer)
    criteria = [StopStringCriteria(tokenizer, strings)]
    faster = ptp.custom_generate(adapter, 8)
    written = model.generate(**BATCH, max_new_tokens=20, stopping_criteria=criteria, custom_generate=faster)
    assert torch.equal(written, plain)
    assert written.shape[1] < 25


def test_a_directory_s_code_does_not_run_untrusted(model: LlamaForCausalLM, adapter: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**BATCH, max_new_tokens=3, custom_generate=str(adapter), trust_remote_code=False)
