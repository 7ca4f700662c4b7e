"""Loss and metrics of a training pass, as pure functions of tensors (METHOD §3).

Shapes: B sequences, S packed tokens, N windows of L positions, V vocabulary. K kinds of drafts for each position: with
a position of their own and, where the model continues, without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp.config import PTPConfig
from ptp.model.proposal import propose
from ptp.sampling import LogitsOf, SamplingRule, warp
from ptp.soft_pick import negative_log_chance, probabilities, soft_pick, upper_edges


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


@dataclass(frozen=True)
class WindowLoss:
    """What windows lose and propose.

    total: () weighted sum over valid targets, with gradient. cross_entropy: () sum without weights or divergence.
    predicted: (B, N, L, K, C) int64 proposed tokens and float32 confidences, the likeliest of C candidates first, 0
    where no target is valid; None where none were asked for.
    """

    total: Tensor
    cross_entropy: Tensor
    predicted: tuple[Tensor, Tensor] | None


def window_loss(
    windows: Tensor,
    context: Tensor,
    targets: Targets,
    weights: Tensor,
    config: PTPConfig,
    rule: SamplingRule,
    *,
    summed: Callable[..., Tensor],
    logits_of: LogitsOf,
    u: Tensor | None = None,
    blur: Tensor | None = None,
    distillation: float = 0.0,
) -> WindowLoss:
    """Weighted sum over valid positions of (1 − d) · −log P(target) + d · KL(teacher ‖ window), d = `distillation`.

    With a soft pick P(target) is the chance that u picks it. That term counts in full, for the blur has no other; the
    share d of its gradient in the window's distribution is left out.

    windows: (B, N, L, K, H), context: (B, S, H), hidden states of windows and base model; weights: (L,). summed: sums
    a loss over rows of hidden states and of further numbers, and `logits_of` makes logits of the context's, both a part
    at a time. u: (B, N, L), of the targets; without it nothing is proposed. blur: (B, N, L, K), for a soft pick. The
    teacher's distribution is the rule's, in the row before a target, for all kinds of drafts of which it is made once.
    """
    # Once: how many there are is known on the device alone, and each look waits for it.
    valid = sequence, _, index = torch.nonzero(targets.valid, as_tuple=True)
    states, before = windows[valid], targets.index[valid] - 1
    num_kinds = states.shape[1]
    tokens = targets.token_ids[valid].unsqueeze(1).expand(-1, num_kinds)
    share = weights[index].unsqueeze(1)
    entropies = share.new_zeros(tokens.shape)
    proposed, confidences = (part.new_zeros(*tokens.shape, config.num_candidates) for part in (tokens, share))
    numbers = u[valid].unsqueeze(1).expand(-1, num_kinds) if u is not None else None
    # C-PTP's windows are warped by the rule when they are used; the loss sees them so.
    temperature = rule.temperature if config.variant == "categorical" and rule.temperature > 0 else 1.0

    def loss(logits: Tensor, *rest: Any) -> Tensor:
        *own, part = rest
        asked = [tokens[part].unsqueeze(-1)]
        if distillation > 0:
            with torch.no_grad():
                teacher = warp(logits_of(context[sequence[part], before[part]]), rule)
            asked.append(teacher.token_ids.unsqueeze(1).expand(-1, num_kinds, -1))
        probs, *log_probs = log_probabilities(logits, temperature, *asked)
        entropy, upper = -log_probs[0].squeeze(-1), None
        if not own:
            losses = (1 - distillation) * entropy
        elif rule.temperature == 0:
            # The blur's gradient is 0, not absent: every weight that several processes train must have one.
            losses = _slowed(entropy, 1 - distillation) + 0 * own[0]
        else:
            assert numbers is not None, "a soft pick has its u"
            if distillation < 1:
                probs = probabilities(_slowed(logits, 1 - distillation), rule)
            upper = upper_edges(probs, rule.order)
            losses = entropy = negative_log_chance(probs, upper, tokens[part], numbers[part], own[0])
        if distillation > 0:
            losses = losses + distillation * divergence(log_probs[1], teacher.probs.unsqueeze(1))
        total = (losses * share[part]).sum()
        # Last, for a backward pass that makes the logits again stops where it has what it needs.
        with torch.no_grad():
            entropies[part] = entropy
            if numbers is not None:
                if own:
                    found = soft_pick(probs, upper, numbers[part], own[0])
                else:
                    # Cross-entropy has made this sum over the vocabulary; another pass would be felt.
                    totals = entropy + logits.gather(-1, asked[0]).squeeze(-1).float()
                    found = propose(config, rule, logits, numbers[part], totals=totals)
                proposed[part], confidences[part] = (each[..., : config.num_candidates] for each in found)
        return total

    total = summed(loss, states, *([blur[valid]] if blur is not None else []))

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(*targets.valid.shape, *values.shape[1:]).index_put(valid, values)

    predicted = (placed(proposed), placed(confidences)) if u is not None else None
    return WindowLoss(total, entropies.sum(), predicted)


def _slowed(values: Tensor, share: float) -> Tensor:
    """The same values, to which but a share of their gradient goes back."""
    if share in (0, 1):
        return values if share else values.detach()
    return values * share + values.detach() * (1 - share)


def divergence(log_probs: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student), (...), of the tokens to which the teacher may give mass, (..., M).

    log_probs: the student's; teacher: probabilities, broadcast against them.
    """
    return torch.where(teacher == 0, 0, teacher * (teacher.log() - log_probs)).sum(-1)


def log_probabilities(logits: Tensor, temperature: float, *token_ids: Tensor) -> tuple[Tensor, ...]:
    """All probabilities, (..., V), which have no gradient, and the log-probabilities of some tokens; float32.

    logits: (..., V); token_ids: each (..., M) of some M, as are their log-probabilities. As `log_softmax` and `gather`
    of logits / temperature, in fewer passes over the vocabulary: there and back, these are most of what a step of a
    large one costs.
    """
    found: tuple[Tensor, ...] = _LogProbabilities.apply(logits, temperature, *token_ids)
    return found


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, *token_ids: Tensor) -> tuple[Tensor, ...]:
        scores = logits.float()
        if temperature != 1:
            scores = scores / temperature
        scores = scores.log_softmax(-1)
        log_probs = [scores.gather(-1, ids) for ids in token_ids]
        probs = scores.exp_()
        ctx.save_for_backward(probs, *token_ids)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(probs)
        # Else zeros would be made for the gradient that probs has none of.
        ctx.set_materialize_grads(False)
        return probs, *log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        probs, *token_ids = ctx.saved_tensors
        found = [(ids, grad) for ids, grad in zip(token_ids, grad_outputs[1:], strict=True) if grad is not None]
        gradient = probs * (-sum(grad.sum(-1, keepdim=True) for _, grad in found) / ctx.temperature)
        for ids, grad in found:
            gradient.scatter_add_(-1, ids, grad / ctx.temperature)
        return (gradient.to(ctx.dtype), None, *[None] * len(token_ids))
