"""The next drafts, of the branch that came true: states of its positions → tokens, confidences (METHOD §4, step 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ptp.decoding.verification import by_rule
from ptp.model.proposal import propose
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule

Propose = Callable[..., list[Tensor]]
"""Logits (B, n, V), u (B, n) and, for a soft pick, blur (B, n) → tokens and confidences, each (B, n)."""


def draft(
    model: PTPModel,
    rules: Sequence[SamplingRule],
    states: Tensor,
    logits_of: LogitsOf,
    u: Tensor,
    bonus: Tensor,
    before: Tensor,
) -> list[Tensor]:
    """Drafts and calibrated confidences, each (B, W − lead), of B branches of W positions.

    rules: (B,), by which the texts are sampled. states: (B, W, H); logits_of: makes logits of them, all or a position.
    u: (B, W), of the tokens that the positions propose. bonus: (B, 1), the tokens in front of the first drafts; O-PTP's
    first position proposes it anew. before: (B, chain), the tokens in front of it, the nearest first.
    """
    lead = model.ptp_config.lead

    def proposed(logits: Tensor, u: Tensor, *blur: Tensor) -> list[Tensor]:
        return by_rule(rules, partial(_by, model), logits, u, *blur)

    if model.chain is None:
        tokens, confidences = proposed(logits_of(states), u, *_blur(model, states))
    else:
        tokens, confidences = _one_by_one(model, proposed, states, logits_of, u, bonus, before)
    foreseen = tokens[:, :1] == bonus if lead else None
    return [tokens[:, lead:], model.calibration(confidences[:, lead:], foreseen)]


def _one_by_one(
    model: PTPModel,
    proposed: Propose,
    states: Tensor,
    logits_of: LogitsOf,
    u: Tensor,
    bonus: Tensor,
    before: Tensor,
) -> list[Tensor]:
    """What a chain proposes: each position knows the tokens of those before it."""
    lead = model.ptp_config.lead
    known = before if lead else torch.cat([bonus, before], dim=1)[:, : before.shape[1]]
    found = []
    for index in range(states.shape[1]):
        here = slice(index, index + 1)
        state = model.chained(states[:, here], known.unsqueeze(1))
        found.append(proposed(logits_of(state), u[:, here], *_blur(model, state)))
        token = bonus if index < lead else found[-1][0]
        known = torch.cat([token, known], dim=1)[:, : before.shape[1]]
    return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def _by(model: PTPModel, rule: SamplingRule, *rows: Tensor) -> list[Tensor]:
    return list(propose(model.ptp_config, rule, *rows))


def _blur(model: PTPModel, states: Tensor) -> list[Tensor]:
    return [] if model.blur is None else [model.blur(states)]
