"""Write docs/quickstart.ipynb from docs/quickstart.md, run: `python docs/make_notebook.py`.

The page's Python blocks become cells of code, what stands between them cells of text; so the page is what one edits.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PAGE = Path(__file__).with_name("quickstart.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")
PATIENCE = 600
"""Seconds that a cell may take."""


def cells() -> list[nbformat.NotebookNode]:
    """The page in cells, not run."""
    # Every second part is what a fence holds.
    parts = re.split(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    makers = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    return [makers[number % 2](part.strip(), id=f"cell-{number}") for number, part in enumerate(parts) if part.strip()]


def run(directory: Path) -> nbformat.NotebookNode:
    """The notebook with what its cells gave, run in a directory. Raises `CellExecutionError` where one fails."""
    notebook = nbformat.v4.new_notebook(cells=cells())
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(directory)}})
    client.execute()
    for cell in notebook.cells:
        # Times differ in every run, and bars of other libraries say nothing.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    """Run the page and write the notebook; nothing is written if a cell fails."""
    with tempfile.TemporaryDirectory() as directory:
        notebook = run(Path(directory))
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    sys.exit(main())
