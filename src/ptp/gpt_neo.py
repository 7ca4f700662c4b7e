"""GPT-Neo's attention with a mask of ours: the model itself masks by place in the cache, not by position.

Imported for GPT-Neo alone, because it imports the model's own file.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

KINDS = ("global", "local")
"""The order of the kinds' masks, which stand in the place of heads: (B, 2, queries, keys)."""


class MaskedSelfAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention, which with two masks takes its kind's and leaves its own causal mask out."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is None or attention_mask.shape[1] != len(KINDS):
            return super()._attn(query, key, value, attention_mask)
        kind = KINDS.index(self.attention_type)
        # As in the model's own: float32, and no scale.
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) + attention_mask[:, kind : kind + 1]
        weights = self.attn_dropout(scores.softmax(-1).to(value.dtype))
        return torch.matmul(weights, value), weights


def take_masks(model: PreTrainedModel) -> None:
    """Let every layer take masks of ours, in place; calls without one are as before."""
    for module in model.modules():
        if type(module) is GPTNeoSelfAttention:
            module.__class__ = MaskedSelfAttention
