"""What tests of training share: a run of seconds, and a way to stop one."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.config import TrainConfig
from ptp.sampling import SamplingRule

RULE = SamplingRule(temperature=0.7, top_k=20)
CONFIG = TrainConfig(
    max_steps=6,
    batch_size=4,
    sequence_length=64,
    windows_per_sequence=16,
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
