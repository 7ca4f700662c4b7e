"""`ptp train DIR`: train the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptp.cli.common import note, progress_bar, resumable, run
from ptp.errors import PTPError
from ptp.processes import leave, rank

if TYPE_CHECKING:
    from ptp.experiment import Experiment

HARDLY_ANY = 0.05
"""Drafts right before the first error, below which training has learnt nothing that decoding could use."""


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment directory.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings as section.key=value.")] = None,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Decode held-out prompts at the end, to measure them.")
    ] = True,
) -> None:
    """Train the adapter on the completions; goes on from the last checkpoint. At the end, measure tokens per call."""
    from ptp.cli.training_progress import TrainingProgress
    from ptp.experiment import Experiment
    from ptp.stages.train import train

    experiment = Experiment.load(directory, overrides or [])
    with resumable():
        with progress_bar() as progress:
            result = train(experiment, [TrainingProgress(progress, "training steps")], progress)
        leave()
        if rank() > 0:
            return
        trains_all = experiment.config.model.trains_all
        note(f"trained on {result.num_trained:,} of {result.num_tokens:,} tokens")
        note(
            f"held-out windows: {sum(result.survival):.2f} drafts right before the first error; "
            f"{'model' if trains_all else 'adapter'} of step {result.step} in {experiment.adapter}"
        )
        if sum(result.survival) < HARDLY_ANY:
            note("hardly any draft is right, so it saves no calls: train longer, or anew with another learning rate")
        if trains_all:
            note("tokens per call not measured: nothing decodes with a model whose weights all learnt yet")
            return
        if measured:
            say_measured(experiment)
    note(f"next: ptp verify {directory} --report")


def say_measured(experiment: Experiment) -> None:
    """Decode, and say what came of it; what stops decoding, a lack of memory above all, leaves the training done."""
    from ptp.evaluation.measurement import described, learns_from_itself, measure

    try:
        with progress_bar() as progress:
            found = measure(experiment, experiment.config.train.budget, progress)
    except (PTPError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        note(f"tokens per call not measured, but the adapter is whole: {reason}")
        return
    for line in described(found, learns_from_itself(experiment)):
        note(line)


def main() -> None:
    """Entry point of `ptp_train`."""
    run(lambda: typer.run(command))
