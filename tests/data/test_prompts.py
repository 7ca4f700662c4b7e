import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptp.data.prompts import encode_prompts, format_prompts, read_rows, validation_places
from ptp.demo import make_tokenizer
from ptp.errors import DataError

PROMPTS = st.lists(st.text(max_size=5), max_size=60)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_of_a_jsonl_file_are_its_objects(tmp_path: Path) -> None:
    rows = [{"text": "a\nb", "n": 1}, {"text": "ü 你好"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    assert read_rows(written(tmp_path / "rows.jsonl", text)) == rows


def test_a_jsonl_line_ends_where_json_says_so(tmp_path: Path) -> None:
    # These end a line for str.splitlines, and stand unescaped in valid JSON.
    rows = [{"text": f"a{character}b"} for character in "\u2028\u2029\x85"]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert read_rows(written(tmp_path / "rows.jsonl", text)) == rows


def test_rows_of_a_text_file_are_its_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "rows.txt", "one\n\n  two\n")) == [{"text": "one"}, {"text": "  two"}]


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert "line 3: not valid JSON" in error_of(written(path, '{"a": 1}\n\n{"a": \n{"a": 2}\n'))
    assert "line 2: expected a JSON object; got list" in error_of(written(path, '{"a": 1}\n[1]\n'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "holds no rows"),
        ("blank.txt", "\n  \n", "holds no rows"),
        ("table.csv", "a,b\n", "expected a .jsonl or .txt file; got '.csv'"),
        ("none", "a", "expected a .jsonl or .txt file; got ''"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert message in error_of(written(tmp_path / name, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such dataset file" in error_of(tmp_path / "nowhere.jsonl")
    assert "no such dataset file" in error_of(tmp_path)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    assert str(path) in error_of(path)


def test_a_scheme_is_filled_with_columns() -> None:
    rows: list[dict[str, object]] = [{"q": "one", "n": 1}, {"q": "{two}", "n": 2}]
    assert format_prompts(rows, "{{}} {n:02d}: {q}\n") == ["{} 01: one\n", "{} 02: {two}\n"]


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(DataError, match=r"row 2 has no column 'text' for the prompt scheme; it has: prompt, x"):
        format_prompts([{"text": "a"}, {"x": 1, "prompt": "a"}], "{text}")


@pytest.mark.parametrize("scheme", ["{text", "text}", "{}", "{0}", "{text.foo}", "{text!x}", "{n[0]}", "{none:>5}"])
def test_a_scheme_that_cannot_be_filled_is_an_error_of_one_line(scheme: str) -> None:
    with pytest.raises(DataError) as caught:
        format_prompts([{"text": "a", "n": 1, "none": None}], scheme)
    assert "scheme" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_too_long_are_left_out_and_the_others_keep_their_place() -> None:
    tokenizer = make_tokenizer(["a b c"], 259)
    encoded = encode_prompts(tokenizer, ["abc", "abcdef", "ab"], max_tokens=4)
    assert {place: len(ids) for place, ids in encoded.items()} == {0: 4, 2: 3}
    assert encoded[2] == tokenizer("ab")["input_ids"]
    with pytest.raises(DataError, match="none of 2 prompts has 1 to 3 tokens"):
        encode_prompts(tokenizer, ["abc", "abcdef"], max_tokens=3)


@given(PROMPTS)
def test_equal_prompts_are_held_out_together_and_never_all(prompts: list[str]) -> None:
    places = validation_places(prompts)
    held_out = {prompts[place] for place in places}
    assert places == {place for place, prompt in enumerate(prompts) if prompt in held_out}
    assert bool(places) == (len(set(prompts)) > 1)
    assert len(places) < max(1, len(prompts))


@given(PROMPTS, st.randoms(use_true_random=False))
def test_the_split_depends_on_the_prompts_alone_not_on_their_order(prompts: list[str], rng: random.Random) -> None:
    held_out = {prompts[place] for place in validation_places(prompts)}
    rng.shuffle(prompts)
    assert {prompts[place] for place in validation_places(prompts)} == held_out


@given(st.sets(st.text(max_size=5), min_size=20, max_size=80))
def test_of_twenty_prompts_or_more_some_and_never_more_than_a_tenth_are_held_out(prompts: set[str]) -> None:
    assert 0 < len(validation_places(sorted(prompts))) <= len(prompts) / 10


def test_a_frequent_prompt_does_not_take_the_data_with_it_into_validation() -> None:
    distinct = [f"prompt {number}" for number in range(40)]
    for frequent in distinct:
        prompts = [*distinct, *[frequent] * 60]
        assert 0 < len(validation_places(prompts)) <= len(prompts) / 10
