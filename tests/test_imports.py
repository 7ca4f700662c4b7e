import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptp

SOURCE = Path(ptp.__file__).parent
FOUNDATION = {"sampling", "config", "errors", "records", "cache", "attention"}
ALLOWED = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "data": FOUNDATION | {"data"},
    "model": FOUNDATION | {"model"},
    "training": FOUNDATION | {"training", "data", "model"},
    "decoding": FOUNDATION | {"decoding", "model"},
}


def imported_parts(file: Path) -> Iterator[str]:
    """Second parts of the names a file imports from ptp, wherever in the file: "model" for `ptp.model.masks`."""
    package = ["ptp", *file.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "ptp" else [module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("ptp."))


@pytest.mark.parametrize("part", ALLOWED)
def test_dependencies_point_one_way(part: str) -> None:
    files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else sorted((SOURCE / part).rglob("*.py"))
    assert files
    wrong = {f"{file.relative_to(SOURCE)} → {name}" for file in files for name in imported_parts(file)} - {
        f"{file.relative_to(SOURCE)} → {name}" for file in files for name in ALLOWED[part]
    }
    assert not wrong


def test_every_part_of_the_package_is_known_here() -> None:
    free = {"__init__", "__main__", "__pycache__", "cli", "server", "evaluation", "experiment", "stages", "demo"}
    parts = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - free <= set(ALLOWED)
