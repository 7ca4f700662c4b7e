import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptp.config import PTPConfig
from ptp.demo import make_tokenizer
from ptp.errors import ConfigError
from ptp.model.loading import DTYPES, load_base_model, load_config, load_context_length, load_end_tokens, load_tokenizer
from ptp.model.ptp_model import PTPModel, end_token_ids


@pytest.fixture(scope="module")
def directory(tiny_llama: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model in base/ and an adapter for it in adapter/."""
    directory = tmp_path_factory.mktemp("loading")
    tiny_llama().save_pretrained(directory / "base")
    model = PTPModel(load_base_model(str(directory / "base")), PTPConfig(window=4, lora_rank=2))
    model.save_pretrained(directory / "adapter")
    return directory


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(40, (1, 100), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_model_computes_what_transformers_computes_in_every_dtype(directory: Path, dtype: str) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(directory / "base", dtype=DTYPES[dtype]))
    assert torch.equal(logits(load_base_model(str(directory / "base"), dtype)), expected)
    assert torch.equal(logits(PTPModel.from_pretrained(directory / "adapter", dtype=dtype).base_model), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_model_that_is_given_is_not_changed(directory: Path, dtype: str) -> None:
    given = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=DTYPES[dtype])
    expected = logits(given)
    assert torch.equal(logits(PTPModel.from_pretrained(directory / "adapter", given).base_model), expected)


def test_auto_is_the_checkpoint_s_own_dtype(directory: Path, tmp_path: Path) -> None:
    assert load_base_model(str(directory / "base")).dtype == torch.float32
    load_base_model(str(directory / "base"), "bfloat16").save_pretrained(tmp_path)
    assert load_base_model(str(tmp_path)).dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_an_error_of_one_line(directory: Path, tmp_path: Path) -> None:
    for load, name in [(load_base_model, tmp_path), (load_tokenizer, tmp_path), (load_base_model, tmp_path / "none")]:
        with pytest.raises(ConfigError, match="cannot load the") as caught:
            load(str(name))
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"nor is there a directory some/model here"):
        load_base_model("some/model")
    with pytest.raises(ConfigError, match=r"dtype must be auto, float32, bfloat16, float16; got 'int8'"):
        load_base_model(str(directory / "base"), "int8")


def changed(directory: Path, copy: Path, name: str, **values: object) -> str:
    """A copy of the base model with other values in a JSON file, or without those that are None."""
    shutil.copytree(directory / "base", copy)
    content = json.loads((copy / name).read_text()) | values
    (copy / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(copy)


def test_the_end_tokens_are_those_that_the_loaded_model_has(directory: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["a"], 259)
    several = changed(directory, tmp_path / "several", "generation_config.json", eos_token_id=[3, 1])
    single = changed(directory, tmp_path / "single", "generation_config.json", eos_token_id=3)
    bare = changed(directory, tmp_path / "bare", "config.json", eos_token_id=5)
    (tmp_path / "bare" / "generation_config.json").unlink()
    for name, expected in [(several, [3, 1]), (single, [3]), (bare, [5])]:
        assert load_end_tokens(name, tokenizer) == expected
        assert end_token_ids(load_base_model(name)) == expected


def test_a_model_that_names_no_end_token_ends_with_its_tokenizer_s(directory: Path, tmp_path: Path) -> None:
    name = changed(directory, tmp_path / "silent", "generation_config.json", eos_token_id=None)
    tokenizer = make_tokenizer(["a"], 259)
    assert load_end_tokens(name, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert load_end_tokens(name, tokenizer) == []


def test_a_context_s_length_is_read_without_the_weights(directory: Path, tmp_path: Path) -> None:
    name = changed(directory, tmp_path / "copy", "config.json", max_position_embeddings=77)
    (tmp_path / "copy" / "model.safetensors").unlink()
    assert load_context_length(name) == 77
    with pytest.raises(ConfigError, match="cannot load the base model"):
        load_config(str(tmp_path))
