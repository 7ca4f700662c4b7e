"""Ways of decoding that are measured against each other: a request in, its tokens and what each model call did out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request
from ptp.errors import ConfigError
from ptp.model.loading import load_base_model, load_tokenizer, vocabulary_fingerprint
from ptp.sampling import SamplingRule

PTP, PLAIN, GENERATE, LOOKUP, ASSISTED = "PTP", "plain loop", "generate", "prompt lookup", "assisted"

LOOKUP_TOKENS = 10
"""Drafts that prompt lookup copies at a time, the number that transformers' own class begins with."""


class Call(NamedTuple):
    """A call of the base model: how many drafts it verified, and how many of these it accepted."""

    num_drafts: int
    num_accepted: int


class Answer(NamedTuple):
    """The tokens written, and the calls of the base model that wrote them."""

    token_ids: list[int]
    calls: list[Call]


Method = Callable[[Request], Answer]


def make_methods(
    decoder: Decoder, plain_model: PreTrainedModel, base_model: str, assistant: str | None = None
) -> dict[str, Method]:
    """The decoder, and what it is measured against under its rule, by name.

    plain_model: the base model without an adapter; settings of its generation config that no rule has are forgotten.
    base_model: where it was loaded from. assistant: see `load_assistant`.
    """
    kept, rule = plain_model.generation_config, decoder.rule
    # A repetition penalty there would be one of `generate` alone.
    plain_model.generation_config = GenerationConfig(eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id)
    methods = {
        PTP: by_decoder(decoder),
        PLAIN: by_plain_loop(plain_model, rule),
        GENERATE: by_generate(plain_model, rule),
        LOOKUP: by_generate(plain_model, rule, prompt_lookup_num_tokens=LOOKUP_TOKENS),
    }
    if assistant is not None:
        methods[ASSISTED] = by_generate(
            plain_model, rule, assistant_model=load_assistant(assistant, plain_model, base_model)
        )
    return methods


def by_decoder(decoder: Decoder) -> Method:
    """Parallel Token Prediction."""

    def write(request: Request) -> Answer:
        steps = list(decoder.steps(request))
        token_ids = [token for step in steps for token in step.token_ids]
        return Answer(token_ids, [Call(step.num_drafts, step.num_accepted) for step in steps])

    return write


def by_plain_loop(model: PreTrainedModel, rule: SamplingRule) -> Method:
    """The bare autoregressive loop, with the same u and so the same text."""

    def write(request: Request) -> Answer:
        token_ids = decode_plainly(model, request, rule)
        return Answer(token_ids, [Call(0, 0)] * len(token_ids))

    return write


def by_generate(model: PreTrainedModel, rule: SamplingRule, **settings: Any) -> Method:
    """transformers' `generate`, not compiled: another text of the same distribution, the same at each repetition.

    settings: what it takes besides, such as `assistant_model`.
    """
    names = ("temperature", "top_k", "top_p", "min_p")
    warpers = {name: getattr(rule, name) for name in names} if rule.temperature else {}
    generate = cast(Callable[..., torch.Tensor], model.generate)

    @torch.inference_mode()
    def write(request: Request) -> Answer:
        inputs = torch.tensor([request.prompt_ids], device=model.device)
        # Its numbers come from torch's own generator: u has 24 bits, and here its first is their seed.
        torch.manual_seed(int(request.u[0] * 2**24))
        with _Calls(model) as calls:
            written = generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=calls,
                do_sample=rule.temperature > 0,
                max_new_tokens=request.max_new_tokens,
                eos_token_id=sorted(request.end_token_ids) or None,
                pad_token_id=min(request.end_token_ids, default=0),
                disable_compile=True,
                **warpers,
                **settings,
            )
        return Answer(written[0, len(request.prompt_ids) :].tolist(), calls.made(len(request.prompt_ids)))

    return write


def load_assistant(name: str, model: PreTrainedModel, base_model: str) -> PreTrainedModel:
    """A smaller model that drafts for `generate`, in the model's dtype. base_model: where the model's tokenizer is.

    Raises `ConfigError` for one with other tokens. transformers 5.23 translates between tokenizers only where each has
    tokens that the other lacks: not where models of one tokenizer have vocabularies padded to different sizes.
    """
    assistant = load_base_model(name, model.dtype).eval()
    vocab_sizes = [one.config.get_text_config().vocab_size for one in (assistant, model)]
    fingerprints = [vocabulary_fingerprint(load_tokenizer(place)) for place in (name, base_model)]
    if len(set(vocab_sizes)) > 1 or len(set(fingerprints)) > 1:
        raise ConfigError(
            f"the assistant '{name}' has other tokens ({vocab_sizes[0]}) than '{base_model}' ({vocab_sizes[1]}); "
            "choose one with the same tokenizer and as large a vocabulary"
        )
    return assistant


class _Calls(BaseStreamer):
    """Counts the rows each call of a model is given inside the block, and as a streamer the tokens it settles."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.num_rows: list[int] = []
        self.num_tokens: list[int] = []

    def __enter__(self) -> _Calls:
        def count(module: object, args: object, given: dict[str, Any]) -> None:
            self.num_rows.append(given["input_ids"].shape[1])

        self.hook = self.model.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens.append(value.numel())

    def end(self) -> None: ...

    def made(self, num_prompt: int) -> list[Call]:
        """The calls. The streamer was given the prompt first; each call also runs the prompt or one settled token."""
        settled = [num_prompt, *[1] * (len(self.num_rows) - 1)]
        return [
            Call(rows - known, tokens - 1)
            for rows, known, tokens in zip(self.num_rows, settled, self.num_tokens[1:], strict=True)
        ]
