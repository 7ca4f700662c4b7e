import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptp.data.documents import content_group
from ptp.data.split import held_out
from ptp.errors import DataError


def groups_of(contents: list[str]) -> np.ndarray:
    return np.asarray([content_group(content) for content in contents], np.int64)


def held_out_of(contents: list[str]) -> set[str]:
    return {content for content, out in zip(contents, held_out(groups_of(contents)), strict=True) if out}


def fits(contents: list[str]) -> bool:
    """Whether some content is that of no more than a tenth of the documents."""
    return any(contents.count(content) <= len(contents) / 10 for content in set(contents))


# Few different ones, some of them frequent, or many.
ANY = st.lists(st.integers(0, 30).map(str), max_size=120) | st.lists(st.text(max_size=4), max_size=120)
CONTENTS = ANY.filter(fits)


@given(CONTENTS)
def test_some_and_never_more_than_a_tenth_are_held_out(contents: list[str]) -> None:
    out = held_out(groups_of(contents))
    assert (out.dtype, out.shape) == (np.bool_, (len(contents),))
    assert 0 < out.sum() <= len(contents) / 10


@given(ANY.filter(lambda contents: not fits(contents)))
def test_documents_too_few_or_too_alike_to_split_are_an_error_that_says_so(contents: list[str]) -> None:
    with pytest.raises(DataError, match=f"^{len(contents)} documents are too few .* at least 10 different ones$"):
        held_out(groups_of(contents))


@given(CONTENTS)
def test_documents_of_one_content_are_held_out_together(contents: list[str]) -> None:
    chosen = held_out_of(contents)
    assert [content in chosen for content in contents] == held_out(groups_of(contents)).tolist()


@given(CONTENTS, st.randoms(use_true_random=False))
def test_the_split_depends_on_the_contents_alone_not_on_their_order(contents: list[str], rng: random.Random) -> None:
    chosen = held_out_of(contents)
    rng.shuffle(contents)
    assert held_out_of(contents) == chosen


@given(st.sets(st.text(max_size=5), min_size=20, max_size=80))
def test_of_twenty_different_documents_or_more_some_are_held_out(contents: set[str]) -> None:
    assert 0 < len(held_out_of(sorted(contents))) <= len(contents) / 10


def test_a_frequent_content_does_not_take_the_data_with_it_into_validation() -> None:
    distinct = [f"prompt {number}" for number in range(40)]
    for frequent in distinct:
        chosen = held_out_of([*distinct, *[frequent] * 60])
        assert frequent not in chosen
        assert 0 < len(chosen) <= 10


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_of_many_documents_about_a_twentieth_is_held_out(seed: int) -> None:
    share = held_out(groups_of([f"{seed} {number}" for number in range(4000)])).mean()
    assert 0.035 < share < 0.065


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 4000))
@settings(max_examples=30)
def test_of_many_documents_those_held_out_stay_so_when_data_is_added(seed: int, copies: int, added: int) -> None:
    before = [f"{seed} {number}" for number in range(1000)] * copies
    after = [*before, *(f"{seed} new {number}" for number in range(added))]
    random.Random(seed).shuffle(after)
    assert held_out_of(after) & set(before) == held_out_of(before)


def test_ten_different_documents_are_enough() -> None:
    assert held_out(groups_of([str(number) for number in range(10)])).sum() == 1
