import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ptp.data.columns import LONG_TEXT, Shape, default_mode, default_scheme, recognise
from ptp.errors import DataError

ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def shape_of(*rows: dict[str, Any]) -> Shape:
    return recognise(list(dict.fromkeys(column for row in rows for column in row)), rows)


def asset(path: str) -> list[dict[str, Any]]:
    file = ASSETS / path
    if not file.exists():
        pytest.skip(f"{file} is absent; set PTP_ASSETS to the folder that holds {path}")
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


# Real datasets


@pytest.mark.parametrize(
    ("path", "kind", "column", "roles"),
    [
        ("corpora/dialogues/schema-guided-dev.jsonl", "messages", "messages", ("user", "assistant")),
        ("corpora/dialogues/sharegpt-format-sample.json", "sharegpt", "conversations", ("human", "gpt")),
    ],
)
def test_real_chats_are_recognised(path: str, kind: str, column: str, roles: tuple[str, ...]) -> None:
    shape = shape_of(*asset(path))
    assert (shape.kind, shape.column, shape.roles, shape.has_assistant) == (kind, column, roles, True)
    assert default_mode(shape) == "prompt-distill"


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        ("prompts/gsm8k/test.jsonl", "{question}"),
        ("prompts/humaneval/HumanEval.jsonl.gz", "{prompt}"),
        # Its column "turns" holds what the user says first and next, no answers.
        ("prompts/spec-bench/question.jsonl", "{turns[0]}"),
    ],
)
def test_real_prompts_are_recognised_and_their_scheme_works(path: str, scheme: str) -> None:
    rows = asset(path)
    shape = shape_of(*rows)
    assert (default_mode(shape), default_scheme(shape)) == ("prompt-scheme-distill", scheme)
    assert all(len(scheme.format_map(row)) > 10 for row in rows)


def test_real_books_are_documents() -> None:
    book = ASSETS / "corpora" / "classic-books" / "Lewis_Carroll_Alice_s_Adventures_in_Wonderland.md"
    if not book.exists():
        pytest.skip(f"{book} is absent; set PTP_ASSETS to the folder that holds corpora/classic-books")
    assert default_mode(shape_of({"text": book.read_text()})) == "fixed"


# Chats


@pytest.mark.parametrize(
    ("row", "kind", "column"),
    [
        ({"messages": HI}, "messages", "messages"),
        ({"id": "1", "anything": HI}, "messages", "anything"),
        ({"prompt": HI[:1], "answer": "Hello"}, "messages", "prompt"),
        ({"chosen": HI, "rejected": HI, "messages": HI}, "messages", "messages"),
        ({"text": "Hi Hello", "conversations": SHAREGPT}, "sharegpt", "conversations"),
        ({"dialog": ["Hi", "Hello"]}, "alternating", "dialog"),
        ({"turns": HI}, "messages", "turns"),
    ],
)
def test_chats_are_recognised_by_their_form_and_the_best_name(row: dict[str, Any], kind: str, column: str) -> None:
    shape = shape_of(row)
    assert (shape.kind, shape.column, default_mode(shape)) == (kind, column, "prompt-distill")


@pytest.mark.parametrize("chats", [HI, SHAREGPT, ["Hi", "Hello"]])
def test_a_scheme_can_take_the_first_message_of_a_chat(chats: list[Any]) -> None:
    row = {"conversation": chats}
    assert default_scheme(shape_of(row)).format_map(row) == "Hi"


def test_roles_are_listed_as_they_occur_and_the_assistant_is_known_by_any_name() -> None:
    one, other = [{"role": "Human", "content": "Hi"}], [{"role": "Bot", "content": "Hello"}]
    shape = shape_of({"chat": one}, {"chat": None}, {"chat": []}, {"chat": one + other})
    assert (shape.roles, shape.has_assistant) == (("Human", "Bot"), True)
    assert not shape_of({"chat": one}).has_assistant


def test_tool_definitions_are_found() -> None:
    assert shape_of({"messages": HI, "tools": [{"type": "function"}]}).tools == "tools"
    assert shape_of({"messages": HI, "tools": "[]"}).tools == "tools"
    assert shape_of({"messages": HI, "tools": None}).tools is None


def test_the_text_columns_beside_chats_can_be_used() -> None:
    assert shape_of({"id": "1", "prompt": "Hi", "messages": HI, "n": 3}).columns == ("prompt", "id")


# Texts


def test_a_single_text_column_is_the_text_whatever_its_name() -> None:
    shape = shape_of({"n": 1, "poem": "Roses are red"})
    assert (shape.kind, shape.column, default_scheme(shape)) == ("text", "poem", "{poem}")


@pytest.mark.parametrize(
    ("columns", "best"),
    [
        (("answer", "question"), "question"),
        (("url", "text", "timestamp"), "text"),
        (("text", "prompt", "completion"), "prompt"),
        (("title", "Description"), "Description"),
    ],
)
def test_the_text_is_known_by_its_name(columns: tuple[str, ...], best: str) -> None:
    shape = shape_of(dict.fromkeys(columns, "words"))
    assert (shape.kind, shape.column, shape.columns[0]) == ("text", best, best)
    assert set(shape.columns) == set(columns)


def test_of_columns_with_unknown_names_the_longest_text_comes_first() -> None:
    shape = shape_of({"id": "1", "premise": "It rains in Oslo.", "guess": "It is wet."})
    assert (shape.kind, shape.column, shape.columns) == ("columns", None, ("premise", "guess", "id"))
    assert (default_mode(shape), default_scheme(shape)) == ("prompt-scheme-distill", "{premise}")


def test_an_instruction_comes_with_its_input() -> None:
    shape = shape_of({"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Add. 1, 2: 3"})
    assert default_scheme(shape) == "{instruction}\n\n{input}"


def test_long_texts_are_learnt_and_long_prompts_answered() -> None:
    short, long = "a" * LONG_TEXT, "a" * (LONG_TEXT + 1)
    assert default_mode(shape_of({"text": long}, {"text": long}, {"text": "a"})) == "fixed"
    assert default_mode(shape_of({"text": short}, {"text": short}, {"text": long})) == "prompt-scheme-distill"
    assert default_mode(shape_of({"prompt": long})) == "prompt-scheme-distill"


def test_lists_of_strings_serve_by_their_first_where_every_row_has_one() -> None:
    assert shape_of({"text": "a", "tags": ["x"]}, {"text": "b", "tags": ["y", "z"]}).columns == ("text", "tags[0]")
    assert shape_of({"text": "a", "tags": ["x"]}, {"text": "b", "tags": []}).columns == ("text",)
    assert shape_of({"text": "a", "tags": ["x"]}, {"text": None}).columns == ("text",)


@pytest.mark.parametrize("rows", [[{"id": 1, "label": None, "blank": " "}], []])
def test_a_dataset_without_text_is_refused_with_what_it_has(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError) as caught:
        recognise(["id", "label", "blank"], rows)
    kinds = "id (int), label (empty), blank (str)" if rows else "id (empty), label (empty), blank (empty)"
    assert str(caught.value) == f"no column holds chats or text; columns: {kinds}"
