"""`ptp_distill` by flags: what lands in the files, and what is refused."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import Result, check_refused, files, typed

from ptp.cli import distill, main, pregenerate
from ptp.experiment import Experiment, ExperimentConfig
from ptp.stages.prepare import prepare

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"


@pytest.fixture(scope="module")
def root(chat_experiment: Callable, tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a chat template, chats.jsonl, texts.jsonl; plain/model/ without a template."""
    root = tmp_path_factory.mktemp("distill")
    chat_experiment(root)
    tiny_experiment(root / "plain")
    return root


def set_up(directory: Path, *arguments: object) -> Result:
    return typed(distill.main, *arguments, "--output-dir", directory)


def config_of(directory: Path, *arguments: object) -> ExperimentConfig:
    """The settings of an experiment that is set up by these arguments."""
    result = set_up(directory, *arguments)
    assert result.code == 0, result.err
    assert result.out == f"{directory}\n"
    return Experiment.load(directory).config


def test_what_the_data_hold_and_what_is_learnt_of_them_is_said(root: Path, tmp_path: Path) -> None:
    result = set_up(tmp_path / "new", root / "model", root / "chats.jsonl", "--yes")
    said = "24 rows; text columns: none with text; chats in 'messages' (messages); mode prompt-distill"
    assert result.err.splitlines()[0] == said


def test_every_flag_lands_in_the_settings(root: Path, tmp_path: Path) -> None:
    template = TEMPLATES / "zephyr.jinja"
    flags = (
        *("--mode", "prompt-distill", "--split", "train[:20]", "--column", "messages", "--turns", "first"),
        *("--drop-system", "--chat-template", template, "--window", 8, "--windows-per-sequence", 5),
        *("--max-length", 90, "--lora-rank", 6, "--tracker", "mlflow"),
        *("--temperature", 0.5, "--top-k", 7, "--top-p", 0.8),
        *("--set", "train.optimizer=muon", "--set", "pregenerate.engine.url=http://host:8000/v1"),
        *("--set", "pregenerate.engine.model=base", "--set", "data.roles={narrator: user}"),
    )
    config = config_of(tmp_path / "new", root / "model", root / "chats.jsonl", *flags)
    found = config.model_dump()
    assert found["base_model"] == str(root / "model")
    assert found["data"] == {
        "path": str(root / "chats.jsonl"),
        "mode": "prompt-distill",
        "config": None,
        "split": "train[:20]",
        "revision": None,
        "column": "messages",
        "prompt_scheme": "{text}",
        "turns": "first",
        "drop_system": True,
        "roles": {"narrator": "user"},
        "tools": None,
        "chat_template": "chat_template.jinja",
    }
    assert found["sampling"] == {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0, "order": "vocabulary"}
    assert (found["model"]["window"], found["model"]["lora_rank"], found["model"]["lora_alpha"]) == (8, 6, 6)
    assert found["train"]["windows_per_sequence"] == 5
    assert found["train"]["sequence_length"] == found["pregenerate"]["max_length"] == 90
    assert found["train"]["report_to"] == ("mlflow",)
    assert found["train"]["optimizer"] == "muon"
    assert (found["pregenerate"]["engine"]["url"], found["pregenerate"]["engine"]["model"]) == (
        "http://host:8000/v1",
        "base",
    )
    assert (tmp_path / "new" / "chat_template.jinja").read_bytes() == template.read_bytes()


@pytest.mark.parametrize(
    ("flags", "report_to"), [((), ("tensorboard",)), (("--tracker", "none"), ()), (("--tracker", "wandb"), ("wandb",))]
)
def test_training_reports_to_tensorboard_unless_told_otherwise(
    root: Path, tmp_path: Path, flags: tuple[str, ...], report_to: tuple[str, ...]
) -> None:
    config = config_of(tmp_path / "new", root / "model", root / "texts.jsonl", "--yes", *flags)
    assert config.train.report_to == report_to


@pytest.mark.parametrize(
    ("flags", "scheme"),
    [
        ((), [{"role": "user", "content": "{text}"}]),
        (("--user-turn",), [{"role": "user", "content": "{text}"}]),
        (("--no-user-turn",), "{text}"),
        (("--no-user-turn", "--prompt-scheme", "Q: {text}"), "Q: {text}"),
        (("--no-user-turn", "--column", "text"), "{text}"),
    ],
    ids=str,
)
def test_a_prompt_scheme_may_be_the_user_s_turn(
    root: Path, tmp_path: Path, flags: tuple[str, ...], scheme: object
) -> None:
    mode = () if "--prompt-scheme" in flags else ("--mode", "prompt-scheme-distill")
    config = config_of(tmp_path / "new", root / "model", root / "texts.jsonl", *mode, "--yes", *flags)
    assert config.model_dump(mode="json")["data"]["prompt_scheme"] == scheme


def test_a_column_is_the_prompt_where_no_scheme_is_given(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"long {n}", "topic": f"{n}"}) + "\n" for n in range(12)))
    inputs = (root / "plain" / "model", path, "--yes")
    assert config_of(tmp_path / "best", *inputs).data.prompt_scheme == "{text}"
    assert config_of(tmp_path / "mine", *inputs, "--column", "topic").data.prompt_scheme == "{topic}"


STORY = "Once upon a time there was a long story. " * 60


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', ("prompt-distill", "messages")),
        ("a.json", '[{"conversations": [{"from": "human", "value": "x"}]}]', ("prompt-distill", "conversations")),
        ("a.jsonl", '{"dialogue": ["hi", "hello", "bye"]}\n', ("prompt-distill", "dialogue")),
        ("a.csv", "question,answer\nwho?,me\n", ("prompt-scheme-distill", "{question}")),
        ("a.txt", "one prompt\nanother prompt\n", ("prompt-scheme-distill", "{text}")),
        ("a.md", f"# Title\n\n{STORY}\n", ("fixed", "text")),
        ("a.jsonl", json.dumps({"story": STORY}) + "\n", ("fixed", "story")),
        ("folder/a.txt", STORY, ("fixed", "text")),
    ],
)
def test_yes_takes_what_suits_the_data(
    root: Path, tmp_path: Path, name: str, content: str, expected: tuple[str, str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    path = file.parent if "/" in name else file
    config = config_of(tmp_path / "new", root / "model", path, "--yes", "--no-user-turn")
    scheme = config.data.mode == "prompt-scheme-distill"
    assert (config.data.mode, config.data.prompt_scheme if scheme else config.data.column) == expected
    assert config.train.sequence_length == 96, "the model's context"
    assert config.train.windows_per_sequence * config.model.window == 96


def test_relative_paths_become_absolute(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (tmp_path / "zephyr.jinja").write_text((TEMPLATES / "zephyr.jinja").read_text())
    config = config_of(tmp_path / "new", "model", "../" + root.name + "/chats.jsonl", "--yes", "--max-length", 80)
    assert (config.base_model, config.data.path) == (str(root / "model"), str(root / "chats.jsonl"))
    monkeypatch.chdir(tmp_path)
    result = typed(pregenerate.main, "new", "pregenerate.max_prompt_tokens=60", "pregenerate.num_prompts=10")
    assert result.code == 0, result.err
    assert "10 completions in new/completions" in result.err


def test_a_chat_template_by_a_relative_path_is_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TEMPLATES)
    inputs = (root / "plain" / "model", root / "chats.jsonl")
    check_refused(set_up(tmp_path / "new", *inputs, "--yes"), "--chat-template FILE")
    config = config_of(tmp_path / "new", *inputs, "--yes", "--chat-template", "zephyr.jinja")
    assert config.data.chat_template == "chat_template.jinja"
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.load("new", ["pregenerate.max_prompt_tokens=90"])
    assert len(prepare(experiment).documents)


def test_without_a_directory_it_is_named_after_model_data_and_mode(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for inputs, name in (
        ((root / "model", root / "chats.jsonl"), "model_chats_full-chat"),
        ((root / "model", root / "chats.jsonl", "--split", "train[:12]"), "model_chats_full-chat"),
    ):
        result = typed(distill.main, *inputs, "--mode", "full-chat")
        if "--split" in inputs:
            check_refused(result, f"experiments/{name} already holds an experiment", "--output-dir")
        else:
            assert (result.code, result.out) == (0, f"experiments/{name}\n")
            assert Experiment.load(Path("experiments") / name).config.data.mode == "full-chat"


def test_the_example_is_shown_with_what_is_trained_marked(root: Path, tmp_path: Path) -> None:
    result = set_up(tmp_path / "new", root / "model", root / "chats.jsonl", "--mode", "full-chat")
    shown = "".join(line.strip("│ ") + "\n" for line in result.err.splitlines())
    assert "<|assistant|>\n⟦1</s>⟧\n" in shown
    assert "⟦3, of course</s>⟧" in shown
    assert shown.count("⟦") == 3, "two answers, and the title"
    result = set_up(tmp_path / "other", root / "model", root / "chats.jsonl", "--mode", "prompt-distill")
    shown = "".join(line.strip("│ ") + "\n" for line in result.err.splitlines())
    assert "<|assistant|>\n⟦the model's answer⟧" in shown


def test_what_is_refused_is_one_line_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    plain, chats, texts = root / "plain" / "model", root / "chats.jsonl", root / "texts.jsonl"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"text": "a"}\n{"text": \n')
    for words, *arguments in (
        ("top_p must lie in (0, 1]; got 1.3", plain, texts, "--yes", "--top-p", 1.3),
        ("did you mean 'window'?", plain, texts, "--yes", "--set", "model.windwo=3"),
        ("section.key=value", plain, texts, "--yes", "--set", "window"),
        ("has no column 'question'", plain, texts, "--yes", "--prompt-scheme", "{question}"),
        ("no column 'story'", plain, texts, "--mode", "fixed", "--column", "story"),
        ("no column holds chats, which prompt-distill needs", plain, texts, "--mode", "prompt-distill"),
        ("no such file or folder", plain, root / "none.jsonl", "--yes"),
        ("is neither a local path nor a dataset that the hub gives", plain, "nobody/nothing", "--yes"),
        (f"cannot load the tokenizer of '{root}'", root, texts, "--yes"),
        ("'./nowhere': there is no such directory", "./nowhere", texts, "--yes"),
        ("holds no rows", plain, empty, "--yes"),
        (f"{damaged}, line 2: not valid JSON", plain, damaged, "--yes"),
        ("has no split 'test'; it has: train", plain, texts, "--yes", "--split", "test"),
        ("config is for repositories with configurations", plain, texts, "--yes", "--config", "main"),
        ("revision is for datasets of the hub", plain, texts, "--yes", "--revision", "main"),
        ("cannot read the chat template", plain, chats, "--yes", "--chat-template", tmp_path / "none.jinja"),
        ("no chat template", plain, texts, "--mode", "prompt-scheme-distill", "--user-turn"),
        ("raise the one or lower the other", plain, texts, "--yes", "--set", "train.sequence_length=8"),
    ):
        check_refused(set_up(new, *arguments), words)
        assert not new.exists(), words


def test_an_experiment_is_not_set_up_over_another(root: Path, tmp_path: Path) -> None:
    config_of(tmp_path / "new", root / "model", root / "texts.jsonl", "--yes")
    before = files(tmp_path)
    result = set_up(tmp_path / "new", root / "model", root / "chats.jsonl", "--mode", "full-chat", "--window", 3)
    check_refused(result, f"{tmp_path / 'new'} already holds an experiment", "--output-dir")
    assert files(tmp_path) == before


@pytest.mark.parametrize("flag", [["--mode", "both"], ["--window", 0], ["--max-length", 3], ["--tracker", "paper"]])
def test_a_flag_out_of_range_is_named(root: Path, tmp_path: Path, flag: list[object]) -> None:
    result = set_up(tmp_path / "new", root / "model", root / "texts.jsonl", "--yes", *flag)
    assert (result.code, result.out) == (2, "")
    assert str(flag[0]) in result.err
    assert not (tmp_path / "new").exists()


def test_without_a_terminal_and_a_mode_it_is_an_error_at_once(root: Path, tmp_path: Path) -> None:
    check_refused(set_up(tmp_path / "new", root / "model", root / "texts.jsonl"), "no terminal to ask on: give --mode")
    command = [str(Path(sys.executable).with_name("ptp_distill")), "no-model", "no-data"]
    begun = time.monotonic()
    # A pipe that stays open and silent: who waited for an answer would wait for ever.
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            code = process.wait(timeout=60)
        finally:
            process.kill()
        out, err = process.stdout.read(), process.stderr.read()
    check_refused(Result(code, out, err), "no terminal to ask on: give --mode, or --yes for what suits the data")
    assert time.monotonic() - begun < 30, "before anything heavy is loaded"
    assert list(tmp_path.iterdir()) == []


def test_the_files_hold_every_setting_once(root: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "new", root / "model", root / "chats.jsonl", "--yes")
    held = [
        yaml.safe_load((tmp_path / "new" / f"{name}.yaml").read_text())
        for name in ("experiment", "pregenerate", "train")
    ]
    together = {key: value for part in held for key, value in part.items()}
    assert sum(map(len, held)) == len(together)
    assert together == config.model_dump(mode="json")


def test_distill_is_a_subcommand_too(root: Path, tmp_path: Path) -> None:
    inputs = (root / "model", root / "chats.jsonl", "--yes", "--output-dir")
    assert typed(main.main, "distill", *inputs, tmp_path / "one").code == 0
    assert typed(distill.main, *inputs, tmp_path / "other").code == 0
    for path in (tmp_path / "one").glob("*.yaml"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
