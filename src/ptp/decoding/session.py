"""Texts that are decoded together, each at its own pace: draft and verify in one call (METHOD §4).

    requests ── enter ──► texts in slots ── step: allocate → layout → call → verify → draft ──► verified tokens
                              ▲                                                │
                              └──────────── drafts, confidences ───────────────┘

A text may come or go between any two steps; each is what it would be alone. A slot that is free keeps the keys of the
text that left it, so that a prompt which begins like it, such as a chat's next turn, is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ptp.cache import SlotCache
from ptp.decoding.allocation import allocate
from ptp.decoding.budget import Policy
from ptp.decoding.drafting import Drafter
from ptp.decoding.layout import MOST_PENDING, CallLayout, CallShape, RowLayout, call_layout, call_mask, key_positions
from ptp.decoding.requests import Request
from ptp.decoding.verification import Logprobs, Verified, by_rule, logprobs, sampled, verify
from ptp.errors import DecodingError
from ptp.layer_kinds import context_length
from ptp.model.proposal import UNKNOWN
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule, pick, warp

PREFILL_CHUNK = 512
"""Prompt tokens run ahead of the first call at a time, so that its mask stays small."""

ONE_READING = 64
"""Positions of a call up to which the output head makes logits of all of them: it is read once then, and reading it
takes longer than the products do. In larger calls it makes those of the verify positions, then of the true branch."""

COMPILED_CAPACITY = 512
"""Compiled calls look at a whole cache, whose length is a multiple of this."""


@dataclass(frozen=True)
class Step:
    """What one call settled for a text. token_ids: verified tokens, in order; the first num_accepted had been drafted.

    u: their numbers. num_drafts: draft tokens the call verified, second candidates among them. finish_reason: of a
    text's last call, why the text ends there (see `Request.finish_reason`). logprobs: of each token, where the request
    asks for them.
    """

    token_ids: list[int]
    u: list[float]
    num_accepted: int
    num_drafts: int
    finish_reason: str | None = None
    logprobs: list[Logprobs] | None = None


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
class _Reading:
    """A forward call of B texts. tokens: (B, gate_start), at its verify positions. u: (B, longest), of each text.

    recent: (B, chain), the tokens before those, the nearest last. written: (B, 1), tokens that each text has. states:
    (B, T, H); logits: (B, n, V) of the first n positions, if they were made at once.
    """

    layout: CallLayout
    tokens: Tensor
    recent: Tensor
    u: Tensor
    written: Tensor
    states: Tensor
    logits: Tensor | None
    head: LogitsOf

    def states_at(self, index: Tensor) -> Tensor:
        """Hidden states (B, n, H) at positions (B, n)."""
        return _rows(self.states, index)

    def logits_at(self, index: Tensor) -> Tensor:
        """Logits (B, n, V) at positions (B, n), of those that were made at once if they were."""
        return self.head(self.states_at(index)) if self.logits is None else _rows(self.logits, index)

    def u_at(self, place: Tensor) -> Tensor:
        """u (B, n) at places (B, n) or (n,) behind the tokens written; past the end, the last, which is not used."""
        return self.u.gather(1, (self.written + place).clamp(max=self.u.shape[1] - 1))

    def tokens_until(self, index: Tensor, num_tokens: int) -> Tensor:
        """The tokens (B, num_tokens) up to a verify position (B, 1), the nearest first."""
        tokens = torch.cat([self.recent, self.tokens], dim=1)
        steps = torch.arange(num_tokens, device=index.device)
        return tokens.gather(1, index + self.recent.shape[1] - steps)


@dataclass(frozen=True)
class _Settled:
    """What a call settles of B texts, on the device.

    true_tokens: (B, 1 + drafts), what the base model writes at each verify row. num_accepted: (B, 1), drafts that are
    right. second: (B, 1), the position of the second candidate that is right in place of the next, or −1. bonus:
    (B, 1), the last token settled. logits: (B, 1 + drafts, V) of the verify rows; logits_behind: (B, 1, V) of the
    second candidate's. verified: of each text, where the host has looked already; true_tokens say nothing then.
    """

    true_tokens: Tensor
    num_accepted: Tensor
    bonus: Tensor
    second: Tensor
    logits: Tensor
    logits_behind: Tensor | None = None
    verified: Sequence[Verified] = ()


class Session:
    """Slots of a key-value cache, in which requests are answered together.

    rule: how tokens are sampled. head: hidden states to logits. policy: what drafts and branches may cost. num_slots:
    texts at a time. layers: the base model's decoder compiled; calls behind the prompts then have one of two shapes,
    so that nothing is compiled again unless a text outgrows the cache.
    """

    def __init__(
        self,
        model: PTPModel,
        rule: SamplingRule,
        head: LogitsOf,
        policy: Policy,
        num_slots: int = 1,
        layers: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.rule, self.head, self.policy, self.num_slots = model, rule, head, policy, num_slots
        self.layers = layers
        self.drafter = Drafter(model, head)
        self.cache = SlotCache(model.num_layers, num_slots, 0)
        self.slots: list[Text | None] = [None] * num_slots
        self.kept: list[list[int]] = [[] for _ in range(num_slots)]

    @property
    def texts(self) -> list[Text]:
        """The texts in the making."""
        return [text for text in self.slots if text is not None]

    @property
    def is_full(self) -> bool:
        return None not in self.slots

    @torch.inference_mode()
    def enter(self, request: Request, written: Sequence[int] = ()) -> Text:
        """Begin a text in a free slot: the one whose kept keys serve most of the prompt.

        written: its tokens so far, where it goes on from another session.
        """
        if self.is_full:
            raise DecodingError(f"all {self.num_slots} slots are taken; a text must leave before another can enter")
        prompt = request.prompt_ids
        # A call has positions for the last prompt token's successor at the earliest, so that one is never reused.
        reused = {slot: _common(self.kept[slot], prompt[:-1]) for slot, text in enumerate(self.slots) if text is None}
        slot = max(reused, key=lambda slot: (reused[slot], -len(self.kept[slot]), -slot))
        self._reserve(len(prompt) + request.max_new_tokens)
        text = self.slots[slot] = Text(request, [*prompt, *written], reused[slot])
        self.kept[slot] = []
        # Alone, the rest of a prompt is read by the call that drafts first; beside others it would pad all of them.
        ahead = PREFILL_CHUNK if self.num_slots == 1 else 1
        while len(text.tokens) - text.num_cached > ahead:
            chunk = min(PREFILL_CHUNK, len(text.tokens) - text.num_cached - 1)
            self._prefill(text, slot, chunk)
        return text

    def _reserve(self, num_tokens: int) -> None:
        """Room in the cache for texts of so many tokens."""
        # A call appends padding too: as many positions as the widest texts beside it have.
        needed = num_tokens + 2 * (self.policy.most + MOST_PENDING)
        if self.layers is None:
            self.cache.reserve(needed)
        elif needed > self.cache.capacity:
            self.cache.reserve(-(-needed // COMPILED_CAPACITY) * COMPILED_CAPACITY)
            self.kept = [[] if text is None else kept for text, kept in zip(self.slots, self.kept, strict=True)]

    def leave(self, text: Text) -> None:
        """Give a text's slot up; its keys stay until another text needs the slot."""
        slot = self.slots.index(text)
        self.slots[slot], self.kept[slot] = None, text.tokens[: text.num_cached]

    @torch.inference_mode()
    def step(self) -> list[tuple[Text, Step]]:
        """One call for all texts, each of which gets at least one token; those that are finished leave."""
        self._close_gaps()
        if not (texts := self.texts):
            return []
        layouts = self._layouts(texts)
        reach = [self._reach(text, len(texts)) for text in texts]
        plain = self.layers is None and _is_plain(layouts) and not any(reach)
        outcomes = [self._call_plainly(texts[0])] if plain else self._call(texts, layouts, reach)
        steps = []
        for text, layout, outcome in zip(texts, layouts, outcomes, strict=True):
            verified = outcome.verified
            u = text.request.u_values[text.num_written : text.num_written + len(verified.token_ids)]
            step = Step(
                verified.token_ids,
                u,
                verified.num_accepted,
                layout.num_drafts + len(layout.seconds),
                verified.finish_reason,
                outcome.logprobs,
            )
            steps.append((text, step))
            text.tokens += step.token_ids
            text.num_cached = len(text.tokens) - outcome.num_pending
            text.drafts, text.confidences, text.seconds = outcome.drafts, outcome.confidences, outcome.seconds
            if step.finish_reason is not None:
                self.leave(text)
        # Calls that read prompts, or that drafted less than the policy would have, say nothing of its choices.
        if all(layout.num_pending <= MOST_PENDING for layout in layouts) and all(
            text.request.budget is None for text in texts
        ):
            num_tokens = sum(len(step.token_ids) for _, step in steps)
            confidences, widths = zip(*((outcome.confidences, outcome.width) for outcome in outcomes), strict=True)
            self.policy.learn(num_tokens, CallShape.of(layouts).num_positions - 1, confidences, widths)
        return steps

    def _reach(self, text: Text, num_texts: int) -> int:
        """Drafts, at most, that are worth making for the text's next call whether they have positions or not."""
        affordable = len(self._price(text, num_texts)) - 1
        if self.model.continuation is None or not affordable:
            return 0
        profile = self.policy.profile(num_texts)
        useful = sum(reached > profile.verifying for reached in profile.continued)
        return max(0, min(useful, affordable, text.num_remaining - 2))

    def _price(self, text: Text, num_texts: int) -> Sequence[float]:
        """What positions cost a text; its request may allow fewer than the policy."""
        price = self.policy.price(num_texts)
        return price if text.request.budget is None else price[: text.request.budget + 1]

    def _layouts(self, texts: Sequence[Text]) -> list[RowLayout]:
        """What each text verifies and drafts in the next call; drafts that are not verified are dropped."""
        price, lead = self.policy.price(len(texts)), self.model.ptp_config.lead
        if len(price) == 1:
            for text in texts:
                text.drafts, text.confidences, text.seconds = [], [], []
            return [RowLayout(len(text.tokens) - text.num_cached, 0, (0,)) for text in texts]
        profile = self.policy.profile(len(texts))
        # Processors look at one text after the other, and at one way that it goes on.
        processed = any(text.request.processors for text in texts)
        layouts = []
        for text in texts:
            seconds = [] if processed else [chance for _, chance in text.seconds]
            plan = allocate(text.confidences, profile, self._price(text, len(texts)), text.num_remaining, seconds)
            text.drafts = text.drafts[: plan.num_drafts]
            widths = tuple(width + lead if width else 0 for width in plan.widths)
            layouts.append(RowLayout(len(text.tokens) - text.num_cached, plan.num_drafts, widths, plan.seconds))
        return layouts

    def _close_gaps(self) -> None:
        """Move texts so that they stand in the first slots: a call takes neighbouring ones."""
        while (free := self.slots.index(None) if None in self.slots else self.num_slots) < len(self.texts):
            last = max(slot for slot, text in enumerate(self.slots) if text is not None)
            text = self.slots[last]
            assert text is not None
            self.cache.move(last, free, text.num_cached)
            self.slots[free], self.slots[last] = text, None
            self.kept[free], self.kept[last] = [], text.tokens[: text.num_cached]

    def _prefill(self, text: Text, slot: int, num_tokens: int) -> None:
        """Cache the next tokens of a prompt."""
        device = self.model.device
        layout = call_layout([RowLayout(num_tokens, 0, (0,))], CallShape(num_tokens, 0), 0, device)
        ids = torch.tensor([text.tokens[text.num_cached : text.num_cached + num_tokens]], device=device)
        self.cache.append_at(None, text.num_cached, num_tokens, slot)
        cached = [text.num_cached]
        mask = call_mask(layout, cached, torch.tensor([cached], device=device))
        self.model.read(ids, layout.offset + text.num_cached, mask, self.cache)
        text.num_cached += num_tokens

    def _read(self, texts: Sequence[Text], layouts: Sequence[RowLayout]) -> _Reading:
        """The forward call."""
        device, config = self.model.device, self.model.ptp_config
        shape, width = CallShape.of(layouts), None
        cached, written = [text.num_cached for text in texts], [text.num_written for text in texts]
        ids = [
            [*text.tokens[text.num_cached :], *text.drafts, *(text.seconds[draft][0] for draft in own.seconds)]
            for text, own in zip(texts, layouts, strict=True)
        ]
        before = [_last(text.tokens[: text.num_cached], config.chain) for text in texts]
        numbers = [text.request.u for text in texts]
        compiled = self.layers is not None and shape.gate_start <= self._most_verified()
        if compiled:
            shape, width = self._compiled_shape(shape), self.cache.capacity
            # Free slots take part; what is written to them goes where no text reaches.
            idle = self.num_slots - len(texts)
            layouts = [*layouts, *[RowLayout(1, 0, (0,))] * idle]
            cached, written = cached + [width - shape.num_positions] * idle, written + [0] * idle
            ids, before = ids + [[0]] * idle, before + [[UNKNOWN] * config.chain] * idle
            numbers = numbers + [numbers[0]] * idle
        layout = call_layout(layouts, shape, config.shift, device)
        # What differs from call to call goes to the device in one piece.
        rows = zip(cached, written, before, ids, strict=True)
        state = torch.tensor(
            [[*row[:2], *row[2], *row[3], *[0] * (shape.gate_start - len(row[3]))] for row in rows]
        ).to(device, non_blocking=True)
        lengths, done, recent, tokens = state.split([1, 1, config.chain, shape.gate_start], dim=1)
        u = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True) if len(numbers) > 1 else numbers[0].unsqueeze(0)

        inputs = tokens
        if shape.num_window:
            place = (done + layout.place).clamp(max=u.shape[1] - 1)  # padding, and windows past a text's end
            embedded = self.model.embed_u(u.gather(1, place))
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
            layers=self.layers if compiled else None,
        )

        # A chain's positions have logits of their own, one after the other.
        num_read = shape.num_positions if self.model.chain is None else shape.gate_start
        logits = self.head(hidden[:, :num_read]) if len(layouts) * num_read <= ONE_READING else None
        return _Reading(layout, tokens, recent, u, done, hidden, logits, self.head)

    def _call(self, texts: Sequence[Text], layouts: Sequence[RowLayout], reach: Sequence[int]) -> list[Outcome]:
        """One forward call: what it verifies, and what it drafts, of continued drafts as many as `reach` says."""
        reading = self._read(texts, layouts)
        rules = [self._rule(text) for text in texts]
        rules += rules[:1] * (len(reading.tokens) - len(texts))
        processed = any(text.request.processors for text in texts)
        settled = self._settled_processed(texts, reading) if processed else self._settled(layouts, reading, rules)
        widest = max(max(row.widths) for row in layouts)
        if reading.tokens.device.type == "cpu":
            # Looking costs nothing here, and less is read.
            widest = int(reading.layout.widths.gather(1, settled.num_accepted).max())
        drafted = self._draft(reading, settled, max(widest, *reach), rules)
        # One copy to the host: float64 holds token ids exactly.
        parts = [settled.true_tokens, settled.second, settled.bonus, *(part.flatten(1) for part in drafted)]
        values = torch.cat([part.double() for part in parts], dim=1).split([part.shape[1] for part in parts], dim=1)
        outcomes = []
        rows = zip(*(part.tolist() for part in values), strict=True)
        for row, (text, own, told) in enumerate(zip(texts, layouts, rows, strict=False)):
            true_tokens, drafts, goes_on = [int(token) for token in told[0]], text.drafts, told[1][0] >= 0
            logits = settled.logits[row]
            if goes_on:
                assert settled.logits_behind is not None
                # What is right is the drafts up to the wrong one, its second candidate and what stands behind that.
                right = true_tokens[: 1 + _common(true_tokens, drafts)]
                true_tokens, drafts = [*right, int(told[2][0])], right
                if text.request.num_logprobs is not None:
                    logits = torch.cat([logits[: len(right)], settled.logits_behind[row]])
            verified = settled.verified[row] if processed else verify(true_tokens, drafts, text.tokens, text.request)
            width = 0 if goes_on else max(0, own.widths[verified.num_accepted] - self.model.ptp_config.lead)
            candidates = self.model.ptp_config.num_candidates
            tokens, chances = [int(token) for token in told[3]], told[4]
            # What has no chance is no draft, nor is anything behind it.
            confidences = list(takewhile(bool, chances[::candidates][: max(width, reach[row])]))
            seconds = list(zip(tokens[1::candidates], chances[1::candidates], strict=True)) if candidates > 1 else []
            outcomes.append(
                Outcome(
                    verified,
                    tokens[::candidates][: len(confidences)],
                    confidences,
                    seconds[: len(confidences)],
                    width=min(width, len(confidences)),
                    num_pending=1 + goes_on,
                    logprobs=_logprobs(text, logits, verified),
                )
            )
        return outcomes

    def _settled(self, layouts: Sequence[RowLayout], reading: _Reading, rules: Sequence[SamplingRule]) -> _Settled:
        """Drafts count up to the first that is not what the base model writes with that u."""
        layout, logits = reading.layout, reading.logits_at(reading.layout.verify)
        place = torch.arange(logits.shape[1], device=logits.device)
        (true_tokens,) = by_rule(rules, _picked, logits, reading.u_at(place))
        drafts = reading.tokens.gather(1, layout.verify)[:, 1:]
        right = (drafts == true_tokens[:, :-1]) & (place[1:] <= layout.num_drafts.unsqueeze(1))
        num_accepted = right.cumprod(1).sum(1, keepdim=True)
        bonus = true_tokens.gather(1, num_accepted)
        second = layout.second.gather(1, num_accepted)
        if not any(row.seconds for row in layouts):
            return _Settled(true_tokens, num_accepted, bonus, second, logits)
        # In place of the wrong draft, its second candidate may be what is right, and the text goes on behind that.
        index = second.clamp(min=0)
        second = torch.where(reading.tokens.gather(1, index) == bonus, second, -1)
        logits_behind = reading.logits_at(index)
        (behind,) = by_rule(rules, _picked, logits_behind, reading.u_at(num_accepted + 1))
        bonus = torch.where(second >= 0, behind, bonus)
        return _Settled(true_tokens, num_accepted, bonus, second, logits, logits_behind)

    def _settled_processed(self, texts: Sequence[Text], reading: _Reading) -> _Settled:
        """Processors look at the tokens so far, on the host, and only at those that stay."""
        logits = reading.logits_at(reading.layout.verify)
        verified = [
            self._verified(text, logits[row], reading.u[row, text.num_written :]) for row, text in enumerate(texts)
        ]
        settled = [[each.num_accepted, each.token_ids[-1]] for each in verified]
        settled += [[0, 0]] * (len(logits) - len(texts))
        num_accepted, bonus = torch.tensor(settled, device=logits.device).split(1, dim=1)
        return _Settled(bonus, num_accepted, bonus, torch.full_like(bonus, -1), logits, verified=verified)

    def _call_plainly(self, text: Text) -> Outcome:
        """`_call` for one text that drafts nothing: one position, as any decoder does it."""
        self.cache.append_at(None, text.num_cached)
        ids, position = torch.tensor([[[text.tokens[-1]], [text.num_cached]]], device=self.model.device).unbind(1)
        hidden = self.model.read(ids, position, None, self.cache)
        logits = self.head(hidden[0])
        verified = self._verified(text, logits, text.request.u[text.num_written :])
        return Outcome(verified, logprobs=_logprobs(text, logits, verified))

    def _rule(self, text: Text) -> SamplingRule:
        return text.request.rule or self.rule

    def _verified(self, text: Text, logits: Tensor, u: Tensor) -> Verified:
        """What plain sampling writes at a text's verify rows, (R, V), with u (≥ R,), up to the first wrong draft."""
        rows, request = logits[: 1 + len(text.drafts)], text.request
        true_tokens = sampled(rows, u, text.tokens + text.drafts, self._rule(text), request.processors)
        return verify(true_tokens, text.drafts, text.tokens, request)

    def _compiled_shape(self, shape: CallShape) -> CallShape:
        """Of the two shapes that are compiled, a position for each text or all that may be had, the one that serves."""
        return shape if shape.num_positions == 1 else CallShape(self._most_verified(), self.policy.most)

    def _most_verified(self) -> int:
        """Positions, at most, that a call behind the prompt verifies of a text."""
        config = self.model.ptp_config
        pending = MOST_PENDING if config.num_candidates > 1 else 1
        return pending + min(config.num_candidates * config.num_drafts, self.policy.most)

    def _draft(self, reading: _Reading, settled: _Settled, widest: int, rules: Sequence[SamplingRule]) -> list[Tensor]:
        """Drafts and their chances, (B, ≤ widest − lead, candidates) each, behind what came true (see `Drafter`).

        widest: drafts of the text that has most, with the lead; what lies past a branch's own is continued, or else
        padding. rules: (B,).
        """
        layout, config, device = reading.layout, self.model.ptp_config, reading.tokens.device
        if not widest:
            nothing = settled.bonus.new_zeros(len(rules), 0, config.num_candidates)
            return [nothing, nothing]
        num_accepted, second = settled.num_accepted, settled.second
        goes_on = second >= 0
        steps = torch.arange(widest, device=device)
        index = (layout.starts.gather(1, num_accepted) + steps).clamp(max=layout.offset.shape[1] - 1)
        u = reading.u_at(num_accepted + goes_on + 1 - config.lead + steps)
        anchor = layout.verify.gather(1, num_accepted)
        before = reading.tokens_until(anchor, config.chain)
        states, continued = reading.states_at(index), None
        if self.model.continuation is not None:
            nearest = reading.tokens.gather(1, second.clamp(min=0))
            before = torch.where(goes_on, torch.cat([nearest, before], dim=1)[:, : config.chain], before)
            anchor = torch.where(goes_on, second, anchor)
            continued = (steps >= layout.widths.gather(1, num_accepted)) | goes_on
            going_on = self.model.continuation(reading.states_at(anchor).squeeze(1))[:, :widest]
            states = torch.where(continued.unsqueeze(-1), going_on, states)
        logits = None if config.chain else reading.logits_at(index)
        return self.drafter(rules, states, logits, u, settled.bonus, before, continued)


def _picked(rule: SamplingRule, logits: Tensor, u: Tensor) -> list[Tensor]:
    return [pick(warp(logits, rule), u)]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Of values (B, T, D), those at positions (B, n): (B, n, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _last(tokens: Sequence[int], count: int) -> list[int]:
    """The last tokens of a text, so many; `UNKNOWN` before its beginning."""
    return [*[UNKNOWN] * (count - len(tokens)), *tokens[max(0, len(tokens) - count) :]]


def _logprobs(text: Text, logits: Tensor, verified: Verified) -> list[Logprobs] | None:
    """What a request asks to be told of the tokens that a call verified, given the logits (R, V) of its rows."""
    asked = text.request.num_logprobs
    return None if asked is None else logprobs(logits, verified.token_ids, asked)


def _is_plain(layouts: Sequence[RowLayout]) -> bool:
    return len(layouts) == 1 and layouts[0].num_verify == 1 and not layouts[0].num_window


def _common(kept: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    return next((i for i, (a, b) in enumerate(zip(kept, prompt, strict=False)) if a != b), min(len(kept), len(prompt)))
