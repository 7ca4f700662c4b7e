import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from ptp.model.masks import context_mask, window_mask


def matrix(picture: str) -> Tensor:
    return torch.tensor([[mark == "1" for mark in row.split()] for row in picture.strip().splitlines()])


@st.composite
def packed_documents(draw: st.DrawFn, max_size: int = 12, max_length: int = 6) -> Tensor:
    """(B, S) documents, each at least two tokens long, then padding."""
    size = draw(st.integers(2, max_size))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(2, max_length), min_size=1, max_size=4))
        row = [number for number, length in enumerate(lengths) for _ in range(length)][:size]
        rows.append(row + [-1] * (size - len(row)))
    return torch.tensor(rows)


def drawn_starts(data: st.DataObject, document: Tensor, num_windows: int) -> Tensor:
    """(B, N) places of tokens behind the first of a row."""
    return torch.tensor(
        [
            [data.draw(st.sampled_from([i for i in range(1, len(own)) if own[i] >= 0])) for _ in range(num_windows)]
            for own in document.tolist()
        ]
    )


def dense_again(blocks: BlockMask) -> Tensor:
    """(B, 1, queries, keys): all of a full block, of a partial one what its predicate says, nothing of the others."""

    def listed(numbers: Tensor, indices: Tensor) -> Tensor:
        among_first = torch.arange(indices.shape[-1]) < numbers.unsqueeze(-1)
        chosen = torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), among_first)
        for dim, size in zip((2, 3), blocks.BLOCK_SIZE, strict=True):
            chosen = chosen.repeat_interleave(size, dim)
        return chosen[..., :queries, :keys]

    rows, _, queries, keys = blocks.shape
    partial = create_mask(blocks.mask_mod, rows, None, queries, keys, device="cpu")
    return listed(blocks.full_kv_num_blocks, blocks.full_kv_indices) | (
        listed(blocks.kv_num_blocks, blocks.kv_indices) & partial
    )


def test_two_documents_of_two_tokens_are_causal_and_alone() -> None:
    expected = matrix("""
        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """)
    assert torch.equal(context_mask(torch.tensor([[0, 0, 1, 1]])).dense()[0, 0], expected)


def test_padding_attends_to_itself_only() -> None:
    expected = matrix("""
        1 . . .
        1 1 . .
        . . 1 .
        . . . 1
    """)
    assert torch.equal(context_mask(torch.tensor([[0, 0, -1, -1]])).dense()[0, 0], expected)


def test_two_windows_see_their_document_before_them_and_themselves() -> None:
    expected = matrix("""
        1 1 . . .   1 . . .
        1 1 . . .   1 1 . .
        . . . 1 .   . . 1 .
        . . . 1 .   . . 1 1
    """)
    mask = window_mask(torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[2, 4]]), 2).dense()
    assert torch.equal(mask[0, 0], expected)


@given(packed_documents())
def test_a_token_sees_the_tokens_of_its_document_up_to_itself(document: Tensor) -> None:
    mask = context_mask(document).dense()
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
    starts = drawn_starts(data, document, num_windows)
    mask = window_mask(document, starts, window).dense()
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


@settings(max_examples=30)
@given(packed_documents(max_size=400, max_length=200), st.integers(1, 40), st.data())
def test_blocks_of_a_mask_hold_what_the_dense_one_does(document: Tensor, window: int, data: st.DataObject) -> None:
    starts = drawn_starts(data, document, data.draw(st.integers(1, 12)))
    for mask in (context_mask(document), window_mask(document, starts, window)):
        assert torch.equal(dense_again(mask.blocks()), mask.dense())


def test_blocks_that_nobody_may_see_are_left_out() -> None:
    document = torch.arange(4).repeat_interleave(128).unsqueeze(0)
    starts = torch.arange(64, 512, 128).repeat_interleave(8).unsqueeze(0)
    # Each document is a block, and each block's windows: they see one block of the context, and their own.
    assert context_mask(document).blocks().kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]
    assert window_mask(document, starts, 16).blocks().kv_num_blocks.tolist() == [[[2, 2, 2, 2]]]
