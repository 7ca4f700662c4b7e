"""Partial Quadratic Decoding: draft and verify in one call, losslessly (METHOD §4)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

from ptp.cache import RollbackCache
from ptp.decoding.allocation import allocate
from ptp.decoding.layout import CallLayout, call_mask, window_rows
from ptp.decoding.requests import Request, make_request
from ptp.decoding.verification import sampled, verify
from ptp.errors import ConfigError
from ptp.model.gated_lora import lora_layers
from ptp.model.ptp_model import PTPModel, check_decodable
from ptp.sampling import SamplingRule, pick, probability, warp

logger = logging.getLogger(__name__)

PREFILL_CHUNK = 512
"""Prompt tokens run ahead of the first call at a time, so that its mask stays small."""


@dataclass(frozen=True)
class Step:
    """What one call settled. token_ids: verified tokens, in order; the first num_accepted of them had been drafted.

    u: their numbers. num_drafts: draft tokens the call verified. finish_reason: of the last call, why the text ends
    there (see `Request.finish_reason`).
    """

    token_ids: list[int]
    u: list[float]
    num_accepted: int
    num_drafts: int
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generation:
    """A finished text: verified tokens only, cut behind the first that ends it or at max_new_tokens.

    token_ids, u: the tokens and the number that chose each. steps: the calls that yielded them.
    finish_reason: "stop" if the last token is an end token or a stopping criterion holds there, else "length".
    """

    token_ids: list[int]
    u: list[float]
    steps: list[Step]
    finish_reason: str

    @classmethod
    def of(cls, steps: list[Step]) -> Generation:
        """Collect the steps that answered a request, all of them."""
        reason = steps[-1].finish_reason
        assert reason is not None, "the steps end before their text does"
        token_ids = [token for step in steps for token in step.token_ids]
        return cls(token_ids, [u for step in steps for u in step.u], steps, reason)

    @property
    def num_calls(self) -> int:
        return len(self.steps)

    @property
    def num_draft_tokens(self) -> int:
        return sum(step.num_drafts for step in self.steps)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(step.num_accepted for step in self.steps)

    @property
    def tokens_per_call(self) -> float:
        """τ: verified tokens per model call, bonus tokens included; 1 for plain decoding."""
        return len(self.token_ids) / self.num_calls


class Decoder:
    """Writes several tokens per call; the text is what the base model alone would have sampled with the same u.

    model: a PTP model. rule: how tokens are sampled (default: the rule the adapter was trained for, else
    temperature 1). budget: positions a call may spend on drafts and branches; 0 is plain decoding. merge: keep merged
    copies of the adapted weights for the window positions, which doubles the memory of those layers and makes the
    calls of a small model faster; the text is the same.
    """

    def __init__(
        self, model: PTPModel, rule: SamplingRule | None = None, budget: int = 24, merge: bool = False
    ) -> None:
        if budget < 0:
            raise ConfigError(f"budget must be 0 (plain decoding) or a positive number of positions; got {budget}")
        check_decodable(model.ptp_config)
        self.model = model.eval()
        for layer in lora_layers(model.base_model).values():
            layer.merge() if merge else layer.unmerge()
        self.rule = rule or model.rule or SamplingRule()
        self.budget = budget
        if model.rule is not None and self.rule != model.rule:
            logger.warning(
                "the adapter was trained for %s; under %s the text is as right, but fewer drafts are accepted",
                model.rule,
                self.rule,
            )

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        seed: int = 0,
        sequence: int = 0,
        end_token_ids: Sequence[int] | None = None,
        min_new_tokens: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingCriteria] = (),
        streamer: BaseStreamer | None = None,
    ) -> Generation:
        """Complete a prompt. Raises `DecodingError` for an empty prompt or one that leaves no room for a token.

        seed, sequence: name the stream of u; the same pair gives the same text whatever the budget or the adapter.
        end_token_ids: tokens that end the text; default those of the base model's generation config. min_new_tokens:
        tokens before which none of them is written. processors, stopping: transformers' own, which do here what they
        do in plain sampling (see `Request`); those of a `GenerationConfig` come from `ptp.decoding.options`.
        streamer: see `answer`.
        """
        base_model = self.model.base_model
        request = make_request(
            base_model, prompt_ids, max_new_tokens, seed, sequence, end_token_ids, min_new_tokens, processors, stopping
        )
        return self.answer(request, streamer)

    def answer(self, request: Request, streamer: BaseStreamer | None = None) -> Generation:
        """Decode a request to its end.

        streamer: one of transformers', which gets what `model.generate` gives it: the prompt (1, n), each verified
        token (1,) in order, and the end. What it raises ends the decoding and harms no other.
        """
        if streamer is None:
            return Generation.of(list(self.steps(request)))
        streamer.put(torch.tensor([request.prompt_ids]))
        steps = []
        for step in self.steps(request):
            steps.append(step)
            for token in step.token_ids:
                streamer.put(torch.tensor([token]))
        streamer.end()
        return Generation.of(steps)

    @torch.inference_mode()
    def steps(self, request: Request) -> Iterator[Step]:
        """The decoding loop: allocate → layout → call → verify → commit → draft. Yields each call's verified tokens."""
        lead = self.model.ptp_config.lead
        tokens = list(request.prompt_ids)
        cache = RollbackCache(self.model.num_layers, len(tokens) + request.max_new_tokens + self.budget)
        pending = self._prefill(tokens, cache)
        embedded_u = self.model.embed_u(request.u)
        drafts: list[int] = []
        confidences: list[float] = []
        while True:
            plan = allocate(confidences, self.model.survival, self.budget, request.num_remaining(tokens), lead)
            drafts = drafts[: plan.num_drafts]
            layout = CallLayout(len(pending), len(drafts), tuple(w + lead if w else 0 for w in plan.widths))
            done = len(tokens) - len(request.prompt_ids)
            u = request.u[done:]
            logits = self._call(layout, pending + drafts, embedded_u[done:], cache)

            true_tokens = sampled(logits[: len(drafts) + 1], u, tokens + drafts, self.rule, request.processors)
            verified = verify(true_tokens, drafts, tokens, request)
            new, accepted = verified.token_ids, verified.num_accepted
            yield Step(new, u[: len(new)].tolist(), accepted, len(drafts), verified.finish_reason)

            tokens += new
            if verified.finish_reason is not None:
                return
            cache.rollback(len(tokens) - 1)
            pending = tokens[-1:]
            start, end = (row - layout.num_pending + 1 for row in layout.branch_rows(accepted))
            drafts, confidences = self._draft(logits[start:end], u[accepted + 1 :])

    def _prefill(self, tokens: list[int], cache: RollbackCache) -> list[int]:
        """Cache all but the last stretch of a long prompt; returns the tokens left for the first call."""
        done = 0
        while len(tokens) - done > PREFILL_CHUNK:
            self._call(CallLayout(PREFILL_CHUNK, 0, (0,)), tokens[done : done + PREFILL_CHUNK], torch.empty(0), cache)
            done += PREFILL_CHUNK
        return tokens[done:]

    def _call(self, layout: CallLayout, verify: list[int], embedded_u: Tensor, cache: RollbackCache) -> Tensor:
        """Logits (1 + drafts + window rows, V) of a call: the last pending row, the draft rows, the branches.

        verify: pending and draft tokens. embedded_u: (places, H), of the tokens to come, the first not yet accepted
        first.
        """
        model, device = self.model, self.model.device
        num_cached = cache.get_seq_length()
        inputs = torch.tensor([verify], device=device)
        positions = torch.arange(num_cached, num_cached + len(verify), device=device)
        gate_start = None
        if layout.num_rows > layout.gate_start:
            rows = window_rows(layout.widths, device)
            # Branch b takes the last pending token and b drafts as accepted; the last of these is its anchor.
            anchor = inputs[0, layout.num_pending - 1 :][rows.branch]
            window = model.add_anchor(embedded_u[rows.place], anchor, rows.first)
            inputs = torch.cat([model.token_embedding(inputs), window.unsqueeze(0)], dim=1)
            first_open = num_cached + layout.num_pending
            positions = torch.cat([positions, rows.place + (first_open + model.ptp_config.shift)])
            gate_start = layout.gate_start
        return model.call(
            inputs,
            positions.unsqueeze(0),
            call_mask(layout, num_cached, device),
            cache,
            gate_start,
            logits_to_keep=layout.num_rows - layout.num_pending + 1,
        )[0]

    def _draft(self, logits: Tensor, u: Tensor) -> tuple[list[int], list[float]]:
        """Drafts and their confidences from the rows of the branch that came true. u: from the first draft's on."""
        if self.model.ptp_config.variant == "one_hot":
            best = logits[1:].float().softmax(-1).max(-1)
            return best.indices.tolist(), best.values.tolist()
        distribution = warp(logits, self.rule)
        drafts = pick(distribution, u[: len(logits)])
        return drafts.tolist(), probability(distribution, drafts).tolist()
