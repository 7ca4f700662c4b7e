"""Completions → packed sequences with windows: the batches that training reads (METHOD §3).

A `Completion` is one document. `pack` fits documents into sequences of S tokens, best fit first. `WindowStream`
draws N windows on a sequence and u for each; item i is a pure function of (seed, i), so any worker, any restart and
any number of processes see the same data.

Shapes: B sequences, S tokens, N windows of L positions. Ranges are half-open.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ptp.errors import DataError
from ptp.sampling import inside


@dataclass(frozen=True)
class Completion:
    """One prompt and what the teacher wrote after it.

    ids: (T,) int32, prompt and completion; lower, upper: (T − prompt_length,) float32, the intervals of the
    completion's tokens under the rule that sampled them (equal where the rule gives a token no mass).
    finished: whether the teacher ended by itself, its end token being the last id; False if it was cut off.
    """

    ids: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    prompt_length: int
    finished: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PackedBatch:
    """What one training step reads.

    ids, document, positions: (B, S) int64: tokens, the document each belongs to (−1 padding), place in it.
    starts: (B, N) int64, packed index of the first position each window replaces; the anchor stands before it.
    u: (B, N, L) float32, an auxiliary inside the interval of each token from start on (0 past the document).
    mass: (B, S) bool, whether the rule gives the token any probability, so that it can be a target.
    """

    ids: Tensor
    document: Tensor
    positions: Tensor
    starts: Tensor
    u: Tensor
    mass: Tensor


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Fit documents of the given lengths into sequences of `size` tokens, longest first, each where it fits tightest.

    Returns the document indices of each sequence. Raises `DataError` for a document longer than a sequence.
    """
    if lengths and max(lengths) > size:
        raise DataError(f"a document has {max(lengths)} tokens, a packed sequence holds {size}: raise sequence_length")
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, sequence), ascending
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        slot = bisect.bisect_left(free, (lengths[document], -1))
        if slot < len(free):
            room, sequence = free.pop(slot)
        else:
            room, sequence = size, len(sequences)
            sequences.append([])
        sequences[sequence].append(document)
        bisect.insort(free, (room - lengths[document], sequence))
    return sequences


class WindowStream(Dataset[PackedBatch]):
    """`length` training sequences with windows; item i uses sequence order, window starts and u drawn from (seed, i).

    Every pass over the packed sequences is a fresh permutation with fresh windows and fresh u.

    beta: concentration of z ~ Beta(beta, beta), the place of u inside its interval (0.3 in training: edges matter
    most; 1 is uniform, for evaluation).
    """

    def __init__(
        self,
        completions: Sequence[Completion],
        *,
        sequence_length: int,
        num_windows: int,
        window: int,
        beta: float,
        seed: int,
        length: int | None = None,
        pad_id: int = 0,
    ) -> None:
        # A window needs an anchor before its first position, and one token after it, in the completion.
        self.completions = [c for c in completions if len(c) - max(c.prompt_length, 1) >= 2]
        if not self.completions:
            raise DataError(f"none of {len(completions)} completions has two tokens: nothing to train on")
        self.sequences = pack([len(c) for c in self.completions], sequence_length)
        self.sequence_length = sequence_length
        self.num_windows = num_windows
        self.window = window
        self.beta = beta
        self.seed = seed
        self.length = len(self.sequences) if length is None else length
        self.pad_id = pad_id

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> PackedBatch:
        if not 0 <= index < self.length:
            raise IndexError(index)
        epoch, place = divmod(index, len(self.sequences))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.sequences))
        documents = [self.completions[i] for i in self.sequences[order[place]]]
        return self._windows(documents, np.random.default_rng((self.seed, epoch, place, 1)))

    def _windows(self, documents: list[Completion], rng: np.random.Generator) -> PackedBatch:
        size = self.sequence_length
        ids = np.full(size, self.pad_id, np.int64)
        document = np.full(size, -1, np.int64)
        positions = np.zeros(size, np.int64)
        lower = np.zeros(size + self.window, np.float32)
        upper = np.zeros(size + self.window, np.float32)
        startable = np.zeros(size, bool)
        begin = 0
        for number, completion in enumerate(documents):
            end = begin + len(completion)
            first = begin + completion.prompt_length
            ids[begin:end] = completion.ids
            document[begin:end] = number
            positions[begin:end] = np.arange(len(completion))
            lower[first:end] = completion.lower
            upper[first:end] = completion.upper
            # The position before a window is its anchor; the last token of a document has nothing after it.
            startable[max(first, begin + 1) : end - 1] = True
            begin = end
        starts = np.sort(rng.choice(np.flatnonzero(startable), self.num_windows))
        inputs = starts[:, None] + np.arange(self.window)
        own = np.append(document, np.full(self.window, -1))[inputs] == document[starts][:, None]
        z = rng.beta(self.beta, self.beta, inputs.shape).astype(np.float32)
        low, high = (torch.from_numpy(np.where(own, edge[inputs], 0)) for edge in (lower, upper))
        return PackedBatch(
            ids=torch.from_numpy(ids),
            document=torch.from_numpy(document),
            positions=torch.from_numpy(positions),
            starts=torch.from_numpy(starts),
            u=inside(low, high, torch.from_numpy(z)),
            mass=torch.from_numpy(upper[:size] > lower[:size]),
        )


def collate(items: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """Stack sequences into a batch, as the keyword arguments a Trainer hands to the model."""
    return {name: torch.stack([getattr(item, name) for item in items]) for name in PackedBatch.__dataclass_fields__}
