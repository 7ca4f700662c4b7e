"""`ptp distill MODEL DATASET`: set up an experiment directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ptp.cli.common import run


def command(
    model: Annotated[str, typer.Argument(help="Base model: hub id or local path.")],
    dataset: Annotated[str, typer.Argument(help="Prompts: a local .jsonl or .txt file.")],
    prompt_scheme: Annotated[
        str, typer.Option(help="Python format string over the dataset's columns that makes a prompt.")
    ] = "{text}",
    output_dir: Annotated[
        Optional[Path], typer.Option(help="Experiment directory [default: experiments/<model>_<dataset>].")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this mass.")] = 0.95,
    settings: Annotated[
        Optional[list[str]], typer.Option("--set", help="Any other setting, as section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Set up an experiment: the base model answers the dataset's prompts, the adapter learns from its answers."""
    from ptp.experiment import ExperimentConfig, apply_override
    from ptp.stages import distill

    values: dict[str, Any] = {
        "base_model": model,
        "dataset": dataset,
        "prompt_scheme": prompt_scheme,
        "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
    }
    for setting in settings or []:
        apply_override(values, setting)
    directory = output_dir or Path("experiments") / f"{Path(model).name}_{Path(dataset).stem}"
    for name in ("base_model", "dataset"):
        # Paths are kept absolute: commands may be run from anywhere.
        if Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    distill(directory, ExperimentConfig(**values))
    print(directory)


def main() -> None:
    """Entry point of `ptp_distill`."""
    run(lambda: typer.run(command))
