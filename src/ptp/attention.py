"""What a model can attend to: its context, and a mask of our own in the form it takes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions a model was made for; None if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def native_mask(model: PreTrainedModel, mask: Tensor | None) -> Tensor | None:
    """A boolean mask (B, 1, queries, keys; True = may attend) as the model's attention takes it.

    SDPA takes it as it is; eager attention adds its mask to the scores.
    """
    if mask is None or model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
