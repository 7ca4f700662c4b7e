import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptp

HEAVY = {
    *("datasets", "fastapi", "openai", "prompt_toolkit", "questionary", "tensorboard", "uvicorn"),
    *("ptp.cli.questions", "ptp.cli.chat"),
}
"""Needed by few commands, and slow to import: they are imported where they are used."""

SOURCE = Path(ptp.__file__).parent
FOUNDATION = {
    "sampling",
    "calibration",
    "config",
    "errors",
    "records",
    "files",
    "processes",
    "soft_pick",
    "cache",
    "attention",
    "layer_kinds",
    "gpt_neo",
}
ALLOWED = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "scaling": FOUNDATION,
    "data": FOUNDATION | {"data"},
    "model": FOUNDATION | {"model"},
    "training": FOUNDATION | {"training", "data", "model"},
    "decoding": FOUNDATION | {"decoding", "model"},
    "chat": FOUNDATION | {"chat", "data", "model", "decoding", "evaluation", "streaming"},
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


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_dependencies_point_one_way(part: str) -> None:
    files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else sorted((SOURCE / part).rglob("*.py"))
    assert files
    wrong = {f"{file.relative_to(SOURCE)} → {name}" for file in files for name in imported_parts(file)} - {
        f"{file.relative_to(SOURCE)} → {name}" for file in files for name in ALLOWED[part]
    }
    assert not wrong


def test_every_part_of_the_package_is_known_here() -> None:
    free = {
        "__init__",
        "__main__",
        "__pycache__",
        "cli",
        "server",
        "starter",
        "streaming",
        "evaluation",
        "experiment",
        "stages",
        "demo",
    }
    parts = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - free <= set(ALLOWED)


def imported_at_once(file: Path) -> set[str]:
    """Modules, and the packages they are in, that a file imports as soon as it is imported itself."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found | {name.split(".")[0] for name in found}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    files = {".".join(("ptp", *file.relative_to(SOURCE).with_suffix("").parts)): file for file in SOURCE.rglob("*.py")}
    assert "numpy" in imported_at_once(files["ptp.data.documents"])
    # Of these files the import is the use.
    light = {name for name in files.keys() - HEAVY if not name.startswith("ptp.server.")}
    assert not {f"{name} → {heavy}" for name in light for heavy in imported_at_once(files[name]) & HEAVY}
