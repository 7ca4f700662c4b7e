"""The questions `ptp_distill` asks on a terminal, and the example it shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import questionary
from questionary import Choice
from rich.panel import Panel
from rich.text import Text

from ptp.cli.common import console
from ptp.config import Mode, Tracker
from ptp.stages.distill import CHAT_MODES, Answers, Example, Survey

MODES: dict[Mode, str] = {
    "prompt-distill": "the model answers the dataset's chats (best speed-up)",
    "prompt-scheme-distill": "the model completes prompts made from the columns (best speed-up)",
    "full-chat": "learn the chats' assistant turns as they are (no sampling)",
    "fixed": "learn texts as they are (no sampling)",
}

SHOWN_CHARACTERS = 1500
"""Of each piece of the example."""


def ask(found: Survey, answers: Answers) -> Answers:
    """Ask for what is open; defaults are what suits model and data. Raises `KeyboardInterrupt` on Ctrl-C."""
    console.print(found.described)
    mode: Mode = _answer(
        questionary.select(
            "What should the adapter learn from?",
            [Choice(f"{name}: {meaning}", value=name) for name, meaning in MODES.items() if found.suits(name)],
            default=found.mode,
        )
    )
    answers = replace(answers, mode=mode)
    if mode == "prompt-scheme-distill":
        scheme = questionary.text("Prompt scheme, over the columns:", answers.scheme(found))
        answers = replace(answers, prompt_scheme=_answer(scheme))
        if found.has_template:
            question = questionary.confirm(
                "Put it into the chat template as the user's turn?", default=answers.user_turn is not False
            )
            answers = replace(answers, user_turn=_answer(question))
    elif answers.column is None and len(found.columns(mode)) > 1:
        column = questionary.select("Which column holds the texts?", list(found.columns(mode)))
        answers = replace(answers, column=_answer(column))
    if mode in CHAT_MODES and "system" in found.shape.roles:
        keep = questionary.confirm("Keep system messages?", default=not answers.drop_system)
        answers = replace(answers, drop_system=not _answer(keep))
    if mode == "prompt-distill":
        turns = questionary.select("A prompt before which turn of the assistant?", ["each", "first"], answers.turns)
        answers = replace(answers, turns=_answer(turns))
    window = _number("Window length L, tokens predicted together:", answers.window)
    max_length = _number("Longest sequence, prompt and completion, in tokens:", answers.max_length or found.max_length)
    windows = answers.windows_per_sequence or max(1, max_length // window)
    return replace(
        answers,
        window=window,
        max_length=max_length,
        windows_per_sequence=_number("Windows on a sequence N (N·L about its length):", windows),
        lora_rank=_number("LoRA rank:", answers.lora_rank),
        tracker=_answer(questionary.select("Report training to:", get_args(Tracker), answers.tracker)),
    )


def ask_to_write(directory: Path) -> bool:
    """Whether the directory may be written."""
    return bool(_answer(questionary.confirm(f"Write the experiment to {directory}?", default=True)))


def show(example: Example) -> None:
    """Show the first document on standard error, with what is trained marked."""
    text = Text()
    for piece, trained in example.pieces:
        short = piece if len(piece) <= SHOWN_CHARACTERS else f"{piece[:SHOWN_CHARACTERS]} […]"
        text.append(f"⟦{short}⟧" if trained else short, style="bold green" if trained else "dim")
    if example.is_prompt:
        text.append("⟦the model's answer⟧", style="bold green")
    console.print(Panel(text, title="first example; ⟦trained⟧", title_align="left"))


def _number(question: str, default: int) -> int:
    def valid(text: str) -> bool | str:
        return (text.isdecimal() and int(text) > 0) or "a positive whole number, please"

    return int(_answer(questionary.text(question, str(default), validate=valid)))


def _answer(question: questionary.Question) -> Any:
    return question.unsafe_ask()
