"""When training saves besides every so many steps: after so many minutes, and when it is told to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.errors import Terminated


class SaveWhenAsked(TrainerCallback):
    """Saves after a step when `minutes` have passed since the last checkpoint, or SIGTERM has come, which then ends it.

    any_process: whether a flag is up in any of several processes, which must all save at the same step.
    """

    def __init__(self, minutes: float | None, any_process: Callable[[bool], bool]) -> None:
        self.minutes, self.any_process = minutes, any_process
        self.told_to_end = self.ends = False
        self.saved_at = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted inside this block, in the main thread; it ends the process outside."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, *_: object) -> None:
        self.told_to_end = True

    def on_train_begin(self, *_: object, **__: Any) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.ends = self.any_process(self.told_to_end)
        due = self.minutes is not None and time.monotonic() - self.saved_at > 60 * self.minutes
        if self.ends or (self.minutes is not None and self.any_process(due)):
            control.should_save = True
        return control

    def on_save(self, *_: object, **__: Any) -> None:
        self.saved_at = time.monotonic()
        if self.ends:
            raise Terminated(128 + signal.SIGTERM)
