"""Which models can be made parallel: what their configuration says, and what a small call of them shows.

A decoding call needs three things of a model: keys and values of every token, which can be forgotten again; a mask of
ours in place of its own; and positions of ours, for several rows of a call stand at the same one.
"""

from __future__ import annotations

import inspect
from typing import cast

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ptp.attention import layer_masks, open_layers
from ptp.cache import RollbackCache
from ptp.errors import ConfigError
from ptp.layer_kinds import ATTENTION, LayerKind, context_length, layer_kinds
from ptp.model.gated_lora import Gate, lora_layers
from ptp.model.head import layers_of, project
from ptp.model.loading import is_quantized, load_config

ALIBI = {"bloom", "mpt"}
"""Model types whose attention always adds ALiBi's biases."""

PROBED_B = 0.1
"""What is put into every `lora_B` while calls are checked, so that a gate that leaks is seen."""

LONG = 8200
"""Context of the long call: more than the windows and chunks of today's models, which have 8192 positions at most."""

TOLERANCE = 4.0
"""Logits may differ by so many roots of the dtype's machine epsilon, in units of their standard deviation."""


def check_architecture(name_or_config: str | PreTrainedConfig) -> None:
    """Raises `ConfigError`, with the reason, for a kind of model that cannot be made parallel."""
    config = load_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if reason := _refusal(config):
        raise ConfigError(f"{config.model_type} models are not supported: {reason}")
    layer_kinds(config)


def _refusal(config: PreTrainedConfig) -> str | None:
    text = config.get_text_config()
    if config.is_encoder_decoder or type(config).is_encoder_decoder:
        return "they are made for an encoder's output, and only decoders can be made parallel"
    if text.model_type in ALIBI or getattr(text, "alibi", False):
        return "their attention is biased by places in the cache (ALiBi), where positions of a call cannot be set"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # Some classes of hybrids can also be built of attention alone, which their layer types then say.
    layers = set(getattr(text, "layer_types", None) or ["unknown"])
    if getattr(model_class, "_is_stateful", False) and not layers <= ATTENTION.keys():
        return "their layers keep a running state, which cannot go back to the last accepted token as a cache can"
    return None


def check_calls(base_model: PreTrainedModel, gate: Gate | None = None) -> None:
    """Raises `ConfigError` unless calls with our cache, masks, positions and gate give the logits of plain calls.

    A configuration cannot say so of a model that nobody here knew, two small calls can: one of several texts with
    drafts and a window (`_short_call`), one behind a long context (`_long_call`). A model that did not honour what it
    is given would write another text without a word. gate: that of the model's gated layers, if it has any.
    """
    kinds, gate = open_layers(base_model), gate or Gate()
    base_model.eval()
    layers = lora_layers(base_model).values()
    try:
        with torch.no_grad():
            for layer in layers:
                layer.lora_B.fill_(PROBED_B)
            cache = RollbackCache(base_model.config.get_text_config().num_hidden_layers, 2)
            pairs = [_short_call(base_model, kinds, gate, cache)]
            if not all(layer.length for layer in cache.layers):
                raise ValueError("some layers keep no keys and values")
            pairs.append(_long_call(base_model, kinds, cache))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        taken = inspect.signature(layers_of(base_model).forward).parameters
        missing = [name for name in ("past_key_values", "position_ids", "attention_mask") if name not in taken]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{base_model.config.model_type} models are not supported: "
            + (f"their layers take no {missing[0]}" if missing else f"a call with drafts fails, {reason}")
        ) from error
    finally:
        with torch.no_grad():
            for layer in layers:
                layer.lora_B.zero_()
    # Quantised weights round as coarsely as bfloat16, whatever dtype they compute in.
    eps = torch.finfo(torch.bfloat16 if is_quantized(base_model) else base_model.dtype).eps
    for ours, plain in pairs:
        gap = float((ours.float() - plain.float()).abs().max() / plain.float().std())
        if not gap <= TOLERANCE * eps**0.5:
            raise ConfigError(
                f"{base_model.config.model_type} models are not supported: they do not keep to the attention mask and "
                f"positions of a call; logits are off by {gap:.1g} standard deviations"
            )


def _short_call(
    base_model: PreTrainedModel, kinds: tuple[LayerKind, ...], gate: Gate, cache: RollbackCache
) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, V) of the last three tokens of two texts: by a call as decoding makes it, and by plain calls.

    The texts are of five tokens and of four, before which stands padding:

        cached    call (positions of the first text)          who sees whom
        a b       c  x  y  d  e    window                     c: c, x: c x, y: c x y, d: c d, e: c d e
        - a       2  3  4  3  4    3 4, gate open             window: c and itself

    x and y are drafts that prove wrong; c, d and e are compared.
    """
    device, vocabulary = base_model.device, _vocabulary(base_model)
    texts = torch.arange(1, 11, device=device).view(2, 5) * max(1, vocabulary // 11) % vocabulary
    plain = [base_model(input_ids=texts[row : row + 1, row:], use_cache=False).logits[0, -3:] for row in range(2)]

    def call(ids: Tensor, positions: Tensor, mask: Tensor, key_positions: Tensor, gate_start: int | None) -> Tensor:
        with gate.opened(gate_start, ids.shape[1]):
            hidden = layers_of(base_model)(
                input_ids=ids,
                position_ids=positions,
                attention_mask=layer_masks(base_model, mask.unsqueeze(1), kinds, positions, key_positions),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return project(base_model, hidden)

    cached = torch.tensor([[0, 1], [0, 0]], device=device)
    first = torch.tensor([[[True, False], [True, True]], [[True, False], [False, True]]], device=device)
    call(texts[:, :2], cached, first, cached, None)

    sees = [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4], [0, 5], [0, 5, 6]]
    local = torch.tensor([[key in keys for key in range(len(sees))] for keys in sees], device=device)
    mask = torch.cat([first[:, 1:].expand(-1, len(sees), -1), local.expand(2, -1, -1)], dim=-1)
    ids = texts[:, [2, 2, 1, 3, 4, 1, 2]]
    positions = torch.tensor([2, 3, 4, 3, 4, 3, 4], device=device) - torch.arange(2, device=device).unsqueeze(1)
    logits = call(ids, positions, mask, torch.cat([cached, positions], dim=1), 5)
    return logits[:, [0, 3, 4]], torch.stack(plain)


def _long_call(
    base_model: PreTrainedModel, kinds: tuple[LayerKind, ...], known: RollbackCache
) -> tuple[Tensor, Tensor]:
    """Logits (V,) of a token behind a long context: with masks of ours, and with those that the model itself makes.

    So that a reach which its configuration does not tell, or tells otherwise, is seen. The context has never been
    read: keys are zero, which no query prefers, and values grow with the position, so that their mean tells which are
    seen. known: a cache that says their shapes.
    """
    longest = context_length(base_model.config)
    length = LONG if longest is None else min(LONG, longest - 1)
    position = torch.full((1, 1), length, device=base_model.device)
    # Not token 0, which is often padding, with an embedding of zeros.
    token = torch.full_like(position, _vocabulary(base_model) // 2)
    shared: dict[tuple[torch.Size, torch.Size], tuple[Tensor, Tensor]] = {}

    def call(own_mask: bool) -> Tensor:
        cache = RollbackCache(len(known.layers), length + 1)
        for layer, like in zip(cache.layers, known.layers, strict=True):
            shape = like.keys.shape, like.values.shape
            if shape not in shared:
                layer.lazy_initialization(like.keys[:1], like.values[:1])
                layer.keys.zero_()
                size = like.values.std() * torch.linspace(-1, 1, length + 1, device=like.values.device)
                layer.values.copy_(size.view(-1, 1).expand_as(layer.values))
                shared[shape] = layer.keys, layer.values
            layer.keys, layer.values = shared[shape]
            layer.dtype, layer.device, layer.is_initialized = like.dtype, like.device, True
            layer.length = length
        mask = torch.ones(1, 1, 1, length + 1, dtype=torch.bool, device=position.device) if own_mask else None
        return base_model(
            input_ids=token,
            position_ids=position,
            attention_mask=layer_masks(base_model, mask, kinds, position),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[0, -1]

    return call(own_mask=True), call(own_mask=False)


def _vocabulary(base_model: PreTrainedModel) -> int:
    return cast(nn.Embedding, base_model.get_input_embeddings()).num_embeddings
