import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ptp.config import DataConfig, Endpoint, PregenerateConfig, PTPConfig, SchemeTurn, TrainConfig
from ptp.errors import ConfigError, DataError, PTPError
from ptp.experiment import FILES, Experiment, ExperimentConfig
from ptp.sampling import SamplingRule

# Values that differ from their defaults.
CONFIG = ExperimentConfig(
    base_model="some/model",
    data=DataConfig(
        path="prompts.jsonl",
        mode="prompt-scheme-distill",
        prompt_scheme="{question}\n```python\n",
        roles={"narrator": "assistant"},
    ),
    sampling=SamplingRule(temperature=0.7, top_k=50, top_p=0.95, order=(2, 0, 1)),
    pregenerate=PregenerateConfig(max_prompt_tokens=99, max_new_tokens=98, max_length=1000, batch_size=3, seed=5),
    model=PTPConfig(variant="categorical", window=5, auxiliary="fourier", lora_targets=("q_proj", "v_proj")),
    train=TrainConfig(max_steps=7, learning_rate=3e-5, dtype="float32", optimizer="muon", report_to=("tensorboard",)),
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    Experiment(tmp_path / "experiment", CONFIG).write()
    return tmp_path / "experiment"


def error_of(directory: Path, *overrides: str) -> str:
    with pytest.raises(PTPError) as caught:
        Experiment.load(directory, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_loaded(directory: Path) -> None:
    assert Experiment.load(directory).config == CONFIG
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)


def test_settings_left_out_have_their_defaults(directory: Path) -> None:
    (directory / "train.yaml").write_text("model: {window: 5}\n")
    config = Experiment.load(directory).config
    assert (config.model, config.train) == (PTPConfig(window=5), TrainConfig())


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.learning_rate=1E-5", "train", "learning_rate", 1e-5),
        ("train.max_steps=12", "train", "max_steps", 12),
        ("train.dtype=float16", "train", "dtype", "float16"),
        ("train.report_to=[wandb, mlflow]", "train", "report_to", ("wandb", "mlflow")),
        ("train.report_to=[]", "train", "report_to", ()),
        ("pregenerate.batch_size=auto", "pregenerate", "batch_size", "auto"),
        ("pregenerate.batch_size=8", "pregenerate", "batch_size", 8),
        ("pregenerate.max_new_tokens=null", "pregenerate", "max_new_tokens", None),
        ("data.path=other.jsonl", "data", "path", "other.jsonl"),
        ("data.mode=fixed", "data", "mode", "fixed"),
        ("data.turns=first", "data", "turns", "first"),
        ("data.drop_system=true", "data", "drop_system", True),
        ("data.roles={a: user}", "data", "roles", {"a": "user"}),
        ("data.tools=null", "data", "tools", None),
        (
            "data.prompt_scheme=[{role: user, content: '{q}'}]",
            "data",
            "prompt_scheme",
            (SchemeTurn(role="user", content="{q}"),),
        ),
        ("sampling.order=[1, 0, 2]", "sampling", "order", (1, 0, 2)),
        ("sampling.order=probability", "sampling", "order", "probability"),
        ("model.lora_targets=[q_proj]", "model", "lora_targets", ("q_proj",)),
        ("pregenerate.seed=0", "pregenerate", "seed", 0),
    ],
)
def test_an_override_changes_one_setting(directory: Path, override: str, section: str, key: str, value: object) -> None:
    changed = getattr(CONFIG, section).model_copy(update={key: value})
    assert Experiment.load(directory, [override]).config == CONFIG.model_copy(update={section: changed})
    assert Experiment.load(directory).config == CONFIG


def test_overrides_reach_settings_within_settings(directory: Path) -> None:
    overrides = ["pregenerate.engine.url=http://host/v1", "pregenerate.engine.model=base"]
    assert Experiment.load(directory, overrides).config.pregenerate.engine == Endpoint(
        url="http://host/v1", model="base"
    )
    assert error_of(directory, overrides[0]) == "Endpoint needs 'model'"


def test_epochs_take_the_place_of_steps(directory: Path) -> None:
    train = Experiment.load(directory, ["train.num_epochs=3", "train.max_steps=null"]).config.train
    assert (train.num_epochs, train.max_steps) == (3, None)
    assert "give one of train.max_steps and train.num_epochs" in error_of(directory, "train.num_epochs=3")


def test_the_last_of_several_overrides_counts(directory: Path) -> None:
    assert Experiment.load(directory, ["train.seed=1", "train.seed=2"]).config.train.seed == 2


@pytest.mark.parametrize(
    "text", ["{text}", "{a}={b}", "# {text}", "{a}: {b}", "[INST] {q} [/INST]", "12", "3e4", "true"]
)
def test_an_overridden_text_is_taken_as_it_stands(directory: Path, text: str) -> None:
    data = Experiment.load(directory, [f"data.prompt_scheme={text}", f"data.column={text}"]).config.data
    assert (data.prompt_scheme, data.column) == (text, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.leanring_rate=1", "unknown key 'leanring_rate' in TrainConfig; did you mean 'learning_rate'?"),
        ("trian.seed=1", "unknown key 'trian' in ExperimentConfig; did you mean 'train'?"),
        ("sampling.topp=0.5", "unknown key 'topp' in SamplingRule; did you mean 'top_p'?"),
        ("zzz=1", "unknown key 'zzz' in ExperimentConfig; known keys: base_model, "),
        ("base_model.path=x", "unknown key 'base_model' in ExperimentConfig"),
        ("data.path.name=x", "unknown key 'path' in DataConfig"),
        ("data.mode=fix", "mode: input should be 'prompt-distill', "),
        ("learning_rate=3e-4", "'learning_rate' belongs to a section; did you mean 'train.learning_rate=3e-4'?"),
        ("turns=first", "'turns' belongs to a section; did you mean 'data.turns=first'?"),
        ("train.report_to=wandb", "report_to: "),
        ("sampling.top_p=1.3", "top_p must lie in (0, 1]; got 1.3"),
        ("train.max_steps=many", "max_steps: "),
        ("train.max_steps=0", "max_steps: "),
        ("train.seed=[", "not a value: '['"),
        ("train.seed", "section.key=value; got 'train.seed'"),
        ("=1", "section.key=value; got '=1'"),
    ],
)
def test_a_wrong_override_is_explained(directory: Path, override: str, message: str) -> None:
    assert message in error_of(directory, override)


def test_a_section_left_empty_in_the_file_can_be_overridden_or_is_explained(directory: Path) -> None:
    text = (directory / "train.yaml").read_text()
    (directory / "train.yaml").write_text(text[: text.index("train:")] + "train:\n")
    assert "train" in error_of(directory)
    try:
        assert Experiment.load(directory, ["train.seed=3"]).config.train.seed == 3
    except ConfigError as error:
        assert "train" in str(error)


@pytest.mark.parametrize("section", ["sampling", "base_model", "data"])
def test_a_required_setting_left_out_is_named(directory: Path, section: str) -> None:
    settings = yaml.safe_load((directory / "experiment.yaml").read_text())
    del settings[section]
    (directory / "experiment.yaml").write_text(yaml.safe_dump(settings))
    assert error_of(directory) == f"ExperimentConfig needs '{section}'"


def test_an_unknown_key_in_a_file_is_named_with_the_nearest_known_one(directory: Path) -> None:
    path = directory / "train.yaml"
    path.write_text("model: {windwo: 4}\n")
    assert error_of(directory) == "unknown key 'windwo' in PTPConfig; did you mean 'window'?"
    path.write_text("modle: {window: 4}\n")
    assert error_of(directory) == f"unknown key 'modle' in {path}; did you mean 'model'?"
    path.write_text("pregenerate: {seed: 4}\n")
    assert f"unknown key 'pregenerate' in {path}" in error_of(directory)
    # The sampling rule has one place, for every stage.
    path.write_text("sampling: {top_k: 4}\n")
    assert f"unknown key 'sampling' in {path}" in error_of(directory)


@pytest.mark.parametrize("content", [b"model: [", b"a: b: c", b"\tx", b"\xff\xfe\xff", b"just words", b"- 1\n", b""])
def test_a_file_that_is_not_yaml_by_name_is_named(directory: Path, content: bytes) -> None:
    (directory / "train.yaml").write_bytes(content)
    assert str(directory / "train.yaml") in error_of(directory)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert f"{directory / name} is missing" in error_of(directory)


def test_a_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such experiment directory: .*; set one up with ptp_distill"):
        Experiment.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_is_never_overwritten(directory: Path, name: str) -> None:
    for other in set(FILES) - {name}:
        (directory / other).unlink()
    before = (directory / name).read_bytes()
    with pytest.raises(ConfigError, match="already holds an experiment"):
        Experiment(directory, CONFIG.model_copy(update={"base_model": "other"})).write()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {name: before}


def test_paths_that_exist_in_the_directory_are_meant_relative_to_it(directory: Path, tmp_path: Path) -> None:
    experiment = Experiment.load(directory)
    assert (experiment.base_model, experiment.resolve("prompts.jsonl")) == ("some/model", "prompts.jsonl")
    (directory / "some" / "model").mkdir(parents=True)
    (directory / "prompts.jsonl").write_text("")
    shutil.move(directory, tmp_path / "moved")
    moved = Experiment.load(tmp_path / "moved")
    assert moved.base_model == str(tmp_path / "moved" / "some" / "model")
    assert moved.resolve("prompts.jsonl") == str(tmp_path / "moved" / "prompts.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.sequence_length=999"],
            "train.sequence_length is 999 and cannot hold completions of pregenerate.max_length 1000; "
            "raise the one or lower the other",
        ),
        (["train.distillation=1", "model.variant=one_hot"], "train.distillation needs model.variant categorical"),
    ],
)
def test_settings_that_contradict_each_other_are_named(directory: Path, changes: list[str], message: str) -> None:
    assert error_of(directory, *changes).startswith(message)


def test_lengths_of_completions_do_not_matter_where_none_are_made(directory: Path) -> None:
    assert (
        Experiment.load(directory, ["train.sequence_length=99", "data.mode=fixed"]).config.train.sequence_length == 99
    )


def test_a_run_keeps_its_settings_command_data_versions_and_commit(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ptp_train", "x"])
    experiment = Experiment.load(directory, ["train.seed=9"])
    experiment.record_run("train", data_fingerprint="abc")
    run = json.loads((directory / "runs" / "train.json").read_text())
    assert run["command"] == ["ptp_train", "x"]
    assert run["data_fingerprint"] == "abc"
    assert ExperimentConfig(**run["config"]) == experiment.config
    assert set(run["versions"]) == {"python", "parallel-token-prediction", "torch", "transformers"}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_run_names_the_commit_of_the_program_but_not_that_of_a_repository_it_is_installed_in(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def recorded() -> str | None:
        Experiment.load(directory).record_run("train", data_fingerprint="abc")
        return json.loads((directory / "runs" / "train.json").read_text())["commit"]

    program = tmp_path / "lib" / "ptp" / "experiment.py"
    program.parent.mkdir(parents=True)
    monkeypatch.setattr("ptp.experiment.__file__", str(program))
    assert recorded() is None
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert recorded() is None
    program.write_text("")
    git("add", "lib")
    git("commit", "-m", "the program")
    commit = git("rev-parse", "HEAD")
    git("commit", "--allow-empty", "-m", "something else")
    assert recorded() == commit
