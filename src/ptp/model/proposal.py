"""From the states of a window to what they propose, one position after the other (METHOD §4).

    state of position k ──► Chain, with the tokens before its token ──► head ──► soft pick, with u and Blur ──► token
                                             ▲                                                           │
                                             └──────────────── of position k + 1 ◄───────────────────────┘

All states come out of one call, in which no position knows the tokens of those before it, only their u. But a draft
counts only if all drafts before it are right, and the first of them follows a verified token: so the tokens before it
may be taken as known. In training they are the text's own, and all positions are computed at once.

A draft that has no position in the call has no state of its own. It is proposed in the same way from the state by which
the base model predicts the bonus token, and which every call computes for that: `Continuation`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp.config import PTPConfig
from ptp.sampling import SamplingRule, draw, warp
from ptp.soft_pick import probabilities, soft_pick, upper_edges

UNKNOWN = -1
"""In place of a token's id: there is none, for the text has just begun."""

FIRST_BLUR = -2.0
"""Of an untrained network, through `softplus`: an eighth of [0, 1)."""

LEAST_BLUR = 1e-3


class Chain(nn.Module):
    """Corrects a state by the tokens directly before the one that it is to propose (as in Hydra, Ankner et al. 2024).

    num_tokens: how many. size: hidden numbers of the correction. Untrained, it changes nothing.
    """

    def __init__(self, num_tokens: int, size: int, hidden_size: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.state = nn.Linear(hidden_size, size, bias=False)
        self.tokens = nn.ModuleList(nn.Linear(hidden_size, size, bias=False) for _ in range(num_tokens))
        self.write = nn.Linear(size, hidden_size, bias=False)
        nn.init.zeros_(self.write.weight)

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        """Corrected states (..., H). states: (..., H); before: (..., num_tokens, H), embeddings, the nearest first."""
        dtype = self.write.weight.dtype
        own, before = states.to(dtype), before.to(dtype)
        hidden = self.state(own)
        for place, read in enumerate(self.tokens):
            hidden = hidden + read(before[..., place, :])
        return (own + self.write(F.silu(hidden))).to(states.dtype)


class Continuation(nn.Module):
    """States of drafts that have no position of their own, from the base model's that predicts the bonus token.

    A vector for each place is added to it, and the chain makes of it what follows the tokens that it is shown. Such
    drafts take no position until they are verified, and are somewhat worse than those of a window, which reads the
    context for each of them anew.
    """

    def __init__(self, window: int, hidden_size: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(window, hidden_size))

    def forward(self, anchor: Tensor) -> Tensor:
        """States (..., L, H) of a window's places. anchor: (..., H), the base model's that predicts the bonus token."""
        dtype = self.places.dtype
        return (anchor.unsqueeze(-2).to(dtype) + self.places).to(anchor.dtype)


class Blur(nn.Module):
    """How far the edges of a state's intervals may be off, as `ptp.soft_pick` takes it: (..., H) → (...) float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, FIRST_BLUR)

    def forward(self, states: Tensor) -> Tensor:
        return positive(self.linear(states.to(self.linear.weight.dtype)).squeeze(-1))


def positive(raw: Tensor) -> Tensor:
    """A blur of any number that a network gives, float32."""
    return F.softplus(raw.float()) + LEAST_BLUR


def tokens_before(ids: Tensor, positions: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Ids (B, ..., num_tokens) of the tokens before those at `index`, the nearest first, `UNKNOWN` before a text.

    ids, positions: (B, S), packed, positions counting from each document's beginning. index: (B, ...).
    """
    flat = index.flatten(1)
    steps = torch.arange(1, num_tokens + 1, device=ids.device)
    place = (flat.unsqueeze(-1) - steps).clamp(min=0)
    found = ids.gather(1, place.flatten(1)).view_as(place)
    begins = positions.gather(1, flat).unsqueeze(-1) < steps
    return found.masked_fill(begins, UNKNOWN).view(*index.shape, num_tokens)


def propose(
    config: PTPConfig,
    rule: SamplingRule,
    logits: Tensor,
    u: Tensor,
    blur: Tensor | None = None,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens that each window position proposes, and its confidence in them: int64 and float32.

    Each (..., `config.num_candidates`), the likeliest first. logits: (..., V); u: (...), the numbers of the tokens to
    propose, which a one-hot window does not read here. blur: (...), for a soft pick. totals: (...), the logits'
    `logsumexp`, of one-hot windows, where it is known already.
    """
    if config.variant == "one_hot":
        best = logits.float().max(-1, keepdim=True)
        totals = logits.float().logsumexp(-1) if totals is None else totals
        return best.indices, (best.values - totals.unsqueeze(-1)).exp()
    if config.picks_softly:
        assert blur is not None, "a soft pick needs its blur"
        probs = probabilities(logits, rule)
        upper = None if rule.temperature == 0 else upper_edges(probs, rule.order)
        tokens, chances = soft_pick(probs, upper, u, blur)
        return tokens[..., : config.num_candidates], chances[..., : config.num_candidates]
    distribution = warp(logits, rule)
    # No u lies in an interval that is no number; that there are such, the loss will tell.
    token, lower, upper = draw(replace(distribution, upper=distribution.upper.nan_to_num(1.0)), u)
    return token.unsqueeze(-1), (upper - lower).unsqueeze(-1)
