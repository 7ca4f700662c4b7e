"""The stages of an experiment, as the commands and the demo run them: distill → pregenerate → train.

Each takes an `Experiment`, reads and writes its directory, and goes on where it was stopped. Progress is reported to
a callback; nothing here prints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, set_seed

from ptp.config import PregenerateConfig
from ptp.data.packing import Completion
from ptp.data.prompts import encode_prompts, format_prompts, read_rows, validation_places
from ptp.data.store import CompletionStore, Provenance, write_atomically
from ptp.data.teacher import batches_by_length, sample_completions
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.adapter import fingerprint
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.model.ptp_model import PTPModel, context_length, end_token_ids
from ptp.training.trainer import PTPTrainer, evaluate_windows

TRAINING_RESULT = "training.json"
"""In the adapter directory; written last."""

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def distill(directory: Path, config: ExperimentConfig) -> Experiment:
    """Set up an experiment directory, after checking that its model and data can be used."""
    experiment = Experiment(directory, config)
    prompts = read_prompts(experiment)
    load_tokenizer(experiment.base_model)(prompts[0])
    experiment.write()
    (directory / "README.md").write_text(_readme(experiment, len(prompts)))
    return experiment


def read_prompts(experiment: Experiment) -> list[str]:
    """Texts of all prompts of the experiment's dataset."""
    return format_prompts(read_rows(experiment.dataset), experiment.config.prompt_scheme)


def pregenerate(experiment: Experiment, progress: Progress = lambda done, total: None) -> CompletionStore:
    """Sample the base model's completions of every prompt that is not in the store yet."""
    settings = experiment.config.pregenerate
    base_model = load_base_model(experiment.base_model).eval()
    prompts = encode_prompts(
        load_tokenizer(experiment.base_model), read_prompts(experiment), prompt_limit(base_model, settings)
    )
    provenance = Provenance(
        base_fingerprint=fingerprint(base_model),
        rule=experiment.config.sampling,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        prompts_fingerprint=hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest(),
    )
    store = CompletionStore(experiment.completions, provenance)
    experiment.record_run("pregenerate")
    stored = store.stored_sequences()
    todo = [place for place in prompts if place not in stored]
    done = len(prompts) - len(todo)
    progress(done, len(prompts))
    for batch in batches_by_length([len(prompts[place]) for place in todo], settings.batch_size):
        sequences = [todo[i] for i in batch]
        completions = sample_completions(
            base_model,
            [prompts[place] for place in sequences],
            experiment.config.sampling,
            seed=settings.seed,
            sequences=sequences,
            max_new_tokens=settings.max_new_tokens,
            end_token_ids=end_token_ids(base_model),
        )
        store.append(sequences, completions)
        done += len(batch)
        progress(done, len(prompts))
    return store


def prompt_limit(base_model: PreTrainedModel, settings: PregenerateConfig) -> int:
    """Most tokens a prompt may have: the setting, and two less than the model's context."""
    context = context_length(base_model)
    return settings.max_prompt_tokens if context is None else min(settings.max_prompt_tokens, context - 2)


def split_completions(experiment: Experiment) -> tuple[dict[int, Completion], dict[int, Completion]]:
    """(training, validation) completions of the store by sequence number; prompts are held out by content."""
    store = CompletionStore(experiment.completions)
    if store.provenance.rule != experiment.config.sampling:
        raise ConfigError(
            f"the completions were sampled with {store.provenance.rule}, the experiment says "
            f"{experiment.config.sampling}; restore the setting or pregenerate into a new directory"
        )
    held_out = validation_places(read_prompts(experiment))
    completions = dict(store)
    validation = {place: c for place, c in completions.items() if place in held_out}
    training = {place: c for place, c in completions.items() if place not in held_out}
    if not validation or not training:
        raise DataError(f"{len(completions)} completions are too few to hold any out; add prompts")
    return training, validation


@dataclass(frozen=True)
class TrainingResult:
    """What training measured on held-out windows.

    accuracy: right predictions by window index. survival: the acceptance profile. validation_loss: mean over targets.
    num_masked: targets the sampling rule gives no mass. curves: (step, value) by name. config: all settings of the
    run, overrides included, as `ExperimentConfig` has them.
    """

    accuracy: list[float]
    survival: list[float]
    validation_loss: float
    num_masked: int
    curves: dict[str, list[tuple[int, float]]]
    config: dict[str, Any]


def train(experiment: Experiment, callbacks: Sequence[TrainerCallback] = ()) -> TrainingResult:
    """Train the adapter on the store's completions, from the last complete checkpoint if there is one."""
    settings, rule = experiment.config.train, experiment.config.sampling
    training, validation = split_completions(experiment)
    check_lengths([*training.values(), *validation.values()], settings.sequence_length)
    # Weights are drawn after seeding, so that a run and its repetition start alike.
    set_seed(settings.seed)
    base_model = load_base_model(experiment.base_model, "bfloat16" if settings.bf16 else "float32")
    check_teacher(experiment, fingerprint(base_model))
    model = PTPModel(base_model, experiment.config.model)
    model.rule = rule
    experiment.record_run("train")
    trainer = PTPTrainer(model, settings, rule, list(training.values()), experiment.checkpoints, callbacks)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(experiment.checkpoints))
    metrics = evaluate_windows(model, list(validation.values()), settings, rule)
    model.survival = metrics.survival
    model.save_pretrained(experiment.adapter)
    result = TrainingResult(
        accuracy=metrics.accuracy,
        survival=list(metrics.survival),
        validation_loss=metrics.mean_loss,
        num_masked=metrics.num_masked,
        config=experiment.config.model_dump(mode="json"),
        curves={
            "training loss": [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row]
        },
    )
    write_atomically(experiment.adapter / TRAINING_RESULT, json.dumps(asdict(result), indent=2).encode() + b"\n")
    return result


def has_adapter(experiment: Experiment) -> bool:
    """Whether training has come to its end."""
    return (experiment.adapter / TRAINING_RESULT).is_file()


def read_training_result(experiment: Experiment) -> TrainingResult:
    """What `train` measured when it wrote the adapter."""
    return TrainingResult(**json.loads((experiment.adapter / TRAINING_RESULT).read_text()))


def last_complete_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint whose writing was not cut short; the Trainer writes trainer_state.json last."""
    complete = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def check_lengths(completions: Sequence[Completion], sequence_length: int) -> None:
    """Raises `ConfigError` if a completion does not fit into a packed sequence."""
    longest = max(len(completion) for completion in completions)
    if longest > sequence_length:
        raise ConfigError(
            f"train.sequence_length is {sequence_length}, the longest completion has {longest} tokens; raise it"
        )


def check_teacher(experiment: Experiment, found: str) -> None:
    """Raises `DataError` if the store's completions were sampled from another base model."""
    expected = CompletionStore(experiment.completions).provenance.base_fingerprint
    if found != expected:
        raise DataError(
            f"{experiment.completions} was sampled from another base model ({expected[:12]}) than "
            f"{experiment.config.base_model} ({found[:12]}); pregenerate into a new directory"
        )


def validation_prompts(experiment: Experiment, count: int) -> list[list[int]]:
    """Token ids of up to `count` held-out prompts."""
    _, validation = split_completions(experiment)
    return [c.ids[: c.prompt_length].tolist() for _, c in sorted(validation.items())[:count]]


def _readme(experiment: Experiment, num_prompts: int) -> str:
    directory, config = experiment.directory, experiment.config
    return f"""# {directory.name}

`{config.base_model}` made parallel on {num_prompts} prompts of `{config.dataset}`, sampled with {config.sampling}.

    ptp_pregenerate {directory}
    ptp_train {directory}
    ptp verify {directory}
    ptp_generate {directory} --prompt "..."
"""
