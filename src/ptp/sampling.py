"""Sampling as a function of a uniform number: rule, warp, interval, pick and the u stream (METHOD §1).

    logits ── warp(rule) ──► Distribution ── pick(u) ──► token
                                  └───────── interval(token) ──► [lower, upper)

`pick` and `interval` are inverses: `pick(P, u) == t` for every u in `interval(P, t)`. This one module serves the
teacher, the training loss, the drafts and the verifier, so they cannot disagree.

Shapes: `...` any leading dimensions, V vocabulary, K size of the sparse support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import field_validator
from torch import Tensor

from ptp.errors import ConfigError
from ptp.records import Record

Order = str | tuple[int, ...]

NO_PICK = -1
"""What is picked where the logits are not numbers."""

NOT_NUMBERS = (
    "are not numbers: its weights are damaged, or it computes with numbers too large for float16; use it in bfloat16 "
    "or float32"
)
"""What an error says of a base model's logits."""

MIN_TEMPERATURE = 1e-4
"""Logits divided by less would overflow float32."""


class SamplingRule(Record):
    """How logits become a token: temperature, top-k, top-p, then min-p, with the meaning transformers gives them.

    Each warper acts on what the one before it left; `top_p` on the renormalised mass, keeping the token that
    crosses the threshold; `min_p` drops what is less likely than that share of the likeliest token. `temperature=0` is
    greedy. `top_k=0`, `top_p=1` and `min_p=0` switch a warper off.

    `order` is the order in which probability is summed into the cumulative distribution that u indexes:
    "vocabulary" (by token id), "probability" (most likely first, ties by id) or a permutation of the vocabulary.
    Every order samples the same distribution; they differ in what u tells the network.

    Raises `ConfigError` for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    order: Order = "vocabulary"

    @field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if value != 0 and not MIN_TEMPERATURE <= value < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a number from {MIN_TEMPERATURE} up; got {value}")
        return value

    @field_validator("top_k")
    @classmethod
    def _top_k(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive count of tokens; got {value}")
        return value

    @field_validator("top_p")
    @classmethod
    def _top_p(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {value}")
        return value

    @field_validator("min_p")
    @classmethod
    def _min_p(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"min_p must lie in [0, 1]; got {value}")
        return value

    @field_validator("order")
    @classmethod
    def _order(cls, value: Order) -> Order:
        if isinstance(value, str):
            if value not in ("vocabulary", "probability"):
                raise ValueError(f"order must be 'vocabulary', 'probability' or a permutation; got {value!r}")
        elif not value or sorted(value) != list(range(len(value))):
            raise ValueError(
                f"order must hold each of 0 … {max(len(value) - 1, 0)} once; got {len(value)} other numbers"
            )
        return value

    @property
    def gives_all_tokens(self) -> bool:
        """Whether every token has an interval, whatever the logits."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    def __str__(self) -> str:
        order = self.order if isinstance(self.order, str) else "permutation"
        warpers = f"temperature {self.temperature:g}, top-k {self.top_k}, top-p {self.top_p:g}, min-p {self.min_p:g}"
        return f"{warpers}, {order} order"


@dataclass(frozen=True)
class Distribution:
    """A sparse distribution over tokens whose entries stand in the rule's order.

    token_ids: (..., K) int64, the support; entries without mass may be present and are never picked.
    probs:     (..., K) float32, sums to 1.
    upper:     (..., K) float32, cumulative sum of probs, its last entry exactly 1.

    Where a row of logits holds NaN or +inf, or nothing but -inf, all its `upper` are NaN.
    """

    token_ids: Tensor
    probs: Tensor
    upper: Tensor


def warp(logits: Tensor, rule: SamplingRule) -> Distribution:
    """The distribution the rule samples from, for logits of shape (..., V).

    Always in float32: cumulative sums in bfloat16 give 6 % of intervals no width. A row's numbers are the same beside
    any other rows, to the bit where sums run from left to right (CPU). Ties are treated as
    transformers treats them: all tokens tied at the top-k threshold stay; at the top-p threshold the smaller ids
    leave first (transformers leaves that to an unstable sort). Greedy ties go to the smallest id.

    Raises `ConfigError` if the rule's order is a permutation of another vocabulary.
    """
    if not isinstance(rule.order, str) and len(rule.order) != logits.shape[-1]:
        raise ConfigError(f"the order permutes {len(rule.order)} tokens, the vocabulary has {logits.shape[-1]}")
    scores = logits.float()
    if rule.temperature == 0:
        token_ids = scores.argmax(-1, keepdim=True)
        best = scores.gather(-1, token_ids)
        ones = torch.ones_like(best)
        return Distribution(token_ids, ones, ones.masked_fill(~best.isfinite(), torch.nan))
    scores = scores / rule.temperature
    scores, token_ids = _likeliest(scores, rule.top_k)
    if rule.top_p < 1:
        scores, token_ids = _of_mass(scores, token_ids, rule.top_p)
    weights = _weights(scores)
    if rule.min_p > 0:
        # The likeliest token weighs 1.
        weights = weights.masked_fill(weights < rule.min_p, 0)
    weights, token_ids = _in_order(weights, token_ids, rule.order)
    upper = weights.cumsum(-1)
    # Dividing by the total makes the last edge exactly 1, so every u < 1 falls into some interval.
    return Distribution(token_ids, weights / upper[..., -1:], upper / upper[..., -1:])


def pick(distribution: Distribution, u: Tensor) -> Tensor:
    """The token whose interval holds u, or `NO_PICK`. u: (...) float32 in [0, 1); returns (...) int64."""
    return _token(distribution, _entry(distribution, u))


def draw(distribution: Distribution, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`pick` and the `interval` of what it picked: tokens int64, lower and upper float32, each (...).

    The edges are read where u was found, not searched for by token: the same numbers for less.
    """
    index = _entry(distribution, u)
    before = distribution.upper.gather(-1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0)
    upper = distribution.upper.gather(-1, index).squeeze(-1)
    return _token(distribution, index), before.squeeze(-1), upper


def interval(distribution: Distribution, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[lower, upper) of each token's slice of [0, 1), each (...) float32.

    lower == upper where a token's mass is too little for float32, and both are 0 where it has none.
    """
    matches = (distribution.token_ids == tokens.unsqueeze(-1)) & (distribution.probs > 0)
    upper = torch.where(matches, distribution.upper, 0).amax(-1)
    before = torch.cat([torch.zeros_like(distribution.upper[..., :1]), distribution.upper[..., :-1]], dim=-1)
    lower = torch.where(matches, before, 0).amax(-1)
    return lower, upper


def probability(distribution: Distribution, tokens: Tensor) -> Tensor:
    """Probability of each token, (...) float32."""
    return torch.where(distribution.token_ids == tokens.unsqueeze(-1), distribution.probs, 0).sum(-1)


INTERVAL_ROWS = 1024
"""Rows of logits warped at a time, which bounds the memory of `row_intervals`."""

FEW = 512
"""Tokens that are sorted faster than the unlikely ones among them are left out."""

LogitsOf = Callable[[Tensor], Tensor]
"""Hidden states (..., H) → logits (..., V)."""


def row_intervals(states: Tensor, logits_of: LogitsOf, tokens: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    """Intervals of tokens (R,) under the distributions of hidden states (R, H): lower and upper, each (R,) float32.

    Logits of some rows at a time are made and forgotten.
    """
    parts = zip(states.split(INTERVAL_ROWS), tokens.split(INTERVAL_ROWS), strict=True)
    edges = [torch.stack(interval(warp(logits_of(rows), rule), chosen)) for rows, chosen in parts]
    lower, upper = torch.cat(edges, dim=1)
    return lower, upper


def token_intervals(
    states: Tensor, logits_of: LogitsOf, ids: Tensor, wanted: Tensor, rule: SamplingRule
) -> tuple[Tensor, Tensor]:
    """Intervals of the tokens of whole sequences: that of token j under the distribution row j − 1 gives.

    states: (B, S, H); ids: (B, S); wanted: (B, S) bool, not at j = 0. Returns (lower, upper), (B, S) float32, zero
    where not wanted.
    """
    edges = states.new_zeros(2, *ids.shape, dtype=torch.float32)
    row, place = torch.nonzero(wanted, as_tuple=True)
    edges[:, row, place] = torch.stack(row_intervals(states[row, place - 1], logits_of, ids[row, place], rule))
    return edges[0], edges[1]


def inside(lower: Tensor, upper: Tensor, z: Tensor) -> Tensor:
    """u = lower + (upper − lower)·z, kept inside [lower, upper) against rounding. z in [0, 1]; empty stays lower.

    An empty interval may lie at 1, behind all mass; u stays below 1 there too, so that some token can be picked.
    """
    u = lower + (upper - lower) * z
    return torch.maximum(torch.minimum(u, torch.nextafter(upper, lower)), lower).clamp(max=1 - 2**-24)


def uniform(seed: int, sequence: int | Tensor, position: int | Tensor) -> Tensor:
    """The number u of a position of a sequence: float32 in [0, 1) with 24 random bits.

    A counter-based generator (Philox-4x32-10, Salmon et al. 2011): the same (seed, sequence, position) gives the
    same u in any batch, on any device, after any restart. `sequence` and `position` are non-negative and are
    broadcast against each other.
    """
    seq = torch.as_tensor(sequence, dtype=torch.int64)
    pos = torch.as_tensor(position, dtype=torch.int64, device=seq.device if seq.ndim else None)
    seq, pos = torch.broadcast_tensors(seq.to(pos.device), pos)
    counter = (pos & _LOW32, pos >> 32 & _LOW32, seq & _LOW32, seq >> 32 & _LOW32)
    word = philox_4x32(counter, (seed & _LOW32, seed >> 32 & _LOW32))[0]
    return (word >> 8).to(torch.float32) * 2.0**-24


_LOW32 = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[int, int], rounds: int = 10) -> Words:
    """Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Every word is an int64 tensor (or int, for the key) holding 32 bits. A 32 × 32 bit product wraps in int64 to
    the right 64 bits, from which both halves are read.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = product0 >> 32 & _LOW32, product1 >> 32 & _LOW32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW32, high0 ^ c3 ^ k1, product0 & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def _entry(distribution: Distribution, u: Tensor) -> Tensor:
    """Index (..., 1) of the entry whose interval holds u; of some entry where edges are not numbers."""
    index = torch.searchsorted(distribution.upper, u.unsqueeze(-1).contiguous(), right=True)
    return index.clamp(max=distribution.upper.shape[-1] - 1)


def _token(distribution: Distribution, index: Tensor) -> Tensor:
    """Tokens (...) of the entries that `_entry` found, (..., 1)."""
    tokens = distribution.token_ids.gather(-1, index)
    return tokens.masked_fill(distribution.upper[..., -1:].isnan(), NO_PICK).squeeze(-1)


def _weights(scores: Tensor) -> Tensor:
    """Softmax before its division. The sum is left to `cumsum`, in which the zeros that pad a row change nothing."""
    return (scores - scores.amax(-1, keepdim=True)).exp()


def _likeliest(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores and ids of the tokens top-k leaves, padded with −inf, ids ascending so that ties sort as over V."""
    vocab_size = scores.shape[-1]
    all_ids = torch.arange(vocab_size, device=scores.device).expand_as(scores)
    if not 0 < top_k < vocab_size:
        return scores, all_ids
    if torch.compiler.is_compiling():
        # How many are tied cannot be looked at.
        threshold = scores.topk(top_k).values[..., -1:]
        return scores.masked_fill(scores < threshold, -torch.inf), all_ids
    # One more than k shows whether a tie reaches beyond the k-th; only then are ties counted over all of V.
    best, token_ids = scores.topk(top_k + 1)
    threshold = best[..., -2:-1]
    if (best[..., -1:] == threshold).any():
        size = int((scores >= threshold).sum(-1).max())
        best, token_ids = scores.topk(size)
    else:
        best, token_ids = best[..., :-1], token_ids[..., :-1]
    best, token_ids = _by_id(best, token_ids)
    return best.masked_fill(best < threshold, -torch.inf), token_ids


def _of_mass(scores: Tensor, token_ids: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Scores and ids of the tokens top-p leaves, padded with −inf, ids ascending.

    Like transformers, it sums from the least likely end and keeps the order of ties. Tokens so unlikely that all of
    them together are less than what is cut off need not be sorted for that.
    """
    weights = _weights(scores)
    shares = weights / weights.cumsum(-1)[..., -1:]
    below: Tensor | float = 0.0
    if scores.shape[-1] > FEW and scores.numel() and not torch.compiler.is_compiling():
        unlikely = shares < 0.5 * (1 - top_p) / scores.shape[-1]
        below = shares.masked_fill(~unlikely, 0).cumsum(-1)[..., -1:]
        size = int((~unlikely).sum(-1).max())
        scores, places = _by_id(*scores.masked_fill(unlikely, -torch.inf).topk(size))
        shares = shares.masked_fill(unlikely, 0).gather(-1, places)
        token_ids = token_ids.gather(-1, places)
    ascending = scores.argsort(dim=-1, stable=True)
    drop = below + shares.gather(-1, ascending).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, ascending, drop), -torch.inf), token_ids


def _by_id(scores: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    token_ids, by_id = token_ids.sort(-1)
    return scores.gather(-1, by_id), token_ids


def _in_order(weights: Tensor, token_ids: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Entries that stand by ascending token id, brought into the rule's order."""
    if order == "vocabulary":
        return weights, token_ids
    if order == "probability":
        index = weights.argsort(dim=-1, descending=True, stable=True)
    else:
        rank = torch.tensor(order, device=token_ids.device).argsort()
        index = rank[token_ids].argsort(-1)
    return weights.gather(-1, index), token_ids.gather(-1, index)
