"""What plain sampling would have written: tokens of the verify rows, and how many of them a call settles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ptp.decoding.requests import Request
from ptp.errors import DecodingError
from ptp.sampling import NO_PICK, NOT_NUMBERS, SamplingRule, pick, warp


def processed(logits: Tensor, ids: Tensor, processors: LogitsProcessorList) -> Tensor:
    """Logits of one row, (V,), as processors leave them that see the tokens before it; float32 as in transformers.

    ids: (n,) int64, prompt included. Without processors the logits come back as they are.
    """
    if not processors:
        return logits
    # A copy: a processor may write into its scores.
    scores = logits.unsqueeze(0).to(torch.float32, copy=True)
    return processors(cast(torch.LongTensor, ids.unsqueeze(0)), cast(torch.FloatTensor, scores))[0]


def sampled(
    logits: Tensor, u: Tensor, before: Sequence[int], rule: SamplingRule, processors: LogitsProcessorList
) -> Iterator[int]:
    """The token that plain sampling gives at each verify row.

    logits: (R, V). u: (R,) or more. before: the tokens that the last row sees, prompt included; the last R − 1 of them
    are drafts, and each row sees one less than the next.

    With processors a row is processed only when its token is asked for. Whoever stops asking behind a wrong draft or
    the text's end shows them what plain sampling does, and nothing else: so they may keep state, or fail on a text
    that cannot be, as those of a grammar do. Raises `DecodingError` if they leave no token to choose, and where the
    logits are not numbers.
    """
    first = len(before) - len(logits) + 1
    if not processors:
        yield from checked(pick(warp(logits, rule), u[: len(logits)]).tolist(), first)
        return
    ids = torch.tensor(before, device=logits.device)
    for row in range(len(logits)):
        scores = processed(logits[row], ids[: first + row], processors)
        if logits[row].max().isfinite() and not scores.max().isfinite():
            raise DecodingError(
                f"the logits processors leave no token to choose behind {first + row} tokens: the highest score is "
                f"{float(scores.max())}"
            )
        yield from checked([int(pick(warp(scores, rule), u[row]))], first + row)


def checked(tokens: Iterable[int], num_before: int) -> Iterator[int]:
    """Picked tokens, the first behind so many others; raises `DecodingError` where none was, for want of numbers."""
    for num_tokens, token in enumerate(tokens, num_before):
        if token == NO_PICK:
            raise DecodingError(f"the base model's logits behind {num_tokens} tokens {NOT_NUMBERS}")
        yield token


def by_rule(rules: Sequence[SamplingRule], sample: Callable[..., list[Tensor]], *rows: Tensor) -> list[Tensor]:
    """`sample(rule, *rows)`, once for all rows that share a rule; what comes back stands in the order of the rows.

    rules: B of them. rows: tensors (B, ...), as are those that `sample` returns.
    """
    if all(rule == rules[0] for rule in rules):
        return sample(rules[0], *rows)
    places: dict[SamplingRule, list[int]] = {}
    for place, rule in enumerate(rules):
        places.setdefault(rule, []).append(place)
    found = [sample(rule, *(tensor[own] for tensor in rows)) for rule, own in places.items()]
    order = torch.tensor([place for own in places.values() for place in own], device=rows[0].device).argsort()
    return [torch.cat(parts)[order] for parts in zip(*found, strict=True)]


@dataclass(frozen=True)
class Logprobs:
    """What the base model thought of a token, before the sampling rule and any processor.

    token: its log-probability. most_likely: the likeliest tokens' ids and log-probabilities, in that order.
    """

    token: float
    most_likely: list[tuple[int, float]]


def logprobs(logits: Tensor, token_ids: Sequence[int], num_most_likely: int) -> list[Logprobs]:
    """Of each token, given the logits (≥ R, V) of the rows that chose R of them."""
    scores = logits[: len(token_ids)].float().log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(token_ids, device=scores.device).unsqueeze(-1)).squeeze(-1)
    best = scores.topk(min(num_most_likely, scores.shape[-1]))
    most_likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Logprobs(own, list(zip(ids, values, strict=True)))
        for own, (ids, values) in zip(chosen.tolist(), most_likely, strict=True)
    ]


@dataclass(frozen=True)
class Verified:
    """token_ids: what a call adds to the text; the first num_accepted of them had been drafted.

    finish_reason: see `Request.finish_reason`.
    """

    token_ids: list[int]
    num_accepted: int
    finish_reason: str | None


def verify(true_tokens: Iterable[int], drafts: Sequence[int], text: Sequence[int], request: Request) -> Verified:
    """Take tokens up to the first that is not its draft (the bonus token) or that ends the text.

    true_tokens: one for each draft and one more, read only as far as that. text: prompt and accepted tokens.

    Drafts 7 4 4, true tokens 7 4 9 2: verified are 7 4 9, of which two were drafted; if 4 is an end token, 7 4.
    """
    tokens = list(text)
    num_accepted, finish_reason = 0, None
    for token, draft in zip(true_tokens, [*drafts, None], strict=False):
        tokens.append(token)
        num_accepted += token == draft
        finish_reason = request.finish_reason(tokens)
        if token != draft or finish_reason is not None:
            break
    return Verified(tokens[len(text) :], num_accepted, finish_reason)


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    return sum(takewhile(bool, map(eq, first, second)))
