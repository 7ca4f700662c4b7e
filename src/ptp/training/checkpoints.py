"""The directory of a training's checkpoints: which of them is to go on from, which are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def last_complete_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint whose writing was not cut short; its trainer_state.json is written last."""
    complete = [path for path in directory.glob("checkpoint-*") if _is_json(path / TRAINER_STATE_NAME)]
    return str(max(complete, key=step_of)) if complete else None


def step_of(checkpoint: str | Path) -> int:
    """The optimiser step a checkpoint was written at."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def remove_incomplete_checkpoints(directory: Path) -> None:
    """Remove what a kill left half written or half removed, which would count as a checkpoint when old ones are."""
    for path in directory.glob("checkpoint-*"):
        if not _is_json(path / TRAINER_STATE_NAME):
            shutil.rmtree(path, ignore_errors=True)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
