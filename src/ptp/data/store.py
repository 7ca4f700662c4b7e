"""The completion store: what the teacher wrote, in append-only shards (docs/formats.md).

    store.json               what made the completions: base model's fingerprint, sampling rule, seed, lengths
    shard-00000.safetensors  the completions of one unit of work

Shard k holds the completions of the k-th group of prompts, whoever sampled it and in whatever order, so processes
share a store without talking to each other, and what is left to do is found by listing files. 12 bytes a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ptp.data.documents import Document, Documents, save_shard, shard_name, shard_number, shard_paths
from ptp.errors import DataError
from ptp.files import write_atomically
from ptp.records import Record, differences
from ptp.sampling import SamplingRule


class Provenance(Record):
    """What made a store's completions; adding to a store with another provenance is refused.

    source: "base model", "file", or "endpoint" and the name of the model there. The other fields are docs/formats.md's.
    """

    source: str
    base_fingerprint: str
    rule: SamplingRule
    seed: int
    max_length: int
    max_new_tokens: int | None
    num_prompts: int | None
    completions_per_prompt: int
    shard_size: int
    prompts_fingerprint: str
    vocabulary_fingerprint: str = ""


class CompletionStore:
    """Completions by sequence number, the number that names their stream of u.

    Raises `DataError` if the directory holds completions of another provenance, or a corrupt file.
    """

    def __init__(self, directory: Path, provenance: Provenance | None = None) -> None:
        self.directory = directory
        settings = directory / "store.json"
        if provenance is not None and not any(directory.glob("shard-*")):
            # What nothing was made with yet binds nobody.
            content = provenance.model_dump_json(indent=2).encode() + b"\n"
            if not settings.exists() or settings.read_bytes() != content:
                write_atomically(settings, content)
        try:
            self.provenance = Provenance(**json.loads(settings.read_text()))
        except FileNotFoundError:
            if any(directory.glob("shard-*")):
                raise DataError(f"{settings} is missing, so nobody knows what made the completions beside it") from None
            raise DataError(f"{directory} holds no completions; make them with ptp_pregenerate") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{settings} is corrupt: {error}") from None
        if provenance is not None and provenance != self.provenance:
            raise DataError(
                f"{directory} holds completions made with another {differences(self.provenance, provenance)}; "
                "restore the settings, or pregenerate into a new experiment directory"
            )

    def batch_size(self, find: Callable[[], int]) -> int:
        """The batch size found when the store was begun: another one would round otherwise, in shards still to come."""
        kept = self.directory / "batch_size"
        if not kept.exists():
            write_atomically(kept, f"{find()}\n".encode())
        return int(kept.read_text())

    def shard_numbers(self) -> list[int]:
        """Numbers of the shards that are stored, by any process."""
        return [shard_number(path) for path in shard_paths(self.directory)]

    def holds(self, shard: int) -> bool:
        """Whether a shard is stored."""
        return (self.directory / shard_name(shard)).exists()

    def add(self, shard: int, completions: Sequence[Document]) -> None:
        """Write one shard; its journal has served its turn."""
        save_shard(self.directory / shard_name(shard), completions)
        self.journal(shard).unlink(missing_ok=True)

    def journal(self, shard: int) -> Path:
        """Where an engine may keep the answers of a shard that is not complete yet."""
        return self.directory / f"shard-{shard:05d}.jsonl"

    def load(self) -> Documents:
        """All completions, in order of sequence number."""
        return Documents.load(self.directory)
