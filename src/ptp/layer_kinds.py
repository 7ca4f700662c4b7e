"""How far back a model's layers see. Some kinds see the last tokens only, or their own chunk of the text.

A mask of ours says what a position may see in any layer; a layer's kind narrows it by the distance of positions. Our
caches keep every position in every layer, so that the mask alone is what a kind amounts to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from ptp.errors import ConfigError

GPT_NEO = "gpt_neo"
"""The model type that masks its local layers itself, by place in the cache; see `ptp.gpt_neo`."""


@dataclass(frozen=True)
class LayerKind:
    """name: as the model knows it. A layer sees the last `window` positions, its own included, or those of its `chunk`.

    None is no limit. With a window of 3, position 5 sees 3, 4 and 5; with chunks of 3, it sees 3, 4, 5 and position 6
    sees itself alone.
    """

    name: str
    window: int | None = None
    chunk: int | None = None

    @property
    def is_full(self) -> bool:
        return self.window is None and self.chunk is None

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query at one position may see a key at another that is not behind it; integer tensors, bool."""
        if self.window is not None:
            return query - key < self.window
        assert self.chunk is not None, f"{self.name} sees everything"
        return query // self.chunk == key // self.chunk


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions a model was made for; None if its config does not say.

    Long rotary embeddings (Phi 3 "128k") change their frequencies, for all positions of a call, once one lies beyond
    the original context. A text that got there in another call would be another text, so the original context counts.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return original if original and rope.get("rope_type") == "longrope" else longest


ATTENTION = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers by transformers' names, and the setting that says how far they see."""


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """The kinds of layers of a model: one for most. Raises `ConfigError` for one that is not known here.

    A window or chunk no shorter than the model's context limits nothing.
    """
    text, longest = config.get_text_config(), context_length(config)
    if text.model_type == GPT_NEO:
        return LayerKind("global"), LayerKind("local", window=text.window_size)
    names = set(getattr(text, "layer_types", None) or [_only_kind(text)])
    if unknown := sorted(map(str, names - ATTENTION.keys())):
        raise ConfigError(
            f"{config.model_type} has layers of kind {', '.join(unknown)}; supported are those that see the whole "
            "text, a sliding window or a chunk of it, and keep keys and values of every token"
        )

    def limit(name: str) -> int | None:
        size = getattr(text, ATTENTION[name] or "", None)
        return None if size is None or (longest is not None and size >= longest) else size

    found = tuple(
        LayerKind(name, chunk=limit(name)) if name == "chunked_attention" else LayerKind(name, window=limit(name))
        for name in sorted(names)
    )
    return found if not all(kind.is_full for kind in found) else (LayerKind("full_attention"),)


def _only_kind(text: PreTrainedConfig) -> str:
    """The kind of all layers of a model that does not list them, as transformers' own masks tell it."""
    if getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True):
        return "sliding_attention"
    return "full_attention" if getattr(text, "attention_chunk_size", None) is None else "chunked_attention"
