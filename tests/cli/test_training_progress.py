"""What a person sees of a training, on a terminal and without one."""

import io
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import typer
from rich.console import Console

from ptp.cli import common
from ptp.cli.common import progress_bar, resumable
from ptp.cli.training_progress import SHOWN_INDICES, TrainingProgress, accuracy_line, table

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


@dataclass
class State:
    """Of the Trainer."""

    max_steps: int = 2000
    global_step: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)


def training_row(loss: float = 2.3, num_indices: int = 16, **others: float) -> dict[str, float]:
    accuracies = {f"accuracy/{k}": 0.9 * 0.8**k for k in range(num_indices)}
    figures = {"loss": loss, "correct": 0.84, "tokens_per_call": 1.634, "masked": 0.0012, "memory_gb": 3.14}
    speed = {"tokens_per_second": 123456.7, "learning_rate": 1e-4, "grad_norm": 0.93}
    return figures | speed | accuracies | others


def validation_row(loss: float, correct: float) -> dict[str, float]:
    return {"eval_loss": loss, "eval_correct": correct, "eval_accuracy/0": 0.5, "eval_runtime": 77.7}


def log(progress: TrainingProgress, state: State, step: int, row: dict[str, float]) -> None:
    """What the Trainer does with a row."""
    state.global_step = step
    state.log_history.append(row | {"step": step})
    progress.on_log(None, state, None, logs=row)


def visible(shown: str) -> list[str]:
    """Lines without the codes that colour text and move the cursor."""
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()]


def drawn(progress: TrainingProgress, width: int = 80) -> list[str]:
    """Lines of the table as it stands."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table(progress.rows))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal in place of standard error; what was shown is in its file."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, markup=False, highlight=False)
    monkeypatch.setattr(common, "console", console)
    return console


@pytest.fixture
def progress() -> Iterator[TrainingProgress]:
    with progress_bar() as bars:
        yield TrainingProgress(bars, "training steps")


def test_every_figure_is_readable_in_80_columns(progress: TrainingProgress) -> None:
    log(progress, State(), 123456, training_row(loss=12.345))
    lines = drawn(progress)
    assert " ".join(lines[0].split()) == "step loss correct tokens/call accuracy by window index"
    kind, step, loss, correct, per_call, first, bars, last = lines[2].split()
    assert (kind, step, loss, correct, per_call, first, last) == (
        *("training", "123456", "12.345", "0.84", "1.63", "0.90", "0.03"),
    )
    assert len(bars) == SHOWN_INDICES
    assert lines[3:] == ["0.1% masked  learning rate 1.0e-04  gradient 0.93  123,457 tokens/s  3.1 GB"]


def test_the_last_rows_and_the_best_of_validation_are_shown_with_their_steps(progress: TrainingProgress) -> None:
    state = State()
    for step, correct in [(10, 0.5), (20, 0.9), (30, 0.7)]:
        log(progress, state, step, training_row(loss=step))
        log(progress, state, step, validation_row(100 + step, correct))
    log(progress, state, 40, training_row(loss=40))
    log(progress, state, 40, {"train_runtime": 7.0, "train_loss": 3.0})
    rows = {words[0]: words[1:4] for line in drawn(progress) if len(words := line.split()) > 3}
    assert rows["training"] == ["40", "40.000", "0.84"]
    assert rows["validation"] == ["30", "130.000", "0.70"]
    assert rows["best"] == ["20", "120.000", "0.90"]


def test_a_resumed_training_shows_what_was_logged_before(progress: TrainingProgress) -> None:
    before = [training_row(loss=5) | {"step": 10}, validation_row(6, 0.4) | {"step": 10}]
    progress.on_train_begin(None, State(global_step=10, log_history=before), None)
    assert progress.bars.table is not None
    assert [line.split()[:3] for line in drawn(progress)[2:5]] == [
        ["training", "10", "5.000"],
        ["validation", "10", "6.000"],
        ["best", "10", "6.000"],
    ]


def test_only_what_is_logged_has_a_place(progress: TrainingProgress) -> None:
    log(progress, State(), 10, {"loss": 3.0, "learning_rate": 1e-4})
    words = " ".join(drawn(progress)).split()
    assert [word for word in words if not set(word) <= {"─"}] == [
        *("step", "loss", "training", "10", "3.000", "learning", "rate", "1.0e-04"),
    ]


def test_a_narrow_terminal_cuts_the_bars_first(progress: TrainingProgress) -> None:
    log(progress, State(), 10, training_row())
    lines = drawn(progress, width=52)
    assert max(map(len, lines)) <= 52
    assert lines[2].split()[:5] == ["training", "10", "2.300", "0.84", "1.63"]


def test_accuracies_are_bars_between_the_first_and_the_last_number() -> None:
    assert accuracy_line({"accuracy/0": 1.0, "accuracy/1": 0.5, "accuracy/2": 0.0}) == "1.00 █▅▁ 0.00"
    assert accuracy_line({"accuracy/0": float("nan"), "accuracy/1": 0.5}) == "nan ?▅ 0.50"
    assert accuracy_line({"accuracy": 0.5}) == ""
    assert len(accuracy_line({f"accuracy/{k}": 0.5 for k in range(100)}).split()[1]) == SHOWN_INDICES


# Without a terminal


def test_without_a_terminal_each_row_is_a_line_without_control_codes(capsys: pytest.CaptureFixture) -> None:
    with progress_bar() as bars:
        progress, state = TrainingProgress(bars, "training steps"), State()
        progress.on_train_begin(None, state, None)
        log(progress, state, 120, {"loss": 2.31, "correct": 0.84, "learning_rate": 1e-4})
        log(progress, state, 120, validation_row(2.5, 0.71))
        log(progress, state, 120, {"train_runtime": 7.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 120/2000  loss 2.310  correct 0.84  learning rate 1.0e-04",
        "step 120/2000  validation  loss 2.500  correct 0.71  accuracy 0.50 ▅ 0.50",
    ]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_only_the_first_process_shows_anything(
    on_terminal: bool, terminal: Console, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_force_terminal", on_terminal)
    monkeypatch.setenv("RANK", "1")
    with progress_bar() as bars:
        progress, state = TrainingProgress(bars, "training steps"), State()
        progress.on_train_begin(None, state, None)
        log(progress, state, 10, training_row())
    assert terminal.file.getvalue() + capsys.readouterr().err == ""


# On a terminal


def test_a_library_s_warning_is_a_line_of_its_own_above_the_table(terminal: Console) -> None:
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    before = handler.stream
    try:
        with progress_bar() as bars:
            progress, state = TrainingProgress(bars, "training steps"), State()
            progress.on_train_begin(None, state, None)
            log(progress, state, 10, training_row())
            logger.warning("mind the gap")
            assert handler.stream is sys.stderr is not before
        assert handler.stream is before
    finally:
        logger.removeHandler(handler)
    shown = visible(terminal.file.getvalue())
    assert "mind the gap" in shown
    assert [line for line in shown if line][-2].startswith("training ")
    assert "learning rate" in shown[-1]


def test_ctrl_c_leaves_the_terminal_sane_and_says_how_to_go_on(terminal: Console) -> None:
    with pytest.raises(typer.Exit) as left, resumable(), progress_bar() as bars:
        progress, state = TrainingProgress(bars, "training steps"), State()
        progress.on_train_begin(None, state, None)
        log(progress, state, 10, training_row())
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    shown = terminal.file.getvalue()
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert visible(shown)[-1] == "stopped; what is done is kept, and the same command goes on from there"
