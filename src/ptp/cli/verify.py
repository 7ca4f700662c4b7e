"""`ptp verify DIR`: decode prompts both ways and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptp.cli.common import progress_bar

if TYPE_CHECKING:
    from ptp.evaluation.verify import Verification


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment directory.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings as section.key=value.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to decode.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write for each.")] = 128,
    budget: Annotated[int, typer.Option(min=0, help="Positions a call may spend on drafts.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Names the stream of u.")] = 0,
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16 (default: float32).")] = None,
    report: Annotated[bool, typer.Option(help="Also write report.html into the directory.")] = False,
) -> None:
    """Check that held-out prompts give the same text as plain decoding; report τ and speed-up. Exit code 1 if not."""
    from ptp.evaluation.experiment_report import make_report, verify_experiment
    from ptp.evaluation.report import write_report
    from ptp.experiment import Experiment

    experiment = Experiment.load(directory, overrides or [])
    with progress_bar() as progress:
        verification = verify_experiment(
            experiment,
            num_prompts=num_prompts,
            max_new_tokens=max_new_tokens,
            budget=budget,
            seed=seed,
            dtype=dtype or "float32",
            progress=progress,
        )
    print(summary(verification, num_prompts))
    if report:
        path = experiment.directory / "report.html"
        write_report(make_report(experiment, verification, budget), path)
        print(f"report            {path}")
    if verification.count("mismatch"):
        raise typer.Exit(1)


def summary(verification: Verification, num_asked: int = 0) -> str:
    """The figures of a verification, one a line. num_asked: prompts that it was to have, if as many are held out."""
    num_prompts = len(verification.comparisons)
    fewer = f" (of {num_asked} asked for; no more are held out)" if num_prompts < num_asked else ""
    return "\n".join(
        [
            f"prompts           {num_prompts}{fewer}",
            f"mismatches        {verification.count('mismatch')}",
            f"near-ties         {verification.count('near-tie')}",
            f"tokens per call   {verification.tokens_per_call:.2f}",
            f"speed-up          {verification.speedup:.2f}x plain decoding",
            f"overhead          {100 * verification.overhead:.0f} %",
        ]
    )
