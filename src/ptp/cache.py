"""Key-value caches: one whose rollback is an integer, one whose rows come and go, and one of a training pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin


def keep_place(*tensors: Tensor) -> None:
    """Tell the compiler that tensors stay where they are.

    A CUDA graph writes only to what it knows to stay, and copies all else that it reads before each call.
    """
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)


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


@dataclass(frozen=True)
class Appending:
    """Where the positions of a call go.

    slots: of its rows. longest: the largest length of a row. width: keys that the call is given of each row. index:
    (B, T) int64, where each position goes; None if all rows have the same length. rows: (B, 1), 0 … B − 1.
    """

    slots: slice
    longest: int
    width: int
    rows: Tensor | None = None
    index: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers (slots, heads, capacity, head_dim); a slot is valid as far as its row.

    A call of B rows of T positions appends to B neighbouring slots, at each slot's own length (see `SlotCache`).
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    place: Appending

    def __init__(self, num_slots: int, capacity: int) -> None:
        super().__init__()
        self.num_slots, self.capacity = num_slots, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, because a masked position still counts if it holds NaN: 0 · NaN.
        self.keys, self.values = (
            states.new_zeros((self.num_slots, states.shape[1], self.capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        keep_place(self.keys, self.values)
        self.is_initialized = True

    def reserve(self, capacity: int) -> None:
        """See `SlotCache.reserve`."""
        extra = capacity - self.capacity
        self.capacity = max(capacity, self.capacity)
        if self.is_initialized and extra > 0:
            self.keys, self.values = (nn.functional.pad(t, (0, 0, 0, extra)) for t in (self.keys, self.values))
            keep_place(self.keys, self.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.place
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if place.index is None:
                end = place.longest + states.shape[2]
                buffer[place.slots, :, place.longest : end] = states
            else:
                buffer[place.slots][place.rows, :, place.index] = states.transpose(1, 2)
        return self.keys[place.slots, :, : place.width], self.values[place.slots, :, : place.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.width, 0

    def get_seq_length(self) -> int:
        return self.place.longest

    def get_max_length(self) -> int:
        return self.capacity


class SlotCache(Cache):
    """One `SlotLayer` for each decoder layer; rows enter and move at any time, and the caller knows their lengths.

    What was appended counts only if the caller says so with the next call's lengths: that is how drafts are forgotten.
    """

    layers: list[Any]  # SlotLayer each

    def __init__(self, num_layers: int, num_slots: int, capacity: int) -> None:
        super().__init__(layers=[SlotLayer(num_slots, capacity) for _ in range(num_layers)])

    @property
    def num_slots(self) -> int:
        return self.layers[0].num_slots

    @property
    def capacity(self) -> int:
        """Positions that a slot has room for."""
        return self.layers[0].capacity

    @property
    def is_allocated(self) -> bool:
        """Whether there are buffers: they are made of the first keys that come."""
        return self.layers[0].is_initialized

    def append_at(
        self, lengths: Tensor | None, longest: int, num_positions: int = 1, slot: int = 0, width: int | None = None
    ) -> None:
        """Say before a call of B rows, in slots from `slot` on, of T = num_positions each, how long the rows are.

        lengths: (B,) int64, and the largest of them; or None for a single row, of the length `longest`. width: keys
        that the call is given of each row; default as few as there are.
        """
        if width is None:
            width = longest + num_positions
        if lengths is None:
            place = Appending(slice(slot, slot + 1), longest, width)
        else:
            rows = torch.arange(len(lengths), device=lengths.device).unsqueeze(1)
            index = lengths.unsqueeze(1) + torch.arange(num_positions, device=lengths.device)
            place = Appending(slice(slot, slot + len(lengths)), longest, width, rows, index)
        for layer in self.layers:
            layer.place = place

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

    def reserve(self, capacity: int) -> None:
        """Room for rows of so many positions; what is there stays."""
        for layer in self.layers:
            layer.reserve(capacity)


class PassCache(Cache):
    """Keys and values of a training pass, which it sees behind those of the pass before it.

    parts: rows of this pass for each row of the one before. A pass may be made again, in whole or in part, and finds
    what it found: a `DynamicCache` would append to what the first one left. Nothing is kept a second time, so that
    gradient checkpointing frees what it computes again.
    """

    def __init__(self, context: PassCache | None = None, parts: int = 1) -> None:
        super().__init__(layers=[])
        self.context, self.parts = context, parts
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.context is None:
            self.states.setdefault(layer_idx, (key_states, value_states))
            return key_states, value_states
        keys, values = self.context.states[layer_idx]
        if self.parts > 1:
            keys, values = keys.repeat_interleave(self.parts, dim=0), values.repeat_interleave(self.parts, dim=0)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def growing(self) -> DynamicCache:
        """A cache that begins with the keys and values of this pass, and to which calls append."""
        cache = DynamicCache()
        for layer, (keys, values) in sorted(self.states.items()):
            cache.update(keys, values, layer)
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.context.states[layer_idx][0].shape[2] if self.context is not None else 0
