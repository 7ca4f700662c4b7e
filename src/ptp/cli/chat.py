"""A chat on a terminal: what `ptp_generate DIR` does there without a prompt."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from ptp.chat.chat import Chat
from ptp.chat.commands import COMMANDS, parse, parse_save
from ptp.chat.figures import NO_DRAFTS, Figures
from ptp.errors import ConfigError, PTPError
from ptp.evaluation.colour import hue_index, printable
from ptp.records import unknown_key

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

LOCAL_MODES = 3
"""Where they stand among a terminal's attributes."""

HUES = ("blue", "yellow", "green", "magenta")
"""The hues of `ptp.evaluation.colour` as a terminal names them: its own palette suits its background."""

KEYS = (
    ("Ctrl-C", "stop the answer and keep what is written (twice: at once); at the prompt, clear the line"),
    ("Alt-Enter", "a new line in the message; a text of several lines can be pasted as it is"),
    ("Up, Ctrl-R", "earlier messages, also of other chats"),
)

SPEEDS = (
    "Speeds count all calls but an answer's first, which has the prompt to read. Plain decoding is the bare loop, one "
    "token a call, timed once on this machine: with this model, behind a prompt of this chat, under these settings."
)


def history_file() -> Path:
    """Where lines are kept: in the user's state directory, which no other user can read."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ptp" / "chat_history"


class History(FileHistory):
    """Lines kept in a file, where there can be one."""

    def __init__(self, path: Path) -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        super().__init__(str(path))

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class Commands(Completer):
    """Completes commands, names of settings and files; never a message."""

    def __init__(self, setting_names: list[str]) -> None:
        self.setting_names = setting_names
        self.files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        word, space, rest = before.partition(" ")
        if not before.startswith("/"):
            return
        if not space:
            for command in COMMANDS:
                if command.name.startswith(word[1:]):
                    yield Completion(f"/{command.name}", -len(word), display_meta=command.meaning)
        elif word == "/set" and " " not in rest:
            yield from (Completion(name, -len(rest)) for name in self.setting_names if name.startswith(rest))
        elif word == "/save":
            yield from self.files.get_completions(Document(rest.rpartition(" ")[2]), complete_event)


def converse(chat: Chat, name: str, hint: str = "") -> None:
    """Chat on this terminal until the user leaves. name: of the model. hint: what to say to it."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        [("bold", "> ")],
        history=History(history_file()),
        completer=Commands([setting for setting, _ in chat.settings.named()]),
        key_bindings=keys,
        prompt_continuation="  ",
    )
    with silent_keyboard():
        Conversation(chat, Console(markup=False, highlight=False)).run(session.prompt, name, hint)


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """What is typed while an answer is written does not appear in its midst; the next prompt shows it."""
    if termios is None:
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = termios.tcgetattr(descriptor)
    silent[LOCAL_MODES] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Conversation:
    """Reads lines and answers them. coloured: whether tokens are coloured by the call that wrote them."""

    def __init__(self, chat: Chat, console: Console) -> None:
        self.chat, self.console, self.coloured = chat, console, False
        self.has_told_of_no_drafts = False

    def run(self, read: Callable[[], str], name: str, hint: str = "") -> None:
        """Until the user leaves. read: a line, `KeyboardInterrupt` for one that is given up, `EOFError` at the end."""
        self.note(name)
        if not self.chat.templated:
            self.note("no chat template: each text is completed by itself, without those before it")
        if hint:
            self.note(hint)
        self.note_rule()
        self.note("/help lists commands, Ctrl-D leaves\n")
        while True:
            try:
                line = read()
                command = parse(line)
                if command is not None and command[0] == "exit":
                    return
                if command is not None:
                    getattr(self, f"on_{command[0]}")(command[1])
                elif line.strip():
                    self.answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            except PTPError as error:
                self.console.print(str(error), style="red")
            except torch.OutOfMemoryError as error:
                self.console.print(f"out of memory: {str(error).splitlines()[0]}; try a shorter chat", style="red")

    def note(self, text: str) -> None:
        self.console.print(text, style="dim")

    def write(self, text: str, style: str | None) -> None:
        """A part of a line, which the terminal itself breaks: what is copied from it is whole."""
        self.console.out(text, style=style, highlight=False, end="")

    def table(self, rows: Iterable[tuple[str, object]]) -> None:
        rows = list(rows)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.note(f"{name:<{width}}  {value}")

    def answer(self, text: str) -> None:
        last, num_answers = "\n", len(self.chat.turns)
        # Of a text that is completed, the key that ended it has broken the line already.
        break_is_there = not self.chat.templated
        try:
            with first_interrupt() as stopped, closing(self.chat.answer(text, stopped)) as pieces:
                for piece in pieces:
                    shown = printable(piece.text)
                    if break_is_there:
                        shown, break_is_there = shown.removeprefix("\n"), False
                    style = HUES[hue_index(piece.call)] + ("" if piece.accepted else " underline")
                    self.write(shown, style if self.coloured else None)
                    last = shown[-1:] or last
        except KeyboardInterrupt:
            pass  # pressed again: what is written is kept all the same
        finally:
            if last != "\n":
                self.console.out("")
        if len(self.chat.turns) == num_answers:
            self.note("stopped before the first token; the message is not part of the chat")
        else:
            self.after()

    def after(self) -> None:
        """The line below an answer. Plain decoding is timed before, once, but never after Ctrl-C."""
        chat, turn = self.chat, self.chat.turns[-1]
        if turn.finish_reason is not None:
            with suppress(KeyboardInterrupt):
                chat.measure_plain_speed()
        end = {"stop": "", "length": "; cut at max_new_tokens", None: "; stopped"}[turn.finish_reason]
        if chat.is_full:
            end = "; the context is full" + ", /reset begins a new chat" * chat.templated
        figures = Figures.of([turn])
        self.note(figures.described(chat.plain_speed) + end)
        if chat.settings.budget == "auto" and not figures.num_drafts and not self.has_told_of_no_drafts:
            self.note(NO_DRAFTS.format("/set budget 12"))
            self.has_told_of_no_drafts = True
        self.console.out("")

    def on_reset(self, _: str) -> None:
        self.chat.reset()
        self.note("a new chat")

    def on_system(self, text: str) -> None:
        if text:
            self.chat.tell(None if text == "-" else text)
        self.note(f"system message: {self.chat.system or 'none'}")

    def on_set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        before = self.chat.settings.rule
        if value:
            self.chat.set(name, value.strip())
        settings = dict(self.chat.settings.named())
        if name:
            name = name.replace("-", "_")
            if name not in settings:
                raise ConfigError(unknown_key(name, settings, "/set"))
            settings = {name: settings[name]}
        self.table((name, shown(value)) for name, value in settings.items())
        if self.chat.settings.rule != before:
            self.note_rule()

    def on_stats(self, _: str) -> None:
        chat, figures = self.chat, self.chat.figures
        if not chat.turns:
            self.note("no answer yet")
            return
        turn, plain = chat.turns[-1], chat.plain_speed
        num_prompt, num_written = len(turn.request.prompt_ids), len(turn.token_ids)
        accepted = f", {figures.num_accepted / figures.num_drafts:.0%}" if figures.num_drafts else ""
        self.table(
            [
                ("answers", len(chat.turns)),
                ("in all", figures.described(plain)),
                ("drafts accepted", f"{figures.num_accepted:,} of {figures.num_drafts:,}{accepted}"),
                ("plain decoding", "not measured" if plain is None else f"{plain:,.1f} tokens/s"),
                ("last prompt", f"{num_prompt:,} tokens, {turn.num_reused:,} of them read in earlier turns"),
                ("context", f"{num_prompt + num_written:,} of {chat.context or 'unknown'} tokens"),
            ]
        )
        self.note(SPEEDS)

    def note_rule(self) -> None:
        """Say so if the adapter was trained for another rule."""
        trained = self.chat.model.rule
        if trained not in (None, self.chat.settings.rule):
            self.note(f"the adapter was trained for {trained}: the text is as right, but fewer drafts may be accepted")

    def on_colour(self, _: str) -> None:
        self.coloured = not self.coloured
        if not self.coloured:
            self.note("colours off")
            return
        this, following = HUES[:2]
        self.write("one colour for each call: ", None)
        self.write("accepted drafts", this)
        self.write(" the call's own token", f"{this} underline")
        self.write(" the next call's drafts", following)
        self.write(" its own token", f"{following} underline")
        self.console.out(" …")

    def on_save(self, argument: str) -> None:
        path, overwrite = parse_save(argument)
        self.chat.save(path, overwrite)
        self.note(f"saved to {path}")

    def on_help(self, _: str) -> None:
        self.table((f"/{command.name} {command.argument}", command.meaning) for command in COMMANDS)
        self.table(KEYS)
        self.note(SPEEDS)


def shown(value: object) -> str:
    """A setting's value; texts in quotes."""
    return " ".join(map(repr, value)) or "off" if isinstance(value, tuple) else str(value)


@contextmanager
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside the block. So a call is not broken off; pressed again, it is."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
