"""What a model can attend to: its context, and a mask of our own in the form it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptp.errors import ConfigError
from ptp.layer_kinds import GPT_NEO, LayerKind, layer_kinds

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

    def narrowed(self, kind: LayerKind, positions: Tensor, key_positions: Tensor) -> Mask:
        """What a layer of a kind sees of it. positions: (B, queries), key_positions: (B, keys) int64."""
        if kind.is_full:
            return self
        sees = self.sees

        def near(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(row, query, key) & kind.sees(positions[row, query], key_positions[row, key])

        return replace(self, sees=near)

    def blocks(self) -> BlockMask:
        """The blocks of queries and keys that flex attention has to compute; no dense mask is made on a GPU."""
        sees = self.sees

        def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(row, query, key)

        make = _compiled(create_block_mask) if self.device.type == "cuda" else create_block_mask
        return make(may_see, self.rows, None, self.queries, self.keys, device=self.device)


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


def open_layers(model: PreTrainedModel) -> tuple[LayerKind, ...]:
    """The kinds of a model's layers, all of which then take masks of ours. Raises `ConfigError` for unknown ones."""
    if model.config.model_type == GPT_NEO:
        from ptp.gpt_neo import take_masks

        take_masks(model)
    return layer_kinds(model.config)


def layer_masks(
    model: PreTrainedModel,
    mask: Mask | Tensor | None,
    kinds: tuple[LayerKind, ...],
    positions: Tensor,
    key_positions: Tensor | None = None,
) -> BlockMask | Tensor | dict[str, BlockMask | Tensor | None] | None:
    """A mask as the model's forward takes it: one for all layers, or for each kind of layer by name its own.

    kinds: what `open_layers` of the model said. positions: (B, queries), key_positions: (B, keys) int64; by default the
    keys of the call itself stand behind those of positions 0, 1 and so on. Without a mask the model makes its own,
    which is right where places in the cache are positions.
    """
    if mask is None or (len(kinds) == 1 and kinds[0].is_full):
        return native_mask(model, mask)
    if key_positions is None:
        num_keys = mask.keys if isinstance(mask, Mask) else mask.shape[-1]
        cached = torch.arange(num_keys - positions.shape[1], device=positions.device)
        key_positions = torch.cat([cached.expand(len(positions), -1), positions], dim=1)
    if isinstance(mask, Mask) and model.config._attn_implementation != FLEX:
        mask = mask.dense()
    masks = {kind.name: native_mask(model, _narrowed(mask, kind, positions, key_positions)) for kind in kinds}
    if model.config.model_type == GPT_NEO:
        return torch.cat([cast(Tensor, mask) for mask in masks.values()], dim=1)
    return masks if len(masks) > 1 else masks[kinds[0].name]


def _narrowed(mask: Mask | Tensor, kind: LayerKind, positions: Tensor, key_positions: Tensor) -> Mask | Tensor:
    if isinstance(mask, Mask):
        return mask.narrowed(kind, positions, key_positions)
    if kind.is_full:
        return mask
    return mask & kind.sees(positions[:, None, :, None], key_positions[:, None, None, :])


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
