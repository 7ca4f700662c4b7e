"""Partial Quadratic Decoding: draft and verify in one call, losslessly (METHOD §4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

from ptp.cache import SlotCache
from ptp.decoding.allocation import Profile
from ptp.decoding.budget import FixedBudget, Latency, MeasuredBudget, Policy
from ptp.decoding.call import Text
from ptp.decoding.device import Functions, compiled_functions
from ptp.decoding.drafting import Drafter
from ptp.decoding.latency import CALLS, CONTEXT, kept_latency, measure_latency
from ptp.decoding.requests import Request, make_request
from ptp.decoding.session import Session, Step
from ptp.errors import ConfigError
from ptp.layer_kinds import context_length
from ptp.model.gated_lora import lora_layers
from ptp.model.head import output_head
from ptp.model.ptp_model import PTPModel, check_decodable
from ptp.sampling import SamplingRule

logger = logging.getLogger(__name__)


Budget = int | Literal["auto"]
"""Positions a call may spend on a text's drafts and branches, or as many as pay."""

MOST_POSITIONS = 64
"""Positions of a text in a call beyond which a measured budget does not look: few branches come true so far out."""


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

    model: a PTP model, whose weights must not change any more. rule: how tokens are sampled (default: the rule the
    adapter was trained for, else temperature 1). budget: positions a call may spend on a text's drafts and branches;
    0 is plain decoding, and "auto" as many as pay by the time that calls take on this machine, which is measured once
    (some seconds) and kept. compile: run calls compiled, on a GPU as CUDA graphs; a session's first calls then take
    long.
    """

    def __init__(
        self, model: PTPModel, rule: SamplingRule | None = None, budget: Budget = 24, compile: bool = False
    ) -> None:
        if budget != "auto" and (not isinstance(budget, int) or budget < 0):
            raise ConfigError(
                f"budget must be auto, 0 (plain decoding) or a positive number of positions; got {budget!r}"
            )
        check_decodable(model.ptp_config)
        self.model = model.eval()
        for layer in lora_layers(model.base_model).values():
            layer.join()
        self.drafter = Drafter(model, output_head(model.base_model))
        self.rule = rule or model.rule or SamplingRule()
        self.functions = compiled_functions(model) if compile else Functions()
        self.caches: dict[int, SlotCache] = {}
        self.policy = self._policy(budget)
        if model.rule is not None and self.rule != model.rule:
            logger.warning(
                "the adapter was trained for %s; under %s the text is as right, but fewer drafts may be accepted",
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

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        seed: int = 0,
        end_token_ids: Sequence[int] | None = None,
        batch_size: int = 8,
    ) -> list[Generation]:
        """Complete prompts, up to `batch_size` of them in one call; prompt i is the sequence i of the seed.

        Each text is what `generate` makes of its prompt alone. One that ends gives its place to the next.
        """
        requests = [
            make_request(self.model.base_model, prompt, max_new_tokens, seed, number, end_token_ids)
            for number, prompt in enumerate(prompts)
        ]
        steps: list[list[Step]] = [[] for _ in requests]
        for number, step in self.steps_of(requests, batch_size):
            steps[number].append(step)
        return [Generation.of(each) for each in steps]

    def steps(self, request: Request) -> Iterator[Step]:
        """What each call settles of one request."""
        return (step for _, step in self.steps_of([request], 1))

    def steps_of(self, requests: Iterable[Request], batch_size: int) -> Iterator[tuple[int, Step]]:
        """What each call settles, with the number of the request; requests are taken as places become free."""
        session, waiting = self.session(batch_size), enumerate(requests)
        numbers: dict[Text, int] = {}
        upcoming = next(waiting, None)
        while upcoming or session.texts:
            while upcoming and not session.is_full:
                number, request = upcoming
                numbers[session.enter(request)] = number
                upcoming = next(waiting, None)
            for text, step in session.step():
                yield numbers[text] if step.finish_reason is None else numbers.pop(text), step
        if self.functions.are_compiled:
            # A CUDA graph is bound to the cache it was captured with.
            self.caches[batch_size] = session.cache

    def session(self, num_slots: int = 1) -> Session:
        """Places for requests to come and go in, such as the turns of a chat or what clients of a server ask."""
        return self._session(self.policy, num_slots)

    def _session(self, policy: Policy, num_slots: int) -> Session:
        cache = self.caches.pop(num_slots, None)
        return Session(self.model, self.rule, self.drafter, policy, num_slots, self.functions, cache)

    def _policy(self, budget: Budget) -> Policy:
        profile = Profile.of(self.model, self.model.ptp_config.lead)
        if budget != "auto":
            return FixedBudget(profile, budget)
        if not profile.survival:
            return FixedBudget(profile, 0)

        def measure() -> Latency:
            context = context_length(self.model.base_model.config) or 2 * CONTEXT
            prompt = [0] * max(1, min(CONTEXT, context // 2))
            # Room for two windows and no more: many texts of a long context would not fit beside a large model.
            room = min(2 * self.model.ptp_config.window + 2, context - len(prompt))
            requests = [
                make_request(self.model.base_model, prompt, room, seed=0, sequence=number, end_token_ids=[])
                for number in range(max(CALLS))
            ]
            return measure_latency(self._session, requests, profile)

        return MeasuredBudget(profile, kept_latency(self.model, self.functions.are_compiled, measure), MOST_POSITIONS)
