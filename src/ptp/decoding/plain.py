"""Plain token-by-token decoding: what a lossless decoder must reproduce, and what its speed is measured against."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ptp.cache import RollbackCache
from ptp.decoding.requests import Request
from ptp.decoding.verification import sampled
from ptp.sampling import SamplingRule


@torch.inference_mode()
def decode_plainly(base_model: PreTrainedModel, request: Request, rule: SamplingRule) -> list[int]:
    """Sample the base model one token per call with the request's u and options: the bare autoregressive loop.

    It shares the cache and the sampling with the decoder, none of its layout, masks, drafts or bookkeeping.
    """
    num_layers = base_model.config.get_text_config().num_hidden_layers
    cache = RollbackCache(num_layers, len(request.prompt_ids) + request.max_new_tokens)
    inputs = torch.tensor([request.prompt_ids], device=base_model.device)
    text = list(request.prompt_ids)
    for u in request.u:
        logits = base_model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        text.append(next(sampled(logits[0, -1:], u.view(1), text, rule, request.processors)))
        if request.finish_reason(text) is not None:
            break
        inputs = torch.tensor([text[-1:]], device=base_model.device)
    return text[len(request.prompt_ids) :]
