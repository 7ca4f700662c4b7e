"""The paper's experiments: what their directories say, and that the stages take each of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ptp.config import SchemeTurn, StudentConfig
from ptp.demo import make_tokenizer
from ptp.experiment import FILES, Experiment
from ptp.model.adapter import AUXILIARY_WEIGHTS, LORA_WEIGHTS, SETTINGS
from ptp.model.loading import load_tokenizer
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.scaling import LADDER
from ptp.stages.pregenerate import pregenerate
from ptp.stages.train import read_training_result, train

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "paper-checkpoints"
TEMPLATES = ROOT / "tests" / "fixtures" / "chat_templates"

TASK = "Read 0 numbers and print their sum."
TINYLLAMA = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "deepmind/code_contests", "prompt-scheme-distill")
VICUNA = ("lmsys/vicuna-7b-v1.5", "Aeala/ShareGPT_Vicuna_unfiltered", "prompt-distill")
FIRST_PROMPT = {
    TINYLLAMA: f"<|user|>\n{TASK}</s>\n<|assistant|>\n```python\n",
    VICUNA: "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    f"detailed, and polite answers to the user's questions. USER: {TASK} ASSISTANT:",
}
MILLION = 1_000_000


@dataclass(frozen=True)
class Facts:
    """What the paper says of an experiment. source: base model, dataset and mode; size: the student's hidden size,
    layers and heads."""

    source: tuple[str, str, str]
    batch: tuple[int, int]
    dtype: str = "bfloat16"
    steps: int | None = None
    size: tuple[int, int, int] | None = None
    rank: int | None = None


FACTS = {
    "scaling-code-contests-66k": Facts(TINYLLAMA, (8, 1), steps=MILLION, size=(64, 1, 1)),
    "scaling-code-contests-525k": Facts(TINYLLAMA, (8, 1), steps=10 * MILLION, size=(128, 2, 2)),
    "scaling-code-contests-4.2M": Facts(TINYLLAMA, (8, 1), steps=MILLION, size=(256, 4, 4)),
    "scaling-code-contests-34M": Facts(TINYLLAMA, (8, 1), steps=10 * MILLION, size=(512, 8, 8)),
    "scaling-code-contests-268M": Facts(TINYLLAMA, (8, 1), steps=MILLION, size=(1024, 16, 16)),
    "scaling-code-contests-1.1B": Facts(TINYLLAMA, (4, 2), steps=MILLION, size=(2048, 22, 32)),
    "tinyllama-code-contests-lora-r256": Facts(TINYLLAMA, (8, 1), rank=256),
    "vicuna-7b-sharegpt-lora-r128": Facts(VICUNA, (2, 1), dtype="float16", rank=128),
}


def test_there_is_a_directory_for_each_experiment_of_the_paper() -> None:
    assert {path.name for path in PAPER.iterdir() if path.is_dir()} == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_directory_says_what_the_paper_says(name: str) -> None:
    facts, config = FACTS[name], Experiment.load(PAPER / name).config
    model, training = config.model, config.train
    assert (config.base_model, config.data.path, config.data.mode) == facts.source
    assert config.sampling == SamplingRule(temperature=0.7, top_k=50, top_p=0.95, order="vocabulary")
    assert (config.pregenerate.completions_per_prompt, config.pregenerate.max_length) == (32, 2048)
    assert config.pregenerate.max_new_tokens is None and config.pregenerate.num_prompts is None
    assert (model.variant, model.auxiliary, model.anchor, model.window) == ("one_hot", "binary", "none", 16)
    assert (training.sequence_length, training.windows_per_sequence) == (2048, 128)
    assert (training.optimizer, training.learning_rate, training.warmup_steps) == ("adamw", 1e-4, 1000)
    assert (training.beta, training.position_decay, training.dtype) == (0.3, 1.0, facts.dtype)
    assert (training.batch_size, training.gradient_accumulation_steps) == facts.batch
    assert (training.max_steps, training.num_epochs) == ((facts.steps, None) if facts.steps else (None, 1.0))
    if facts.size is None:
        assert (model.student, model.lora_rank, model.lora_targets) == (None, facts.rank, "all-linear")
    else:
        hidden, layers, heads = facts.size
        assert model.student == StudentConfig(hidden_size=hidden, num_layers=layers, num_heads=heads)
        assert model.student.intermediate_size == 4 * hidden
        assert model.student == LADDER[name.removeprefix("scaling-code-contests-")]


def test_code_contests_are_asked_as_a_chat_whose_answer_opens_a_python_block() -> None:
    config = Experiment.load(PAPER / "tinyllama-code-contests-lora-r256").config
    assert config.data.prompt_scheme == (
        SchemeTurn(role="user", content="{description}"),
        SchemeTurn(role="assistant", content="```python\n"),
    )


def test_the_students_learn_from_the_completions_of_the_tinyllama_experiment() -> None:
    configs = [Experiment.load(PAPER / name).config for name, facts in FACTS.items() if facts.source == TINYLLAMA]
    assert len(configs) == 7
    first = configs[0]
    assert all((c.data, c.sampling, c.pregenerate) == (first.data, first.sampling, first.pregenerate) for c in configs)


def test_vicuna_answers_every_turn_in_its_own_template() -> None:
    data = Experiment.load(PAPER / "vicuna-7b-sharegpt-lora-r128").config.data
    assert (data.column, data.turns, data.chat_template) == ("conversations", "each", "chat_template.jinja")
    template = PAPER / "vicuna-7b-sharegpt-lora-r128" / "chat_template.jinja"
    assert template.read_bytes() == (TEMPLATES / "vicuna.jinja").read_bytes()


@pytest.mark.parametrize("name", FACTS)
def test_every_setting_is_written_down_so_that_no_new_default_changes_it(name: str, tmp_path: Path) -> None:
    Experiment(tmp_path, Experiment.load(PAPER / name).config).write()
    for file in FILES:
        assert (PAPER / name / file).read_text() == (tmp_path / file).read_text(), file


def test_the_readme_names_every_experiment() -> None:
    text = (PAPER / "README.md").read_text()
    assert all(f"`{name}`" in text for name in FACTS)


@pytest.fixture(scope="module")
def inputs(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, TinyLlama's template in it, and data in the form of both datasets."""
    directory = tmp_path_factory.mktemp("inputs")
    tasks = [TASK.replace("0", str(n)) for n in range(24)]
    tokenizer = make_tokenizer([*tasks, *FIRST_PROMPT.values()], 300)
    tokenizer.chat_template = (TEMPLATES / "zephyr.jinja").read_text()
    tiny_llama(vocab_size=len(tokenizer), hidden=16, layers=1, context=256).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    chats = [[("human", task), ("gpt", "Done."), ("human", "Thanks."), ("gpt", "Welcome.")] for task in tasks]
    problems = [{"description": task, "name": f"task {n}"} for n, task in enumerate(tasks)]
    conversations = [
        {"id": str(n), "conversations": [{"from": who, "value": text} for who, text in chat]}
        for n, chat in enumerate(chats)
    ]
    for name, rows in {"problems": problems, "conversations": conversations}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize("name", FACTS)
def test_the_stages_take_every_directory(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 64)
    facts, directory = FACTS[name], tmp_path / name
    shutil.copytree(PAPER / name, directory)
    overrides = [
        f"base_model={inputs / 'model'}",
        f"data.path={inputs / ('problems.jsonl' if facts.source == TINYLLAMA else 'conversations.jsonl')}",
        "pregenerate.max_prompt_tokens=200",
        "pregenerate.max_length=216",
        "pregenerate.completions_per_prompt=2",
        "pregenerate.batch_size=32",
        "train.max_steps=2",
        "train.num_epochs=null",
        "train.warmup_steps=0",
        "train.sequence_length=216",
        "train.windows_per_sequence=8",
        "model.lora_rank=2",
    ]
    if facts.size is not None:
        overrides.append("model.student={hidden_size: 16, num_layers: 1, num_heads: 1}")
    experiment = Experiment.load(directory, overrides)
    stored = pregenerate(experiment)
    assert not stored.left_out
    documents = stored.store.load()
    assert len(documents) == (48 if facts.source == TINYLLAMA else 96)
    assert documents.has_intervals
    tokenizer, first = load_tokenizer(str(inputs / "model")), documents[0]
    assert tokenizer.decode(first.ids[: first.prompt_length]) == FIRST_PROMPT[facts.source]
    result = train(experiment)
    assert read_training_result(experiment) == result
    assert len(result.accuracy) == 16
    assert len(result.survival) == 15
    assert {path.name for path in (directory / "runs").iterdir()} == {"pregenerate.json", "train.json"}
    expected = {SETTINGS, AUXILIARY_WEIGHTS, "training.json"}
    files = {path.name for path in experiment.adapter.iterdir()}
    if facts.size is None:
        assert files == expected | {LORA_WEIGHTS, "adapter_config.json", "custom_generate"}
        assert PTPModel.from_pretrained(directory).rule == experiment.config.sampling
    else:
        assert files == expected | {"student"}
        assert AutoModelForCausalLM.from_pretrained(experiment.adapter / "student").config.hidden_size == 16
