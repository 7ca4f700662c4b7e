"""Rows of local files, folders and repositories, and what is said where there are none."""

import gzip
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptp.data.sources import Source, load_source
from ptp.errors import ConfigError, DataError, PTPError

ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))


@pytest.fixture(scope="module", autouse=True)
def cache() -> Iterator[Path]:
    """A cache of this module alone."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
        datasets.disable_progress_bars()
        yield Path(folder)
        datasets.enable_progress_bars()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Writes a file, and its folders, and returns its path."""

    def write(name: str, content: str | bytes) -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        file.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") and isinstance(content, str) else data)
        return str(file)

    return write


def rows(path: str | Path, **choice: Any) -> list[dict[str, Any]]:
    return load_source(str(path), **choice).rows.to_list()


def texts(path: str | Path, **choice: Any) -> list[str]:
    return load_source(str(path), **choice).rows["text"][:]


def complaint(path: str | Path, kind: type[PTPError] = DataError, **choice: Any) -> str:
    """The one line that loading is refused with."""
    with pytest.raises(kind) as refused:
        load_source(str(path), **choice)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Real corpora


def asset(*parts: str) -> Path:
    path = ASSETS.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent; set PTP_ASSETS to the folder that holds {'/'.join(parts)}")
    return path


@pytest.mark.parametrize(
    ("parts", "count", "columns"),
    [
        (("corpora", "dialogues", "schema-guided-dev.jsonl"), 2098, ["id", "services", "messages"]),
        (("corpora", "dialogues", "sharegpt-format-sample.json"), 500, ["id", "conversations"]),
        (("prompts", "gsm8k", "test.jsonl"), 1319, ["question", "answer"]),
        (("prompts", "gsm8k"), 7473, ["question", "answer"]),
        (("corpora", "tinystories-valid"), 4356, ["text"]),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else "",
)
def test_real_corpora_load(parts: tuple[str, ...], count: int, columns: list[str]) -> None:
    source = load_source(str(asset(*parts)))
    assert len(source.rows) == count
    assert source.rows.column_names == columns


@pytest.mark.parametrize("name", ["schema-guided-dev.jsonl", "sharegpt-format-sample.json"])
def test_real_chats_come_back_as_the_json_library_reads_them(name: str) -> None:
    text = asset("corpora", "dialogues", name).read_text()
    expected = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert rows(asset("corpora", "dialogues", name)) == expected


def test_a_gzipped_benchmark_comes_back_as_it_was_written() -> None:
    file = asset("prompts", "humaneval", "HumanEval.jsonl.gz")
    assert rows(file) == [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


def test_a_folder_of_books_gives_a_row_a_book_without_holding_them_in_memory() -> None:
    import pyarrow as pa

    folder = asset("corpora", "classic-books")
    before = pa.total_allocated_bytes()
    source = load_source(str(folder), whole_files=True)
    assert pa.total_allocated_bytes() - before < 1 << 20 < source.rows.data.nbytes
    books = sorted(folder.glob("*.md"))
    assert len(source.rows) == len(books) == 140
    for place in (0, 77, 139):
        assert source.rows[place]["text"] == books[place].read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_a_row_of_text_is_a_line_that_is_not_blank(write: Callable) -> None:
    path = write("a.txt", "one \u2028 still one\r\n\n  \n\ttwo\x0b\x85\rtwo\nthree")
    assert texts(path) == ["one \u2028 still one", "\ttwo\x0b\x85\rtwo", "three"]


def test_a_row_of_whole_files_is_a_file_that_is_not_blank(write: Callable, tmp_path: Path) -> None:
    write("1.txt", "\ufeffone\r\n\r\ntwo\n")
    write("2.txt", " \n\n")
    write("3/4.md", "three")
    write("5.txt.gz", "four\n")
    assert texts(tmp_path, whole_files=True) == ["one\n\ntwo\n", "three", "four\n"]
    assert texts(tmp_path) == ["one", "two", "three", "four"]


@settings(max_examples=60)
@given(
    st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))),
    st.sampled_from(["\n", "\r\n"]),
)
def test_lines_come_back_whatever_they_hold(lines: list[str], end: str) -> None:
    solid = [line for line in lines if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lines.txt")
        file.write_bytes("".join(line + end for line in ["first", *lines]).encode())
        assert texts(file) == ["first", *solid]


# ---------------------------------------------------------------------------------------------------------------------
# JSON and CSV

CHATS = [
    {"messages": [{"role": "user", "content": "What is six times seven?"}, {"role": "assistant", "content": "42"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2 + 2"}]},
            {"role": "assistant", "content": "4"},
        ]
    },
    {
        "tools": [{"name": "clock", "parameters": {}}, {"name": "sum", "parameters": {"of": [1, 2.5]}}],
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "arguments": {}}]},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "sum", "arguments": {"of": [1, "2", None]}}]},
            {"role": "tool", "content": '{"time": "null"}', "name": "clock"},
        ],
    },
    {"messages": []},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(row) for row in CHATS)),
        ("a.jsonl", "\ufeff\n" + "".join(json.dumps(row) + "\r\n\r\n" for row in CHATS)),
        ("a.jsonl.gz", "\n".join(json.dumps(row, ensure_ascii=False) for row in CHATS)),
        ("a.json", "\ufeff" + json.dumps(CHATS)),
        ("a.json", "\r\n" + json.dumps(CHATS, indent=2) + "\r\n"),
        ("a.json", "\n".join(json.dumps(row) for row in CHATS)),
        ("a.json.gz", json.dumps(CHATS, indent=1)),
    ],
)
def test_chats_come_back_as_written_however_much_they_differ(write: Callable, name: str, content: str) -> None:
    """No message gets the keys of another, and "42" does not become a number: templates would write other text."""
    assert rows(write(name, content)) == [{"tools": None} | row for row in CHATS]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT
VALUES = st.recursive(
    SCALARS | st.decimals(-1000, 1000, places=3).map(float),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/ ", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def as_prompt(value: Any) -> str:
    """As text, which unlike == tells 1 from 1.0 and True; fractions to 15 digits, which `datasets` keeps of them."""
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda digits: f"{float(digits):.15g} "))


@settings(max_examples=60)
@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=3) | st.dictionaries(st.just("v"), VALUES)),
    st.booleans(),
)
def test_json_comes_back_as_written_but_for_keys_that_other_rows_have(written: list[dict], as_list: bool) -> None:
    written = [{"a": "first", "b": None, "v": None}, *written]
    columns = {name: None for row in written for name in row}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(written, indent=1) if as_list else "\n".join(json.dumps(row) for row in written))
        read = rows(file)
    assert as_prompt(read) == as_prompt([columns | row for row in written])


def test_strings_stay_strings(write: Callable) -> None:
    """Neither times nor numbers are made of them: a prompt would read otherwise."""
    row = {"day": "2020-01-01", "code": "007", "missing": "NA", "empty": ""}
    assert rows(write("a.jsonl", json.dumps(row))) == [row]
    assert rows(write("a.csv", "day,code,missing,empty\n2020-01-01,007,NA,\n")) == [row]


def test_scalars_keep_their_type_and_numbers_of_two_types_stay_apart(write: Callable) -> None:
    content = '{"i": 1, "f": 0.48389709051528107, "b": true, "n": 1}\n{"i": null, "f": NaN, "b": false, "n": 1.5}\n'
    first, second = rows(write("a.jsonl", content))
    assert repr(list(first.values())) == "[1, 0.48389709051528107, True, 1]"
    assert repr(list(second.values())) == "[None, nan, False, 1.5]"


def test_a_csv_cell_may_hold_anything_quoted(write: Callable) -> None:
    long = "x" * 200_000
    content = f'\ufeff,question,answer\r\n0,"Is ""this""\r\none cell, too?","yes\u2028"\r\n\r\n1,{long},\r\n'
    assert rows(write("a.csv", content)) == [
        {"": "0", "question": 'Is "this"\r\none cell, too?', "answer": "yes\u2028"},
        {"": "1", "question": long, "answer": ""},
    ]


def test_rows_beyond_one_batch_keep_their_order(write: Callable) -> None:
    path = write("a.jsonl", "\n".join(json.dumps({"n": n, "m": [n]}) for n in range(25_000)))
    assert rows(path) == [{"n": n, "m": [n]} for n in range(25_000)]


# ---------------------------------------------------------------------------------------------------------------------
# Parquet, arrow, repositories


@pytest.fixture
def table() -> Any:
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})


def test_parquet_and_arrow_files_load_whatever_their_names(table: Any, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "we[ird] *?.parquet")
    table.with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "one.arrow")
    for path in ("we[ird] *?.parquet", "saved", "one.arrow"):
        source = load_source(str(tmp_path / path))
        assert list(source.rows) == table.to_list()
        assert source.rows.cache_files, "not memory-mapped"


def test_saved_splits_load(table: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    datasets.DatasetDict({"fit": table, "check": table.select([1])}).save_to_disk(path)
    assert texts(path, split="check") == ["b"]
    assert texts(path, split="fit[1:]+check") == ["b", "c", "b"]
    assert complaint(path) == f"{path} has the splits fit, check; choose one of them with split"
    assert complaint(path, split="train[:2]") == f"{path} has no split 'train'; it has: fit, check"


CARD = """---
configs:
- config_name: en
  data_files: en.jsonl
- config_name: de
  data_files: de.jsonl
---
# Greetings
"""


def test_a_repository_loads_as_its_card_says(write: Callable, tmp_path: Path) -> None:
    write("README.md", CARD)
    write("en.jsonl", '{"text": "hello"}\n')
    write("de.jsonl", '{"text": "hallo"}\n')
    assert texts(tmp_path, config="de") == ["hallo"]
    assert load_source(str(tmp_path), config="en").name == f"{tmp_path}, config en"
    assert re.search(r"\['en', 'de'\]$", complaint(tmp_path))
    assert re.search(r"'fr' not found.*\['en', 'de'\]$", complaint(tmp_path, config="fr"))
    write("de.jsonl", '{"text": "hallo"}\n{"text": "Welt"')
    assert f"{tmp_path}/de.jsonl, line 2: not valid JSON" in complaint(tmp_path, config="de")


def test_a_hub_dataset_loads_offline_from_the_cache_but_only_the_commit_asked_for(write: Callable, cache: Path) -> None:
    path = write("chats/train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    datasets.load_dataset(str(Path(path).parent), cache_dir=cache)
    (made,) = (cache / "chats").glob("*/0.0.0/*/dataset_info.json")
    commits = ["1" * 40, "2" * 40]
    sources = []
    for commit in commits:
        kept = cache / "someone___chats" / "default" / "0.0.0" / commit
        shutil.copytree(made.parent, kept)
        info = json.loads(made.read_text()) | {"config_name": "default"}
        (kept / "dataset_info.json").write_text(json.dumps(info))
        sources.append(load_source("someone/chats", split="train[1:]", revision=commit))
        assert sources[-1].rows.to_list() == [{"text": "b"}]
        refused = complaint("someone/chats", revision="v1.0")
        assert refused.endswith(f"revision 'v1.0' is not known offline; the latest commit in the cache is {commit}")
        shutil.rmtree(kept.parent)
    assert [source.name for source in sources] == ["someone/chats, split train[1:]"] * 2
    assert sources[0].fingerprint != sources[1].fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# Splits and folders


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.txt", "valid.txt", "test.txt"], {"train": ["train"], "validation": ["valid"], "test": ["test"]}),
        (["test/a.txt", "train/b.txt", "train/c.txt"], {"test": ["a"], "train": ["b", "c"]}),
        (["train-1.txt", "train-2.txt", "dev.txt"], {"train": ["train-1", "train-2"], "validation": ["dev"]}),
        (
            ["data/fit-00000-of-00002.txt", "data/fit-00001-of-00002.txt"],
            {"fit": ["fit-00000-of-00002", "fit-00001-of-00002"]},
        ),
        (["b.txt", "sub/a.txt", "acid_test.txt"], {"train": ["acid_test", "b", "a"]}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_files_form_splits_where_their_names_say_so(
    write: Callable, tmp_path: Path, files: list[str], splits: dict[str, list[str]]
) -> None:
    for file in files:
        write(file, Path(file).stem)
    write("README.md", "Not a row.")
    write(".git/x.txt", "Not a row.")
    write("notes.pdf", "Not a row.")
    for split, expected in splits.items():
        assert texts(tmp_path, split=split) == expected
    if len(splits) == 1:
        assert texts(tmp_path) == next(iter(splits.values()))
    elif "train" in splits:
        assert texts(tmp_path) == splits["train"]


def test_splits_can_be_sliced_and_added(write: Callable, tmp_path: Path) -> None:
    write("train.txt", "\n".join("abcdefghij"))
    write("test.txt", "x\ny")
    for split, expected in {
        "train[:3]": "abc",
        "train[-2:]": "ij",
        "train[:20%]": "ab",
        "train[:1000]": "abcdefghij",
        "test + train[8:]": "xyij",
        "train[:1]+train[2:3]": "ac",
    }.items():
        assert texts(tmp_path, split=split) == list(expected)


def test_a_name_says_what_was_chosen(write: Callable, tmp_path: Path) -> None:
    path = write("train.txt", "a\nb")
    assert load_source(path).name == path
    assert load_source(path, split="train[:1]").name == f"{path}, split train[:1]"
    write("test.txt", "c")
    assert load_source(str(tmp_path)).name == f"{tmp_path}, split train"


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


def test_a_fingerprint_is_of_the_content_wherever_it_lies(write: Callable, tmp_path: Path) -> None:
    first, second = write("a.txt", "one\ntwo"), write("b/c.md", "one\ntwo")
    os.utime(second, (0, 0))
    assert load_source(first).fingerprint == load_source(second).fingerprint
    assert load_source(first).fingerprint == load_source(first, split="train").fingerprint
    shutil.copytree(tmp_path / "b", tmp_path / "d")
    assert load_source(str(tmp_path / "b")).fingerprint == load_source(str(tmp_path / "d")).fingerprint


def test_a_fingerprint_differs_with_everything_that_changes_the_rows(write: Callable, tmp_path: Path) -> None:
    content = "a\nb\n"
    path = write("a.txt", content)
    others = [write("b.txt", "a\nc\n"), write("c.csv", content), write("d/1.txt", "a\n"), write("d/2.txt", "b\n")]
    sources: list[Source] = [load_source(file) for file in [path, *others]]
    sources += [load_source(path, split="train[:1]"), load_source(path, whole_files=True)]
    sources.append(load_source(str(tmp_path / "d")))
    assert len({source.fingerprint for source in sources}) == len(sources)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_changed_file_is_read_again_though_its_time_is_not_changed(tmp_path: Path, name: str) -> None:
    file, fingerprints = tmp_path / name, set()
    for text in "ab":
        table = datasets.Dataset.from_dict({"text": [text]})
        table.to_parquet(file) if name.endswith("parquet") else table.to_json(file)
        os.utime(file, (0, 0))
        assert texts(file) == [text]
        fingerprints.add(load_source(str(file)).fingerprint)
    assert len(fingerprints) == 2


def test_rows_are_converted_once(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", '{"once": "only"}\n')
    expected = rows(path)
    monkeypatch.setattr("ptp.data.sources.read_rows", None)
    assert rows(path) == expected


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used


@pytest.mark.parametrize("path", ["nowhere.jsonl", "nowhere.txt.gz", "./nowhere", "a/b/nowhere"])
def test_a_file_that_is_not_there_is_said_to_be_missing(path: str) -> None:
    assert complaint(path, whole_files=True) == f"no such file or folder: {path}"


@pytest.mark.parametrize("name", ["someone/nothing", "nothing", "not a name/of a dataset"])
def test_what_is_neither_here_nor_on_the_hub_is_said_so_at_once(name: str) -> None:
    assert f"'{name}' is neither a local path nor a dataset that the hub gives" in complaint(name)


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n{"a": 3}\n', 3, "not valid JSON (Expecting ',' delimiter, column 8)"),
        ("a.jsonl", '{"a": 1}\n{"a": 2} {"a": 3}\n', 2, "not valid JSON (Extra data, column 10)"),
        ("a.jsonl", '{"a": 1}\n{"a": ', 2, "not valid JSON (Expecting value, column 6)"),
        ("a.jsonl", '{\n  "a": 1\n}\n', 1, "not valid JSON (Expecting property name enclosed in double quotes, col"),
        ("a.jsonl.gz", "{'a': 1}\n", 1, "not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("a.json", '[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', 4, "not valid JSON (Expecting ',' or ']', column 1)"),
        ("a.json", '\n[{"a": 1},\n{"a": }]', 3, "not valid JSON (Expecting value, column 7)"),
        ("a.json", '[{"a": 1}]\n\n[]', 3, "not valid JSON (Extra data, column 1)"),
        ("a.json", '[{"a": 1}', 1, "not valid JSON (Expecting ',' or ']', column 10)"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', 2, "expected a JSON object; got list"),
        ("a.json", '[{"a": 1},\n "b"]', 2, "expected a JSON object; got str"),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', 2, "not valid JSON (half of a surrogate pair is no character"),
        ("a.jsonl", '{"a": 1}\n{"a": 9223372036854775808}\n', 2, "not valid JSON (9223372036854775808 does not fit in"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', 2, "not UTF-8 (invalid continuation byte, byte 10 of the line)"),
        ("a.txt", "a".encode("utf-16"), 1, "not UTF-8 (invalid start byte"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", 3, "3 cells; the header has 2"),
        ("a.csv", 'a,b\n1,"2\n3\n4', 4, "not valid CSV (unexpected end of data)"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named_by_its_line(
    write: Callable, name: str, content: str | bytes, line: int, reason: str
) -> None:
    path = write(name, content)
    assert complaint(path).startswith(f"{path}, line {line}: {reason}")
    # Nothing of it is kept: the next attempt reads the file again.
    assert complaint(path).startswith(f"{path}, line {line}: {reason}")


def test_a_malformed_file_of_a_folder_is_named(write: Callable, tmp_path: Path) -> None:
    write("1.jsonl", '{"a": 1}')
    path = write("2.jsonl", "[")
    assert complaint(tmp_path).startswith(f"{path}, line 1: not valid JSON")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "a,b,a\n1,2,3\n", "two columns have the same name; the header is a, b, a"),
        ("a.jsonl.gz", b'{"a": 1}', "cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "cannot be read: Compressed file ended"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-8] + bytes(8), "cannot be read: CRC check failed"),
        ("a.parquet", b"PAR1 and no more", "not a readable parquet file (Parquet magic bytes not found"),
        ("a.parquet", b"", "not a readable parquet file (Parquet file size is 0 bytes)"),
        ("a.arrow", b"no arrow", "cannot be loaded: "),
        ("a.xlsx", b"", "unknown kind of file '.xlsx'; expected .json, .jsonl, .csv, .txt, .md, .parquet, .arrow"),
        ("a.parquet.gz", b"", "unknown kind of file '.parquet.gz'; expected .json"),
        ("LICENSE", b"", "unknown kind of file ''; expected .json"),
    ],
)
def test_what_cannot_be_read_is_refused(write: Callable, name: str, content: bytes | str, reason: str) -> None:
    path = write(name, content)
    assert complaint(path).replace(":", "", 1).startswith(f"{path} {reason}".replace(":", "", 1))


def test_a_damaged_arrow_directory_is_refused(table: Any, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    assert f"{tmp_path / 'saved'}: not a readable arrow directory (" in complaint(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", " \n\n"),
        ("a.jsonl", "\n"),
        ("a.json", "[ ]"),
        ("a.jsonl", "{}\n{}\n"),
        ("a.csv", "a,b\n"),
        ("a.md", ""),
    ],
)
def test_data_without_rows_is_refused(write: Callable, name: str, content: str) -> None:
    path = write(name, content)
    assert complaint(path) == f"{path} holds no rows"


def test_a_choice_without_rows_is_refused(write: Callable) -> None:
    path = write("a.txt", "one\ntwo")
    assert complaint(path, split="train[2:]") == f"{path}, split train[2:] holds no rows"
    assert complaint(path, split="test") == f"{path} has no split 'test'; it has: train"
    assert f"{path}: split 'train[1' cannot be taken (" in complaint(path, split="train[1")
    assert f"{path}: split 'train[:900%]' cannot be taken (" in complaint(path, split="train[:900%]")


def test_folders_that_could_be_read_in_two_ways_are_refused(write: Callable, tmp_path: Path) -> None:
    assert complaint(tmp_path).startswith(f"{tmp_path} holds no data files; expected .json")
    write("test.txt", "a")
    write("more.txt", "b")
    says = f"{tmp_path}/test.txt says which split it holds, {tmp_path}/more.txt does not"
    assert complaint(tmp_path) == f"{says}; name one file, or move them apart"
    write("rows.jsonl", "{}")
    assert f"{tmp_path} mixes kinds of files: text (2), JSON (1); name one file" in complaint(tmp_path)


def test_settings_without_a_use_are_refused(write: Callable, table: Any, tmp_path: Path) -> None:
    path = write("a.jsonl", '{"a": 1}')
    table.save_to_disk(tmp_path / "saved")
    for local in (path, str(tmp_path / "saved")):
        refused = complaint(local, ConfigError, config="en")
        assert refused == f"config is for repositories with configurations; {local} is none"
    assert complaint(path, ConfigError, revision="v1") == f"revision is for datasets of the hub; {path} is local"


def test_a_full_disk_is_said_so_and_leaves_nothing_behind(write: Callable, cache: Path) -> None:
    path = write("a.txt", "\n".join(f"line {number}" for number in range(20_000)))
    before, limits = set(cache.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert complaint(path).startswith(f"cannot write {cache}/ptp/")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(cache.rglob("*")) == before
    assert len(texts(path)) == 20_000


def test_progress_bars_are_off_while_loading_and_back_afterwards(
    table: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table.to_parquet(tmp_path / "a.parquet")
    datasets.enable_progress_bars()
    capfd.readouterr()
    try:
        load_source(str(tmp_path / "a.parquet"))
        complaint(tmp_path / "a.parquet", split="nowhere")
        assert capfd.readouterr() == ("", "")
        assert not datasets.utils.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()
    load_source(str(tmp_path / "a.parquet"))
    assert datasets.utils.are_progress_bars_disabled()
