from collections.abc import Callable
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp.cache import PassCache, RollbackCache, SlotCache

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


def column_states(numbers: list[int]) -> Tensor:
    """States (1, heads, length, head_dim) that hold one number for each position."""
    return torch.tensor(numbers, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 3, -1, 4)


@given(st.data())
def test_rows_that_enter_move_and_grow_keep_exactly_what_is_theirs(data: st.DataObject) -> None:
    fresh = count(1)
    cache, rows = SlotCache(2, num_slots=3, capacity=20), [[], [], []]
    turns = data.draw(st.lists(st.sampled_from(["append", "enter", "move"]), max_size=12))
    for turn in ["append", *turns, "append"]:
        if turn == "enter":
            prompts = [[next(fresh) for _ in range(data.draw(st.integers(1, 5)))] for _ in range(2)]
            longest = max(len(prompt) for prompt in prompts)
            prefilled = RollbackCache(2, longest)
            padded = torch.cat([column_states(prompt + [-1] * (longest - len(prompt))) for prompt in prompts])
            for layer in range(2):
                prefilled.update(padded, -padded, layer)
            slots = data.draw(st.lists(st.integers(0, 2), min_size=1, unique=True))
            places = [data.draw(st.integers(0, 1)) for _ in slots]
            cache.enter(torch.tensor(slots), prefilled, torch.tensor(places))
            for slot, place in zip(slots, places, strict=True):
                rows[slot] = list(prompts[place])
        elif turn == "move":
            source, target, _ = data.draw(st.permutations(range(3)))
            cache.move(source, target, len(rows[source]))
            rows[target] = list(rows[source])
        else:
            # The first call fills every slot, so that there is something to move.
            num_rows = data.draw(st.integers(1, 3)) if any(rows) else 3
            lengths = [len(row) for row in rows[:num_rows]]
            new = [next(fresh) for _ in range(num_rows)]
            cache.append_at(torch.tensor(lengths), max(lengths))
            for row, number in zip(rows, new, strict=False):
                row.append(number)
            appended = torch.cat([column_states([number]) for number in new])
            for layer in range(2):
                keys, values = cache.update(appended, -appended, layer)
                assert keys.shape == values.shape == (num_rows, 3, max(lengths) + 1, 4)
                assert torch.isfinite(keys).all()
                for row, key, value in zip(rows, keys, values, strict=False):
                    assert torch.equal(key[None, :, : len(row)], column_states(row))
                    assert torch.equal(value[None, :, : len(row)], -column_states(row))


@torch.no_grad()
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_rows_of_different_length_are_continued_together_as_each_alone(
    tiny_llama: Callable, tiny_gpt2: Callable, base: str
) -> None:
    model = tiny_llama() if base == "llama" else tiny_gpt2()
    lengths = torch.tensor([2, 7, 4])
    slots, prefilled = SlotCache(2, num_slots=4, capacity=9), RollbackCache(2, 7)
    model(input_ids=IDS[:, :7].expand(3, -1), past_key_values=prefilled)
    slots.enter(torch.arange(3), prefilled, torch.arange(3))
    slots.append_at(lengths, 7)
    found = model(
        input_ids=IDS[0, lengths].unsqueeze(1),
        attention_mask=(torch.arange(8) <= lengths.unsqueeze(1))[:, None, None],
        position_ids=lengths.unsqueeze(1),
        past_key_values=slots,
    ).logits[:, 0]
    torch.testing.assert_close(found, model(input_ids=IDS).logits[0, lengths], rtol=1e-4, atol=1e-4)


def test_a_training_pass_made_again_finds_and_leaves_the_same() -> None:
    context = PassCache()
    first, again, own = states(5, seed=0), states(5, seed=1), states(3, seed=2)
    for new in (first, again):
        assert all(found is state for found, state in zip(context.update(*new, 0), new, strict=True))
    windows = PassCache(context)
    assert (context.get_seq_length(), windows.get_seq_length()) == (0, 5)
    for _ in range(2):
        for found, before, state in zip(windows.update(*own, 0), first, own, strict=True):
            assert torch.equal(found, torch.cat([before, state], dim=2))
