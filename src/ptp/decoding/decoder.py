"""Partial Quadratic Decoding: draft and verify in one call, losslessly (METHOD §4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ptp.decoding.allocation import Allocation, Profile, allocate, fixed
from ptp.decoding.requests import Request, make_request
from ptp.decoding.session import Session, Step, Text
from ptp.errors import ConfigError
from ptp.model.gated_lora import lora_layers
from ptp.model.head import output_head
from ptp.model.ptp_model import PTPModel, check_decodable
from ptp.sampling import SamplingRule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """A finished text: verified tokens only, cut at the first end token or at max_new_tokens.

    token_ids, u: the tokens and the number that chose each. steps: the calls that yielded them.
    finish_reason: "stop" if the last token is an end token, else "length".
    """

    token_ids: list[int]
    u: list[float]
    steps: list[Step]
    finish_reason: str

    @classmethod
    def of(cls, steps: list[Step], request: Request) -> Generation:
        """Collect the steps that answered a request."""
        token_ids = [token for step in steps for token in step.token_ids]
        reason = "stop" if token_ids[-1] in request.end_token_ids else "length"
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
    0 is plain decoding.
    """

    def __init__(self, model: PTPModel, rule: SamplingRule | None = None, budget: int = 24) -> None:
        if budget < 0:
            raise ConfigError(f"budget must be 0 (plain decoding) or a positive number of positions; got {budget}")
        check_decodable(model.ptp_config)
        self.model = model.eval()
        for layer in lora_layers(model.base_model).values():
            layer.join()
        self.head = output_head(model.base_model)
        self.rule = rule or model.rule or SamplingRule()
        self.budget = budget
        self.profile = Profile(model.survival, model.ptp_config.lead)
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
    ) -> Generation:
        """Complete a prompt. Raises `DecodingError` for an empty prompt or one that leaves no room for a token.

        seed, sequence: name the stream of u; the same pair gives the same text whatever the budget or the adapter.
        end_token_ids: tokens that end the text; default those of the base model's generation config.
        """
        request = make_request(self.model.base_model, prompt_ids, max_new_tokens, seed, sequence, end_token_ids)
        return Generation.of(list(self.steps(request)), request)

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
        return [Generation.of(*pair) for pair in zip(steps, requests, strict=True)]

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
                yield numbers[text], step

    def session(self, num_slots: int = 1) -> Session:
        """Places for requests to come and go in, such as the turns of a chat or what clients of a server ask."""
        return Session(self.model, self.rule, self.head, self.plan, num_slots, self.budget)

    def plan(self, texts: Sequence[Text]) -> list[Allocation]:
        """What the next call does for each text (METHOD §4, step 4)."""
        price = fixed(self.budget)
        return [allocate(text.confidences, self.profile, price, text.num_remaining) for text in texts]
