"""What stops a training, in one line each: what happened, what is kept, what to do."""

from __future__ import annotations

from pathlib import Path

import torch

from ptp.config import TrainConfig
from ptp.training.checkpoints import last_complete_checkpoint


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever device, says that memory does not suffice."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in str(error) for part in words)


def out_of_memory(config: TrainConfig, checkpoints: Path) -> str:
    """Says which setting to halve, so that training goes on where it can."""
    step = f"{config.batch_size} sequences of {config.sequence_length} tokens at a time"
    if config.batch_size > 1:
        # Half of it, where that is a whole number of sequences: a step must stay one of as many.
        parts = next(number for number in range(2, config.batch_size + 1) if config.batch_size % number == 0)
        accumulated = parts * config.gradient_accumulation_steps
        advice = f"train.batch_size={config.batch_size // parts} train.gradient_accumulation_steps={accumulated}"
        advice = f"go on with {advice}, which trains the same"
    elif not config.gradient_checkpointing:
        advice = "go on with train.gradient_checkpointing=true, which trains the same in more time"
    elif config.windows_per_sequence > 1:
        advice = f"{_anew(checkpoints)} set train.windows_per_sequence to {config.windows_per_sequence // 2}"
    else:
        advice = f"{_anew(checkpoints)} lower train.sequence_length"
    return f"out of memory with {step}: {kept(checkpoints)}; {advice}"


def not_finite(what: str, step: int, config: TrainConfig, checkpoints: Path) -> str:
    """Names the step whose loss, gradient or validation loss is no number."""
    advice = f"lower train.learning_rate ({config.learning_rate:g})"
    if config.dtype != "float32":
        advice += " or set train.dtype to float32"
    return (
        f"the {what} is not finite at step {step}: training stopped, {kept(checkpoints)}; {_anew(checkpoints)} {advice}"
    )


def not_written(directory: Path, error: Exception, checkpoints: Path) -> str:
    """Says what the disk refused."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{directory} could not be written ({reason}); make room and run the same command again: {kept(checkpoints)}"


def kept(checkpoints: Path) -> str:
    """What there is to go on from."""
    last = last_complete_checkpoint(checkpoints)
    return f"{last} is kept" if last else "there is no checkpoint yet"


def _anew(checkpoints: Path) -> str:
    """How to begin with settings that training does not go on with."""
    return f"remove {checkpoints} and" if last_complete_checkpoint(checkpoints) else "run it again and"
