from pathlib import Path

import pytest

from ptp.chat.commands import COMMANDS, parse, parse_save
from ptp.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/reset", ("reset", "")),
        ("/reset  ", ("reset", "")),
        ("/system You are\na poet. ", ("system", "You are\na poet.")),
        ("/set temperature 0.7", ("set", "temperature 0.7")),
        ("/color", ("colour", "")),
        ("/quit", ("exit", "")),
        ("What is 1/2?", None),
        (" /etc/passwd holds what?", None),
    ],
)
def test_a_line_that_begins_with_a_slash_is_a_command(line: str, command: object) -> None:
    assert parse(line) == command


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sytem x", "unknown command /sytem; did you mean /system?"),
        ("/etc/passwd holds what?", "needs a space before it"),
        ("/", "unknown command /;"),
        ("/exit now", "/exit takes nothing behind it; got 'now'"),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(line)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_command_is_known_by_its_name() -> None:
    assert [parse(f"/{command.name}") for command in COMMANDS] == [(command.name, "") for command in COMMANDS]


def test_a_file_to_save_to_may_have_spaces_and_a_home() -> None:
    assert parse_save("'my chat.json'") == (Path("my chat.json"), False)
    assert parse_save("--overwrite ~/chat.json") == (Path.home() / "chat.json", True)
    for wrong in ("", "--overwrite", "my chat.json", "'chat.json"):
        with pytest.raises(ConfigError, match="/save"):
            parse_save(wrong)
