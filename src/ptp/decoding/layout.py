"""The positions of one decoding call and what each may attend to (METHOD §4).

    row    0 … p−1      p … p+m−1     then for b = 0 … m
           pending      drafts        branch b, w_b positions
           gate off     gate off      gate on

Pending tokens are accepted but not yet cached: the prompt in the first call, the last token later. Their last row
and the draft rows verify. Branch b is written for the case that exactly b drafts are accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class CallLayout:
    """num_pending: p ≥ 1. num_drafts: m. widths: window positions of branches 0 … m."""

    num_pending: int
    num_drafts: int
    widths: tuple[int, ...]

    @property
    def gate_start(self) -> int:
        """First gated row."""
        return self.num_pending + self.num_drafts

    @property
    def num_rows(self) -> int:
        return self.gate_start + sum(self.widths)

    def branch_rows(self, branch: int) -> tuple[int, int]:
        """Half-open range of a branch's rows."""
        start = self.gate_start + sum(self.widths[:branch])
        return start, start + self.widths[branch]


@dataclass(frozen=True)
class WindowRows:
    """Per window row of a layout, (Σ w,) tensors.

    branch: b. place: b + k for window index k, the place of the row's u counted from the first token not yet
    accepted. first: k == 0.
    """

    branch: Tensor
    place: Tensor
    first: Tensor


@lru_cache(maxsize=4096)
def window_rows(widths: tuple[int, ...], device: torch.device) -> WindowRows:
    """The window rows of branches of these widths."""
    pairs = [(branch, k) for branch, width in enumerate(widths) for k in range(width)]
    branch, index = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
    return WindowRows(branch, branch + index, index == 0)


def local_mask(layout: CallLayout, device: torch.device) -> Tensor:
    """What the rows of a call see of each other, (rows, rows) bool; every row sees the whole cache besides.

    One pending token a, drafts d e, branches of widths 2, 1, 1 (rows and columns a d e 0 0 1 2):

        a  1 . . . . . .
        d  1 1 . . . . .
        e  1 1 1 . . . .
        0  1 . . 1 . . .
        0  1 . . 1 1 . .
        1  1 1 . . . 1 .
        2  1 1 1 . . . 1
    """
    mask = torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.bool)
    verify = layout.gate_start
    mask[:verify, :verify] = torch.ones(verify, verify).tril().bool()
    for branch, width in enumerate(layout.widths):
        start, end = layout.branch_rows(branch)
        mask[start:end, : layout.num_pending + branch] = True
        mask[start:end, start:end] = torch.ones(width, width).tril().bool()
    return mask.to(device)


_kept_mask = lru_cache(maxsize=4096)(local_mask)


def call_mask(layout: CallLayout, num_cached: int, device: torch.device) -> Tensor | None:
    """(1, 1, rows, cached + rows) bool; None for a single row, which sees everything."""
    if layout.num_rows == 1:
        return None
    # Layouts behind a single pending token come back again and again; those of prompts are large and do not.
    local = (_kept_mask if layout.num_pending == 1 else local_mask)(layout, device)
    return torch.nn.functional.pad(local, (num_cached, 0), value=True)[None, None]
