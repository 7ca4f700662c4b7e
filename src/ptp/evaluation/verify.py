"""Decode prompts both ways: is the text the same, and what was gained (METHOD §4, §5)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptp.decoding.decoder import Decoder, Generation, Step
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request, make_request
from ptp.decoding.verification import processed
from ptp.sampling import Distribution, SamplingRule, interval, warp

Result = TypeVar("Result")

TIE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far an interval's edge may move by rounding when the same call is made in another batch shape."""

LOGIT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""The same of a logit, as a share of the largest."""

ROUNDINGS = 512
"""Logits that rounding may have made, among which a near-tie is looked for."""


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded both ways. seconds: (plain, parallel) of each interleaved repetition.

    verdict: "identical"; "near-tie" if the first difference is at a u within rounding of its interval's edge, or if
    rounding of the logits makes another order or another cut of tokens, so that u picks the other; else "mismatch".
    """

    request: Request
    generation: Generation
    plain_ids: list[int]
    seconds: list[tuple[float, float]]
    verdict: str

    @property
    def speedup(self) -> float:
        """Tokens per second over those of plain decoding, from the median times."""
        plain, parallel = (statistics.median(times) for times in zip(*self.seconds, strict=True))
        return (len(self.generation.token_ids) / parallel) / (len(self.plain_ids) / plain)


@dataclass(frozen=True)
class Verification:
    """All comparisons of a run. Means over prompts are as Spec-Bench defines them."""

    comparisons: list[Comparison]

    def count(self, verdict: str) -> int:
        return sum(comparison.verdict == verdict for comparison in self.comparisons)

    @property
    def tokens_per_call(self) -> float:
        """τ over all calls of all prompts."""
        generations = [comparison.generation for comparison in self.comparisons]
        return sum(len(g.token_ids) for g in generations) / sum(g.num_calls for g in generations)

    @property
    def speedup(self) -> float:
        """Mean over prompts of the ratio of tokens per second."""
        return statistics.mean(comparison.speedup for comparison in self.comparisons)

    @property
    def overhead(self) -> float:
        """Implementation overhead: τ / speed-up − 1."""
        return self.tokens_per_call / self.speedup - 1

    def tokens_per_second(self, parallel: bool) -> list[float]:
        """Tokens per second of each prompt."""
        return [
            len(c.generation.token_ids if parallel else c.plain_ids) / statistics.median(s[parallel] for s in c.seconds)
            for c in self.comparisons
        ]


def verify(
    decoder: Decoder,
    plain_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    repetitions: int = 3,
) -> Iterator[Comparison]:
    """Decode each prompt by the decoder and plainly with the same u, in turn, `repetitions` times.

    plain_model: the base model without an adapter, so that the baseline carries none of our layers.
    """
    for sequence, prompt in enumerate(prompts):
        request = make_request(plain_model, prompt, max_new_tokens, seed, sequence)
        seconds = []
        for _ in range(repetitions):
            plain_seconds, plain_ids = _timed(partial(decode_plainly, plain_model, request, decoder.rule))
            parallel_seconds, steps = _timed(partial(_all_steps, decoder, request))
            seconds.append((plain_seconds, parallel_seconds))
        generation = Generation.of(steps)
        verdict = compare(plain_model, request, decoder.rule, generation.token_ids, plain_ids)
        yield Comparison(request, generation, plain_ids, seconds, verdict)


@torch.inference_mode()
def compare(
    plain_model: PreTrainedModel, request: Request, rule: SamplingRule, token_ids: list[int], plain_ids: list[int]
) -> str:
    """The verdict on two texts that should be one (see `Comparison`)."""
    if token_ids == plain_ids:
        return "identical"
    place = next((i for i, pair in enumerate(zip(token_ids, plain_ids, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return "mismatch"
    ids = torch.tensor([request.prompt_ids + plain_ids[:place]], device=plain_model.device)
    logits = plain_model(input_ids=ids, logits_to_keep=1).logits[0, -1]
    scores, u = processed(logits, ids[0], request.processors).float(), request.u[place]
    tokens = torch.tensor([token_ids[place], plain_ids[place]], device=plain_model.device)
    near = _is_near(warp(scores, rule), tokens, u, TIE_TOLERANCE[plain_model.dtype])
    # Where tokens are cut off, put into order or, greedily, compared, rounding moves more than an edge.
    for rounded in _rounded(scores, rule, LOGIT_TOLERANCE[plain_model.dtype]):
        # Both must come that near: some token always does.
        if near.all():
            break
        near |= _is_near(rounded, tokens, u, TIE_TOLERANCE[plain_model.dtype])
    return "near-tie" if near.all() else "mismatch"


def _is_near(distribution: Distribution, tokens: Tensor, u: Tensor, tolerance: float) -> Tensor:
    """Whether u lies in the interval of each of the tokens (n,), or within the tolerance of it: (n,) bool."""
    each = Distribution(*(entry.expand(len(tokens), -1) for entry in vars(distribution).values()))
    lower, upper = interval(each, tokens)
    return torch.maximum(lower - u, u - upper) <= tolerance


def _rounded(scores: Tensor, rule: SamplingRule, share: float) -> Iterator[Distribution]:
    """Distributions of scores (V,) that leave out and order tokens as if each were off by up to a share of the largest.

    What is left keeps its own probabilities: how far edges move is the other tolerance's business.
    """
    generator = torch.Generator().manual_seed(0)
    bound = share * scores[scores.isfinite()].abs().max()
    weights = ((scores - scores.max()) / (rule.temperature or 1.0)).exp()
    for _ in range(ROUNDINGS):
        noise = 2 * torch.rand(len(scores), generator=generator).to(scores.device) - 1
        found = warp(scores + bound * noise, rule)
        own = weights[found.token_ids].masked_fill(found.probs == 0, 0)
        upper = own.cumsum(-1)
        yield Distribution(found.token_ids, own / upper[-1], upper / upper[-1])


def _all_steps(decoder: Decoder, request: Request) -> list[Step]:
    return list(decoder.steps(request))


def _timed(run: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result
