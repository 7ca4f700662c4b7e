"""Write docs/api.md from the docstrings of the public names: `python docs/make_api.py`; `--check` only compares."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import ptp

PAGE = Path(__file__).with_name("api.md")


def page() -> str:
    """The whole of docs/api.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ("# Python names", "", "<!-- Written by docs/make_api.py. Do not edit. -->", "")
    yield "What `from ptp import …` gives. Settings of experiments, stages and requests are in the modules that"
    yield "[method.md](method.md) names."
    for name in ptp.__all__:
        found = getattr(ptp, name)
        yield from ("", f"## {name}", "", f"`{found.__module__}.{name}`", "")
        yield from _described(found)
        for method, function in _methods(found):
            yield from ("", f"### {name}.{method}", "", *_described(function))


def _described(found: Any) -> Iterator[str]:
    """Signature, where there is one to be called by, and docstring."""
    if not (isinstance(found, type) and issubclass(found, Exception)):
        yield from ("```text", *_signature(found), "```", "")
    yield from inspect.cleandoc(found.__doc__ or "").splitlines()


def _signature(found: Any) -> Iterator[str]:
    """A call with a line for each parameter; annotations as they are written, without quotes."""
    parameters = [parameter for name, parameter in inspect.signature(found).parameters.items() if name != "self"]
    yield f"{found.__name__}({'' if parameters else ')'}"
    for parameter in parameters:
        kind = parameter.annotation if isinstance(parameter.annotation, str) else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        yield f"    {parameter.name}{kind and f': {kind}'}{default},"
    if parameters:
        yield ")"


def _methods(found: Any) -> Iterator[tuple[str, Any]]:
    """Public methods of the class itself that say what they do, in the order of the source."""
    if not isinstance(found, type) or issubclass(found, (BaseModel, Exception)):
        return
    for name, member in vars(found).items():
        function = getattr(found, name)
        is_method = inspect.isroutine(function) and not isinstance(member, property)
        if is_method and function.__doc__ and not name.startswith("_"):
            yield name, function


def main() -> None:
    """Write the page, or say that it has drifted."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/api.md differs from the docstrings; run python docs/make_api.py")


if __name__ == "__main__":
    main()
