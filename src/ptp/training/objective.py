"""What training minimises and evaluation measures: a pass over windows, its loss and its counts (METHOD §3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp.config import TrainConfig
from ptp.data.documents import Documents
from ptp.data.packing import WindowStream, collate
from ptp.model.head import summed_loss
from ptp.model.proposal import tokens_before
from ptp.model.ptp_model import PTPModel, TrainingPass, states_before
from ptp.sampling import SamplingRule
from ptp.training.losses import Targets, window_loss, window_targets
from ptp.training.metrics import WindowMetrics

EVALUATION_WINDOWS = 2000
"""Windows the acceptance profile is measured on, at least."""


@dataclass(frozen=True)
class Objective:
    """What a training minimises: cross-entropy of the windows' tokens, and more.

    rule: the sampling rule of the data. weights: (L,) of window indices. distillation: share of the KL to the teacher,
    that of the cross-entropy being the rest. inverse: u is drawn under the model's own distributions.
    """

    rule: SamplingRule
    weights: Tensor
    distillation: float = 0.0
    inverse: bool = False

    def learns_first(self, model: PTPModel) -> bool:
        """Whether a window's first token, which the context predicts, is one of its targets.

        Inverse autoregressive training lowers −log of a window's whole likelihood. That of its first token is a
        constant unless the context learns.
        """
        return self.inverse and model.learns_to_read

    def target_weights(self, model: PTPModel) -> Tensor:
        """(K,): a window's first token, where it is a target, weighs as much as what its first position predicts."""
        return F.pad(self.weights, (int(self.learns_first(model)), 0), value=1.0)

    def num_items(self, batch: dict[str, Tensor], model: PTPModel) -> Tensor:
        """() the summed weights of a batch's targets, with those to which the rule will turn out to give no mass."""
        everything = torch.ones_like(batch["span"], dtype=torch.bool)
        targets = targets_of(batch, everything, model, self.learns_first(model))
        weights = self.target_weights(model).to(batch["span"].device)
        return (targets.in_span * weights).sum() * model.ptp_config.num_kinds


def measured_pass(model: nn.Module, batch: dict[str, Tensor], objective: Objective) -> tuple[Tensor, WindowMetrics]:
    """A training pass over the fields of a `PackedBatch`: the loss, a sum over its targets, and the counts.

    model: a `PTPModel`, or what an engine has wrapped around one. Under an `inverse` objective, u picks the right token
    whatever the model predicts, and nothing is counted as right or wrong.
    """
    return model(**batch, inverse=objective.inverse, then=partial(_measure, _unwrapped(model), batch, objective))


def targets_of(batch: dict[str, Tensor], mass: Tensor, model: PTPModel, first: bool) -> Targets:
    """What the windows of a batch should predict, (B, N, L), or (B, N, L + 1) with their first tokens.

    mass: (B, S) bool, whether the rule gives a token any.
    """
    config = model.ptp_config
    return window_targets(
        batch["ids"], batch["span"], batch["starts"], mass, config.window + first, config.shift - first
    )


def trained_states(output: TrainingPass, batch: dict[str, Tensor], model: PTPModel, first: bool) -> Tensor:
    """The hidden states (B, N, L, kinds, H), or of L + 1, that predict the targets of `targets_of`.

    Of each target that of a window's position and, where the model continues, the one it has without.
    """
    windows = output.windows.unflatten(1, (-1, model.ptp_config.window))
    anchor = states_before(batch["starts"], output.context)
    if first:
        windows = torch.cat([anchor.unsqueeze(2), windows], dim=2)
    kinds = [windows] if model.continuation is None else [windows, model.continuation(anchor)]
    return torch.stack(kinds, dim=3)


def _measure(
    model: PTPModel, batch: dict[str, Tensor], objective: Objective, output: TrainingPass
) -> tuple[Tensor, WindowMetrics]:
    config, rule, first = model.ptp_config, objective.rule, objective.learns_first(model)
    targets = targets_of(batch, output.mass, model, first)
    before = tokens_before(batch["ids"], batch["positions"], targets.index, config.chain)
    states = model.chained(trained_states(output, batch, model, first), before.unsqueeze(-2))
    u = output.u[..., config.shift + 1 :][..., : config.window]
    loss = window_loss(
        states,
        output.context,
        targets,
        objective.target_weights(model).to(batch["span"].device),
        config,
        rule,
        summed=partial(summed_loss, model.base_model),
        logits_of=model.logits,
        u=None if objective.inverse else u,
        blur=None if model.blur is None else model.blur(states),
        distillation=objective.distillation,
    )
    num_tokens = (batch["document"] >= 0).sum()
    return loss.total, WindowMetrics.of(loss.predicted, targets, loss.cross_entropy, num_tokens, config)


@torch.no_grad()
def evaluate_windows(
    model: nn.Module, documents: Documents, config: TrainConfig, rule: SamplingRule, rank: int = 0, world_size: int = 1
) -> WindowMetrics:
    """Measure predictions on held-out documents, u uniform in its interval: the share of one of several processes.

    Enough passes are made for `EVALUATION_WINDOWS`. Under inverse autoregressive training the loss is the one trained;
    what is right is told by intervals of who is to verify: those stored, or those of the context's distributions.
    """
    own = _unwrapped(model)
    was_training = model.training
    model.eval()
    objective = Objective(rule, torch.ones(own.ptp_config.window))
    stream = make_stream(documents, config.model_copy(update={"beta": 1.0}), own.ptp_config.window)
    stream.length *= -(-EVALUATION_WINDOWS // (len(stream) * config.windows_per_sequence))
    metrics = WindowMetrics.zeros(own.ptp_config)
    num_batches = -(-len(stream) // config.batch_size)
    for number in range(rank, -(-num_batches // world_size) * world_size, world_size):
        # Processes that share the weights call the model together: one that has no batch left repeats the first.
        counts = number < num_batches
        begin = number * config.batch_size if counts else 0
        items = [stream[i] for i in range(begin, min(begin + config.batch_size, len(stream)))]
        batch = {name: tensor.to(own.device) for name, tensor in collate(items).items()}
        found = measured_pass(model, batch, objective)[1]
        if config.inverse:
            trained = measured_pass(model, batch, replace(objective, inverse=True))[1]
            found = replace(found, cross_entropy=trained.cross_entropy, scored=trained.scored)
        metrics = metrics + found if counts else metrics
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


def _unwrapped(model: nn.Module) -> PTPModel:
    return cast(PTPModel, getattr(model, "module", model))
