"""`pick` for a distribution that may be a little wrong: edges of intervals are not trusted to the last digit.

    logits ── probabilities, upper_edges ──► [lower, upper) of every token ── soft_pick(u, blur) ──► two, and chances

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

from ptp.sampling import Order, SamplingRule

LEAST_WIDTH = 1e-30
"""Of an interval, in a logarithm."""

MOST_LIKELY = 64
"""Tokens among which a soft pick chooses. Another one has at most a 64th of the probability, and edges are hardly ever
known so well that it would be worth a draft; passes over the whole vocabulary are what a pick costs."""


def probabilities(logits: Tensor, rule: SamplingRule) -> Tensor:
    """Of every token, (..., V) float32, at the rule's temperature; at temperature 0 those of temperature 1.

    What the rule truncates keeps its share: a window has learnt to give it little.
    """
    return (logits.float() / (rule.temperature or 1.0)).softmax(-1)


def upper_edges(probs: Tensor, order: Order) -> Tensor:
    """The upper end of every token's interval by its id, (..., V), in a rule's order; its width is its probability."""
    if order == "vocabulary":
        return probs.cumsum(-1)
    if order == "probability":
        ids = probs.argsort(dim=-1, descending=True, stable=True)
    else:
        ids = torch.tensor(order, device=probs.device).expand_as(probs)
    return torch.empty_like(probs).scatter(-1, ids, probs.gather(-1, ids).cumsum(-1))


def chances(widths: Tensor, upper: Tensor, u: Tensor, blur: Tensor) -> Tensor:
    """The chances that u picks tokens whose intervals are so wide and end there, (..., M), if edges are off by `blur`.

    widths, upper: (..., M); u, blur: (...). Those of all tokens sum to 1: the edges at 0 and 1 are where they are.
    """
    # Behind the tokens stands the whole of [0, 1): chances are shares of what its edges leave.
    widths, upper = (F.pad(values, (0, 1), value=1.0) for values in (widths, upper))
    blur = blur.unsqueeze(-1)
    end = (upper - u.unsqueeze(-1)) / blur
    inside = end.sigmoid() - (end - widths / blur).sigmoid()
    return inside[..., :-1] / inside[..., -1:]


def soft_pick(probs: Tensor, upper: Tensor | None, u: Tensor, blur: Tensor) -> tuple[Tensor, Tensor]:
    """Of the `MOST_LIKELY` tokens the two that u most likely picks, and the chances that it does.

    probs, upper: (..., V), of `probabilities` and `upper_edges`; u, blur: (...). Returns int64 and float32, each
    (..., 2), the likelier first. A greedy rule has no intervals, hence no `upper`, and looks at no u: the two likeliest
    and the chances that they are, σ(±(p₁ − p₂) / blur), for the difference of their probabilities may be off by blur as
    edges may.
    """
    if upper is None:
        best = probs.topk(2, dim=-1)
        ahead = (best.values[..., 0] - best.values[..., 1]) / blur
        return best.indices, torch.stack([ahead, -ahead], dim=-1).sigmoid()
    likely = probs.topk(min(MOST_LIKELY, probs.shape[-1]), dim=-1)
    best = chances(likely.values, upper.gather(-1, likely.indices), u, blur).topk(2, dim=-1)
    return likely.indices.gather(-1, best.indices), best.values


def negative_log_chance(probs: Tensor, upper: Tensor, tokens: Tensor, u: Tensor, blur: Tensor) -> Tensor:
    """−log of the chance that u picks these tokens, (...), with gradient in probs, upper (..., V) and blur (...).

    tokens: (...) int64; u: (...).
    """
    share, end = (values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for values in (probs, upper))
    whole = _log_between(torch.ones_like(u), 1 - u, blur)
    return whole - _log_between(share, end - u, blur)


def _log_between(width: Tensor, upper: Tensor, blur: Tensor) -> Tensor:
    """log(σ(upper / blur) − σ((upper − width) / blur)), also where the two are all but the same number."""
    between = -torch.expm1(-width.clamp(min=LEAST_WIDTH) / blur)
    return F.logsigmoid(upper / blur) + F.logsigmoid((width - upper) / blur) + between.log()
