"""Which position may attend to which in a training pass (1 = may attend).

The context pass has `context_mask`, the window pass `window_mask`; a decoding call has `call_mask` in
`ptp.decoding.layout`. Shapes: B rows, S packed tokens, N windows of L positions, i.e. N·L window positions.
"""

from __future__ import annotations

from torch import Tensor

from ptp.attention import Mask


def context_mask(document: Tensor) -> Mask:
    """Packed documents, each causal and alone. document: (B, S) int, the document each token belongs to, −1 padding.

    Two documents of two tokens, `document = [0, 0, 1, 1]`:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1

    Padding attends to itself only, so that its row is not empty (an empty row is NaN in softmax).
    S queries, S keys.
    """
    rows, size = document.shape

    def sees(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = document[row, query]
        return ((own == document[row, key]) & (own >= 0) & (key < query)) | (key == query)

    return Mask(sees, rows, size, size, document.device)


def window_mask(document: Tensor, starts: Tensor, window: int) -> Mask:
    """Windows over packed documents: each sees its document before its start, and itself causally.

    document: (B, S); starts: (B, N), the packed index of the first position each window replaces; window: L.
    Keys are the S context tokens, then the N·L window positions. Windows never see each other.

    `document = [0, 0, 0, 1, 1]`, `starts = [2, 4]`, `window = 2` (rows: window 0, window 1):

        1 1 . . .   1 . . .
        1 1 . . .   1 1 . .
        . . . 1 .   . . 1 .
        . . . 1 .   . . 1 1

    N·L queries, S + N·L keys.
    """
    rows, size = document.shape
    num_positions = starts.shape[1] * window
    owner = document.gather(1, starts)

    def sees(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        number, place = query // window, key - size
        # Window keys have no document; the last token's stands in, and is not looked at.
        same = document[row, key.clamp(max=size - 1)] == owner[row, number]
        context = (key < starts[row, number]) & same
        itself = (place >= 0) & (place // window == number) & (place <= query)
        return context | itself

    return Mask(sees, rows, num_positions, size + num_positions, document.device)
