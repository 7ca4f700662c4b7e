"""One call of the model for the texts of a session: what it verifies, and what it drafts (METHOD §4).

    texts, layouts ── read: layers ──► Reading ── settle ──► Settled ── draft ──► HostView ──► an Outcome for each text
                                       └──────────── on the device ────────────┘

A compiled call is looked at once, at the end (`HostView`); logits processors alone, which act on the host, look before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn import functional as F

from ptp.cache import SlotCache
from ptp.decoding.device import Functions, Reading, Settled
from ptp.decoding.drafting import Drafter
from ptp.decoding.layout import MOST_PENDING, CallShape, RowLayout, call_layout, call_mask, key_positions
from ptp.decoding.requests import Request
from ptp.decoding.verification import Logprobs, Verified, checked, logprobs, num_common, sampled, verify
from ptp.layer_kinds import context_length
from ptp.model.proposal import UNKNOWN
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

ONE_READING = 64
"""Positions of a call up to which the output head makes logits of all of them: it is read once then, and reading it
takes longer than the products do. In larger calls it makes those of the verify positions, then of the true branch."""


@dataclass(eq=False)
class Text:
    """A request in the making: its tokens so far, those of them that are cached, and the drafts at hand.

    confidences: the chance that each draft is right. seconds: second candidates for their places, and the chances of
    those; empty where there are none.
    """

    request: Request
    tokens: list[int]
    num_cached: int
    drafts: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    seconds: list[tuple[int, float]] = field(default_factory=list)

    @property
    def num_written(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_remaining(self) -> int:
        return self.request.num_remaining(self.tokens)

    def u_ahead(self, num_tokens: int) -> Tensor:
        """u (num_tokens,) of the tokens to come; 0 past the text's end, where it is not used."""
        u = self.request.u[self.num_written : self.num_written + num_tokens]
        return u if len(u) == num_tokens else F.pad(u, (0, num_tokens - len(u)))


@dataclass(frozen=True)
class Outcome:
    """What a call found for a text: what is verified, and the next drafts with their confidences and second candidates.

    width: how many of the drafts have a position of their own, the first ones. num_pending: verified tokens at the end
    whose keys are not where they belong: the bonus token's, and before it those of a second candidate, which stand
    behind the drafts while the wrong draft's stand in its place.
    """

    verified: Verified
    drafts: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    seconds: list[tuple[int, float]] = field(default_factory=list)
    width: int = 0
    num_pending: int = 1
    logprobs: list[Logprobs] | None = None


@dataclass(frozen=True)
class HostView:
    """What the host is told of a text, once a call.

    true_tokens: R of them. bonus: the last token settled. goes_on: whether that stands behind a second candidate.
    tokens, chances: for each place to draft, those of its C candidates.
    """

    true_tokens: list[int]
    bonus: int
    goes_on: bool
    tokens: list[list[int]]
    chances: list[list[float]]

    @classmethod
    def of(cls, settled: Settled, tokens: Tensor, chances: Tensor) -> list[HostView]:
        """Of B texts, and of further rows that are none. tokens, chances: (B, n, C)."""
        # One copy to the host: float32 holds token ids exactly, up to 2²⁴, and all devices have it.
        parts = [settled.true_tokens, settled.bonus, settled.second, tokens.flatten(1), chances.flatten(1)]
        values = torch.cat([part.float() for part in parts], dim=1).cpu()
        true_tokens, bonus, second, drafts, likely = values.split([part.shape[1] for part in parts], dim=1)
        fields = (
            true_tokens.long().tolist(),
            bonus[:, 0].long().tolist(),
            (second[:, 0] >= 0).tolist(),
            drafts.long().view(tokens.shape).tolist(),
            likely.view(tokens.shape).tolist(),
        )
        return [cls(*row) for row in zip(*fields, strict=True)]

    def verified(self, text: Text) -> Verified:
        """What of it the text takes."""
        if not self.goes_on:
            return verify(checked(self.true_tokens, len(text.tokens)), text.drafts, text.tokens, text.request)
        # What is right is the drafts up to the wrong one, its second candidate and what stands behind that.
        right = self.true_tokens[: 1 + num_common(self.true_tokens, text.drafts)]
        return verify(checked([*right, self.bonus], len(text.tokens)), right, text.tokens, text.request)

    def drafts(self, most: int) -> tuple[list[int], list[float], list[tuple[int, float]]]:
        """The next drafts, their confidences and second candidates. What has no chance is none, nor what follows it."""
        confidences = list(takewhile(bool, (chances[0] for chances in self.chances[:most])))
        places = list(zip(self.tokens, self.chances, strict=True))[: len(confidences)]
        seconds = [(tokens[1], chances[1]) for tokens, chances in places if len(tokens) > 1]
        return [tokens[0] for tokens, _ in places], confidences, seconds


class Caller:
    """Makes the calls of a session. cache: its texts stand in the first slots. rule: of texts that have none.

    most: positions that a text may spend. functions: compiled, calls behind the prompts have one of two shapes, so that
    nothing is compiled again unless a text outgrows the cache.
    """

    def __init__(
        self, model: PTPModel, rule: SamplingRule, drafter: Drafter, cache: SlotCache, most: int, functions: Functions
    ) -> None:
        self.model, self.rule, self.drafter, self.head = model, rule, drafter, drafter.logits_of
        self.cache, self.most, self.functions = cache, most, functions

    def __call__(self, texts: Sequence[Text], layouts: Sequence[RowLayout], reach: Sequence[int]) -> list[Outcome]:
        """One forward call: what it verifies, and what it drafts, of continued drafts as many as `reach` says."""
        processed = any(text.request.processors for text in texts)
        compiled = self._is_compiled(layouts)
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        reading = self._read(texts, layouts, compiled)
        rules = [text.request.rule or self.rule for text in texts]
        rules += rules[:1] * (len(reading.tokens) - len(texts))
        functions = self.functions if compiled else Functions()
        if processed:
            verified, settled = self._settled_by_host(texts, reading)
        else:
            may_have = self.model.ptp_config.num_candidates > 1 if compiled else any(row.seconds for row in layouts)
            settled = functions.settle(reading, self.head, rules, may_have)
        if compiled:
            # One size: what a text does not want is not drafted from.
            num_states = self.model.ptp_config.window if any(row.num_window for row in layouts) or any(reach) else 0
        elif reading.tokens.device.type == "cpu":
            # Looking at what came true costs nothing here, and less is drafted.
            num_states = max(int(reading.layout.widths.gather(1, settled.num_accepted).max()), *reach)
        else:
            num_states = max(*(max(row.widths) for row in layouts), *reach)
        tokens, chances = functions.draft(reading, settled, self.drafter, rules, num_states)
        views = HostView.of(settled, tokens, chances)
        if not processed:
            verified = [views[row].verified(text) for row, text in enumerate(texts)]
        outcomes = []
        for row, (text, own) in enumerate(zip(texts, layouts, strict=True)):
            goes_on = views[row].goes_on
            width = 0 if goes_on else max(0, own.widths[verified[row].num_accepted] - self.model.ptp_config.lead)
            drafts, confidences, seconds = views[row].drafts(max(width, reach[row]))
            outcomes.append(
                Outcome(
                    verified[row],
                    drafts,
                    confidences,
                    seconds,
                    width=min(width, len(drafts)),
                    num_pending=1 + goes_on,
                    logprobs=_logprobs(text, verified[row], partial(settled.logits_of, row, goes_on)),
                )
            )
        return outcomes

    def plainly(self, text: Text) -> Outcome:
        """The call for one text that drafts nothing: one position, as any decoder does it."""
        self.cache.append_at(None, text.num_cached)
        ids, position = torch.tensor([[[text.tokens[-1]], [text.num_cached]]], device=self.model.device).unbind(1)
        hidden = self.model.read(ids, position, None, self.cache)
        logits = self.head(hidden[0])
        verified = self._verified(text, logits, text.u_ahead(1))
        return Outcome(verified, logprobs=_logprobs(text, verified, lambda: logits))

    def prefill(self, text: Text, slot: int, num_tokens: int) -> None:
        """Cache the next tokens of a prompt."""
        device = self.model.device
        layout = call_layout([RowLayout(num_tokens, 0, (0,))], CallShape(num_tokens, 0), 0, device)
        ids = torch.tensor([text.tokens[text.num_cached : text.num_cached + num_tokens]], device=device)
        self.cache.append_at(None, text.num_cached, num_tokens, slot)
        cached = [text.num_cached]
        mask = call_mask(layout, cached, torch.tensor([cached], device=device))
        self.model.read(ids, layout.offset + text.num_cached, mask, self.cache)
        text.num_cached += num_tokens

    def _is_compiled(self, layouts: Sequence[RowLayout]) -> bool:
        """Whether a call is one that is compiled: not where it reads a prompt, and not before there is a cache.

        A cache made inside a CUDA graph would lie in the graph's own memory, which its next run writes over.
        """
        fits = CallShape.of(layouts).gate_start <= self._most_verified()
        return self.functions.are_compiled and fits and self.cache.is_allocated

    def _most_verified(self) -> int:
        """Positions, at most, that a call behind the prompt verifies of a text."""
        config = self.model.ptp_config
        pending = MOST_PENDING if config.num_candidates > 1 else 1
        return pending + min(config.num_candidates * config.num_drafts, self.most)

    def _read(self, texts: Sequence[Text], layouts: Sequence[RowLayout], compiled: bool) -> Reading:
        """The forward call."""
        device, config = self.model.device, self.model.ptp_config
        shape, width = CallShape.of(layouts), None
        num_branches = 1 + max(row.num_drafts for row in layouts)
        cached = [text.num_cached for text in texts]
        ids = [
            [*text.tokens[text.num_cached :], *text.drafts, *(text.seconds[draft][0] for draft in own.seconds)]
            for text, own in zip(texts, layouts, strict=True)
        ]
        before = [_last(text.tokens[: text.num_cached], config.chain) for text in texts]
        if compiled:
            # Of two shapes, a position for each text or all that may be had, the one that serves.
            if shape.num_positions > 1:
                shape = CallShape(self._most_verified(), self.most)
            num_branches, width = 1 + min(config.num_drafts, self.most), self.cache.capacity
            # Free slots take part; what is written to them goes where no text reaches.
            idle = self.cache.num_slots - len(texts)
            layouts = [*layouts, *[RowLayout(1, 0, (0,))] * idle]
            cached = cached + [width - shape.num_positions] * idle
            ids, before = ids + [[0]] * idle, before + [[UNKNOWN] * config.chain] * idle
        # All drafts right and a second candidate behind them, and then a window.
        num_ahead = num_branches + 1 + config.window
        numbers = [text.u_ahead(num_ahead) for text in texts]
        numbers += numbers[:1] * (len(layouts) - len(texts))
        u = torch.stack(numbers) if len(numbers) > 1 else numbers[0].unsqueeze(0)
        layout = call_layout(layouts, shape, config.shift, device, num_branches)
        # What differs from call to call goes to the device in one piece.
        rows = zip(cached, before, ids, strict=True)
        state = torch.tensor(
            [[own, *recent, *read, *[0] * (shape.gate_start - len(read))] for own, recent, read in rows]
        ).to(device, non_blocking=True)
        lengths, recent, tokens = state.split([1, config.chain, shape.gate_start], dim=1)

        inputs = tokens
        if shape.num_window:
            embedded = self.model.embed_u(u.gather(1, layout.place))
            window = self.model.add_anchor(embedded, tokens.gather(1, layout.anchor), layout.first)
            inputs = torch.cat([self.model.token_embedding(tokens), window], dim=1)
        positions = layout.offset + lengths
        if compiled and (longest := context_length(self.model.base_model.config)) is not None:
            # The cache of free slots, where nothing is read, may reach further than the model's positions.
            positions = positions.clamp(max=longest - 1)
        alone = len(layouts) == 1 and not compiled
        self.cache.append_at(None if alone else lengths[:, 0], max(cached), shape.num_positions, width=width)
        hidden = self.model.read(
            inputs,
            positions,
            call_mask(layout, cached, lengths, width),
            self.cache,
            gate_start=shape.gate_start if shape.num_window else None,
            key_positions=None if self.model.sees_all else key_positions(layout, cached, lengths, width),
            layers=self.functions.layers if compiled else None,
        )

        # A chain's positions have logits of their own, one after the other.
        num_read = shape.num_positions if self.model.chain is None else shape.gate_start
        logits = self.head(hidden[:, :num_read]) if len(layouts) * num_read <= ONE_READING else None
        return Reading(layout, tokens, recent, u, hidden, logits)

    def _settled_by_host(self, texts: Sequence[Text], reading: Reading) -> tuple[list[Verified], Settled]:
        """Processors look at the tokens so far, on the host, and only at those that stay."""
        logits = reading.logits_at(reading.layout.verify, self.head)
        verified = [self._verified(text, logits[row], reading.u[row]) for row, text in enumerate(texts)]
        ends = [[each.num_accepted, each.token_ids[-1]] for each in verified] + [[0, 0]] * (len(logits) - len(texts))
        num_accepted, bonus = torch.tensor(ends, device=logits.device).split(1, dim=1)
        return verified, Settled(bonus, num_accepted, bonus, torch.full_like(bonus, -1), logits)

    def _verified(self, text: Text, logits: Tensor, u: Tensor) -> Verified:
        """What plain sampling writes at a text's verify rows, (R, V), with u (≥ R,), up to the first wrong draft."""
        rows, request = logits[: 1 + len(text.drafts)], text.request
        true_tokens = sampled(rows, u, text.tokens + text.drafts, request.rule or self.rule, request.processors)
        return verify(true_tokens, text.drafts, text.tokens, request)


def _last(tokens: Sequence[int], count: int) -> list[int]:
    """The last tokens of a text, so many; `UNKNOWN` before its beginning."""
    return [*[UNKNOWN] * (count - len(tokens)), *tokens[max(0, len(tokens) - count) :]]


def _logprobs(text: Text, verified: Verified, logits: Callable[[], Tensor]) -> list[Logprobs] | None:
    """What a request asks to be told of the tokens that a call verified. logits: gives those (R, V) that chose them."""
    asked = text.request.num_logprobs
    return None if asked is None else logprobs(logits(), verified.token_ids, asked)
