"""Options of transformers' `GenerationConfig`, all of them: taken over with their meaning, or refused by name.

    GenerationConfig ─┬─ sampling_rule ──► SamplingRule    do_sample, temperature, top_k, top_p, min_p
                      └─ request_from ───► Request         lengths, end tokens, stop strings, logits processors

    config = GenerationConfig(temperature=0.7, repetition_penalty=1.2, stop_strings=["\\n\\n"], max_new_tokens=64)
    decoder = Decoder(model, sampling_rule(config, default=SamplingRule()))
    request = request_from(config, model.base_model, decoder.rule, prompt_ids, seed=3, tokenizer=tokenizer)
    decoder.answer(request, TextStreamer(tokenizer))

A field that is not set leaves what is there: the rule that is passed, the model's end tokens. Taken over is what makes
a token a function of the tokens before it and of its u: such a text is the same however it was drafted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ptp.decoding.requests import Request, make_request
from ptp.errors import ConfigError
from ptp.sampling import SamplingRule

MAX_NEW_TOKENS = 128
"""Where neither max_new_tokens nor max_length is set."""

TAKEN_OVER = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "stop_strings"),
    *("sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "remove_invalid_values"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens"),
}
"""Fields that do what they do in `model.generate`."""

NO_EFFECT = {
    # Padding, and models with an encoder.
    *("bos_token_id", "pad_token_id", "decoder_start_token_id"),
    # How calls are made.
    *("use_cache", "compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "transformers_version"),
    # What only beams or an assistant read; these are refused by the fields that switch them on.
    *("length_penalty", "early_stopping", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    "max_matching_ngram_size",
    # It leaves every probability as it is.
    "renormalize_logits",
}
"""Fields on which no token of a text depends that is sampled from one model."""

OFF: dict[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}
"""Values besides None and False that switch a field off."""

_BEAMS = "cannot be decoded losslessly from one stream of u: it weighs whole texts against each other"
_LATE_WARPER = (
    "would act behind the sampling rule: pass its processor in `processors`, after those of temperature, top-k and "
    "top-p if they are wanted, with SamplingRule() as the rule"
)
_DRAFTER = "is another way to draft: here the adapter drafts, and the text is the same without"
_TENSORS = "asks for tensors that decoding does not keep"
_CACHE = "would replace the cache that drafts are rolled back in"
_ENCODER = "needs an encoder, which decoder-only models lack"

REFUSED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"), _BEAMS),
    "penalty_alpha": "cannot be decoded losslessly from one stream of u: contrastive search compares hidden states",
    "dola_layers": "cannot be decoded losslessly: it compares the logits of inner layers",
    "guidance_scale": "cannot be decoded losslessly: each token would need a second call, on another prompt",
    "num_return_sequences": "asks for several texts: make a request for each, with a sequence number of its own",
    "max_time": "cannot be decoded losslessly: the text would depend on the machine's speed; set max_new_tokens",
    "token_healing": "changes the prompt: heal it before it is passed",
    **dict.fromkeys(("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config"), _LATE_WARPER),
    **dict.fromkeys(
        ("prompt_lookup_num_tokens", "assistant_early_exit", "is_assistant", "use_mtp", "speculation_type"), _DRAFTER
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        _TENSORS,
    ),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "continuous_batching_config"), _CACHE),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"), _ENCODER),
}
"""Why a field that is set cannot be served."""


def check_options(config: GenerationConfig) -> None:
    """Raises `ConfigError` for the first field that is set and not taken over, known or not."""
    for name, value in vars(config).items():
        if name.startswith("_") or name in TAKEN_OVER | NO_EFFECT:
            continue
        if value is None or value is False or (name in OFF and value == OFF[name]):
            continue
        why = REFUSED.get(name, "is no option that is known here; leave it out")
        raise ConfigError(f"{name}={reprlib.repr(value)} {why}")


def sampling_rule(config: GenerationConfig, default: SamplingRule) -> SamplingRule:
    """The rule a configuration asks for: `default` where it says nothing. do_sample=False is temperature 0.

    Raises `ConfigError` for a field that cannot be served (see `check_options`).
    """
    check_options(config)
    if config.do_sample is False:
        return SamplingRule(temperature=0, order=default.order)
    changes = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    if config.do_sample and default.temperature == 0:
        changes["temperature"] = config.temperature or 1.0
    return SamplingRule(**{**dict(default), **{name: value for name, value in changes.items() if value is not None}})


def request_from(
    config: GenerationConfig,
    base_model: PreTrainedModel,
    rule: SamplingRule,
    prompt_ids: Sequence[int] | Tensor,
    *,
    seed: int = 0,
    sequence: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Request:
    """A request with the options of a configuration; `ptp.decoding.decoder.Decoder.answer` decodes it.

    rule: what the decoder samples by. tokenizer: needed for stop strings. A stop string ends the text with the token
    that completes it, which is kept whole, as in transformers.

    Raises `ConfigError` for a field that cannot be served (see `check_options`), a value that its processor refuses,
    or sampling fields that `rule` does not follow; `DecodingError` for a prompt that cannot be completed.
    """
    if sampling_rule(config, rule) != rule:
        raise ConfigError(
            f"the configuration asks for {sampling_rule(config, rule)}, the decoder samples by {rule}; give the "
            "decoder ptp.decoding.options.sampling_rule(config, default) as its rule"
        )
    max_new_tokens = config.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = MAX_NEW_TOKENS
        if config.max_length is not None:
            max_new_tokens = config.max_length - len(prompt_ids)
            if max_new_tokens < 1:
                raise ConfigError(
                    f"max_length={config.max_length} leaves no room behind a prompt of {len(prompt_ids)} tokens"
                )
    ends = config.eos_token_id
    request = make_request(
        base_model,
        prompt_ids,
        max_new_tokens,
        seed,
        sequence,
        end_token_ids=[ends] if isinstance(ends, int) else ends,
        min_new_tokens=config.min_new_tokens or 0,
    )
    try:
        processors = [*request.processors, *_processors(config, request)]
        stopping = StoppingCriteriaList()
        if config.stop_strings:
            stopping.append(_stop_strings(config.stop_strings, tokenizer))
    except (ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return replace(request, processors=LogitsProcessorList(processors), stopping=stopping)


def _processors(config: GenerationConfig, request: Request) -> Iterator[LogitsProcessor]:
    """Processors of the fields that are set, in the order in which transformers applies them."""
    device, num_prompt = str(request.u.device), len(request.prompt_ids)
    ends = torch.tensor(sorted(request.end_token_ids), dtype=torch.int64, device=device)
    if config.sequence_bias is not None:
        yield SequenceBiasLogitsProcessor(config.sequence_bias)
    if config.repetition_penalty not in (None, 1):
        yield RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
    if config.no_repeat_ngram_size:
        yield NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
    if config.bad_words_ids is not None:
        yield NoBadWordsLogitsProcessor(config.bad_words_ids, ends)
    if config.min_length and len(ends):
        yield MinLengthLogitsProcessor(config.min_length, ends, device)
    if config.forced_bos_token_id is not None:
        yield ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id)
    if config.forced_eos_token_id is not None:
        yield ForcedEOSTokenLogitsProcessor(num_prompt + request.max_new_tokens, config.forced_eos_token_id, device)
    if config.remove_invalid_values:
        yield InfNanRemoveLogitsProcessor()
    if config.exponential_decay_length_penalty is not None and len(ends):
        yield ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, ends, num_prompt)
    if config.suppress_tokens is not None:
        yield SuppressTokensLogitsProcessor(config.suppress_tokens, device)
    if config.begin_suppress_tokens is not None:
        # Behind a prompt of one token a forced beginning comes first.
        begin = num_prompt + (num_prompt == 1 and config.forced_bos_token_id is not None)
        yield SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device)


def _stop_strings(strings: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria:
    strings = [strings] if isinstance(strings, str) else list(strings)
    if tokenizer is None:
        raise ConfigError(f"stop_strings={strings} are found by the model's tokenizer; pass it as `tokenizer`")
    if "" in strings:
        raise ConfigError("a stop string is empty; give some text to stop at")
    return StopStringCriteria(tokenizer, strings)
