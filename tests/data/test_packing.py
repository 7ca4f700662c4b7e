from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader

from ptp.data.documents import Document, Documents, Span
from ptp.data.packing import PackedBatch, WindowStream, collate, pack
from ptp.errors import DataError

SIZE = 24
NUM_WINDOWS = 12
WINDOW = 5
PAD = 999_999


def document(number: int, length: int, *spans: Span, has_intervals: bool = True) -> Document:
    """Document `number`, whose token ids are unique: 1000 · (number + 1) + position. Every fifth token has no mass."""
    trained = sum(last - first for first, last in spans)
    edges = np.sort(np.random.default_rng(number).random((2, trained), np.float32), axis=0)
    edges[1, ::5] = edges[0, ::5]
    ids = 1000 * (number + 1) + np.arange(length, dtype=np.int32)
    lower, upper = edges if has_intervals else (None, None)
    return Document(ids, spans, lower, upper, number=number)


def completion(number: int, prompt_length: int, written: int) -> Document:
    return document(number, prompt_length + written, (prompt_length, prompt_length + written))


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    """Completions, chats and texts, whose spans may be empty or touch; one at least is long enough to train on."""
    made = []
    place = draw(st.integers(0, 6))
    for number in range(draw(st.integers(place + 1, 7))):
        length = draw(st.integers(0, SIZE - 1))
        edges = draw(st.lists(st.integers(0, length), max_size=6).map(sorted))
        spans = list(zip(edges[::2], edges[1::2], strict=False))
        made.append(completion(number, 3, 2 + length % 9) if number == place else document(number, length, *spans))
    return made


def stream(held: list[Document], seed: int = 0, length: int | None = None, beta: float = 0.3) -> WindowStream:
    return WindowStream(
        Documents.of(held),
        sequence_length=SIZE,
        num_windows=NUM_WINDOWS,
        window=WINDOW,
        beta=beta,
        seed=seed,
        length=length,
        pad_id=PAD,
    )


def named(held: list[Document], token: int) -> tuple[Document, int]:
    """The document a token belongs to, and its place there."""
    return held[token // 1000 - 1], token % 1000


def span_of(document: Document, place: int) -> Span | None:
    return next((span for span in document.spans if span[0] <= place < span[1]), None)


def interval_of(document: Document, place: int) -> tuple[float, float]:
    trained = [token for first, last in document.spans for token in range(first, last)]
    if place not in trained:
        return 0.0, 0.0
    assert document.lower is not None
    assert document.upper is not None
    return float(document.lower[trained.index(place)]), float(document.upper[trained.index(place)])


def usable(document: Document) -> bool:
    """Whether a window fits: an anchor before its start, a token of the same span after it."""
    return any(last - max(first, 1) >= 2 for first, last in document.spans)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def fewest_sequences(lengths: list[int], size: int) -> int:
    """By trying everything."""

    def search(rest: tuple[int, ...], room: tuple[int, ...]) -> int:
        if not rest:
            return len(room)
        choices = {space: index for index, space in enumerate(room) if space >= rest[0]}
        filled = [
            search(rest[1:], (*room[:index], space - rest[0], *room[index + 1 :])) for space, index in choices.items()
        ]
        return min([*filled, search(rest[1:], (*room, size - rest[0]))])

    return search(tuple(sorted(lengths, reverse=True)), ())


@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_document_is_packed_once_and_no_sequence_overflows(lengths: list[int]) -> None:
    sequences = pack(lengths, 50)
    assert sorted(document for sequence in sequences for document in sequence.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in sequence) <= 50 for sequence in sequences)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_no_two_sequences_could_be_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[i] for i in sequence) for sequence in pack(lengths, 50))
    assert len(loads) < 2 or loads[0] + loads[1] > 50


@given(st.lists(st.integers(1, 20), max_size=7))
def test_packing_is_within_the_bound_of_first_fit_decreasing(lengths: list[int]) -> None:
    assert len(pack(lengths, 20)) <= 11 / 9 * fewest_sequences(lengths, 20) + 6 / 9


def test_a_document_goes_where_it_fits_tightest() -> None:
    # 7 leaves 3, which the 3 takes although the 6, which leaves 4, would hold it too.
    assert [sequence.tolist() for sequence in pack([6, 7, 3, 1], 10)] == [[1, 2], [0, 3]]


def test_a_document_longer_than_a_sequence_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match="a document has 11 tokens, a packed sequence holds 10: raise sequence_length"):
        pack([3, 11], 10)


def test_many_documents_are_packed_in_little_time_and_with_little_waste() -> None:
    lengths = np.random.default_rng(0).integers(20, 1000, 50_000)
    assert len(pack(lengths, 1024)) < 1.01 * lengths.sum() / 1024


@given(documents(), st.integers(0, 2**32), st.data())
@settings(max_examples=50)
def test_item_i_is_a_pure_function_of_seed_and_i(held: list[Document], seed: int, data: st.DataObject) -> None:
    first, second = stream(held, seed, length=20), stream(held, seed, length=9)
    order = data.draw(st.permutations(range(9)))
    later = {i: second[i] for i in order}
    assert all(same(first[i], later[i]) for i in range(9))


def test_worker_processes_give_the_same_items() -> None:
    items = stream([completion(number, 3, 9) for number in range(6)], length=9)
    alone, together = (list(DataLoader(items, batch_size=3, collate_fn=collate, num_workers=count)) for count in (0, 2))
    assert len(alone) == len(together) == 3
    assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, together, strict=True) for name in a)


def test_seeds_and_passes_differ() -> None:
    held = [completion(number, 3, 14) for number in range(4)]
    items = [stream(held, seed, length=8)[i] for seed in range(3) for i in range(8)]
    assert not any(same(a, b) for i, a in enumerate(items) for b in items[:i])


@given(documents(), st.integers(0, 99))
@settings(max_examples=50)
def test_every_pass_holds_every_usable_document_once_and_whole(held: list[Document], seed: int) -> None:
    once = len(stream(held, seed))
    items = stream(held, seed, length=3 * once)
    expected = sorted(int(i) for document in held if usable(document) for i in document.ids)
    for begin in range(0, 3 * once, once):
        ids = torch.cat([items[i].ids for i in range(begin, begin + once)])
        assert sorted(ids[ids != PAD].tolist()) == expected


@given(documents(), st.integers(0, 99))
def test_documents_lie_one_after_another_and_padding_last(held: list[Document], seed: int) -> None:
    item = stream(held, seed)[0]
    ids, document, positions = item.ids, item.document, item.positions
    real = document >= 0
    assert torch.equal(real, ids != PAD)
    assert (real[:-1] >= real[1:]).all()
    assert torch.equal(ids[real] % 1000, positions[real])
    names = [(int(name) // 1000, int(number)) for name, number in zip(ids[real], document[real], strict=True)]
    assert all(b in (a, (b[0], a[1] + 1)) for a, b in pairwise(names))


@given(documents(), st.integers(0, 99))
def test_two_tokens_share_a_span_s_number_if_and_only_if_they_share_the_span(held: list[Document], seed: int) -> None:
    item = stream(held, seed)[0]
    numbers: dict[tuple[int, Span], set[int]] = {}
    for token, number in zip(item.ids.tolist(), item.span.tolist(), strict=True):
        document, place = named(held, token) if token != PAD else (held[0], -1)
        span = span_of(document, place)
        assert (number == -1) == (span is None)
        if span is not None:
            numbers.setdefault((document.number, span), set()).add(number)
    assert all(len(found) == 1 for found in numbers.values())
    assert len(set.union(*numbers.values())) == len(numbers)


@given(documents(), st.integers(0, 99))
def test_a_window_starts_inside_a_span_with_an_anchor_before_it_and_a_token_of_the_span_after_it(
    held: list[Document], seed: int
) -> None:
    item = stream(held, seed)[0]
    assert item.starts.shape == (NUM_WINDOWS,)
    for start in item.starts.tolist():
        document, place = named(held, int(item.ids[start]))
        assert item.ids[start - 1] == document.ids[place - 1]
        assert place > 0
        span = span_of(document, place)
        assert span is not None
        assert place + 1 < span[1]


def test_every_position_of_a_span_but_the_last_can_start_a_window() -> None:
    chat = document(2, 12, (3, 6), (7, 8), (9, 11))
    items = stream([completion(0, 3, 3), completion(1, 0, 4), chat], length=100)
    starts = {int(items[i].ids[start]) for i in range(len(items)) for start in items[i].starts}
    assert starts == {1003, 1004, 2001, 2002, 3003, 3004, 3009}


def test_windows_are_drawn_in_proportion_to_the_places_where_they_may_start() -> None:
    # Of 3, 6, 1, 1 and 4 tokens that may follow an anchor and come before another of their span.
    held = [document(0, 14, (0, 5), (6, 13)), document(1, 10, (1, 3), (3, 5), (5, 10))]
    items = stream(held, length=400)
    found: Counter[tuple[int, Span | None]] = Counter()
    for i in range(len(items)):
        for start in items[i].starts:
            document_, place = named(held, int(items[i].ids[start]))
            found[document_.number, span_of(document_, place)] += 1
    spans = [(0, (0, 5)), (0, (6, 13)), (1, (1, 3)), (1, (3, 5)), (1, (5, 10))]
    expected = np.asarray([3, 6, 1, 1, 4]) / 15 * 400 * NUM_WINDOWS
    assert stats.chisquare([found[span] for span in spans], expected).pvalue > 1e-3


@given(documents(), st.integers(0, 99))
def test_intervals_stand_beside_the_tokens_they_belong_to(held: list[Document], seed: int) -> None:
    item = stream(held, seed)[0]
    assert item.lower is not None
    assert item.upper is not None
    for token, lower, upper in zip(item.ids.tolist(), item.lower.tolist(), item.upper.tolist(), strict=True):
        expected = interval_of(*named(held, token)) if token != PAD else (0, 0)
        assert (lower, upper) == expected


def test_without_intervals_the_same_is_drawn() -> None:
    held = [document(number, 18, (2, 7), (9, 18)) for number in range(3)]
    bare = [replace(document, lower=None, upper=None) for document in held]
    for i in range(3):
        known, unknown = stream(held)[i], stream(bare)[i]
        assert (unknown.lower, unknown.upper) == (None, None)
        assert same(replace(known, lower=None, upper=None), unknown)


@pytest.mark.parametrize(("beta", "spread"), [(1.0, 1 / 12), (0.3, 1 / 6.4)])
def test_z_is_uniform_for_evaluation_and_prefers_edges_in_training(beta: float, spread: float) -> None:
    items = stream([completion(0, 2, 20)], beta=beta, length=100)
    z = torch.stack([items[i].z for i in range(100)])
    assert (z.shape, z.dtype) == ((100, NUM_WINDOWS, WINDOW), torch.float32)
    assert ((z >= 0) & (z <= 1)).all()
    assert z.mean() == pytest.approx(0.5, abs=0.02)
    assert z.var() == pytest.approx(spread, abs=0.01)


@pytest.mark.parametrize("has_intervals", [True, False])
def test_collate_stacks_every_field_there_is(has_intervals: bool) -> None:
    held = [document(number, 17, (3, 17), has_intervals=has_intervals) for number in range(2)]
    items = stream(held, length=2)
    batch: dict[str, Tensor] = collate([items[0], items[1]])
    absent = set() if has_intervals else {"lower", "upper"}
    assert set(batch) == set(PackedBatch.__dataclass_fields__) - absent
    assert all(torch.equal(batch[name][i], getattr(items[i], name)) for name in batch for i in range(2))


def test_an_index_outside_the_stream_is_an_index_error() -> None:
    items = stream([completion(0, 3, 14)], length=2)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            items[index]


def test_documents_without_two_trained_tokens_in_a_row_are_an_error() -> None:
    held = [completion(0, 3, 1), completion(1, 4, 0), document(2, 9, (3, 4), (4, 5), (6, 7)), document(3, 9)]
    with pytest.raises(DataError, match="none of 4 documents has two trained tokens in a row: nothing to train on"):
        stream(held)


def test_two_tokens_without_a_prompt_hold_no_window_and_are_left_out() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        stream([completion(0, 0, 2)])
    assert len(stream([completion(0, 0, 2), completion(1, 2, 20)])) == 1
