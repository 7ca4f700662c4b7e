"""When training saves besides every so many steps: after so many minutes, and when it is told to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.errors import Terminated


def summed(values: Tensor) -> Tensor:
    """The sum over processes; the values are on the device that training is on."""
    return cast(Tensor, reduce(values, reduction="sum")) if PartialState().num_processes > 1 else values


class SaveWhenAsked(TrainerCallback):
    """Saves after a step when `minutes` have passed since the last checkpoint, or when told to end, and then ends.

    SIGTERM and Ctrl-C tell it; a second Ctrl-C does not wait. What one of several processes has noticed, all heed at
    the same step.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.told_by: int | None = None
        self.ends = False
        self.saved_at = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted inside this block, in the main thread; they end the process outside."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if number == self.told_by == signal.SIGINT:
            raise KeyboardInterrupt
        self.told_by = number

    def on_train_begin(self, *_: object, **__: Any) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        due = self.minutes is not None and time.monotonic() - self.saved_at > 60 * self.minutes
        self.ends, due = _of_any(args.device, self.told_by is not None, due)
        control.should_save |= self.ends or due
        return control

    def on_save(self, *_: object, **__: Any) -> None:
        self.saved_at = time.monotonic()
        if self.ends:
            self._end()

    def on_train_end(self, args: TrainingArguments, *_: object, **__: Any) -> None:
        # Told after the last step, when all is saved that there is to save.
        if any(_of_any(args.device, self.told_by is not None)):
            self._end()

    def _end(self) -> NoReturn:
        if self.told_by == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(128 + signal.SIGTERM)


def _of_any(device: torch.device, *flags: bool) -> list[bool]:
    """Which of the flags are set in any process; a single one does not wait for its device to say so."""
    if PartialState().num_processes == 1:
        return list(flags)
    return (summed(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()
