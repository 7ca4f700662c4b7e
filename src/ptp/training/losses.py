"""Loss and metrics of a training pass, as pure functions of tensors (METHOD §3).

Shapes: B sequences, S packed tokens, N windows of L positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ptp.sampling import SamplingRule, warp


@dataclass(frozen=True)
class Targets:
    """What each window position should predict.

    token_ids: (B, N, L) int64. index: (B, N, L) int64, packed index of the target. valid: (B, N, L) bool, inside the
    window's own span and given mass by the rule. in_span: (B, N, L) bool, valid or without mass.
    """

    token_ids: Tensor
    index: Tensor
    valid: Tensor
    in_span: Tensor


def window_targets(ids: Tensor, span: Tensor, starts: Tensor, mass: Tensor, window: int, shift: int) -> Targets:
    """Targets of windows that start at `starts`: the position after each input's, start + shift + 1 + k.

    A span that the model would end has its end token as its last id, so that token is trained; past it, and past the
    end of a span that was cut off, nothing is.
    """
    index = starts.unsqueeze(-1) + torch.arange(window, device=starts.device) + shift + 1
    inside = index < ids.shape[1]
    flat = index.clamp(max=ids.shape[1] - 1).flatten(1)
    owner = span.gather(1, starts).unsqueeze(-1)
    in_span = inside & (span.gather(1, flat).view_as(index) == owner)
    return Targets(
        token_ids=ids.gather(1, flat).view_as(index),
        index=flat.view_as(index),
        valid=in_span & mass.gather(1, flat).view_as(index),
        in_span=in_span,
    )


def cross_entropy(logits: Tensor, targets: Targets, weights: Tensor) -> Tensor:
    """Weighted mean of −log P(target) over valid positions. logits: (B, N, L, V); weights: (L,)."""
    valid = targets.valid
    weights = weights.expand(valid.shape)[valid]
    losses = F.cross_entropy(logits[valid].float(), targets.token_ids[valid], reduction="none")
    return (losses * weights).sum() / weights.sum().clamp(min=1e-9)


def divergence(logits: Tensor, teacher_logits: Tensor, targets: Targets, rule: SamplingRule, weights: Tensor) -> Tensor:
    """Weighted mean of KL(teacher ‖ window) at the rule's temperature over valid positions.

    logits: (B, N, L, V); teacher_logits: (B, S, V), the base model's, whose row before a target predicts it.
    """
    valid = targets.valid
    before = (targets.index - 1)[valid]
    rows = torch.arange(len(valid), device=valid.device)[:, None, None].expand(valid.shape)[valid]
    teacher = warp(teacher_logits[rows, before], rule).dense(logits.shape[-1])
    student = F.log_softmax(logits[valid].float(), dim=-1)
    losses = (torch.xlogy(teacher, teacher) - teacher * student).sum(-1)
    weights = weights.expand(valid.shape)[valid]
    return (losses * weights).sum() / weights.sum().clamp(min=1e-9)
