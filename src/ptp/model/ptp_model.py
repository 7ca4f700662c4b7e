"""PTPModel: a frozen causal language model, a gated LoRA and an embedding of u (METHOD §2).

Shapes: B rows, S context tokens, N windows of L positions, H hidden size, V vocabulary, T positions of a call.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ptp.attention import native_mask
from ptp.config import PTPConfig
from ptp.errors import AdapterError, ConfigError
from ptp.model.adapter import (
    AdapterSettings,
    find_adapter,
    fingerprint,
    load_weights,
    read_settings,
    resolve_base_model,
    save_adapter,
)
from ptp.model.auxiliary import make_auxiliary_embedding
from ptp.model.gated_lora import Gate, add_gated_lora
from ptp.model.loading import cast_parameters, load_base_model, to_dtype
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
        self.ptp_config = config or PTPConfig()
        _check_attention(base_model)
        self.base_model = base_model.requires_grad_(False)
        self.gate = Gate()
        add_gated_lora(
            base_model, self.ptp_config.lora_targets, self.ptp_config.lora_rank, self.ptp_config.lora_alpha, self.gate
        )
        tokens = self.token_embedding.weight
        self.auxiliary = make_auxiliary_embedding(
            self.ptp_config.auxiliary,
            self.ptp_config.auxiliary_size,
            tokens.shape[1],
            float(tokens.float().square().mean().sqrt()),
        ).to(tokens.device)
        self.rule: SamplingRule | None = None
        self.survival: tuple[float, ...] = tuple(0.5**k for k in range(1, self.ptp_config.num_drafts + 1))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, base_model: PreTrainedModel | None = None, dtype: str | torch.dtype = "auto"
    ) -> PTPModel:
        """Load an adapter or experiment directory, with the base model it names unless one is given.

        The adapter takes the base model's dtype. Raises `AdapterError` if the directory holds no valid adapter or it
        was made for another base model.
        """
        adapter = find_adapter(directory)
        settings = read_settings(adapter)
        given = base_model is not None
        if base_model is None:
            # The fingerprint is that of the checkpoint's own dtype; float16 would round some values otherwise.
            base_model = load_base_model(resolve_base_model(adapter, settings.base_model))
        found = fingerprint(base_model)
        if found != settings.base_fingerprint:
            raise AdapterError(
                f"the adapter in {adapter} was made for {settings.base_model} ({settings.base_fingerprint[:12]}); "
                f"got {base_model.config.name_or_path or 'another model'} ({found[:12]})"
            )
        model = cls(base_model if given else to_dtype(base_model, dtype), settings.config)
        model.load_adapter(adapter)
        model.rule, model.survival = settings.rule, settings.survival
        cast_parameters(model, model.dtype)
        return model.eval()

    def load_adapter(self, adapter: Path) -> None:
        """Fill LoRA and auxiliary embedding from an adapter directory; every key and shape must match."""
        load_weights(adapter, self.base_model, self.auxiliary)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write an adapter directory (see `ptp.model.adapter`)."""
        directory = Path(directory)
        name = self.base_model.config.name_or_path or ""
        settings = AdapterSettings(
            # A local base model is found again when both directories move together.
            base_model=os.path.relpath(name, directory) if name and Path(name).is_dir() else name,
            base_fingerprint=fingerprint(self.base_model),
            config=self.ptp_config,
            rule=self.rule,
            survival=self.survival,
        )
        save_adapter(directory, self.base_model, self.auxiliary, settings)

    @property
    def num_layers(self) -> int:
        return self.base_model.config.get_text_config().num_hidden_layers

    @property
    def token_embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.base_model.get_input_embeddings())

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    def embed_u(self, u: Tensor) -> Tensor:
        """Auxiliary embeddings of u (...), (..., H) in the base model's dtype."""
        return self.auxiliary(u).to(self.dtype)

    def add_anchor(self, embedded: Tensor, anchor: Tensor, first: Tensor) -> Tensor:
        """Inputs of window positions, (..., H).

        embedded: (..., H), the embedded u of each position. anchor: (...) int64, last context token of the
        position's window. first: (...) bool, whether the position is its window's first.
        """
        if self.ptp_config.anchor == "none":
            return embedded
        token = self.token_embedding(anchor)
        return embedded + (token if self.ptp_config.anchor == "all" else token * first.unsqueeze(-1))

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
                attention_mask=native_mask(self.base_model, mask),
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
        inputs = self.add_anchor(self.embed_u(u), anchor, (offsets == 0).expand_as(u)).flatten(1, 2)
        window_positions = (positions.gather(1, starts).unsqueeze(-1) + offsets + self.ptp_config.shift).flatten(1)
        if (longest := context_length(self.base_model)) is not None:
            # A window may run past the end of a document as long as the context; nothing there is trained.
            window_positions = window_positions.clamp(max=longest - 1)
        windows = self.call(inputs, window_positions, window_mask(document, starts, window), cache, gate_start=0)
        return WindowLogits(windows, context if context_logits else None)


def end_token_ids(base_model: PreTrainedModel) -> list[int]:
    """The end tokens of the model's generation config; many chat models have several."""
    eos = base_model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def context_length(base_model: PreTrainedModel) -> int | None:
    """Positions the model was made for; None if its config does not say."""
    return getattr(base_model.config.get_text_config(), "max_position_embeddings", None)


def _check_attention(base_model: PreTrainedModel) -> None:
    """Raises `ConfigError` for a model whose layers do not all attend to the whole context."""
    config = base_model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window, context = getattr(config, "sliding_window", None), context_length(base_model)
    slides = window is not None and getattr(config, "use_sliding_window", True) and (context or window + 1) > window
    if kinds or (slides and getattr(config, "layer_types", None) is None):
        kind = ", ".join(sorted(kinds)) or f"a sliding window of {window}"
        raise ConfigError(
            f"{type(base_model).__name__} has layers with {kind}; only layers that attend to the whole context are "
            "supported so far, because a decoding call sets its own attention mask"
        )
