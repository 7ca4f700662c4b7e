"""Base models of 8 and 4 bits: wrapped, trained, decoded with and kept as others are, their weights never cast."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trainings import random_batch, step_loss
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.errors import AdapterError, ConfigError
from ptp.model.gated_lora import lora_layers
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.model.student import StudentModel
from ptp.sampling import SamplingRule

RULE = SamplingRule(temperature=0.7, top_k=20)
PROMPT = [5, 3, 0, 4, 30, 21]
BITS = {
    # Without outliers set apart, which are found by looking at all positions of a call together.
    "8 bits": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture(scope="module", params=BITS)
def directory(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint whose config says that it is quantised."""
    plain, quantized = (tmp_path_factory.mktemp("models") / name for name in ("plain", "quantized"))
    tiny_llama(hidden=64).save_pretrained(plain)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=BITS[request.param]).save_pretrained(quantized)
    return quantized


def weights(model: PreTrainedModel | PTPModel) -> dict[str, torch.Tensor]:
    """Those of the quantised layers."""
    return {name: layer.base.weight.detach().clone() for name, layer in lora_layers(model).items()}


def adapted(base: PreTrainedModel) -> PTPModel:
    model = PTPModel(base, PTPConfig(window=4, lora_rank=4))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    torch.nn.init.normal_(model.chain.write.weight, std=0.1)
    return model


def test_the_text_is_the_quantised_model_s_own(directory: Path) -> None:
    request = make_request(load_base_model(str(directory)), PROMPT, 40, seed=0, end_token_ids=[])
    expected = decode_plainly(load_base_model(str(directory)), request, RULE)
    out = Decoder(adapted(load_base_model(str(directory))), RULE, budget=12).generate(PROMPT, 40, end_token_ids=[])
    assert out.token_ids == expected
    assert out.num_draft_tokens > 0


def test_a_training_step_lowers_the_loss_and_leaves_the_quantised_weights(directory: Path) -> None:
    model, batch = adapted(load_base_model(str(directory))).train(), random_batch()
    before = weights(model)
    assert not any(weight.is_floating_point() for weight in before.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = step_loss(model, batch)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    torch.optim.Adam(trained, lr=1e-3).step()
    assert step_loss(model, batch) < loss
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_saved_adapter_finds_its_quantised_model_again(directory: Path, tmp_path: Path, dtype: str) -> None:
    model = adapted(load_base_model(str(directory)))
    model.save_pretrained(tmp_path)
    loaded = PTPModel.from_pretrained(tmp_path, dtype=dtype)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weights(loaded)[name], weight, rtol=0, atol=0)
    assert loaded.token_embedding.weight.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    found = Decoder(loaded, RULE, budget=12).generate(PROMPT, 20).token_ids
    if dtype == "auto":
        assert found == Decoder(model, RULE, budget=12).generate(PROMPT, 20).token_ids


def test_an_adapter_of_a_quantised_model_is_not_one_of_the_model_in_full(
    directory: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    adapted(load_base_model(str(directory))).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was made for"):
        PTPModel.from_pretrained(tmp_path, base_model=tiny_llama(hidden=64))


def test_what_quantised_weights_cannot_do_is_one_clear_line(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"^weights of 8 or 4 bits cannot train; set model.trained to lora$"):
        StudentModel(load_base_model(str(directory)), PTPConfig(trained="all"), "teacher", "fingerprint")
