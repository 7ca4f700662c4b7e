"""The next drafts, of the branch that came true: states of its positions → tokens, confidences (METHOD §4, step 2).

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

from ptp.decoding.verification import by_rule
from ptp.model.proposal import propose
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule


class Drafter:
    """What makes drafts of a model's window states. Weights that change afterwards do not count."""

    @torch.no_grad()
    def __init__(self, model: PTPModel, logits_of: LogitsOf) -> None:
        self.model, self.logits_of = model, logits_of
        self.lead, self.num_known = model.ptp_config.lead, model.ptp_config.chain
        if model.chain is not None:
            # A token is read once, for all the places before a draft that it will have.
            weights = [cast(nn.Linear, read).weight for read in model.chain.tokens]
            self.reading = torch.cat(weights) / model.embedding_scale

    def __call__(
        self,
        rules: Sequence[SamplingRule],
        states: Tensor,
        logits: Tensor | None,
        u: Tensor,
        bonus: Tensor,
        before: Tensor,
    ) -> list[Tensor]:
        """Drafts and calibrated confidences, each (B, W − lead), of B branches of W positions.

        rules: (B,), by which the texts are sampled. states: (B, W, H); logits: (B, W, V) of them, where they are known.
        u: (B, W), of the tokens that the positions propose. bonus: (B, 1), the tokens in front of the first drafts;
        O-PTP's first position proposes it anew. before: (B, chain), the tokens in front of it, the nearest first.
        """
        if self.num_known:
            tokens, confidences = self._in_turn(rules, states, u, bonus, before)
        else:
            tokens, confidences = self._propose(rules, states, self.logits_of(states) if logits is None else logits, u)
        foreseen = tokens[:, :1] == bonus if self.lead else None
        return [tokens[:, self.lead :], self.model.calibration(confidences[:, self.lead :], foreseen)]

    def _in_turn(
        self, rules: Sequence[SamplingRule], states: Tensor, u: Tensor, bonus: Tensor, before: Tensor
    ) -> list[Tensor]:
        """As `ptp.model.proposal.Chain` corrects them."""
        chain, size = self.model.chain, self.num_known
        assert chain is not None
        # The base model's type may be another, also after this model was made.
        dtype, states = states.dtype, states.to(chain.write.weight.dtype)
        # Of each position, the sum that its tokens add to as they become known; behind the last, room for theirs.
        hidden = F.pad(chain.state(states), (0, 0, 0, size))
        known = before if self.lead else torch.cat([bonus, before], dim=1)[:, :size]
        read = self._read(known.clamp(min=0)) * (known >= 0)[..., None, None]
        for place in range(size):
            hidden[:, : size - place] += read[:, place, place:]
        found = []
        for index in range(states.shape[1]):
            here = slice(index, index + 1)
            state = (states[:, here] + F.linear(F.silu(hidden[:, here]), chain.write.weight)).to(dtype)
            found.append(self._propose(rules, state, self.logits_of(state), u[:, here]))
            token = bonus if index < self.lead else found[-1][0]
            hidden[:, index + 1 : index + 1 + size] += self._read(token)[:, 0]
        return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]

    def _read(self, tokens: Tensor) -> Tensor:
        """What a chain makes of tokens (B, n) for the places after them: (B, n, chain, size)."""
        embedded = self.model.token_embedding(tokens).to(self.reading.dtype)
        return F.linear(embedded, self.reading).unflatten(-1, (self.num_known, -1))

    def _propose(self, rules: Sequence[SamplingRule], states: Tensor, logits: Tensor, u: Tensor) -> list[Tensor]:
        blur = [] if self.model.blur is None else [self.model.blur(states)]
        return by_rule(rules, partial(_by, self.model), logits, u, *blur)


def _by(model: PTPModel, rule: SamplingRule, *rows: Tensor) -> list[Tensor]:
    return list(propose(model.ptp_config, rule, *rows))
