"""One call of the model for the texts of a session: what it verifies, and what it drafts (METHOD §4).

    texts, layouts ── read: the layers ──► Reading ── settle: head, u ──► Settled ── draft ──► an Outcome for each text

`settle` and `draft` stay on the device, and their shapes do not depend on what proves right, so that each compiles to
one graph. The host looks once, at the end.

Shapes: B texts, T positions of the call, R verify rows of a text, C candidates for a draft, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptp.cache import SlotCache
from ptp.decoding.drafting import Drafter
from ptp.decoding.layout import MOST_PENDING, CallLayout, CallShape, RowLayout, call_layout, call_mask, key_positions
from ptp.decoding.requests import Request
from ptp.decoding.verification import Logprobs, Verified, by_rule, logprobs, num_common, sampled, verify
from ptp.layer_kinds import context_length
from ptp.model.head import layers_of
from ptp.model.proposal import UNKNOWN
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule, pick, warp

ONE_READING = 64
"""Positions of a call up to which the output head makes logits of all of them: it is read once then, and reading it
takes longer than the products do. In larger calls it makes those of the verify positions, then of the true branch."""

MOST_COMPILED = 64
"""Forms of a function that may be compiled. torch counts those of all models of a process together, and beyond its own
limit of 8 runs the function as it is."""


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


@dataclass(frozen=True)
class Told:
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
    def of(cls, settled: Settled, tokens: Tensor, chances: Tensor) -> list[Told]:
        """Of B texts, and of further rows that are none. tokens, chances: (B, n, C)."""
        # One copy to the host: float64 holds token ids exactly.
        parts = [settled.true_tokens, settled.bonus, settled.second, tokens.flatten(1), chances.flatten(1)]
        values = torch.cat([part.double() for part in parts], dim=1).cpu()
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
            return verify(self.true_tokens, text.drafts, text.tokens, text.request)
        # What is right is the drafts up to the wrong one, its second candidate and what stands behind that.
        right = self.true_tokens[: 1 + num_common(self.true_tokens, text.drafts)]
        return verify([*right, self.bonus], right, text.tokens, text.request)

    def drafts(self, most: int) -> tuple[list[int], list[float], list[tuple[int, float]]]:
        """The next drafts, their confidences and second candidates. What has no chance is none, nor what follows it."""
        confidences = list(takewhile(bool, (chances[0] for chances in self.chances[:most])))
        places = list(zip(self.tokens, self.chances, strict=True))[: len(confidences)]
        seconds = [(tokens[1], chances[1]) for tokens, chances in places if len(tokens) > 1]
        return [tokens[0] for tokens, _ in places], confidences, seconds


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
    return drafter(rules, states, logits, u, settled.bonus, before, continued)


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
        told = Told.of(settled, tokens, chances)
        if not processed:
            verified = [told[row].verified(text) for row, text in enumerate(texts)]
        outcomes = []
        for row, (text, own) in enumerate(zip(texts, layouts, strict=True)):
            goes_on = told[row].goes_on
            width = 0 if goes_on else max(0, own.widths[verified[row].num_accepted] - self.model.ptp_config.lead)
            drafts, confidences, seconds = told[row].drafts(max(width, reach[row]))
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


def _picked(rule: SamplingRule, logits: Tensor, u: Tensor) -> list[Tensor]:
    return [pick(warp(logits, rule), u)]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Of values (B, T, D), those at positions (B, n): (B, n, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _last(tokens: Sequence[int], count: int) -> list[int]:
    """The last tokens of a text, so many; `UNKNOWN` before its beginning."""
    return [*[UNKNOWN] * (count - len(tokens)), *tokens[max(0, len(tokens) - count) :]]


def _logprobs(text: Text, verified: Verified, logits: Callable[[], Tensor]) -> list[Logprobs] | None:
    """What a request asks to be told of the tokens that a call verified. logits: gives those (R, V) that chose them."""
    asked = text.request.num_logprobs
    return None if asked is None else logprobs(logits(), verified.token_ids, asked)
