import dataclasses
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from huggingface_hub import HfApi
from pages import ROOT, blocks, code_spans, each_page, load_script, prose
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ptp import Decoder, PTPConfig, PTPModel
from ptp.cli.main import app
from ptp.data.documents import Document, save_shard
from ptp.data.store import Provenance
from ptp.decoding import custom_generate
from ptp.evaluation.bench import Figures
from ptp.evaluation.experiment_bench import Bench
from ptp.evaluation.measurement import Measurement
from ptp.model.adapter import AdapterSettings
from ptp.stages.train import TrainingResult

make_cli, make_api = load_script("make_cli"), load_script("make_api")


# Commands


def test_the_page_of_commands_is_the_program_s_help() -> None:
    text = make_cli.PAGE.read_text(encoding="utf-8")
    if f"with typer {typer.__version__}." not in text:
        pytest.skip("another version of typer words the help differently")
    assert text == make_cli.page(), "run python docs/make_cli.py"


@pytest.mark.parametrize("name", [name for name in make_cli.commands() if name != "ptp"])
def test_the_page_of_commands_names_every_option(name: str) -> None:
    text = make_cli.PAGE.read_text(encoding="utf-8")
    missing = [option for option in options(name) if not re.search(rf"{option}\b", text)]
    assert f"`{name}`" in text or f"## {name}\n" in text
    assert not missing


def test_an_installed_program_is_the_subcommand_of_its_name() -> None:
    for script in make_cli.scripts():
        if script != "ptp":
            subcommand = script.removeprefix("ptp_")
            program = importlib.import_module(f"ptp.cli.{subcommand}")
            assert make_cli.commands()[script].callback.__wrapped__ is program.command, script


def options(name: str) -> list[str]:
    return [option for param in make_cli.commands()[name].params for option in param.opts if option.startswith("--")]


def test_the_page_of_python_names_is_what_the_docstrings_say() -> None:
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run python docs/make_api.py"


# Names, links, paths


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or leads from one to an attribute or a declared field."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if importlib.util.find_spec(parts[0]) is None:
            return False
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            fields = getattr(found, "model_fields", None) or getattr(found, "__dataclass_fields__", {})
            if part in fields:
                field = fields[part]
                found = getattr(field, "annotation", None) or getattr(field, "type", None)
            elif hasattr(found, part):
                found = getattr(found, part)
            else:
                return False
        return True
    return False


@each_page
def test_every_dotted_name_in_the_docs_exists(page: Path) -> None:
    names = [span for span in code_spans(page) if re.fullmatch(r"ptp(\.\w+)+", span)]
    assert [name for name in names if not resolves(name)] == []


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert resolves("ptp.config.PTPConfig.window")
    assert not resolves("ptp.config.PTPConfig.windows")
    assert not resolves("ptp.configuration")


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_local_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def tracked_files() -> list[Path]:
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a git repository")
    return [ROOT / name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    machine_path = re.compile(rb"(?<![\w./~-])/(?:work|root|tmp)\b")
    files = [path for path in tracked_files() if b"\0" not in path.read_bytes()]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if machine_path.search(line)
    ]
    assert files
    assert found == []


# Formats


@pytest.fixture(scope="module")
def adapter(tiny_llama: Callable, random_adapter: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter beside its base model, as an experiment has them; the tokenizer knows bytes alone."""
    directory = tmp_path_factory.mktemp("experiment")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory / "base")
    tiny_llama(vocab_size=len(alphabet)).save_pretrained(directory / "base")
    base_model = AutoModelForCausalLM.from_pretrained(directory / "base")
    random_adapter(PTPModel(base_model, PTPConfig(lora_rank=2, window=4))).save_pretrained(directory / "adapter")
    return directory


def generate_json(directory: Path, *arguments: str) -> dict[str, Any]:
    command = ["generate", str(directory), "--prompt", "def f(x):", "--seed", "7", "--json", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_page_on_transformers_runs_from_top_to_bottom(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter / "adapter", tmp_path / "experiments" / "demo" / "adapter")
    shutil.copytree(adapter / "base", tmp_path / "experiments" / "demo" / "teacher")
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / "experiments" / "demo" / "adapter" / "ptp_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model": "../teacher"}))
    pushed: list[str] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **options: pushed.append(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, repo_id, **options: SimpleNamespace(commit_url=repo_id))
    # Measuring takes seconds; any budget gives the text.
    monkeypatch.setattr(custom_generate, "Decoder", lambda model, rule, budget: Decoder(model, rule, budget=8))
    names: dict[str, Any] = {}
    for code in blocks(ROOT / "docs" / "transformers.md", "python"):
        exec(code, names)
    assert pushed == ["OWNER/NAME"]
    assert names["logits"].shape[1] == names["length"]


def run_check(adapter: Path, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of the check in docs/formats.md."""
    (tmp_path / "out.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["check_u.py", str(tmp_path / "out.json"), str(adapter / "base")])
    (code,) = blocks(ROOT / "docs" / "formats.md", "python")
    with pytest.raises(SystemExit) as left:
        exec(code, {})
    return int(left.value.code)


@pytest.mark.parametrize(
    "sampling",
    [
        ["--temperature", "0.7", "--top-k", "20", "--top-p", "0.9"],
        ["--min-p", "0.2", "--repetition-penalty", "1.4", "--min-new-tokens", "24"],
        [],
    ],
)
def test_a_stranger_s_check_finds_every_u_in_its_interval(
    adapter: Path, sampling: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = generate_json(adapter, "--max-new-tokens", "24", *sampling)
    assert run_check(adapter, record, tmp_path, monkeypatch) == 0
    record["u"] = record["u"][1:] + record["u"][:1]
    assert run_check(adapter, record, tmp_path, monkeypatch) == 1


def documented_fields(heading: str) -> list[str]:
    """First column of the tables under a heading of docs/formats.md."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return [
        name for row in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]


def test_the_fields_of_generate_json_are_documented(adapter: Path) -> None:
    assert list(generate_json(adapter, "--max-new-tokens", "2")) == documented_fields("`ptp_generate --json`")


def test_the_fields_of_a_benchmark_are_documented() -> None:
    fields = [field.name for record in (Bench, Figures) for field in dataclasses.fields(record)]
    assert sorted(documented_fields("`ptp bench`")) == sorted(fields)


def test_the_fields_of_stores_and_adapters_are_documented(tmp_path: Path) -> None:
    edge = np.zeros(1, np.float32)
    save_shard(tmp_path / "shard", [Document(np.zeros(2, np.int32), ((1, 2),), edge, edge)])
    assert documented_fields("Completion store") == list(Provenance.model_fields)
    assert sorted(documented_fields("Shards")) == sorted(load_file(tmp_path / "shard"))
    results = [field.name for record in (TrainingResult, Measurement) for field in dataclasses.fields(record)]
    assert documented_fields("Adapter directory") == [*AdapterSettings.model_fields, *results]
