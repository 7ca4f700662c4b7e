"""Key-value caches: one whose rollback is an integer, one whose rows come and go, and one that goes two ways."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache of the same keys and values that grows by itself: appending to a `DynamicCache` makes new tensors."""
    forked = copy(cache)
    forked.layers = [copy(layer) for layer in cache.layers]
    return forked


class RollbackLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers (B, heads, capacity, head_dim); positions [0, length) are valid.

    Appending writes in place, where a `DynamicCache` copies the whole cache at every call. `capacity` is grown by
    doubling if a caller asked for too little.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], self.capacity, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], self.capacity, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.capacity:
            self._grow(max(end, 2 * self.capacity))
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _grow(self, capacity: int) -> None:
        extra = capacity - self.capacity
        self.keys = torch.cat([self.keys, self.keys[:, :, :1].repeat(1, 1, extra, 1)], dim=2)
        self.values = torch.cat([self.values, self.values[:, :, :1].repeat(1, 1, extra, 1)], dim=2)
        self.capacity = capacity


class RollbackCache(Cache):
    """One `RollbackLayer` for each decoder layer."""

    layers: list[Any]  # RollbackLayer each; a list is invariant, so the base class forbids saying so

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[RollbackLayer(capacity) for _ in range(num_layers)])

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on."""
        for layer in self.layers:
            assert length <= layer.length, f"cannot roll back to {length} from {layer.length}"
            layer.length = length


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers (slots, heads, capacity, head_dim); row r is valid in [0, length_r).

    A call of B rows appends one position to each of the first B slots, at that slot's own length.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    rows: Tensor
    lengths: Tensor

    def __init__(self, num_slots: int, capacity: int) -> None:
        super().__init__()
        self.num_slots, self.capacity = num_slots, capacity
        self.width = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, because a masked position still counts if it holds NaN: 0 · NaN.
        self.keys, self.values = (
            states.new_zeros((self.num_slots, states.shape[1], self.capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.rows, :, self.lengths] = key_states.squeeze(2)
        self.values[self.rows, :, self.lengths] = value_states.squeeze(2)
        num_rows = len(self.rows)
        return self.keys[:num_rows, :, : self.width], self.values[:num_rows, :, : self.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_seq_length(self) -> int:
        return self.width - 1

    def get_max_length(self) -> int:
        return self.capacity


class SlotCache(Cache):
    """One `SlotLayer` for each decoder layer; rows enter and move at any time."""

    layers: list[Any]  # SlotLayer each

    def __init__(self, num_layers: int, num_slots: int, capacity: int) -> None:
        super().__init__(layers=[SlotLayer(num_slots, capacity) for _ in range(num_layers)])

    def append_at(self, lengths: Tensor, longest: int) -> None:
        """Say before a call of B rows how many positions each has, (B,) int64, and the largest of these numbers."""
        rows = torch.arange(len(lengths), device=lengths.device)
        for layer in self.layers:
            layer.rows, layer.lengths, layer.width = rows, lengths, longest + 1

    def enter(self, slots: Tensor, prefilled: RollbackCache, rows: Tensor) -> None:
        """Copy rows of a prefilled cache to slots; what lies past a prompt's end is overwritten or masked."""
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[slots, :, : source.length] = source.keys[rows, :, : source.length]
            layer.values[slots, :, : source.length] = source.values[rows, :, : source.length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the row in one slot, of this length, to another."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
