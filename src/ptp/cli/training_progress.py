"""What a person sees of a training: a bar, and what the Trainer logs, as a table on a terminal and in lines elsewhere.

The figures are those of the Trainer's log rows. Here a row of validation has the names of a training row, "loss" and
not "eval_loss", and both have their step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from math import isfinite
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.cli.common import Bars

Row = Mapping[str, float]

COLUMNS = {
    "loss": ("loss", "{:.3f}"),
    "correct": ("correct", "{:.2f}"),
    "tokens_per_call": ("tokens/call", "{:.2f}"),
}
"""Figures with a column of the table: heading and format by name."""

OTHERS = {
    "masked": "{:.1%} masked",
    "learning_rate": "learning rate {:.1e}",
    "grad_norm": "gradient {:.2g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gb": "{:.1f} GB",
}
"""Figures of the training row that stand below the table."""

BARS = "▁▂▃▄▅▆▇█"

SHOWN_INDICES = 16
"""Window indices whose accuracy is shown, so that a row fits into 80 columns."""


class TrainingProgress(TrainerCallback):
    """Moves a bar with the steps, and shows the last row of training and of validation, and the best of validation."""

    def __init__(self, bars: Bars, what: str) -> None:
        self.bars, self.what = bars, what
        self.rows: dict[str, Row] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.bars(self.what, state.global_step, state.max_steps)
        if state.global_step:
            self.bars.say(f"goes on from step {state.global_step}")
        for logged in state.log_history:
            self._take(logged)
        if self.rows:
            self.bars.table = table(self.rows)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.bars(self.what, state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if (kind := self._take({**given["logs"], "step": state.global_step})) is not None:
            self.bars.show(table(self.rows), line(kind, self.rows[kind], state.max_steps))

    def _take(self, logged: Row) -> str | None:
        """Keep a row; which kind it is, None for one that is of no interest here."""
        if "loss" in logged:
            self.rows["training"] = logged
            return "training"
        if "eval_loss" not in logged:
            return None
        row = {name.removeprefix("eval_"): value for name, value in logged.items()}
        self.rows["validation"] = row
        if "correct" in row and row["correct"] >= self.rows.get("best", row)["correct"]:
            self.rows["best"] = row
        return "validation"


def table(rows: Mapping[str, Row]) -> RenderableType:
    """Rows by what they are, in the columns that any of them has; below, what else the training row holds."""
    columns = {name: figure for name, figure in COLUMNS.items() if any(name in row for row in rows.values())}
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column(no_wrap=True)
    for heading in ("step", *(heading for heading, _ in columns.values())):
        shown.add_column(heading, justify="right", no_wrap=True)
    # On a narrow terminal it is the last column that is cut.
    shown.add_column(_cut("accuracy by window index" if any("accuracy/0" in row for row in rows.values()) else ""))
    for kind in ("training", "validation", "best"):
        if kind in rows:
            row = rows[kind]
            figures = (form.format(row[name]) if name in row else "" for name, (_, form) in columns.items())
            shown.add_row(kind, str(row["step"]), *figures, _cut(accuracy_line(row)))
    return Group(shown, Text("  ".join(_others(rows.get("training", {}))), style="dim"))


def _cut(text: str) -> Text:
    """A text that gives way to others in its row."""
    return Text(text, no_wrap=True, overflow="crop")


def accuracy_line(row: Row) -> str:
    """Accuracies by window index as bars between the first and the last number; empty if the row has none.

    accuracy_line({"accuracy/0": 0.9, "accuracy/1": 0.5, "accuracy/2": 0.1}) = "0.90 █▅▁ 0.10"
    """
    names = takewhile(row.__contains__, (f"accuracy/{index}" for index in count()))
    accuracies = [row[name] for name in names][:SHOWN_INDICES]
    if not accuracies:
        return ""
    bars = "".join(BARS[min(int(a * len(BARS)), len(BARS) - 1)] if isfinite(a) else "?" for a in accuracies)
    return f"{accuracies[0]:.2f} {bars} {accuracies[-1]:.2f}"


def line(kind: str, row: Row, num_steps: int) -> str:
    """A row in words, for where no table can be drawn."""
    words = [f"step {row['step']}/{num_steps}", *(["validation"] if kind == "validation" else [])]
    words += [f"{heading} {form.format(row[name])}" for name, (heading, form) in COLUMNS.items() if name in row]
    words += [f"accuracy {accuracy_line(row)}"] if "accuracy/0" in row else []
    return "  ".join([*words, *_others(row)])


def _others(row: Row) -> Iterable[str]:
    return (form.format(row[name]) for name, form in OTHERS.items() if name in row)
