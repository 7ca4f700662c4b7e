"""The positions of one decoding call and what each may attend to (METHOD §4).

    row    0 … p−1      p … p+m−1    then s               (padding)     then for b = 0 … m       (padding)
           pending      drafts       second candidates                  branch b, w_b positions
           gate off     gate off     gate off             gate off      gate on                  gate on

Pending tokens are accepted but not yet cached: the prompt in the first call, the last one or two tokens later. Their
last row and the draft rows verify. A second candidate stands where its draft does and sees what that sees: its row is
what goes on if the draft is wrong and it is right. Branch b is written for the case that exactly b drafts are accepted.
Texts that are decoded together have layouts of their own, padded to one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MOST_PENDING = 2
"""Verified tokens that a call behind the prompt reads, at most: a bonus token, and a second candidate before it."""


@dataclass(frozen=True)
class RowLayout:
    """One text's share of a call. num_pending: p ≥ 1. num_drafts: m. widths: window positions of branches 0 … m.

    seconds: of the drafts 0 … m − 1, those beside which there is a second candidate.
    """

    num_pending: int
    num_drafts: int
    widths: tuple[int, ...]
    seconds: tuple[int, ...] = ()

    @property
    def num_verify(self) -> int:
        """Positions that pass through the base model's own weights."""
        return self.num_pending + self.num_drafts + len(self.seconds)

    @property
    def num_window(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class CallShape:
    """Positions of every text in a call: [0, gate_start) with the gate shut, then num_window gated ones."""

    gate_start: int
    num_window: int

    @property
    def num_positions(self) -> int:
        return self.gate_start + self.num_window

    @classmethod
    def of(cls, layouts: Sequence[RowLayout]) -> CallShape:
        """The smallest shape that holds the layouts."""
        return cls(max(row.num_verify for row in layouts), max(row.num_window for row in layouts))


@dataclass(frozen=True)
class CallLayout:
    """The layouts of B texts in one shape of T = gate_start + W positions. Padding is 0, and sees itself alone.

    offset: (B, T) int64, distance of a position from the first that is not cached. sees: (B, T, T) bool, which of the
    call's positions each sees; texts see all of their own cache besides. place: (B, W) int64, b + k for index k of
    branch b: the place of the position's u, counted from the first token not yet accepted. anchor: (B, W) int64,
    the position of the last token that the branch takes as accepted. first: (B, W) bool, k == 0. starts, widths:
    (B, branches) int64, where each branch begins and how many positions it has. verify: (B, branches) int64, the
    positions that verify, the last repeated. second: (B, branches) int64, the position of the second candidate for the
    draft behind so many, −1 where there is none. num_drafts: (B,) int64.
    """

    offset: Tensor
    sees: Tensor
    place: Tensor
    anchor: Tensor
    first: Tensor
    starts: Tensor
    widths: Tensor
    verify: Tensor
    second: Tensor
    num_drafts: Tensor


def call_layout(
    rows: Sequence[RowLayout], shape: CallShape, shift: int, device: torch.device, num_branches: int | None = None
) -> CallLayout:
    """The layouts of several texts as one. shift: see `PTPConfig.shift`. num_branches: by default, those there are."""
    num_branches = num_branches or 1 + max(row.num_drafts for row in rows)
    # Layouts behind a prompt come back again and again; those of prompts are large and do not.
    parts = [
        (_kept_layout if row.num_pending <= MOST_PENDING else row_layout)(row, shape, num_branches, shift, device)
        for row in rows
    ]
    if len(parts) == 1:
        return parts[0]
    return CallLayout(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(CallLayout)))


def row_layout(row: RowLayout, shape: CallShape, num_branches: int, shift: int, device: torch.device) -> CallLayout:
    """The layout of one text in a larger shape. What its positions see of each other:

    one pending token a, drafts d e, branches of widths 2, 1, 1 (rows and columns a d e 0 0 1 2), without padding

        a  1 . . . . . .
        d  1 1 . . . . .
        e  1 1 1 . . . .
        0  1 . . 1 . . .
        0  1 . . 1 1 . .
        1  1 1 . . . 1 .
        2  1 1 1 . . . 1
    """
    # Lists and numpy: a layout that is new costs a tenth of what it does in tensor operations.
    sees = np.eye(shape.num_positions, dtype=bool)
    num_main = row.num_pending + row.num_drafts
    sees[:num_main, :num_main] = np.tri(num_main, dtype=bool)
    second = [-1] * num_branches
    for position, draft in enumerate(row.seconds, num_main):
        sees[position, : row.num_pending + draft] = True
        second[draft] = position
    place: list[int] = []
    anchor: list[int] = []
    first: list[int] = []
    starts: list[int] = []
    start = shape.gate_start
    for branch, width in enumerate(row.widths):
        end, last = start + width, row.num_pending - 1 + branch
        sees[start:end, : last + 1] = True
        sees[start:end, start:end] = np.tri(width, dtype=bool)
        place += range(branch, branch + width)
        anchor += [last] * width
        first += [int(k == 0) for k in range(width)]
        starts.append(start)
        start = end
    shut = [*range(num_main), *(row.num_pending + draft for draft in row.seconds)]
    offset = _padded(shut, shape.gate_start)
    offset += _padded([row.num_pending + step + shift for step in place], shape.num_window)
    verifies = [min(row.num_pending - 1 + branch, num_main - 1) for branch in range(num_branches)]

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values, device=device).unsqueeze(0)

    return CallLayout(
        offset=tensor(offset),
        sees=tensor(sees),
        place=tensor(_padded(place, shape.num_window)),
        anchor=tensor(_padded(anchor, shape.num_window)),
        first=tensor(_padded(first, shape.num_window)).bool(),
        starts=tensor(_padded(starts, num_branches)),
        widths=tensor(_padded(list(row.widths), num_branches)),
        verify=tensor(verifies),
        second=tensor(second),
        num_drafts=tensor(row.num_drafts),
    )


_kept_layout = lru_cache(maxsize=4096)(row_layout)


def _padded(values: list[int], size: int) -> list[int]:
    """Zeros behind values, up to a size."""
    return values + [0] * (size - len(values))


def call_mask(layout: CallLayout, cached: Sequence[int], lengths: Tensor, width: int | None = None) -> Tensor | None:
    """(B, 1, T, width) bool, which of the keys each position sees; None where all see all.

    cached: tokens of each text that are cached; lengths: the same on the device, (B, 1) int64. A text's keys are those
    cached, then this call's, then, up to `width` (default: that of the longest text), nothing.
    """
    sees = layout.sees
    num_positions, longest = sees.shape[-1], max(cached)
    if min(cached) == longest and width is None:
        if num_positions == 1:
            return None
        return torch.nn.functional.pad(sees, (longest, 0), value=True).unsqueeze(1)
    width = width or longest + num_positions
    own = torch.arange(width, device=lengths.device) - lengths
    index = own.clamp(0, num_positions - 1).unsqueeze(1).expand(-1, num_positions, -1)
    seen = sees.gather(2, index) & (own < num_positions).unsqueeze(1)
    return (seen | (own < 0).unsqueeze(1)).unsqueeze(1)


def key_positions(layout: CallLayout, cached: Sequence[int], lengths: Tensor, width: int | None = None) -> Tensor:
    """(B, width) int64, at which position of its text each key of `call_mask` stands."""
    num_positions = layout.offset.shape[-1]
    place = torch.arange(width or max(cached) + num_positions, device=lengths.device)
    own = place - lengths
    positions = layout.offset.gather(1, own.clamp(0, num_positions - 1)) + lengths
    return torch.where(own < 0, place, positions)
