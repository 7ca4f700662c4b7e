"""How many threads of a CPU decoding runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_MODEL = 50_000_000
"""Parameters below which a decoding call is bound by the number of its operations: it is then run on one thread of a
CPU, both ways of decoding."""


@contextmanager
def decoding_threads(num_parameters: int) -> Iterator[None]:
    """One thread for small models on a CPU: both ways of decoding are then faster than with several."""
    before = torch.get_num_threads()
    if num_parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
