import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from chats import open_chat, write_chat
from terminal import Terminal, terminal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is absent: nothing was typed into a terminal"),
]


@pytest.fixture(scope="module")
def directory(tiny_llama: Callable, random_adapter: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("chat"), tiny_llama, random_adapter, context=16384)


@pytest.fixture
def start(directory: Path, tmp_path: Path) -> Iterator[Callable]:
    def open_terminal(*arguments: object) -> object:
        options = ["--budget", 12, "--max-new-tokens", 24, "--min-new-tokens", 20, *arguments]
        command = [sys.executable, "-m", "ptp.cli.main", "generate", directory, *options]
        return terminal(command, {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})

    yield open_terminal


def stop_after_some_text(window: Terminal, question: str) -> None:
    """Press Ctrl-C once an answer is on its way."""
    window.enter(question)
    window.wait(f"> {question}")
    window.wait_until(lambda screen: screen.rpartition(f"> {question}")[2].strip())
    window.press("C-c")
    window.wait("; stopped")


def test_a_chat_as_it_is_typed(directory: Path, start: Callable, tmp_path: Path) -> None:
    figures = r"\d+ tokens, \d+ calls, \d+\.\d\d tokens per call, [\d,.]+ tokens/s, \d+\.\d\dx plain decoding"
    file = tmp_path / "my chat.json"
    with start() as window:
        window.wait("/help lists commands, Ctrl-D leaves")
        window.enter("1 and 2?")
        screen = window.wait("x plain decoding")
        assert re.search(rf"^{figures}", screen, re.MULTILINE)

        window.paste("and\n3?")
        assert "Ctrl-D leaves" in window.wait("  3?")
        window.press("Enter")
        window.wait("x plain decoding", 2)

        window.enter("/set max_new_tokens 12000")
        window.enter("/set min_new_tokens 11000")
        stop_after_some_text(window, "go on")
        window.enter("/set min_new_tokens 20")
        window.enter("/set max_new_tokens 24")

        window.wait_until(lambda screen: screen.endswith("\n>"))
        window.press("Up")
        window.wait("> /set max_new_tokens 24", 2)
        window.press("C-c")
        window.type("/colo")
        window.wait("/colour  colour tokens")
        window.press("Tab")
        window.wait("> /colour")
        window.press("Enter")
        window.wait("its own")
        window.enter("of course")
        window.wait("x plain decoding", 4)

        window.enter(f"/save '{file}'")
        window.wait("saved to")
        window.enter(f"/save '{file}'")
        window.wait("/save --overwrite replaces it")
        window.enter("/sytem")
        window.wait("did you mean /system?")
        window.enter("/stats")
        screen = window.wait("answers          4")

        messages = json.loads(file.read_text())["messages"]
        num_calls = [int(calls) for calls in re.findall(r"tokens, (\d+) calls, .* plain decoding", screen)[:4]]
        assert messages == replayed(directory, num_calls)
        answers = [message["content"] for message in messages[1::2]]
        flat = re.sub(r"\s|\^C", "", screen)
        assert all(re.sub(r"\s", "", answer) in flat for answer in answers)
        assert "\x1b[4m" in window.screen(colours=True)

        window.enter("/reset")
        window.enter("1 and 2?")
        window.wait("x plain decoding", 5 + 1)
        assert window.screen().count(answers[0]) == 2
        window.press("C-d")
        window.wait("left with code 0")
        screen = window.wait("icanon")
        assert re.search(r" echo\b", screen), "the keyboard stays silent"
        assert "Traceback" not in screen


def replayed(directory: Path, num_calls: list[int]) -> list[dict[str, str]]:
    """The messages of the same chat without a terminal, each answer stopped after so many calls."""
    chat = open_chat(directory)
    for number, text in enumerate(["1 and 2?", "and\n3?", "go on", "of course"]):
        lengths = ("11000", "12000") if number == 2 else ("20", "24")
        chat.set("max_new_tokens", "12000")
        chat.set("min_new_tokens", lengths[0])
        chat.set("max_new_tokens", lengths[1])
        made = count()
        for _ in chat.answer(text, lambda made=made, most=num_calls[number]: next(made) == most):
            pass
    return chat.messages


def test_texts_completed_as_they_are_typed(start: Callable) -> None:
    with start("--raw") as window:
        window.wait("each text is completed by itself")
        window.enter("1 and 2 are")
        window.wait("x plain decoding")
        window.enter("/system Add.")
        window.wait("/system has no effect")
        window.enter("/exit")
        window.wait("left with code 0")
