import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptp.data.store import CompletionStore
from ptp.errors import ConfigError, DataError, PTPError
from ptp.evaluation.experiment_report import verify_experiment
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.ptp_model import PTPModel
from ptp.stages import distill, pregenerate, read_prompts, read_training_result, split_completions, train


@pytest.fixture(scope="module")
def config(tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    return tiny_experiment(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment whose stages have all run without a stop."""
    experiment = distill(tmp_path_factory.mktemp("finished") / "experiment", config)
    pregenerate(experiment)
    train(experiment)
    return experiment


@pytest.fixture
def experiment(config: ExperimentConfig, tmp_path: Path) -> Experiment:
    return distill(tmp_path / "experiment", config)


def changed(experiment: Experiment, *overrides: str) -> Experiment:
    return Experiment.load(experiment.directory, overrides)


def content(store: CompletionStore) -> list[tuple[int, list[int], list[float], list[float], int, bool]]:
    return [
        (number, c.ids.tolist(), c.lower.tolist(), c.upper.tolist(), c.prompt_length, c.finished) for number, c in store
    ]


def test_the_stages_lead_from_a_model_and_prompts_to_a_lossless_adapter(finished: Experiment) -> None:
    assert Experiment.load(finished.directory).config == finished.config
    assert {path.stem for path in (finished.directory / "runs").iterdir()} == {"pregenerate", "train"}
    model = PTPModel.from_pretrained(finished.directory)
    assert model.rule == finished.config.sampling
    assert model.ptp_config == finished.config.model
    result = read_training_result(finished)
    assert tuple(result.survival) == model.survival
    assert len(result.accuracy) == finished.config.model.window
    verification = verify_experiment(finished, num_prompts=4, max_new_tokens=12, budget=8)
    assert [comparison.verdict for comparison in verification.comparisons] == ["identical"]


def test_every_prompt_is_completed_once_and_held_out_or_trained_on(finished: Experiment) -> None:
    training, validation = split_completions(finished)
    assert training.keys() | validation.keys() == set(range(len(read_prompts(finished))))
    assert not training.keys() & validation.keys()
    assert len(validation) == 1


def test_a_killed_pregeneration_goes_on_to_the_same_store(experiment: Experiment, finished: Experiment) -> None:
    def kill(done: int, total: int) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pregenerate(experiment, kill)
    num_stored = len(CompletionStore(experiment.completions).stored_sequences())
    assert 0 < num_stored < len(read_prompts(experiment))

    reports: list[tuple[int, int]] = []
    store = pregenerate(experiment, lambda done, total: reports.append((done, total)))
    assert reports[0][0] == num_stored
    assert reports[-1][0] == reports[-1][1] == len(read_prompts(experiment))
    assert content(store) == content(CompletionStore(finished.completions))


def test_a_finished_pregeneration_is_left_as_it_is(finished: Experiment) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.completions.iterdir()}
    pregenerate(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.completions.iterdir()} == before


class Kill(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_to_the_same_adapter(experiment: Experiment, finished: Experiment) -> None:
    pregenerate(experiment)
    with pytest.raises(KeyboardInterrupt):
        train(experiment, [Kill()])
    assert not experiment.adapter.exists()
    result = train(experiment)
    for name in ("adapter_model.safetensors", "auxiliary.safetensors"):
        weights, expected = load_file(experiment.adapter / name), load_file(finished.adapter / name)
        assert all(torch.equal(weights[key], expected[key]) for key in weights.keys() | expected.keys())
    assert result == read_training_result(experiment)
    assert result.survival == read_training_result(finished).survival


@pytest.mark.parametrize("override", ["sampling.temperature=0.9", "sampling.order=probability"])
def test_a_rule_changed_after_pregeneration_is_refused(finished: Experiment, override: str) -> None:
    other = changed(finished, override)
    before = {path: path.read_bytes() for path in finished.directory.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="another rule"):
        pregenerate(other)
    with pytest.raises(ConfigError, match="completions were sampled with"):
        train(other)
    assert {path: path.read_bytes() for path in finished.directory.rglob("*") if path.is_file()} == before


def test_prompts_changed_after_pregeneration_are_refused(finished: Experiment) -> None:
    with pytest.raises(DataError, match="another prompts_fingerprint"):
        pregenerate(changed(finished, "prompt_scheme=x {text}"))


def test_a_base_model_changed_after_pregeneration_is_refused(
    finished: Experiment, tiny_experiment: Callable, tmp_path: Path
) -> None:
    other = changed(finished, f"base_model={tiny_experiment(tmp_path, seed=1).base_model}")
    with pytest.raises(DataError, match="another base_fingerprint"):
        pregenerate(other)
    with pytest.raises(DataError, match="was sampled from another base model"):
        train(other)


def test_training_before_pregenerating_says_so(experiment: Experiment) -> None:
    with pytest.raises(DataError, match="make them with ptp_pregenerate"):
        train(experiment)


def test_completions_longer_than_a_packed_sequence_are_refused(finished: Experiment) -> None:
    with pytest.raises(ConfigError, match=r"train\.sequence_length is 8, the longest completion has \d+ tokens"):
        train(changed(finished, "train.sequence_length=8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "no such dataset file"),
        ({"base_model": "./nowhere"}, "cannot load the tokenizer of './nowhere'"),
        ({"prompt_scheme": "{question}"}, "has no column 'question'"),
    ],
)
def test_an_experiment_that_cannot_run_is_not_set_up(
    config: ExperimentConfig, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(PTPError, match=message):
        distill(tmp_path / "experiment", config.model_copy(update=changes))
    assert not (tmp_path / "experiment").exists()


def test_distill_leaves_an_experiment_that_is_there_alone(experiment: Experiment, config: ExperimentConfig) -> None:
    before = {path: path.read_bytes() for path in experiment.directory.iterdir()}
    with pytest.raises(ConfigError, match="already holds an experiment"):
        distill(experiment.directory, config.model_copy(update={"prompt_scheme": "{text}!"}))
    assert {path: path.read_bytes() for path in experiment.directory.iterdir()} == before


def test_too_few_prompts_to_hold_any_out_are_refused(tiny_experiment: Callable, tmp_path: Path) -> None:
    experiment = distill(tmp_path / "experiment", tiny_experiment(tmp_path, num_prompts=1))
    pregenerate(experiment)
    with pytest.raises(DataError, match="1 completions are too few to hold any out"):
        train(experiment)


def test_what_is_stored_has_exact_intervals_of_finite_width(finished: Experiment) -> None:
    for _, completion in CompletionStore(finished.completions):
        assert np.all((completion.lower >= 0) & (completion.lower < completion.upper) & (completion.upper <= 1))


def test_the_readme_names_the_next_commands(experiment: Experiment) -> None:
    text = (experiment.directory / "README.md").read_text()
    for command in ("ptp_pregenerate", "ptp_train", "ptp verify", "ptp_generate"):
        assert f"{command} {experiment.directory}" in text
    assert json.dumps(len(read_prompts(experiment))) in text
