import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer, MambaConfig

from ptp.config import DataConfig, Mode, PregenerateConfig, TrainConfig
from ptp.data.columns import Shape
from ptp.errors import ConfigError, DataError, PTPError
from ptp.evaluation.experiment_report import verify_experiment
from ptp.experiment import Experiment, ExperimentConfig
from ptp.stages.distill import MOST_TOKENS, Answers, Survey, distill, example, survey
from ptp.stages.pregenerate import pregenerate
from ptp.stages.prepare import open_preparation, prepare
from ptp.stages.train import train

MODES: tuple[Mode, ...] = get_args(Mode)
TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def inputs(chat_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, which has a chat template, chats.jsonl and texts.jsonl."""
    directory = tmp_path_factory.mktemp("inputs")
    chat_experiment(directory)
    return directory


@pytest.fixture(scope="module")
def untemplated(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a tokenizer that has no chat template."""
    directory = tmp_path_factory.mktemp("untemplated") / "model"
    shutil.copytree(inputs / "model", directory)
    (directory / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(directory).chat_template is None
    return directory


@pytest.fixture
def config_of(chat_experiment: Callable, inputs: Path) -> Callable[[Mode], ExperimentConfig]:
    return lambda mode: chat_experiment(inputs, mode)


def with_data(config: ExperimentConfig, /, **changes: object) -> ExperimentConfig:
    return config.model_copy(update={"data": DataConfig(**(config.data.model_dump() | changes))})


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# What is written


@each_mode
def test_an_experiment_that_is_set_up_loads_as_it_was_meant(config_of: Callable, mode: Mode, tmp_path: Path) -> None:
    experiment = distill(tmp_path / "new" / "experiment", config_of(mode))
    assert Experiment.load(experiment.directory) == experiment
    assert experiment.config == config_of(mode)
    assert {path.name for path in experiment.directory.iterdir()} == {
        "README.md",
        "experiment.yaml",
        "pregenerate.yaml",
        "train.yaml",
    }


@each_mode
def test_the_readme_names_the_next_commands(config_of: Callable, mode: Mode, tmp_path: Path) -> None:
    experiment = distill(tmp_path / "experiment", config_of(mode))
    text = (experiment.directory / "README.md").read_text()
    commands = [line.split() for line in text.splitlines() if line.startswith("    ptp")]
    samples = ["ptp_pregenerate"] if experiment.config.data.distils else []
    assert [" ".join(words[: words.index(str(experiment.directory))]) for words in commands] == [
        *samples,
        "ptp_train",
        "ptp verify",
        "ptp_generate",
        "ptp bench",
        "ptp serve",
    ]
    several = [line.split()[5] for line in text.splitlines() if "torchrun" in line]
    assert several == [name.removeprefix("ptp_") for name in samples] + ["train"]
    assert str(experiment.config.sampling) in text


def test_the_sampling_rule_stands_in_one_place(config_of: Callable, tmp_path: Path) -> None:
    experiment = distill(tmp_path / "experiment", config_of("prompt-distill"))
    assert [path.name for path in experiment.directory.glob("*.yaml") if "top_p" in path.read_text()] == [
        "experiment.yaml"
    ]


def test_an_experiment_that_is_there_is_left_alone(config_of: Callable, tmp_path: Path) -> None:
    experiment = distill(tmp_path / "experiment", config_of("fixed"))
    before = files(experiment.directory)
    with pytest.raises(ConfigError, match="already holds an experiment"):
        distill(
            experiment.directory, with_data(config_of("prompt-distill"), chat_template=str(TEMPLATES / "chatml.jinja"))
        )
    assert files(experiment.directory) == before


def test_a_part_of_an_experiment_is_not_written_over_either(config_of: Callable, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds an experiment \(train.yaml\)"):
        distill(tmp_path, config_of("fixed"))
    assert files(tmp_path) == {tmp_path / "train.yaml": b"mine"}


@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja"])
def test_no_other_file_is_written_over(config_of: Callable, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    config = with_data(config_of("prompt-distill"), chat_template=str(TEMPLATES / "zephyr.jinja"))
    with pytest.raises(ConfigError, match=f"{tmp_path / name} is there already; choose another directory"):
        distill(tmp_path, config)
    assert files(tmp_path) == {tmp_path / name: b"mine"}


def test_a_template_that_lies_in_the_directory_already_is_taken(config_of: Callable, tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text((TEMPLATES / "zephyr.jinja").read_text())
    experiment = distill(tmp_path, with_data(config_of("prompt-distill"), chat_template=str(path)))
    assert experiment.config.data.chat_template == "chat_template.jinja"


def test_an_experiment_moved_with_its_model_and_data_goes_on(chat_experiment: Callable, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "elsewhere" / "here"
    config = chat_experiment(there)
    config = with_data(config.model_copy(update={"base_model": "model"}), path="chats.jsonl")
    experiment = distill(there, config)
    pregenerate(experiment)
    cached = {path.name for path in experiment.cache.iterdir()}
    here.parent.mkdir()
    there.rename(here)
    moved = Experiment.load(here)
    before = files(moved.completions)
    pregenerate(moved)
    assert files(moved.completions) == before
    assert {path.name for path in moved.cache.iterdir()} == cached
    train(moved)
    here.rename(there)
    assert not verify_experiment(Experiment.load(there), num_prompts=1, max_new_tokens=4, budget=4).count("mismatch")


# Chat templates


def test_a_chat_template_of_one_s_own_is_copied_in_and_used(
    config_of: Callable, untemplated: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "mine.jinja"
    theirs.write_text((TEMPLATES / "chatml.jinja").read_text())
    config = with_data(config_of("prompt-distill"), chat_template=str(theirs))
    room = PregenerateConfig(max_prompt_tokens=94, max_length=96)
    changes = {"base_model": str(untemplated), "pregenerate": room, "train": TrainConfig()}
    experiment = distill(tmp_path / "experiment", config.model_copy(update=changes))
    theirs.unlink()
    loaded = Experiment.load(experiment.directory)
    assert loaded == experiment
    assert loaded.config.data.chat_template == "chat_template.jinja"
    document = prepare(loaded).documents[0]
    text = open_preparation(loaded).tokenizer.decode(document.ids)
    assert text == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n0+1?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("mode", ["prompt-distill", "full-chat"])
def test_chats_without_a_template_are_refused(
    config_of: Callable, untemplated: Path, mode: Mode, tmp_path: Path
) -> None:
    config = config_of(mode).model_copy(update={"base_model": str(untemplated)})
    with pytest.raises(
        ConfigError, match=f"has no chat template, which {mode} needs here; give one with --chat-template"
    ):
        distill(tmp_path / "experiment", config)
    assert not (tmp_path / "experiment").exists()


def test_a_prompt_scheme_of_turns_needs_a_template_too(config_of: Callable, untemplated: Path, tmp_path: Path) -> None:
    plain = config_of("prompt-scheme-distill").model_copy(update={"base_model": str(untemplated)})
    turns = with_data(plain, prompt_scheme=({"role": "user", "content": "{text}"},))
    with pytest.raises(ConfigError, match="has no chat template"):
        distill(tmp_path / "experiment", turns)
    distill(tmp_path / "experiment", plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the chat template"), (b"\xff\xfe\x00", "cannot read the chat template")],
    ids=["missing", "no text"],
)
def test_a_template_that_cannot_be_read_is_named(
    config_of: Callable, content: bytes | None, message: str, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        distill(tmp_path / "experiment", with_data(config_of("prompt-distill"), chat_template=str(template)))
    assert str(template) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "experiment").exists()


def test_a_template_that_refuses_every_chat_is_told_with_its_words(config_of: Callable, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no systems, please') }}")
    config = with_data(config_of("full-chat"), chat_template=str(template))
    with pytest.raises(
        DataError, match=r"none of the first 24 rows .*: 24 the chat template refuses .*no systems, please"
    ):
        distill(tmp_path / "experiment", config)
    assert not (tmp_path / "experiment").exists()


# What cannot run


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"base_model": "./nowhere"}, {}, "'./nowhere': there is no such directory"),
        ({"base_model": "no-such-user/no-such-model"}, {}, "cannot load the base model 'no-such-user/no-such-model'"),
        ({}, {"path": "nowhere.jsonl"}, "no such file or folder: nowhere.jsonl"),
        (
            {},
            {"path": "no-such-user/no-such-data"},
            "'no-such-user/no-such-data' is neither a local path nor a dataset",
        ),
        ({}, {"split": "validation"}, "has no split 'validation'; it has: train"),
        ({}, {"config": "main"}, "config is for repositories with configurations"),
        ({}, {"prompt_scheme": "{question}"}, "row 1 has no column 'question' for the prompt scheme; it has: text"),
        ({}, {"prompt_scheme": "{text"}, "is not a format string over the columns"),
        ({}, {"mode": "fixed", "column": "story"}, "row 1 has no column 'story'.*; it has: text"),
        ({}, {"mode": "full-chat", "column": "text"}, "row 1: expected a list of messages; got str"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_cannot_run_is_not_set_up(
    config_of: Callable, tmp_path: Path, changes: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    config = with_data(config_of("prompt-scheme-distill").model_copy(update=changes), **data)
    with pytest.raises(PTPError, match=message) as caught:
        distill(tmp_path / "experiment", config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "experiment").exists()


def test_a_model_that_cannot_be_made_parallel_is_refused_at_set_up(
    config_of: Callable, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "model", tmp_path / "mamba")
    MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    config = config_of("fixed").model_copy(update={"base_model": str(tmp_path / "mamba")})
    with pytest.raises(ConfigError, match=r"^mamba models are not supported: their layers keep a running state"):
        distill(tmp_path / "experiment", config)
    assert not (tmp_path / "experiment").exists()


def test_roles_nobody_knows_are_named_with_the_row(config_of: Callable, tmp_path: Path) -> None:
    chats = [[{"role": role, "content": "x"}] for role in ("user", "narrator")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = with_data(config_of("full-chat"), path=str(tmp_path / "chats.jsonl"))
    with pytest.raises(DataError, match=r"row 2: message 1 has the unknown role 'narrator'.*map it in data\.roles"):
        distill(tmp_path / "experiment", config)


# The example


@each_mode
def test_the_example_marks_what_is_trained_and_nothing_else(config_of: Callable, mode: Mode, tmp_path: Path) -> None:
    shown = example(Experiment(tmp_path, config_of(mode)))
    before = "<|system|>\nAdd.</s>\n<|user|>\n0+1?</s>\n<|assistant|>\n"
    between = "\n<|user|>\nAnd 2 more?</s>\n<|assistant|>\n"
    text = "0 and 1 are 1"
    expected: dict[Mode, list[tuple[str, bool]]] = {
        "prompt-distill": [(before, False)],
        "prompt-scheme-distill": [(f"<s>{text}", False)],
        "full-chat": [(before, False), ("1</s>", True), (between, False), ("3, of course</s>", True), ("\n", False)],
        "fixed": [("<s>", False), (f"{text}</s>", True)],
    }
    assert shown.pieces == expected[mode]
    assert shown.is_prompt == mode.startswith("prompt")
    assert not list(tmp_path.iterdir()), "looking writes nothing"


def test_the_example_is_the_first_row_that_gives_something(config_of: Callable, tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": "x" * 500}, {"text": "short"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_data(config_of("prompt-scheme-distill"), path=str(tmp_path / "texts.jsonl"), prompt_scheme="{text}.")
    assert "".join(text for text, _ in example(Experiment(tmp_path, config)).pieces) == "<s>."
    (tmp_path / "texts.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(
        DataError, match=r"none of the first 1 rows of .*texts.jsonl gives anything.*: 1 longer than 64"
    ):
        example(Experiment(tmp_path, config))


# Defaults


def test_a_survey_finds_what_chats_and_model_hold(inputs: Path) -> None:
    found = survey(str(inputs / "model"), {"path": str(inputs / "chats.jsonl")})
    assert (found.shape.kind, found.shape.column) == ("messages", "messages")
    assert found.shape.roles == ("system", "user", "assistant")
    assert (found.num_rows, found.has_template, found.context) == (24, True, 96)
    assert found.mode == "prompt-distill"


def test_what_suits_texts_is_a_prompt_scheme_said_by_the_user_where_there_is_a_template(
    inputs: Path, untemplated: Path
) -> None:
    data = {"path": str(inputs / "texts.jsonl")}
    for model, scheme in ((inputs / "model", [{"role": "user", "content": "{text}"}]), (untemplated, "{text}")):
        found = survey(str(model), data)
        assert Answers().settings(found)["data"] == {"mode": "prompt-scheme-distill", "prompt_scheme": scheme}


def test_a_prompt_scheme_given_is_used(inputs: Path) -> None:
    chats = survey(str(inputs / "model"), {"path": str(inputs / "chats.jsonl")})
    answers = Answers(prompt_scheme="{messages[1][content]}", user_turn=False)
    assert answers.settings(chats)["data"] == {
        "mode": "prompt-scheme-distill",
        "prompt_scheme": "{messages[1][content]}",
    }


def test_chats_that_the_model_has_no_template_for_are_said_to_need_one(inputs: Path, untemplated: Path) -> None:
    data = {"path": str(inputs / "chats.jsonl")}
    with pytest.raises(ConfigError, match="give one with --chat-template FILE, or choose --mode"):
        Answers().settings(survey(str(untemplated), data))
    given = survey(str(untemplated), data | {"chat_template": str(TEMPLATES / "zephyr.jinja")})
    assert Answers().settings(given)["data"]["mode"] == "prompt-distill"
    chosen = Answers(mode="prompt-scheme-distill").settings(survey(str(untemplated), data))
    assert chosen["data"]["prompt_scheme"] == "{messages[0][content]}"


def test_a_mode_without_a_column_for_it_says_so(inputs: Path) -> None:
    found = survey(str(inputs / "model"), {"path": str(inputs / "texts.jsonl")})
    with pytest.raises(DataError, match="no column holds chats, which full-chat needs; name one with --column"):
        Answers(mode="full-chat").settings(found)
    assert Answers(mode="full-chat", column="talk").settings(found)["data"]["column"] == "talk"


def test_the_first_of_several_turns_is_a_prompt_but_no_column(inputs: Path, tmp_path: Path) -> None:
    rows = [{"turns": [f"Question {n}?", "And then?"]} for n in range(12)]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = survey(str(inputs / "model"), {"path": str(tmp_path / "bench.jsonl")})
    assert Answers(user_turn=False).settings(found)["data"]["prompt_scheme"] == "{turns[0]}"
    with pytest.raises(DataError, match="no column holds text, which fixed needs; name one with --column"):
        Answers(mode="fixed").settings(found)


TEXTS = Survey(Shape("text", "text", ("text",)), num_rows=1, has_template=False, context=None)


@pytest.mark.parametrize("context", [None, 40, 96, 1000, MOST_TOKENS, 131072])
@pytest.mark.parametrize("window", [1, 4, 16, 100])
def test_default_lengths_fit_the_model_and_its_windows_cover_a_sequence(context: int | None, window: int) -> None:
    values = Answers(mode="fixed", window=window).settings(replace(TEXTS, context=context))
    config = ExperimentConfig(**values | {"base_model": "m", "sampling": {}, "data": values["data"] | {"path": "d"}})
    length = config.train.sequence_length
    assert length == config.pregenerate.max_length == min(context or MOST_TOKENS, MOST_TOKENS)
    assert config.train.windows_per_sequence == max(1, length // window)
    assert config.pregenerate.max_prompt_tokens <= length - 2


def test_answers_are_what_is_set(inputs: Path) -> None:
    found = survey(str(inputs / "model"), {"path": str(inputs / "chats.jsonl")})
    answers = Answers(
        turns="first",
        drop_system=True,
        window=8,
        windows_per_sequence=3,
        max_length=64,
        num_prompts=9,
        completions_per_prompt=4,
        lora_rank=5,
        tracker="tensorboard",
    )
    assert answers.settings(found) == {
        "data": {"mode": "prompt-distill", "column": "messages", "turns": "first", "drop_system": True, "tools": None},
        "pregenerate": {
            "max_prompt_tokens": 32,
            "max_length": 64,
            "num_prompts": 9,
            "completions_per_prompt": 4,
        },
        "model": {"window": 8, "lora_rank": 5, "lora_alpha": 5},
        "train": {"sequence_length": 64, "windows_per_sequence": 3, "report_to": ["tensorboard"]},
    }
    said = Answers(mode="prompt-scheme-distill", prompt_scheme="{x}", user_turn=True).settings(found)
    assert said["data"]["prompt_scheme"] == [{"role": "user", "content": "{x}"}]
