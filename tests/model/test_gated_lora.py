from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptp.config import PTPConfig
from ptp.errors import ConfigError
from ptp.model.gated_lora import Gate, GatedLoRA, add_gated_lora, lora_layers
from ptp.model.ptp_model import PTPModel

IDS = torch.tensor([[3, 17, 5, 0, 8, 22, 31, 4, 9], [6, 6, 2, 39, 1, 12, 13, 14, 15]])
CONFIG = PTPConfig(lora_rank=4, lora_alpha=6.0)


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tiny_llama: Callable, tiny_gpt2: Callable) -> PreTrainedModel:
    return tiny_llama() if request.param == "llama" else tiny_gpt2()


def merged(model: PTPModel) -> PreTrainedModel:
    """A plain model whose weights are W + scale · B·A."""
    plain = deepcopy(model.base_model)
    for name, layer in lora_layers(plain).items():
        update = layer.scale * layer.lora_B @ layer.lora_A
        weight = layer.base.weight
        with torch.no_grad():
            weight += update.T if isinstance(layer.base, Conv1D) else update
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.base)
    return plain


@torch.no_grad()
def test_with_the_gate_shut_the_model_is_the_base_model_bit_for_bit(
    base: PreTrainedModel, random_adapter: Callable
) -> None:
    before = deepcopy(base)
    random_adapter(PTPModel(base, CONFIG))
    assert torch.equal(base(input_ids=IDS).logits, before(input_ids=IDS).logits)


@torch.no_grad()
def test_a_new_adapter_changes_nothing_even_with_the_gate_open(base: PreTrainedModel) -> None:
    before = deepcopy(base)
    model = PTPModel(base, CONFIG)
    with model.gate.opened(0):
        assert torch.equal(base(input_ids=IDS).logits, before(input_ids=IDS).logits)


@torch.no_grad()
def test_a_fully_gated_call_is_plain_lora(base: PreTrainedModel, random_adapter: Callable) -> None:
    before = deepcopy(base)
    model = random_adapter(PTPModel(base, CONFIG), std=0.3)
    with model.gate.opened(0):
        gated = base(input_ids=IDS).logits
    assert not torch.allclose(gated, before(input_ids=IDS).logits, atol=0.1)
    torch.testing.assert_close(gated, merged(model)(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("start", [1, 4, 8])
def test_in_a_mixed_call_ungated_rows_are_the_base_and_gated_rows_are_lora_on_its_cache(
    base: PreTrainedModel, random_adapter: Callable, start: int
) -> None:
    before = deepcopy(base)
    model = random_adapter(PTPModel(base, CONFIG), std=0.3)
    with model.gate.opened(start):
        mixed = base(input_ids=IDS).logits
    cache = DynamicCache(config=base.config)
    context = before(input_ids=IDS[:, :start], past_key_values=cache).logits
    rest = merged(model)(input_ids=IDS[:, start:], past_key_values=cache).logits
    torch.testing.assert_close(mixed[:, :start], context, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[:, start:], rest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 10), lambda: nn.Linear(6, 10, bias=False), lambda: Conv1D(10, 6)]
)
@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_layer_adds_its_update_from_the_gate_on_and_leaves_the_input_alone(
    make: Callable[[], nn.Module], start: int
) -> None:
    torch.manual_seed(0)
    gate = Gate()
    layer = GatedLoRA(make(), rank=3, alpha=6.0, gate=gate)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 6)
    given = x.clone()
    plain = layer.base(x)
    with gate.opened(start):
        gated = layer(x)
    update = 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.equal(gated[:, :start], plain[:, :start])
    torch.testing.assert_close(gated[:, start:], (plain + update)[:, start:])
    assert torch.equal(x, given)


def test_the_gate_closes_again_even_after_an_error_and_nests() -> None:
    gate = Gate()
    with pytest.raises(RuntimeError), gate.opened(3):
        with gate.opened(5):
            assert gate.start == 5
        assert gate.start == 3
        raise RuntimeError
    assert gate.start is None


def test_a_bfloat16_base_keeps_its_dtype_and_its_lora_in_float32(tiny_llama: Callable) -> None:
    base = tiny_llama().bfloat16()
    model = PTPModel(base, CONFIG)
    with model.gate.opened(2):
        assert base(input_ids=IDS).logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_all_linear_means_every_linear_layer_but_the_output_head(base: PreTrainedModel) -> None:
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    add_gated_lora(base, "all-linear", 2, 2.0, Gate())
    assert set(lora_layers(base)) == linear - {"lm_head"}


def test_targets_are_the_last_parts_of_module_names(tiny_llama: Callable) -> None:
    base = tiny_llama(layers=1)
    add_gated_lora(base, ("q_proj", "down_proj"), 2, 2.0, Gate())
    assert set(lora_layers(base)) == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"}


def test_targets_that_match_nothing_are_an_error(tiny_llama: Callable) -> None:
    with pytest.raises(ConfigError) as error:
        add_gated_lora(tiny_llama(layers=1), ("c_attn",), 2, 2.0, Gate())
    assert str(error.value) == "lora_targets matches no linear layer of LlamaForCausalLM; got ('c_attn',)"


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_joined_layer_computes_the_same_with_the_base_weight_in_its_own_memory(rows: int, bias: bool) -> None:
    gate = Gate()
    layer = GatedLoRA(nn.Linear(8, 6, bias=bias), rank=2, alpha=4.0, gate=gate)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(rows, 7, 8)
    given, weight, shut = x.clone(), layer.base.weight.clone(), layer(x)
    with gate.opened(3):
        beside = layer(x)
        layer.join()
        joined = layer(x)
    torch.testing.assert_close(joined, beside, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined[:, :3], shut[:, :3], rtol=1e-6, atol=1e-6)
    assert torch.equal(x, given)
    # Nothing but lora_A takes memory anew, and with the gate shut the layer is its base, bit for bit.
    assert layer.joined.weight.data_ptr() == layer.base.weight.data_ptr()
    assert torch.equal(layer.base.weight, weight)
    assert torch.equal(layer(x), shut)


@torch.no_grad()
def test_a_layer_that_learnt_on_is_joined_anew() -> None:
    gate = Gate()
    layer = GatedLoRA(nn.Linear(8, 6), rank=2, alpha=4.0, gate=gate)
    x = torch.randn(1, 4, 8)
    layer.join()
    nn.init.normal_(layer.lora_B)
    layer.join()
    with gate.opened(2):
        expected = layer.base(x[:, 2:]) + 2.0 * x[:, 2:] @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(layer(x)[:, 2:], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_transposed_base_weight_stays_as_it_is() -> None:
    gate = Gate()
    layer = GatedLoRA(Conv1D(6, 8), rank=2, alpha=4.0, gate=gate)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 4, 8)
    with gate.opened(2):
        before = layer(x)
        layer.join()
        assert torch.equal(layer(x), before)
