"""A model that cannot be made parallel is refused, with the reason, by its configuration or by what its calls show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
)

from ptp.errors import ConfigError
from ptp.layer_kinds import LayerKind
from ptp.model.architectures import check_architecture, check_calls
from ptp.model.gated_lora import Gate, GatedLoRA
from ptp.model.ptp_model import PTPModel

STATE, ALIBI = "layers keep a running state", "biased by places in the cache"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "made for an encoder's output"),
        (BloomConfig(), ALIBI),
        (MptConfig(), ALIBI),
        (FalconConfig(alibi=True), ALIBI),
        *((kind(), STATE) for kind in (MambaConfig, RwkvConfig, RecurrentGemmaConfig, JambaConfig, Qwen3NextConfig)),
        (Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2), "has layers of kind conv"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_a_kind_that_cannot_be_made_parallel_is_refused_by_its_configuration(
    config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        check_architecture(config)
    assert str(refusal.value).startswith(config.model_type)
    assert "\n" not in str(refusal.value)


def test_a_falcon_without_alibi_is_not_refused() -> None:
    check_architecture(FalconConfig())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (OpenAIGPTConfig(vocab_size=40, n_embd=32, n_layer=1, n_head=2), "their layers take no past_key_values"),
        (
            BertConfig(
                vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3
            ),
            "they do not keep to the attention mask and positions of a call",
        ),
    ],
    ids=["openai-gpt", "bert"],
)
def test_a_model_whose_calls_are_not_those_of_a_decoder_is_refused(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        PTPModel(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(refusal.value)


def without(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model, which pays no heed to an argument."""
    forward = base.model.forward

    def heedless(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, name: None})

    base.model.forward = heedless
    return base


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "past_key_values"])
def test_a_model_that_pays_no_heed_to_mask_positions_or_cache_is_refused(tiny_llama: Callable, name: str) -> None:
    check_calls(tiny_llama())
    with pytest.raises(ConfigError, match=r"^llama models are not supported"):
        check_calls(without(tiny_llama(), name))


def mistral(window: int | None) -> MistralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(vocab_size=40, num_hidden_layers=2, initializer_range=0.3, sliding_window=window, **sizes)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [100, 4096, 8000])
def test_layers_that_see_less_or_more_than_we_were_told_are_refused(
    monkeypatch: pytest.MonkeyPatch, window: int, dtype: torch.dtype
) -> None:
    models = {size: mistral(size).to(dtype) for size in (window, None)}
    for model in models.values():
        check_calls(model)
    for told, size in ((LayerKind("full_attention"), window), (LayerKind("sliding_attention", window=window), None)):
        monkeypatch.setattr("ptp.attention.layer_kinds", lambda config, told=told: (told,))
        with pytest.raises(ConfigError, match=r"^mistral models are not supported: they do not keep to the attention"):
            check_calls(models[size])


def test_a_gate_that_lets_the_adapter_act_on_other_positions_is_refused(
    tiny_llama: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(self: GatedLoRA, x: Tensor) -> Tensor:
        update = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)
        return self.base(x) + update * (self.gate.start is not None)

    monkeypatch.setattr(GatedLoRA, "forward", everywhere)
    with pytest.raises(ConfigError, match=r"^llama models are not supported"):
        PTPModel(tiny_llama())


def test_checking_leaves_a_model_as_it_was(tiny_llama: Callable) -> None:
    base, state = tiny_llama(), torch.get_rng_state()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    check_calls(base, Gate())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    model = PTPModel(base)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
