"""No block of a page goes unchecked: commands parse as their programs parse them, code runs, whole pages are run.

Pages that are run find what they name where they stand: a tiny model in MODEL, an experiment in DIR, data in DATASET.
"""

import ast
import json
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from command_line import typed
from endpoint_server import Reply, completion, serving
from pages import PAGES, ROOT, Command, blocks, code_spans, commands, each_page, fenced, load_script
from torch.distributed.run import get_args_parser
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from ptp.cli.main import main
from ptp.config import TrainConfig
from ptp.demo import DEMO, demo_config
from ptp.experiment import Experiment, ExperimentConfig, apply_override
from ptp.model.loading import load_tokenizer
from ptp.server.bodies import CompletionBody
from ptp.stages.distill import distill
from ptp.stages.pregenerate import pregenerate
from ptp.stages.train import train

make_cli = load_script("make_cli")

LANGUAGES = {"sh", "python", "json", "yaml", "text"}

# Checked: what a command says is what its program understands


def check_ours(words: list[str]) -> None:
    """Arguments parse, and settings that are no placeholders make an experiment."""
    known = make_cli.commands()
    name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    assert name in known, f"no such command: {words}"
    arguments = words[len(name.split()) :]
    if arguments == ["--help"]:
        return
    assert name != "ptp", f"no such command: {words}"
    known[name].make_context(name, list(arguments))
    check_settings([word for word in arguments if re.fullmatch(r"\w+(\.\w+)+=.*", word)])


def check_settings(overrides: list[str]) -> None:
    settings = demo_config(DEMO).model_copy(update={"train": TrainConfig()}).model_dump(mode="json")
    for override in overrides:
        apply_override(settings, override)
    if not any(re.fullmatch("[A-Z]+", override.partition("=")[2]) for override in overrides):
        ExperimentConfig(**settings)


def check_launched(arguments: Any) -> None:
    assert arguments.module and arguments.training_script == "ptp.cli.main", f"launches something else: {arguments}"
    check_ours(["ptp", *arguments.training_script_args])


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert words[1] in targets, f"no such make target: {words}"


def check_python(words: list[str]) -> None:
    """A script of the repository, or one that a page tells to save; the script names every option."""
    script, *arguments = words[1:]
    if script == "-m":
        assert arguments[0] == "pytest", f"not known: {words}"
        return
    path = ROOT / script
    # The paper's benchmarks share their options.
    sources = path.parent.glob("*.py") if path.parent.name == "paper" else [path] if path.exists() else []
    source = "".join(file.read_text(encoding="utf-8") for file in sources) or saved_scripts()[script]
    used = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    assert [option for option in used if f'"{option}"' not in source] == [], f"no such option: {words}"


@cache
def saved_scripts() -> dict[str, str]:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    return dict(re.findall(r"Save this as `(\w+\.py)`:\n\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    allowed = {*project["project"]["dependencies"], *(name for group in extras.values() for name in group)}
    allowed |= {requirement.partition(">=")[0] for requirement in allowed}
    assert words[1] == "install" and set(words[2:]) <= allowed, f"not what pyproject.toml asks for: {words}"


def check_curl(words: list[str]) -> None:
    """A request to `ptp serve`."""
    assert words[1] == "http://127.0.0.1:8000/v1/completions", f"asks another server: {words}"
    CompletionBody.read(words[words.index("-d") + 1].encode())


def check_copy(words: list[str]) -> None:
    for word in words[1:]:
        assert not word.startswith(("paper-checkpoints", "docs")) or (ROOT / word).exists(), f"no such file: {words}"


def unchecked(words: list[str]) -> None:
    """Nothing to be wrong about."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(make_cli.scripts(), check_ours),
    "make": check_make,
    "torchrun": lambda words: check_launched(get_args_parser().parse_args(words[1:])),
    "accelerate": lambda words: check_launched(launch_command_parser().parse_args(words[2:])),
    "python": check_python,
    "pip": check_pip,
    "cp": check_copy,
    "curl": check_curl,
    **dict.fromkeys([".", "ln", "mkdir", "tensorboard"], unchecked),
}
"""How a program's command is checked."""


def check_command(words: tuple[str, ...], whole: bool = True) -> None:
    """whole: an argument that is required must be there."""
    program = words[0].removeprefix(".venv/bin/")
    assert program in CHECKS, f"{program} is a program that {Path(__file__).name} cannot check yet: {' '.join(words)}"
    try:
        CHECKS[program]([program, *words[1:]])
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "MissingParameter" and not whole:
            return
        raise AssertionError(f"{' '.join(words)}: {error}") from error


@each_page
def test_every_command_is_one_that_its_program_understands(page: Path) -> None:
    for shell in blocks(page, "sh"):
        found = list(commands(shell))
        assert found
        for command in found:
            check_command(command.words)
    for span in code_spans(page):
        # Prose names a command without what it is for.
        if re.match(r"(\.venv/bin/)?(ptp(_\w+)?|make|python|torchrun|accelerate launch|pip) (?![^ ]*$)|make \w", span):
            for command in commands(span):
                check_command(command.words, whole=False)


@pytest.mark.parametrize(
    "words",
    [
        "ptp_train DIR --no-such-option",
        "ptp_train DIR train.no_such=1",
        "ptp_train DIR train.max_steps=few",
        "ptp_train DIR train.fsdp=true train.optimizer=muon",
        "ptp_distill MODEL",
        "ptp verify DIR --num-prompts 0",
        "ptp fly",
        "make nonsense",
        "torchrun --nproc-per-thing 4 -m ptp.cli.main train DIR",
        "torchrun --nproc-per-node 4 -m ptp.cli.main train",
        "accelerate launch --no-such -m ptp.cli.main train DIR",
        "python docs/make_sample.py experiments/demo --no-such",
        "pip install evil",
        "cp paper-checkpoints/none experiments/",
        "curl something",
    ],
)
def test_a_command_that_its_program_does_not_understand_is_noticed(words: str) -> None:
    with pytest.raises(AssertionError):
        check_command(tuple(words.split()))


@each_page
def test_every_block_says_what_it_is_and_reads_as_that(page: Path) -> None:
    for language, content in fenced(page.read_text(encoding="utf-8")):
        assert language in LANGUAGES, f"a block in {language or 'no language'!r}, which is not checked; use {LANGUAGES}"
        if language == "python":
            ast.parse(content)
        elif language == "json":
            # An object, or an object in each line.
            for part in content.splitlines() if "\n{" in content else [content]:
                json.loads(part)
        elif language == "yaml":
            for section, settings in yaml.safe_load(content).items():
                check_settings([f"{section}.{key}={json.dumps(value)}" for key, value in settings.items()])


# Run: whole pages, with tiny things under the names that they use

SMALLER = {
    "distill": ("--max-length=96", "--yes"),
    "pregenerate": ("pregenerate.max_new_tokens=12",),
    "train": (
        *("train.max_steps=2", "train.warmup_steps=0", "train.save_every=2", "train.windows_per_sequence=8"),
        *("train.dtype=float32",),
    ),
    "verify": ("--num-prompts=2", "--max-new-tokens=8"),
    "bench": ("--num-prompts=1", "--max-new-tokens=8", "--repetitions=1"),
    "generate": ("--max-new-tokens=8",),
}
"""Said behind each command of a page, so that it takes seconds and asks nobody."""


@pytest.fixture(scope="module")
def things(
    chat_experiment: Callable[..., ExperimentConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A tiny chat model under the names that pages use, data of every kind, and an experiment that is trained."""
    directory = tmp_path_factory.mktemp("things")
    config = chat_experiment(directory, "prompt-distill")
    questions = [{"question": f"{number}+1?"} for number in range(24)]
    chats = [json.loads(line) for line in (directory / "chats.jsonl").read_text().splitlines()]
    completions = [{"prompt": f"{n}+1?", "completion": f"{n + 1}, of course"} for n in range(24)]
    rows = {
        "PROMPTS/questions.jsonl": questions,
        "FILE/completions.jsonl": completions,
        "DATASET/rows.jsonl": [chat | question for chat, question in zip(chats, questions, strict=True)],
        "questions.jsonl": questions,
        "question.jsonl": [{"question_id": n, "category": "math", "turns": [f"{n}+1?"]} for n in range(3)],
    }
    for name, records in rows.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, file in {"CHATS": "chats.jsonl", "TEXTS": "texts.jsonl"}.items():
        (directory / name).mkdir()
        shutil.copy(directory / file, directory / name)
    for name in ("MODEL", "Qwen/Qwen2.5-0.5B-Instruct"):
        shutil.copytree(directory / "model", directory / name)
    transformers_logging.disable_progress_bar()
    distill(directory / "NEW", config)
    shutil.copytree(directory / "NEW", directory / "DIR")
    pregenerate(Experiment.load(directory / "DIR"))
    shutil.copytree(directory / "DIR", directory / "SAMPLED")
    train(Experiment.load(directory / "DIR"))
    distill(directory / "UNSAMPLED", chat_experiment(directory / "texts", "fixed"))
    yield directory
    transformers_logging.enable_progress_bar()


class Place:
    """Where a page is run: a copy of the things, and what its Python blocks have named."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: dict[str, Any] = {}

    def run(self, page: Path, **replaced: str) -> None:
        """Every shell and Python block, in order. replaced: what stands for a placeholder of the page."""
        for language, content in fenced(page.read_text(encoding="utf-8")):
            if language == "python":
                exec(compile(content, str(page), "exec"), self.names)
            for command in commands(content) if language == "sh" else ():
                words = [replaced.get(word, word) for word in command.words]
                for old, new in replaced.items():
                    words = [word.replace(old, new) for word in words]
                self.command(replace(command, words=tuple(words)))

    def command(self, command: Command) -> None:
        """One command. DIR is as it was before each, and has as much done as the command needs to find."""
        program, *arguments = command.words
        if program not in make_cli.scripts():
            # Several processes: training/test_processes.py, stages/test_pregenerate.py.
            assert program in (".", "make", "pip", "torchrun", "accelerate"), f"cannot be run here: {command}"
            return
        stage, *arguments = arguments if program == "ptp" else [program.removeprefix("ptp_"), *arguments]
        if stage == "serve":
            return  # until it is told to end: server/test_serve_command.py
        if "DIR" in arguments:
            done = {"pregenerate": "NEW", "train": "SAMPLED"}.get(stage)
            if "train.objective=inverse_autoregressive" in arguments:
                done = "UNSAMPLED"
            if done is not None:
                shutil.rmtree("DIR")
                shutil.copytree(done, "DIR")
        if stage == "distill" and "--output-dir" not in arguments:
            # Alternatives of one page would all be made in the same place.
            arguments += ["--output-dir", tempfile.mkdtemp(dir=self.directory)]
        # Of a chat, one message (with a terminal: cli/test_chat_terminal.py).
        result = typed(main, stage, *arguments, *SMALLER.get(stage, ()), stdin="1+1?")
        assert result.code == 0, f"{command}: {result.err}"
        if command.output is not None:
            Path(command.output).write_text(result.out)


@pytest.fixture
def place(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(things, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tutorial", "data", "sizing", "train", "generate", "faq"])
def test_a_page_s_commands_run_as_they_stand(place: Place, name: str) -> None:
    place.run(ROOT / "docs" / f"{name}.md")
    if name == "tutorial":
        assert {"report.html", "bench.jsonl", "bench.svg", "adapter"} <= {
            path.name for path in Path("experiments/mine").iterdir()
        }
        assert len(Path("experiments/mine/bench.jsonl").read_text().splitlines()) == 3
        assert len(place.names["out"].token_ids) == len(place.names["out"].u)


@pytest.mark.slow
def test_the_readme_s_commands_run_as_they_stand(place: Place, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    (place.directory / "experiments").mkdir()
    (place.directory / "experiments" / "demo").symlink_to("../DIR")
    place.names = {"base_model": tiny_llama(), "prompt_ids": [5, 6, 7]}
    template = place.directory / "template.jinja"
    template.write_text(load_tokenizer("MODEL").chat_template)
    place.run(ROOT / "README.md", FILE=template.name)
    assert len(place.names["out"].token_ids) == len(place.names["out"].u)


@pytest.mark.slow
def test_the_page_of_endpoints_runs_against_a_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def answer(body: dict[str, Any], before: int) -> Reply:
        return Reply(completion(text="12, of course"))

    with serving(answer) as server:
        place.run(ROOT / "docs" / "endpoint.md", **{"http://HOST:8000/v1": server.url})
        assert {body["model"] for body in server.bodies} == {"NAME"}


RUN_BY_OTHERS = {
    "docs/formats.md": "test_docs.py",
    "docs/quickstart.md": "test_site.py",
    "docs/serve.md": "server/test_api.py",
    "docs/transformers.md": "test_docs.py",
    "docs/tutorial.md": "above, with its commands",
    "README.md": "above, with its commands",
}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and str(page.relative_to(ROOT)) not in RUN_BY_OTHERS],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_page_s_python_runs(page: Path, place: Place) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), place.names)
