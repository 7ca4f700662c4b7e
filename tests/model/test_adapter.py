import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from ptp.calibration import Calibration
from ptp.config import PTPConfig
from ptp.data.documents import Documents
from ptp.data.packing import WindowStream, collate
from ptp.data.teacher import Prompt, sample_completions
from ptp.decoding.decoder import Decoder
from ptp.errors import AdapterError
from ptp.model.adapter import AUXILIARY_WEIGHTS, LORA_WEIGHTS, SETTINGS, fingerprint
from ptp.model.auxiliary import EMBEDDINGS
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

RULE = SamplingRule(temperature=0.7, top_k=20, top_p=0.95, order="probability")
SURVIVAL = (0.9, 0.123456789, 1 / 3)
CALIBRATION = Calibration(curves=((0.1, 1 / 3), (0.123456789, 0.9)))


@pytest.fixture(scope="module")
def base_directory(tiny_llama: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter") / "base"
    tiny_llama().save_pretrained(directory)
    return directory


def new_model(base: Path, random_adapter: Callable, **changes: object) -> PTPModel:
    """A model whose adapter is not what any initialisation gives."""
    config = PTPConfig(**{"window": 4, "lora_rank": 2, **changes})
    model = random_adapter(PTPModel(load_base_model(str(base)), config))
    for number, parameter in enumerate(model.auxiliary.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    model.rule, model.survival, model.calibration = RULE, SURVIVAL, CALIBRATION
    return model.eval()


@pytest.fixture
def model(base_directory: Path, random_adapter: Callable) -> PTPModel:
    return new_model(base_directory, random_adapter)


@pytest.fixture
def saved(model: PTPModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def window_logits(model: PTPModel, tiny_llama: Callable) -> Tensor:
    prompts = [Prompt(np.array([3, 4], np.int32), [0])]
    completions = sample_completions(
        tiny_llama(),
        prompts,
        SamplingRule(),
        seed=0,
        max_length=22,
        max_new_tokens=None,
        end_token_ids=[],
        batch_size=1,
    )
    stream = WindowStream(Documents.of(completions), sequence_length=24, num_windows=5, window=4, beta=1.0, seed=0)
    return model.logits(model(**collate([stream[0]])).windows)


def one_line_error(directory: Path, base_model: LlamaForCausalLM | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        PTPModel.from_pretrained(directory, base_model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_settings(directory: Path, **changes: object) -> None:
    settings = json.loads((directory / SETTINGS).read_text())
    (directory / SETTINGS).write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("auxiliary", EMBEDDINGS)
@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_a_loaded_adapter_is_the_saved_one(
    base_directory: Path, random_adapter: Callable, tiny_llama: Callable, tmp_path: Path, variant: str, auxiliary: str
) -> None:
    model = new_model(base_directory, random_adapter, variant=variant, auxiliary=auxiliary, auxiliary_size=4)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PTPModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(window_logits(loaded, tiny_llama), window_logits(model, tiny_llama))
    # What stands behind the windows' states, too.
    states, before = torch.randn(5, 32), torch.randint(40, (5, model.ptp_config.chain))
    corrected = model.chained(states, before)
    assert torch.equal(loaded.chained(states, before), corrected)
    assert (model.blur is None) == (variant == "one_hot")
    assert (model.continuation is None) == (variant == "one_hot")
    if model.continuation is not None and loaded.continuation is not None:
        assert torch.equal(loaded.continuation(states), model.continuation(states))
    assert loaded.continued == model.continued
    if model.blur is not None and loaded.blur is not None:
        assert torch.equal(loaded.blur(corrected), model.blur(corrected))
    assert (loaded.ptp_config, loaded.rule, loaded.survival) == (model.ptp_config, RULE, SURVIVAL)
    assert loaded.calibration == CALIBRATION


def test_an_adapter_of_before_calibration_loads_with_confidences_as_they_are(saved: Path) -> None:
    settings = json.loads((saved / SETTINGS).read_text())
    del settings["calibration"]
    (saved / SETTINGS).write_text(json.dumps(settings))
    confidences = torch.tensor([0.0, 0.3, 0.999, 1.0])
    assert torch.equal(PTPModel.from_pretrained(saved).calibration(confidences), confidences)


@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
@pytest.mark.parametrize(
    ("version", "unsaid", "off"),
    [
        (1, ("pick", "chain", "chain_size", "continuation"), {"pick": "exact", "chain": 0, "continuation": False}),
        (2, ("continuation",), {"continuation": False}),
    ],
)
def test_an_adapter_of_an_earlier_format_loads_and_drafts_as_it_did(
    base_directory: Path,
    random_adapter: Callable,
    tmp_path: Path,
    variant: str,
    version: int,
    unsaid: tuple[str, ...],
    off: dict[str, object],
) -> None:
    model = new_model(base_directory, random_adapter, variant=variant, **off)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / SETTINGS).read_text())
    for name in unsaid:
        del stored["config"][name]
    del stored["continued"]
    (tmp_path / SETTINGS).write_text(json.dumps(stored | {"format_version": version}))
    loaded = PTPModel.from_pretrained(tmp_path)
    assert loaded.ptp_config == model.ptp_config
    assert loaded.continuation is None
    expected, found = (Decoder(each, budget=8).generate([3, 4], 20, end_token_ids=[]) for each in (model, loaded))
    assert found == expected
    assert found.num_draft_tokens > 0
    # Saved again, it says so itself.
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / SETTINGS).read_text())
    assert again["format_version"] == 3
    assert {name: again["config"][name] for name in off} == off


def test_an_experiment_directory_stands_for_its_adapter(saved: Path, model: PTPModel, tiny_llama: Callable) -> None:
    loaded = PTPModel.from_pretrained(saved.parent)
    assert torch.equal(window_logits(loaded, tiny_llama), window_logits(model, tiny_llama))


def test_saving_twice_replaces_the_adapter_and_leaves_nothing_else(saved: Path, model: PTPModel) -> None:
    before = {path.name for path in saved.iterdir()}
    model.survival = (0.5, 0.5, 0.5)
    model.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == before
    assert PTPModel.from_pretrained(saved).survival == (0.5, 0.5, 0.5)


def test_an_adapter_of_a_model_made_in_memory_can_be_saved_and_loaded_onto_it(
    tiny_llama: Callable, random_adapter: Callable, tmp_path: Path
) -> None:
    model = random_adapter(PTPModel(tiny_llama(), PTPConfig(window=4, lora_rank=2)))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PTPModel.from_pretrained(tmp_path / "adapter", tiny_llama())
    assert torch.equal(window_logits(loaded, tiny_llama), window_logits(model, tiny_llama))


def test_peft_loads_the_lora_weights(saved: Path, base_directory: Path) -> None:
    config = LoraConfig.from_pretrained(str(saved))
    peft_model = get_peft_model(load_base_model(str(base_directory)), config)
    weights = load_file(saved / LORA_WEIGHTS)
    result = set_peft_model_state_dict(peft_model, weights)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    parameters = dict(peft_model.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(parameters[name.replace(".weight", ".default.weight")], weight)


def test_a_model_has_the_same_fingerprint_in_every_dtype_and_with_any_adapter(
    base_directory: Path, model: PTPModel
) -> None:
    expected = fingerprint(load_base_model(str(base_directory), "float32"))
    assert fingerprint(load_base_model(str(base_directory), "bfloat16")) == expected
    assert fingerprint(model.base_model) == expected


def test_another_model_has_another_fingerprint(tiny_llama: Callable) -> None:
    models = [tiny_llama(), tiny_llama(seed=1), tiny_llama(vocab_size=41), tiny_llama(layers=1)]
    nudged = tiny_llama()
    with torch.no_grad():
        nudged.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    assert len({fingerprint(model) for model in [*models, nudged]}) == 5
    assert fingerprint(tiny_llama()) == fingerprint(models[0])


def test_the_base_model_is_found_when_both_directories_move_together(
    model: PTPModel, base_directory: Path, tiny_llama: Callable, tmp_path: Path
) -> None:
    shutil.copytree(base_directory, tmp_path / "before" / "base")
    model.base_model.config.name_or_path = str(tmp_path / "before" / "base")
    model.save_pretrained(tmp_path / "before" / "experiment" / "adapter")
    (tmp_path / "before").rename(tmp_path / "after")
    loaded = PTPModel.from_pretrained(tmp_path / "after" / "experiment")
    assert torch.equal(window_logits(loaded, tiny_llama), window_logits(model, tiny_llama))


def test_an_adapter_takes_the_dtype_of_its_base_model(saved: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in PTPModel.from_pretrained(saved, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize("weights", [LORA_WEIGHTS, AUXILIARY_WEIGHTS])
def test_weights_must_have_exactly_the_model_s_keys_and_shapes(saved: Path, weights: str) -> None:
    path = saved / weights
    original = path.read_bytes()
    key = min(load_file(path))

    rewrite(path, lambda tensors: tensors.pop(key))
    assert f"1 keys missing (first: ['{key}'])" in one_line_error(saved)

    path.write_bytes(original)
    rewrite(path, lambda tensors: tensors.update(stray=torch.zeros(1)))
    assert "1 unknown (first: ['stray'])" in one_line_error(saved)

    path.write_bytes(original)
    rewrite(path, lambda tensors: tensors.update({key: torch.zeros(3, 3, 3)}))
    message = one_line_error(saved)
    assert f"{key} has shape (3, 3, 3), expected (" in message


@pytest.mark.parametrize("weights", [LORA_WEIGHTS, AUXILIARY_WEIGHTS])
def test_corrupt_or_missing_weights_are_named(saved: Path, weights: str) -> None:
    path = saved / weights
    content = path.read_bytes()
    for corrupt in (content[:-20], content[:100], b"", b"\xff" * 200):
        path.write_bytes(corrupt)
        assert f"{path} is corrupt" in one_line_error(saved)
    path.unlink()
    assert f"{path} is missing" in one_line_error(saved)


@pytest.mark.parametrize("content", [b"", b'{"base_model": ', b"[]", b"\xff\xfe{}", b"{}"])
def test_a_corrupt_configuration_is_named(saved: Path, content: bytes) -> None:
    (saved / SETTINGS).write_bytes(content)
    assert str(saved / SETTINGS) in one_line_error(saved)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"fromat_version": 1}, "fromat_version"),
        ({"base_fingerprint": 3}, "base_fingerprint"),
        ({"survival": "x"}, "survival"),
        ({"calibration": {"curves": [[0.2, 0.1]]}}, "ascending chances in (0, 1); got (0.2, 0.1)"),
    ],
)
def test_a_wrong_configuration_names_the_culprit(saved: Path, changes: dict[str, object], culprit: str) -> None:
    change_settings(saved, **changes)
    assert culprit in one_line_error(saved)


def test_a_setting_out_of_range_names_itself(saved: Path) -> None:
    change_settings(saved, config=PTPConfig(window=4, lora_rank=2).model_dump() | {"window": -4})
    assert "window" in one_line_error(saved)


def test_an_adapter_of_another_shape_than_its_configuration_is_refused(saved: Path) -> None:
    change_settings(saved, config=PTPConfig(window=4, lora_rank=3).model_dump())
    assert "has shape (2, 32), expected (3, 32)" in one_line_error(saved)


def test_a_missing_directory_and_one_without_an_adapter_are_told_apart(tmp_path: Path) -> None:
    assert "no such directory" in one_line_error(tmp_path / "nowhere")
    assert "holds no adapter" in one_line_error(tmp_path)


def test_an_adapter_made_for_another_base_model_is_refused(saved: Path, tiny_llama: Callable) -> None:
    for other in (tiny_llama(seed=1), tiny_llama(vocab_size=41), tiny_llama(layers=3)):
        message = one_line_error(saved, other)
        assert "was made for" in message
        assert fingerprint(other)[:12] in message


def test_an_adapter_s_files_may_be_read_by_whom_the_user_lets_read(tiny_llama: Callable, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        PTPModel(tiny_llama(), PTPConfig(lora_rank=2)).save_pretrained(tmp_path / "shared")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
