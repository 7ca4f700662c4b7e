"""PTPModel: a frozen causal language model, a gated LoRA and an embedding of u (METHOD §2).

Shapes: B rows, S context tokens, N windows of L positions, H hidden size, V vocabulary, T positions of a call.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ptp.config import PTPConfig
from ptp.model.auxiliary import make_auxiliary_embedding
from ptp.model.gated_lora import Gate, add_gated_lora
from ptp.model.masks import context_mask, window_mask
from ptp.sampling import SamplingRule


@dataclass(frozen=True)
class WindowLogits:
    """Result of a training pass. windows: (B, N·L, V); context: (B, S, V) of the base model, None if not asked for."""

    windows: Tensor
    context: Tensor | None


class PTPModel(nn.Module):
    """Wraps any causal LM; the base model's linear layers are replaced in place by gated ones.

    With the gate shut the model is the base model, bit for bit. Only the LoRA and the auxiliary embedding train.
    """

    def __init__(self, base_model: PreTrainedModel, config: PTPConfig | None = None) -> None:
        super().__init__()
        self.config = config or PTPConfig()
        self.base_model = base_model.requires_grad_(False)
        self.gate = Gate()
        add_gated_lora(
            base_model, self.config.lora_targets, self.config.lora_rank, self.config.lora_alpha, self.gate
        )
        tokens = self.token_embedding.weight
        self.auxiliary = make_auxiliary_embedding(
            self.config.auxiliary, self.config.auxiliary_size, tokens.shape[1], tokens.float().square().mean().sqrt()
        ).to(tokens.device)
        self.rule: SamplingRule | None = None
        self.survival: tuple[float, ...] = tuple(0.5**k for k in range(1, self.config.num_drafts + 1))

    @property
    def num_layers(self) -> int:
        return self.base_model.config.get_text_config().num_hidden_layers

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.base_model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    def embed_windows(self, u: Tensor, anchor: Tensor, first: Tensor) -> Tensor:
        """Inputs of window positions, (..., H).

        u: (...) float32; anchor: (...) int64, last context token of each position's window; first: (...) bool,
        whether it is its window's first position.
        """
        embedded = self.auxiliary(u).to(self.dtype)
        if self.config.anchor == "none":
            return embedded
        token = self.token_embedding(anchor)
        return embedded + (token if self.config.anchor == "all" else token * first.unsqueeze(-1))

    def call(
        self,
        inputs: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache,
        gate_start: int | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """One forward call on top of a cache, gate open from `gate_start` on.

        inputs: (B, T) token ids or (B, T, H) embeddings; positions: (B, T); mask: (B, 1, T, cached + T) bool.
        logits_to_keep: 0 for all, or as transformers means it. Returns logits (B, kept, V).
        """
        named = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
        with self.gate.opened(gate_start) if gate_start is not None else nullcontext():
            return self.base_model(
                **named,
                position_ids=positions,
                attention_mask=self._native_mask(mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits

    def forward(
        self,
        ids: Tensor,
        document: Tensor,
        positions: Tensor,
        starts: Tensor,
        u: Tensor,
        context_logits: bool = False,
    ) -> WindowLogits:
        """Context pass without gradient, then one gated pass over all windows (METHOD §3).

        ids, document, positions: (B, S), packed tokens, their document (−1 padding) and position in it.
        starts: (B, N), packed index of the first position each window replaces (its anchor stands before it).
        u: (B, N, L), the auxiliaries of positions start … start + L − 1.
        """
        cache = DynamicCache(config=self.base_model.config)
        with torch.no_grad():
            context = self.call(
                ids, positions, context_mask(document), cache, logits_to_keep=0 if context_logits else 1
            )
        window = u.shape[-1]
        offsets = torch.arange(window, device=starts.device)
        anchor = ids.gather(1, starts - 1).unsqueeze(-1).expand_as(u)
        inputs = self.embed_windows(u, anchor, (offsets == 0).expand_as(u)).flatten(1, 2)
        window_positions = (positions.gather(1, starts).unsqueeze(-1) + offsets + self.config.shift).flatten(1)
        windows = self.call(
            inputs, window_positions, window_mask(document, starts, window), cache, gate_start=0
        )
        return WindowLogits(windows, context if context_logits else None)

    def _native_mask(self, mask: Tensor | None) -> Tensor | None:
        """Boolean for SDPA; eager attention adds its mask to the scores."""
        if mask is None or self.base_model.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
