from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ptp.data.packing import Completion
from ptp.data.store import CompletionStore, Provenance, write_atomically
from ptp.errors import DataError
from ptp.sampling import SamplingRule

PROVENANCE = Provenance(
    base_fingerprint="abc",
    rule=SamplingRule(temperature=0.7, top_k=50, top_p=0.95, order=(2, 0, 1)),
    seed=3,
    max_new_tokens=40,
    prompts_fingerprint="def",
)


def completion(number: int) -> Completion:
    """Different in every field by number; every third has no prompt, every second was cut off."""
    rng = np.random.default_rng(number)
    prompt_length, written = number % 3 * 4, 2 + number % 7
    edges = np.sort(rng.random((2, written), np.float32), axis=0)
    ids = rng.integers(0, 2**31 - 1, prompt_length + written, dtype=np.int32)
    return Completion(ids, edges[0], edges[1], prompt_length, finished=number % 2 == 0)


def same(first: Completion, second: Completion) -> bool:
    arrays = all(
        getattr(first, name).dtype == getattr(second, name).dtype
        and np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("ids", "lower", "upper")
    )
    return arrays and (first.prompt_length, first.finished) == (second.prompt_length, second.finished)


def holds(store: CompletionStore, numbers: list[int]) -> bool:
    content = list(store)
    return [number for number, _ in content] == numbers and all(same(c, completion(n)) for n, c in content)


@pytest.fixture
def store(tmp_path: Path) -> CompletionStore:
    """Seven completions in two shards, out of order."""
    store = CompletionStore(tmp_path / "completions", PROVENANCE)
    for numbers in ([5, 0, 3], [9, 2, 1, 4]):
        store.append(numbers, [completion(number) for number in numbers])
    return store


def test_what_is_stored_is_read_back_in_order_of_sequence(store: CompletionStore) -> None:
    assert holds(store, [0, 1, 2, 3, 4, 5, 9])
    reopened = CompletionStore(store.directory)
    assert reopened.provenance == PROVENANCE
    assert reopened.stored_sequences() == {0, 1, 2, 3, 4, 5, 9}
    assert holds(reopened, [0, 1, 2, 3, 4, 5, 9])


def test_shards_are_only_ever_added(store: CompletionStore) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.directory.iterdir()}
    CompletionStore(store.directory, PROVENANCE).append([7], [completion(7)])
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert len(set(store.directory.iterdir()) - before.keys()) == 1


def test_a_shard_whose_writing_was_cut_short_does_not_exist(store: CompletionStore) -> None:
    shard = store.shards[0].read_bytes()
    (store.directory / ".shard-123.tmp").write_bytes(shard[: len(shard) // 2])
    reopened = CompletionStore(store.directory, PROVENANCE)
    reopened.append([7], [completion(7)])
    assert holds(reopened, [0, 1, 2, 3, 4, 5, 7, 9])


def test_a_lost_shard_is_missed_and_can_be_made_again(store: CompletionStore) -> None:
    store.shards[0].unlink()
    reopened = CompletionStore(store.directory, PROVENANCE)
    assert reopened.stored_sequences() == {9, 2, 1, 4}
    reopened.append([0, 3, 5], [completion(number) for number in (0, 3, 5)])
    assert holds(reopened, [0, 1, 2, 3, 4, 5, 9])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_fingerprint", "xyz"),
        ("rule", SamplingRule(temperature=0.8, top_k=50, top_p=0.95, order=(2, 0, 1))),
        ("rule", SamplingRule(temperature=0.7, top_k=50, top_p=0.95)),
        ("seed", 4),
        ("max_new_tokens", 41),
        ("prompts_fingerprint", "ghi"),
    ],
)
def test_completions_of_another_origin_are_refused_by_name(store: CompletionStore, field: str, value: object) -> None:
    before = {path: path.read_bytes() for path in store.directory.iterdir()}
    with pytest.raises(DataError, match=f"another {field};"):
        CompletionStore(store.directory, PROVENANCE.model_copy(update={field: value}))
    assert {path: path.read_bytes() for path in store.directory.iterdir()} == before


def test_a_store_without_completions_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ptp_pregenerate"):
        CompletionStore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:30], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_corrupt_shard_is_named_in_one_line(store: CompletionStore, damage: Callable[[bytes], bytes]) -> None:
    shard = store.shards[1]
    shard.write_bytes(damage(shard.read_bytes()))
    for read in (store.stored_sequences, lambda: list(store)):
        with pytest.raises(DataError, match="is corrupt") as caught:
            read()
        assert str(shard) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_corrupt_description_is_named_in_one_line(store: CompletionStore, content: bytes) -> None:
    (store.directory / "store.json").write_bytes(content)
    with pytest.raises(DataError, match=r"store\.json is corrupt") as caught:
        CompletionStore(store.directory, PROVENANCE)
    assert "\n" not in str(caught.value)


def test_a_token_takes_16_bytes_at_most(tmp_path: Path) -> None:
    store = CompletionStore(tmp_path / "completions", PROVENANCE)
    rng = np.random.default_rng(0)
    completions = [
        Completion(rng.integers(0, 50_000, 80, dtype=np.int32), *rng.random((2, 70), np.float32), 10, True)
        for _ in range(64)
    ]
    store.append(range(64), completions)
    size = sum(path.stat().st_size for path in store.directory.iterdir())
    assert size <= 16 * sum(len(c) for c in completions)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
