"""What of a decoding call runs on the device (METHOD §4, steps 1 and 4).

    Reading: what the layers read and gave ── settle: head, u ──► Settled ── draft: chain, soft pick ──► drafts, chances

Pure functions of tensors. Compiled, none looks at a value and no shape depends on what proves right, so that each is
one graph; as they are, they look where that saves work (`ptp.sampling.warp`, `ptp.decoding.drafting.Drafter`).

Shapes: B texts, T positions of the call, R verify rows of a text, C candidates for a draft, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptp.decoding.drafting import Drafter
from ptp.decoding.layout import CallLayout
from ptp.decoding.verification import by_rule
from ptp.model.head import layers_of
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule, pick, warp

MOST_COMPILED = 64
"""Forms of a function that may be compiled. torch counts those of all models of a process together, and beyond its own
limit of 8 runs the function as it is."""


@dataclass(frozen=True)
class Reading:
    """What a forward call of B texts read, and the hidden states it gave.

    tokens: (B, gate_start), at its verify positions. recent: (B, chain), the tokens before those, the nearest last.
    u: (B, n), of the tokens behind those that each text has written, as many as a call can settle and draft. states:
    (B, T, H); logits: (B, n, V) of the first n positions, if they were made at once.
    """

    layout: CallLayout
    tokens: Tensor
    recent: Tensor
    u: Tensor
    states: Tensor
    logits: Tensor | None

    def states_at(self, index: Tensor) -> Tensor:
        """Hidden states (B, n, H) at positions (B, n)."""
        return _rows(self.states, index)

    def logits_at(self, index: Tensor, head: LogitsOf) -> Tensor:
        """Logits (B, n, V) at positions (B, n), of those that were made at once if they were."""
        return head(self.states_at(index)) if self.logits is None else _rows(self.logits, index)

    def tokens_until(self, index: Tensor, num_tokens: int) -> Tensor:
        """The tokens (B, num_tokens) up to a verify position (B, 1), the nearest first."""
        tokens = torch.cat([self.recent, self.tokens], dim=1)
        steps = torch.arange(num_tokens, device=index.device)
        return tokens.gather(1, index + self.recent.shape[1] - steps)


@dataclass(frozen=True)
class Settled:
    """What a call settles of B texts, on the device.

    true_tokens: (B, R), what the base model writes at each verify row. num_accepted: (B, 1), drafts that are right.
    second: (B, 1), the position of the second candidate that is right in place of the next, or −1. bonus: (B, 1), the
    last token settled. logits: (B, R, V) of the verify rows; logits_behind: (B, 1, V) of the second candidate's.
    """

    true_tokens: Tensor
    num_accepted: Tensor
    bonus: Tensor
    second: Tensor
    logits: Tensor
    logits_behind: Tensor | None = None

    def logits_of(self, row: int, goes_on: bool) -> Tensor:
        """Logits (R, V) that chose a text's tokens. goes_on: the last of them stands behind a second candidate."""
        if not goes_on:
            return self.logits[row]
        assert self.logits_behind is not None
        return torch.cat([self.logits[row, : 1 + int(self.num_accepted[row])], self.logits_behind[row]])


def settle(reading: Reading, head: LogitsOf, rules: Sequence[SamplingRule], seconds: bool) -> Settled:
    """Drafts count up to the first that is not what the base model writes with that u.

    rules: (B,), by which the texts are sampled. seconds: whether there may be second candidates.
    """
    layout, logits = reading.layout, reading.logits_at(reading.layout.verify, head)
    num_rows = logits.shape[1]
    (true_tokens,) = by_rule(rules, _picked, logits, reading.u[:, :num_rows])
    drafts = reading.tokens.gather(1, layout.verify)[:, 1:]
    place = torch.arange(1, num_rows, device=logits.device)
    right = (drafts == true_tokens[:, :-1]) & (place <= layout.num_drafts.unsqueeze(1))
    num_accepted = right.cumprod(1).sum(1, keepdim=True)
    bonus = true_tokens.gather(1, num_accepted)
    second = layout.second.gather(1, num_accepted)
    if not seconds:
        return Settled(true_tokens, num_accepted, bonus, second, logits)
    # In place of the wrong draft, its second candidate may be what is right, and the text goes on behind that.
    index = second.clamp(min=0)
    second = torch.where(reading.tokens.gather(1, index) == bonus, second, -1)
    logits_behind = reading.logits_at(index, head)
    (behind,) = by_rule(rules, _picked, logits_behind, reading.u.gather(1, num_accepted + 1))
    bonus = torch.where(second >= 0, behind, bonus)
    return Settled(true_tokens, num_accepted, bonus, second, logits, logits_behind)


def draft(
    reading: Reading,
    settled: Settled,
    drafter: Drafter,
    rules: Sequence[SamplingRule],
    num_states: int,
) -> list[Tensor]:
    """Drafts and their chances, (B, ≤ num_states − lead, C) each, behind what came true (see `Drafter`).

    num_states: drafts of the text that is to have most, with the lead; what lies past a branch's own is continued, or
    else padding. rules: (B,).
    """
    layout, model, device = reading.layout, drafter.model, reading.tokens.device
    config = model.ptp_config
    if not num_states:
        nothing = settled.bonus.new_zeros(len(rules), 0, config.num_candidates)
        return [nothing, nothing]
    num_accepted, second = settled.num_accepted, settled.second
    goes_on = second >= 0
    steps = torch.arange(num_states, device=device)
    index = (layout.starts.gather(1, num_accepted) + steps).clamp(max=layout.offset.shape[1] - 1)
    u = reading.u.gather(1, num_accepted + goes_on + 1 - config.lead + steps)
    anchor = layout.verify.gather(1, num_accepted)
    before = reading.tokens_until(anchor, config.chain)
    states, continued = reading.states_at(index), None
    if model.continuation is not None:
        nearest = reading.tokens.gather(1, second.clamp(min=0))
        before = torch.where(goes_on, torch.cat([nearest, before], dim=1)[:, : config.chain], before)
        anchor = torch.where(goes_on, second, anchor)
        continued = (steps >= layout.widths.gather(1, num_accepted)) | goes_on
        going_on = model.continuation(reading.states_at(anchor).squeeze(1))[:, :num_states]
        states = torch.where(continued.unsqueeze(-1), going_on, states)
    logits = None if config.chain else reading.logits_at(index, drafter.logits_of)
    # Some token in place of none: the host refuses to go on from that (`ptp.decoding.verification.checked`).
    return drafter(rules, states, logits, u, settled.bonus.clamp(min=0), before, continued)


@dataclass(frozen=True)
class Functions:
    """What a call is made of, as it is or compiled. layers: the base model's, if they are."""

    layers: Callable[..., Any] | None = None
    settle: Callable[..., Settled] = settle
    draft: Callable[..., list[Tensor]] = draft

    @property
    def are_compiled(self) -> bool:
        return self.layers is not None


def compiled_functions(model: PTPModel) -> Functions:
    """Functions compiled for each shape they are called with; on a GPU each is captured as a CUDA graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    compiled = partial(torch.compile, dynamic=False, mode=mode)
    return Functions(compiled(layers_of(model.base_model)), compiled(settle), compiled(draft))


def _picked(rule: SamplingRule, logits: Tensor, u: Tensor) -> list[Tensor]:
    return [pick(warp(logits, rule), u)]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Of values (B, T, D), those at positions (B, n): (B, n, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
