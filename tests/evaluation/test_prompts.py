"""Files of prompts are known by their rows; what the model is asked is what a chat with it would hold."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ptp.demo import make_tokenizer
from ptp.errors import DataError
from ptp.evaluation.prompts import MULTI_TURN, Question, prompt_ids, read_questions, spread_out

ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[3] / "shared" / "assets")) / "prompts"
TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"


def written(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        (
            "spec-bench/question.jsonl",
            dict.fromkeys([MULTI_TURN, "translation", "summarization", "qa", "math_reasoning", "rag"], 80),
        ),
        ("humaneval/HumanEval.jsonl.gz", {"HumanEval": 164}),
        ("gsm8k/test.jsonl", {"GSM8K": 1319}),
    ],
)
def test_the_published_files_are_recognised(file: str, tasks: dict[str, int]) -> None:
    path = ASSETS / file
    if not path.exists():
        pytest.skip(f"{path} is absent; set PTP_ASSETS to the folder that holds prompts/{file}")
    questions = read_questions(str(path))
    assert Counter(question.task for question in questions) == tasks
    assert all(len(question.turns) == (2 if question.task == MULTI_TURN else 1) for question in questions)


def test_spec_bench_s_categories_of_mt_bench_are_one_task(tmp_path: Path) -> None:
    path = written(
        tmp_path / "q.jsonl",
        {"question_id": 1, "category": "stem", "turns": ["Why?", "And then?"]},
        {"question_id": 2, "category": "coding", "turns": ["Write.", "Again."], "reference": ["x", "y"]},
        {"question_id": 3, "category": "rag", "turns": ["Who?"]},
    )
    assert read_questions(path) == [
        Question(MULTI_TURN, ("Why?", "And then?")),
        Question(MULTI_TURN, ("Write.", "Again.")),
        Question("rag", ("Who?",)),
    ]


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"task_id": "Mbpp/7", "prompt": "def f", "test": "assert"}, None, Question("Mbpp", ("def f",))),
        ({"question": "1+1?", "answer": "Two.\n#### 2"}, None, Question("GSM8K", ("1+1?",))),
        ({"question": "1+1?", "answer": "Two."}, None, Question("mine", ("1+1?",))),
        ({"id": "a", "text": "Go on"}, None, Question("mine", ("Go on",))),
        ({"task_id": "Mbpp/7", "prompt": "def f", "other": "O"}, "other", Question("mine", ("O",))),
        ({"id": "a", "said": ["One", "Two"]}, "said", Question("mine", ("One", "Two"))),
    ],
    ids=["HumanEval's like", "GSM8K", "not GSM8K", "text", "a column that was asked for", "turns"],
)
def test_rows_say_which_column_and_task(
    row: dict[str, object], column: str | None, expected: Question, tmp_path: Path
) -> None:
    assert read_questions(written(tmp_path / "mine.v1.jsonl", row), column) == [expected]


def test_a_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("Once upon\n\nLily\n")
    assert read_questions(str(tmp_path / "stories.txt")) == [
        Question("stories", ("Once upon",)),
        Question("stories", ("Lily",)),
    ]


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        ({"id": 1, "words": "x"}, None, ["no column of prompts", "id, words", "--column"]),
        ({"prompt": "x"}, "promt", ["no column 'promt'", "columns are prompt", "--column"]),
        ({"prompt": 7}, None, ["row 1", "'prompt' holds '7'", "expected a text"]),
        ({"prompt": " "}, None, ["row 1", "'prompt'"]),
        ({"prompt": []}, None, ["row 1", "'prompt'"]),
    ],
)
def test_a_file_without_prompts_is_refused_in_one_line(
    row: dict[str, object], column: str | None, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refusal:
        read_questions(written(tmp_path / "file.jsonl", row), column)
    assert "\n" not in str(refusal.value)
    for word in [*words, "file.jsonl"]:
        assert word in str(refusal.value)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(["<|user|>\n<|assistant|>\n", "Why? Because. And then?"], 300)


QUESTION = Question("chat", ("Why?", "And then?"))


def test_a_later_turn_follows_the_answer_in_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (TEMPLATES / "zephyr.jinja").read_text()
    first, second = (prompt_ids(QUESTION, answers, tokenizer) for answers in ([], ["Because."]))
    tokenizer.chat_template = None
    end = tokenizer.eos_token
    assert tokenizer.decode(first) == f"<|user|>\nWhy?{end}\n<|assistant|>\n"
    assert tokenizer.decode(second) == tokenizer.decode(first) + (
        f"Because.{end}\n<|user|>\nAnd then?{end}\n<|assistant|>\n"
    )


def test_without_a_template_the_texts_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompt_ids(QUESTION, [], tokenizer) == tokenizer("Why?")["input_ids"]
    assert prompt_ids(QUESTION, ["Because."], tokenizer) == tokenizer("Why?\n\nBecause.\n\nAnd then?")["input_ids"]


def test_token_ids_are_asked_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompt_ids(Question("held-out", ((5, 6, 7),)), [], tokenizer) == [5, 6, 7]


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 9))
def test_of_each_task_so_many_questions_are_taken_in_order(tasks: list[str], per_task: int) -> None:
    questions = [Question(task, (str(number),)) for number, task in enumerate(tasks)]
    chosen = spread_out(questions, per_task)
    for task in set(tasks):
        numbers = [int(question.turns[0]) for question in chosen if question.task == task]
        assert len(numbers) == min(per_task, tasks.count(task))
        assert numbers == sorted(set(numbers))
    assert all(question in questions for question in chosen)


def test_questions_are_taken_from_all_over_a_task() -> None:
    chosen = spread_out([Question("mt", (str(number),)) for number in range(80)], 8)
    assert [int(question.turns[0]) // 10 for question in chosen] == list(range(8))
