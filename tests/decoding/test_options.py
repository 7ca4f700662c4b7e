"""Options do what they do in `model.generate`, whatever is drafted; or they are refused by name."""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoder import OracleDecoder
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.options import NO_EFFECT, OFF, REFUSED, TAKEN_OVER, request_from, sampling_rule
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.decoding.verification import sampled
from ptp.errors import ConfigError, DecodingError
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

VOCAB_SIZE = 40
PROMPT = [5, 3, 8, 4]

TOKENS = [
    b"<s>",
    b"</s>",
    b"<pad>",
    *(bytes([byte]) for byte in b"abcdefgh .\n"),
    *(bytes([byte]) for byte in "é→".encode()),
]
TOKENS += [b"ab", b"ba", b"cab", b"a b", b"bc d", b" a", b"\n\n", b"abab", b"aa", b"e\n", "é".encode(), b".a"]
TOKENS += [b"h" * number for number in range(2, 2 + VOCAB_SIZE - len(TOKENS))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of few tokens; some are parts of a letter."""
    letters = bytes_to_unicode()
    vocab = {"".join(letters[byte] for byte in token): number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(VOCAB_SIZE, layers=1)


@pytest.fixture(scope="module", params=["categorical", "one_hot"])
def model(request: pytest.FixtureRequest, base: PreTrainedModel, random_adapter: Callable) -> PTPModel:
    return random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=request.param, window=6)))


def texts(
    model: PTPModel, base: PreTrainedModel, config: GenerationConfig, rule: SamplingRule, **settings: Any
) -> tuple[list[int], str]:
    """The text that plain decoding writes, once it is that of random drafts and of half right ones too; and its end."""
    prompt = settings.pop("prompt", PROMPT)
    request = request_from(config, base, rule, prompt, **settings)
    plain = decode_plainly(base, request, rule)
    mostly_wrong = Decoder(model, rule).answer(request)
    oracle = OracleDecoder(model, plain + [3] * (request.max_new_tokens - len(plain)), budget=16, wrong=0.2)
    oracle.rule = rule
    mostly_right = oracle.answer(request)
    assert mostly_wrong.token_ids == mostly_right.token_ids == plain, (config, rule, settings)
    assert mostly_wrong.finish_reason == mostly_right.finish_reason
    assert sum(len(step.token_ids) for step in mostly_right.steps) == len(plain)
    return plain, mostly_right.finish_reason


def generated(
    base: PreTrainedModel, config: GenerationConfig, u: Tensor, prompt: list[int], **settings: Any
) -> list[int]:
    """What `model.generate` writes if each token is the one whose interval holds its u."""
    numbers = iter(u)

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        edges = probs.cumsum(-1)
        return (edges / edges[:, -1:] > next(numbers)).int().argmax(-1, keepdim=True)

    ids = torch.tensor([prompt])
    with mock.patch("torch.multinomial", multinomial):
        whole = base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **settings)
    return whole[0, len(prompt) :].tolist()


OPTIONS: dict[str, list[Any]] = {
    "min_new_tokens": [6, 12],
    "min_length": [9, 12],
    "eos_token_id": [[1, 9, 20, 30], 7],
    "stop_strings": ["ab", ["\n\n", "é"], ["a b", "h", "→"], ["dadcee"]],
    "repetition_penalty": [1.3, 0.7],
    "no_repeat_ngram_size": [1, 2],
    "bad_words_ids": [[[5], [7, 8], [20, 21, 22]], [[1], [12]]],
    "sequence_bias": [[[[8], -5.0], [[9, 10], 4.0], [[5, 3, 8, 4, 6], 9.0]]],
    "suppress_tokens": [[3, 4, 11, 17]],
    "begin_suppress_tokens": [list(range(2, 30))],
    "forced_bos_token_id": [6],
    "forced_eos_token_id": [1, [1, 9]],
    "exponential_decay_length_penalty": [(3, 1.4)],
    "remove_invalid_values": [True],
    "renormalize_logits": [True],
}


def compare_with_transformers(
    model: PTPModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    rng: random.Random,
) -> None:
    sampling = rng.choice([{"do_sample": False}, {"do_sample": True}, {"do_sample": True}])
    if sampling["do_sample"]:
        choices = {"temperature": [0.7, 1.0], "top_k": [0, 12], "top_p": [0.9, 1.0], "min_p": [0.0, 0.05]}
        sampling |= {name: rng.choice(values) for name, values in choices.items()}
    rule = sampling_rule(GenerationConfig(**sampling), SamplingRule())
    prompt, length, seed = rng.choice([PROMPT, PROMPT, [6]]), rng.randint(12, 24), rng.randrange(1000)
    options = options | rng.choice([{"max_new_tokens": length}, {"max_length": length + len(prompt)}])
    config = GenerationConfig(**options, **sampling)
    written, reason = texts(model, base, config, rule, seed=seed, tokenizer=tokenizer, prompt=prompt)
    u = make_request(base, prompt, length, seed).u
    stops = {"tokenizer": tokenizer} if "stop_strings" in options else {}
    expected = generated(base, config, u, prompt, **stops)
    assert written == expected, (options, rule, prompt)
    assert reason == "stop" or len(written) == length


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_writes_the_text_that_generate_writes_with_the_same_numbers(
    model: PTPModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    rng = random.Random(name)
    for value in OPTIONS[name]:
        for _ in range(2):
            compare_with_transformers(model, base, tokenizer, {name: value}, rng)


@pytest.mark.parametrize("seed", range(8))
def test_options_together_write_the_text_that_generate_writes_with_the_same_numbers(
    model: PTPModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    rng = random.Random(seed)
    options = {name: rng.choice(values) for name, values in OPTIONS.items() if rng.random() < 0.3}
    if "remove_invalid_values" in options:
        # What it puts in place of −inf, this multiplies until it overflows.
        options.pop("exponential_decay_length_penalty", None)
    compare_with_transformers(model, base, tokenizer, options, rng)


def test_behind_a_prompt_of_one_token_the_beginning_is_forced_first_and_then_suppressed(base: PreTrainedModel) -> None:
    config = GenerationConfig(
        forced_bos_token_id=6, begin_suppress_tokens=list(range(2, 30)), max_new_tokens=8, do_sample=False
    )
    request = request_from(config, base, SamplingRule(temperature=0), [9])
    written = decode_plainly(base, request, SamplingRule(temperature=0))
    assert written == generated(base, config, request.u, [9])
    assert written[0] == 6


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"remove_invalid_values", "renormalize_logits"}))
def test_every_option_that_is_tested_changes_some_text(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    config, prompt = GenerationConfig(max_new_tokens=40, **{name: OPTIONS[name][0]}), [6]
    with_option, without = (
        [
            decode_plainly(
                base, request_from(one, base, SamplingRule(), prompt, seed=seed, tokenizer=tokenizer), SamplingRule()
            )
            for seed in range(8)
        ]
        for one in (config, GenerationConfig(max_new_tokens=40))
    )
    assert with_option != without


# Stop strings


@given(
    ids=st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=2, max_size=14),
    num_prompt=st.integers(1, 3),
    stops=st.lists(
        st.sampled_from(["a", "ab", "b", "a b", " a", "\n", "\n\n", "é", "→", "aba", "bab", "é.", "hhh", "c d"]),
        min_size=1,
        max_size=3,
    ),
)
def test_a_text_ends_with_the_first_token_that_completes_a_stop_string(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], num_prompt: int, stops: list[str]
) -> None:
    prompt, text = ids[: min(num_prompt, len(ids) - 1)], ids[min(num_prompt, len(ids) - 1) :]
    config = GenerationConfig(stop_strings=stops, max_new_tokens=len(text) + 1)
    request = request_from(config, base, SamplingRule(), prompt, tokenizer=tokenizer)
    for length in range(1, len(text) + 1):
        so_far = [*prompt, *text[:length]]
        written = b"".join(TOKENS[token] for token in so_far)
        before = len(written) - len(TOKENS[so_far[-1]])
        # Whether an occurrence reaches into the last token: a prompt may hold the string.
        completed = any(stop.encode() in written[max(0, before - len(stop.encode()) + 1) :] for stop in stops)
        assert request.finish_reason(so_far) == ("stop" if completed else None)


def test_a_stop_string_needs_a_tokenizer_and_some_text(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="are found by the model's tokenizer; pass it as `tokenizer`"):
        request_from(GenerationConfig(stop_strings="x"), base, SamplingRule(), PROMPT)
    with pytest.raises(ConfigError, match="a stop string is empty"):
        request_from(GenerationConfig(stop_strings=["a", ""]), base, SamplingRule(), PROMPT, tokenizer=tokenizer)


# Fields


def test_every_field_of_a_generation_config_is_taken_over_or_refused_or_without_effect() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= TAKEN_OVER | NO_EFFECT | REFUSED.keys()
    assert len(TAKEN_OVER) + len(NO_EFFECT) + len(REFUSED) == len(TAKEN_OVER | NO_EFFECT | REFUSED.keys())
    assert OFF.keys() <= REFUSED.keys()


@pytest.mark.parametrize("name", [*REFUSED, "top_q"])
def test_what_cannot_be_lossless_and_what_is_not_known_is_refused_by_name(base: PreTrainedModel, name: str) -> None:
    config = GenerationConfig()
    for off in (None, False, OFF.get(name)):
        setattr(config, name, off)
        assert sampling_rule(config, SamplingRule()) == SamplingRule()
    setattr(config, name, 4)
    for refused in (
        lambda: sampling_rule(config, SamplingRule()),
        lambda: request_from(config, base, SamplingRule(), PROMPT),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value).startswith(f"{name}=4 ")
        assert "\n" not in str(error.value)


def test_beams_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError) as error:
        sampling_rule(GenerationConfig(num_beams=4), SamplingRule())
    assert str(error.value) == (
        "num_beams=4 cannot be decoded losslessly from one stream of u: it weighs whole texts against each other"
    )


TRAINED = SamplingRule(temperature=0.7, top_k=50, top_p=0.95, order="probability")


@pytest.mark.parametrize(
    ("settings", "default", "rule"),
    [
        ({}, TRAINED, TRAINED),
        ({"do_sample": True}, TRAINED, TRAINED),
        (
            {"top_k": 0, "min_p": 0.1},
            TRAINED,
            SamplingRule(temperature=0.7, top_p=0.95, min_p=0.1, order="probability"),
        ),
        ({"temperature": 1.0, "top_p": 1.0}, TRAINED, SamplingRule(top_k=50, order="probability")),
        ({"do_sample": False, "top_k": 7}, TRAINED, SamplingRule(temperature=0, order="probability")),
        ({"do_sample": True}, SamplingRule(temperature=0), SamplingRule()),
        ({"do_sample": True, "temperature": 0.5}, SamplingRule(temperature=0), SamplingRule(temperature=0.5)),
    ],
)
def test_the_rule_is_the_adapter_s_where_a_configuration_says_nothing(
    settings: dict[str, Any], default: SamplingRule, rule: SamplingRule
) -> None:
    assert sampling_rule(GenerationConfig(**settings), default) == rule


def test_sampling_fields_that_the_decoder_does_not_follow_are_not_ignored(base: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"asks for temperature 0\.5, .* the decoder samples by temperature 1, "):
        request_from(GenerationConfig(temperature=0.5), base, SamplingRule(), PROMPT)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"repetition_penalty": -1.0}, ConfigError, "`penalty` has to be a strictly positive float, but is -1.0"),
        ({"bad_words_ids": []}, ConfigError, "`bad_words_ids` has to be a non-empty list, but is []."),
        ({"max_length": 4}, ConfigError, "max_length=4 leaves no room behind a prompt of 4 tokens"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            DecodingError,
            "min_new_tokens must lie in [0, max_new_tokens = 8]; got 9",
        ),
        ({"min_new_tokens": -1}, DecodingError, "min_new_tokens must lie in [0, max_new_tokens = 128]; got -1"),
    ],
)
def test_a_value_that_cannot_be_served_is_one_clear_line(
    base: PreTrainedModel, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        request_from(GenerationConfig(**settings), base, SamplingRule(), PROMPT)
    assert str(raised.value) == message


# Processors of one's own


def test_warpers_of_any_kind_may_be_passed_as_processors(model: PTPModel, base: PreTrainedModel) -> None:
    processors = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TypicalLogitsWarper(0.9)]
    request = make_request(base, PROMPT, 40, seed=4, processors=processors)
    config = GenerationConfig(do_sample=True, temperature=0.8, top_k=20, typical_p=0.9, max_new_tokens=40)
    expected = generated(base, config, request.u, PROMPT)
    assert decode_plainly(base, request, SamplingRule()) == expected
    written = Decoder(model, SamplingRule()).generate(PROMPT, 40, seed=4, processors=processors)
    assert written.token_ids == expected


class Grammar(LogitsProcessor):
    """Keeps state, and fails on a text that it did not allow, as grammars' processors do: tokens rise by 1 to 5."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = input_ids[0].tolist()
        assert not self.seen or (ids[:-1] == self.seen[-1] and 1 <= (ids[-1] - ids[-2]) % VOCAB_SIZE <= 5)
        self.seen.append(ids)
        allowed = (torch.arange(1, 6) + ids[-1]) % VOCAB_SIZE
        return torch.full_like(scores, -torch.inf).index_copy(1, allowed, scores[:, allowed])


def test_a_processor_with_state_sees_what_plain_sampling_shows_it_and_nothing_of_wrong_drafts(
    model: PTPModel, base: PreTrainedModel
) -> None:
    for seed in range(3):
        plain, parallel, mostly_right = Grammar(), Grammar(), Grammar()
        request = make_request(base, PROMPT, 40, seed, processors=[plain])
        expected = decode_plainly(base, request, SamplingRule())
        found = Decoder(model, SamplingRule()).generate(PROMPT, 40, seed, processors=[parallel])
        oracle = OracleDecoder(model, expected + [3] * (40 - len(expected)), budget=20, wrong=0.2)
        again = oracle.generate(PROMPT, 40, seed, processors=[mostly_right])
        assert found.token_ids == again.token_ids == expected
        assert plain.seen == parallel.seen == mostly_right.seen
        assert found.num_draft_tokens > found.num_accepted_tokens
    assert again.num_accepted_tokens > 0


@pytest.mark.parametrize(
    ("broken", "processor"),
    [
        (torch.nan, RepetitionPenaltyLogitsProcessor(1.1)),
        (torch.inf, RepetitionPenaltyLogitsProcessor(1.1)),
        # Makes a number of it, which the temperature makes infinite again.
        (torch.inf, InfNanRemoveLogitsProcessor()),
    ],
)
def test_logits_that_are_not_numbers_are_not_taken_for_a_fault_of_processors(
    broken: float, processor: LogitsProcessor
) -> None:
    logits = torch.tensor([[0.0, 0.0, broken, 0.0]])
    tokens = sampled(logits, torch.zeros(1), [1, 2, 3], SamplingRule(temperature=0.7), LogitsProcessorList([processor]))
    with pytest.raises(DecodingError, match="the base model's logits behind 3 tokens are not numbers"):
        next(tokens)


def test_processors_that_leave_no_token_are_refused_in_one_line(model: PTPModel) -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf) if input_ids.shape[1] == 7 else scores

    with pytest.raises(DecodingError, match="leave no token to choose behind 7 tokens: the highest score is -inf"):
        Decoder(model).generate(PROMPT, 10, end_token_ids=[], processors=[Nothing()])
