"""Write docs/architectures.md: which models can be made parallel, as tiny random ones of every type show.

`python docs/make_architectures.py` takes some minutes. Families are those of tests/architectures.py, every one of
which the tests put through decoding, training, sampling and saving; the other types of the installed transformers are
surveyed here: wrapped, and decoded with against plain decoding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.errors import PTPError
from ptp.model.architectures import check_architecture
from ptp.model.gated_lora import lora_layers
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
sys.path.insert(0, str(ROOT / "tests"))

from architectures import FAMILIES, SIZES, WINDOW  # noqa: E402 # beside this page's folder, not on the path

WORKS, UNTRIED = "works", "not tried"
MOST_PARAMETERS = 10_000_000
UNENDING = {"blt"}
"""Types whose tiny model is not tiny, or not fast."""

PROMPT = list(range(3, 3 + 3 * WINDOW))
GUESSES: dict[str, Any] = {
    **SIZES,
    **{name: 4 for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_heads")},
    **{name: 2 for name in ("num_experts_per_tok", "moe_topk", "moe_k", "num_kv_heads", "num_layers")},
    **{
        name: 1 for name in ("n_group", "topk_group", "first_k_dense_replace", "num_shared_experts", "n_shared_experts")
    },
    **{
        name: 16 for name in ("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "shared_expert_intermediate_size")
    },
    **{name: 8 for name in ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim")},
    **{name: 32 for name in ("n_embd", "d_model", "word_embed_proj_dim")},
    **{name: 48 for name in ("ffn_dim", "n_inner", "ffn_hidden_size")},
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "init_std": 0.3,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW + 2,
    "use_sliding_window": True,
}
"""What makes a model small, under the names that configurations use."""


def survey() -> Iterator[tuple[str, str]]:
    """(model type, `WORKS`, a reason why not, or `UNTRIED`) for every causal language model of transformers."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield model_type, outcome(model_type)


def outcome(model_type: str) -> str:
    """What happens to a tiny random model of a type. Raises `AssertionError` if its text comes out wrong."""
    try:
        config = guessed_config(model_type)
        # Some types are refused for what their usual configuration says, which a tiny one may not.
        check_architecture(CONFIG_MAPPING[model_type]())
        base = tiny(config)
    except PTPError as refusal:
        return str(refusal)
    except Exception:  # whatever a configuration that we guessed stumbles over
        return UNTRIED
    if base is None:
        return UNTRIED
    try:
        model = PTPModel(deepcopy(base), PTPConfig(window=4, lora_rank=2))
    except PTPError as refusal:
        return str(refusal)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    rule = SamplingRule(temperature=0.7, top_k=30)
    expected = decode_plainly(base, make_request(base, PROMPT, 20, seed=0, end_token_ids=[]), rule)
    found = Decoder(model, rule, budget=12).generate(PROMPT, 20, end_token_ids=[]).token_ids
    assert found == expected, f"{model_type} writes another text, and was not refused"
    return WORKS


def guessed_config(model_type: str) -> PreTrainedConfig:
    """A small configuration with two layers, of two kinds where the usual one has several."""
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    if usual.get_text_config() is not usual:
        raise ValueError(f"{model_type} is more than a text model")
    fixed = {name for name in GUESSES if isinstance(getattr(kind, name, None), property)}
    settings = {name: size for name, size in GUESSES.items() if hasattr(usual, name) and name not in fixed}
    if hasattr(usual, "kv_lora_rank"):
        settings |= {"num_key_value_heads": settings["num_attention_heads"], "head_dim": settings["qk_rope_head_dim"]}
    kinds = list(dict.fromkeys(getattr(usual, "layer_types", None) or []))
    if kinds:
        settings["layer_types"] = [kinds[layer % len(kinds)] for layer in range(2)]
    return kind(**settings)


def tiny(config: PreTrainedConfig) -> PreTrainedModel | None:
    """A random model, or none if it is not tiny."""
    if config.model_type in UNENDING:
        return None
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        return None
    torch.manual_seed(0)
    return model_class._from_config(config).eval()


def families() -> str:
    """The table of the families that are tested in every way."""
    rows = [f"| {family.name} | `{family.model_type}` | {family.particular} |" for family in FAMILIES]
    return "\n".join(["| family | model type | what is particular |", "|---|---|---|", *rows])


def page(results: dict[str, str]) -> str:
    """The whole page. results: those of `survey`."""
    tested = {family.model_type for family in FAMILIES}
    found: dict[str, list[str]] = {}
    for model_type, result in results.items():
        if model_type not in tested:
            # The figure of a refusal that was measured is that of one random model.
            reason = result if result in (WORKS, UNTRIED) else result.partition(" ")[2].partition("; logits are off")[0]
            found.setdefault(reason, []).append(f"`{model_type}`")
    works, untried = (", ".join(found.pop(result)) for result in (WORKS, UNTRIED))
    refused = "\n".join(f"| {', '.join(names)} | {reason} |" for reason, names in sorted(found.items()))
    return TEMPLATE.format(
        families=families(), version=transformers.__version__, works=works, refused=refused, untried=untried
    )


TEMPLATE = """\
# Architectures

Written by `docs/make_architectures.py`. A decoding call needs three things of a model: keys and values of every token,
an attention mask that can be set, and positions that can be set. Sliding windows and chunks are part of the mask, by
position (`ptp.layer_kinds`); caches keep every token. Whoever wraps a model (`ptp.model.ptp_model.PTPModel`) has it
checked: by its configuration, and by two small calls whose logits must be those of plain calls
(`ptp.model.architectures`). So a model that is not listed here works or is refused, with the reason.

## Tested in every way

Tiny random models decode losslessly, train what decoding uses, are sampled from side by side, saved and loaded
(`tests/test_architectures.py`).

{families}

Blocks of experts keep their own weights, routers included, because they take the positions of a call in another order.
Long rotary embeddings (Phi 3 "128k") are served up to the
model's original context, behind which their frequencies change for all tokens of a call.

## Base models of 8 and 4 bits

With `bitsandbytes` installed, a model that was saved quantised is a MODEL like any other, on a GPU or a CPU:

```python
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
AutoModelForCausalLM.from_pretrained("MODEL", quantization_config=bits).save_pretrained("MODEL-4bit")
```

The adapter is trained for, and belongs to, the quantised model, and the text is the quantised model's own. At 8 bits
this takes `llm_int8_threshold=0.0`: outliers, which are computed apart otherwise, are looked for in all positions of a
call together, so that a position's logits would depend on the others.

## All types of transformers {version}

A tiny random model of each type is wrapped, and its text compared with plain decoding.

**Work too:** {works}.

**Refused:**

| model types | reason |
|---|---|
{refused}

**Not tried**, because no small model could be made of the configuration alone, or because they are more than a
language model: {untried}.
"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(dict(survey())), encoding="utf-8")
