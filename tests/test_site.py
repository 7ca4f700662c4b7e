"""The documentation builds as a site that needs nothing from elsewhere, and its notebook is its page, run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from pages import ROOT, load_script

make_notebook = load_script("make_notebook")


def build(repository: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = build(ROOT, directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
def test_every_page_is_built_and_the_scripts_beside_them_are_not(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) > 10
    assert {path.stem for path in site.glob("*.html")} == pages | {"404"}
    assert not list(site.glob("*.py"))


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loading = re.compile(r'(?:\bsrc=|<link [^>]*href=|url\()["\']?(?:https?:)?//[^"\')>]*')
    texts = {path: path.read_text(encoding="utf-8") for path in [*site.rglob("*.html"), *site.rglob("*.css")]}
    assert {path.name: found for path, text in texts.items() if (found := loading.findall(text))} == {}


@pytest.mark.slow
def test_links_of_pages_lead_to_pages(site: Path) -> None:
    """Strictly, with anchors; files of the repository that are no pages are named."""
    text = (site / "data.html").read_text(encoding="utf-8")
    assert 'href="results.html#which-sampling-temperature"' in text
    assert "<code>paper-checkpoints/README.md</code>" in text and "../paper-checkpoints" not in text


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["[gone](gone.md)", "[gone](results.md#gone)", "[gone](/cli.md)"])
def test_a_broken_link_fails_the_build(broken: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "faq.md").open("a") as page:
        page.write(f"\n{broken}\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0


# The notebook


def test_the_notebook_is_the_page_and_has_run() -> None:
    notebook = nbformat.read(make_notebook.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    expected = [(cell.cell_type, cell.source) for cell in make_notebook.cells()]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == expected, "run python docs/make_notebook.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    printed = "".join(output.text for cell in code for output in cell.outputs if output.output_type == "stream")
    assert "tokens per call" in printed and printed.endswith("identical\n")
    assert "image/svg+xml" in code[-1].outputs[-1].data


@pytest.mark.slow
def test_the_notebook_runs_and_its_adapter_saves_calls(tmp_path: Path) -> None:
    notebook = make_notebook.run(tmp_path)
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    assert float(re.search(r"calls: ([\d.]+) tokens per call", printed).group(1)) > 1.5
