"""What a model can attend to: its context, and a mask of our own in the form it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptp.errors import ConfigError

FLEX = "ptp_flex_attention"
"""The attention of `use_flex_attention`, as a name among transformers' own."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see: said once, made into the form that an attention takes.

    sees: maps row, query and key, integer tensors that broadcast, to True where the key may be seen. What differs from
    batch to batch must be tensors in it, for `blocks` is compiled for the rest.
    """

    sees: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: int
    queries: int
    keys: int
    device: torch.device

    def dense(self) -> Tensor:
        """(B, 1, queries, keys) bool, True = may attend."""
        row, query, key = (torch.arange(size, device=self.device) for size in (self.rows, self.queries, self.keys))
        return self.sees(row[:, None, None], query[:, None], key).unsqueeze(1)

    def blocks(self) -> BlockMask:
        """The blocks of queries and keys that flex attention has to compute; no dense mask is made on a GPU."""
        sees = self.sees

        def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(row, query, key)

        make = _compiled(create_block_mask) if self.device.type == "cuda" else create_block_mask
        return make(may_see, self.rows, None, self.queries, self.keys, device=self.device)


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions a model was made for; None if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def native_mask(model: PreTrainedModel, mask: Mask | Tensor | None) -> BlockMask | Tensor | None:
    """A mask as the model's attention takes it; a tensor is (B, 1, queries, keys) bool, True = may attend.

    SDPA takes booleans as they are. Eager attention adds its mask to the scores, and SDPA would make such a sum of a
    boolean mask in each layer anew, and keep each for the backward pass: a `Mask`, of training, is made a sum once.
    """
    implementation = model.config._attn_implementation
    if isinstance(mask, Mask):
        if implementation == FLEX:
            return mask.blocks()
        mask = mask.dense()
    elif mask is None or implementation in ("sdpa", FLEX):
        return mask
    kind = mask.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def use_flex_attention(model: PreTrainedModel) -> None:
    """Let a model attend by flex attention where its mask is a `Mask`, and by SDPA as before where it is another.

    A model without SDPA, or that transformers says flex attention is not for, keeps what it has.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_flex_attn:
        AttentionInterface.register(FLEX, attend)
        AttentionMaskInterface.register(FLEX, sdpa_mask)
        model.set_attn_implementation(FLEX)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: (B, heads, T, head_dim) to (B, T, heads, head_dim).

    Not transformers' own flex attention, which compiles for any length as soon as it has seen two (the context's and
    the windows'), and takes no dense mask.
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout > 0:
        raise ConfigError(f"flex attention has no dropout; got {dropout}: set the model's attention dropout to 0")
    compute: Callable[..., Any] = flex_attention
    if query.device.type == "cuda":
        compute = _compiled(flex_attention)
    # Under autocast, rotary positions leave queries and keys in float32; SDPA is cast by autocast itself.
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = compute(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for each shape it is called with; those of training are few and do not change."""
    return torch.compile(function, dynamic=False)
