"""What a draft's confidence is worth: how often drafts that were as sure have been right (METHOD §4, step 6).

confidences of held-out windows ── counts by bin ──► Calibration ── of a draft's confidence ──► its chance
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import field_validator
from torch import Tensor

from ptp.records import Record

NUM_BINS = 20
"""Equal bins of [0, 1]. Bins of equal width in log-odds are no better where it was measured (docs/results.md)."""

PRIOR_DRAFTS = 4.0
"""Drafts of each bin that are taken to have been as sure as right, before any is counted."""


class Calibration(Record):
    """How often drafts were right, by the confidence they were proposed with; empty, a confidence is the chance itself.

    curves: values in (0, 1) at the centres of equal bins of [0, 1], ascending. O-PTP has two: of windows whose first
    output was not the bonus token, and of those whose was. C-PTP, whose windows begin behind it, has one of windows and
    one of continued drafts, if there are such.
    """

    curves: tuple[tuple[float, ...], ...] = ()

    @field_validator("curves")
    @classmethod
    def _curves(cls, curves: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        for curve in curves:
            if len(curve) < 2 or list(curve) != sorted(curve) or not 0 < curve[0] <= curve[-1] < 1:
                raise ValueError(
                    f"a curve of calibration must hold two or more ascending chances in (0, 1); got {curve}"
                )
        if len({len(curve) for curve in curves}) > 1:
            raise ValueError(f"curves of calibration must be of one length; got {[len(curve) for curve in curves]}")
        return curves

    @classmethod
    def of(cls, tried: Tensor, right: Tensor) -> Calibration:
        """The non-decreasing curves nearest to what was counted (isotonic regression).

        tried, right: (G, NUM_BINS) drafts by curve and `confidence_bin`, and how many of them were right.
        """
        sure = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS
        hits, weights = right.cpu() + PRIOR_DRAFTS * sure, tried.cpu() + PRIOR_DRAFTS
        return cls(curves=tuple(map(ascending, hits.tolist(), weights.tolist())))

    def __call__(self, confidences: Tensor, curve: Tensor | None = None) -> Tensor:
        """Chances that drafts are right, given that those before them are. Returns (…), linear between centres.

        confidences: (…) float. curve: of each, broadcast against them; where there is but one, None.
        """
        if not self.curves:
            return confidences
        values = confidences.new_tensor(self.curves)
        num_bins = values.shape[-1]
        place = (confidences * num_bins - 0.5).clamp(0, num_bins - 1)
        left = place.long().clamp(0, num_bins - 2)
        entry = left if curve is None else left + curve.long() * num_bins
        values = values.flatten()
        return torch.lerp(values[entry], values[entry + 1], place - left)


def confidence_bin(confidences: Tensor) -> Tensor:
    """The bin of each confidence (…), int64."""
    return (confidences * NUM_BINS).long().clamp(0, NUM_BINS - 1)


def ascending(hits: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing values that are nearest to hits / weights in weighted squares.

    By the min-max formula (Barlow et al., "Statistical inference under order restrictions", 1972): value i is the
    largest, over beginnings a ≤ i, of the smallest mean of a … b over ends b ≥ i. Of 10 tries each, hits 1, 6, 2, 9
    become 0.1, 0.4, 0.4, 0.9.
    """

    def mean(a: int, b: int) -> float:
        return sum(hits[a : b + 1]) / sum(weights[a : b + 1])

    size = len(hits)
    return tuple(max(min(mean(a, b) for b in range(i, size)) for a in range(i + 1)) for i in range(size))
