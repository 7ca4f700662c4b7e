"""What clients ask for: the bodies of OpenAI's API, checked, and made into requests to the decoder.

    ChatBody ───────┐
                    ├── prepare ──► Prepared: requests of the decoder, stop strings, usage of the prompts
    CompletionBody ─┘

A field is honoured, known to change no text and ignored, or refused by name; sampling fields that are not given are the
adapter's own.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ptp.data.chats import encode, render, to_messages
from ptp.decoding.decoder import Decoder
from ptp.decoding.options import request_from
from ptp.decoding.requests import MOST_LOGPROBS, Request
from ptp.layer_kinds import context_length
from ptp.sampling import SamplingRule
from ptp.server.errors import APIError

COMPLETION_TOKENS = 16
"""Of a completion whose length is not given, as in OpenAI's API; an answer in a chat may be as long as is allowed."""

MOST_STOPS, LONGEST_STOP = 4, 256
"""Stop strings of a request, and characters of each."""

IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "tool_choice", "function_call", "verbosity", "prediction"),
}
"""Fields on which no text depends that is written here."""

OFF: dict[str, list[object]] = {
    "tools": [[]],
    "functions": [[]],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "web_search_options": [],
    "audio": [],
    "reasoning_effort": ["none"],
}
"""Fields that are refused, and their values, beside null, that ask for nothing."""

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class _Body(BaseModel):
    """A part of a request. Null is as good as nothing, as clients send it."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PTPOptions(_Body):
    """Ours: how a text is decoded, which changes none of its tokens. budget: see `ptp.decoding.requests.Request`."""

    budget: Annotated[int, Field(ge=0)] | None = None


class Body(_Body, ABC):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ptp: PTPOptions | None = None

    @classmethod
    def read(cls, data: bytes) -> Self:
        """A body from JSON. Raises `APIError` for what is malformed, out of range or not served here."""
        try:
            body = cls.model_validate_json(data)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False, include_context=False)
            # Of a field's alternatives, which follow its name, the one that was meant: it has the right type.
            first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
            parts = first["loc"] if first["type"] == "extra_forbidden" else first["loc"][:1]
            name = ".".join(map(str, parts))
            message = f"{name}: {first['msg']}" if name else first["msg"]
            raise APIError(400, message, param=name or None) from None
        for name, value in (body.model_extra or {}).items():
            if value is not None and name not in IGNORED and value not in OFF.get(name, []):
                what = "is not served here" if name in OFF else "is no field that is known here"
                raise APIError(400, f"{name[:80]} {what}; leave it out", param=name[:80])
        return body

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_new_tokens(self) -> int | None:
        """Tokens asked for; None to leave it to the server."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """See `ptp.decoding.requests.Request`."""

    @abstractmethod
    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of what is to be completed."""


class ChatBody(Body):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def num_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs asks for logprobs to be true as well", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        if not tokenizer.chat_template:
            raise APIError(400, "this model has no chat template: use /v1/completions", param="messages")
        return [encode(tokenizer, render(tokenizer, to_messages(self.messages), generation_prompt=True))]


class CompletionBody(Body):
    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def num_new_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        prompts: Sequence[Any] = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if isinstance(prompts[0], int):
            prompts = [prompts]
        return [list(tokenizer(one)["input_ids"]) if isinstance(one, str) else list(one) for one in prompts]


@dataclass(frozen=True)
class Limits:
    """Tokens that a prompt and a text may have at most; see `limits_of`."""

    max_prompt_tokens: int
    max_new_tokens: int


def limits_of(decoder: Decoder, max_prompt_tokens: int | None, max_new_tokens: int) -> Limits:
    """The limits asked for, within the model's context; where it names none, a prompt is as long as a text."""
    context = context_length(decoder.model.base_model.config)
    most = context - 1 if context else max_new_tokens
    return Limits(min(most, max_prompt_tokens or most), min(most, max_new_tokens))


@dataclass(frozen=True)
class Prepared:
    """Requests to the decoder, one for each choice: those of the first prompt, then those of the next.

    num_prompt_tokens: of the prompts, each counted once. seed: the one asked for, or the one that was drawn.
    """

    requests: list[Request]
    stops: list[str]
    num_prompt_tokens: int
    seed: int


def prepare(
    body: Body, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, limits: Limits, most_choices: int
) -> Prepared:
    """Requests for the choices of a body, the i-th the sequence i of the seed.

    Raises `APIError`, or another error of ours, for what cannot be served.
    """
    num_logprobs, rule = body.num_logprobs, _rule(body, decoder.rule)
    prompts = body.prompts(tokenizer)
    num_each = body.n or 1
    if len(prompts) * num_each > most_choices:
        raise APIError(
            400, f"{len(prompts)} prompts times n = {num_each} are more texts than the {most_choices} taken at a time"
        )
    for prompt in prompts:
        if len(prompt) > limits.max_prompt_tokens:
            raise APIError(
                400,
                f"the prompt has {len(prompt)} tokens; this server takes {limits.max_prompt_tokens}",
                code="context_length_exceeded",
            )
    asked = limits.max_new_tokens if body.num_new_tokens is None else body.num_new_tokens
    if asked > limits.max_new_tokens:
        raise APIError(
            400, f"{asked} new tokens are asked for; this server writes {limits.max_new_tokens} at most", "max_tokens"
        )
    config = GenerationConfig(
        min_new_tokens=body.min_tokens,
        repetition_penalty=body.repetition_penalty,
        sequence_bias=_bias(body, decoder.model.base_model.config.get_text_config().vocab_size),
        eos_token_id=[] if body.ignore_eos else None,
    )
    # Not among them: a configuration refuses a length in words of its own.
    config.max_new_tokens = asked
    seed = secrets.randbits(63) if body.seed is None else body.seed
    requests = [
        request_from(config, decoder.model.base_model, rule, prompt, seed=seed, sequence=number * num_each + choice)
        for number, prompt in enumerate(prompts)
        for choice in range(num_each)
    ]
    budget = body.ptp.budget if body.ptp else None
    requests = [replace(one, rule=rule, num_logprobs=num_logprobs, budget=budget) for one in requests]
    return Prepared(requests, body.stops, sum(map(len, prompts)), seed)


def _rule(body: Body, default: SamplingRule) -> SamplingRule:
    given = {name: getattr(body, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    if given["top_k"] == -1:  # as vLLM switches it off
        given["top_k"] = 0
    changes = {name: value for name, value in given.items() if value is not None}
    return SamplingRule(**{**dict(default), **changes}) if changes else default


def _bias(body: Body, vocab_size: int) -> dict[tuple[int, ...], float] | None:
    if not body.logit_bias:
        return None
    known = {str(token) for token in range(vocab_size)}
    if unknown := body.logit_bias.keys() - known:
        raise APIError(
            400, f"logit_bias maps token ids below {vocab_size} to numbers; got {min(unknown)[:80]!r}", "logit_bias"
        )
    return {(int(key),): float(value) for key, value in body.logit_bias.items()}
