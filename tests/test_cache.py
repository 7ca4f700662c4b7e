from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp.cache import RollbackCache

IDS = torch.tensor([[3, 17, 5, 0, 8, 22, 31, 4, 9, 11]])


def states(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, length, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 3, length, 4, generator=generator)
    return keys, values


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_rollback_and_growth_keep_exactly_what_was_not_forgotten(capacity: int, turns: list[tuple[int, int]]) -> None:
    cache = RollbackCache(2, capacity)
    expected = [torch.empty(2, 3, 0, 4) for _ in range(2)]
    for seed, (appended, forgotten) in enumerate(turns):
        new = states(appended, seed)
        expected = [torch.cat([old, fresh], dim=2) for old, fresh in zip(expected, new, strict=True)]
        for layer in range(2):
            for got, want in zip(cache.update(*new, layer), expected, strict=True):
                assert torch.equal(got, want)
        length = max(0, expected[0].shape[2] - forgotten)
        cache.rollback(length)
        expected = [old[:, :, :length] for old in expected]
        assert cache.get_seq_length() == length


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 6, 64])
def test_a_model_that_rolled_back_goes_on_as_if_it_had_never_appended(tiny_llama: Callable, capacity: int) -> None:
    model = tiny_llama()
    straight, rolled = RollbackCache(2, capacity), RollbackCache(2, capacity)
    model(input_ids=IDS[:, :4], past_key_values=straight)
    model(input_ids=IDS[:, :4], past_key_values=rolled)
    model(input_ids=IDS[:, [9, 9, 2, 1, 7, 7]], past_key_values=rolled)
    rolled.rollback(4)
    expected = model(input_ids=IDS[:, 4:], past_key_values=straight).logits
    assert torch.equal(model(input_ids=IDS[:, 4:], past_key_values=rolled).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_cached_model_is_the_model_without_a_cache(tiny_llama: Callable, tiny_gpt2: Callable, base: str) -> None:
    model = tiny_llama() if base == "llama" else tiny_gpt2()
    cache = RollbackCache(2, 3)
    parts = [model(input_ids=part, past_key_values=cache).logits for part in IDS.split([1, 4, 2, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_rollback_to_what_was_never_reached_is_a_broken_invariant() -> None:
    cache = RollbackCache(1, 8)
    cache.update(*states(3, 0), 0)
    with pytest.raises(AssertionError, match="cannot roll back to 4 from 3"):
        cache.rollback(4)
