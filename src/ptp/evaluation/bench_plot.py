"""The picture of a benchmark: speed-ups by task, and how far into its drafts a call gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from ptp.evaluation.bench import OVERALL, Figures
from ptp.evaluation.colour import DARK_HUES, LIGHT_HUES
from ptp.evaluation.methods import PLAIN
from ptp.evaluation.report import tick_label, ticks

# Measures in pixels.
_WIDTH, _LEFT, _RIGHT = 760, 170, 690
_ROW, _GAP, _TOP, _PLOT_HEIGHT = 18, 14, 84, 180
_HEADING = 34
_FOOT = 60

Scale = Callable[[float], float]


def bench_svg(results: Mapping[str, Mapping[str, Figures]], title: str) -> str:
    """An SVG file on its own light or dark card. results: figures by task and method, the plain loop's among them."""
    # The plain loop is the line at 1, and drafts nothing.
    methods = [name for name in results[OVERALL] if name != PLAIN]
    height_of_task = len(methods) * _ROW + _GAP
    bottom = _TOP + len(results) * height_of_task
    body = [*_legend(methods), *_speedups(results, methods, bottom)]
    height = bottom + _FOOT
    if any(results[OVERALL][name].num_draft_tokens for name in methods):
        top = height + _HEADING
        height = top + _PLOT_HEIGHT + _FOOT
        body += _acceptance(results[OVERALL], methods, top)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="10"/>\n'
        f'<text class="strong" x="24" y="34">{escape(title)}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _legend(methods: Sequence[str]) -> Iterator[str]:
    for number, name in enumerate(methods):
        x = 24 + 130 * number
        yield f'<circle class="dot hue{number}" cx="{x + 5}" cy="55" r="4.5"/><text x="{x + 17}" y="59">{name}</text>'


def _speedups(results: Mapping[str, Mapping[str, Figures]], methods: Sequence[str], bottom: int) -> Iterator[str]:
    """A row for each task and method: a dot, and a line between the quartiles."""
    shown = [figures[name] for figures in results.values() for name in methods]
    values = ticks(0, max(1.0, *(max(f.speedup, f.speedup_quartiles[1]) for f in shown)))
    x = _scale(values, _LEFT, _RIGHT)
    for value in values:
        label = f'<text class="note" x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">'
        yield f'<line class="rule" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP - 8}" y2="{bottom}"/>'
        yield f"{label}{tick_label(value, values)}</text>"
    yield f'<line class="plain" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{_TOP - 8}" y2="{bottom}"/>'
    yield (
        f'<text class="note" x="{(_LEFT + _RIGHT) / 2}" y="{bottom + 38}" text-anchor="middle">'
        "times the plain loop’s tokens per second; lines: quartiles over questions</text>"
    )
    y = _TOP
    for task, figures in results.items():
        middle = y + len(methods) * _ROW / 2 + 4
        kind = "strong" if task == OVERALL else "task"
        yield f'<text class="{kind}" x="{_LEFT - 14}" y="{middle:.1f}" text-anchor="end">{escape(_short(task))}</text>'
        for number, name in enumerate(methods):
            found, at = figures[name], y + (number + 0.5) * _ROW
            low, high = (x(value) for value in found.speedup_quartiles)
            end = max(high, x(found.speedup) + 5) + 6
            yield (
                f'<line class="spread hue{number}" x1="{low:.1f}" x2="{high:.1f}" y1="{at}" y2="{at}"/>'
                f'<circle class="dot hue{number}" cx="{x(found.speedup):.1f}" cy="{at}" r="4.5">'
                f"<title>{escape(task)}, {name}: {found.speedup:.2f}×</title></circle>"
                f'<text class="note value" x="{end:.1f}" y="{at + 4.5}">{found.speedup:.2f}×</text>'
            )
        y += len(methods) * _ROW + _GAP


def _acceptance(overall: Mapping[str, Figures], methods: Sequence[str], top: int) -> Iterator[str]:
    """Lines of `acceptance_by_position`, the first position at 1."""
    bottom = top + _PLOT_HEIGHT
    longest = max(len(overall[name].acceptance_by_position) for name in methods)
    x = _scale([1, max(longest, 2)], _LEFT, _RIGHT)
    y = _scale([0, 1], bottom, top)
    yield f'<text class="strong" x="24" y="{top - 18}">Calls with drafts that accept the first, the second, …</text>'
    for share in ticks(0, 1):
        yield f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>'
        yield f'<text class="note" x="{_LEFT - 14}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
    for place in range(1, longest + 1, 1 + longest // 16):
        yield f'<text class="note" x="{x(place):.1f}" y="{bottom + 18}" text-anchor="middle">{place}</text>'
    yield f'<text class="note" x="{(_LEFT + _RIGHT) / 2}" y="{bottom + 38}" text-anchor="middle">draft</text>'
    for number, name in enumerate(methods):
        points = [(x(place), y(share)) for place, share in enumerate(overall[name].acceptance_by_position, start=1)]
        line = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
        yield f'<polyline class="curve hue{number}" points="{line}"><title>{name}</title></polyline>'
        yield from (
            f'<circle class="dot hue{number}" cx="{across:.1f}" cy="{up:.1f}" r="2.5"/>' for across, up in points
        )


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Where on paper a value lies, the first at the start and the last at the end."""
    return lambda value: start + (end - start) * (value - values[0]) / (values[-1] - values[0])


def _short(task: str) -> str:
    """What fits left of the plot."""
    return task if len(task) <= 20 else task[:19] + "…"


_DOTS = "".join(f".dot.hue{i}{{fill:{hue.line}}}.hue{i}{{stroke:{hue.line}}}" for i, hue in enumerate(LIGHT_HUES))
_DARK_DOTS = "".join(f".dot.hue{i}{{fill:{hue.line}}}.hue{i}{{stroke:{hue.line}}}" for i, hue in enumerate(DARK_HUES))
_STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1c2128}"
    ".card{fill:#fff;stroke:#d9dde3}.rule{stroke:#e6e9ed}.note{fill:#68707b}.strong{font-weight:600}"
    # A figure that stands on a line interrupts it.
    ".value{paint-order:stroke;stroke:#fff;stroke-width:4}"
    f".plain{{stroke:#68707b;stroke-dasharray:4 3}}.spread{{stroke-width:2}}.curve{{fill:none;stroke-width:2}}{_DOTS}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e8ed}.card{fill:#12161c;stroke:#2d343d}.rule{stroke:#262c34}"
    f".note{{fill:#8f98a4}}.value{{stroke:#12161c}}.plain{{stroke:#8f98a4}}{_DARK_DOTS}}}"
)
