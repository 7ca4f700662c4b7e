"""The questions of `ptp_distill`: with keys from a pipe, and once on a real pseudo-terminal."""

import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import Result
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ptp.cli import distill
from ptp.cli.questions import ask
from ptp.experiment import Experiment, ExperimentConfig
from ptp.stages.distill import Answers, Survey, survey

ENTER, UP, DOWN, CLEAR, CTRL_C = "\r", "\x1b[A", "\x1b[B", "\x15", "\x03"
PATIENCE = 120
"""Seconds after which a program is taken to hang."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def keyboard(keys: str) -> Iterator[None]:
    """A keyboard on which these keys were pressed; asked for more, it is unplugged."""
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        pipe.close()
        with create_app_session(input=pipe, output=DummyOutput()):
            yield


def at_terminal(keys: str, *arguments: object) -> Result:
    """Run `ptp_distill` in this process, on a terminal, with these keys pressed."""
    out, err, code = io.StringIO(), Terminal(), 0
    argv = ["ptp_distill", *map(str, arguments)]
    with (
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", Terminal()),
        redirect_stdout(out),
        redirect_stderr(err),
        keyboard(keys),
    ):
        try:
            distill.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def root(chat_experiment: Callable, tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a chat template, chats.jsonl, titled.jsonl, texts.jsonl, columns.jsonl; plain/model/."""
    root = tmp_path_factory.mktemp("questions")
    chat_experiment(root)
    tiny_experiment(root / "plain")
    rows = [{"first": f"a {n}", "second": f"a longer text {n}", "third": "x"} for n in range(12)]
    (root / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    titled = [{**json.loads(chat), "title": "Sums"} for chat in (root / "chats.jsonl").read_text().splitlines()]
    (root / "titled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in titled))
    return root


def look(root: Path, model: str, data: str) -> Survey:
    return survey(str(root / model), {"path": str(root / data)})


def answered(found: Survey, keys: str, answers: Answers | None = None) -> Answers:
    with keyboard(keys):
        return ask(found, answers or Answers())


# The answers


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("model", "chats.jsonl"),
        ("model", "texts.jsonl"),
        ("model", "columns.jsonl"),
        ("plain/model", "texts.jsonl"),
        ("plain/model", "columns.jsonl"),
    ],
)
def test_accepting_every_default_is_what_yes_takes(root: Path, model: str, data: str) -> None:
    found = look(root, model, data)
    assert answered(found, ENTER * 20).settings(found) == Answers().settings(found)


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        (ENTER, "prompt-distill"),
        (DOWN + ENTER, "prompt-scheme-distill"),
        (DOWN + DOWN + ENTER, "full-chat"),
        (DOWN + DOWN + DOWN + ENTER, "fixed"),
        (UP + ENTER, "fixed"),
        (DOWN + DOWN + UP + ENTER, "prompt-scheme-distill"),
    ],
)
def test_arrow_keys_choose_the_mode(root: Path, keys: str, mode: str) -> None:
    assert answered(look(root, "model", "titled.jsonl"), keys + ENTER * 20).mode == mode


def test_every_question_of_a_chat_is_heard(root: Path) -> None:
    found = look(root, "model", "chats.jsonl")
    numbers = "".join(CLEAR + number + ENTER for number in ("8", "72", "5", "7"))
    keys = ENTER + "n" + DOWN + ENTER + numbers + DOWN + ENTER
    assert answered(found, keys) == Answers(
        mode="prompt-distill",
        drop_system=True,
        turns="first",
        window=8,
        max_length=72,
        windows_per_sequence=5,
        lora_rank=7,
        tracker="wandb",
    )


def test_a_prompt_scheme_is_typed_over_the_one_that_is_offered(root: Path) -> None:
    found = look(root, "model", "columns.jsonl")
    offered = answered(found, ENTER * 20)
    assert (offered.prompt_scheme, offered.user_turn) == ("{second}", True)
    typed = answered(found, ENTER + CLEAR + "{first}, {third}" + ENTER + "n" + ENTER * 20)
    assert (typed.prompt_scheme, typed.user_turn) == ("{first}, {third}", False)


def test_without_a_template_nobody_is_asked_for_the_user_s_turn(root: Path) -> None:
    found = look(root, "plain/model", "columns.jsonl")
    numbers = "".join(CLEAR + number + ENTER for number in ("8", "64", "5", "7"))
    answers = answered(found, ENTER + ENTER + numbers + ENTER)
    assert (answers.user_turn, answers.window, answers.lora_rank) == (None, 8, 7)


def test_of_several_columns_one_is_chosen(root: Path) -> None:
    found = look(root, "plain/model", "columns.jsonl")
    fixed = DOWN + ENTER
    assert found.columns("fixed") == ("second", "first", "third")
    assert answered(found, fixed + ENTER * 20).column == "second"
    assert answered(found, fixed + DOWN + ENTER * 20).column == "first"
    # Not asked for a second time.
    assert answered(found, fixed + DOWN + ENTER * 20, Answers(column="third")).column == "third"


def test_flags_given_are_the_defaults_of_their_questions(root: Path) -> None:
    found = look(root, "model", "chats.jsonl")
    flags = Answers(
        turns="first", drop_system=True, window=5, windows_per_sequence=9, max_length=70, lora_rank=3, tracker="mlflow"
    )
    assert answered(found, ENTER * 20, flags).settings(found) == flags.settings(found)


def test_the_number_of_windows_offered_follows_the_lengths_chosen(root: Path) -> None:
    found = look(root, "model", "chats.jsonl")
    answers = answered(found, ENTER * 3 + CLEAR + "5" + ENTER + CLEAR + "80" + ENTER * 20)
    assert (answers.window, answers.max_length, answers.windows_per_sequence) == (5, 80, 16)


def test_what_is_no_number_is_not_accepted(root: Path) -> None:
    found = look(root, "model", "chats.jsonl")
    for wrong in ("many", "0", "-3", "1.5", ""):
        answers = answered(found, ENTER * 3 + CLEAR + wrong + ENTER + CLEAR + "6" + ENTER * 20)
        assert answers.window == 6


def test_only_modes_that_suit_data_and_tokenizer_are_offered(root: Path) -> None:
    every = ("prompt-distill", "prompt-scheme-distill", "full-chat", "fixed")

    def offered(*inputs: str) -> list[str]:
        return [mode for mode in every if look(root, *inputs).suits(mode)]

    assert offered("plain/model", "texts.jsonl") == ["prompt-scheme-distill", "fixed"]
    assert offered("model", "texts.jsonl") == ["prompt-scheme-distill", "fixed"]
    assert offered("model", "chats.jsonl")[:3] == ["prompt-distill", "prompt-scheme-distill", "full-chat"]
    # The second of them is chosen by one step down.
    assert answered(look(root, "plain/model", "texts.jsonl"), DOWN + ENTER * 20).mode == "fixed"


# The command


def test_answers_land_in_the_files(root: Path, tmp_path: Path) -> None:
    # full-chat; keep no system messages; L 8; length, N, rank, tracker as offered; write.
    keys = DOWN + DOWN + ENTER + "n" + CLEAR + "8" + ENTER * 6
    result = at_terminal(keys, root / "model", root / "chats.jsonl", "--output-dir", tmp_path / "new")
    assert (result.code, result.out) == (0, f"{tmp_path / 'new'}\n"), result.err
    config = Experiment.load(tmp_path / "new").config
    assert (config.data.mode, config.data.drop_system, config.model.window) == ("full-chat", True, 8)
    assert (config.train.windows_per_sequence, config.train.sequence_length) == (12, 96)
    assert "24 rows" in result.err
    assert "⟦1</s>⟧" in result.err


def test_the_example_of_the_answers_is_shown_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    inputs = (root / "plain" / "model", root / "texts.jsonl", "--output-dir", tmp_path / "new")
    result = at_terminal(DOWN + ENTER * 6 + "n", *inputs)
    assert result.code == 1
    assert "⟦0 and 1 are 1</s>⟧" in result.err
    assert list(tmp_path.iterdir()) == []
    assert at_terminal(DOWN + ENTER * 7, *inputs).code == 0


@pytest.mark.parametrize("number", range(9))
def test_ctrl_c_at_any_question_leaves_nothing_written(root: Path, tmp_path: Path, number: int) -> None:
    inputs = (root / "model", root / "chats.jsonl", "--output-dir", tmp_path / "new")
    result = at_terminal(ENTER * number + CTRL_C, *inputs)
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_asks_nothing_where_the_mode_is_given_or_yes(root: Path, tmp_path: Path) -> None:
    for name, flags in (("yes", ["--yes"]), ("mode", ["--mode", "fixed"])):
        result = at_terminal("", root / "plain/model", root / "texts.jsonl", *flags, "--output-dir", tmp_path / name)
        assert result.code == 0, result.err
        assert Experiment.load(tmp_path / name)


def test_an_answer_that_the_data_refuses_is_one_line(root: Path, tmp_path: Path) -> None:
    keys = ENTER + CLEAR + "{question}" + ENTER * 20
    result = at_terminal(keys, root / "plain/model", root / "texts.jsonl", "--output-dir", tmp_path / "new")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: row 1 has no column 'question'")
    assert list(tmp_path.iterdir()) == []


# A real terminal


QUESTIONS = (
    "What should the adapter learn from?",
    "Keep system messages?",
    "A prompt before which turn",
    "Window length L",
    "Longest sequence",
    "Windows on a sequence N",
    "LoRA rank",
    "Report training to",
    "Write the experiment to",
)


def on_pseudo_terminal(command: list[str], directory: Path, answers: dict[str, str]) -> tuple[int, str]:
    """Run a program on a terminal of its own, answering each question as it appears; exit code and what it showed."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, cwd=directory, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True
    )
    os.close(its)
    shown, begun, waiting = "", time.monotonic(), list(answers.items())
    try:
        while time.monotonic() < begun + PATIENCE:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    read = os.read(ours, 65536).decode(errors="replace")
                except OSError:  # How Linux says that the other end is closed.
                    break
                shown += read
                if "\x1b[6n" in read:
                    # Asked where the cursor is, a terminal says so.
                    os.write(ours, b"\x1b[1;1R")
            if waiting and waiting[0][0] in shown:
                os.write(ours, waiting.pop(0)[1].encode())
        return process.wait(timeout=PATIENCE), shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_on_a_real_terminal_every_default_may_be_accepted(root: Path, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("ptp_distill"))
    command = [program, str(root / "model"), str(root / "chats.jsonl")]
    code, shown = on_pseudo_terminal(command, tmp_path, dict.fromkeys(QUESTIONS, ENTER))
    assert code == 0, shown
    directory = tmp_path / "experiments" / "model_chats_prompt-distill"
    found = look(root, "model", "chats.jsonl")
    expected = Answers().settings(found)
    config = Experiment.load(directory).config
    assert config == ExperimentConfig(
        **expected
        | {
            "base_model": str(root / "model"),
            "data": expected["data"] | {"path": str(root / "chats.jsonl")},
            "sampling": {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
        }
    )
    assert shown.index("⟦the model's answer⟧") < shown.index("Write the experiment to")
    assert shown.rstrip().endswith("experiments/model_chats_prompt-distill")
