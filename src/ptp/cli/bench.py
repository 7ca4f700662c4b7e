"""`ptp bench DIR`: how fast, against other ways of decoding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptp.cli.common import BudgetOption, note, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from ptp.evaluation.bench import Figures
    from ptp.evaluation.experiment_bench import Bench

TABLE_WIDTH = 200
"""Characters of a line where there is no terminal to fit it into."""


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment directory.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings as section.key=value.")] = None,
    prompts: Annotated[
        Optional[str],
        typer.Option(help="File of Spec-Bench, HumanEval, GSM8K or others (default: held-out prompts)."),
    ] = None,
    column: Annotated[Optional[str], typer.Option(help="Its column of prompts, if it is not recognised.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write for each.")] = 128,
    budget: BudgetOption = "24",
    repetitions: Annotated[int, typer.Option(min=1, help="Times each prompt is answered by each method.")] = 3,
    assistant: Annotated[
        Optional[str], typer.Option(help="Small model with the same tokenizer, to measure assisted generation too.")
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16 (default: float32).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Names the stream of u.")] = 0,
    plot: Annotated[
        Optional[Path], typer.Option(help="SVG file to draw (default: bench.svg in the directory).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line in place of the tables.")] = False,
) -> None:
    """Measure tokens per call and speed against the plain loop, generate and prompt lookup, in turn on each prompt.

    The JSON line is also appended to bench.jsonl in the directory. Exit code 1 if a text differs from plain decoding.
    """
    from rich.console import Console

    from ptp.evaluation.bench_plot import bench_svg
    from ptp.evaluation.experiment_bench import bench_experiment
    from ptp.experiment import Experiment
    from ptp.files import append_line, write_atomically

    experiment = Experiment.load(directory, overrides or [])
    experiment.check_inside("bench.jsonl")
    with progress_bar() as progress:
        bench = bench_experiment(
            experiment,
            prompts=prompts,
            column=column,
            num_prompts=num_prompts,
            max_new_tokens=max_new_tokens,
            budget=budget,
            repetitions=repetitions,
            assistant=assistant,
            seed=seed,
            dtype=dtype or "float32",
            progress=progress,
        )
    if bench.num_left_out:
        note(f"{bench.num_left_out} prompts left out: no room for {max_new_tokens} tokens after them in the context")
    line, picture = experiment.directory / "bench.jsonl", plot or experiment.directory / "bench.svg"
    append_line(line, bench.to_json())
    write_atomically(picture, bench_svg(bench.results, f"{experiment.directory.name}: speed-up").encode())
    if as_json:
        print(bench.to_json())
    else:
        console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)
        for table in tables(bench):
            console.print(table, "")
        print("\n".join(summary(bench)))
        note(f"wrote {picture}, appended to {line}")
    if bench.verdicts["mismatch"]:
        raise typer.Exit(1)


def tables(bench: Bench) -> Iterator[Table]:
    """All questions by method, with the quartiles over questions of tokens per second and the range over repetitions of
    the speed-up; and if there are several tasks, speed-up and τ of each."""
    from ptp.evaluation.bench import OVERALL
    from ptp.evaluation.methods import PLAIN

    overall = bench.results[OVERALL]
    headings = ("tokens/s", "spread", "speed-up", "range", "τ", "accepted", "overhead", "ms/call")
    yield _table(("method", *headings), ((name, *_cells(figures)) for name, figures in overall.items()))
    if len(bench.results) > 1:
        others = [name for name in overall if name != PLAIN]
        yield _table(
            ("speed-up, τ", "questions", *others),
            (
                (
                    task,
                    str(figures[PLAIN].num_questions),
                    *(f"{figures[name].speedup:.2f}x  {figures[name].tokens_per_call:.2f}" for name in others),
                )
                for task, figures in bench.results.items()
            ),
        )


def summary(bench: Bench) -> Iterator[str]:
    """What is told of PTP besides: drafts by position, and whether it was lossless."""
    from ptp.evaluation.bench import OVERALL
    from ptp.evaluation.methods import PTP

    shares = bench.results[OVERALL][PTP].acceptance_by_position
    yield f"accepted by position  {' '.join(f'{share:.2f}' for share in shares) or 'no drafts'}"
    counts = ", ".join(f"{count} {verdict}" for verdict, count in bench.verdicts.items())
    yield f"against plain text    {counts} of {bench.num_prompts} prompts"
    yield "speed-up             median over repetitions of the ratio of mean speeds; range: least and most of them"
    yield "spread               of tokens/s, the middle half of the questions"


def _cells(figures: Figures) -> Iterator[str]:
    decimals = 0 if figures.tokens_per_second >= 10 else 1
    yield f"{figures.tokens_per_second:.{decimals}f}"
    yield _range(figures.tokens_per_second_quartiles, decimals)
    yield f"{figures.speedup:.2f}x"
    yield _range(figures.speedup_range, 2)
    yield f"{figures.tokens_per_call:.2f}"
    yield "" if figures.acceptance_rate is None else f"{figures.acceptance_rate:.0%}"
    yield f"{figures.overhead:.0%}"
    yield f"{figures.ms_per_call:.2f}"


def _range(spread: tuple[float, float], decimals: int) -> str:
    return "–".join(f"{end:.{decimals}f}" for end in spread)


def _table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
