"""Training: documents → windows → adapter (METHOD §3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback

from ptp.config import PTPConfig
from ptp.data.documents import Documents
from ptp.data.split import held_out
from ptp.data.store import CompletionStore
from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.allocation import Profile
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment
from ptp.files import write_atomically
from ptp.model.adapter import SETTINGS as ADAPTER_SETTINGS
from ptp.model.adapter import fingerprint
from ptp.model.loading import load_base_model, load_tokenizer, to_dtype, vocabulary_fingerprint
from ptp.model.ptp_model import PTPModel
from ptp.model.student import StudentModel
from ptp.processes import world_size
from ptp.records import differences
from ptp.sampling import SamplingRule
from ptp.scaling import build_student
from ptp.stages import Progress, unheard
from ptp.stages.prepare import prepare
from ptp.training.checkpoints import last_complete_checkpoint, step_of
from ptp.training.curves import Curve, curves
from ptp.training.trainer import PTPTrainer, check_trackers

TRAINING_RESULT = "training.json"
"""In the adapter directory; written last."""

MEASUREMENT = "measurement.json"
"""Beside it, what decoding with the adapter reached (see `ptp.evaluation.measurement`)."""

SETTINGS = "settings.json"
"""Beside the checkpoints: what they are made with."""

MAY_CHANGE = (
    *("max_steps", "num_epochs", "save_every", "save_minutes", "log_every", "budget", "report_to"),
    *("gradient_checkpointing", "batch_size", "gradient_accumulation_steps"),
)
"""Settings that a training may go on with others of, as long as its steps are of as many sequences, and are to be no
fewer than were made."""

TEXT_PROMPT_TOKENS = 64
"""Tokens of a plain text that are its prompt, where one is wanted, but for texts less than twice as long."""


@dataclass(frozen=True)
class TrainingResult:
    """What training measured on held-out windows.

    step: the step whose model this is, the best of those measured. accuracy: right predictions by window index.
    survival, continued: the acceptance profile, of drafts with positions and of continued ones. second: the chance that
    the second candidate is right where a draft is wrong. validation_loss: mean over targets. num_masked: targets the
    sampling rule gives no mass. num_tokens, num_trained: tokens of the training documents, and those of them in spans.
    curves: (step, value) by their names in the Trainer's log. config: all settings of the run, overrides included, as
    `ExperimentConfig` has them.
    """

    step: int
    accuracy: list[float]
    survival: list[float]
    validation_loss: float
    num_masked: int
    num_tokens: int
    num_trained: int
    curves: dict[str, Curve]
    config: dict[str, Any]
    continued: list[float] = field(default_factory=list)
    second: float = 0.0

    @property
    def profile(self) -> Profile:
        """What decoding may expect of the adapter."""
        return Profile.of(self, PTPConfig(**self.config["model"]).lead)


@dataclass(frozen=True)
class TrainingData:
    """Documents to train on and to validate with; fingerprint: hash of what they were made of."""

    training: Documents
    validation: Documents
    fingerprint: str


def training_data(experiment: Experiment, progress: Progress = unheard) -> TrainingData:
    """The completions of the store, or the documents of the dataset where its own text is trained, split in two."""
    if experiment.config.data.distils:
        store = CompletionStore(experiment.completions)
        if store.provenance.rule != experiment.config.sampling:
            raise ConfigError(
                f"the completions were sampled with {store.provenance.rule}, the experiment says "
                f"{experiment.config.sampling}; restore the setting or pregenerate into a new directory"
            )
        documents, data_fingerprint = store.load(), store.provenance.prompts_fingerprint
    else:
        prepared = prepare(experiment, progress)
        documents, data_fingerprint = prepared.documents, prepared.fingerprint
    out = held_out(documents.groups)
    return TrainingData(documents.select(~out), documents.select(out), data_fingerprint)


def train(
    experiment: Experiment, callbacks: Sequence[TrainerCallback] = (), progress: Progress = unheard
) -> TrainingResult:
    """Train the adapter, or all weights, from the last complete checkpoint if there is one."""
    settings, rule = experiment.config.train, experiment.config.sampling
    check_trackers(settings.report_to)
    experiment.check_inside("checkpoints", "adapter", "tensorboard")
    data = training_data(experiment, progress)
    if experiment.config.model.trains_all and not settings.inverse and not data.training.has_intervals:
        raise ConfigError(
            "training all weights (model.student or model.trained=all) needs intervals, and "
            f"{experiment.completions} holds none: they are stored only where ptp_pregenerate samples with the base "
            "model itself, not by an endpoint or an import"
        )
    check_validation(data.validation)
    check_lengths(np.concatenate([data.training.lengths, data.validation.lengths]), settings.sequence_length)
    # Weights are drawn after seeding, so that a run and its repetition start alike.
    set_seed(settings.seed)
    model = new_model(experiment)
    check_vocabulary(data, cast(nn.Embedding, model.base_model.get_input_embeddings()).num_embeddings)
    model.rule = rule
    keep_settings(experiment, data, model.base_fingerprint)
    trainer = PTPTrainer(
        model,
        settings,
        rule,
        data.training,
        experiment.checkpoints,
        callbacks,
        validation=data.validation,
        tokens_per_call=lambda found: simulated_tokens_per_call(
            Profile.of(found, experiment.config.model.lead), settings.budget
        ),
    )
    write_events_to(experiment.events, trainer)
    last = last_complete_checkpoint(experiment.checkpoints)
    if last is not None and step_of(last) > trainer.args.max_steps:
        raise ConfigError(
            f"{last} is {step_of(last)} steps of training, and {trainer.args.max_steps} are asked for "
            "(train.max_steps or train.num_epochs): ask for as many or more to go on, or remove the checkpoints to "
            "start over"
        )
    experiment.record_run("train", data.fingerprint)
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.measure()
    metrics.tell(model)
    if trainer.args.should_save:
        # Of the adapter before; without its settings, one whose writing is cut short does not look whole.
        for name in (TRAINING_RESULT, MEASUREMENT, ADAPTER_SETTINGS):
            (experiment.adapter / name).unlink(missing_ok=True)
    trainer.save_model(str(experiment.adapter))
    result = TrainingResult(
        step=trainer.state.best_global_step or trainer.state.global_step,
        accuracy=metrics.accuracy,
        survival=list(metrics.survival),
        continued=list(metrics.continued),
        second=metrics.second,
        validation_loss=metrics.mean_loss,
        num_masked=metrics.num_masked,
        num_tokens=int(data.training.lengths.sum()),
        num_trained=int(data.training.num_trained.sum()),
        config=experiment.config.model_dump(mode="json"),
        curves=curves(trainer.state.log_history),
    )
    if trainer.args.should_save:
        write_atomically(experiment.adapter / TRAINING_RESULT, json.dumps(asdict(result), indent=2).encode() + b"\n")
    trainer.accelerator.wait_for_everyone()
    return result


def write_events_to(directory: Path, trainer: Trainer) -> None:
    """Have tensorboard's events, if the trainer writes any, in a directory; a resumed run adds a file to it."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory)


def keep_settings(experiment: Experiment, data: TrainingData, base_fingerprint: str) -> None:
    """Keep beside the checkpoints what they are made with.

    Raises `ConfigError` if there are checkpoints made with something else: training that went on from them would be
    neither the one nor the other.
    """
    config = experiment.config.model_dump(mode="json")
    settings: dict[str, Any] = {
        f"{section}.{key}": value
        for section in ("sampling", "model", "train")
        for key, value in config[section].items()
        if key not in MAY_CHANGE
    }
    settings |= {
        "number of sequences in a step": experiment.config.train.sequences_per_step(world_size()),
        "base model's fingerprint": base_fingerprint,
        "data's fingerprint": data.fingerprint,
        "number of training documents": len(data.training),
    }
    kept = experiment.checkpoints / SETTINGS
    resumes = kept.exists() and last_complete_checkpoint(experiment.checkpoints) is not None
    # What a rule could not yet say when the file was written was off.
    off = {f"sampling.{key}": value for key, value in SamplingRule().model_dump(mode="json").items()}
    if resumes and (changed := differences(off | json.loads(kept.read_text(encoding="utf-8")), settings)):
        raise ConfigError(
            f"the checkpoints in {experiment.checkpoints} were made with another {changed}; restore that to go on "
            "from them, or remove them to start over"
        )
    write_atomically(kept, json.dumps(settings, indent=2).encode() + b"\n")


def new_model(experiment: Experiment) -> PTPModel:
    """The base model with an adapter that has learnt nothing yet, or a student of it that has not, or all to train."""
    config = experiment.config
    # One that is to be shared out may be too large for a single GPU.
    shared_out = config.train.fsdp and world_size() > 1
    base_model = load_base_model(experiment.base_model, on_gpu=not shared_out)
    # That of the checkpoint's own dtype: rounded to float16, it would be another model's.
    found = fingerprint(base_model)
    if config.data.distils:
        check_teacher(experiment, found)
    if config.model.student is not None:
        student = build_student(config.model.student, base_model.config, config.train.sequence_length)
        return StudentModel(student, config.model, experiment.base_model, found).to(base_model.device)
    if config.model.trains_all:
        return StudentModel(to_dtype(base_model, "float32"), config.model, experiment.base_model, found)
    model = PTPModel(to_dtype(base_model, config.train.dtype), config.model)
    model.base_fingerprint = found
    return model


def has_adapter(experiment: Experiment) -> bool:
    """Whether training has come to its end."""
    return (experiment.adapter / TRAINING_RESULT).is_file()


def read_training_result(experiment: Experiment) -> TrainingResult:
    """What `train` measured when it wrote the adapter."""
    kept = json.loads((experiment.adapter / TRAINING_RESULT).read_text())
    kept["curves"] = {name: [tuple(point) for point in curve] for name, curve in kept["curves"].items()}
    return TrainingResult(**kept)


def check_lengths(lengths: np.ndarray, sequence_length: int) -> None:
    """Raises `ConfigError` if a document does not fit into a packed sequence."""
    if lengths.max() > sequence_length:
        raise ConfigError(
            f"train.sequence_length is {sequence_length}, the longest completion has {lengths.max()} tokens; raise it"
        )


def check_validation(documents: Documents) -> None:
    """Raises `DataError` if no window can start in a held-out document."""
    if not documents.num_starts.any():
        raise DataError(
            f"none of the {len(documents)} held-out documents has two trained tokens in a row, so nothing can be "
            "measured on them; give more or longer ones"
        )


def check_vocabulary(data: TrainingData, num_tokens: int) -> None:
    """Raises `DataError` if a document holds a token id that the model, which has so many, does not know."""
    largest = max(shard.largest_id for shard in data.training.shards)
    if largest >= num_tokens:
        raise DataError(
            f"the documents hold the token id {largest}, the base model has embeddings for {num_tokens} tokens: its "
            "tokenizer has tokens that it does not know"
        )


def check_teacher(experiment: Experiment, found: str) -> None:
    """Raises `DataError` if the store's completions were written with another tokenizer, or by another base model.

    Those of an endpoint or of a file tell nothing about the model.
    """
    provenance = CompletionStore(experiment.completions).provenance
    vocabulary = vocabulary_fingerprint(load_tokenizer(experiment.base_model))
    if (provenance.vocabulary_fingerprint or vocabulary) != vocabulary:
        raise DataError(
            f"{experiment.completions} was made with a tokenizer of another vocabulary than that of "
            f"{experiment.config.base_model}; pregenerate into a new directory"
        )
    expected = provenance.base_fingerprint
    if expected and found != expected:
        raise DataError(
            f"{experiment.completions} was sampled from another base model ({expected[:12]}) than "
            f"{experiment.config.base_model} ({found[:12]}); pregenerate into a new directory"
        )


def validation_prompts(experiment: Experiment, count: int) -> list[list[int]]:
    """Token ids of up to `count` held-out prompts, each once: what stands before a document's first trained token.

    A text has no prompt; its first tokens are taken for one.
    """
    documents = training_data(experiment).validation
    _, first_of_group = np.unique(documents.groups, return_index=True)
    prompts = []
    for place in np.sort(first_of_group)[:count]:
        document = documents[place]
        is_text = experiment.config.data.mode == "fixed"
        length = min(TEXT_PROMPT_TOKENS, (len(document) + 1) // 2) if is_text else document.prompt_length
        prompts.append(document.ids[:length].tolist())
    return prompts
