"""The stages of an experiment, as the commands and the demo run them: distill → pregenerate → train.

Each takes an `Experiment`, reads and writes its directory, and goes on where it was stopped. Progress is reported to
a callback; nothing here prints.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a stage is: `done` of `total` of what is named, and the tokens sampled since it was told before."""

    def __call__(self, what: str, done: int, total: int, tokens: int = 0) -> None: ...


def unheard(what: str, done: int, total: int, tokens: int = 0) -> None:
    """A progress that nobody watches."""
