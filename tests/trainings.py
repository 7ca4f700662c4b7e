"""What tests of training share: a run of seconds, a way to stop one, and a step by itself."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.config import TrainConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.training.objective import Objective, make_stream, measured_pass

RULE = SamplingRule(temperature=0.7, top_k=20)
CONFIG = TrainConfig(
    max_steps=6,
    batch_size=4,
    sequence_length=64,
    windows_per_sequence=16,
    # Muon computes in bfloat16, in which what is the same up to rounding is no longer.
    optimizer="adamw",
    learning_rate=1e-2,
    warmup_steps=2,
    dtype="float32",
    save_every=2,
)


class Kill(TrainerCallback):
    """Interrupts training after a step, before it can be saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def random_batch(
    lengths: tuple[int, ...] = (50, 20, 7), sequence_length: int = 60, num_windows: int = 9, window: int = 4
) -> dict[str, Tensor]:
    """Texts of random tokens below 40 with random intervals, packed, with padding behind."""
    rng = np.random.default_rng(0)
    documents = []
    for number, length in enumerate(lengths):
        lower, upper = np.sort(rng.random((2, length - 1), np.float32), axis=0)
        ids = rng.integers(40, size=length).astype(np.int32)
        documents.append(Document(ids, ((1, length),), lower, upper, number=number))
    config = CONFIG.model_copy(update={"sequence_length": sequence_length, "windows_per_sequence": num_windows})
    stream = make_stream(Documents.of(documents), config, window)
    return collate([stream[i] for i in range(len(stream))])


def step_loss(
    model: PTPModel,
    batch: dict[str, Tensor],
    rule: SamplingRule = RULE,
    weights: Tensor | None = None,
    distillation: float = 0.0,
    inverse: bool = False,
) -> Tensor:
    """The loss of a step by itself, a mean over its targets."""
    weights = torch.ones(model.ptp_config.window) if weights is None else weights
    objective = Objective(rule, weights, distillation, inverse)
    return measured_pass(model, batch, objective)[0] / objective.num_items(batch, model)


def loss_and_gradients(model: PTPModel, batch: dict[str, Tensor], distillation: float = 0.0) -> dict[str, Tensor]:
    """The loss of a step, under the name "loss", and the gradient of everything that learns."""
    model.zero_grad()
    loss = step_loss(model, batch, distillation=distillation)
    loss.backward()
    learns = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in learns.values())
    return {"loss": loss.detach(), **{name: gradient.clone() for name, gradient in learns.items()}}
