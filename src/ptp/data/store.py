"""The completion store: what the teacher wrote, in append-only shards (docs/formats.md).

    store.json               what made the completions: base model's fingerprint, sampling rule, seed, lengths
    shard-00000.safetensors  one batch: ids, intervals, lengths, finish reasons, sequence numbers

A shard appears whole, by rename, or not at all; what is stored is found by listing shards. 12 bytes a token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ptp.data.packing import Completion
from ptp.errors import DataError
from ptp.records import Record
from ptp.sampling import SamplingRule


class Provenance(Record):
    """What made a store's completions; adding to a store with another provenance is refused."""

    base_fingerprint: str
    rule: SamplingRule
    seed: int
    max_new_tokens: int
    prompts_fingerprint: str


class CompletionStore:
    """Completions by sequence number, the number that names their stream of u.

    Raises `DataError` if the directory holds completions of another provenance, or a corrupt file.
    """

    def __init__(self, directory: Path, provenance: Provenance | None = None) -> None:
        self.directory = directory
        settings = directory / "store.json"
        if not settings.exists():
            if provenance is None:
                raise DataError(f"{directory} holds no completions; make them with ptp_pregenerate")
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(settings, provenance.model_dump_json(indent=2).encode() + b"\n")
        try:
            self.provenance = Provenance(**json.loads(settings.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{settings} is corrupt: {error}") from None
        if provenance is not None and provenance != self.provenance:
            changed = [
                name for name in Provenance.model_fields if getattr(provenance, name) != getattr(self.provenance, name)
            ]
            raise DataError(
                f"{directory} holds completions made with another {' and '.join(changed)}; "
                "remove it or use another experiment directory"
            )

    @property
    def shards(self) -> list[Path]:
        return sorted(self.directory.glob("shard-*.safetensors"))

    def stored_sequences(self) -> set[int]:
        """Sequence numbers already stored."""
        return {int(number) for shard in self.shards for number in _load(shard)["sequences"]}

    def append(self, sequences: Sequence[int], completions: Sequence[Completion]) -> None:
        """Write one shard."""
        number = 1 + max((int(shard.stem.removeprefix("shard-")) for shard in self.shards), default=-1)
        arrays: dict[str, np.ndarray] = {
            "sequences": np.asarray(sequences, np.int64),
            "ids": np.concatenate([c.ids for c in completions]).astype(np.int32),
            "lower": np.concatenate([c.lower for c in completions]).astype(np.float32),
            "upper": np.concatenate([c.upper for c in completions]).astype(np.float32),
            "lengths": np.asarray([len(c) for c in completions], np.int32),
            "prompt_lengths": np.asarray([c.prompt_length for c in completions], np.int32),
            "finished": np.asarray([c.finished for c in completions], np.uint8),
        }
        temporary = self.directory / f".shard-{os.getpid()}.tmp"
        save_file(arrays, temporary)
        temporary.replace(self.directory / f"shard-{number:05d}.safetensors")

    def __iter__(self) -> Iterator[tuple[int, Completion]]:
        """(sequence number, completion), in order of sequence number."""
        rows = [row for shard in self.shards for row in _rows(_load(shard))]
        return iter(sorted(rows, key=lambda row: row[0]))


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _load(shard: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(shard)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{shard} is corrupt ({error}); remove it and run ptp_pregenerate again") from None


def _rows(arrays: dict[str, np.ndarray]) -> Iterator[tuple[int, Completion]]:
    ends, begin, interval_begin = np.cumsum(arrays["lengths"]), 0, 0
    for row, sequence in enumerate(arrays["sequences"]):
        end, prompt_length = int(ends[row]), int(arrays["prompt_lengths"][row])
        interval_end = interval_begin + end - begin - prompt_length
        yield (
            int(sequence),
            Completion(
                ids=arrays["ids"][begin:end],
                lower=arrays["lower"][interval_begin:interval_end],
                upper=arrays["upper"][interval_begin:interval_end],
                prompt_length=prompt_length,
                finished=bool(arrays["finished"][row]),
            ),
        )
        begin, interval_begin = end, interval_end
