from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ptp.data.documents import Document, shard_name
from ptp.data.store import CompletionStore, Provenance
from ptp.errors import DataError
from ptp.sampling import SamplingRule

PROVENANCE = Provenance(
    source="base model",
    base_fingerprint="abc",
    rule=SamplingRule(temperature=0.7, top_k=50, top_p=0.95, order=(2, 0, 1)),
    seed=3,
    max_length=60,
    max_new_tokens=40,
    num_prompts=9,
    completions_per_prompt=2,
    shard_size=3,
    prompts_fingerprint="def",
    vocabulary_fingerprint="uvw",
)


def completion(number: int) -> Document:
    """Different in every field by number; every third has no prompt, every second was cut off."""
    rng = np.random.default_rng(number)
    prompt_length, written = number % 3 * 4, 2 + number % 7
    lower, upper = np.sort(rng.random((2, written), np.float32), axis=0)
    ids = rng.integers(0, 2**31 - 1, prompt_length + written, dtype=np.int32)
    spans = ((prompt_length, len(ids)),)
    return Document(ids, spans, lower, upper, group=number % 2, number=number, finished=number % 2 == 0)


def same(first: Document, second: Document) -> bool:
    return all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ("ids", "spans", "lower", "upper")
    ) and all(getattr(first, name) == getattr(second, name) for name in ("group", "number", "finished"))


def add(store: CompletionStore, shard: int) -> None:
    """Shard k holds the completions 3k, 3k + 1 and 3k + 2."""
    store.add(shard, [completion(number) for number in range(3 * shard, 3 * shard + 3)])


def holds(store: CompletionStore, shards: list[int]) -> bool:
    numbers = [3 * shard + place for shard in shards for place in range(3)]
    documents = store.load()
    return documents.numbers.tolist() == numbers and all(same(found, completion(found.number)) for found in documents)


def files_of(store: CompletionStore) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.directory.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> CompletionStore:
    """Shards 2 and 0, written in this order."""
    store = CompletionStore(tmp_path / "completions", PROVENANCE)
    for shard in (2, 0):
        add(store, shard)
    return store


def test_what_is_stored_is_read_back_in_order_of_sequence(store: CompletionStore) -> None:
    assert holds(store, [0, 2])
    reopened = CompletionStore(store.directory)
    assert reopened.provenance == PROVENANCE
    assert [shard for shard in range(5) if reopened.holds(shard)] == [0, 2]
    assert holds(reopened, [0, 2])


def test_shards_are_only_ever_added(store: CompletionStore) -> None:
    before = files_of(store)
    add(CompletionStore(store.directory, PROVENANCE), 1)
    after = files_of(store)
    assert {path: after[path] for path in before} == before
    assert [path.name for path in after.keys() - before.keys()] == [shard_name(1)]


def test_processes_share_a_store_by_writing_different_shards(store: CompletionStore) -> None:
    other = CompletionStore(store.directory, PROVENANCE)
    add(other, 1)
    add(store, 3)
    assert all(other.holds(shard) and store.holds(shard) for shard in range(4))
    assert holds(store, [0, 1, 2, 3])
    assert holds(other, [0, 1, 2, 3])


def test_a_shard_whose_writing_was_cut_short_does_not_exist(store: CompletionStore) -> None:
    shard = (store.directory / shard_name(2)).read_bytes()
    (store.directory / f".{shard_name(1)}.123.tmp").write_bytes(shard[: len(shard) // 2])
    reopened = CompletionStore(store.directory, PROVENANCE)
    assert not reopened.holds(1)
    assert holds(reopened, [0, 2])
    add(reopened, 1)
    assert holds(reopened, [0, 1, 2])


def test_a_lost_shard_is_missed_and_can_be_made_again(store: CompletionStore) -> None:
    (store.directory / shard_name(0)).unlink()
    reopened = CompletionStore(store.directory, PROVENANCE)
    assert not reopened.holds(0)
    assert holds(reopened, [2])
    add(reopened, 0)
    assert holds(reopened, [0, 2])


def test_a_journal_is_no_shard_and_goes_when_its_shard_is_there(store: CompletionStore) -> None:
    journals = [store.journal(shard) for shard in (0, 1)]
    for journal in journals:
        journal.write_text("{}\n")
    assert not store.holds(1)
    assert holds(store, [0, 2])
    add(store, 1)
    assert [journal.exists() for journal in journals] == [True, False]
    assert holds(store, [0, 1, 2])


def test_a_shard_without_completions_is_done(store: CompletionStore) -> None:
    store.add(1, [])
    assert store.holds(1)
    assert holds(store, [0, 2])
    assert store.load().has_intervals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "file"),
        ("base_fingerprint", "xyz"),
        ("rule", SamplingRule(temperature=0.8, top_k=50, top_p=0.95, order=(2, 0, 1))),
        ("rule", SamplingRule(temperature=0.7, top_k=50, top_p=0.95)),
        ("seed", 4),
        ("max_length", 61),
        ("max_new_tokens", 41),
        ("max_new_tokens", None),
        ("num_prompts", None),
        ("completions_per_prompt", 3),
        ("shard_size", 4),
        ("prompts_fingerprint", "ghi"),
        ("vocabulary_fingerprint", "xyz"),
    ],
)
def test_completions_of_another_origin_are_refused_by_name(store: CompletionStore, field: str, value: object) -> None:
    before = files_of(store)
    with pytest.raises(DataError, match=f"another {field} .*; restore the settings"):
        CompletionStore(store.directory, PROVENANCE.model_copy(update={field: value}))
    assert files_of(store) == before


def test_a_store_without_completions_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ptp_pregenerate"):
        CompletionStore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b""])
def test_a_corrupt_shard_is_named_in_one_line_and_can_be_made_again(
    store: CompletionStore, damage: Callable[[bytes], bytes]
) -> None:
    path = store.directory / shard_name(2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"is corrupt .*; remove it and run the command again") as caught:
        store.load()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    path.unlink()
    add(store, 2)
    assert holds(store, [0, 2])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_corrupt_description_is_named_in_one_line(store: CompletionStore, content: bytes) -> None:
    (store.directory / "store.json").write_bytes(content)
    with pytest.raises(DataError, match=r"store\.json is corrupt") as caught:
        CompletionStore(store.directory, PROVENANCE)
    assert "\n" not in str(caught.value)
