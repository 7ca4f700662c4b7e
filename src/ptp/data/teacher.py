"""The teacher: completions sampled from the base model with known u, so that intervals are exact by construction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptp.attention import native_mask
from ptp.cache import RollbackCache
from ptp.data.packing import Completion
from ptp.sampling import SamplingRule, interval, pick, uniform, warp


@torch.inference_mode()
def sample_completions(
    base_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rule: SamplingRule,
    *,
    seed: int,
    sequences: Sequence[int],
    max_new_tokens: int,
    end_token_ids: Sequence[int],
) -> list[Completion]:
    """Complete prompts of any length together; row r draws u = uniform(seed, sequences[r], position).

    Rows are padded on the left; a row that has ended leaves the batch at once.
    """
    device, rows = base_model.device, len(prompts)
    width = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    inputs = torch.zeros(rows, width, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        inputs[row, width - len(prompt) :] = torch.as_tensor(prompt)
    places = torch.arange(width + max_new_tokens, device=device)
    visible = places >= padding.unsqueeze(1)
    causal = places[:width].unsqueeze(1) >= places[:width]
    own = torch.eye(width, dtype=torch.bool, device=device)
    mask = (causal & visible[:, None, :width] | own).unsqueeze(1)
    positions = (places[:width] - padding.unsqueeze(1)).clamp(min=0)

    ends = torch.tensor(sorted(end_token_ids), device=device)
    sequence = torch.tensor(sequences, device=device)
    alive = torch.arange(rows, device=device)
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
    edges = torch.zeros(2, rows, max_new_tokens, device=device)
    lengths = torch.full((rows,), max_new_tokens, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    context = getattr(base_model.config.get_text_config(), "max_position_embeddings", None) or width + max_new_tokens
    cache = RollbackCache(base_model.config.get_text_config().num_hidden_layers, width + max_new_tokens)
    for step in range(max_new_tokens):
        logits = base_model(
            input_ids=inputs,
            attention_mask=native_mask(base_model, mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        place = width + step - padding[alive]
        distribution = warp(logits, rule)
        token = pick(distribution, uniform(seed, sequence[alive], place))
        tokens[alive, step] = token
        edges[:, alive, step] = torch.stack(interval(distribution, token))
        finished[alive] = torch.isin(token, ends)
        # A text also ends where the model's context does, unfinished.
        ended = finished[alive] | (place + 1 >= context)
        if ended.any():
            lengths[alive[ended]] = step + 1
            cache.select_rows(~ended)
            alive, token, place = alive[~ended], token[~ended], place[~ended]
            if len(alive) == 0:
                break
        inputs, positions = token.unsqueeze(1), place.unsqueeze(1)
        mask = visible[alive, None, None, : width + step + 1]
    return [
        _completion(prompt, tokens[row, :length], edges[:, row, :length], bool(finished[row]))
        for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True))
    ]


def _completion(prompt: Sequence[int], tokens: Tensor, edges: Tensor, finished: bool) -> Completion:
    lower, upper = edges.cpu().numpy()
    ids = np.concatenate([np.asarray(prompt, np.int32), tokens.cpu().numpy().astype(np.int32)])
    return Completion(ids, lower, upper, len(prompt), finished)


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, neighbours in length together, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))
