"""The self-contained web page of an experiment: numbers, texts coloured by call, plots, settings.

Data in, one HTML string out: nothing here loads a model, and the page loads nothing from anywhere.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from markupsafe import escape as escape_html

from ptp.evaluation.colour import (
    DARK_HUES,
    LIGHT_HUES,
    PROMPT_LINES,
    Piece,
    Sample,
    coloured_svg,
    hue_index,
    pieces,
    printable,
    split_prompt,
)

__all__ = ["Piece", "Report", "Sample", "Speed", "coloured_svg", "pieces", "render", "write_report"]

NUM_OPEN_SAMPLES = 3
"""Texts unfolded when the page opens; a text that differs from plain decoding always is."""


@dataclass(frozen=True)
class Speed:
    """How fast one way of decoding is. tokens_per_second: the median over prompts. spread: its quartiles."""

    name: str
    tokens_per_second: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    tokens_per_call: τ, bonus tokens included. tokens_per_call_simulated: τ foreseen from the validation windows.
    speedup: wall clock against plain decoding, mean over prompts. overhead: τ / speedup − 1.
    num_prompts: texts compared with plain decoding; of these num_near_ties differ only where u lies within rounding
    error of an interval's edge, and num_mismatches differ otherwise.
    accepted_per_call: accepted tokens of every call. accuracy_by_index: share of right tokens by window index.
    speeds: plain decoding first. curves: of each figure, by its title, the (step, value) of each line, by its name.
    settings: key → value by section.
    """

    title: str
    model: str
    hardware: str
    date: str
    tokens_per_call: float
    tokens_per_call_simulated: float | None
    speedup: float
    overhead: float
    num_prompts: int
    num_mismatches: int
    num_near_ties: int
    samples: list[Sample]
    accepted_per_call: list[int]
    accuracy_by_index: list[float]
    speeds: list[Speed]
    curves: dict[str, dict[str, list[tuple[int, float]]]]
    settings: dict[str, dict[str, str]]


def render(report: Report) -> str:
    """The page, as HTML that needs no other file."""
    environment = Environment(
        loader=PackageLoader("ptp.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = _html_text
    environment.filters["by_call"] = _by_call
    environment.filters["split_prompt"] = split_prompt
    environment.filters["preview"] = _preview
    environment.filters["signed_percent"] = lambda share: f"{share:.0%}".replace("-", "−")
    accepted = report.accepted_per_call
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report),
        mean_accepted=sum(accepted) / len(accepted) if accepted else None,
        accepted_plot=accepted_plot(accepted) if accepted else None,
        accuracy_plot=accuracy_plot(report.accuracy_by_index) if report.accuracy_by_index else None,
        curve_plots={
            title: curve_plot(lines)
            for title, lines in report.curves.items()
            if any(_finite(points) for points in lines.values())
        },
        speed_scale=max((speed.spread[1] for speed in report.speeds), default=0) or 1,
        light_hues=LIGHT_HUES,
        dark_hues=DARK_HUES,
        num_open_samples=NUM_OPEN_SAMPLES,
        prompt_lines=PROMPT_LINES,
        box=PlotBox,
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(render(report), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Verdict:
    """Whether decoding was lossless. tone: "good", "near" or "bad", the colour of headline and finding."""

    tone: str
    headline: str
    finding: str
    remark: str = ""


def verdict(report: Report) -> Verdict:
    """The lossless check in words; near-ties never soften a mismatch, and are never passed over."""
    total, mismatches, ties = report.num_prompts, report.num_mismatches, report.num_near_ties
    tied = f"{ties} {_differ(ties)} only at near-ties: u within rounding error of an interval’s edge." if ties else ""
    if mismatches:
        return Verdict(
            "bad", "Not lossless", f"{mismatches} of {total} texts {_differ(mismatches)} from plain decoding.", tied
        )
    if not total:
        return Verdict("near", "Not checked", "No text was compared with plain decoding.")
    if ties:
        return Verdict(
            "near", "Lossless up to rounding", f"{total - ties} of {total} texts identical to plain decoding.", tied
        )
    return Verdict("good", "Lossless", f"All {total} texts identical to plain decoding.")


def _differ(number: int) -> str:
    return "differs" if number == 1 else "differ"


# Texts


@dataclass(frozen=True)
class CallPieces:
    """The pieces one call wrote. hue: which colour they wear."""

    call: int
    hue: int
    pieces: list[Piece]


def _by_call(pieces: Sequence[Piece]) -> Iterator[CallPieces]:
    """Pieces that show something, call by call."""
    for call, group in groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.call):
        yield CallPieces(call, hue_index(call), list(group))


def _html_text(text: str, mark_breaks: bool = False) -> Markup:
    """Escaped text. mark_breaks: show line breaks as ↵ (drawn by the style sheet, so not copied with the text)."""
    line_break = Markup("<i></i>\n") if mark_breaks else Markup("\n")
    return line_break.join(escape_html(line) for line in printable(text).split("\n"))


def _preview(sample: Sample) -> str:
    """One line by which to tell the samples apart in a list: how the prompt begins, or else the text."""
    start = sample.prompt.strip() or "".join(piece.text for piece in sample.pieces)
    return printable(" ".join(start[:200].split()))


# Plots: measures and labels here, the drawing in the template


class PlotBox:
    """The SVG's size and the frame of its data, in its own units."""

    width, height = 420, 230
    left, right, top, bottom = 44, 410, 12, 186


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Point:
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """A quantity over training steps. last: its last value. tone, opacity: what tells it from the other lines."""

    name: str
    points: list[Point]
    last: str
    tone: str
    opacity: float


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Plot:
    """One drawing: its axes and either bars or lines."""

    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar]
    lines: list[Line]

    @property
    def named_lines(self) -> list[Line]:
        """Both of two lines; of more, which fade from the first to the last, these two."""
        return self.lines if len(self.lines) <= 2 else [self.lines[0], self.lines[-1]]


def accepted_plot(accepted_per_call: Sequence[int]) -> Plot:
    """Share of calls by how many drafts they accepted."""
    counts, total = Counter(accepted_per_call), len(accepted_per_call)
    shares = [counts[number] / total for number in range(max(accepted_per_call) + 1)]
    titles = [f"{n} accepted: {counts[n]} of {total} calls, {share:.1%}" for n, share in enumerate(shares)]
    return _bar_plot(shares, titles, "accepted tokens in a call", max(shares))


def accuracy_plot(accuracy_by_index: Sequence[float]) -> Plot:
    """Share of right tokens by window index; an index that was not measured (NaN) has no bar."""
    known = [accuracy if math.isfinite(accuracy) else None for accuracy in accuracy_by_index]
    titles = [
        f"index {k}: {'not measured' if share is None else f'{share:.1%} right'}" for k, share in enumerate(known)
    ]
    return _bar_plot([share or 0.0 for share in known], titles, "window index", 1.0)


def _bar_plot(shares: Sequence[float], titles: Sequence[str], x_label: str, top_share: float) -> Plot:
    y_values = ticks(0, top_share)
    slot = (PlotBox.right - PlotBox.left) / len(shares)
    gap = min(0.25 * slot, 6)
    bars = [
        Bar(
            PlotBox.left + k * slot + gap / 2,
            _y(share, y_values),
            slot - gap,
            PlotBox.bottom - _y(share, y_values),
            title,
        )
        for k, (share, title) in enumerate(zip(shares, titles, strict=True))
    ]
    stride = max(1, math.ceil(len(shares) / 17))
    x_ticks = [Tick(PlotBox.left + (k + 0.5) * slot, str(k)) for k in range(0, len(shares), stride)]
    # A rare top bar may need percents with a decimal: 0.5%, 1.0%.
    decimals = 0 if y_values[1] - y_values[0] >= 0.01 else 1
    y_ticks = [Tick(_y(value, y_values), f"{value:.{decimals}%}") for value in y_values]
    return Plot(x_label, x_ticks, y_ticks, bars, lines=[])


FAINTEST = 0.2
"""Opacity of the last of many lines."""


def curve_plot(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Plot:
    """Quantities over training steps, by name; two lines differ in colour, of more each is fainter than the last."""
    kept = {name: finite for name, points in curves.items() if (finite := _finite(points))}
    steps = [step for points in kept.values() for step, _ in points]
    values = [value for points in kept.values() for _, value in points]
    x_values = ticks(min(0, *steps), max(1, *steps), 4)
    x_low, x_high = x_values[0], max(1, *steps)
    y_values = ticks(min(values), max(values))

    def x_at(step: float) -> float:
        return PlotBox.left + (PlotBox.right - PlotBox.left) * (step - x_low) / (x_high - x_low)

    fading = (1 - FAINTEST) / (len(kept) - 1) if len(kept) > 2 else 0.0
    lines = [
        Line(
            name,
            [Point(x_at(step), _y(value, y_values)) for step, value in points],
            last=f"{points[-1][1]:,.0f}" if abs(points[-1][1]) >= 1000 else f"{points[-1][1]:.4g}",
            tone="second" if len(kept) == 2 and number == 1 else "first",
            opacity=1 - fading * number,
        )
        for number, (name, points) in enumerate(kept.items())
    ]
    return Plot(
        "step",
        [Tick(x_at(step), tick_label(step, x_values)) for step in x_values if step <= x_high],
        [Tick(_y(value, y_values), tick_label(value, y_values)) for value in y_values],
        bars=[],
        lines=lines,
    )


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _y(value: float, y_values: Sequence[float]) -> float:
    """Height on paper of a value between the lowest and highest tick."""
    share = (value - y_values[0]) / (y_values[-1] - y_values[0])
    return PlotBox.bottom - share * (PlotBox.bottom - PlotBox.top)


def ticks(low: float, high: float, num_steps: int = 5) -> list[float]:
    """Round values, at most about num_steps apart, that reach from low or below to high or above.

    ticks(0, 0.37) = [0, 0.1, 0.2, 0.3, 0.4]
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / num_steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Through a decimal string: 3 * 0.1 is to read 0.3.
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def tick_label(value: float, among: Sequence[float]) -> str:
    """A tick in as many decimals as its neighbours need; thousands as k, millions as M."""
    step, largest = among[1] - among[0], max(abs(number) for number in among)
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if largest >= 10 * size or step >= size:
            return f"{value / size:g}{suffix}" if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}".replace("-", "−")
