"""What is asked of a decoder, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptp.errors import DecodingError
from ptp.layer_kinds import context_length
from ptp.model.ptp_model import end_token_ids as model_end_token_ids
from ptp.sampling import uniform


@dataclass(frozen=True)
class Request:
    """One prompt to complete. u: (max_new_tokens,) float32, the numbers of the tokens to come, in order."""

    prompt_ids: list[int]
    max_new_tokens: int
    end_token_ids: frozenset[int]
    u: Tensor

    @cached_property
    def u_values(self) -> list[float]:
        """u on the host."""
        return self.u.tolist()

    def num_remaining(self, tokens: Sequence[int]) -> int:
        """Tokens still to be written, given all tokens so far."""
        return self.max_new_tokens - (len(tokens) - len(self.prompt_ids))

    def is_finished(self, tokens: Sequence[int]) -> bool:
        """Whether the text has ended, given all tokens so far."""
        return tokens[-1] in self.end_token_ids or self.num_remaining(tokens) == 0

    def cut(self, tokens: list[int]) -> list[int]:
        """Newly verified tokens up to and including the first end token."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.end_token_ids), len(tokens))
        return tokens[:end]


def make_request(
    base_model: PreTrainedModel,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    seed: int,
    sequence: int = 0,
    end_token_ids: Sequence[int] | None = None,
) -> Request:
    """Check a prompt against the model. Raises `DecodingError` for what cannot be served.

    A text that would outgrow the model's context is cut there ("length").
    """
    ids = torch.as_tensor(prompt_ids).tolist()
    vocab_size = cast(nn.Embedding, base_model.get_input_embeddings()).weight.shape[0]
    context = context_length(base_model.config)
    if not ids or not isinstance(ids[0], int):
        raise DecodingError(f"the prompt must be a sequence of at least one token id; got shape {_shape(prompt_ids)}")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DecodingError(f"prompt ids must lie in [0, {vocab_size}); got {min(ids)} … {max(ids)}")
    if max_new_tokens < 1:
        raise DecodingError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if context is not None and len(ids) >= context:
        raise DecodingError(
            f"the prompt has {len(ids)} tokens and the model's context is {context}: "
            f"shorten it to {context - 1} at most"
        )
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - len(ids))
    if end_token_ids is None:
        end_token_ids = model_end_token_ids(base_model)
    places = len(ids) + torch.arange(max_new_tokens)
    u = uniform(seed, sequence, places).to(base_model.device)
    return Request(ids, max_new_tokens, frozenset(end_token_ids), u)


def _shape(ids: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(torch.as_tensor(ids).shape)
