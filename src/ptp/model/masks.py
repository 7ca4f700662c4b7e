"""Which position may attend to which, as boolean masks (True = may attend).

Three calls need one: the context pass of training (`context_mask`), the window pass of training (`window_mask`)
and a decoding call (`call_mask` in `ptp.decoding.layout`). All are (B, 1, queries, keys), the form transformers
takes as it is. Shapes: B rows, S packed tokens, N windows of L positions, i.e. N·L window positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def context_mask(document: Tensor) -> Tensor:
    """Packed documents, each causal and alone. document: (B, S) int, the document each token belongs to, −1 padding.

    Two documents of two tokens, `document = [0, 0, 1, 1]`:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1

    Padding attends to itself only, so that its row is not empty (an empty row is NaN in softmax).
    Returns (B, 1, S, S).
    """
    size = document.shape[1]
    same = document.unsqueeze(2) == document.unsqueeze(1)
    index = torch.arange(size, device=document.device)
    causal = index.unsqueeze(1) >= index
    own = index.unsqueeze(1) == index
    real = (document >= 0).unsqueeze(1)
    return ((same & causal & real) | own).unsqueeze(1)


def window_mask(document: Tensor, starts: Tensor, window: int) -> Tensor:
    """Windows over packed documents: each sees its document before its start, and itself causally.

    document: (B, S); starts: (B, N), the packed index of the first position each window replaces; window: L.
    Keys are the S context tokens, then the N·L window positions. Windows never see each other.

    `document = [0, 0, 0, 1, 1]`, `starts = [2, 4]`, `window = 2` (rows: window 0, window 1):

        1 1 . . .   1 . . .
        1 1 . . .   1 1 . .
        . . . 1 .   . . 1 .
        . . . 1 .   . . 1 1

    Returns (B, 1, N·L, S + N·L).
    """
    rows, size = document.shape
    num_windows = starts.shape[1]
    owner = document.gather(1, starts)
    before = torch.arange(size, device=document.device) < starts.unsqueeze(2)
    context = before & (document.unsqueeze(1) == owner.unsqueeze(2))
    context = context.repeat_interleave(window, dim=1)
    own = torch.block_diag(*[torch.ones(window, window, device=document.device).tril()] * num_windows).bool()
    return torch.cat([context, own.expand(rows, -1, -1)], dim=2).unsqueeze(1)
