"""The split that holds documents out for validation, by a hash of what they were made from."""

from __future__ import annotations

import numpy as np

from ptp.errors import DataError

VALIDATION_SHARE = 20
"""One group in this many is held out; never more than twice its share of the documents."""

GROUP_RANGE = 1 << 63
"""Groups are uniform below this (`ptp.data.documents.content_group`)."""


def held_out(groups: np.ndarray) -> np.ndarray:
    """Which documents are held out, as a boolean array; groups: (D,) int64.

    A group is held out if its hash is among the smallest twentieth of all possible ones: the choice depends neither on
    the order of a data set nor on what else it holds. Two bounds come before that: at most a tenth of the documents is
    held out, and at least one group. Raises `DataError` if not even the smallest group fits in a tenth.
    """
    room = len(groups) // (VALIDATION_SHARE // 2)
    distinct, counts = np.unique(groups, return_counts=True)  # ascending
    fits = counts <= room
    distinct, counts = distinct[fits], counts[fits]
    if not len(distinct):
        raise DataError(f"{len(groups)} documents are too few to hold any out; give at least 10 different ones")
    chosen = (distinct < GROUP_RANGE // VALIDATION_SHARE) & (np.cumsum(counts) <= room)
    chosen[:1] = True
    return np.isin(groups, distinct[chosen])
