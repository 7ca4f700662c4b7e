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

import torch
from torch import Tensor

from ptp.cache import SlotCache
from ptp.decoding.allocation import Allocation
from ptp.decoding.layout import CallLayout, CallShape, RowLayout, call_layout, call_mask, key_positions
from ptp.decoding.requests import Request
from ptp.errors import DecodingError
from ptp.model.ptp_model import PTPModel
from ptp.sampling import LogitsOf, SamplingRule, pick, probability, warp

PREFILL_CHUNK = 512
"""Prompt tokens run ahead of the first call at a time, so that its mask stays small."""


@dataclass(frozen=True)
class Step:
    """What one call settled for a text. token_ids: verified tokens, in order; the first num_accepted had been drafted.

    u: their numbers. num_drafts: draft tokens the call verified.
    """

    token_ids: list[int]
    u: list[float]
    num_accepted: int
    num_drafts: int


@dataclass(eq=False)
class Text:
    """A request in the making: its tokens so far, those of them that are cached, and the drafts at hand."""

    request: Request
    tokens: list[int]
    num_cached: int
    drafts: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    @property
    def num_written(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_remaining(self) -> int:
        return self.request.num_remaining(self.tokens)

    @property
    def is_finished(self) -> bool:
        return self.num_written > 0 and self.request.is_finished(self.tokens)


Plan = Callable[[Sequence[Text]], list[Allocation]]
"""How many drafts of each text a call verifies, and how wide it makes their branches."""


@dataclass(frozen=True)
class Verified:
    """What a call found, on the host. true_tokens: (B, 1 + drafts), the base model's own. num_accepted: (B,).

    drafts, confidences: (B, widest branch) of the branches that came true; what lies past a branch's own is padding.
    """

    true_tokens: list[list[int]]
    num_accepted: list[int]
    drafts: list[list[int]]
    confidences: list[list[float]]


class Session:
    """Slots of a key-value cache, in which requests are answered together.

    rule: how tokens are sampled. head: hidden states to logits. plan: see `Plan`. num_slots: texts at a time.
    most_positions: window and draft positions of a text that a plan may ask for.
    """

    def __init__(
        self, model: PTPModel, rule: SamplingRule, head: LogitsOf, plan: Plan, num_slots: int, most_positions: int
    ) -> None:
        self.model, self.rule, self.head, self.plan = model, rule, head, plan
        self.num_slots, self.most_positions = num_slots, most_positions
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
    def enter(self, request: Request) -> Text:
        """Begin a text in a free slot: the one whose kept keys serve most of the prompt."""
        if self.is_full:
            raise DecodingError(f"all {self.num_slots} slots are taken; a text must leave before another can enter")
        prompt = request.prompt_ids
        # A call has positions for the last prompt token's successor at the earliest, so that one is never reused.
        reused = {
            slot: _common(self.kept[slot], prompt[:-1]) for slot, text in enumerate(self.slots) if text is None
        }
        slot = max(reused, key=lambda slot: (reused[slot], -len(self.kept[slot]), -slot))
        # A call appends padding too: as many positions as the widest texts beside it have.
        self.cache.reserve(len(prompt) + request.max_new_tokens + 2 * (self.most_positions + 1))
        text = self.slots[slot] = Text(request, list(prompt), reused[slot])
        self.kept[slot] = []
        # Alone, the rest of a prompt is read by the call that drafts first; beside others it would pad all of them.
        ahead = PREFILL_CHUNK if self.num_slots == 1 else 1
        while len(text.tokens) - text.num_cached > ahead:
            chunk = min(PREFILL_CHUNK, len(text.tokens) - text.num_cached - 1)
            self._prefill(text, slot, chunk)
        return text

    def leave(self, text: Text) -> None:
        """Give a text's slot up; its keys stay until another text needs the slot."""
        slot = self.slots.index(text)
        self.slots[slot], self.kept[slot] = None, text.tokens[: text.num_cached]

    @torch.inference_mode()
    def step(self) -> list[tuple[Text, Step]]:
        """One call for all texts, each of which gets at least one token; those that are finished leave."""
        self._close_gaps()
        texts = self.texts
        lead = self.model.ptp_config.lead
        layouts = []
        for text, plan in zip(texts, self.plan(texts), strict=True):
            text.drafts = text.drafts[: plan.num_drafts]
            widths = tuple(width + lead if width else 0 for width in plan.widths)
            layouts.append(RowLayout(len(text.tokens) - text.num_cached, plan.num_drafts, widths))
        found = self._call_plainly(texts[0]) if _is_plain(layouts) else self._call(texts, layouts)
        steps = []
        for row, (text, layout) in enumerate(zip(texts, layouts, strict=True)):
            num_accepted = found.num_accepted[row]
            verified = text.request.cut(found.true_tokens[row][: num_accepted + 1])
            u = text.request.u_values[text.num_written : text.num_written + len(verified)]
            steps.append((text, Step(verified, u, min(num_accepted, len(verified)), layout.num_drafts)))
            text.tokens += verified
            text.num_cached = len(text.tokens) - 1
            num_drafts = max(0, layout.widths[num_accepted] - lead)
            text.drafts, text.confidences = found.drafts[row][:num_drafts], found.confidences[row][:num_drafts]
            if text.is_finished:
                self.leave(text)
        return steps

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
        mask = call_mask(layout, cached, torch.tensor(cached, device=device))
        self.model.read(ids, layout.offset + text.num_cached, mask, self.cache)
        text.num_cached += num_tokens

    def _call(self, texts: Sequence[Text], layouts: Sequence[RowLayout]) -> Verified:
        """One forward call; the base model's tokens, what they say of the drafts, and the next drafts."""
        device, config = self.model.device, self.model.ptp_config
        shape = CallShape.of(layouts)
        layout = call_layout(layouts, shape, config.shift, device)
        cached = [text.num_cached for text in texts]
        # What differs from call to call goes to the device in one piece.
        rows = [
            [text.num_cached, text.num_written, *_filled(text.tokens[text.num_cached :] + text.drafts, shape)]
            for text in texts
        ]
        state = torch.tensor(rows, device=device)
        lengths, written, ids = state[:, 0], state[:, 1], state[:, 2:]
        u = self._numbers(texts)

        inputs = ids
        if shape.num_window:
            embedded = self.model.embed_u(_at(u, written, layout.place))
            window = self.model.add_anchor(embedded, ids.gather(1, layout.anchor), layout.first)
            inputs = torch.cat([self.model.token_embedding(ids), window], dim=1)
        alone = len(texts) == 1
        self.cache.append_at(None if alone else lengths, max(cached), shape.num_positions)
        hidden = self.model.read(
            inputs,
            layout.offset + lengths.unsqueeze(1),
            call_mask(layout, cached, lengths),
            self.cache,
            shape.gate_start if shape.num_window else None,
            None if self.model.sees_all else key_positions(layout, cached, lengths),
        )

        # Verify: drafts count up to the first that is not what the base model writes with that u.
        place = torch.arange(layout.verify.shape[1], device=device).expand_as(layout.verify)
        true_tokens = pick(warp(self.head(_rows(hidden, layout.verify)), self.rule), _at(u, written, place))
        drafted = ids.gather(1, layout.verify)[:, 1:]
        right = (drafted == true_tokens[:, :-1]) & (place[:, 1:] <= layout.num_drafts.unsqueeze(1))
        num_accepted = right.cumprod(1).sum(1, keepdim=True)

        # Draft: read the branch that came true.
        found = [true_tokens, num_accepted]
        widest = max(max(row.widths) for row in layouts)
        if device.type == "cpu":
            # Looking costs nothing here, and less is read.
            widest = int(layout.widths.gather(1, num_accepted).max())
        if widest:
            index = torch.arange(widest, device=device) + layout.starts.gather(1, num_accepted)
            logits = _rows(hidden, index.clamp(max=shape.num_positions - 1)[:, config.lead :])
            place = num_accepted + 1 + torch.arange(logits.shape[1], device=device)
            found += self._draft(self.head(logits), _at(u, written, place))
        # One copy to the host: float64 holds token ids exactly.
        numbers = torch.cat([part.double() for part in found], dim=1).tolist()
        size, drafts = true_tokens.shape[1], max(0, widest - config.lead)
        return Verified(
            true_tokens=[[int(token) for token in row[:size]] for row in numbers],
            num_accepted=[int(row[size]) for row in numbers],
            drafts=[[int(token) for token in row[size + 1 : size + 1 + drafts]] for row in numbers],
            confidences=[row[size + 1 + drafts :] for row in numbers],
        )

    def _call_plainly(self, text: Text) -> Verified:
        """`_call` for one text that drafts nothing: one position, as any decoder does it."""
        self.cache.append_at(None, text.num_cached)
        device = self.model.device
        ids, position = torch.tensor([[[text.tokens[-1]], [text.num_cached]]], device=device).unbind(1)
        hidden = self.model.read(ids, position, None, self.cache)
        token = pick(warp(self.head(hidden[:, 0]), self.rule), text.request.u[text.num_written : text.num_written + 1])
        return Verified([token.tolist()], [0], [[]], [[]])

    def _numbers(self, texts: Sequence[Text]) -> Tensor:
        """u of the tokens to come of each text, (B, longest), padded with 0."""
        if len(texts) == 1:
            return texts[0].request.u.unsqueeze(0)
        return torch.nn.utils.rnn.pad_sequence([text.request.u for text in texts], batch_first=True)

    def _draft(self, logits: Tensor, u: Tensor) -> list[Tensor]:
        """Drafts and their confidences, (B, drafts) each, from the rows (B, drafts, V) of the branches that came true.

        u: (B, drafts), of the drafts' own places.
        """
        if self.model.ptp_config.variant == "one_hot":
            best = logits.float().softmax(-1).max(-1)
            return [best.indices, best.values]
        distribution = warp(logits, self.rule)
        drafts = pick(distribution, u)
        return [drafts, probability(distribution, drafts)]


def _is_plain(layouts: Sequence[RowLayout]) -> bool:
    return len(layouts) == 1 and layouts[0].num_verify == 1 and not layouts[0].num_window


def _at(u: Tensor, written: Tensor, place: Tensor) -> Tensor:
    """u (B, longest) at places (B, n) behind the tokens written (B,); past the end, the last, which is not used."""
    return u.gather(1, (written.unsqueeze(1) + place).clamp(max=u.shape[1] - 1))


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    """Hidden states (B, T, H) at positions (B, n): (B, n, H)."""
    return hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _filled(ids: list[int], shape: CallShape) -> list[int]:
    return ids + [0] * (shape.gate_start - len(ids))


def _common(kept: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    return next((i for i, (a, b) in enumerate(zip(kept, prompt, strict=False)) if a != b), min(len(kept), len(prompt)))
