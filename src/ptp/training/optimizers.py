"""Optimisers by name: AdamW, and Muon for matrices with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn

from ptp.errors import ConfigError

ADAMW_SHARE = 0.2
"""AdamW's learning rate for vectors and embeddings as a share of Muon's for matrices."""


class Chain(torch.optim.Optimizer):
    """Several optimisers stepped as one; learning rate schedules and checkpoints see their groups and states."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def make_optimizer(
    name: str, parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float
) -> torch.optim.Optimizer:
    """An optimiser over named parameters that require gradients.

    "adamw" for all of them; "muon" orthogonalises the updates of matrices (Jordan et al. 2024, in torch.optim), and
    leaves vectors and token embeddings to AdamW.
    """
    trainable = [(key, p) for key, p in parameters if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW([p for _, p in trainable], lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    if name != "muon":
        raise ConfigError(f"optimizer must be 'adamw' or 'muon'; got '{name}'")
    matrices = [p for key, p in trainable if p.ndim == 2 and "embed" not in key]
    others = [p for key, p in trainable if not (p.ndim == 2 and "embed" not in key)]
    chained: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ]
    if others:
        chained.append(torch.optim.AdamW(others, lr=ADAMW_SHARE * learning_rate, betas=(0.9, 0.98), weight_decay=0.0))
    return Chain(chained)
