from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp.decoding.layout import CallLayout, CallShape, RowLayout, call_layout, call_mask

CPU = torch.device("cpu")
O_PTP, C_PTP = -1, 0


@st.composite
def layouts(draw: st.DrawFn) -> RowLayout:
    num_drafts = draw(st.integers(0, 4))
    widths = draw(st.lists(st.integers(0, 4), min_size=num_drafts + 1, max_size=num_drafts + 1))
    seconds = draw(st.sets(st.integers(0, num_drafts - 1))) if num_drafts else set()
    return RowLayout(draw(st.integers(1, 4)), num_drafts, tuple(widths), tuple(sorted(seconds)))


Role = tuple[str, int, int]


def roles(row: RowLayout, shape: CallShape) -> list[Role]:
    """What each position is: a pending token i, draft j (from 1) or its second candidate, index k of branch b."""
    pending = [("pending", i, 0) for i in range(row.num_pending)]
    drafts = [("draft", j, 0) for j in range(1, row.num_drafts + 1)] + [("second", j + 1, 0) for j in row.seconds]
    branches = [("branch", b, k) for b, width in enumerate(row.widths) for k in range(width)]
    between = [("padding", i, 0) for i in range(shape.gate_start - row.num_verify)]
    behind = [("padding", 100 + i, 0) for i in range(shape.num_window - row.num_window)]
    return pending + drafts + between + branches + behind


def sees(query: Role, key: Role) -> bool:
    """METHOD §4: verification is causal; a branch sees everything accepted, d_1 … d_b and itself. A second candidate
    sees what its draft does, itself in its place."""
    (role, number, index), (other, other_number, other_index) = query, key
    if "padding" in (role, other) or other == "second":
        return query == key
    if role == "second":
        return other == "pending" or (other == "draft" and other_number < number)
    if role == "pending":
        return other == "pending" and other_number <= number
    if role == "draft":
        return other == "pending" or (other == "draft" and other_number <= number)
    if other == "branch":
        return other_number == number and other_index <= index
    return other == "pending" or other_number <= number


def made(rows: list[RowLayout], shift: int = O_PTP) -> tuple[CallLayout, CallShape]:
    shape = CallShape.of(rows)
    return call_layout(rows, shape, shift, CPU), shape


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
    layout, _ = made([RowLayout(1, 2, (2, 1, 1))])
    assert layout.sees[0].tolist() == expected


@given(st.lists(layouts(), min_size=1, max_size=3), st.sampled_from([O_PTP, C_PTP]))
def test_every_position_is_where_it_belongs_and_sees_what_the_method_says(rows: list[RowLayout], shift: int) -> None:
    layout, shape = made(rows, shift)
    for index, row in enumerate(rows):
        found = roles(row, shape)
        assert len(found) == shape.num_positions
        assert layout.sees[index].tolist() == [[sees(query, key) for key in found] for query in found]
        # Token p of what is to come, the first pending one being 0, stands at p; what carries its u at p + shift.
        place = {
            "pending": lambda i, _: i,
            "draft": lambda j, _, row=row: row.num_pending - 1 + j,
            "second": lambda j, _, row=row: row.num_pending - 1 + j,
            "branch": lambda b, k, row=row: row.num_pending + b + k + shift,
            "padding": lambda i, _: 0,
        }
        assert layout.offset[index].tolist() == [place[role](number, k) for role, number, k in found]
        gated = found[shape.gate_start :]
        for position, (role, branch, k) in enumerate(gated):
            if role == "branch":
                assert layout.place[index, position] == branch + k
                assert found[int(layout.anchor[index, position])] == (
                    ("draft", branch, 0) if branch else ("pending", row.num_pending - 1, 0)
                )
                assert bool(layout.first[index, position]) == (k == 0)
        for branch, width in enumerate(row.widths):
            start = int(layout.starts[index, branch])
            assert int(layout.widths[index, branch]) == width
            assert found[start : start + width] == [("branch", branch, k) for k in range(width)]
        verifies = [found[position] for position in layout.verify[index].tolist()]
        last = ("pending", row.num_pending - 1, 0)
        assert verifies[: row.num_drafts + 1] == [last, *(("draft", j, 0) for j in range(1, row.num_drafts + 1))]
        assert int(layout.num_drafts[index]) == row.num_drafts
        seconds = layout.second[index].tolist()
        assert {draft: found[position] for draft, position in enumerate(seconds) if position >= 0} == {
            draft: ("second", draft + 1, 0) for draft in row.seconds
        }


@given(st.lists(st.tuples(layouts(), st.integers(0, 5)), min_size=1, max_size=3))
def test_every_position_sees_all_that_its_text_has_cached_and_nothing_of_others(
    texts: list[tuple[RowLayout, int]],
) -> None:
    rows, cached = [row for row, _ in texts], [number for _, number in texts]
    layout, shape = made(rows)
    mask = call_mask(layout, cached, torch.tensor(cached).unsqueeze(1))
    width = max(cached) + shape.num_positions
    if mask is None:
        assert shape.num_positions == 1 and len(set(cached)) == 1
        return
    assert mask.dtype == torch.bool
    assert mask.shape == (len(rows), 1, shape.num_positions, width)
    for index, number in enumerate(cached):
        own = mask[index, 0]
        assert own[:, :number].all()
        assert torch.equal(own[:, number : number + shape.num_positions], layout.sees[index])
        assert not own[:, number + shape.num_positions :].any()
