"""A generated text in pieces, one per token, coloured by the model call that wrote it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ptp.decoding.decoder import Generation


@dataclass(frozen=True)
class Piece:
    """The text of one token. call: which call wrote it, from 1. accepted: an accepted draft, else the bonus token."""

    text: str
    call: int
    accepted: bool


@dataclass(frozen=True)
class Sample:
    """One generated text. lossless: it equals what plain decoding wrote with the same u."""

    prompt: str
    pieces: list[Piece]
    tokens_per_call: float
    num_calls: int
    lossless: bool


class Hue(NamedTuple):
    """Colours of one call: the tint behind its tokens and the line under its bonus token."""

    tint: str
    line: str


# Cool and warm take turns, so that neighbouring calls differ for colour-blind readers too.
LIGHT_HUES = (
    Hue("#d6e6fb", "#3f7fd0"),
    Hue("#fde9c4", "#c98a12"),
    Hue("#d2efdf", "#2f9a6a"),
    Hue("#f6dcea", "#c2569a"),
)
DARK_HUES = (
    Hue("#1c3758", "#6ba6f0"),
    Hue("#493813", "#dca63c"),
    Hue("#183f2f", "#55c48f"),
    Hue("#4b253d", "#e584bd"),
)

PROMPT_LINES = 12
"""Lines of a prompt shown before its text; earlier ones only set the scene."""


def hue_index(call: int) -> int:
    """Which of the hues call 1, 2, … wears."""
    return (call - 1) % len(LIGHT_HUES)


def pieces(generation: Generation, decode: Callable[[list[int]], str]) -> list[Piece]:
    """Split a generation's text by token. decode: the text of a list of token ids.

    A byte-level token may hold part of a character, so no token is decoded alone: its text is what it adds to the
    stretch that the text so far shares with the whole. A character is thus held back until its last byte is there;
    the tokens before it are empty, and the pieces always join to decode(token_ids).

    "né" from the bytes n, C3, A9: the texts so far are "n", "n�", "né"; the pieces "n", "", "é".
    """
    text = decode(generation.token_ids)
    found: list[Piece] = []
    token_ids: list[int] = []
    end = 0
    for call, step in enumerate(generation.steps, start=1):
        for index, token in enumerate(step.token_ids):
            token_ids.append(token)
            start, end = end, end + _num_shared(decode(token_ids)[end:], text[end:])
            found.append(Piece(text[start:end], call, index < step.num_accepted))
    return found


def _num_shared(one: str, other: str) -> int:
    """How many characters two texts share from their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def printable(text: str) -> str:
    """The text with what HTML or XML cannot hold replaced: control characters by pictures (␀, ␛), the rest by �."""
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]",
        lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\N{REPLACEMENT CHARACTER}",
        text,
    )


def split_prompt(prompt: str, num_lines: int) -> tuple[str, str]:
    """(earlier lines, last num_lines lines) of a prompt."""
    lines = prompt.splitlines(keepends=True)
    return "".join(lines[:-num_lines]), "".join(lines[-num_lines:])


# The picture's measures in pixels; a cell is one monospace character, 0.6 of the font size in nearly every font.
_FONT_SIZE = 14
_CELL = 0.6 * _FONT_SIZE
_ROW = 24
_PATCH = 20
_MARGIN = 24
_HEADER = 60
_FOOTER = 50
_MIN_COLUMNS = 74
_MAX_COLUMNS = 92
_PROMPT_CALL = 0


def coloured_svg(sample: Sample) -> str:
    """A picture of one text, coloured by call, with a legend: an SVG file on its own light or dark card."""
    earlier, prompt = split_prompt(printable(sample.prompt), PROMPT_LINES)
    text = [Piece("…\n" * bool(earlier) + prompt, _PROMPT_CALL, True), *sample.pieces]
    runs = list(_runs(text))
    columns = max([_MIN_COLUMNS, *(run.end for run in runs)])
    num_rows = max((run.row for run in runs), default=0) + 1
    width = round(2 * _MARGIN + columns * _CELL)
    height = _HEADER + num_rows * _ROW + _FOOTER

    num_tokens = len(sample.pieces)
    said = f"{num_tokens} tokens in {sample.num_calls} calls: {sample.tokens_per_call:.2f} tokens per call"
    verdict = (
        f"Plain decoding writes the same text in {num_tokens} calls."
        if sample.lossless
        else "This text differs from plain decoding."
    )
    body = [
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        *_legend(),
        *_patches(runs),
        *(_text(run) for run in runs),
        f'<line class="rule" x1="{_MARGIN}" x2="{width - _MARGIN}" y1="{height - 42.5}" y2="{height - 42.5}"/>',
        f'<text class="strong" x="{_MARGIN}" y="{height - 17}">{said}</text>',
        f'<text class="{"note" if sample.lossless else "bad"}" x="{width - _MARGIN}" y="{height - 17}" '
        f'text-anchor="end">{verdict}</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{said}. {verdict}">\n<style>{_STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class _Run:
    """Characters of one piece on one row of the picture. mark: it stands for a line break."""

    row: int
    column: int
    text: str
    call: int
    accepted: bool
    mark: bool = False

    @property
    def end(self) -> int:
        return self.column + _num_cells(self.text)


def _num_cells(text: str) -> int:
    """Cells a text takes: two for wide characters (CJK, emoji), none for marks that join the one before."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def _runs(text: Sequence[Piece]) -> Iterator[_Run]:
    """Lay the pieces out in rows, breaking long lines before a word, and words longer than a row anywhere."""
    row = column = 0
    for piece in text:
        for word in re.findall(r"\n|[^\S\n]*[^\s]+|[^\S\n]+", printable(piece.text).expandtabs(4)):
            if word == "\n":
                if piece.call != _PROMPT_CALL:
                    yield _Run(row, column, "↵", piece.call, piece.accepted, mark=True)
                row, column = row + 1, 0
                continue
            if column and column + _num_cells(word) > _MAX_COLUMNS:
                row, column, word = row + 1, 0, word.lstrip()
            while word:
                fits = next((n for n in range(len(word), 1, -1) if column + _num_cells(word[:n]) <= _MAX_COLUMNS), 1)
                run = _Run(row, column, word[:fits], piece.call, piece.accepted)
                yield run
                word = word[fits:]
                row, column = (row + 1, 0) if word else (row, run.end)


def _top(row: int) -> float:
    return _HEADER + row * _ROW + (_ROW - _PATCH) / 2


def _patches(runs: Sequence[_Run]) -> Iterator[str]:
    """One tinted patch per call and row, and a line under the bonus token."""
    for (call, row), group in groupby(runs, key=lambda run: (run.call, run.row)):
        if call == _PROMPT_CALL:
            continue
        patch = list(group)
        yield _patch(call, _MARGIN + patch[0].column * _CELL, _top(row), (patch[-1].end - patch[0].column) * _CELL)
        bonus = [run for run in patch if not run.accepted]
        if bonus:
            left, right = bonus[0].column * _CELL, bonus[-1].end * _CELL
            yield _underline(call, _MARGIN + left, _top(row), right - left)


def _patch(call: int, x: float, y: float, width: float) -> str:
    # Half a pixel short on both sides: neighbouring patches stay apart.
    size = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{_PATCH}"'
    return f'<rect class="tint{hue_index(call)}" {size} rx="3"/>'


def _underline(call: int, x: float, y: float, width: float) -> str:
    size = f'x="{x + 1:.1f}" y="{y + _PATCH - 2:.1f}" width="{width - 2:.1f}" height="2"'
    return f'<rect class="line{hue_index(call)}" {size}/>'


def _text(run: _Run) -> str:
    word = run.text.lstrip()
    if not word:
        return ""
    x = _MARGIN + (run.end - _num_cells(word)) * _CELL
    kind = "mark" if run.mark else "prompt" if run.call == _PROMPT_CALL else "code"
    # textLength keeps the words on their patches whatever monospace font the reader has.
    fitted = f'textLength="{_num_cells(word) * _CELL:.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve"'
    return f'<text class="{kind}" x="{x:.1f}" y="{_top(run.row) + 14.5:.1f}" {fitted}>{escape(word)}</text>'


def _legend() -> Iterator[str]:
    top = 20
    for call in range(1, 5):
        yield _patch(call, _MARGIN + 20 * (call - 1), top, 20)
    yield f'<text class="note" x="{_MARGIN + 90}" y="{top + 14.5}">one colour per model call</text>'
    yield _patch(1, _MARGIN + 290, top, 20)
    yield _underline(1, _MARGIN + 290, top, 20)
    yield f'<text class="note" x="{_MARGIN + 320}" y="{top + 14.5}">underlined: the call’s bonus token</text>'


def _hue_css(hues: Sequence[Hue]) -> str:
    return "".join(f".tint{i}{{fill:{hue.tint}}}.line{i}{{fill:{hue.line}}}" for i, hue in enumerate(hues))


_STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1c2128}"
    f".code,.prompt,.mark{{font:{_FONT_SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}"
    ".card{fill:#fff;stroke:#d9dde3}.rule{stroke:#e6e9ed}.prompt,.note{fill:#68707b}.mark{fill:#8d95a0}"
    f".strong{{font-weight:600}}.bad{{fill:#c0262d;font-weight:600}}{_hue_css(LIGHT_HUES)}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e8ed}.card{fill:#12161c;stroke:#2d343d}.rule{stroke:#262c34}"
    f".prompt,.note{{fill:#8f98a4}}.mark{{fill:#7b8591}}.bad{{fill:#ff7b72}}{_hue_css(DARK_HUES)}}}"
)
