"""`ptp pregenerate DIR`: sample the base model's completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ptp.cli.common import note, progress_bar, resumable, run


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment directory.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings as section.key=value.")] = None,
    completions: Annotated[
        Optional[Path],
        typer.Option(help="Take completions from this file instead: rows with the columns prompt and completion."),
    ] = None,
) -> None:
    """Sample the base model's completions of the experiment's prompts; goes on where it was stopped."""
    from ptp.data.preparation import described
    from ptp.experiment import Experiment
    from ptp.stages.pregenerate import import_completions, pregenerate

    experiment = Experiment.load(directory, overrides or [])
    with resumable(), progress_bar() as progress:
        done = (
            import_completions(experiment, completions)
            if completions
            else pregenerate(experiment, progress, announce=note)
        )
    stored = done.store.load()
    num_tokens = int(stored.lengths.sum())
    note(f"{len(stored)} completions in {experiment.completions}: {num_tokens:,} tokens, prompts included")
    if done.left_out and completions:
        note(f"left out: {described(done.left_out)}")
    note(f"next: ptp_train {directory}")


def main() -> None:
    """Entry point of `ptp_pregenerate`."""
    run(lambda: typer.run(command))
