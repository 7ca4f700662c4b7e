"""The pair that comes with the package, and the program that makes it."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import check_refused, typed
from huggingface_hub import ModelCard
from pages import ROOT, load_script
from safetensors.torch import load_file
from terminal import terminal

from ptp.cli import generate
from ptp.cli.common import STARTER
from ptp.cli.main import main
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.errors import DataError
from ptp.model.adapter import fingerprint
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.sampling import SamplingRule

pytestmark = pytest.mark.usefixtures("no_foreign_bars")

PROMPT = "def fibonacci(n):"
SEED, NUM_TOKENS = 3, 48
MOST_BYTES = 20_000_000

make_starter = load_script("make_starter", "scripts")


def answer(*arguments: object) -> dict[str, Any]:
    options = ("--prompt", PROMPT, "--budget", 12, "--seed", SEED, "--max-new-tokens", NUM_TOKENS, "--json")
    result = typed(generate.main, *arguments, *options)
    assert result.code == 0, result.err
    return json.loads(result.out)


def answered_plainly(base_model: Path, rule: SamplingRule) -> list[int]:
    """The same text by the base model alone."""
    model, tokenizer = load_base_model(str(base_model)).eval(), load_tokenizer(str(base_model))
    request = make_request(model, tokenizer(PROMPT)["input_ids"], NUM_TOKENS, SEED, sequence=0)
    return decode_plainly(model, request, rule)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The pair as it is shipped


def test_without_a_directory_an_answer_comes_and_is_the_base_model_s_own() -> None:
    record = answer()
    assert record["dtype"] == "float32"
    assert record["token_ids"] == answered_plainly(STARTER / "base_model", SamplingRule(**record["sampling"]))
    assert record["num_accepted_tokens"] > 0


def test_a_server_without_a_directory_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("ptp.server.run.serve", lambda service, *_, **__: served.append(service))
    result = typed(main, "serve", "--port", 0, "--budget", 8)
    assert result.code == 0, result.err
    assert [service.name for service in served] == ["starter"]


def test_it_is_small() -> None:
    assert sum(map(len, files(STARTER).values())) <= MOST_BYTES


def test_its_card_says_where_it_comes_from_and_what_was_measured() -> None:
    check_card(STARTER)


def check_card(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    measured = json.loads((folder / "adapter" / "measurement.json").read_text())
    origin = json.loads((folder / "base_model" / "origin.json").read_text())
    num_parameters = sum(each.numel() for each in load_file(folder / "base_model" / "model.safetensors").values())
    for words in (
        f"a Llama of {num_parameters:,} parameters",
        f"standard library of Python {origin['python']}",
        f"{origin['size']['teacher_steps']:,} steps of {origin['size']['teacher_batch_size']} texts",
        "PSF-2.0",
        f"| {measured['budget']} | {measured['tokens_per_call']:.2f} |",
    ):
        assert words in card.content, words
    assert card.data.license == "apache-2.0"
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (folder / "base_model" / "LICENSE-PYTHON.txt").read_text()
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["tokens_per_call"] == round(measured["tokens_per_call"], 3)
    assert found["speedup"] > 0


def test_a_wheel_holds_all_of_it(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src" / "ptp", tmp_path / "src" / "ptp", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("ptp/starter/"): archive.read(name) for name in archive.namelist()}
    shipped = files(STARTER)
    assert shipped == {name: packed.get(name) for name in shipped}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is absent: nothing was typed into a terminal")
def test_on_a_terminal_it_says_what_it_is_and_completes_functions(tmp_path: Path) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ptp.cli.main", "generate", "--budget", 12]
    with terminal(command, environment) as window:
        screen = window.wait("/help lists commands")
        assert screen.splitlines()[0] == generate.STARTER_NAME
        assert screen.splitlines()[2] == generate.STARTER_HINT
        window.enter(PROMPT)
        lines = window.wait("tokens per call").splitlines()
        assert lines[lines.index(f"> {PROMPT}") + 1].startswith("    ")
        window.press("C-d")
        window.wait("left with code 0")
    with terminal([*command, "--prompt", PROMPT], environment) as window:
        lines = window.wait("tokens per call").splitlines()
        assert lines[lines.index(PROMPT) + 1].startswith("    ")


# Making it


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An experiment that ends with the shipped pair, of which bench measured nothing."""
    shutil.copytree(STARTER / "base_model", tmp_path / "experiment" / "teacher")
    shutil.copytree(STARTER / "adapter", tmp_path / "experiment" / "adapter")
    return tmp_path / "experiment"


def test_the_folder_is_replaced_whole(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "starter"
    make_starter.write_starter(made, folder)
    (folder / "old").write_text("of another pair")
    make_starter.write_starter(made, folder)
    assert sorted(files(folder)) == sorted(files(STARTER))
    assert sorted(tmp_path.iterdir()) == [made, folder]
    assert answer(folder)["token_ids"] == answer()["token_ids"]


def test_a_pair_that_is_too_large_leaves_the_one_before(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starter").mkdir()
    (tmp_path / "starter" / "old").write_text("of another pair")
    monkeypatch.setattr(make_starter, "MOST_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"takes [\d,]+ bytes, and 1,000,000 may be shipped"):
        make_starter.write_starter(made, tmp_path / "starter")
    assert files(tmp_path / "starter") == {"old": b"of another pair"}
    assert sorted(tmp_path.iterdir()) == [made, tmp_path / "starter"]


def test_a_base_model_is_stored_in_half_the_bytes_and_runs_in_float32(tiny_llama: Callable, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    make_starter.finish_base_model(tmp_path, make_starter.TINY)
    stored = files(tmp_path)
    assert {each.dtype for each in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load_base_model(str(tmp_path))
    assert loaded.dtype == torch.float32
    assert fingerprint(loaded) == fingerprint(model)
    make_starter.finish_base_model(tmp_path, make_starter.TINY)
    assert files(tmp_path) == stored


def test_a_pair_that_is_not_lossless_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_starter, "make_base_model", lambda *_: None)
    monkeypatch.setattr(make_starter, "finish_base_model", lambda *_: None)
    monkeypatch.setattr(make_starter, "make_parallel", lambda *_: SimpleNamespace(count=lambda verdict: 1))
    monkeypatch.setattr(make_starter, "write_starter", lambda *_: pytest.fail("it was written"))
    arguments = ("--directory", tmp_path, "--to", tmp_path / "starter")
    check_refused(typed(make_starter.main, *arguments), "a text differs from plain decoding")


@pytest.mark.slow
def test_one_command_makes_a_pair_and_its_card_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    directory, folder = tmp_path / "experiment", tmp_path / "starter"
    script = [sys.executable, str(ROOT / "scripts" / "make_starter.py"), "--size", "tiny"]
    command = [*script, "--directory", str(directory), "--to", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(files(folder)) == sorted(files(STARTER))
    check_card(folder)
    assert json.loads((directory / "adapter" / "measurement.json").read_text()) == json.loads(
        (folder / "adapter" / "measurement.json").read_text()
    )
    record = answer(folder)
    assert record["token_ids"] == answered_plainly(folder / "base_model", SamplingRule(**record["sampling"]))
    before = files(folder)
    subprocess.run(command, check=True, capture_output=True)
    assert files(folder) == before
    assert len((directory / "bench.jsonl").read_text().splitlines()) == 1
