"""The output head by itself: hidden states of a causal language model → logits, a part at a time.

A head of 150,000 tokens makes far more numbers of a position than the layers below it hold. Whoever needs only some
rows of logits, or each row only for a moment, asks for them here, and the whole is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ptp.sampling import LogitsOf

ROWS = 512
"""Logits of so many states are in memory at a time."""

RowLoss = Callable[..., Tensor]
"""Loss, a sum, of some rows: their logits (R, ..., V), further numbers (R, ...), and which they are, a slice."""


@dataclass
class _LayersOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What a model's head may look for in what its layers give; models with experts pass their routing on."""

    router_logits: tuple[Tensor, ...] | None = None


def layers_of(base_model: PreTrainedModel) -> nn.Module:
    """The model below the output head."""
    found = base_model.get_decoder()
    # transformers finds the model itself where a checkpoint's prefix is not the module's name (Llama 4), and the
    # output head where that is called decoder (ModernBERT).
    misses = found is base_model or found is base_model.get_output_embeddings()
    return base_model.get_submodule("model") if misses else found


@torch.compiler.disable
def project(base_model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., H), as the model's own forward makes them of what its layers give.

    The model is run without its layers: caps and scales of logits differ from model to model, and are its own. Nothing
    for a compiler, for a module is changed on the way.
    """

    def layers(*args: Any, **kwargs: Any) -> _LayersOutput:
        return _LayersOutput(last_hidden_state=rows)

    rows, decoder = hidden.reshape(1, -1, hidden.shape[-1]), layers_of(base_model)
    decoder.forward = layers  # on the object, in front of the class's own
    try:
        return base_model(inputs_embeds=rows, use_cache=False).logits.view(*hidden.shape[:-1], -1)
    finally:
        del decoder.forward


def output_head(base_model: PreTrainedModel) -> LogitsOf:
    """`project` for one model, by its output embeddings alone where nothing follows them: a call costs far less."""
    embeddings = base_model.get_output_embeddings()
    weight = cast(nn.Embedding, base_model.get_input_embeddings()).weight
    with torch.no_grad():
        probe = torch.randn(2, weight.shape[1], device=weight.device).to(weight.dtype)
        if torch.equal(embeddings(probe), project(base_model, probe)):
            return embeddings
    return partial(project, base_model)


def summed_loss(base_model: PreTrainedModel, row_loss: RowLoss, hidden: Tensor, *numbers: Tensor) -> Tensor:
    """The sum of a loss over rows of hidden states (R, ..., H), whose logits are made and forgotten part by part.

    numbers: (R, ...), what else of a row the loss has a gradient in. With a frozen head, gradients are computed on the
    way, so that no logits are made twice; with one that learns, they are made again in the backward pass.
    """
    size = max(1, ROWS // math.prod(hidden.shape[1:-1]))
    parts = [slice(begin, begin + size) for begin in range(0, len(hidden), size)]

    def loss_of(part: slice, states: Tensor, *own: Tensor) -> Tensor:
        return row_loss(project(base_model, states), *own, part)

    rows = (hidden, *numbers)
    if not torch.is_grad_enabled() or not hidden.requires_grad:
        losses = (loss_of(part, *(values[part] for values in rows)) for part in parts)
        return sum(losses, hidden.new_zeros((), dtype=torch.float32))
    if any(parameter.requires_grad for parameter in base_model.get_output_embeddings().parameters()):
        sums = [checkpoint(loss_of, part, *(values[part] for values in rows), use_reentrant=False) for part in parts]
        return torch.stack(sums).sum() if sums else hidden.sum() * 0
    return _EagerGradient.apply(loss_of, parts, *rows)


class _EagerGradient(torch.autograd.Function):
    """A sum of losses of parts, each differentiated while its logits are there."""

    @staticmethod
    def forward(ctx: Any, loss_of: Callable[..., Tensor], parts: list[slice], *rows: Tensor) -> Tensor:
        total = rows[0].new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(values) for values in rows]
        for part in parts:
            with torch.enable_grad():
                own = [values[part].detach().requires_grad_() for values in rows]
                loss = loss_of(part, *own)
                for gradient, found in zip(gradients, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
                    if found is not None:
                        gradient[part] = found
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        return (None, None, *(gradient * grad_outputs[0].to(gradient.dtype) for gradient in gradients))
