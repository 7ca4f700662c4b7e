"""A hook of mkdocs: links to files of the repository that are no pages become their text and path."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """[tests](../tests/README.md) on GitHub is "tests (`tests/README.md`)" here."""
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
