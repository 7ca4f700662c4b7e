"""Training a PTP model: `transformers.Trainer` with our loss, data and checkpoints (METHOD §3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ptp.config import PTPConfig, TrainConfig
from ptp.data.documents import Documents
from ptp.data.packing import WindowStream, collate
from ptp.errors import ConfigError
from ptp.model.head import ROWS, summed_loss
from ptp.model.ptp_model import PTPModel, TrainingPass, states_before
from ptp.processes import world_size
from ptp.sampling import SamplingRule, token_intervals
from ptp.training.losses import Targets, window_loss, window_targets
from ptp.training.metrics import WindowMetrics, predictions
from ptp.training.optimizers import make_optimizer

EVALUATION_WINDOWS = 2000
"""Windows the acceptance profile is measured on, at least."""


class PTPTrainer(Trainer):
    """Trains what of a `PTPModel` requires gradients; a checkpoint's weights are an adapter directory."""

    model: PTPModel

    def __init__(
        self,
        model: PTPModel,
        config: TrainConfig,
        rule: SamplingRule,
        documents: Documents,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config = config
        self.rule = rule
        window = model.ptp_config.window
        stream = make_stream(documents, config, window)
        num_processes = world_size()
        num_steps = config.num_steps(len(stream.sequences), num_processes)
        stream.length = num_steps * config.batch_size * config.gradient_accumulation_steps * num_processes
        super().__init__(
            model=model,
            # Where all weights learn, steps as small as theirs would be rounded away in bfloat16 alone.
            args=_arguments(
                config, num_steps, output_dir, bf16=model.ptp_config.trains_all and config.dtype == "bfloat16"
            ),
            train_dataset=stream,
            data_collator=collate,
            optimizers=(make_optimizer(config.optimizer, model.named_parameters(), config.learning_rate), None),
            callbacks=list(callbacks),
        )
        # The live table and the log are the callbacks' business, not standard output's.
        self.remove_callback(PrinterCallback)
        self.weights = config.position_decay ** torch.arange(window, dtype=torch.float32, device=model.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return training_loss(
            model, inputs, self.rule, self.weights, self.config.distillation, inverse=self.config.inverse
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.model.save_pretrained(cast(str, output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        cast(PTPModel, model or self.model).load_adapter(Path(resume_from_checkpoint))


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a tracker that transformers does not know, or that is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to names the unknown tracker '{name}'; known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"train.report_to names the tracker '{name}', which is not installed; install it (pip install {name}) "
                "or leave it out"
            )


def training_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    rule: SamplingRule,
    weights: Tensor,
    distillation: float,
    inverse: bool = False,
) -> Tensor:
    """Cross-entropy of the window's tokens, plus `distillation` times the KL to the teacher.

    batch: the fields of a `PackedBatch`; weights: (L,); inverse: u is drawn under the model's own distributions.
    """
    output = model(**batch, inverse=inverse)
    own = cast(PTPModel, getattr(model, "module", model))
    return loss_of(own, output, batch, weights, rule, distillation, inverse)


def targets_of(output: TrainingPass, batch: dict[str, Tensor], config: PTPConfig) -> Targets:
    """What the windows of a batch should predict."""
    return window_targets(batch["ids"], batch["span"], batch["starts"], output.mass, config.window, config.shift)


def trained_outputs(
    model: PTPModel, output: TrainingPass, batch: dict[str, Tensor], inverse: bool
) -> tuple[Tensor, Targets]:
    """Hidden states (B, N, K, H) that the loss is of, and what they should predict: those of windows, K = L.

    Inverse autoregressive training lowers −log of a window's whole likelihood. That of its first token, which the
    context predicts, belongs to it where the context learns: K = L + 1.
    """
    config, starts = model.ptp_config, batch["starts"]
    windows = output.windows.unflatten(1, (-1, config.window))
    if not (inverse and model.learns_to_read):
        return windows, targets_of(output, batch, config)
    states = torch.cat([states_before(starts, output.context).unsqueeze(2), windows], dim=2)
    first = config.shift - 1
    return states, window_targets(batch["ids"], batch["span"], starts, output.mass, config.window + 1, first)


def loss_of(
    model: PTPModel,
    output: TrainingPass,
    batch: dict[str, Tensor],
    weights: Tensor,
    rule: SamplingRule,
    distillation: float,
    inverse: bool,
) -> Tensor:
    """The loss of a training pass."""
    config = model.ptp_config
    states, targets = trained_outputs(model, output, batch, inverse)
    # C-PTP's windows are warped by the rule when they are used; the loss sees them so.
    warped = config.variant == "categorical" and rule.temperature > 0
    return window_loss(
        states,
        output.context,
        targets,
        # A window's first token weighs as much as what its first position predicts.
        F.pad(weights, (states.shape[2] - config.window, 0), value=1.0),
        rule,
        summed=partial(summed_loss, model.base_model),
        logits_of=model.logits,
        temperature=rule.temperature if warped else 1.0,
        distillation=distillation,
    )


@torch.no_grad()
def evaluate_windows(model: PTPModel, documents: Documents, config: TrainConfig, rule: SamplingRule) -> WindowMetrics:
    """Measure predictions on held-out documents, u uniform in its interval, one pass or more over them.

    Under inverse autoregressive training the loss is the one trained, but u drawn in a model's own intervals picks the
    right token whatever it predicts. What is right is told by intervals of who is to verify: those stored, or those of
    the context's distributions.
    """
    was_training = model.training
    model.eval()
    settings, window = model.ptp_config, model.ptp_config.window
    # One more number than the window has inputs: the u of the last target, which C-PTP picks with.
    stream = make_stream(documents, config.model_copy(update={"beta": 1.0}), window + 1)
    passes = -(-EVALUATION_WINDOWS // (len(stream) * config.windows_per_sequence))
    stream.length *= passes
    metrics = WindowMetrics.empty(settings)
    weights = torch.ones(window, device=model.device)
    for begin in range(0, len(stream), config.batch_size):
        items = [stream[i] for i in range(begin, min(begin + config.batch_size, len(stream)))]
        batch = {name: tensor.to(model.device) for name, tensor in collate(items).items()}
        output = model(**batch, inverse=config.inverse)
        loss = loss_of(model, output, batch, weights, rule, distillation=0.0, inverse=config.inverse)
        if config.inverse:
            output = model(**with_intervals(batch, output, model, rule))
        targets = targets_of(output, batch, settings)
        states, u = output.windows.flatten(0, 1), output.u[..., 1:].flatten()
        predicted = [
            predictions(model.logits(rows), numbers, settings, rule)
            for rows, numbers in zip(states.split(ROWS), u.split(ROWS), strict=True)
        ]
        metrics.add(torch.cat(predicted).view_as(targets.token_ids), targets, float(loss))
    model.train(was_training)
    return metrics


def with_intervals(
    batch: dict[str, Tensor], output: TrainingPass, model: PTPModel, rule: SamplingRule
) -> dict[str, Tensor]:
    """The batch with its stored intervals, or else those of the context's own distributions."""
    if "lower" in batch:
        return batch
    wanted = (batch["span"] >= 0) & (batch["positions"] > 0)
    lower, upper = token_intervals(output.context, model.logits, batch["ids"], wanted, rule)
    return batch | {"lower": lower, "upper": upper}


def make_stream(documents: Documents, config: TrainConfig, window: int) -> WindowStream:
    """The window stream a training configuration describes, one pass long."""
    return WindowStream(
        documents,
        sequence_length=config.sequence_length,
        num_windows=config.windows_per_sequence,
        window=window,
        beta=config.beta,
        seed=config.seed,
    )


def _arguments(config: TrainConfig, num_steps: int, output_dir: Path, bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=10,
        seed=config.seed,
        # Item i of the stream is already drawn from (seed, i).
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=list(config.report_to),
        disable_tqdm=True,
    )
