"""The page, in a real browser where there is one."""

import re
import shutil
from collections.abc import Callable, Iterator

import httpx2
import pytest
from model_server import Alone, running
from transformers import PreTrainedTokenizerBase

from ptp.evaluation.colour import DARK_HUES, LIGHT_HUES
from ptp.server.api import Service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000
"""Milliseconds."""


def test_the_page_holds_all_it_needs_and_may_load_nothing_else(url: str) -> None:
    answer = httpx2.get(url)
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r'(src|href)=(?!"data:)|@import|url\(|innerHTML|insertAdjacent|eval\(', answer.text)
    assert len(re.findall("<script", answer.text)) == len(re.findall("<style", answer.text)) == 1


def test_the_page_wears_the_colours_of_every_coloured_text(url: str) -> None:
    page = httpx2.get(url).text
    for hues in (LIGHT_HUES, DARK_HUES):
        for number, hue in enumerate(hues):
            assert f"--tint{number}: {hue.tint}; --line{number}: {hue.line};" in page


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        # The sandbox needs rights that a container's root does not have; only this page is opened.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page that fails the test if anything goes wrong in it."""
    context, faults = browser.new_context(), []
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.faults = faults
    yield page
    context.close()
    assert faults == []


def write(page, prompt: str, seed: int, max_tokens: int = 40) -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#max-tokens", str(max_tokens))
    page.press("#prompt", "Control+Enter")


def finished(page) -> str:
    page.wait_for_selector("#stop:disabled")
    page.wait_for_selector("#status.good, #status.bad")
    return page.inner_text("#status")


@pytest.mark.slow
def test_a_text_is_shown_call_by_call_beside_plain_decoding_s(
    page, url: str, alone: Alone, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = [{"role": "user", "content": "1+1?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    seed = next(seed for seed in range(100) if len(alone(ids, 40, seed)[0]) == 40)
    page.goto(url)
    page.wait_for_selector("#model:has-text('tiny')")
    assert page.inner_text("#prompt-label") == "Your message"
    write(page, "1+1?", seed)
    said = finished(page)
    assert re.fullmatch(r"Identical texts: \d\.\d\d tokens per call, \d+\.\d\d times plain decoding’s speed\.", said)
    drafted, plain = (page.locator(f"#{run} .text") for run in ("drafted", "plain"))
    assert drafted.text_content() == plain.text_content() == alone(ids, 40, seed)[1]
    figures = {run: page.locator(f"#{run} dd").all_inner_texts() for run in ("drafted", "plain")}
    assert figures["plain"][:3] == ["40", "40", "1.00"]
    assert figures["drafted"][0] == "40"
    assert int(figures["drafted"][1]) < 40
    assert all(float(figures[run][3]) > 0 for run in figures)
    assert plain.locator(".piece:not(.bonus)").count() == 0
    assert 0 < drafted.locator(".piece:not(.bonus)").count() < drafted.locator(".piece").count()
    assert "call 1: " in drafted.locator(".piece").first.get_attribute("title")


@pytest.mark.slow
def test_what_a_model_writes_is_text_and_never_markup(page, url: str) -> None:
    def answer(route) -> None:
        markup = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
        total = {"tokens_per_call": 1.0, "tokens_per_second": 2.0}
        report = {"num_tokens": 1, "num_drafts": 0, "num_accepted": 0, "pieces": [[markup, 1, False]], "total": total}
        event = httpx2.Response(200, json={"choices": [{"ptp": report}]}).text
        route.fulfill(body=f"data: {event}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    page.goto(url)
    write(page, "hi", 1)
    assert finished(page).startswith("Identical texts")
    assert "<script>" in page.inner_text("#drafted .text")
    assert page.locator(".text img, .text script").count() == 0
    assert page.title() == "Parallel Token Prediction"


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_page_alone(page, new_service: Callable[..., Service]) -> None:
    with running(new_service(api_key="sesame")) as url:
        page.goto(url)
        page.wait_for_selector("#key-row:not([hidden])")
        assert page.inner_text("#status") == "This server asks for its API key."
        page.fill("#key", "sesame")
        write(page, "1+1?", 3, 8)
        page.wait_for_selector("#status.good")
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.reload()
        page.wait_for_selector("#key-row:not([hidden])")
        assert page.input_value("#key") == ""
    assert all("401" in fault for fault in page.faults)
    page.faults.clear()


@pytest.mark.slow
def test_esc_stops_a_text_and_an_error_is_told(page, service: Service, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#model:has-text('tiny')")
    write(page, "long " * 200, 1)
    assert "this server takes 255" in finished(page)
    page.faults.clear()
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.fill("#prompt", "1+1?")
    page.click("#write")
    page.wait_for_selector("#stop:enabled")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop:disabled")
    assert page.inner_text("#status") == "Stopped."


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_sticks_out_of_a_narrow_screen(page, url: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(url)
    write(page, "1+1?", 5)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


LUMINANCE = """
(colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
  .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
  .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(page, url: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(url)
    write(page, "1+1?", 5)
    finished(page)
    ratios = page.evaluate(
        """() => {
          const of = LUMINANCE, found = {};
          for (const element of document.querySelectorAll("p, label, h1, h2, dt, dd, button:enabled, .piece")) {
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const both = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(of);
            found[element.className + element.tagName] = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
          }
          return found;
        }""".replace("LUMINANCE", LUMINANCE.strip())
    )
    assert len(ratios) > 8
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
