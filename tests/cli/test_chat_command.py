import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chats import RULE, open_chat, said, write_chat
from command_line import Result, check_refused, typed
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from ptp.chat.chat import Chat
from ptp.chat.commands import COMMANDS
from ptp.cli import generate
from ptp.cli.chat import Commands, Conversation, History, first_interrupt, history_file
from ptp.decoding.budget import Latency
from ptp.evaluation.colour import Piece


@pytest.fixture(scope="module")
def directory(tiny_llama: Callable, random_adapter: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("chat"), tiny_llama, random_adapter)


@pytest.fixture(scope="module")
def small_directory(tiny_llama: Callable, random_adapter: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("chat"), tiny_llama, random_adapter, context=256)


@pytest.fixture
def chat(directory: Path) -> Chat:
    return open_chat(directory, min_new_tokens=20)


def typed_lines(*lines: str | BaseException) -> Callable[[], str]:
    """Reads these, and then Ctrl-D."""
    waiting: Iterator[str | BaseException] = iter([*lines, EOFError()])

    def read() -> str:
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def conversation(chat: Chat, *lines: str | BaseException, colours: bool = False) -> str:
    """What a terminal shows while these lines are typed."""
    file = io.StringIO()
    system = "standard" if colours else None
    console = Console(file=file, width=200, markup=False, highlight=False, color_system=system)
    Conversation(chat, console).run(typed_lines(*lines), "a model")
    return file.getvalue()


# A conversation


def test_below_each_answer_stands_what_it_cost(directory: Path, chat: Chat) -> None:
    expected = said(open_chat(directory, min_new_tokens=20), "1 and 2?")
    lines = conversation(chat, "1 and 2?").splitlines()
    assert lines[:3] == ["a model", "/help lists commands, Ctrl-D leaves", ""]
    assert lines[3] == expected
    assert chat.plain_speed is not None
    assert lines[4].startswith(chat.figures.described(chat.plain_speed))
    assert "x plain decoding" in lines[4]


@pytest.mark.parametrize("pays", [True, False])
def test_that_drafts_do_not_pay_is_said_once(directory: Path, monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    seconds = dict.fromkeys((0, 64), 0.01) if pays else {0: 0.01, 64: 10.0}
    monkeypatch.setattr("ptp.decoding.decoder.kept_latency", lambda *_: Latency({1: seconds}))
    shown = conversation(open_chat(directory, min_new_tokens=20, budget="auto"), "1 and 2?", "2 and 3?")
    assert shown.count("no drafts: the time of calls on this machine says") == (not pays)


@pytest.mark.parametrize(
    ("settings", "stopped", "end"),
    [
        ({"max_new_tokens": 20, "min_new_tokens": 20}, False, "x plain decoding; cut at max_new_tokens"),
        ({"max_new_tokens": 500, "min_new_tokens": 400}, False, "; the context is full, /reset begins a new chat"),
        ({"max_new_tokens": 500, "min_new_tokens": 20}, True, "; stopped"),
        ({"max_new_tokens": 500, "min_new_tokens": 2}, False, "x plain decoding"),
    ],
    ids=["cut", "full", "stopped", "ended"],
)
def test_the_line_says_why_an_answer_ends(
    small_directory: Path, settings: dict[str, int], stopped: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_chat(small_directory, **settings)
    if stopped:
        calls = iter(range(99))
        monkeypatch.setattr("ptp.cli.chat.first_interrupt", lambda: first_interrupt_after(lambda: next(calls) == 4))
    lines = conversation(chat, "1 and 2?").splitlines()
    assert lines[4].endswith(end)


def first_interrupt_after(stopped: Callable[[], bool]) -> Any:
    class Block:
        def __enter__(self) -> Callable[[], bool]:
            return stopped

        def __exit__(self, *error: object) -> None:
            pass

    return Block()


def test_what_is_no_command_or_no_value_is_one_line_and_the_chat_goes_on(chat: Chat) -> None:
    typed = ("/sytem x", "/set temprature", "/set temperature warm", "/save", "/system", KeyboardInterrupt(), "1?")
    assert conversation(chat, *typed).splitlines()[3:8] == [
        "unknown command /sytem; did you mean /system?",
        "unknown key 'temprature' in /set; did you mean 'temperature'?",
        "temperature: input should be a valid number, unable to parse string as a number; got 'warm'",
        "/save takes one file name, in quotes if it has spaces; got none",
        "system message: none",
    ]
    assert len(chat.turns) == 1


def test_every_command_does_something(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    asked = ("/stats", "1 and 2?", "/stats", "/system Add.", "/system", "/system -", "/set", "/set seed 3", "/help")
    saved = (f"/save {file}", f"/save {file}", f"/save --overwrite {file}")
    shown = conversation(chat, *asked, *saved, "/colour", "/color", "/reset", "/stats", "/exit", "not read any more")
    assert shown.count("no answer yet") == 2
    assert re.search(r"last prompt      \d+ tokens, 0 of them read in earlier turns\n", shown)
    assert re.search(r"drafts accepted  \d+ of \d+, \d+%\n", shown)
    assert re.search(r"plain decoding   [\d,.]+ tokens/s\n", shown)
    assert shown.count("system message: Add.") == 2
    assert shown.count("system message: none") == 1
    assert "temperature         0.7\n" in shown
    assert "max_new_tokens      24\n" in shown
    assert "seed  3\n" in shown
    assert all(f"/{command.name} " in shown for command in COMMANDS)
    assert shown.count(f"saved to {file}") == 2
    assert "is there already" in shown
    assert len(json.loads(file.read_text())["messages"]) == 2
    assert chat.messages == []


def test_a_rule_the_adapter_was_not_trained_for_is_pointed_out(chat: Chat) -> None:
    assert "the adapter was trained for" not in conversation(chat, "/set seed 3", "/set")
    assert "the adapter was trained for" in conversation(chat, "/set temperature 0.3")


def test_without_a_template_the_chat_says_what_it_does_instead(directory: Path) -> None:
    shown = conversation(open_chat(directory, templated=False), "1 and", "/system Add.")
    assert shown.count("each text is completed by itself") == 1
    assert "/system has no effect" in shown


@pytest.mark.parametrize(("templated", "begin"), [(True, "\n\none\n\ntwo\n"), (False, "\none\n\ntwo\n")])
def test_a_completion_goes_on_right_below_the_text(
    directory: Path, monkeypatch: pytest.MonkeyPatch, templated: bool, begin: str
) -> None:
    chat = open_chat(directory, templated=templated)
    pieces = [Piece("\none", 1, True), Piece("\n\ntwo", 1, False)]
    monkeypatch.setattr(chat, "answer", lambda text, stopped: (piece for piece in pieces))
    assert f"leaves\n{begin}" in conversation(chat, "1?")


def test_tokens_are_coloured_by_call_and_a_call_s_own_token_is_underlined(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [Piece("one ", 1, True), Piece("two ", 1, False), Piece("three ", 2, True), Piece("four", 3, False)]
    monkeypatch.setattr(chat, "answer", lambda text, stopped: (piece for piece in pieces))
    blue, yellow, green = "\x1b[34m", "\x1b[33m", "\x1b[4;32m"
    coloured = f"{blue}one \x1b[0m\x1b[4;34mtwo \x1b[0m{yellow}three \x1b[0m{green}four\x1b[0m\n"
    assert coloured in conversation(chat, "/colour", "1?", colours=True)
    assert "one two three four\n" in conversation(chat, "1?", colours=True)


def test_a_model_cannot_steer_the_terminal(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Piece("\x1b[2J\x07\r[bold]", 1, True)]
    monkeypatch.setattr(chat, "answer", lambda text, stopped: (piece for piece in pieces))
    shown = conversation(chat, "1?")
    assert "␛[2J␇␍[bold]\n" in shown
    assert "\x1b" not in shown


def test_ctrl_c_is_asked_for_once_and_breaks_off_the_second_time() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), first_interrupt() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_message_that_was_stopped_before_its_answer_is_said_to_be_gone(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptp.cli.chat.first_interrupt", lambda: first_interrupt_after(lambda: True))
    gone = "stopped before the first token; the message is not part of the chat\n"
    assert conversation(chat, "1 and 2?").endswith(f"leaves\n\n{gone}")
    said(chat, "of course")
    assert conversation(chat, "1 and 2?").endswith(f"leaves\n\n{gone}")


# At the prompt


def completions(text: str) -> list[str]:
    completer = Commands(["temperature", "top_k", "top_p", "seed"])
    return [each.text for each in completer.get_completions(Document(text), CompleteEvent())]


def test_commands_settings_and_files_are_completed_and_messages_are_not(tmp_path: Path) -> None:
    assert completions("/s") == ["/system", "/set", "/stats", "/save"]
    assert completions("/set to") == ["top_k", "top_p"]
    assert completions("/set top_k 5") == []
    (tmp_path / "chat.json").touch()
    assert completions(f"/save --overwrite {tmp_path}/ch") == ["at.json"]
    assert completions("s") == completions("what /s") == completions("/system s") == []


def test_the_history_is_kept_for_no_other_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path.is_relative_to(tmp_path / "state" / "ptp")
    History(path).append_string("first\nsecond")
    assert list(History(path).load_history_strings()) == ["first\nsecond"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_chat_does_without_a_history_where_there_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "file" / "history", tmp_path / "directory"):
        history = History(path)
        history.append_string("first")
        assert history.get_strings() == ["first"]
        assert list(history.load_history_strings()) == []


# One prompt


def generated(directory: Path, *arguments: object, stdin: str = "") -> dict[str, Any]:
    options = ["--json", "--budget", 12, "--max-new-tokens", 24, "--min-new-tokens", 20]
    result = typed(generate.main, directory, *options, *arguments, stdin=stdin)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_prompt_for_a_chat_model_is_a_user_s_turn_and_is_answered_as_in_a_chat(directory: Path, chat: Chat) -> None:
    record = generated(directory, stdin="1 and 2?\n")
    assert record == generated(directory, "--prompt", "1 and 2?")
    assert record["text"] == said(chat, "1 and 2?")
    assert record["prompt_ids"] == chat.turns[0].request.prompt_ids
    assert chat.tokenizer.decode(record["prompt_ids"]) == "<|user|>\n1 and 2?</s>\n<|assistant|>\n"


def test_a_raw_prompt_is_completed_as_it_is(directory: Path, chat: Chat) -> None:
    record = generated(directory, "--raw", "--prompt", "1 and 2?\n")
    assert record["prompt_ids"] == chat.tokenizer("1 and 2?\n")["input_ids"]
    assert record["text"] == said(open_chat(directory, templated=False, min_new_tokens=20), "1 and 2?\n")
    # `echo` ends a line that is no part of the prompt.
    assert generated(directory, "--raw", stdin="1 and 2?\n\n") == record


def test_an_answer_may_be_longer_than_a_completion(directory: Path) -> None:
    for arguments, most in (([], generate.ANSWER_TOKENS), (["--raw"], generate.COMPLETION_TOKENS)):
        wrong = typed(generate.main, directory, "--prompt", "1?", "--min-new-tokens", 9999, *arguments)
        check_refused(wrong, f"max_new_tokens = {most}]")


def test_a_blank_prompt_for_a_chat_model_is_refused(directory: Path) -> None:
    check_refused(typed(generate.main, directory, stdin="\n"), "the prompt is empty")


@pytest.mark.parametrize("arguments", [["--json"], []], ids=["json", "output in a file"])
def test_a_chat_needs_a_terminal_on_both_sides(
    directory: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Stream(io.StringIO):
        def __new__(cls, *text: str) -> Any:
            return Typed(*text) if text else io.StringIO.__new__(cls)

    monkeypatch.setattr("command_line.io", SimpleNamespace(StringIO=Stream))
    result: Result = typed(generate.main, directory, *arguments)
    check_refused(result, "no prompt: give --prompt TEXT")


def test_the_rule_of_a_chat_is_the_adapter_s_unless_told(directory: Path) -> None:
    assert generated(directory, "--prompt", "1?")["sampling"] == RULE.model_dump(mode="json")
