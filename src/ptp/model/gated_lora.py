"""Gated LoRA: low-rank updates that act on window positions only (METHOD §2).

Every call of the model lays its positions out so that the gated ones stand last. One integer, `Gate.start`, then
says everything: positions [start, end) of the sequence are gated, the others pass through unchanged base weights,
and with the gate shut (`start is None`) a layer is exactly its base layer, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptp.errors import ConfigError

LATENT_EXPANSION = "kv_b_proj"
"""What transformers calls the layer that makes keys and values of the latent ones in the cache."""


class Gate:
    """Which positions of the current call are gated; shared by all layers of a model."""

    def __init__(self) -> None:
        self.start: int | None = None
        self.length: int | None = None

    @contextmanager
    def opened(self, start: int | None, length: int | None = None) -> Iterator[None]:
        """Gate positions [start, end) of every call made inside the block; None for none.

        length: positions of the call, for models that lay all texts of a batch in one row; not needed from 0 on.
        """
        before = self.start, self.length
        self.start, self.length = start, length
        try:
            yield
        finally:
            self.start, self.length = before


@dataclass(frozen=True)
class Joined:
    """A gated layer laid out for decoding, in the dtype of the base weight.

    weight: (out + rank, in), the base's above lora_A. bias: (out + rank,), zero for lora_A. up: (rank, out), lora_B
    transposed and scaled. base: (out, in), base_bias: (out,), the base's alone.
    """

    weight: Tensor
    bias: Tensor | None
    up: Tensor
    base: Tensor
    base_bias: Tensor | None


class GatedLoRA(nn.Module):
    """A frozen linear layer plus scale · B·A on gated positions. Input (..., T, in), output (..., T, out)."""

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float, gate: Gate) -> None:
        super().__init__()
        in_features, out_features = linear_shape(base)
        self.base = base
        self.gate = gate
        self.scale = alpha / rank
        self.joined: Joined | None = None
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @torch.no_grad()
    def join(self) -> None:
        """Lay lora_A below the base weight, so that a decoding call computes both in one product of all positions.

        The base weight itself moves into the joined matrix: no memory is taken but lora_A's. Weights that change
        afterwards do not count until it is joined anew. A base that is no plain `nn.Linear` (transposed, quantised)
        stays as it is, and its update is computed beside it.
        """
        if type(self.base) is not nn.Linear:
            return
        base, dtype = self.base, self.base.weight.dtype
        weight = torch.cat([base.weight, self.lora_A.to(dtype)])
        base.weight.data = weight[: base.out_features]
        bias = None
        if base.bias is not None:
            bias = torch.cat([base.bias, base.bias.new_zeros(len(self.lora_A))])
            base.bias.data = bias[: base.out_features]
        up = (self.scale * self.lora_B).to(dtype).t().contiguous()
        self.joined = Joined(weight, bias, up, base.weight.data, None if base.bias is None else base.bias.data)

    @property
    def is_outdated(self) -> bool:
        """Whether the base's weights no longer lie where they were joined: moved, or joined by another adapter."""
        joined, base = self.joined, self.base
        if joined is None:
            return False
        moved = joined.base.data_ptr() != base.weight.data_ptr()
        return moved or (joined.base_bias is not None and joined.base_bias.data_ptr() != base.bias.data_ptr())

    def forward(self, x: Tensor) -> Tensor:
        start, joined = self.gate.start, self.joined
        if start is None:
            # Without the detour over a module: a small model of many layers spends its time between operations.
            return self.base(x) if joined is None else nn.functional.linear(x, joined.base, joined.base_bias)
        if start > 0 and x.dim() == 2:
            assert self.gate.length is not None, "the length of the call is not known"
            return self(x.unflatten(0, (-1, self.gate.length))).flatten(0, 1)
        if start > 0 and joined is not None:
            both = nn.functional.linear(x, joined.weight, joined.bias)
            size = joined.up.shape[1]
            _add_update(both[:, start:, :size], both[:, start:, size:], joined.up)
            return both[..., :size]
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if lora_A.dtype != x.dtype:
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        down = self.scale * nn.functional.linear(x[:, start:], lora_A)
        if start == 0:
            return self.base(x) + nn.functional.linear(down, lora_B)
        y = self.base(x)
        _add_update(y[:, start:], down, lora_B.t())
        return y


def _add_update(y: Tensor, down: Tensor, up: Tensor) -> None:
    """Add down (B, T, rank) @ up (rank, out) to y (B, T, out), in place."""
    if len(y) == 1:
        # One operation: small models spend their time between them.
        y[0].addmm_(down[0], up)
    else:
        y += down @ up


def linear_shape(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; transformers' Conv1D (GPT-2) keeps its weight transposed."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def add_gated_lora(
    base_model: PreTrainedModel, targets: str | tuple[str, ...], rank: int, alpha: float, gate: Gate
) -> None:
    """Replace linear layers of `base_model` by gated ones, in place.

    targets: "all-linear" for every linear layer but the output head, as PEFT means it, or the last parts of module
    names ("q_proj", "v_proj"). A block of experts keeps its own weights, router included: it takes its positions in
    another order, where no gate can tell them. So does what expands latent keys and values (DeepSeek's), for it reads
    the whole cache. Raises `ConfigError` when nothing matches.
    """
    head = base_model.get_output_embeddings()
    mixtures = tuple(
        f"{name}."
        for name, module in base_model.named_modules()
        if hasattr(module, "experts") or hasattr(module, "router")
    )
    layers = {
        name: module
        for name, module in base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not name.startswith(mixtures)
        and not name.endswith(LATENT_EXPANSION)
    }
    if targets != "all-linear":
        layers = {name: module for name, module in layers.items() if name.rsplit(".", 1)[-1] in targets}
    if not layers:
        raise ConfigError(f"lora_targets matches no linear layer of {type(base_model).__name__}; got {targets!r}")
    for name, module in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(base_model.get_submodule(parent), child, GatedLoRA(module, rank, alpha, gate))


def lora_layers(model: nn.Module) -> dict[str, GatedLoRA]:
    """All gated layers by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedLoRA)}


@contextmanager
def installed(model: nn.Module, layers: Mapping[str, GatedLoRA]) -> Iterator[None]:
    """A model with gated layers in their places, by name, inside the block; outside it has its own again."""
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer.base)
