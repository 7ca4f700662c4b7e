"""The picture of a benchmark shows every method and task it is given, at the place its figure says."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from ptp.evaluation.bench import OVERALL, Figures
from ptp.evaluation.bench_plot import bench_svg
from ptp.evaluation.methods import GENERATE, PLAIN, PTP

FIGURES = Figures(
    num_questions=9,
    num_tokens=900,
    num_calls=300,
    num_draft_tokens=800,
    num_accepted_tokens=600,
    tokens_per_call=3.0,
    acceptance_rate=0.75,
    acceptance_by_position=[0.9, 0.6, 0.2],
    tokens_per_second=60.0,
    tokens_per_second_quartiles=(50.0, 70.0),
    speedup=2.0,
    speedup_range=(1.9, 2.1),
    speedup_quartiles=(1.5, 2.5),
    overhead=0.5,
    ms_per_call=50.0,
)
ALONE = replace(FIGURES, speedup=1.0, speedup_quartiles=(0.9, 1.1), num_draft_tokens=0, acceptance_by_position=[])
RESULTS = {
    OVERALL: {PTP: FIGURES, PLAIN: ALONE, GENERATE: ALONE},
    "a <task>": {PTP: replace(FIGURES, speedup=3.0), PLAIN: ALONE, GENERATE: ALONE},
}


def elements(svg: str, tag: str, kind: str = "") -> list[ElementTree.Element]:
    found = ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}")
    return [element for element in found if kind in element.get("class", "").split() or not kind]


def test_a_dot_lies_where_its_speed_up_is_and_says_so() -> None:
    svg = bench_svg(RESULTS, "mine & yours")
    dots = {title.text: dot for dot in elements(svg, "circle") for title in dot}
    assert list(dots) == [
        f"{OVERALL}, PTP: 2.00×",
        f"{OVERALL}, generate: 1.00×",
        "a <task>, PTP: 3.00×",
        "a <task>, generate: 1.00×",
    ]
    two, one, three, also_one = (float(dot.get("cx", "")) for dot in dots.values())
    assert three - two == pytest.approx(two - one, abs=0.3)
    assert one == also_one == float(elements(svg, "line", "plain")[0].get("x1", ""))


def test_quartiles_are_lines_around_it() -> None:
    spread = elements(bench_svg(RESULTS, "x"), "line", "spread")[0]
    (dot, *_) = (dot for dot in elements(bench_svg(RESULTS, "x"), "circle") if len(dot))
    low, middle, high = (float(number or "") for number in (spread.get("x1"), dot.get("cx"), spread.get("x2")))
    assert low < middle < high
    assert high - middle == pytest.approx(middle - low, abs=0.3)


def test_tasks_and_title_are_written_out() -> None:
    texts = [text.text for text in elements(bench_svg(RESULTS, "mine & yours"), "text")]
    assert {"mine & yours", OVERALL, "a <task>", PTP, GENERATE} <= set(texts)
    assert PLAIN not in texts


def test_acceptance_falls_along_a_line_and_is_left_out_without_drafts() -> None:
    (line, *_) = elements(bench_svg(RESULTS, "x"), "polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert len(points) == 3
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert not elements(bench_svg({OVERALL: {PTP: ALONE, PLAIN: ALONE}}, "x"), "polyline")


def test_a_dot_is_never_outside_the_picture() -> None:
    fast = {OVERALL: {PTP: replace(FIGURES, speedup=9.7, speedup_quartiles=(0.1, 9.9)), PLAIN: ALONE}}
    svg = bench_svg(fast, "x")
    width, height = (float(ElementTree.fromstring(svg).get(side, "")) for side in ("width", "height"))
    for dot in elements(svg, "circle"):
        assert 0 < float(dot.get("cx", "")) < width - 60  # its figure stands beside it
        assert 0 < float(dot.get("cy", "")) < height
