from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptp.data.packing import Completion, PackedBatch, WindowStream, collate, pack
from ptp.errors import DataError

SIZE = 24
NUM_WINDOWS = 12
WINDOW = 5
PAD = 999_999


def completion(number: int, prompt_length: int, written: int, finished: bool = True) -> Completion:
    """Document `number`, whose token ids are unique: 1000 · (number + 1) + position. Every fifth token has no mass."""
    rng = np.random.default_rng(number)
    edges = np.sort(rng.random((2, written), np.float32), axis=0)
    edges[1, ::5] = edges[0, ::5]
    ids = 1000 * (number + 1) + np.arange(prompt_length + written, dtype=np.int32)
    return Completion(ids, edges[0], edges[1], prompt_length, finished)


@st.composite
def completions(draw: st.DrawFn) -> list[Completion]:
    """At least one of them long enough to train on."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 15)), max_size=8))
    sizes.insert(draw(st.integers(0, len(sizes))), (draw(st.integers(1, 8)), draw(st.integers(2, 15))))
    return [completion(number, *size) for number, size in enumerate(sizes) if size != (0, 2)]


def stream(documents: list[Completion], seed: int = 0, length: int | None = None, beta: float = 0.3) -> WindowStream:
    return WindowStream(
        documents,
        sequence_length=SIZE,
        num_windows=NUM_WINDOWS,
        window=WINDOW,
        beta=beta,
        seed=seed,
        length=length,
        pad_id=PAD,
    )


def interval_of(documents: list[Completion], token: int) -> tuple[float, float]:
    number, position = token // 1000 - 1, token % 1000
    document = documents[number]
    place = position - document.prompt_length
    return (float(document.lower[place]), float(document.upper[place])) if place >= 0 else (0.0, 0.0)


def by_number(documents: list[Completion]) -> list[Completion]:
    """Documents at the index their token ids name."""
    table = {int(document.ids[0]) // 1000 - 1: document for document in documents if len(document)}
    return [table.get(number, documents[0]) for number in range(max(table) + 1)]


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


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
    assert sorted(document for sequence in sequences for document in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in sequence) <= 50 for sequence in sequences)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_no_two_sequences_could_be_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[i] for i in sequence) for sequence in pack(lengths, 50))
    assert len(loads) < 2 or loads[0] + loads[1] > 50


@given(st.lists(st.integers(1, 20), max_size=7))
def test_packing_is_within_the_bound_of_first_fit_decreasing(lengths: list[int]) -> None:
    assert len(pack(lengths, 20)) <= 11 / 9 * fewest_sequences(lengths, 20) + 6 / 9


def test_a_document_goes_where_it_fits_tightest() -> None:
    assert pack([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


def test_a_document_longer_than_a_sequence_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match="a document has 11 tokens, a packed sequence holds 10: raise sequence_length"):
        pack([3, 11], 10)


@given(completions(), st.integers(0, 2**32), st.data())
@settings(max_examples=50)
def test_item_i_is_a_pure_function_of_seed_and_i(documents: list[Completion], seed: int, data: st.DataObject) -> None:
    first, second = stream(documents, seed, length=20), stream(documents, seed, length=9)
    order = data.draw(st.permutations(range(9)))
    later = {i: second[i] for i in order}
    assert all(same(first[i], later[i]) for i in range(9))


def test_seeds_and_passes_differ() -> None:
    documents = [completion(number, 3, 14) for number in range(4)]
    items = [stream(documents, seed, length=8)[i] for seed in range(3) for i in range(8)]
    assert not any(same(a, b) for i, a in enumerate(items) for b in items[:i])


@given(completions(), st.integers(0, 99))
@settings(max_examples=50)
def test_every_pass_holds_every_usable_document_once_and_whole(documents: list[Completion], seed: int) -> None:
    once = len(stream(documents, seed))
    items = stream(documents, seed, length=3 * once)
    long_enough = [document for document in documents if len(document) - document.prompt_length >= 2]
    usable = sorted(int(i) for document in long_enough for i in document.ids)
    for begin in range(0, 3 * once, once):
        ids = torch.cat([items[i].ids for i in range(begin, begin + once)])
        assert sorted(ids[ids != PAD].tolist()) == usable


@given(completions(), st.integers(0, 99))
def test_documents_lie_one_after_another_and_padding_last(documents: list[Completion], seed: int) -> None:
    item = stream(documents, seed)[0]
    ids, document, positions = item.ids, item.document, item.positions
    real = document >= 0
    assert torch.equal(real, ids != PAD)
    assert (real[:-1] >= real[1:]).all()
    assert torch.equal(ids[real] % 1000, positions[real])
    names = [(int(name) // 1000, int(number)) for name, number in zip(ids[real], document[real], strict=True)]
    assert all(b in (a, (b[0], a[1] + 1)) for a, b in pairwise(names))


@given(completions(), st.integers(0, 99))
def test_a_window_starts_inside_a_completion_with_an_anchor_before_it_and_a_token_after_it(
    documents: list[Completion], seed: int
) -> None:
    item, table = stream(documents, seed)[0], by_number(documents)
    assert item.starts.shape == (NUM_WINDOWS,)
    for start in item.starts.tolist():
        token = int(item.ids[start])
        own = table[token // 1000 - 1]
        assert own.prompt_length <= token % 1000 < len(own) - 1
        assert item.ids[start - 1] == token - 1
        assert item.ids[start + 1] == token + 1


def test_every_position_of_a_completion_but_the_last_can_start_a_window() -> None:
    items = stream([completion(0, 3, 6), completion(1, 0, 4)], length=50)
    starts = {int(items[i].ids[start]) for i in range(50) for start in items[i].starts}
    assert starts == {1003, 1004, 1005, 1006, 1007, 2001, 2002}


@given(completions(), st.integers(0, 99), st.sampled_from([0.05, 0.3, 1.0]))
def test_u_lies_inside_its_own_token_s_interval_and_is_zero_past_the_document(
    documents: list[Completion], seed: int, beta: float
) -> None:
    item, table = stream(documents, seed, beta=beta)[0], by_number(documents)
    assert item.u.shape == (NUM_WINDOWS, WINDOW)
    assert item.u.dtype == torch.float32
    for start, numbers in zip(item.starts.tolist(), item.u.tolist(), strict=True):
        for index, u in enumerate(numbers):
            place = start + index
            if place >= SIZE or item.document[place] != item.document[start]:
                assert u == 0
                continue
            lower, upper = interval_of(table, int(item.ids[place]))
            assert lower <= u < upper or u == lower == upper


@given(completions(), st.integers(0, 99))
def test_mass_marks_the_tokens_of_completions_that_the_rule_can_sample(documents: list[Completion], seed: int) -> None:
    item, table = stream(documents, seed)[0], by_number(documents)
    for token, mass in zip(item.ids.tolist(), item.mass.tolist(), strict=True):
        lower, upper = interval_of(table, token) if token != PAD else (0, 0)
        assert mass == (upper > lower)


@pytest.mark.parametrize(("beta", "spread"), [(1.0, 1 / 12), (0.3, 1 / 6.4)])
def test_z_is_uniform_for_evaluation_and_prefers_edges_in_training(beta: float, spread: float) -> None:
    document = Completion(np.arange(22, dtype=np.int32), np.zeros(20, np.float32), np.ones(20, np.float32), 2, True)
    items = stream([document], beta=beta, length=100)
    passes = [items[i] for i in range(100)]
    z = torch.cat([item.u[item.starts.unsqueeze(1) + torch.arange(WINDOW) < 22] for item in passes])
    assert z.mean() == pytest.approx(0.5, abs=0.02)
    assert z.var() == pytest.approx(spread, abs=0.01)


def test_collate_stacks_every_field() -> None:
    items = stream([completion(0, 3, 14), completion(1, 3, 14)], length=2)
    batch: dict[str, Tensor] = collate([items[0], items[1]])
    assert set(batch) == set(PackedBatch.__dataclass_fields__)
    assert all(torch.equal(batch[name][i], getattr(items[i], name)) for name in batch for i in range(2))


def test_an_index_outside_the_stream_is_an_index_error() -> None:
    items = stream([completion(0, 3, 14)], length=2)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            items[index]


def test_completions_of_one_token_are_an_error() -> None:
    with pytest.raises(DataError, match="none of 2 completions has two tokens: nothing to train on"):
        stream([completion(0, 3, 1), completion(1, 4, 0)])


def test_two_tokens_without_a_prompt_hold_no_window_and_are_left_out() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        stream([completion(0, 0, 2)])[0]
    items = stream([completion(0, 0, 2), completion(1, 2, 20)])
    assert len(items) == 1
