"""A key-value cache whose rollback is an integer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


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

    def select_rows(self, keep: Tensor) -> None:
        """Keep the rows of a boolean mask (B,)."""
        self.keys, self.values = self.keys[keep], self.values[keep]

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

    def select_rows(self, keep: Tensor) -> None:
        """Keep the rows of a boolean mask (B,); the others have ended."""
        for layer in self.layers:
            layer.select_rows(keep)
