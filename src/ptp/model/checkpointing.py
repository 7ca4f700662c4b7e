"""Gradient checkpointing: memory for time. A layer's inner values are forgotten, and computed again when needed.

transformers' own leaves the cache out, without which windows do not see their context; and it would compute again in
the backward pass, when the gate is shut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ptp.errors import ConfigError
from ptp.model.gated_lora import Gate
from ptp.model.head import layers_of


@contextmanager
def checkpointed(base_model: PreTrainedModel, gate: Gate) -> Iterator[None]:
    """Calls made inside the block keep what enters each decoder layer only.

    The cache must bear a call made again (`ptp.cache.PassCache`). Raises `ConfigError` if transformers does not know
    the model's layers.
    """
    layers = [layer for layer in layers_of(base_model).modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"transformers has no gradient checkpointing for {type(base_model).__name__}; set "
            "train.gradient_checkpointing to false"
        )
    for layer in layers:
        # On the object, in front of the class's own; hooks, FSDP's among them, stay around it.
        layer.forward = _forgetting(layer.forward, gate)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forgetting(forward: Callable[..., Any], gate: Gate) -> Callable[..., Any]:
    @wraps(forward)
    def forward_and_forget(*args: Any, **kwargs: Any) -> Any:
        start = gate.start
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), gate.opened(start)),
            **kwargs,
        )

    return forward_and_forget
