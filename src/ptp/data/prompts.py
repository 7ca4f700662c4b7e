"""Prompts from local files, and the split that holds some of them out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ptp.errors import DataError

VALIDATION_SHARE = 20
"""One prompt in this many is held out for validation."""


def read_rows(path: Path) -> list[dict[str, object]]:
    """Rows of a .jsonl file, or of a .txt file with one prompt a line (column "text").

    Raises `DataError` for a missing, empty or malformed file, naming the line.
    """
    if not path.is_file():
        raise DataError(f"no such dataset file: {path}; expected a .jsonl or .txt file")
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f"{path}: expected a .jsonl or .txt file; got '{path.suffix}'")
    rows: list[dict[str, object]] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            rows.append({"text": line})
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object; got {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def format_prompts(rows: Sequence[dict[str, object]], scheme: str) -> list[str]:
    """Fill a prompt scheme, a Python format string over the columns, with each row."""
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(scheme.format_map(row))
        except KeyError as missing:
            columns = ", ".join(sorted(row))
            raise DataError(f"row {number} has no column {missing} for the prompt scheme; it has: {columns}") from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise DataError(f"the prompt scheme {scheme!r} is not a format string over the columns: {error}") from None
    return prompts


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int) -> dict[int, list[int]]:
    """Token ids of every prompt of 1 … max_tokens tokens, by its place in `prompts`; the others are left out."""
    encoded = tokenizer(list(prompts))["input_ids"]
    kept = {place: ids for place, ids in enumerate(encoded) if 0 < len(ids) <= max_tokens}
    if not kept:
        raise DataError(f"none of {len(prompts)} prompts has 1 to {max_tokens} tokens; raise max_prompt_tokens")
    return kept


def validation_places(prompts: Sequence[str]) -> set[int]:
    """Places of the held-out prompts: those of the smallest content hashes, one in twenty, at least one of two.

    Equal prompts have equal hashes and are held out together, or not at all.
    """
    hashes = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        return set()
    rows, room = Counter(hashes), max(1, len(prompts) // VALIDATION_SHARE)
    # Prompts too frequent to fit come last: one is taken only if there is nothing else.
    ordered = sorted(distinct, key=lambda digest: (rows[digest] > room, digest))
    held_out = {ordered[0]}
    room -= rows[ordered[0]]
    for digest in ordered[1:]:
        if rows[digest] <= room:
            held_out.add(digest)
            room -= rows[digest]
    return {place for place, digest in enumerate(hashes) if digest in held_out}
