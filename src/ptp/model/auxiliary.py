"""Auxiliary embeddings e(u): a uniform number as a vector that stands in place of a token embedding (METHOD §2).

To add one: subclass `nn.Module`, take (size, hidden_size), map u (...) float32 to (..., hidden_size), and enter it
in `EMBEDDINGS`; the configuration, files and tests pick it up from there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptp.errors import ConfigError


class BinaryEmbedding(nn.Module):
    """The 32 bits of u's float32 form, ±1 each, through one linear layer (the paper's choice). `size` is unused."""

    shifts: Tensor

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(32, hidden_size)
        self.register_buffer("shifts", torch.arange(31, -1, -1), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        bits = u.float().contiguous().view(torch.int32).unsqueeze(-1) >> self.shifts & 1
        return self.linear((2 * bits - 1).to(self.linear.weight.dtype))


class LinearEmbedding(nn.Module):
    """Linear interpolation between `size` learned vectors spread evenly over [0, 1]."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.points = nn.Embedding(size, hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        place = u.float() * (self.points.num_embeddings - 1)
        left = place.floor().clamp(max=self.points.num_embeddings - 2).long()
        share = (place - left).unsqueeze(-1).to(self.points.weight.dtype)
        return torch.lerp(self.points(left), self.points(left + 1), share)


class FourierEmbedding(nn.Module):
    """sin and cos of 2^j·π·u for j < `size`, through one linear layer."""

    frequencies: Tensor

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        _check_octaves(size)
        self.linear = nn.Linear(2 * size, hidden_size)
        # Powers of two stay exact when the module is cast to bfloat16; π would not.
        self.register_buffer("frequencies", 2.0 ** torch.arange(size), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        angles = math.pi * (u.float().unsqueeze(-1) * self.frequencies.float())
        return self.linear(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.linear.weight.dtype))


class SawtoothEmbedding(nn.Module):
    """The fractional part of 2^j·u for j < `size`, scaled to [−1, 1), through one linear layer."""

    frequencies: Tensor

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        _check_octaves(size)
        self.linear = nn.Linear(size, hidden_size)
        self.register_buffer("frequencies", 2.0 ** torch.arange(size), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        teeth = (u.float().unsqueeze(-1) * self.frequencies.float()).frac()
        return self.linear((2 * teeth - 1).to(self.linear.weight.dtype))


class BinsEmbedding(nn.Module):
    """One learned vector for each of `size` equal bins of [0, 1)."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.bins = nn.Embedding(size, hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        size = self.bins.num_embeddings
        return self.bins((u.float() * size).long().clamp(max=size - 1))


class NoEmbedding(nn.Module):
    """One learned vector whatever u is: independent prediction, the ablation that withholds u. `size` is unused."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, u: Tensor) -> Tensor:
        return self.mask.expand(*u.shape, -1)


MAX_OCTAVES = 64
"""u has 24 random bits; frequencies far beyond them say nothing and overflow."""


def _check_octaves(size: int) -> None:
    if size > MAX_OCTAVES:
        raise ConfigError(f"auxiliary_size counts powers of two here and must be at most {MAX_OCTAVES}; got {size}")


EMBEDDINGS: dict[str, type[nn.Module]] = {
    "binary": BinaryEmbedding,
    "linear": LinearEmbedding,
    "fourier": FourierEmbedding,
    "sawtooth": SawtoothEmbedding,
    "bins": BinsEmbedding,
    "none": NoEmbedding,
}


def make_auxiliary_embedding(kind: str, size: int, hidden_size: int, scale: float | Tensor) -> nn.Module:
    """The embedding named `kind`, its output scaled to about `scale`, the token embeddings' root mean square.

    Raises `ConfigError` for an unknown name.
    """
    if kind not in EMBEDDINGS:
        raise ConfigError(f"auxiliary must be one of {', '.join(EMBEDDINGS)}; got '{kind}'")
    module = EMBEDDINGS[kind](size, hidden_size)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        rms = module(torch.linspace(0, 1 - 2**-24, 1024)).square().mean().sqrt()
        for parameter in module.parameters():
            parameter.mul_(scale / rms)
    return module
