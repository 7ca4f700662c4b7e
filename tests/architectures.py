"""Tiny random models of every architecture: of the families we promise, and of whatever transformers has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

WINDOW = 6
"""Positions that a sliding layer sees."""

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A family of models that is tested in every way. settings: of its tiny model, beside `SIZES`."""

    name: str
    model_type: str
    particular: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        return CONFIG_MAPPING[self.model_type](**{**SIZES, **self.settings})

    def make(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = self.config()
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config).eval()


GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES = [
    Family("Llama", "llama"),
    Family("Mistral", "mistral", "sliding window in every layer", {"sliding_window": WINDOW}),
    Family("Qwen 2", "qwen2", "sliding window in some layers", {"use_sliding_window": True, **ALTERNATING}),
    Family("Qwen 3", "qwen3", "sliding window in some layers", {"use_sliding_window": True, **ALTERNATING}),
    Family(
        "Gemma 2",
        "gemma2",
        "alternating sliding windows, soft caps",
        {"head_dim": 8, "tie_word_embeddings": False, **ALTERNATING},
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        "alternating sliding windows, two rotary bases",
        {"head_dim": 8, "tie_word_embeddings": False, **ALTERNATING},
    ),
    Family("GPT-2", "gpt2", "Conv1D layers, learned positions", GPT),
    Family(
        "GPT-Neo",
        "gpt_neo",
        "local attention, learned positions",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    Family("GPT-NeoX", "gpt_neox", "parallel blocks, fused qkv"),
    Family("Phi 3", "phi3", "fused qkv, sliding window in every layer", {"sliding_window": WINDOW}),
    Family("OLMo 2", "olmo2", "normalised queries and keys"),
    Family("Falcon", "falcon", "parallel blocks, fused qkv, one head of keys and values"),
    Family("StableLM", "stablelm", "rotary embedding of a part of each head"),
    Family("Granite", "granite", "scaled residuals and logits"),
    Family(
        "SmolLM 3",
        "smollm3",
        "some layers without positions, sliding windows",
        {"use_sliding_window": True, "no_rope_layer_interval": 2, **ALTERNATING},
    ),
    Family("Mixtral", "mixtral", "experts, which stay as they are", {"num_local_experts": 4}),
    Family(
        "Qwen 3 MoE",
        "qwen3_moe",
        "experts, which stay as they are",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    Family(
        "Llama 4",
        "llama4_text",
        "attention in chunks, experts",
        {
            "head_dim": 8,
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    Family(
        "OPT",
        "opt",
        "learned positions, all texts of a batch in one row",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    ),
    Family(
        "gpt-oss",
        "gpt_oss",
        "attention sinks, alternating sliding windows, experts",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    ),
    Family(
        "DeepSeek V3",
        "deepseek_v3",
        "latent keys and values, whose expansion stays as it is; experts",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
]
