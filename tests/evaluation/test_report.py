"""The report page and the picture show what they are given, whole, escaped and on their own."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ptp.decoding.decoder import Generation, Step
from ptp.evaluation.colour import printable
from ptp.evaluation.experiment_report import figures
from ptp.evaluation.report import (
    FAINTEST,
    Piece,
    Report,
    Sample,
    Speed,
    accuracy_plot,
    coloured_svg,
    curve_plot,
    pieces,
    render,
    tick_label,
    ticks,
    write_report,
)
from ptp.training.curves import BY_INDEX, NAMES, curves

CODE = Sample(
    prompt='def shout(text):\n    """Say it </pre><script>alert(1)</script> & louder."""\n',
    pieces=[
        Piece("    return", 1, False),
        Piece(" text", 2, True),
        Piece(".upper", 2, True),
        Piece("()", 2, False),
        Piece(" <b>&amp;", 3, True),
        Piece("\n", 3, False),
    ],
    tokens_per_call=2.0,
    num_calls=3,
    lossless=True,
)
CHAT = Sample(
    prompt="\n\n  Grüße\tauf 日本語?\n",
    pieces=[Piece("こん", 1, True), Piece("", 1, False), Piece("にちは 👋", 2, False)],
    tokens_per_call=1.5,
    num_calls=2,
    lossless=True,
)
REPORT = Report(
    title="code <tiny>",
    model="org/tiny-code",
    hardware="2 CPU cores",
    date="2026-01-02",
    tokens_per_call=4.213,
    tokens_per_call_simulated=4.057,
    speedup=2.381,
    overhead=0.7694,
    num_prompts=83,
    num_mismatches=0,
    num_near_ties=0,
    samples=[CODE, CHAT],
    accepted_per_call=[0, 2, 2, 5],
    accuracy_by_index=[0.91, 0.62, 0.4],
    speeds=[Speed("plain decoding", 40.0, (38.5, 41.2)), Speed("PTP", 90.0, (71.3, 104.6))],
    curves={
        "loss <all>": {"train <ing>": [(0, 4.0), (100, 2.5), (200, math.nan), (300, 1.75)], "held out": [(300, 2.0)]}
    },
    settings={"training": {"learning_rate": "1e-4", "note": "a < b"}},
)
VOID_ELEMENTS = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Parses a page strictly: every tag closed in order. texts: what each `class="text"` block shows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.visible = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append((tag, dict(attrs).get("class") or ""))
        if dict(attrs).get("class") == "text":
            self.texts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if ("style", "") in self.open:
            return
        self.visible += data
        inside = self.open[next((i for i, (_, name) in enumerate(self.open) if name == "text"), len(self.open)) :]
        if inside and all(tag != "summary" for tag, _ in inside):
            self.texts[-1] += data

    def titles(self) -> list[str]:
        return [title for _, attributes in self.tags if (title := attributes.get("title"))]

    def words(self) -> str:
        return " ".join(self.visible.split())


def full_text(sample: Sample) -> str:
    return sample.prompt + "".join(piece.text for piece in sample.pieces)


def test_every_text_appears_whole_and_escaped():
    html = render(REPORT)
    page = Page(html)
    assert page.texts == [full_text(CODE), full_text(CHAT)]
    assert all(tag != "script" for tag, _ in page.tags)
    assert "<script" not in html
    assert "code <tiny>" in page.visible
    assert "loss <all>" in page.visible
    assert "train <ing>" in page.visible


def test_a_long_prompt_is_folded_but_kept():
    prompt = "".join(f"line {number}\n" for number in range(40))
    page = Page(render(replace(REPORT, samples=[replace(CODE, prompt=prompt)])))
    assert page.texts == [full_text(replace(CODE, prompt=prompt))]
    assert "earlier lines of the prompt" in page.visible


def test_pieces_say_their_call():
    titles = Page(render(REPORT)).titles()
    assert titles[:4] == ["call 1: bonus", "call 2: accepted", "call 2: accepted", "call 2: bonus"]


def test_numbers_are_those_given():
    words = Page(render(REPORT)).words()
    for number in ("4.21", "4.06", "2.38×", "77%", "40.0", "38.5 – 41.2", "90.0", "71.3 – 104.6", "2.25×", "1e-4"):
        assert number in words
    assert "each of the 4 calls accepted: 2.25 on average" in words
    assert "6 tokens, 3 calls 2.00 per call" in words
    assert "1.75" in words


def test_bars_have_the_heights_of_their_shares():
    titles = [title for title in re.findall(r"<title>(.*?)</title>", render(REPORT)) if ":" in title]
    assert titles[2] == "2 accepted: 2 of 4 calls, 50.0%"
    assert titles[-3:] == ["index 0: 91.0% right", "index 1: 62.0% right", "index 2: 40.0% right"]
    heights = [bar.height for bar in accuracy_plot([0.8, 0.4, math.nan]).bars]
    assert heights[0] == pytest.approx(2 * heights[1])
    assert heights[2] == 0


def test_lossless_is_said_plainly():
    html = render(REPORT)
    assert "All 83 texts identical to plain decoding." in Page(html).words()
    assert ' bad"' not in html
    assert "differ" not in Page(html).visible


def test_mismatches_are_a_failure_even_beside_near_ties():
    failed = replace(REPORT, num_mismatches=3, num_near_ties=1, samples=[CODE, replace(CHAT, lossless=False)])
    html = render(failed)
    words = Page(html).words()
    assert '<dd class="word bad">Not lossless</dd>' in html
    assert '<dd class="detail bad">3 of 83 texts differ from plain decoding.</dd>' in html
    assert '<span class="bad">differs from plain decoding</span>' in html
    assert "1 differs only at near-ties" in words
    assert "All 83" not in words


def test_near_ties_alone_are_not_called_identical():
    words = Page(render(replace(REPORT, num_near_ties=2))).words()
    assert "Lossless up to rounding 81 of 83 texts identical to plain decoding. 2 differ only at near-ties" in words
    assert "All 83" not in words


def test_nothing_checked_is_not_called_lossless():
    words = Page(render(replace(REPORT, num_prompts=0))).words()
    assert "Not checked" in words
    assert "Lossless" not in words


@pytest.mark.parametrize("html", [render(REPORT), render(replace(REPORT, title="https://example.org"))])
def test_the_page_loads_nothing(html: str):
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "use", "image"}
        assert not attributes.keys() & {"src", "href", "srcset", "xlink:href", "data"}
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "http://" not in html
    assert "https://" not in html.replace("https://example.org", "")


def test_a_report_without_optional_parts_still_renders():
    bare = replace(
        REPORT,
        tokens_per_call_simulated=None,
        samples=[],
        accepted_per_call=[],
        accuracy_by_index=[],
        speeds=[],
        curves={"none": {}, "empty": {"training": []}, "undefined": {"training": [(0, math.nan)]}},
        settings={},
    )
    words = Page(render(bare)).words()
    assert "4.21" in words
    assert "None" not in words
    assert "Training" not in words


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "run" / "report.html"
    write_report(REPORT, path)
    write_report(replace(REPORT, title="second"), path)
    assert path.read_text(encoding="utf-8") == render(replace(REPORT, title="second"))
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_report(replace(REPORT, speedup="fast"), path)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_needs_no_torch():
    code = "import sys, ptp.evaluation.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def generation(calls: list[tuple[bytes, int]]) -> Generation:
    """One token per byte; each call gives its bytes and how many of them were accepted drafts."""
    steps = [Step(list(data), [0.5] * len(data), accepted, accepted) for data, accepted in calls]
    token_ids = [token for step in steps for token in step.token_ids]
    return Generation(token_ids, [0.5] * len(token_ids), steps, "length")


def decode_bytes(token_ids: list[int]) -> str:
    return bytes(token_ids).decode("utf-8", errors="replace")


def test_pieces_hold_back_incomplete_characters():
    found = pieces(generation([(b"n\xc3", 1), (b"\xa9!", 1)]), decode_bytes)
    assert found == [Piece("n", 1, True), Piece("", 1, False), Piece("é", 2, True), Piece("!", 2, False)]


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語 👋🏽 done", "a\n\n  b\t", "true \N{REPLACEMENT CHARACTER} kept"]
)
@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_pieces_join_to_the_text(text: str, width: int):
    data = text.encode()
    calls = [(data[i : i + width], width - 1) for i in range(0, len(data), width)]
    found = pieces(generation(calls), decode_bytes)
    assert "".join(piece.text for piece in found) == text
    assert len(found) == len(data)


def test_a_text_cut_inside_a_character_ends_in_the_replacement_character():
    found = pieces(generation([("né".encode()[:2], 1)]), decode_bytes)
    assert [piece.text for piece in found] == ["n", "\N{REPLACEMENT CHARACTER}"]


def test_pieces_join_for_a_decoder_that_tidies_spaces():
    words = ["do", " n", "'t", " go"]

    def decode(token_ids: list[int]) -> str:
        return "".join(words[token] for token in token_ids).replace(" n't", "n't")

    found = pieces(generation([(bytes([0, 1]), 1), (bytes([2, 3]), 1)]), decode)
    assert "".join(piece.text for piece in found) == "don't go"


def test_the_picture_is_xml_that_shows_prompt_text_and_numbers():
    svg = ElementTree.fromstring(coloured_svg(CODE))
    shown = [text for element in svg.iter() if element.tag.endswith("}text") and (text := element.text)]
    assert [word for word in full_text(CODE).split() if word not in "".join(shown)] == []
    assert "6 tokens in 3 calls: 2.00 tokens per call" in shown
    assert "Plain decoding writes the same text in 6 calls." in shown
    assert all(not element.tag.endswith("}script") for element in svg.iter())


def test_the_picture_admits_a_difference():
    svg = coloured_svg(replace(CODE, lossless=False))
    assert "This text differs from plain decoding." in svg
    assert "same text" not in svg


def test_the_picture_survives_control_characters_and_long_words():
    hostile = replace(CODE, pieces=[Piece("\x00\x1b\ud800\uffff", 1, True), Piece("x" * 500, 1, False)])
    svg = ElementTree.fromstring(coloured_svg(hostile).encode())
    width = float(svg.attrib["width"])
    rects = [element.attrib for element in svg.iter() if element.tag.endswith("}rect")]
    assert all(float(rect["x"]) + float(rect["width"]) <= width for rect in rects)
    assert printable("a\x00\t\n") == "a␀\t\n"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.37, [0, 0.1, 0.2, 0.3, 0.4]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.1, 4.2, [1, 2, 3, 4, 5]),
        (0, 50_000, [0, 10_000, 20_000, 30_000, 40_000, 50_000]),
    ],
)
def test_ticks_are_round_and_reach_the_data(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == expected


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_flat_curve_has_an_axis(value: float):
    plot = curve_plot({"loss": [(5, value)]})
    assert len(plot.y_ticks) >= 2
    (line,) = plot.lines
    assert all(math.isfinite(point.x) and math.isfinite(point.y) for point in line.points)


def test_tick_labels_are_short():
    assert [tick_label(value, [0, 20_000, 40_000]) for value in (0, 20_000)] == ["0", "20k"]
    assert tick_label(0.3, [0.2, 0.3]) == "0.3"
    assert tick_label(-1.0, [-1.0, 0.0]) == "−1"


def test_lines_of_a_figure_share_its_axes():
    training, validation = curve_plot({"training": [(10, 4.0), (100, 2.0)], "validation": [(100, 3.0)]}).lines
    assert validation.points[0].x == training.points[1].x
    assert validation.points[0].y == pytest.approx((training.points[0].y + training.points[1].y) / 2)
    assert (training.last, validation.last) == ("2", "3")
    assert training.tone != validation.tone


def test_many_lines_fade_and_the_first_and_the_last_are_named():
    plot = curve_plot({f"index {k}": [(0, 0.1), (10, 0.9 - k / 10)] for k in range(8)})
    opacities = [line.opacity for line in plot.lines]
    assert opacities == sorted(opacities, reverse=True)
    assert len(set(opacities)) == 8
    assert (opacities[0], opacities[-1]) == (1, pytest.approx(FAINTEST))
    words = Page(render(replace(REPORT, curves={"accuracy": {line.name: [(0, 0.5)] for line in plot.lines}}))).words()
    assert "index 0 0.5 index 7 0.5" in words


def test_training_and_validation_of_a_quantity_are_drawn_in_one_figure():
    both = {
        "loss": [(10, 3.0)],
        "eval_loss": [(10, 3.5)],
        "eval_accuracy/0": [(10, 0.9)],
        "eval_accuracy/1": [(10, 0.4)],
    }
    found = {title: lines for title, lines in figures(both).items() if lines}
    assert found == {
        "Loss": {"training": [(10, 3.0)], "validation": [(10, 3.5)]},
        "Accuracy by window index": {"index 0": [(10, 0.9)], "index 1": [(10, 0.4)]},
    }
    words = Page(render(replace(REPORT, curves=found))).words()
    assert "Loss training 3 validation 3.5" in words


def test_every_curve_that_is_kept_is_drawn():
    row = {name: float(number) for number, name in enumerate([*NAMES, f"{BY_INDEX}0"])}
    kept = curves([row | {"learning_rate": 1e-4, "step": 10}])
    drawn = [points for lines in figures(kept).values() for points in lines.values()]
    assert sorted(drawn) == [[(10, value)] for value in row.values()]
