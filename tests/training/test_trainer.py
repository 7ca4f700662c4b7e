import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import CONFIG, RULE, Kill, step_loss
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ptp.config import PTPConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.data.teacher import Prompt, sample_completions
from ptp.errors import ConfigError
from ptp.model.checkpointing import checkpointed
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule, probability, token_intervals, warp
from ptp.training import trainer as module
from ptp.training.checkpoints import last_complete_checkpoint
from ptp.training.objective import EVALUATION_WINDOWS, evaluate_windows, make_stream
from ptp.training.trainer import PTPTrainer, check_trackers


@pytest.fixture(scope="module")
def directory(tiny_llama: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(12).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def completions(directory: Path) -> Documents:
    prompts = [Prompt(np.asarray([0, 3 + number % 9, 3 + number // 9], np.int32), [number]) for number in range(40)]
    base = load_base_model(str(directory)).eval()
    documents = sample_completions(
        base, prompts, RULE, seed=0, max_length=64, max_new_tokens=24, end_token_ids=[1], batch_size=8
    )
    return Documents.of(documents)


def without_intervals(documents: Documents) -> Documents:
    return Documents.of([replace(document, lower=None, upper=None) for document in documents])


def new_model(directory: Path, variant: str = "categorical", seed: int = 0) -> PTPModel:
    base = load_base_model(str(directory))
    torch.manual_seed(seed)
    model = PTPModel(base, PTPConfig(variant=variant, window=4, lora_rank=4))
    model.rule = RULE
    return model


def trained(model: PTPModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trainer_of(
    model: PTPModel,
    completions: Documents,
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: object,
) -> PTPTrainer:
    return PTPTrainer(model, CONFIG.model_copy(update=changes), RULE, completions, output, callbacks)


@pytest.mark.parametrize(
    ("variant", "distillation", "stored"),
    [("categorical", 0.0, True), ("categorical", 1.0, True), ("categorical", 1.0, False), ("one_hot", 0.0, False)],
)
def test_a_short_training_lowers_the_loss_whether_intervals_are_stored_or_not(
    directory: Path, completions: Documents, tmp_path: Path, variant: str, distillation: float, stored: bool
) -> None:
    model = new_model(directory, variant)
    if not stored:
        completions = without_intervals(completions)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = evaluate_windows(model, completions, CONFIG, RULE)
    trainer_of(model, completions, tmp_path, max_steps=40, save_every=40, distillation=distillation).train()
    after = evaluate_windows(model, completions, CONFIG, RULE)
    assert after.mean_loss < 0.9 * before.mean_loss
    assert after.mean_correct > before.mean_correct
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_the_loss_is_the_same_with_intervals_stored_or_computed(
    directory: Path, completions: Documents, variant: str
) -> None:
    model = new_model(directory, variant)
    stream = make_stream(without_intervals(completions), CONFIG, 4)
    batch = collate([stream[i] for i in range(4)])
    context = model(**batch).context
    lower, upper = token_intervals(context, model.logits, batch["ids"], batch["span"] >= 0, RULE)
    stored = step_loss(model, {**batch, "lower": lower, "upper": upper})
    assert torch.equal(step_loss(model, batch), stored)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_tokens_that_the_rule_cannot_give_are_masked_and_counted_when_intervals_are_computed(
    directory: Path, variant: str
) -> None:
    model, rule = new_model(directory, variant), SamplingRule(top_k=5)
    model.rule = rule
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 12, 30).astype(np.int32) for _ in range(6)]
    documents = Documents.of([Document(text, ((1, 14), (17, 30)), number=n) for n, text in enumerate(texts)])
    metrics = evaluate_windows(model, documents, CONFIG, rule)

    masses = {}
    for text in texts:
        ids = torch.from_numpy(text).long()
        mass = probability(warp(model.base_model(input_ids=ids[None]).logits[0, :-1], rule), ids[1:])
        masses[tuple(text)] = [False, *(mass > 0).tolist()]
    stream = make_stream(documents, CONFIG, 4)
    stream.length *= -(-EVALUATION_WINDOWS // (len(stream) * CONFIG.windows_per_sequence))
    num_targets = num_masked = 0
    for item in (stream[i] for i in range(len(stream))):
        for start in item.starts.tolist():
            place = int(item.positions[start])
            end = 14 if place < 14 else 30
            text = item.ids[start - place : start - place + 30].tolist()
            first = place + (variant == "categorical")
            targets = masses[tuple(text)][first : min(first + 4, end)]
            num_targets, num_masked = num_targets + sum(targets), num_masked + targets.count(False)
    assert num_masked > 0.2 * num_targets > 0
    assert (metrics.num_targets, metrics.num_masked) == (num_targets, num_masked)


@pytest.mark.parametrize(("num_epochs", "accumulation"), [(2, 1), (2, 2), (0.5, 1), (0.01, 1)])
def test_epochs_are_passes_over_the_packed_sequences(
    directory: Path, completions: Documents, tmp_path: Path, num_epochs: float, accumulation: int
) -> None:
    trainer = trainer_of(
        new_model(directory),
        completions,
        tmp_path,
        max_steps=None,
        num_epochs=num_epochs,
        batch_size=2,
        gradient_accumulation_steps=accumulation,
        sequence_length=32,
        save_every=100,
    )
    num_sequences = len(make_stream(completions, trainer.config, 4))
    expected = max(1, round(num_epochs * num_sequences / (2 * accumulation)))
    assert num_sequences > 4
    trainer.train()
    assert trainer.state.global_step == expected
    assert len(trainer.train_dataset) == expected * 2 * accumulation


def test_processes_share_an_epoch_and_none_sees_what_another_saw(
    directory: Path, completions: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": None, "num_epochs": 4, "batch_size": 2, "sequence_length": 32}
    alone = trainer_of(new_model(directory), completions, tmp_path, **changes)
    monkeypatch.setattr(module, "world_size", lambda: 3)
    together = trainer_of(new_model(directory), completions, tmp_path, **changes)
    num_items = 4 * len(make_stream(completions, together.config, 4))
    assert (alone.args.max_steps, together.args.max_steps) == (round(num_items / 2), round(num_items / 6))
    # The Trainer gives each of them its part of the items, and begins anew when they are used up.
    assert len(together.train_dataset) == together.args.max_steps * 2 * 3


def test_gradients_can_be_accumulated_instead_of_taking_a_larger_batch(directory: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Sequences of as many targets each, as the mean of their means is the mean of them all.
    documents = Documents.of([Document(rng.integers(2, 12, 64).astype(np.int32), ((1, 64),)) for _ in range(16)])
    ends, losses = [], []
    for batch_size, accumulation, seed in [(8, 1, 0), (4, 2, 0), (8, 1, 1)]:
        model = new_model(directory)
        changes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "seed": seed}
        output = tmp_path / f"{batch_size} {seed}"
        trainer = trainer_of(model, documents, output, max_steps=10, save_every=100, learning_rate=1e-3, **changes)
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in trained(model).values()]))
        losses.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    whole, parts, other = ends
    # Other data, for comparison, leads elsewhere.
    assert 10 * (whole - parts).norm() < (whole - other).norm()
    assert losses[1] == pytest.approx(losses[0], rel=0.001)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "train.report_to names the tracker 'wandb', which is not installed; install it (pip install wandb)"),
        ("wandbb", "train.report_to names the unknown tracker 'wandbb'; known: "),
    ],
)
def test_a_tracker_that_is_not_there_is_one_clear_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError) as caught:
        check_trackers(["tensorboard", name])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_tracker_is_told_the_losses(
    directory: Path, completions: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            told.append(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    for names in ((), ("wandb",)):
        trainer_of(new_model(directory), completions, tmp_path, max_steps=10, save_every=100, report_to=names).train()
        assert any("loss" in logs for logs in told) == bool(names)


@torch.no_grad()
def judged_by_hand(model: PTPModel, trainer: PTPTrainer, items: range) -> dict[str, float]:
    """A row of the log for a one-hot model that does not change, from the windows of sequences one by one."""
    shift, lead = model.ptp_config.shift, model.ptp_config.lead
    correct, counted, drafts, lost, masked, targets = [0] * 4, [0] * 4, [[0, 0] for _ in range(4)], 0.0, 0, 0
    for item in (trainer.train_dataset[number] for number in items):
        batch = collate([item])
        output = model(**batch)
        logits = model.logits(output.windows[0]).unflatten(0, (-1, 4))
        for scores, start in zip(logits, item.starts.tolist(), strict=True):
            unbroken = True
            for index in range(4):
                place = start + shift + 1 + index
                if place >= len(item.ids) or item.span[place] != item.span[start]:
                    break
                if not output.mass[0, place]:
                    masked, unbroken = masked + 1, unbroken and index < lead
                    continue
                right = int(scores[index].argmax()) == int(item.ids[place])
                correct[index], counted[index] = correct[index] + right, counted[index] + 1
                targets, lost = targets + 1, lost - float(scores[index].log_softmax(-1)[item.ids[place]])
                if unbroken:
                    drafts[index][0], drafts[index][1] = drafts[index][0] + right, drafts[index][1] + 1
                # What comes before the first draft is known when decoding.
                unbroken = unbroken and (right or index < lead)
    survival = np.cumprod([right / max(1, tried) for right, tried in drafts[lead:]])
    return {
        "loss": lost / targets,
        "correct": float(survival.sum()),
        "accuracy": sum(correct) / targets,
        "masked": masked / (masked + targets),
        **{f"accuracy/{index}": right / of for index, (right, of) in enumerate(zip(correct, counted, strict=True))},
    }


def test_a_row_of_the_log_is_of_all_windows_since_the_row_before(directory: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 12, rng.integers(8, 30)).astype(np.int32) for _ in range(30)]
    documents = Documents.of([Document(text, ((1, len(text)),), number=n) for n, text in enumerate(texts)])
    base = load_base_model(str(directory))
    model = PTPModel(base, PTPConfig(variant="one_hot", window=4, lora_rank=4))
    rule = SamplingRule(top_k=8)
    model.rule = rule
    # Steps too small to change what it predicts, of parts with unequal numbers of targets.
    changes = {"batch_size": 2, "gradient_accumulation_steps": 3, "log_every": 2, "save_every": 5, "max_steps": 7}
    changes |= {"learning_rate": 1e-30, "sequence_length": 32}
    trainer = PTPTrainer(model, CONFIG.model_copy(update=changes), rule, documents, tmp_path)
    trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert list(rows) == [2, 4, 6]
    for step, row in rows.items():
        expected = judged_by_hand(model, trainer, range(6 * (step - 2), 6 * step))
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert 0 < row["masked"] < row["accuracy"] + 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_and_resumed_training_ends_with_the_same_adapter_as_an_uninterrupted_one(
    directory: Path, completions: Documents, tmp_path: Path, optimizer: str
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


def test_gradient_checkpointing_trains_the_same_adapter(
    directory: Path, completions: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        calls.append(args)
        return checkpointed(*args, **kwargs)

    monkeypatch.setattr("ptp.model.ptp_model.checkpointed", counted)
    ends = []
    for checkpoints in (False, True):
        model = new_model(directory)
        trainer_of(model, completions, tmp_path / str(checkpoints), gradient_checkpointing=checkpoints).train()
        ends.append(trained(model))
        # The windows' pass of each step.
        assert len(calls) == checkpoints * CONFIG.max_steps
    assert same(*ends)


def test_the_first_step_can_be_saved_and_loaded(directory: Path, completions: Documents, tmp_path: Path) -> None:
    model = new_model(directory)
    trainer_of(model, completions, tmp_path, max_steps=1, save_every=1, warmup_steps=0).train()
    loaded = PTPModel.from_pretrained(tmp_path / "checkpoint-1")
    assert same(trained(loaded), trained(model))


def test_measuring_leaves_the_model_and_its_mode_as_they_were(directory: Path, completions: Documents) -> None:
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
