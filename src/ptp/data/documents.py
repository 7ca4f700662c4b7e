"""Documents and the files that hold them (docs/formats.md).

A document is what training packs: a completion after its prompt, a chat with its assistant turns trained, a text.
Documents lie in shards, one safetensors file each, whose arrays are read from the disk piece by piece: a data set is
never in memory as a whole. A shard appears whole, by rename, or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ptp.errors import DataError
from ptp.files import write_atomically

Span = tuple[int, int]

SHARD_TOKENS = 1 << 22
"""Tokens collected in memory before `write_documents` writes a shard."""


@dataclass(frozen=True)
class Document:
    """Tokens, of which those in `spans` are trained.

    ids: (T,) int32. spans: half-open ranges of trained tokens, ascending, disjoint. lower, upper: (C,) float32, the
    intervals of the C trained tokens in order, under the rule that sampled them (equal where the rule gives a token
    no mass); None where they are not known and training computes them. group: hash of what it was made from;
    documents of one group are held out together. number: names it in its files; a completion's stream of u.
    finished: the last span ends as the model ends a text, with an end token; False if it was cut off.
    """

    ids: np.ndarray
    spans: tuple[Span, ...]
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    group: int = 0
    number: int = 0
    finished: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return self.spans[0][0] if self.spans else len(self.ids)


def content_group(content: str) -> int:
    """The group of documents made from this content: 63 bits of its hash."""
    return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def save_shard(path: Path, documents: Sequence[Document]) -> None:
    """Write documents to one file; either all of them have intervals or none has."""
    write_atomically(path, save(_arrays(documents)))


def _arrays(documents: Sequence[Document]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "numbers": np.asarray([d.number for d in documents], np.int64),
        "groups": np.asarray([d.group for d in documents], np.int64),
        "lengths": np.asarray([len(d) for d in documents], np.int32),
        "finished": np.asarray([d.finished for d in documents], np.uint8),
        "num_spans": np.asarray([len(d.spans) for d in documents], np.int32),
        "spans": np.asarray([edge for d in documents for span in d.spans for edge in span], np.int32),
        "ids": _joined([d.ids for d in documents], np.int32),
    }
    known = [d for d in documents if d.lower is not None and d.upper is not None]
    assert len(known) in (0, len(documents)), "a shard's documents must all have intervals, or none"
    if known:
        arrays["lower"] = _joined([d.lower for d in known], np.float32)
        arrays["upper"] = _joined([d.upper for d in known], np.float32)
    return arrays


def write_documents(directory: Path, documents: Iterable[Document]) -> None:
    """Write a stream of documents as numbered shards into a directory."""
    held: list[Document] = []
    num_shards = num_tokens = 0
    for document in documents:
        held.append(document)
        num_tokens += len(document)
        if num_tokens >= SHARD_TOKENS:
            save_shard(directory / shard_name(num_shards), held)
            held, num_tokens, num_shards = [], 0, num_shards + 1
    if held:
        save_shard(directory / shard_name(num_shards), held)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_paths(directory: Path) -> list[Path]:
    """The shards of a directory, by number."""
    return sorted(directory.glob("shard-*.safetensors"), key=shard_number)


def shard_number(path: Path) -> int:
    return int(path.stem.removeprefix("shard-"))


class Shard:
    """Documents of one file or of memory: numbers, lengths and spans at hand, tokens and intervals where they lie.

    A file's tokens and intervals are read from the disk as they are asked for.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray] | Path) -> None:
        self.path = arrays if isinstance(arrays, Path) else None
        self._arrays: dict[str, Any] = {} if isinstance(arrays, Path) else dict(arrays)
        if isinstance(arrays, Path):
            arrays = self._open()
        numbers, groups, lengths, finished, num_spans, spans = (
            arrays[name] for name in ("numbers", "groups", "lengths", "finished", "num_spans", "spans")
        )
        self.numbers, self.groups, self.lengths, self.finished = numbers, groups, lengths, finished
        self.has_intervals = "lower" in self._arrays
        self._spans = spans.reshape(-1, 2)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._span_ends = np.cumsum(num_spans, dtype=np.int64)
        # Trained tokens before each span; places where a window may start: its anchor stands before it, and a token of
        # the span after it.
        first, last = self._spans.T
        self._trained = _sums(last - first)
        starts = _sums(np.maximum(0, last - np.maximum(first, 1) - 1))
        self.num_starts = starts[self._span_ends] - starts[self._span_ends - num_spans]
        self.num_trained = self._trained[self._span_ends] - self._trained[self._span_ends - num_spans]

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents."""
        return int(self._part("ids", np.int64(0), self._ends[-1]).max(initial=0)) if len(self) else 0

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Shard:
        """Documents of memory."""
        return cls(_arrays(documents))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot go to another process; it is opened again there.
        return self.__dict__ | ({} if self.path is None else {"_arrays": {}})

    def read(self, row: int) -> Document:
        """The document of a row."""
        end, last = self._ends[row], self._span_ends[row]
        first = self._span_ends[row - 1] if row else 0
        lower = upper = None
        if self.has_intervals:
            lower, upper = (self._part(name, self._trained[first], self._trained[last]) for name in ("lower", "upper"))
        return Document(
            ids=self._part("ids", end - self.lengths[row], end),
            spans=tuple((int(begin), int(stop)) for begin, stop in self._spans[first:last]),
            lower=lower,
            upper=upper,
            group=int(self.groups[row]),
            number=int(self.numbers[row]),
            finished=bool(self.finished[row]),
        )

    def _part(self, name: str, begin: np.integer, end: np.integer) -> np.ndarray:
        if not self._arrays:
            self._open()
        if begin == end:  # a file's empty array cannot be sliced
            return np.zeros(0, np.int32 if name == "ids" else np.float32)
        return self._arrays[name][int(begin) : int(end)]

    def _open(self) -> Mapping[str, np.ndarray]:
        """Open the file for reading parts; returns its arrays that are small, one number for a document or span."""
        try:
            file = safe_open(self.path, "numpy")
            self._arrays = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
            return {name: file.get_tensor(name) for name in self._arrays.keys() - {"ids", "lower", "upper"}}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.path} is corrupt ({error}); remove it and run the command again") from None


def _sums(numbers: np.ndarray) -> np.ndarray:
    """Sum of the numbers before each place, and of all."""
    return np.concatenate([[0], np.cumsum(numbers, dtype=np.int64)])


class Documents(Sequence[Document]):
    """Documents of some shards, by place.

    lengths, groups, numbers, num_trained (tokens in spans), num_starts (places where a window may start): (D,) arrays
    over all of them.
    """

    def __init__(self, shards: Sequence[Shard], places: np.ndarray | None = None) -> None:
        self.shards = list(shards)
        self._begins = _sums(np.asarray([len(shard) for shard in shards], np.int64))
        self._places = np.arange(self._begins[-1]) if places is None else places
        self.lengths = self._column("lengths", np.int32)
        self.groups = self._column("groups", np.int64)
        self.numbers = self._column("numbers", np.int64)
        self.num_starts = self._column("num_starts", np.int64)
        self.num_trained = self._column("num_trained", np.int64)

    @classmethod
    def load(cls, directory: Path) -> Documents:
        """All shards of a directory, by number."""
        return cls([Shard(path) for path in shard_paths(directory)])

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Documents:
        """Documents of memory."""
        return cls([Shard.of(documents)])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """The document at a place; for a slice, a list of documents."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = int(self._places[index])
        shard = int(np.searchsorted(self._begins, place, side="right")) - 1
        return self.shards[shard].read(place - int(self._begins[shard]))

    def __iter__(self) -> Iterator[Document]:
        return (self[place] for place in range(len(self)))

    @property
    def has_intervals(self) -> bool:
        """Whether every document's intervals are stored."""
        return all(shard.has_intervals for shard in self.shards if len(shard))

    def select(self, places: np.ndarray) -> Documents:
        """The documents at these places (or where a boolean array says so)."""
        return Documents(self.shards, self._places[places])

    def _column(self, name: str, dtype: type) -> np.ndarray:
        return _joined([getattr(shard, name) for shard in self.shards], dtype)[self._places]


def _joined(arrays: Sequence[np.ndarray | None], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(array, dtype) for array in arrays)])
