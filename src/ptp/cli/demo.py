"""`ptp demo`: the main job end to end on a model trained on the spot."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptp.cli.common import console, note, progress_bar

if TYPE_CHECKING:
    from ptp.demo import DemoSize
    from ptp.evaluation.verify import Verification


def command(
    directory: Annotated[
        Optional[Path], typer.Option(help="Experiment directory (default: experiments/demo, or demo-tiny).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the directory and start over.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A minute's run that shows the way, not the figures.")] = False,
) -> None:
    """Train a small Llama on Python code, make it parallel, and measure it on held-out function headers.

    Needs no network. Stopped and started again it goes on; a finished demo goes straight to decoding.
    """
    with console.status("starting"):
        from ptp.demo import DEMO, TINY

    started = time.monotonic()
    size = TINY if tiny else DEMO
    directory = directory or Path("experiments") / ("demo-tiny" if tiny else "demo")
    if fresh and directory.exists():
        shutil.rmtree(directory)
    make_base_model(directory, size)
    verification = make_parallel(directory, size)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes", style="dim")
    if verification.count("mismatch"):
        raise typer.Exit(1)
    note(f"next: ptp_generate {directory}")


def make_base_model(directory: Path, size: DemoSize) -> None:
    """Stage 1: a small Llama learns Python."""
    with console.status("starting"):
        from ptp.cli.training_progress import TrainingProgress
        from ptp.demo import make_teacher

    with progress_bar("1/5 ") as progress:
        what = "a small Llama learns Python"
        make_teacher(directory, size, [TrainingProgress(progress, what)])
        progress(what, size.teacher_steps, size.teacher_steps)


def make_parallel(directory: Path, size: DemoSize) -> Verification:
    """Stages 2 to 5: an experiment on that model, its completions, its adapter, and what decoding reaches with it."""
    with console.status("starting"):
        from ptp.cli.training_progress import TrainingProgress
        from ptp.cli.verify import summary
        from ptp.demo import make_experiment
        from ptp.evaluation.experiment_report import make_report, verify_experiment
        from ptp.evaluation.measurement import described, keep, learns_from_itself
        from ptp.evaluation.report import write_report
        from ptp.stages.pregenerate import pregenerate
        from ptp.stages.train import has_adapter, train

    experiment = make_experiment(directory, size)
    note(f"2/5 experiment set up in {directory}")
    if not has_adapter(experiment):
        with progress_bar("3/5 ") as progress:
            pregenerate(experiment, progress)
        with progress_bar("4/5 ") as progress:
            train(experiment, [TrainingProgress(progress, "the PTP adapter learns from them")], progress)
    with progress_bar("5/5 ") as progress:
        verification = verify_experiment(
            experiment,
            num_prompts=size.num_verified,
            max_new_tokens=size.max_new_tokens,
            budget=size.budget,
            progress=progress,
        )
    path = directory / "report.html"
    write_report(make_report(experiment, verification, size.budget), path)
    print(summary(verification))
    print(f"report            {path}")
    decoded = [comparison.generation for comparison in verification.comparisons]
    for line in described(keep(experiment, decoded, size.budget), learns_from_itself(experiment)):
        note(line)
    return verification
