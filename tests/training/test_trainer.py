import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.config import PTPConfig, TrainConfig
from ptp.data.packing import Completion
from ptp.data.teacher import sample_completions
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.stages import last_complete_checkpoint
from ptp.training.trainer import PTPTrainer, evaluate_windows

RULE = SamplingRule(temperature=0.7, top_k=20)
CONFIG = TrainConfig(
    max_steps=6,
    batch_size=4,
    sequence_length=64,
    windows_per_sequence=16,
    learning_rate=1e-2,
    warmup_steps=2,
    bf16=False,
    save_every=2,
)


@pytest.fixture(scope="module")
def directory(tiny_llama: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(12).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def completions(directory: Path) -> list[Completion]:
    prompts = [[0, 3 + number % 9, 3 + number // 9] for number in range(40)]
    return sample_completions(
        load_base_model(str(directory)).eval(),
        prompts,
        RULE,
        seed=0,
        sequences=range(len(prompts)),
        max_new_tokens=24,
        end_token_ids=[1],
    )


def new_model(directory: Path, variant: str = "categorical", seed: int = 0) -> PTPModel:
    base = load_base_model(str(directory))
    torch.manual_seed(seed)
    return PTPModel(base, PTPConfig(variant=variant, window=4, lora_rank=4))


def trained(model: PTPModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Kill(TrainerCallback):
    """Interrupts training after a step, before it can be saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_of(
    model: PTPModel,
    completions: list[Completion],
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: object,
) -> PTPTrainer:
    return PTPTrainer(model, CONFIG.model_copy(update=changes), RULE, completions, output, callbacks)


@pytest.mark.parametrize(("variant", "distillation"), [("categorical", 0.0), ("categorical", 1.0), ("one_hot", 0.0)])
def test_a_short_training_lowers_the_loss(
    directory: Path, completions: list[Completion], tmp_path: Path, variant: str, distillation: float
) -> None:
    model = new_model(directory, variant)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = evaluate_windows(model, completions, CONFIG, RULE)
    trainer_of(model, completions, tmp_path, max_steps=40, save_every=40, distillation=distillation).train()
    after = evaluate_windows(model, completions, CONFIG, RULE)
    assert after.mean_loss < 0.9 * before.mean_loss
    assert after.mean_correct > before.mean_correct
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_and_resumed_training_ends_with_the_same_adapter_as_an_uninterrupted_one(
    directory: Path, completions: list[Completion], tmp_path: Path, optimizer: str
) -> None:
    whole = new_model(directory)
    trainer_of(whole, completions, tmp_path / "whole", optimizer=optimizer).train()

    with pytest.raises(KeyboardInterrupt):
        trainer_of(new_model(directory), completions, tmp_path / "parts", [Kill(3)], optimizer=optimizer).train()
    checkpoint = last_complete_checkpoint(tmp_path / "parts")
    assert checkpoint == str(tmp_path / "parts" / "checkpoint-2")
    # Another start, so that whatever is not restored shows.
    resumed = new_model(directory, seed=1)
    trainer_of(resumed, completions, tmp_path / "parts", optimizer=optimizer).train(resume_from_checkpoint=checkpoint)
    assert same(trained(resumed), trained(whole))
    assert not same(trained(resumed), trained(new_model(directory)))


def test_the_first_step_can_be_saved_and_loaded(directory: Path, completions: list[Completion], tmp_path: Path) -> None:
    model = new_model(directory)
    trainer_of(model, completions, tmp_path, max_steps=1, save_every=1, warmup_steps=0).train()
    loaded = PTPModel.from_pretrained(tmp_path / "checkpoint-1")
    assert same(trained(loaded), trained(model))


def test_measuring_leaves_the_model_and_its_mode_as_they_were(directory: Path, completions: list[Completion]) -> None:
    model = new_model(directory).train()
    before = trained(model)
    first, second = (evaluate_windows(model, completions, CONFIG, RULE) for _ in range(2))
    assert model.training
    assert same(trained(model), before)
    assert (first.survival, first.mean_loss) == (second.survival, second.mean_loss)


def test_of_the_checkpoints_the_newest_complete_one_counts(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step, complete in [(9, True), (10, True), (11, False)]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"")
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
