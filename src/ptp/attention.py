"""Handing transformers an attention mask of our own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def native_mask(model: PreTrainedModel, mask: Tensor | None) -> Tensor | None:
    """A boolean mask (B, 1, queries, keys; True = may attend) as the model's attention takes it.

    SDPA takes it as it is; eager attention adds its mask to the scores.
    """
    if mask is None or model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
