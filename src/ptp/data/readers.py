"""JSON, CSV and text files → rows as they were written → one memory-mapped Arrow file.

`datasets` would make a time of a string that looks like one, the number 7 of the cell 007, the number 42 of the message
"42" where other messages are lists, and would give one message the keys that another has. Here scalars of one type are
a column of that type, everything else is a column of JSON text that `datasets` decodes on access (fractions in it to
15 digits), and a CSV cell is text. What is malformed is named by file and line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptp.errors import DataError
from ptp.files import appearing

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = dict[str, Any]

LINE_KINDS = ("JSON", "CSV", "text")
"""Kinds of files that are read here; each may be gzipped."""

READER_VERSION = 1
"""To be raised when the same bytes give other rows: Arrow files are found by a hash of both."""

BATCH_ROWS, BATCH_CHARACTERS = 10_000, 1 << 23
"""An Arrow batch is written when it holds so much."""

LONGEST_CELL = (1 << 31) - 1
"""Characters of a CSV cell: the largest limit that every platform takes."""


def read_rows(files: Iterable[Path], kind: str, whole_files: bool = False) -> Iterator[Row]:
    """Rows of files of one of the `LINE_KINDS`, in order. whole_files: a text file is one row, not a row per line.

    Lines and files of blanks only are no rows. Raises `DataError`, naming file and line, for what cannot be read.
    """
    for file in files:
        if kind == "JSON":
            yield from _json_rows(file)
        elif kind == "CSV":
            yield from _csv_rows(file)
        elif whole_files:
            text = "".join(line for _, line in _lines(file)).replace("\r\n", "\n")
            yield from [{"text": text}] if text.strip() else []
        else:
            yield from ({"text": line.rstrip("\r\n")} for _, line in _lines(file) if line.strip())


def as_dataset(read: Callable[[], Iterable[Row]], file: Path) -> Dataset:
    """The rows in an Arrow file, which is written if it is not there: read once for the columns, once for the cells."""
    import pyarrow as pa
    from datasets import Dataset

    if not file.exists():
        features = _features(read())
        schema = features.arrow_schema
        with (
            appearing(file) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            for columns in _batches(read(), features):
                arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    return Dataset.from_file(str(file))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; only a newline ends one."""
    number = 0
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, line {number}: not UTF-8 ({error.reason}, byte {error.start} of the line)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _json_rows(file: Path) -> Iterator[Row]:
    """The objects of a list, or one of each line."""
    lines, started = _lines(file), False
    for number, line in lines:
        if not started and line.lstrip().startswith("["):
            yield from _list_items(file, line + "".join(rest for _, rest in lines), number)
        elif line.strip():
            started, line = True, line.rstrip()
            row, end = _object(file, line, 0, number)
            if end < len(line):
                raise _malformed(file, line, end, number, "Extra data")
            yield row


def _list_items(file: Path, text: str, first_line: int) -> Iterator[Row]:
    place = _skip_blanks(text, text.index("[") + 1)
    more = not text.startswith("]", place)
    while more:
        row, place = _object(file, text, place, first_line)
        yield row
        more = text.startswith(",", place)
        place += more
    if not text.startswith("]", place):
        raise _malformed(file, text, place, first_line, "Expecting ',' or ']'")
    end = _skip_blanks(text, place + 1)
    if end < len(text):
        raise _malformed(file, text, end, first_line, "Extra data")


def _object(file: Path, text: str, place: int, first_line: int) -> tuple[Row, int]:
    """The object at a place of a text whose first line has this number, and the place of what follows."""
    place = _skip_blanks(text, place)
    try:
        value, end = _DECODER.raw_decode(text, place)
        if _SURROGATE.search(text, place, end):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _malformed(file, text, error.pos, first_line, error.msg) from None
    except UnicodeEncodeError:
        raise _malformed(file, text, place, first_line, "half of a surrogate pair is no character") from None
    except (ValueError, RecursionError) as error:
        raise _malformed(file, text, place, first_line, str(error)) from None
    if not isinstance(value, dict):
        line = first_line + text.count("\n", 0, place)
        raise DataError(f"{file}, line {line}: expected a JSON object; got {type(value).__name__}")
    return value, _skip_blanks(text, end)


def _malformed(file: Path, text: str, place: int, first_line: int, reason: str) -> DataError:
    line, column = first_line + text.count("\n", 0, place), place - text.rfind("\n", 0, place)
    expected = "expected an object per line or a list of objects"
    return DataError(f"{file}, line {line}: not valid JSON ({reason}, column {column}); {expected}")


def _skip_blanks(text: str, place: int) -> int:
    blanks = _BLANKS.match(text, place)
    assert blanks is not None  # No blanks match as well.
    return blanks.end()


def _whole_number(digits: str) -> int:
    number = int(digits)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{textwrap.shorten(digits, 30)} does not fit in 64 bits")
    return number


_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder(parse_int=_whole_number)


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def _csv_rows(file: Path) -> Iterator[Row]:
    # The limit that the library starts with is shorter than a chapter.
    csv.field_size_limit(LONGEST_CELL)
    # Strict: an open quotation mark is an error, not a cell with the rest of the file.
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    rows = (cells for cells in reader if cells)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"{file}: two columns have the same name; the header is {', '.join(header)}")
        for cells in rows:
            if len(cells) != len(header):
                raise DataError(f"{file}, line {reader.line_num}: {len(cells)} cells; the header has {len(header)}")
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not valid CSV ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rows → Arrow


def _features(rows: Iterable[Row]) -> Features:
    """Columns in order of appearance; what is not of one scalar type is JSON."""
    from datasets import Features, Json, Value

    types: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            types.setdefault(name, set()).add(type(value))
    scalars = {str: "string", int: "int64", float: "float64", bool: "bool"}
    features = {}
    for name, found in types.items():
        dtypes = [scalars.get(kind) for kind in found - {type(None)}]
        features[name] = Value(dtypes[0]) if len(dtypes) == 1 and dtypes[0] else Json()
    return Features(features)


def _batches(rows: Iterable[Row], features: Features) -> Iterator[list[list[Any]]]:
    """The columns of some rows at a time, cell by cell as Arrow stores them."""
    from datasets import Json

    is_json = [isinstance(feature, Json) for feature in features.values()]
    columns: list[list[Any]] = [[] for _ in features]
    characters = 0
    for row in rows if columns else ():
        for column, name, encode in zip(columns, features, is_json, strict=True):
            value = row.get(name)
            cell = json.dumps(value, ensure_ascii=False) if encode and value is not None else value
            column.append(cell)
            characters += len(cell) if isinstance(cell, str) else 1
        if characters >= BATCH_CHARACTERS or len(columns[0]) >= BATCH_ROWS:
            yield columns
            columns, characters = [[] for _ in features], 0
    if any(columns):
        yield columns
