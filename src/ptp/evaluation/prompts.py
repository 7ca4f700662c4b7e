"""Questions to measure decoding with: what a file of prompts holds, and the tokens the model is asked with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptp.data.chats import encode, render
from ptp.data.columns import PROMPT_NAMES, USER_TURNS
from ptp.data.sources import load_source
from ptp.errors import DataError

MULTI_TURN = "multi-turn"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories of MT-bench, which are one task of Spec-Bench; its other categories are a task each."""

COLUMNS = (*PROMPT_NAMES, "text")
"""Columns that hold prompts in files of no known benchmark, the best first; a line of a text file is its "text"."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked in turn; each turn but the first follows the answers to those before.

    task: what results are grouped by. turns: texts, to be put into the chat template; or token ids, taken as they are.
    """

    task: str
    turns: tuple[str | tuple[int, ...], ...]


def read_questions(path: str, column: str | None = None) -> list[Question]:
    """The questions of a file that `ptp.data.sources.load_source` reads, in order.

    Known by their rows are Spec-Bench and MT-bench (`question_id`, `category`, `turns`), HumanEval and its like
    (`prompt`, `task_id` such as "HumanEval/0") and GSM8K (`question`, and an `answer` that ends in "#### 18"). Of
    another file the task is its name, and the prompts are in the column given, or the best of the `COLUMNS`; a cell is
    a text, or a list of texts for several turns. Raises `DataError` for no such column, and for other cells.
    """
    rows = load_source(path).rows
    column, task_of = _recognise(path, rows.column_names, rows[0], column)
    return [Question(task_of(row), _turns(path, number, column, row[column])) for number, row in enumerate(rows, 1)]


def prompt_ids(question: Question, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that ask a question's next turn, after the answers to those before.

    In the tokenizer's chat template if it has one; else the texts alone, turns and answers a blank line apart.
    """
    turn = question.turns[len(answers)]
    if not isinstance(turn, str):
        return list(turn)
    asked = [str(turn) for turn in question.turns]
    if tokenizer.chat_template:
        before = [
            message
            for text, answer in zip(asked, answers, strict=False)
            for message in ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
        ]
        return encode(
            tokenizer, render(tokenizer, [*before, {"role": "user", "content": turn}], generation_prompt=True)
        )
    said = [text for pair in zip(asked, answers, strict=False) for text in pair]
    return list(tokenizer("\n\n".join([*said, turn]))["input_ids"])


def spread_out(questions: Sequence[Question], per_task: int) -> list[Question]:
    """At most so many questions of each task, evenly over its whole: neighbours are often of one kind."""
    chosen = []
    for task in dict.fromkeys(question.task for question in questions):
        of_task = [question for question in questions if question.task == task]
        count = min(per_task, len(of_task))
        chosen += [of_task[number * len(of_task) // count] for number in range(count)]
    return chosen


def _recognise(path: str, names: Sequence[str], first: Row, column: str | None) -> tuple[str, Callable[[Row], str]]:
    """The column of prompts, and what says the task of a row."""
    if column is None and {"question_id", "category", USER_TURNS} <= set(names):
        return USER_TURNS, lambda row: MULTI_TURN if row["category"] in MT_BENCH else str(row["category"])
    if column is None and {"task_id", "prompt"} <= set(names) and "/" in str(first["task_id"]):
        return "prompt", lambda row: str(row["task_id"]).partition("/")[0]
    if column is None and {"question", "answer"} <= set(names) and re.search(r"^#### \S", str(first["answer"]), re.M):
        return "question", lambda row: "GSM8K"
    found = next((name for name in ([column] if column else COLUMNS) if name in names), None)
    if found is None:
        wanted = f"column '{column}'" if column else f"column of prompts ({', '.join(COLUMNS)})"
        raise DataError(f"{path} has no {wanted}; its columns are {', '.join(names)}: choose one with --column")
    task = Path(path).name.partition(".")[0]
    return found, lambda row: task


def _turns(path: str, number: int, column: str, cell: object) -> tuple[str, ...]:
    turns = [cell] if isinstance(cell, str) else cell
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise DataError(
            f"{path}, row {number}: '{column}' holds {str(cell)[:40]!r}; expected a text, or a list of texts for turns"
        )
    return tuple(turns)
