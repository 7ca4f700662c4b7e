import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp.decoding.layout import CallLayout, call_mask, local_mask, window_rows

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> CallLayout:
    num_drafts = draw(st.integers(0, 4))
    widths = draw(st.lists(st.integers(0, 4), min_size=num_drafts + 1, max_size=num_drafts + 1))
    return CallLayout(draw(st.integers(1, 4)), num_drafts, tuple(widths))


def roles(layout: CallLayout) -> list[tuple[str, int, int]]:
    """What each row is: a pending token i, draft j (from 1), or window position k of branch b."""
    pending = [("pending", i, 0) for i in range(layout.num_pending)]
    drafts = [("draft", j, 0) for j in range(1, layout.num_drafts + 1)]
    return pending + drafts + [("branch", b, k) for b, width in enumerate(layout.widths) for k in range(width)]


def sees(query: tuple[str, int, int], key: tuple[str, int, int]) -> bool:
    """METHOD §4: verification is causal; a branch sees everything accepted, d_1 … d_b and itself."""
    (role, number, index), (other, other_number, other_index) = query, key
    if role == "pending":
        return other == "pending" and other_number <= number
    if role == "draft":
        return other == "pending" or (other == "draft" and other_number <= number)
    if other == "branch":
        return other_number == number and other_index <= index
    return other == "pending" or other_number <= number


def test_one_pending_token_two_drafts_and_three_branches() -> None:
    picture = """
        1 . . . . . .
        1 1 . . . . .
        1 1 1 . . . .
        1 . . 1 . . .
        1 . . 1 1 . .
        1 1 . . . 1 .
        1 1 1 . . . 1
    """
    expected = [[mark == "1" for mark in row.split()] for row in picture.strip().splitlines()]
    assert local_mask(CallLayout(1, 2, (2, 1, 1)), CPU).tolist() == expected


@given(layouts())
def test_every_row_sees_exactly_what_the_method_says(layout: CallLayout) -> None:
    rows = roles(layout)
    assert layout.num_rows == len(rows)
    assert local_mask(layout, CPU).tolist() == [[sees(query, key) for key in rows] for query in rows]


@given(layouts())
def test_branches_lie_behind_the_gate_in_order(layout: CallLayout) -> None:
    rows = roles(layout)
    gated = [row for row, (role, _, _) in enumerate(rows) if role == "branch"]
    assert gated == list(range(layout.gate_start, layout.num_rows))
    for branch in range(layout.num_drafts + 1):
        start, end = layout.branch_rows(branch)
        assert [rows[row] for row in range(start, end)] == [("branch", branch, k) for k in range(layout.widths[branch])]


@given(layouts())
def test_window_rows_name_branch_place_and_first_of_each_gated_row(layout: CallLayout) -> None:
    rows = window_rows(layout.widths, CPU)
    assert rows.branch.dtype == rows.place.dtype == torch.int64
    expected = [(b, b + k, k == 0) for role, b, k in roles(layout) if role == "branch"]
    assert list(zip(rows.branch.tolist(), rows.place.tolist(), rows.first.tolist(), strict=True)) == expected


@given(layouts(), st.integers(0, 5))
def test_every_row_sees_the_whole_cache(layout: CallLayout, num_cached: int) -> None:
    mask = call_mask(layout, num_cached, CPU)
    if layout.num_rows == 1:
        assert mask is None
        return
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, layout.num_rows, num_cached + layout.num_rows)
    assert mask[..., :num_cached].all()
    assert torch.equal(mask[0, 0, :, num_cached:], local_mask(layout, CPU))
