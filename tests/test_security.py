"""Files and settings from strangers run no code, write nowhere else, and reach no network."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import pytest
import torch
from command_line import check_refused, notes, typed
from pydantic import BaseModel
from transformers import LlamaForCausalLM

import ptp
from ptp.cli import pregenerate, train
from ptp.data.preparation import fill
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.loading import load_base_model, load_config, load_tokenizer
from ptp.stages import distill as distill_stage
from ptp.stages import pregenerate as pregenerate_stage
from ptp.stages import train as train_stage

pytestmark = pytest.mark.usefixtures("no_foreign_bars")

SOURCE = Path(ptp.__file__).parent
MODULES = sorted(
    ".".join(("ptp", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for file in SOURCE.rglob("*.py")
    if file.name != "__main__.py"
)


# What the source may say


def unsafe(source: str) -> Iterator[str]:
    """What in a file could run code that comes as data: by pickles, by words, by a shell, by a model's own files."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                name = f"{module}.{alias.name}" if module else alias.name
                if name.split(".")[0] in PICKLERS and name != "pickle.UnpicklingError":
                    yield name
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield called
            if called.endswith("torch.load") and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            for name in ("trust_remote_code", "allow_pickle", "shell"):
                if given.get(name, "False") != "False":
                    yield f"{name}={given[name]}"


PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=asked)",
    ],
)
def test_unsafe_code_is_noticed(source: str) -> None:
    assert list(unsafe(source))


def test_safe_code_passes() -> None:
    safe = "yaml.safe_load(text); torch.load(path, weights_only=True); subprocess.run([name]); model.eval()"
    assert not list(unsafe(safe))


def test_the_program_runs_no_code_that_comes_as_data() -> None:
    found = {str(file): list(unsafe(file.read_text(encoding="utf-8"))) for file in SOURCE.rglob("*.py")}
    assert len(found) > 50
    assert {name: names for name, names in found.items() if names} == {}


def test_transformers_loads_without_a_model_s_own_code_wherever_it_is_asked_to() -> None:
    """What is left out there, transformers asks about on a terminal."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{file}:{node.lineno}"


# Files of strangers


@pytest.fixture(scope="module")
def trained(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment that has been trained; not to be changed."""
    experiment = distill_stage.distill(tmp_path_factory.mktemp("trained") / "experiment", config)
    pregenerate_stage.pregenerate(experiment)
    train_stage.train(experiment)
    return experiment


@pytest.fixture
def copy(trained: Experiment, tmp_path: Path) -> Experiment:
    shutil.copytree(trained.directory, tmp_path / "experiment")
    return Experiment.load(tmp_path / "experiment")


class Payload:
    """Unpickled by who does not take care, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_payload_works_where_nobody_takes_care(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "mark"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_the_only_files_in_pickle_s_format_are_the_trainer_s_states_and_hold_numbers(trained: Experiment) -> None:
    """torch.save writes them; what torch.load reads back with weights_only are tensors, numbers, texts."""
    files = [path for path in trained.directory.rglob("*") if path.is_file()]
    # A pickle, or an archive such as torch's that holds one.
    pickles = [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK")]
    assert {path.name for path in pickles} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.parent for path in pickles} == {trained.checkpoints}
    others = [path for path in files if not {trained.checkpoints, trained.events} & set(path.parents)]
    assert {path.suffix for path in others} == {".json", ".yaml", ".md", ".safetensors", ".py", ".txt"}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_would_run_code_is_refused_in_one_line(copy: Experiment, name: str, tmp_path: Path) -> None:
    for checkpoint in copy.checkpoints.glob("checkpoint-*"):
        torch.save(Payload(tmp_path / "mark"), checkpoint / name)
    result = typed(train.main, copy.directory, "train.max_steps=6")
    assert (result.code, result.out) == (2, "")
    last = notes(result)[-1]
    assert last.startswith("error: the last checkpoint in") and "not loaded; remove it" in last
    assert "Traceback" not in result.err
    assert not (tmp_path / "mark").exists()


def test_a_model_with_weights_that_would_run_code_is_refused(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(Payload(tmp_path / "mark"), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        load_base_model(str(tmp_path / "model"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("load", [load_base_model, load_config, load_tokenizer])
def test_a_model_s_own_code_is_not_run(load: Callable[[str], Any], tmp_path: Path) -> None:
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": classes}))
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    with pytest.raises(ConfigError, match="needs Python code of its own, which is not run from here"):
        load(str(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_a_chat_template_is_rendered_in_a_sandbox(
    chat_experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    config = chat_experiment(tmp_path / "inputs")
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "mark") + "') }}"
    (tmp_path / "template.jinja").write_text(template)
    data = config.data.model_copy(update={"chat_template": str(tmp_path / "template.jinja")})
    with pytest.raises(DataError, match="none of the first 24 rows"):
        distill_stage.distill(tmp_path / "experiment", config.model_copy(update={"data": data}))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("scheme", ["{text.__class__}", "{text[0].__class__}", "{text:{text.__class__}}"])
def test_a_prompt_scheme_leads_from_a_row_to_nothing_else(scheme: str) -> None:
    with pytest.raises(DataError, match="asks for an attribute"):
        fill(scheme, {"text": "2 + 2"}, 1)


def test_a_column_whose_name_has_dots_is_named_in_brackets() -> None:
    assert fill("{row[a.b]:.2}", {"row": {"a.b": "texts"}}, 1) == "te"


# Where is written


def text_settings(record: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that may hold any text."""
    for name, field in record.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        kinds |= {inner for kind in kinds for inner in get_args(kind)}
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if str in kinds:
            yield prefix + name
        for kind in inner:
            yield from text_settings(kind, f"{prefix}{name}.")


def test_no_setting_names_a_place_to_write_to() -> None:
    """A new one has to be judged: what it may lead to, and whether that must lie in the experiment directory."""
    read = {"base_model", "data.path", "data.chat_template"}
    names_of_things = {
        *(
            "data.config",
            "data.split",
            "data.revision",
            "data.column",
            "data.prompt_scheme",
            "data.roles",
            "data.tools",
        ),
        *("data.prompt_scheme.role", "data.prompt_scheme.content", "data.tools"),
        *("pregenerate.engine.url", "pregenerate.engine.model", "pregenerate.engine.api_key_env"),
        *("model.auxiliary", "model.lora_targets", "train.optimizer", "train.report_to", "sampling.order"),
    }
    assert set(text_settings(ExperimentConfig)) == read | names_of_things


def test_the_stages_write_into_the_experiment_directory_alone(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Path(config.base_model).parent
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    monkeypatch.chdir(tmp_path)
    directory = distill_stage.distill(tmp_path / "experiment", config).directory
    stages = [
        (pregenerate.main, ()),
        (train.main, ()),
        (main_of("verify"), ("--report", "--num-prompts=2", "--max-new-tokens=4")),
        (main_of("bench"), ("--num-prompts=1", "--max-new-tokens=4", "--repetitions=1")),
    ]
    for program, options in stages:
        assert typed(program, directory, *options).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"experiment"}
    assert {"report.html", "bench.svg", "bench.jsonl", "adapter"} <= {path.name for path in directory.iterdir()}
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*")} == before


def main_of(subcommand: str) -> Callable[[], None]:
    """`ptp SUBCOMMAND` as an entry point whose arguments are those behind it."""
    from ptp.cli.main import main

    def run() -> None:
        sys.argv.insert(1, subcommand)
        main()

    return run


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("pregenerate", "completions"),
        ("pregenerate", "completions/shard-00009.jsonl"),
        ("pregenerate", "cache"),
        ("pregenerate", "runs"),
        ("train", "checkpoints"),
        ("train", "checkpoints/checkpoint-9"),
        ("train", "adapter"),
        ("train", "tensorboard"),
        ("train", "runs/train.json"),
        ("bench", "bench.jsonl"),
    ],
)
def test_nothing_is_written_through_a_link_that_leads_out(
    copy: Experiment, stage: str, name: str, tmp_path: Path
) -> None:
    link, outside = copy.directory / name, tmp_path / "outside"
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    outside.mkdir()
    link.symlink_to(outside)
    result = typed(main_of(stage), copy.directory)
    check_refused(result, f"{link} is a link to {outside}", "nothing is written outside")
    assert not list(outside.iterdir())


def test_completions_of_another_experiment_may_be_linked_for_training(copy: Experiment, tmp_path: Path) -> None:
    copy.completions.rename(tmp_path / "completions")
    copy.completions.symlink_to("../completions")
    assert typed(train.main, copy.directory, "--no-measure").code == 0


def test_an_experiment_directory_may_be_a_link_itself(copy: Experiment, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy.directory)
    assert typed(pregenerate.main, tmp_path / "link").code == 0


def test_what_appears_whole_takes_the_place_of_a_link(copy: Experiment, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (copy.directory / "report.html").symlink_to(tmp_path / "outside")
    assert typed(main_of("verify"), copy.directory, "--report", "--num-prompts=2", "--max-new-tokens=4").code == 0
    assert (tmp_path / "outside").read_text() == "mine"


# The network

OFFLINE = """
import socket
import sys

def refused(*arguments, **_):
    raise AssertionError(f"asked for the network: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused
sys.modules["kernels"] = None  # bitsandbytes looks for its own on the hub where this is installed
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_importing_any_module_asks_nothing_of_the_network() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", OFFLINE, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
