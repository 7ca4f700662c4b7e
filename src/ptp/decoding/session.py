"""Texts that are decoded together, each at its own pace: draft and verify in one call (METHOD §4).

    requests ── enter ──► texts in slots ── step: allocate → layout → call → verify → draft ──► verified tokens
                              ▲                                                │
                              └──────────── drafts, confidences ───────────────┘

A text may come or go between any two steps; each is what it would be alone. A slot that is free keeps the keys of the
text that left it, so that a prompt which begins like it, such as a chat's next turn, is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptp.cache import SlotCache
from ptp.decoding.allocation import allocate
from ptp.decoding.budget import Policy
from ptp.decoding.call import Caller, Outcome, Text
from ptp.decoding.device import Functions
from ptp.decoding.drafting import Drafter
from ptp.decoding.layout import MOST_PENDING, CallShape, RowLayout
from ptp.decoding.requests import Request
from ptp.decoding.verification import Logprobs, num_common
from ptp.errors import ConfigError, DecodingError
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

PREFILL_CHUNK = 512
"""Prompt tokens run ahead of the first call at a time, so that its mask stays small."""

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


class Session:
    """Slots of a key-value cache, in which requests are answered together.

    rule: how tokens are sampled. drafter: makes the drafts. policy: what drafts and branches may cost. num_slots:
    texts at a time. functions: what calls are made of, which may be compiled (see `Caller`). cache: of a session of as
    many slots that has ended, in whose place this one writes.
    """

    def __init__(
        self,
        model: PTPModel,
        rule: SamplingRule,
        drafter: Drafter,
        policy: Policy,
        num_slots: int = 1,
        functions: Functions | None = None,
        cache: SlotCache | None = None,
    ) -> None:
        if num_slots < 1:
            raise ConfigError(f"a session needs a place for a text at least; got {num_slots}")
        self.model, self.policy, self.num_slots = model, policy, num_slots
        self.functions = functions or Functions()
        self.cache = cache or SlotCache(model.num_layers, num_slots, 0)
        self.call = Caller(model, rule, drafter, self.cache, policy.most, self.functions)
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
        reused = {
            slot: num_common(self.kept[slot], prompt[:-1]) for slot, text in enumerate(self.slots) if text is None
        }
        slot = max(reused, key=lambda slot: (reused[slot], -len(self.kept[slot]), -slot))
        self._reserve(len(prompt) + request.max_new_tokens)
        text = self.slots[slot] = Text(request, [*prompt, *written], reused[slot])
        self.kept[slot] = []
        # Alone, the rest of a prompt is read by the call that drafts first; beside others it would pad all of them.
        ahead = PREFILL_CHUNK if self.num_slots == 1 else 1
        try:
            while len(text.tokens) - text.num_cached > ahead:
                chunk = min(PREFILL_CHUNK, len(text.tokens) - text.num_cached - 1)
                self.call.prefill(text, slot, chunk)
        except BaseException:
            self.slots[slot] = None
            raise
        return text

    def _reserve(self, num_tokens: int) -> None:
        """Room in the cache for texts of so many tokens."""
        # A call appends padding too: as many positions as the widest texts beside it have.
        needed = num_tokens + 2 * (self.policy.most + MOST_PENDING)
        if not self.functions.are_compiled:
            self.cache.reserve(needed)
        elif needed > self.cache.capacity:
            self.cache.reserve(-(-needed // COMPILED_CAPACITY) * COMPILED_CAPACITY)

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
        outcomes = self._call(texts, layouts, [self._reach(text, len(texts)) for text in texts])
        steps = [
            (text, self._commit(text, layout, outcome))
            for text, layout, outcome in zip(texts, layouts, outcomes, strict=True)
        ]
        # Calls that read prompts, or that drafted less than the policy would have, say nothing of its choices.
        if all(layout.num_pending <= MOST_PENDING for layout in layouts) and all(
            text.request.budget is None for text in texts
        ):
            num_tokens = sum(len(step.token_ids) for _, step in steps)
            confidences, widths = zip(*((outcome.confidences, outcome.width) for outcome in outcomes), strict=True)
            self.policy.learn(num_tokens, CallShape.of(layouts).num_positions - 1, confidences, widths)
        return steps

    def _call(self, texts: Sequence[Text], layouts: Sequence[RowLayout], reach: Sequence[int]) -> list[Outcome]:
        """The model's call, and what it found for each text. reach: see `_reach`."""
        drafts_nothing = _is_plain(layouts) and not any(reach)
        if drafts_nothing and not self.functions.are_compiled:
            return [self.call.plainly(texts[0])]
        return self.call(texts, layouts, reach)

    def _commit(self, text: Text, layout: RowLayout, outcome: Outcome) -> Step:
        """Add to a text what is verified; what the cache holds behind that is written over by the next call."""
        verified = outcome.verified
        step = Step(
            token_ids=verified.token_ids,
            u=text.request.u_values[text.num_written : text.num_written + len(verified.token_ids)],
            num_accepted=verified.num_accepted,
            num_drafts=layout.num_drafts + len(layout.seconds),
            finish_reason=verified.finish_reason,
            logprobs=outcome.logprobs,
        )
        text.tokens += step.token_ids
        text.num_cached = len(text.tokens) - outcome.num_pending
        text.drafts, text.confidences, text.seconds = outcome.drafts, outcome.confidences, outcome.seconds
        if step.finish_reason is not None:
            self.leave(text)
        return step

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


def _is_plain(layouts: Sequence[RowLayout]) -> bool:
    return len(layouts) == 1 and layouts[0].num_verify == 1 and not layouts[0].num_window
