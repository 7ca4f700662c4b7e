"""Training a PTP model: `transformers.Trainer` with our loss, data and checkpoints (METHOD §3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ptp.config import TrainConfig
from ptp.data.packing import Completion, WindowStream, collate
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.training.losses import cross_entropy, divergence, window_targets
from ptp.training.metrics import WindowMetrics, predictions
from ptp.training.optimizers import make_optimizer

EVALUATION_WINDOWS = 2000
"""Windows the acceptance profile is measured on, at least."""


class PTPTrainer(Trainer):
    """Trains the LoRA and the auxiliary embedding of a `PTPModel`; a checkpoint's weights are an adapter directory."""

    model: PTPModel

    def __init__(
        self,
        model: PTPModel,
        config: TrainConfig,
        rule: SamplingRule,
        completions: Sequence[Completion],
        output_dir: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config = config
        self.rule = rule
        window = model.ptp_config.window
        super().__init__(
            model=model,
            args=_arguments(config, output_dir),
            train_dataset=make_stream(completions, config, window, length=config.max_steps * config.batch_size),
            data_collator=collate,
            optimizers=(make_optimizer(config.optimizer, model.named_parameters(), config.learning_rate), None),
            callbacks=list(callbacks),
        )
        # The live table and the log are the callbacks' business, not standard output's.
        self.remove_callback(PrinterCallback)
        self.weights = config.position_decay ** torch.arange(window, dtype=torch.float32, device=model.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return training_loss(model, inputs, self.rule, self.weights, self.config.distillation)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.model.save_pretrained(cast(str, output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        cast(PTPModel, model or self.model).load_adapter(Path(resume_from_checkpoint))


def training_loss(
    model: nn.Module, batch: dict[str, Tensor], rule: SamplingRule, weights: Tensor, distillation: float
) -> Tensor:
    """Cross-entropy of the window's tokens, plus `distillation` times the KL to the teacher.

    batch: the fields of a `PackedBatch`; weights: (L,).
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "mass"}
    output = model(**inputs, context_logits=distillation > 0)
    config = cast(PTPModel, getattr(model, "module", model)).ptp_config
    targets = window_targets(
        batch["ids"], batch["document"], batch["starts"], batch["mass"], config.window, config.shift
    )
    logits = scaled(output.windows.unflatten(1, batch["u"].shape[1:]), config.variant, rule)
    loss = cross_entropy(logits, targets, weights)
    if distillation > 0:
        loss = loss + distillation * divergence(logits, output.context, targets, rule, weights)
    return loss


def scaled(logits: Tensor, variant: str, rule: SamplingRule) -> Tensor:
    """Logits as the loss sees them: C-PTP's windows are warped by the rule when they are used, so are these."""
    return logits / rule.temperature if variant == "categorical" and rule.temperature > 0 else logits


@torch.no_grad()
def evaluate_windows(
    model: PTPModel, completions: Sequence[Completion], config: TrainConfig, rule: SamplingRule
) -> WindowMetrics:
    """Measure predictions on held-out completions, u uniform in its interval, one pass or more over them."""
    was_training = model.training
    model.eval()
    window = model.ptp_config.window
    # One more number than the window has inputs: the u of the last target, which C-PTP picks with.
    stream = make_stream(completions, config.model_copy(update={"beta": 1.0}), window + 1, length=None)
    passes = -(-EVALUATION_WINDOWS // (len(stream) * config.windows_per_sequence))
    stream.length *= passes
    metrics = WindowMetrics.empty(model.ptp_config)
    weights = torch.ones(window, device=model.device)
    for begin in range(0, len(stream), config.batch_size):
        items = [stream[i] for i in range(begin, min(begin + config.batch_size, len(stream)))]
        batch = {name: tensor.to(model.device) for name, tensor in collate(items).items()}
        u = batch["u"]
        logits = model(
            batch["ids"], batch["document"], batch["positions"], batch["starts"], u[..., :window]
        ).windows.unflatten(1, (u.shape[1], window))
        targets = window_targets(
            batch["ids"], batch["document"], batch["starts"], batch["mass"], window, model.ptp_config.shift
        )
        loss = cross_entropy(scaled(logits, model.ptp_config.variant, rule), targets, weights)
        metrics.add(predictions(logits, u[..., 1:], model.ptp_config, rule), targets, float(loss))
    model.train(was_training)
    return metrics


def make_stream(
    completions: Sequence[Completion], config: TrainConfig, window: int, length: int | None
) -> WindowStream:
    """The window stream a training configuration describes."""
    return WindowStream(
        completions,
        sequence_length=config.sequence_length,
        num_windows=config.windows_per_sequence,
        window=window,
        beta=config.beta,
        seed=config.seed,
        length=length,
    )


def _arguments(config: TrainConfig, output_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=10,
        seed=config.seed,
        # Item i of the stream is already drawn from (seed, i).
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )
