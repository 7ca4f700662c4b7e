"""Curves of a training, from what the Trainer logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Curve = list[tuple[int, float]]
"""(step, value) of a quantity, by ascending step."""

NAMES = ("loss", "correct", "tokens_per_call", "tokens_per_second", "eval_loss", "eval_correct", "eval_tokens_per_call")
"""Figures of the log rows that are kept, and with them those that begin with `BY_INDEX`."""

BY_INDEX = "eval_accuracy/"

MOST_POINTS = 400
"""Of a curve; a longer one shows no more, and a long training logs a hundred thousand rows."""


def curves(log_history: Iterable[Mapping[str, float]]) -> dict[str, Curve]:
    """The curves by their names in the log rows, "loss" of training and "eval_loss" of validation among them."""
    found: dict[str, Curve] = {}
    for row in log_history:
        for name, value in row.items():
            if name in NAMES or name.startswith(BY_INDEX):
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: Sequence[tuple[int, float]]) -> Curve:
    """Every n-th point up to the last, `MOST_POINTS` of them at most."""
    stride = max(1, -(-len(points) // MOST_POINTS))
    return list(points[(len(points) - 1) % stride :: stride])
