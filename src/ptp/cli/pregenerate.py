"""`ptp pregenerate DIR`: sample the base model's completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ptp.cli.common import progress_bar, run


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment directory.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings as section.key=value.")] = None,
) -> None:
    """Sample the base model's completions of the experiment's prompts; goes on where it was stopped."""
    from ptp.experiment import Experiment
    from ptp.stages import pregenerate

    experiment = Experiment.load(directory, overrides or [])
    with progress_bar("prompts completed") as progress:
        pregenerate(experiment, progress)


def main() -> None:
    """Entry point of `ptp_pregenerate`."""
    run(lambda: typer.run(command))
