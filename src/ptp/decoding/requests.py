"""What is asked of a decoder, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ptp.errors import DecodingError
from ptp.layer_kinds import context_length
from ptp.model.ptp_model import end_token_ids as model_end_token_ids
from ptp.sampling import SamplingRule, uniform

MOST_LOGPROBS = 20
"""Most likely tokens that may be asked for beside each token, as many as OpenAI's API gives."""


@dataclass(frozen=True)
class Request:
    """One prompt to complete. u: (max_new_tokens,) float32, the numbers of the tokens to come, in order.

    processors: change each token's logits before the sampling rule does, as in transformers. stopping: transformers'
    criteria, asked after each token with all tokens so far; there are no scores for them. rule: how tokens are sampled
    (None: as the session samples). budget: positions that calls may spend on drafts and branches at most, 0 being
    plain decoding (None: what the session's policy says). num_logprobs: of each token to come, its log-probability is
    told, and those of so many most likely ones (None: nothing is).
    """

    prompt_ids: list[int]
    max_new_tokens: int
    end_token_ids: frozenset[int]
    u: Tensor
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    rule: SamplingRule | None = None
    budget: int | None = None
    num_logprobs: int | None = None

    @cached_property
    def u_values(self) -> list[float]:
        """u on the host."""
        return self.u.tolist()

    def num_remaining(self, tokens: Sequence[int]) -> int:
        """Tokens still to be written, given all tokens so far."""
        return self.max_new_tokens - (len(tokens) - len(self.prompt_ids))

    def finish_reason(self, tokens: Sequence[int]) -> str | None:
        """Why the text ends with the last of all tokens so far; None if it goes on.

        "stop": an end token, or a stopping criterion. "length": max_new_tokens are written.
        """
        if tokens[-1] in self.end_token_ids or (self.stopping and self._stops(tokens)):
            return "stop"
        return "length" if self.num_remaining(tokens) == 0 else None

    def _stops(self, tokens: Sequence[int]) -> bool:
        return bool(self.stopping(torch.tensor([tokens], device=self.u.device), None).item())


def make_request(
    base_model: PreTrainedModel,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    seed: int,
    sequence: int = 0,
    end_token_ids: Sequence[int] | None = None,
    min_new_tokens: int = 0,
    processors: Sequence[LogitsProcessor] = (),
    stopping: Sequence[StoppingCriteria] = (),
    rule: SamplingRule | None = None,
    budget: int | None = None,
    num_logprobs: int | None = None,
) -> Request:
    """Check a prompt against the model. Raises `DecodingError` for what cannot be served.

    A text that would outgrow the model's context is cut there ("length"). Before min_new_tokens are written no end
    token is; `stopping` may still end the text.
    """
    if isinstance(prompt_ids, str):
        raise DecodingError("the prompt must be token ids; got a text: give what the tokenizer makes of it")
    try:
        ids = torch.atleast_1d(torch.as_tensor(prompt_ids)).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DecodingError(f"the prompt must be a sequence of token ids; got {type(prompt_ids).__name__}") from error
    vocab_size = cast(nn.Embedding, base_model.get_input_embeddings()).weight.shape[0]
    context = context_length(base_model.config)
    if not ids or not isinstance(ids[0], int):
        raise DecodingError(f"the prompt must be a sequence of at least one token id; got shape {_shape(prompt_ids)}")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DecodingError(f"prompt ids must lie in [0, {vocab_size}); got {min(ids)} … {max(ids)}")
    if max_new_tokens < 1:
        raise DecodingError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise DecodingError(f"min_new_tokens must lie in [0, max_new_tokens = {max_new_tokens}]; got {min_new_tokens}")
    if budget is not None and budget < 0:
        raise DecodingError(f"budget must be 0 (plain decoding) or a positive number of positions; got {budget}")
    if num_logprobs is not None and not 0 <= num_logprobs <= MOST_LOGPROBS:
        raise DecodingError(f"num_logprobs must lie in [0, {MOST_LOGPROBS}]; got {num_logprobs}")
    if context is not None and len(ids) >= context:
        raise DecodingError(
            f"the prompt has {len(ids)} tokens and the model's context is {context}: "
            f"shorten it to {context - 1} at most"
        )
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - len(ids))
    if end_token_ids is None:
        end_token_ids = model_end_token_ids(base_model)
    device = base_model.device
    places = len(ids) + torch.arange(max_new_tokens)
    u = uniform(seed, sequence, places).to(device)
    all_processors = LogitsProcessorList(processors)
    if min_new_tokens and end_token_ids:
        ends = torch.tensor(list(end_token_ids), device=device)
        all_processors.insert(0, MinNewTokensLengthLogitsProcessor(len(ids), min_new_tokens, ends, device=str(device)))
    return Request(
        prompt_ids=ids,
        max_new_tokens=max_new_tokens,
        end_token_ids=frozenset(end_token_ids),
        u=u,
        processors=all_processors,
        stopping=StoppingCriteriaList(stopping),
        rule=rule,
        budget=budget,
        num_logprobs=num_logprobs,
    )


def _shape(ids: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(torch.as_tensor(ids).shape)
