"""The next drafts, of the branch that came true: their states → tokens, confidences (METHOD §4, step 6).

Without a chain, all positions propose at once. With one they propose in turn, each knowing the tokens before its own;
what does not depend on those is computed for all positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp.cache import keep_place
from ptp.decoding.verification import by_rule
from ptp.model.proposal import positive, propose
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule

MOST_TABLED = 1 << 22
"""Numbers that a table of what a chain makes of every token may have: small models spend their time between operations,
and for large ones it would take too much memory."""


LEAST_CHANCE = 0.02
"""Drafts made in turn end where the chance that all before them are right, uncalibrated, falls below this."""


class Drafter:
    """What makes drafts of a model's window states. Weights that change afterwards do not count.

    logits_of: the model's output head.
    """

    @torch.no_grad()
    def __init__(self, model: PTPModel, logits_of: LogitsOf) -> None:
        self.model, self.logits_of = model, logits_of
        self.lead, self.num_known = model.ptp_config.lead, model.ptp_config.chain
        chain, blur = model.chain, model.blur
        if chain is None:
            return
        # A token is read once, for all the places before a draft that it will have.
        read = torch.cat([cast(nn.Linear, place).weight for place in chain.tokens]) / model.embedding_scale
        embeddings = model.token_embedding.weight
        self.table = F.linear(embeddings.to(read.dtype), read) if len(embeddings) * len(read) <= MOST_TABLED else None
        self.read = read
        # A correction of the blur is one number more of a correction of the state.
        self.write = chain.write.weight
        if blur is not None:
            self.write = torch.cat([self.write, blur.linear.weight @ self.write])
        keep_place(self.read, self.write, *([] if self.table is None else [self.table]))

    def __call__(
        self,
        rules: Sequence[SamplingRule],
        states: Tensor,
        logits: Tensor | None,
        u: Tensor,
        bonus: Tensor,
        before: Tensor,
        continued: Tensor | None = None,
    ) -> list[Tensor]:
        """Drafts and the chances that they are right, each (B, ≤ W − lead, candidates), of B branches of W states.

        The likeliest candidate first: its chance is its calibrated confidence, and it is what later drafts follow. A
        chance of 0 is that of no draft.

        rules: (B,), by which the texts are sampled. states: (B, W, H); logits: (B, W, V) of them, where they are known.
        u: (B, W), of the tokens that they propose. bonus: (B, 1), the tokens in front of the first drafts; O-PTP's
        first position proposes it anew. before: (B, chain), the tokens in front of it, the nearest first. continued:
        (B, W) bool, states of no position but of a `Continuation`; None where the model has none.
        """
        if self.num_known:
            tokens, confidences, reached = self._in_turn(rules, states, u, bonus, before)
        else:
            logits = self.logits_of(states) if logits is None else logits
            blur = [] if self.model.blur is None else [self.model.blur(states)]
            tokens, confidences = self._propose(rules, logits, u, *blur)
            reached = torch.ones_like(u)
        curve = None if continued is None else continued[:, : tokens.shape[1]]
        if self.lead:
            curve = tokens[:, :1, 0] == bonus
            tokens, confidences, reached = (part[:, self.lead :] for part in (tokens, confidences, reached))
        first = self.model.calibration(confidences[..., 0], curve).unsqueeze(-1)
        # A second candidate is right where the first is not.
        others = torch.minimum(confidences[..., 1:], torch.minimum(first, 1 - first))
        return [tokens, torch.cat([first, others], dim=-1) * (reached >= LEAST_CHANCE).unsqueeze(-1)]

    def _in_turn(
        self, rules: Sequence[SamplingRule], states: Tensor, u: Tensor, bonus: Tensor, before: Tensor
    ) -> list[Tensor]:
        """Candidates and confidences as `ptp.model.proposal.Chain` corrects states, and the chance to come so far."""
        chain, blur, size, width = self.model.chain, self.model.blur, self.num_known, states.shape[-1]
        assert chain is not None
        # The base model's type may be another, also after this model was made.
        dtype, states = states.dtype, states.to(self.write.dtype)
        # Of each position, the sum that its tokens add to as they become known; behind the last, room for theirs.
        hidden = F.pad(chain.state(states), (0, 0, 0, size))
        known = before if self.lead else torch.cat([bonus, before], dim=1)[:, :size]
        read = self._read(known.clamp(min=0)) * (known >= 0)[..., None, None]
        for place in range(size):
            hidden[:, : size - place].add_(read[:, place, place:])
        if blur is not None:
            states = torch.cat([states, blur.linear(states)], dim=-1)
        found = []
        reached = torch.ones(len(states), device=states.device)
        # To look is to wait for a GPU, and a compiled function has one length.
        looks = states.device.type == "cpu" and not torch.compiler.is_compiling()
        for index in range(states.shape[1]):
            if looks and float(reached.max()) < LEAST_CHANCE:
                break
            row = states[:, index] + F.linear(F.silu(hidden[:, index]), self.write)
            raw = [] if blur is None else [positive(row[:, width])]
            tokens, confidences = self._propose(rules, self.logits_of(row[:, :width].to(dtype)), u[:, index], *raw)
            found.append((tokens, confidences, reached))
            token = bonus[:, 0] if index < self.lead else tokens[:, 0]
            reached = reached if index < self.lead else reached * confidences[:, 0]
            hidden[:, index + 1 : index + 1 + size].add_(self._read(token))
        return [torch.stack(parts, dim=1) for parts in zip(*found, strict=True)]

    def _read(self, tokens: Tensor) -> Tensor:
        """What a chain makes of tokens (...) for the places after them: (..., chain, size)."""
        if self.table is not None:
            return F.embedding(tokens, self.table).unflatten(-1, (self.num_known, -1))
        embedded = self.model.token_embedding(tokens).to(self.read.dtype)
        return F.linear(embedded, self.read).unflatten(-1, (self.num_known, -1))

    def _propose(self, rules: Sequence[SamplingRule], logits: Tensor, u: Tensor, *blur: Tensor) -> list[Tensor]:
        return by_rule(rules, partial(_by, self.model), logits, u, *blur)


def _by(model: PTPModel, rule: SamplingRule, *rows: Tensor) -> list[Tensor]:
    return list(propose(model.ptp_config, rule, *rows))
