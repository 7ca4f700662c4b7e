import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp.model.masks import context_mask, window_mask


def matrix(picture: str) -> Tensor:
    return torch.tensor([[mark == "1" for mark in row.split()] for row in picture.strip().splitlines()])


@st.composite
def packed_documents(draw: st.DrawFn) -> Tensor:
    """(B, S) documents, each at least two tokens long, then padding."""
    size = draw(st.integers(2, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=4))
        row = [number for number, length in enumerate(lengths) for _ in range(length)][:size]
        rows.append(row + [-1] * (size - len(row)))
    return torch.tensor(rows)


def test_two_documents_of_two_tokens_are_causal_and_alone() -> None:
    expected = matrix("""
        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """)
    assert torch.equal(context_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0], expected)


def test_padding_attends_to_itself_only() -> None:
    expected = matrix("""
        1 . . .
        1 1 . .
        . . 1 .
        . . . 1
    """)
    assert torch.equal(context_mask(torch.tensor([[0, 0, -1, -1]]))[0, 0], expected)


def test_two_windows_see_their_document_before_them_and_themselves() -> None:
    expected = matrix("""
        1 1 . . .   1 . . .
        1 1 . . .   1 1 . .
        . . . 1 .   . . 1 .
        . . . 1 .   . . 1 1
    """)
    mask = window_mask(torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[2, 4]]), 2)
    assert torch.equal(mask[0, 0], expected)


@given(packed_documents())
def test_a_token_sees_the_tokens_of_its_document_up_to_itself(document: Tensor) -> None:
    mask = context_mask(document)
    rows, size = document.shape
    assert mask.shape == (rows, 1, size, size)
    for row, own in enumerate(document.tolist()):
        for query in range(size):
            for key in range(size):
                sees = key == query or (key < query and own[key] == own[query] != -1)
                assert mask[row, 0, query, key] == sees


@given(packed_documents(), st.integers(1, 4), st.data())
def test_a_window_sees_its_document_before_its_start_and_itself(
    document: Tensor, window: int, data: st.DataObject
) -> None:
    rows, size = document.shape
    num_windows = data.draw(st.integers(1, 3))
    starts = torch.tensor(
        [
            [data.draw(st.sampled_from([i for i in range(1, size) if own[i] >= 0])) for _ in range(num_windows)]
            for own in document.tolist()
        ]
    )
    mask = window_mask(document, starts, window)
    assert mask.shape == (rows, 1, num_windows * window, size + num_windows * window)
    for row, own in enumerate(document.tolist()):
        for query in range(num_windows * window):
            number, index = divmod(query, window)
            start = int(starts[row, number])
            for key in range(size):
                assert mask[row, 0, query, key] == (key < start and own[key] == own[start])
            for key in range(num_windows * window):
                other, place = divmod(key, window)
                assert mask[row, 0, query, size + key] == (other == number and place <= index)
