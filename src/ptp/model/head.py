"""The output head by itself: hidden states of a causal language model → logits, a part at a time.

A head of 150,000 tokens makes far more numbers of a position than the layers below it hold. Whoever needs only some
rows of logits, or each row only for a moment, asks for them here, and the whole is never in memory.
"""

from __future__ import annotations

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
"""Rows of logits in memory at a time."""

RowLoss = Callable[[Tensor, slice], Tensor]
"""Loss, a sum, of some rows: their logits (R, V), and which they are."""


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


def project(base_model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., H), as the model's own forward makes them of what its layers give.

    The model is run without its layers: caps and scales of logits differ from model to model, and are its own.
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


def summed_loss(base_model: PreTrainedModel, hidden: Tensor, row_loss: RowLoss) -> Tensor:
    """The sum of a loss over rows of hidden states (R, H), whose logits are made and forgotten `ROWS` at a time.

    With a frozen head, gradients of the hidden states are computed on the way, so that no logits are made twice; with
    one that learns, they are made again in the backward pass.
    """
    parts = [slice(begin, begin + ROWS) for begin in range(0, len(hidden), ROWS)]

    def loss_of(rows: Tensor, part: slice) -> Tensor:
        return row_loss(project(base_model, rows), part)

    if not torch.is_grad_enabled() or not hidden.requires_grad:
        return sum((loss_of(hidden[part], part) for part in parts), hidden.new_zeros((), dtype=torch.float32))
    if any(parameter.requires_grad for parameter in base_model.get_output_embeddings().parameters()):
        losses = [checkpoint(loss_of, hidden[part], part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() if losses else hidden.sum() * 0
    return _EagerGradient.apply(hidden, loss_of, parts)


class _EagerGradient(torch.autograd.Function):
    """A sum of losses of parts, each differentiated while its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss_of: RowLoss, parts: list[slice]) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.zeros_like(hidden)
        for part in parts:
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                loss = loss_of(rows, part)
                (gradient[part],) = torch.autograd.grad(loss, rows)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None
