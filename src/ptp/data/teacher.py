"""The teacher: completions sampled from the base model with known u, so that intervals are exact by construction.

    prompts, shortest first ──► prefilled, each once, some ahead ──► slots, one token a call ──► documents

The batch is continuous: every slot holds a completion in the making, each of its own length, and one that ends gives
its slot to the next at once. When none is left to enter, the batch shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptp.attention import layer_masks, open_layers
from ptp.cache import RollbackCache, SlotCache
from ptp.data.documents import Document
from ptp.errors import ConfigError
from ptp.layer_kinds import context_length
from ptp.sampling import NO_PICK, NOT_NUMBERS, SamplingRule, draw, uniform, warp

Result = TypeVar("Result")

AHEAD = 8
"""Rows are prefilled ahead for one slot in this many, so that a row that ends seldom waits for a call of its own."""

PREFILL_TOKENS = 8192
"""Tokens, padding included, that one call prefills at most, unless a single prompt is longer."""

MEMORY_SHARE = 0.5
"""Share of the free memory that caches and logits may take; the rest is for activations and for other processes."""

WARP_COPIES = 12
"""Tensors of the size of the float32 logits that `warp` holds at once, when sorting a whole vocabulary."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and the completions wanted of it.

    ids: (P,) int32, at least one. numbers: sequence numbers of the completions, each of which names its stream of u.
    group: the documents' content group.
    """

    ids: np.ndarray
    numbers: Sequence[int]
    group: int = 0


@torch.inference_mode()
def sample_completions(
    base_model: PreTrainedModel,
    prompts: Sequence[Prompt],
    rule: SamplingRule,
    *,
    seed: int,
    max_length: int,
    max_new_tokens: int | None,
    end_token_ids: Sequence[int],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda num_done, num_tokens: None,
) -> list[Document]:
    """A document for every sequence number, in ascending order; token p is drawn with u = uniform(seed, number, p).

    A completion ends with an end token, after `max_new_tokens`, or where prompt and completion together have
    `max_length` tokens or fill the model's context. Equal calls give equal bits; another `batch_size` only rounds the
    logits differently. `progress` is told after each step how many completions are done and how many tokens it gave.
    """
    longest = min(max_length, context_length(base_model.config) or max_length)

    def end(prompt: Prompt) -> int:
        return min(longest, len(prompt.ids) + (max_new_tokens or longest))

    # Neighbours in length are prefilled together and stand in the batch together: little is padding.
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
    assert all(0 < len(prompt.ids) < end(prompt) for prompt in prompts), "a prompt is empty or leaves no room"
    batch_size = min(batch_size, sum(len(prompt.numbers) for prompt in prompts))
    groups = (_prefill(base_model, group, end, seed) for group in _groups(prompts, math.ceil(batch_size / AHEAD)))
    ready: _Ready | None = None
    batch = _Batch(base_model, batch_size, max(map(end, prompts), default=0))
    documents: list[Document] = []
    free = list(range(batch_size))
    while True:
        while free and (ready := ready or next(groups, None)):
            entering, ready = ready.split(len(free))
            batch.enter(free[: len(entering.rows)], entering)
            free = free[len(entering.rows) :]
        batch.close(free)
        if not batch.num_rows:
            return sorted(documents, key=lambda document: document.number)
        tokens = batch.step(rule)
        finished = np.isin(tokens, end_token_ids)
        free = np.flatnonzero(finished | batch.is_full()).tolist()
        documents += [batch.leave(slot, bool(finished[slot])) for slot in free]
        progress(len(documents), len(tokens))


def _groups(prompts: Sequence[Prompt], num_rows: int) -> Iterator[list[Prompt]]:
    """Prompts, shortest first, in groups that one call prefills: until they have `num_rows` completions together."""
    group: list[Prompt] = []
    rows = 0
    for prompt in prompts:
        if group and (rows >= num_rows or (len(group) + 1) * len(prompt.ids) > PREFILL_TOKENS):
            yield group
            group, rows = [], 0
        group.append(prompt)
        rows += len(prompt.numbers)
    if group:
        yield group


@dataclass(frozen=True)
class _Row:
    """A completion to sample: token p is drawn for P ≤ p < end."""

    prompt: Prompt
    number: int
    end: int


@dataclass(frozen=True)
class _Ready:
    """Rows whose prompts, but for the last token, are in rows `places` of a cache; (n,) int64.

    The last token is left to the row's first step, which thereby is like any other. u: (n, positions from `first` on).
    """

    rows: list[_Row]
    places: Tensor
    u: Tensor
    first: int
    cache: RollbackCache

    def split(self, num_rows: int) -> tuple[_Ready, _Ready | None]:
        """The first rows, at most so many, and the others if there are any."""
        head, tail = (
            _Ready(self.rows[part], self.places[part], self.u[part], self.first, self.cache)
            for part in (slice(num_rows), slice(num_rows, None))
        )
        return head, tail if tail.rows else None


def _prefill(base_model: PreTrainedModel, prompts: Sequence[Prompt], end: Callable[[Prompt], int], seed: int) -> _Ready:
    """Prefill prompts, shortest first, in one call, padded on the right."""
    device, width = base_model.device, len(prompts[-1].ids) - 1
    cache = RollbackCache(base_model.config.get_text_config().num_hidden_layers, width)
    if width:
        inputs = np.zeros((len(prompts), width), np.int64)
        for row, prompt in zip(inputs, prompts, strict=True):
            row[: len(prompt.ids) - 1] = prompt.ids[:-1]
        input_ids = torch.from_numpy(inputs).to(device)
        base_model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = [_Row(prompt, number, end(prompt)) for prompt in prompts for number in prompt.numbers]
    places = [place for place, prompt in enumerate(prompts) for _ in prompt.numbers]
    numbers = torch.tensor([row.number for row in rows], device=device)
    first, last = len(prompts[0].ids), max(row.end for row in rows)
    u = uniform(seed, numbers.unsqueeze(1), torch.arange(first, last, device=device))
    return _Ready(rows, torch.tensor(places, device=device), u, first, cache)


class _Batch:
    """The completions in the making. Row r, in slot r < num_rows, has tokens [0, length_r), all but the last cached.

    What a step computes with lies on the device, what it came to on the host; a step copies one small tensor.
    """

    def __init__(self, base_model: PreTrainedModel, num_slots: int, capacity: int) -> None:
        self.base_model, self.num_rows = base_model, num_slots
        self.layer_kinds = open_layers(base_model)
        device = base_model.device
        self.cache = SlotCache(base_model.config.get_text_config().num_hidden_layers, num_slots, capacity)
        self.columns = torch.arange(capacity, device=device)
        self.newest = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.cached = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.u = torch.zeros(num_slots, capacity, device=device)

        self.rows: dict[int, _Row] = {}
        self.lengths = np.zeros(num_slots, np.int64)
        self.ends = np.zeros(num_slots, np.int64)
        self.ids = np.zeros((num_slots, capacity), np.int32)
        self.edges = np.zeros((num_slots, 2, capacity), np.float32)

    def enter(self, slots: Sequence[int], ready: _Ready) -> None:
        """Begin rows in free slots."""
        for slot, row in zip(slots, ready.rows, strict=True):
            length = len(row.prompt.ids)
            self.rows[slot], self.lengths[slot], self.ends[slot] = row, length, row.end
            self.ids[slot, :length] = row.prompt.ids
        lengths = self.lengths[slots]
        state = torch.from_numpy(np.stack([slots, lengths - 1, self.ids[slots, lengths - 1]])).to(self.newest.device)
        index = state[0]
        self.cached[index], self.newest[index] = state[1], state[2]
        self.u[index, ready.first : ready.first + ready.u.shape[1]] = ready.u
        if ready.cache.layers[0].is_initialized:
            self.cache.enter(index, ready.cache, ready.places)

    def close(self, free: Sequence[int]) -> None:
        """Give up free slots: the last rows move into those that lie before them."""
        for slot in sorted(free, reverse=True):
            last = self.num_rows = self.num_rows - 1
            if slot != last:
                self.cache.move(last, slot, int(self.lengths[last]) - 1)
                self.rows[slot] = self.rows.pop(last)
                for values in (self.newest, self.cached, self.u):
                    values[slot] = values[last]
                for array in (self.lengths, self.ends, self.ids, self.edges):
                    array[slot] = array[last]

    def step(self, rule: SamplingRule) -> np.ndarray:
        """Give every row one more token; returns them, (num_rows,)."""
        cached, newest = self.cached[: self.num_rows], self.newest[: self.num_rows]
        lengths = self.lengths[: self.num_rows]
        longest = int(lengths.max())
        self.cache.append_at(cached, longest - 1)
        positions, columns = cached.unsqueeze(1), self.columns[:longest].unsqueeze(0)
        mask = (columns <= positions)[:, None, None]
        logits = self.base_model(
            input_ids=newest.unsqueeze(1),
            attention_mask=layer_masks(self.base_model, mask, self.layer_kinds, positions, columns),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cached += 1
        u = self.u[: self.num_rows].gather(1, cached.unsqueeze(1)).squeeze(1)
        token, lower, upper = draw(warp(logits, rule), u)
        newest.copy_(token)
        # One copy to the host: float32 holds token ids exactly, up to 2^24.
        drawn = torch.stack([token.to(lower.dtype), lower, upper]).cpu().numpy()
        if (drawn[0] == NO_PICK).any():
            raise ConfigError(f"the base model's logits {NOT_NUMBERS}")
        slots = np.arange(self.num_rows)
        self.ids[slots, lengths] = drawn[0]
        self.edges[slots, :, lengths] = drawn[1:].T
        lengths += 1
        return drawn[0]

    def is_full(self) -> np.ndarray:
        """Which rows have all the tokens they may have, (num_rows,) bool."""
        return self.lengths[: self.num_rows] == self.ends[: self.num_rows]

    def leave(self, slot: int, finished: bool) -> Document:
        """The document of a row that has ended, which frees its slot."""
        row, length = self.rows.pop(slot), int(self.lengths[slot])
        start = len(row.prompt.ids)
        lower, upper = self.edges[slot, :, start:length].copy()
        ids = self.ids[slot, :length].copy()
        return Document(ids, ((start, length),), lower, upper, row.prompt.group, row.number, finished)


@torch.inference_mode()
def find_batch_size(base_model: PreTrainedModel, max_length: int, limit: int) -> int:
    """The largest power of two up to `limit` of rows of `max_length` tokens that fit in `MEMORY_SHARE` of free memory.

    What a token takes in the cache, and a row's logits, are measured by a call of one token.
    """
    device = base_model.device
    cache = RollbackCache(base_model.config.get_text_config().num_hidden_layers, 1)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    logits = base_model(input_ids=token, past_key_values=cache, use_cache=True).logits
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    row_bytes = token_bytes * max_length * (1 + 1 / AHEAD) + logits.numel() * WARP_COPIES * torch.float32.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    fitting = max(1, min(limit, int(MEMORY_SHARE * free / row_bytes)))
    return 1 << fitting.bit_length() - 1


def halving(sample: Callable[[int], Result], batch_size: int) -> tuple[Result, int]:
    """Call `sample(batch_size)`, with half as many rows whenever they do not fit in the GPU's memory.

    Returns the result and the batch size it took. Raises `ConfigError` if a single row does not fit.
    """
    while True:
        try:
            return sample(batch_size), batch_size
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise ConfigError(
                    "a single completion does not fit in the GPU's memory: lower max_length, or load the model in a "
                    "smaller dtype"
                ) from None
        # Outside the handler, which keeps the failed call's tensors alive.
        torch.cuda.empty_cache()
        batch_size //= 2
