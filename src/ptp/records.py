"""Strict typed records: every setting of this project is a frozen pydantic model made by these rules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ptp.errors import ConfigError


class Record(BaseModel):
    """A frozen record of settings; an unknown key or a bad value is a `ConfigError` of one line.

    Constructing one from Python, from YAML and from an override on the command line gives the same message:
    what arrived, what was expected, and for a misspelt key the nearest known one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(error, type(self))) from None


def unknown_key(key: str, known: Iterable[str], where: str) -> str:
    """The one line for a key that does not exist, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r} in {where}; {hint}"


SHOWN_CHARACTERS, SHOWN_DIGITS = 80, 12
"""Of a value, and of a hash, in a message."""


def differences(before: Record | Mapping[str, object], now: Record | Mapping[str, object]) -> str:
    """What differs, with both values, in the order of `now`; empty if nothing does."""
    old, new = dict(before), dict(now)

    def shown(name: str, value: object) -> str:
        return str(value)[: SHOWN_DIGITS if "fingerprint" in name else SHOWN_CHARACTERS] or "none"

    return " and ".join(
        f"{name} ({shown(name, old.get(name))}; now {shown(name, value)})"
        for name, value in new.items()
        if old.get(name) != value
    )


def _describe(error: ValidationError, record: type[BaseModel]) -> str:
    errors = error.errors(include_url=False)
    # Of the ways to read a value that may be several things, one that came as far as words of its own says most.
    first = next((one for one in errors if one["type"] == "value_error"), errors[0])
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(str(first["loc"][-1]), record.model_fields, record.__name__)
    if first["type"] == "value_error":
        # A validator's own words, or those of a nested record, already say everything.
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{record.__name__} needs '{path}'"
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}; got {first['input']!r}"
