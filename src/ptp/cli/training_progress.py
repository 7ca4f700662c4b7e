"""A Trainer callback that moves a progress bar."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.stages import Progress


class TrainingProgress(TrainerCallback):
    """Reports (steps done, steps in all) after every optimiser step."""

    def __init__(self, report: Progress, what: str) -> None:
        self.report, self.what = report, what

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.report(self.what, state.global_step, state.max_steps)
