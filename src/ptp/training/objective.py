"""What training minimises and evaluation measures: a pass over windows, its loss and its counts (METHOD §3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ptp.config import PTPConfig, TrainConfig
from ptp.data.documents import Documents
from ptp.data.packing import WindowStream, collate
from ptp.model.head import summed_loss
from ptp.model.ptp_model import PTPModel, TrainingPass
from ptp.sampling import SamplingRule
from ptp.training.losses import Predict, Targets, window_loss, window_targets
from ptp.training.metrics import WindowMetrics, predictions

EVALUATION_WINDOWS = 2000
"""Windows the acceptance profile is measured on, at least."""


@dataclass(frozen=True)
class Objective:
    """What a training minimises: cross-entropy of the windows' tokens, and more.

    rule: the sampling rule of the data. weights: (L,) of window indices. distillation: weight of the KL to the
    teacher beside the cross-entropy's 1.
    """

    rule: SamplingRule
    weights: Tensor
    distillation: float = 0.0

    def num_items(self, batch: dict[str, Tensor], config: PTPConfig) -> Tensor:
        """() the summed weights of a batch's targets, with those to which the rule will turn out to give no mass."""
        everything = torch.ones_like(batch["span"], dtype=torch.bool)
        targets = targets_of(batch, everything, config)
        return (targets.in_span * self.weights.to(targets.in_span.device)).sum()


def measured_pass(model: nn.Module, batch: dict[str, Tensor], objective: Objective) -> tuple[Tensor, WindowMetrics]:
    """A training pass over the fields of a `PackedBatch`: the loss, a sum over its targets, and the counts.

    model: a `PTPModel`, or what an engine has wrapped around one.
    """
    own = cast(PTPModel, getattr(model, "module", model))
    return model(**batch, then=partial(_measure, own, batch, objective))


def targets_of(batch: dict[str, Tensor], mass: Tensor, config: PTPConfig) -> Targets:
    """What the windows of a batch should predict; mass: (B, S) bool, whether the rule gives a token any."""
    return window_targets(batch["ids"], batch["span"], batch["starts"], mass, config.window, config.shift)


def _measure(
    model: PTPModel, batch: dict[str, Tensor], objective: Objective, output: TrainingPass
) -> tuple[Tensor, WindowMetrics]:
    config, rule = model.ptp_config, objective.rule
    targets = targets_of(batch, output.mass, config)
    # C-PTP's windows are warped by the rule when they are used; the loss sees them so.
    warped = config.variant == "categorical" and rule.temperature > 0
    u = output.u[..., config.shift + 1 :][..., : config.window][targets.valid]

    def predict(logits: Tensor, part: slice) -> Tensor:
        return predictions(logits, u[part], config, rule)

    loss = window_loss(
        output.windows.unflatten(1, (-1, config.window)),
        output.context,
        targets,
        objective.weights.to(u.device),
        rule,
        summed=partial(summed_loss, model.base_model),
        logits_of=model.logits,
        predict=cast(Predict, predict),
        temperature=rule.temperature if warped else 1.0,
        distillation=objective.distillation,
    )
    num_tokens = (batch["document"] >= 0).sum()
    return loss.total, WindowMetrics.of(loss.predicted, targets, loss.cross_entropy, num_tokens, config)


@torch.no_grad()
def evaluate_windows(
    model: PTPModel, documents: Documents, config: TrainConfig, rule: SamplingRule, rank: int = 0, world_size: int = 1
) -> WindowMetrics:
    """Measure predictions on held-out documents, u uniform in its interval: the part that one of several processes does.

    Enough passes are made for `EVALUATION_WINDOWS`, and batches enough that every process has as many.
    """
    was_training = model.training
    model.eval()
    objective = Objective(rule, torch.ones(model.ptp_config.window))
    stream = make_stream(documents, config.model_copy(update={"beta": 1.0}), model.ptp_config.window)
    passes = -(-EVALUATION_WINDOWS // (len(stream) * config.windows_per_sequence))
    num_batches = -(-passes * len(stream) // (config.batch_size * world_size))
    stream.length = num_batches * config.batch_size * world_size
    metrics = WindowMetrics.zeros(model.ptp_config)
    for number in range(rank, num_batches * world_size, world_size):
        items = [stream[number * config.batch_size + place] for place in range(config.batch_size)]
        batch = {name: tensor.to(model.device) for name, tensor in collate(items).items()}
        metrics = metrics + measured_pass(model, batch, objective)[1]
    model.train(was_training)
    return metrics


def make_stream(documents: Documents, config: TrainConfig, window: int) -> WindowStream:
    """The window stream a training configuration describes, one pass long."""
    return WindowStream(
        documents,
        sequence_length=config.sequence_length,
        num_windows=config.windows_per_sequence,
        # One u more than the window has inputs: that of the last target, which C-PTP picks with.
        window=window + 1,
        beta=config.beta,
        seed=config.seed,
    )
