"""Adapters in stock PEFT: the same gate, the same window logits; and PEFT's adapters here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ptp import AdapterError, Decoder, PTPConfig, PTPModel
from ptp.data.documents import Documents
from ptp.data.packing import WindowStream, collate
from ptp.data.teacher import Prompt, sample_completions
from ptp.model.adapter import AUXILIARY_WEIGHTS, PEFT_CONFIG, SETTINGS, fill, write_weights
from ptp.model.masks import context_mask, window_mask
from ptp.sampling import SamplingRule

NUM_WINDOWS, WINDOW = 3, 4


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def make_base(request: pytest.FixtureRequest) -> Callable[..., PreTrainedModel]:
    """Makes a base model, of linear layers or of transposed ones."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["one_hot", "categorical"])
def model(request: pytest.FixtureRequest, make_base: Callable, random_adapter: Callable) -> PTPModel:
    config = PTPConfig(variant=request.param, window=WINDOW, lora_rank=2, lora_alpha=5.0, anchor="all")
    return random_adapter(PTPModel(make_base(), config)).eval()


def batch_of(base_model: PreTrainedModel) -> dict[str, Any]:
    """One packed sequence of two texts with windows; its fields, u as inputs among them."""
    prompts = [Prompt(np.array([3, 4, number], np.int32), [number]) for number in range(2)]
    completions = sample_completions(
        base_model, prompts, SamplingRule(), seed=0, max_length=12, max_new_tokens=None, end_token_ids=[], batch_size=2
    )
    stream = WindowStream(
        Documents.of(completions), sequence_length=24, num_windows=NUM_WINDOWS, window=WINDOW, beta=1.0, seed=0
    )
    return collate([stream[0]])


def as_one_call(model: PTPModel, batch: dict[str, Any], u: Tensor) -> dict[str, Tensor]:
    """Context and windows as one call of any model: embeddings, positions and a mask (1, 1, T, T) of what each sees."""
    ids, starts, document, positions = (batch[name] for name in ("ids", "starts", "document", "positions"))
    offsets = torch.arange(WINDOW)
    anchor = ids.gather(1, starts - 1).unsqueeze(-1).expand(-1, -1, WINDOW)
    windows = model.add_anchor(model.embed_u(u), anchor, (offsets == 0).expand_as(anchor)).flatten(1, 2)
    reached = positions.gather(1, starts).unsqueeze(-1) + offsets + model.ptp_config.shift
    context = context_mask(document).dense()
    seen = torch.cat(
        [
            torch.nn.functional.pad(context, (0, NUM_WINDOWS * WINDOW)),
            window_mask(document, starts, WINDOW).dense(),
        ],
        dim=2,
    )
    return {
        "inputs_embeds": torch.cat([model.token_embedding(ids), windows], dim=1),
        "position_ids": torch.cat([positions, reached.flatten(1)], dim=1),
        "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
    }


@torch.no_grad()
def test_peft_gives_the_same_window_logits(model: PTPModel, make_base: Callable, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    peft_model = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    batch = batch_of(make_base())
    passed = model(**batch)
    ours = model.logits(torch.cat([passed.context, passed.windows], dim=1))
    call = as_one_call(model, batch, passed.u[..., :WINDOW])
    theirs = peft_model(**call, alora_offsets=[NUM_WINDOWS * WINDOW]).logits
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=1e-4)
    shut = peft_model(**call).logits[:, -NUM_WINDOWS * WINDOW :]
    assert not torch.allclose(shut, ours[:, -NUM_WINDOWS * WINDOW :], atol=0.1)


@torch.no_grad()
def test_in_peft_a_plain_call_is_the_base_model_bit_for_bit(
    model: PTPModel, make_base: Callable, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    base, peft_model = make_base(), PeftModel.from_pretrained(make_base(), tmp_path).eval()
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(peft_model(input_ids=ids).logits, base(ids).logits)
    assert torch.equal(peft_model.generate(input_ids=ids, max_new_tokens=9), base.generate(ids, max_new_tokens=9))


def trained_in_peft(base_model: PreTrainedModel, directory: Path, **changes: Any) -> Any:
    """An adapter of PEFT's own making."""
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(base_model, LoraConfig(**{**settings, "alora_invocation_tokens": [-1], **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=generator)
    peft_model.save_pretrained(directory)
    return peft_model.eval()


@torch.no_grad()
def test_an_adapter_that_peft_has_trained_loads_here(make_base: Callable, tmp_path: Path) -> None:
    peft_model = trained_in_peft(make_base(), tmp_path)
    with pytest.raises(AdapterError, match=r"an adapter of PEFT without ptp_config\.json") as refused:
        PTPModel.from_pretrained(tmp_path, make_base())
    assert "\n" not in str(refused.value)

    # As that line says.
    model = PTPModel(make_base(), PTPConfig(lora_rank=2, lora_alpha=6, window=WINDOW))
    write_weights(tmp_path / AUXILIARY_WEIGHTS, model.added_weights())
    model.load_adapter(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = PTPModel.from_pretrained(tmp_path, make_base())

    batch = batch_of(make_base())
    passed = loaded(**batch)
    theirs = peft_model(**as_one_call(loaded, batch, passed.u[..., :WINDOW]), alora_offsets=[NUM_WINDOWS * WINDOW])
    ours = loaded.logits(passed.windows)
    torch.testing.assert_close(theirs.logits[:, -NUM_WINDOWS * WINDOW :], ours, atol=2e-4, rtol=1e-4)
    assert len(Decoder(loaded, budget=8).generate([3, 4], 9, end_token_ids=[]).token_ids) == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 7}, "lora_alpha=7"),
        ({"r": 4}, "has shape"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"alpha_pattern": {"down_proj": 3}}, "alpha_pattern"),
    ],
)
def test_an_adapter_whose_update_means_something_else_is_refused(
    tiny_llama: Callable, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    trained_in_peft(tiny_llama(), tmp_path, **changes)
    model = PTPModel(tiny_llama(), PTPConfig(lora_rank=2, lora_alpha=6, window=WINDOW))
    with pytest.raises(AdapterError, match=words) as refused:
        model.load_adapter(tmp_path)
    assert "\n" not in str(refused.value)


def test_our_json_beside_peft_s_adapter_is_enough(tiny_llama: Callable, tmp_path: Path) -> None:
    model = PTPModel(tiny_llama(), PTPConfig(lora_rank=2, lora_alpha=6, window=WINDOW))
    model.save_pretrained(tmp_path / "ours")
    trained_in_peft(tiny_llama(), tmp_path / "theirs")
    for name in (SETTINGS, AUXILIARY_WEIGHTS):
        (tmp_path / "theirs" / name).write_bytes((tmp_path / "ours" / name).read_bytes())
    loaded = PTPModel.from_pretrained(tmp_path / "theirs", tiny_llama())
    fill(tmp_path / "ours" / AUXILIARY_WEIGHTS, loaded.added_weights())
    layer = loaded.base_model.get_submodule("model.layers.0.mlp.down_proj")
    assert float(layer.lora_B.detach().abs().max()) > 0.1
    assert layer.scale == 3


def test_the_gate_is_peft_s_own(tiny_llama: Callable, tmp_path: Path) -> None:
    PTPModel(tiny_llama(), PTPConfig(lora_rank=2)).save_pretrained(tmp_path)
    (token,) = json.loads((tmp_path / PEFT_CONFIG).read_text())["alora_invocation_tokens"]
    assert token < 0, "a token that a text can have would open the gate"
