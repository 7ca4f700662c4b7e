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

from ptp.data.documents import Document, Documents, save_shard, shard_name
from ptp.errors import DataError
from ptp.files import write_atomically
from ptp.records import Record
from ptp.sampling import SamplingRule


class Provenance(Record):
    """What made a store's completions; adding to a store with another provenance is refused.

    source: "base model", "file" or the endpoint's URL and model. The other fields are docs/formats.md's.
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

    def batch_size(self, find: Callable[[], int]) -> int:
        """The batch size found when the store was begun: another one would round otherwise, in shards still to come."""
        kept = self.directory / "batch_size"
        if not kept.exists():
            write_atomically(kept, f"{find()}\n".encode())
        return int(kept.read_text())

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
