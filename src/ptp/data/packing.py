"""Documents → packed sequences with windows: the batches that training reads (METHOD §3).

`pack` fits documents into sequences of S tokens, best fit first. `WindowStream` draws N windows on a sequence and the
place of u in its interval for each position; item i is a pure function of (seed, i), so any worker, any restart and
any number of processes see the same data.

Shapes: B sequences, S tokens, N windows of L positions. Ranges are half-open.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ptp.data.documents import Document, Documents
from ptp.errors import DataError


@dataclass(frozen=True)
class PackedBatch:
    """What one training step reads.

    ids, document, positions: (B, S) int64: tokens, the document each belongs to (−1 padding), place in it.
    span: (B, S) int64, the trained span each token belongs to, −1 outside all.
    starts: (B, N) int64, packed index of the first position each window replaces; the anchor stands before it.
    z: (B, N, L) float32 in [0, 1], the place of u in the interval of each token from start on.
    lower, upper: (B, S) float32, intervals of the tokens in spans; None where they are not stored.
    """

    ids: Tensor
    document: Tensor
    positions: Tensor
    span: Tensor
    starts: Tensor
    z: Tensor
    lower: Tensor | None
    upper: Tensor | None


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> list[np.ndarray]:
    """Fit documents of the given lengths into sequences of `size` tokens, longest first, each where it fits tightest.

    Returns the document indices of each sequence. Raises `DataError` for a document longer than a sequence.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    if lengths.max() > size:
        raise DataError(f"a document has {lengths.max()} tokens, a packed sequence holds {size}: raise sequence_length")
    sequence_of = np.empty(len(lengths), np.int64)
    free: list[tuple[int, int]] = []  # (free tokens, sequence), ascending
    num_sequences = 0
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        slot = bisect.bisect_left(free, (length, -1))
        if slot < len(free):
            room, sequence = free.pop(slot)
        else:
            room, sequence = size, num_sequences
            num_sequences += 1
        sequence_of[document] = sequence
        if room > length:
            bisect.insort(free, (room - length, sequence))
    # Documents of a sequence stand longest first, as they were placed.
    by_sequence = order[np.argsort(sequence_of[order], kind="stable")]
    return np.split(by_sequence, np.cumsum(np.bincount(sequence_of, minlength=num_sequences))[:-1])


class WindowStream(Dataset[PackedBatch]):
    """`length` training sequences with windows; item i uses sequence order, window starts and z drawn from (seed, i).

    Every pass over the packed sequences is a fresh permutation with fresh windows and fresh z.

    beta: concentration of z ~ Beta(beta, beta), the place of u inside its interval (0.3 in training: edges matter
    most; 1 is uniform, for evaluation).
    """

    def __init__(
        self,
        documents: Documents,
        *,
        sequence_length: int,
        num_windows: int,
        window: int,
        beta: float,
        seed: int,
        length: int | None = None,
        pad_id: int = 0,
    ) -> None:
        self.documents = documents.select(documents.num_starts > 0)
        if not len(self.documents):
            raise DataError(f"none of {len(documents)} documents has two trained tokens in a row: nothing to train on")
        self.sequences = pack(self.documents.lengths, sequence_length)
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
        order = _permutation(self.seed, epoch, len(self.sequences))
        documents = [self.documents[i] for i in self.sequences[order[place]]]
        return self._windows(documents, np.random.default_rng((self.seed, epoch, place, 1)))

    def _windows(self, documents: list[Document], rng: np.random.Generator) -> PackedBatch:
        size = self.sequence_length
        ids = np.full(size, self.pad_id, np.int64)
        document = np.full(size, -1, np.int64)
        positions = np.zeros(size, np.int64)
        span = np.full(size, -1, np.int64)
        edges = np.zeros((2, size), np.float32)
        can_start = np.zeros(size, bool)
        begin = num_spans = 0
        for number, doc in enumerate(documents):
            end, read = begin + len(doc), 0
            ids[begin:end] = doc.ids
            document[begin:end] = number
            positions[begin:end] = np.arange(len(doc))
            for first, last in doc.spans:
                here = slice(begin + first, begin + last)
                span[here] = num_spans
                # The token before a window is its anchor; the last one of a span has nothing to predict after it.
                can_start[begin + max(first, 1) : begin + max(last - 1, 0)] = True
                if doc.lower is not None and doc.upper is not None:
                    edges[:, here] = doc.lower[read : read + last - first], doc.upper[read : read + last - first]
                read, num_spans = read + last - first, num_spans + 1
            begin = end
        starts = np.sort(rng.choice(np.flatnonzero(can_start), self.num_windows))
        z = rng.beta(self.beta, self.beta, (self.num_windows, self.window)).astype(np.float32)
        lower, upper = torch.from_numpy(edges) if self.documents.has_intervals else (None, None)
        return PackedBatch(
            ids=torch.from_numpy(ids),
            document=torch.from_numpy(document),
            positions=torch.from_numpy(positions),
            span=torch.from_numpy(span),
            starts=torch.from_numpy(starts),
            z=torch.from_numpy(z),
            lower=lower,
            upper=upper,
        )


@functools.lru_cache(maxsize=1)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of sequences in an epoch; kept, since every item asks for it."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def collate(items: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """Stack sequences into a batch, as the keyword arguments a Trainer hands to the model; what is None is left out."""
    names = [name for name, value in vars(items[0]).items() if value is not None]
    return {name: torch.stack([getattr(item, name) for item in items]) for name in names}
