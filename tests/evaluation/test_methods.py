"""What is measured against each other does the same work: the same rule, lengths and end tokens, every call counted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.demo import make_tokenizer
from ptp.errors import ConfigError
from ptp.evaluation.methods import ASSISTED, GENERATE, LOOKUP, PLAIN, PTP, Method, by_generate, make_methods
from ptp.experiment import ExperimentConfig
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule, probability, warp

ALL = [PTP, PLAIN, GENERATE, LOOKUP, ASSISTED]
GREEDY = SamplingRule(temperature=0)
NARROW = SamplingRule(temperature=0.6, top_k=4, top_p=0.8)
PROMPT = [7, 8, 9, 7, 8, 9, 7, 8]


@pytest.fixture(scope="module")
def base(config: ExperimentConfig) -> PreTrainedModel:
    return load_base_model(config.base_model)


@pytest.fixture
def methods(config: ExperimentConfig, random_adapter: Callable) -> Callable[[SamplingRule], dict[str, Method]]:
    """Makes all methods under a rule; the assistant is the base model itself."""

    def make(rule: SamplingRule) -> dict[str, Method]:
        model = random_adapter(PTPModel(load_base_model(config.base_model), PTPConfig(window=4)))
        plain_model = load_base_model(config.base_model)
        # Settings of a generation config that no rule has.
        plain_model.generation_config.repetition_penalty = 3.0
        plain_model.generation_config.top_k = 1
        return make_methods(Decoder(model, rule, 8), plain_model, config.base_model, config.base_model)

    return make


def test_all_methods_write_the_same_greedy_text(base: PreTrainedModel, methods: Callable) -> None:
    request = make_request(base, PROMPT, 24, seed=0, end_token_ids=[])
    texts = {name: method(request).token_ids for name, method in methods(GREEDY).items()}
    assert list(texts) == ALL
    assert len(texts[PLAIN]) == 24
    assert all(text == texts[PLAIN] for text in texts.values()), texts


def test_all_methods_stop_at_the_request_s_end_tokens(base: PreTrainedModel, methods: Callable) -> None:
    made = methods(GREEDY)
    text = made[PLAIN](make_request(base, PROMPT, 24, seed=0, end_token_ids=[])).token_ids
    end = text[5]
    request = make_request(base, PROMPT, 24, seed=0, end_token_ids=[end])
    expected = text[: text.index(end) + 1]
    assert all(method(request).token_ids == expected for method in made.values())


def test_all_methods_sample_under_the_rule(base: PreTrainedModel, methods: Callable) -> None:
    seen = set()
    for name, method in methods(NARROW).items():
        for sequence in range(3):
            request = make_request(base, PROMPT, 24, seed=1, sequence=sequence, end_token_ids=[])
            text = method(request).token_ids
            with torch.no_grad():
                logits = base(torch.tensor([PROMPT + text])).logits[0, len(PROMPT) - 1 : -1]
            assert (probability(warp(logits, NARROW), torch.tensor(text)) > 0).all(), name
            # Were it greedy in secret, every request would give one text.
            seen.add((name, tuple(text)))
    assert len(seen) == 3 * len(ALL)


def test_a_repetition_writes_the_same_text(base: PreTrainedModel, methods: Callable) -> None:
    request = make_request(base, PROMPT, 24, seed=1)
    for method in methods(NARROW).values():
        assert method(request) == method(request)


def test_every_call_writes_what_it_accepts_and_one_token_more(base: PreTrainedModel, methods: Callable) -> None:
    request = make_request(base, PROMPT, 24, seed=1, end_token_ids=[])
    calls = {name: method(request).calls for name, method in methods(SamplingRule()).items()}
    for name in (PLAIN, GENERATE, LOOKUP, ASSISTED):
        assert sum(call.num_accepted + 1 for call in calls[name]) == 24, name
        assert all(0 <= call.num_accepted <= call.num_drafts for call in calls[name]), name
    assert calls[PLAIN] == calls[GENERATE] == [(0, 0)] * 24
    assert len(calls[ASSISTED]) < len(calls[LOOKUP]) <= 24


def test_drafts_of_the_model_itself_are_all_accepted(base: PreTrainedModel, methods: Callable) -> None:
    request = make_request(base, PROMPT, 24, seed=1, end_token_ids=[])
    calls = methods(GREEDY)[ASSISTED](request).calls
    assert sum(call.num_drafts for call in calls) > 0
    assert all(call.num_accepted == call.num_drafts for call in calls)


def test_prompt_lookup_drafts_what_followed_before(base: PreTrainedModel, methods: Callable) -> None:
    request = make_request(base, PROMPT, 4, seed=1, end_token_ids=[])
    # After the second "7 8" the prompt goes on with 9 7 8 9 7 8: six tokens, which leave no room for more.
    assert methods(GREEDY)[LOOKUP](request).calls[0].num_drafts == 6


@pytest.mark.parametrize("vocab_size", [None, 300])
def test_an_assistant_with_other_tokens_is_refused(
    config: ExperimentConfig, vocab_size: int | None, tiny_llama: Callable, tmp_path: Path
) -> None:
    model = load_base_model(config.base_model)
    tokenizer = make_tokenizer(["another text, and so other merges"], 270)
    tiny_llama(vocab_size=vocab_size or model.config.vocab_size).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    decoder = Decoder(PTPModel(load_base_model(config.base_model), PTPConfig(window=4)), GREEDY)
    with pytest.raises(ConfigError, match="same tokenizer") as refusal:
        make_methods(decoder, model, config.base_model, str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


def test_generate_samples_under_min_p_too(tiny_llama: Callable) -> None:
    base = tiny_llama(40)
    request = make_request(base, [5, 3, 0, 4], 12, seed=0, end_token_ids=[])
    # Of tokens as likely as the likeliest there is one: sampling is greedy.
    greedy = decode_plainly(base, request, SamplingRule(temperature=0))
    assert by_generate(base, SamplingRule(min_p=1.0))(request).token_ids == greedy
    assert by_generate(base, SamplingRule())(request).token_ids != greedy
