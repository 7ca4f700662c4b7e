"""`ptp train DIR`: train the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ptp.cli.common import note, progress_bar, resumable, run


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment directory.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings as section.key=value.")] = None,
    budget: Annotated[int, typer.Option(min=0, help="Budget that the simulated tokens per call are for.")] = 24,
) -> None:
    """Train the adapter on the completions; goes on from the last checkpoint."""
    from ptp.cli.training_progress import TrainingProgress
    from ptp.evaluation.acceptance import simulated_tokens_per_call
    from ptp.experiment import Experiment
    from ptp.stages.train import train

    experiment = Experiment.load(directory, overrides or [])
    with resumable(), progress_bar() as progress:
        result = train(experiment, [TrainingProgress(progress, "training steps")], progress)
    note(f"trained on {result.num_trained:,} of {result.num_tokens:,} tokens")
    if experiment.config.model.trains_all:
        note(f"held-out windows: {sum(result.survival):.2f} drafts right; the model is in {experiment.adapter}")
        return
    simulated = simulated_tokens_per_call(result.survival, budget, experiment.config.model.lead)
    note(
        f"held-out windows: {sum(result.survival):.2f} drafts right before the first error, "
        f"simulated {simulated:.2f} tokens per call at budget {budget}; adapter in {experiment.adapter}"
    )
    note(f"next: ptp verify {directory} --report")


def main() -> None:
    """Entry point of `ptp_train`."""
    run(lambda: typer.run(command))
