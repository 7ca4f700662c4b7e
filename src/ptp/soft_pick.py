"""`pick` for a distribution that may be a little wrong: edges of intervals are not trusted to the last digit.

    logits ── soft_intervals(rule) ──► [lower, upper) of every token ── chance(u, blur) ──► how likely u picks it

A window only estimates the distribution that the base model will have. Where u lies near an edge of the estimate,
either neighbour may be meant; where the estimate is poor, the likeliest token is a better guess than the one whose
interval holds u. If an edge that is estimated at f truly lies at f + blur · ε, ε logistic, then u picks a token with
the chance σ((upper − u) / blur) − σ((lower − u) / blur). With a blur near 0 that is `ptp.sampling.pick`; the larger it
is, the nearer the chances come to the distribution itself. It has a gradient in distribution and blur, so a network can
learn both from which token it was.

Shapes: `...` any leading dimensions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ptp.sampling import SamplingRule

LEAST_WIDTH = 1e-30
"""Of an interval, in a logarithm."""


def soft_intervals(logits: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    """[lower, upper) of every token by its id, each (..., V) float32, in the rule's order and at its temperature.

    logits: (..., V). What the rule truncates keeps its share: a window has learnt to give it little. At temperature 0
    they are those of temperature 1, for a greedy rule asks for the likeliest token and has no intervals.
    """
    probs, upper = _shares(logits, rule)
    return upper - probs, upper


def _shares(logits: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    """Each token's probability and upper edge."""
    probs = (logits.float() / (rule.temperature or 1.0)).softmax(-1)
    if rule.order == "vocabulary":
        return probs, probs.cumsum(-1)
    if rule.order == "probability":
        ids = probs.argsort(dim=-1, descending=True, stable=True)
    else:
        ids = torch.tensor(rule.order, device=probs.device).expand_as(probs)
    ordered = probs.gather(-1, ids)
    return probs, torch.empty_like(probs).scatter(-1, ids, ordered.cumsum(-1))


def chance(lower: Tensor, upper: Tensor, u: Tensor, blur: Tensor) -> Tensor:
    """The chance that u picks what has the interval [lower, upper), if edges are off by `blur`. All are broadcast.

    Chances of all tokens sum to 1: the edges at 0 and 1 are where they are.
    """
    inside = torch.sigmoid((upper - u) / blur) - torch.sigmoid((lower - u) / blur)
    return inside / (torch.sigmoid((1 - u) / blur) - torch.sigmoid(-u / blur))


def soft_pick(logits: Tensor, u: Tensor, blur: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    """The two tokens that u most likely picks, and the chances that it does.

    logits: (..., V); u, blur: (...). Returns int64 and float32, each (..., 2), the likelier first. Under a greedy rule,
    which looks at no u, the two likeliest and the chances that they are: σ(±(p₁ − p₂) / blur), for the difference of
    their probabilities may be off by blur as edges may.
    """
    if rule.temperature == 0:
        best = logits.float().softmax(-1).topk(2, dim=-1)
        ahead = (best.values[..., 0] - best.values[..., 1]) / blur
        return best.indices, torch.stack([ahead, -ahead], dim=-1).sigmoid()
    u, blur = u.unsqueeze(-1), blur.unsqueeze(-1)
    if rule.order == "vocabulary":
        # Each token's upper edge is the next one's lower: half the work of `chance`.
        probs = (logits.float() / rule.temperature).softmax(-1)
        below = torch.sigmoid((F.pad(probs, (1, 0)).cumsum(-1) - u) / blur)
        best = below.diff(dim=-1).topk(2, dim=-1)
        return best.indices, best.values / (below[..., -1:] - below[..., :1])
    lower, upper = soft_intervals(logits, rule)
    best = chance(lower, upper, u, blur).topk(2, dim=-1)
    return best.indices, best.values


def negative_log_chance(logits: Tensor, tokens: Tensor, u: Tensor, blur: Tensor, rule: SamplingRule) -> Tensor:
    """−log of the chance that u picks these tokens, (...), with gradient in logits (..., V) and blur (...).

    tokens: (...) int64; u: (...). A greedy rule has no u: it is the cross-entropy, whatever the blur.
    """
    if rule.temperature == 0:
        scores = logits.float()
        # The blur's gradient is 0, not absent: every weight of a model that several processes train must have one.
        return torch.logsumexp(scores, -1) - scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) + 0 * blur
    share, upper = (values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for values in _shares(logits, rule))
    whole = _log_between(torch.ones_like(u), 1 - u, blur)
    return whole - _log_between(share, upper - u, blur)


def _log_between(width: Tensor, upper: Tensor, blur: Tensor) -> Tensor:
    """log(σ(upper / blur) − σ((upper − width) / blur)), also where the two are all but the same number."""
    between = -torch.expm1(-width.clamp(min=LEAST_WIDTH) / blur)
    return F.logsigmoid(upper / blur) + F.logsigmoid((width - upper) / blur) + between.log()
