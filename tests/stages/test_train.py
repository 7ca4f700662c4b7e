import errno
import gc
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from command_line import PATIENCE, forking
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import Kill
from transformers import TrainerCallback

from ptp.cli import train as train_command
from ptp.config import DataConfig, Mode, PTPConfig
from ptp.data.documents import Documents
from ptp.data.packing import collate
from ptp.data.store import CompletionStore
from ptp.errors import AdapterError, ConfigError, DataError
from ptp.evaluation.experiment_report import verify_experiment
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.loading import load_tokenizer
from ptp.model.ptp_model import PTPModel
from ptp.stages.distill import distill
from ptp.stages.pregenerate import pregenerate
from ptp.stages.prepare import prepare
from ptp.stages.train import (
    TEXT_PROMPT_TOKENS,
    TRAINING_RESULT,
    has_adapter,
    read_training_result,
    train,
    training_data,
    validation_prompts,
)
from ptp.training.checkpoints import last_complete_checkpoint
from ptp.training.losses import window_targets
from ptp.training.objective import make_stream

MODES: tuple[Mode, ...] = get_args(Mode)
WEIGHTS = ("adapter_model.safetensors", "auxiliary.safetensors")
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def finished(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment whose stages have all run without a stop; not to be changed."""
    experiment = distill(tmp_path_factory.mktemp("finished") / "experiment", config)
    pregenerate(experiment)
    train(experiment)
    return experiment


@pytest.fixture
def sampled(config: ExperimentConfig, finished: Experiment, tmp_path: Path) -> Experiment:
    """An experiment with the completions of the finished one, to be trained."""
    experiment = distill(tmp_path / "experiment", config)
    experiment.completions.symlink_to(finished.completions)
    return experiment


@pytest.fixture(scope="module")
def of_mode(chat_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], Experiment]:
    """An experiment of each mode, trained; not to be changed."""
    made: dict[Mode, Experiment] = {}

    def make(mode: Mode) -> Experiment:
        if mode not in made:
            directory = tmp_path_factory.mktemp(mode)
            made[mode] = distill(directory / "experiment", chat_experiment(directory, mode))
            if made[mode].config.data.distils:
                pregenerate(made[mode])
            train(made[mode])
        return made[mode]

    return make


def changed(experiment: Experiment, *overrides: str) -> Experiment:
    return Experiment.load(experiment.directory, overrides)


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def documents_of(documents: Documents) -> list[tuple[int, list[int]]]:
    return [(document.number, document.ids.tolist()) for document in documents]


# Every mode


@each_mode
def test_every_mode_trains_a_lossless_adapter(of_mode: Callable[[Mode], Experiment], mode: Mode) -> None:
    experiment = of_mode(mode)
    model = PTPModel.from_pretrained(experiment.directory)
    assert model.rule == experiment.config.sampling
    assert model.ptp_config == experiment.config.model
    # What training starts from proposes nothing: lora_B is zero.
    weights = load_file(experiment.adapter / WEIGHTS[0])
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    result = read_training_result(experiment)
    assert tuple(result.survival) == model.survival
    assert len(model.calibration.curves) == model.ptp_config.num_curves
    assert (list(model.continued), model.second) == (result.continued, result.second)
    assert len(model.continued) == len(model.survival)
    assert len(result.accuracy) == experiment.config.model.window
    assert result.config == experiment.config.model_dump(mode="json")
    verification = verify_experiment(experiment, num_prompts=2, max_new_tokens=12, budget=8)
    assert {comparison.verdict for comparison in verification.comparisons} == {"identical"}


@each_mode
def test_what_is_held_out_is_not_trained_on(of_mode: Callable[[Mode], Experiment], mode: Mode) -> None:
    experiment = of_mode(mode)
    data = training_data(experiment)
    source = (
        CompletionStore(experiment.completions).load()
        if experiment.config.data.distils
        else prepare(experiment).documents
    )
    both = sorted(documents_of(data.training) + documents_of(data.validation))
    assert both == sorted(documents_of(source))
    assert not set(data.training.groups.tolist()) & set(data.validation.groups.tolist())
    assert 1 <= len(data.validation) <= len(source) / 10


@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
def test_of_chats_the_assistant_s_turns_are_trained_and_nothing_else(
    of_mode: Callable[[Mode], Experiment], variant: str
) -> None:
    experiment = of_mode("full-chat")
    training, settings = training_data(experiment).training, experiment.config
    stream = make_stream(training, settings.train, settings.model.window)
    stream.length *= 20
    tokenizer = load_tokenizer(experiment.base_model)
    seen: dict[tuple[int, ...], set[int]] = {}
    for item in (stream[index] for index in range(len(stream))):
        batch = collate([item])
        mass = torch.ones_like(batch["ids"], dtype=torch.bool)
        window, shift = settings.model.window, PTPConfig(variant=variant).shift
        targets = window_targets(batch["ids"], batch["span"], batch["starts"], mass, window, shift)
        for number in range(int(item.document.max()) + 1):
            (places,) = torch.nonzero(item.document == number, as_tuple=True)
            trained = targets.index[targets.valid & (item.document[targets.index] == number)] - places[0]
            seen.setdefault(tuple(item.ids[places].tolist()), set()).update(trained.tolist())
    assert len(seen) == len(training)
    chats = {number: [f"{number + 1}</s>", f"{number + 3}, of course</s>"] for number in range(24)}
    for ids, trained in seen.items():
        answers, before = [], -2
        for place in sorted(trained):
            if place > before + 1:
                # In decoding, the base model says a turn's first token; C-PTP does not predict it.
                answers.append("" if variant == "one_hot" else tokenizer.decode([ids[place - 1]]))
            answers[-1] += tokenizer.decode([ids[place]])
            before = place
        asked = tokenizer.decode(ids).partition("<|user|>\n")[2].partition("+1?")[0]
        assert answers == chats[int(asked)]


def test_of_texts_everything_but_the_first_token_is_trained(of_mode: Callable[[Mode], Experiment]) -> None:
    for document in training_data(of_mode("fixed")).training:
        assert document.spans == ((1, len(document)),)
        assert document.ids[-1] == 1


@each_mode
def test_held_out_prompts_end_where_an_answer_begins(of_mode: Callable[[Mode], Experiment], mode: Mode) -> None:
    experiment = of_mode(mode)
    tokenizer = load_tokenizer(experiment.base_model)
    held = training_data(experiment).validation
    for prompt in validation_prompts(experiment, 100):
        (document, *_) = [d for d in held if d.ids[: len(prompt)].tolist() == prompt]
        text = tokenizer.decode(prompt)
        if mode in ("prompt-distill", "full-chat"):
            assert text.endswith("<|assistant|>\n")
            assert text.count("<|assistant|>") == 1 or mode == "prompt-distill"
        elif mode == "fixed":
            assert len(prompt) == (len(document) + 1) // 2 < TEXT_PROMPT_TOKENS
        else:
            assert len(prompt) == document.prompt_length < len(document)


def test_a_held_out_prompt_is_given_once_however_often_it_is_completed(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    settings = config.pregenerate.model_copy(update={"completions_per_prompt": 3})
    experiment = distill(tmp_path, config.model_copy(update={"pregenerate": settings}))
    pregenerate(experiment)
    held = training_data(experiment).validation
    assert len(held) == 3 * len(np.unique(held.groups))
    prompts = validation_prompts(experiment, 100)
    assert len(prompts) == len({tuple(prompt) for prompt in prompts}) == len(np.unique(held.groups))
    assert len(validation_prompts(experiment, 1)) == 1


# What a run leaves behind


def test_training_does_not_need_the_dataset_any_more(sampled: Experiment, config: ExperimentConfig) -> None:
    data = config.data.model_dump() | {"path": "gone.jsonl"}
    gone = Experiment(sampled.directory, config.model_copy(update={"data": DataConfig(**data)}))
    train(gone)
    assert has_adapter(gone)


def test_a_run_is_recorded_with_all_it_used(finished: Experiment) -> None:
    for stage in ("pregenerate", "train"):
        run = json.loads((finished.directory / "runs" / f"{stage}.json").read_text())
        assert run["command"] == sys.argv
        assert ExperimentConfig(**run["config"]) == finished.config
        assert run["data_fingerprint"] == prepare(finished).fingerprint
        assert run["versions"].keys() == {"python", "parallel-token-prediction", "torch", "transformers"}
        assert run["versions"]["torch"] == torch.__version__
        root = Path(__file__).parents[2]
        git = subprocess.run(
            ["git", "log", "-1", "--format=%H", "--", "src/ptp"], cwd=root, capture_output=True, text=True, check=False
        )
        assert run["commit"] == (git.stdout.strip() or None)


def test_overrides_are_part_of_the_record(sampled: Experiment) -> None:
    train(changed(sampled, "train.max_steps=2", "train.learning_rate=3e-4", "model.lora_rank=3"))
    run = json.loads((sampled.directory / "runs" / "train.json").read_text())
    for settings in (run["config"], read_training_result(sampled).config):
        assert (settings["train"]["learning_rate"], settings["model"]["lora_rank"]) == (3e-4, 3)
    assert "learning_rate: 0.0001" in (sampled.directory / "train.yaml").read_text(), "for this run only"
    assert PTPModel.from_pretrained(sampled.directory).ptp_config.lora_rank == 3


# Stopped and started again


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_training_goes_on_to_the_same_adapter(sampled: Experiment, finished: Experiment, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(sampled, [Kill(step)])
    assert not has_adapter(sampled)
    assert len(list(sampled.checkpoints.glob("checkpoint-*"))) == (1 if step > 2 else 0)
    result = train(sampled)
    assert has_adapter(sampled)
    for name in WEIGHTS:
        weights, expected = load_file(sampled.adapter / name), load_file(finished.adapter / name)
        assert all(torch.equal(weights[key], expected[key]) for key in weights.keys() | expected.keys())
    assert result == read_training_result(sampled)
    assert result.survival == read_training_result(finished).survival
    assert result.curves == read_training_result(finished).curves


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.learning_rate=0.1", r"train\.learning_rate \(0\.\d+; now 0\.1\)"),
        ("model.window=3", r"model\.window \(4; now 3\)"),
        ("train.seed=5", r"train\.seed \(0; now 5\)"),
    ],
)
def test_training_does_not_go_on_from_checkpoints_of_other_settings(
    finished: Experiment, override: str, difference: str
) -> None:
    before = files(finished.directory)
    with pytest.raises(ConfigError, match=f"were made with another {difference}; restore that to go on from them"):
        train(changed(finished, override))
    assert files(finished.directory) == before


def test_fewer_steps_than_were_trained_are_refused(finished: Experiment) -> None:
    before = files(finished.directory)
    with pytest.raises(ConfigError, match=r"checkpoint-4 is 4 steps of training, and 3 are asked for") as error:
        train(changed(finished, "train.max_steps=3"))
    assert "\n" not in str(error.value)
    assert files(finished.directory) == before


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=4", "train.gradient_accumulation_steps=2"],
        ["train.batch_size=1", "train.gradient_accumulation_steps=8", "train.gradient_checkpointing=true"],
    ],
)
def test_with_less_memory_training_goes_on_as_it_would_have(
    sampled: Experiment, finished: Experiment, overrides: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(sampled, [Kill(3)])
    begun = {name: load_file(sampled.checkpoints / "checkpoint-2" / name) for name in WEIGHTS}
    train(changed(sampled, *overrides))
    for name in WEIGHTS:
        weights, expected = (load_file(each.checkpoints / "checkpoint-4" / name) for each in (sampled, finished))
        for key, start in begun[name].items():
            # Sums are rounded in another order, which is little beside what was learnt since.
            assert (weights[key] - expected[key]).norm() <= 1e-3 * (expected[key] - start).norm(), key


def test_training_goes_on_from_checkpoints_made_before_a_rule_had_min_p(sampled: Experiment) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(sampled, [Kill(3)])
    kept = sampled.checkpoints / "settings.json"
    settings = json.loads(kept.read_text())
    assert settings.pop("sampling.min_p") == 0
    kept.write_text(json.dumps(settings))
    train(sampled)
    assert has_adapter(sampled)


def test_a_training_may_be_made_longer(sampled: Experiment) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(sampled, [Kill(3)])
    longer = changed(sampled, "train.max_steps=6", "train.save_every=3")
    assert train(longer).config["train"]["max_steps"] == 6


def test_a_finished_training_takes_no_further_step(finished: Experiment) -> None:
    weights = {name: (finished.adapter / name).read_bytes() for name in WEIGHTS}
    result = read_training_result(finished)
    callback = TrainerCallback()
    callback.on_step_begin = lambda *_, **settings: pytest.fail("a step is taken")
    assert train(finished, [callback]) == result
    assert {name: (finished.adapter / name).read_bytes() for name in WEIGHTS} == weights


def check_same(parts: Experiment, whole: Experiment) -> None:
    """The same adapter, and the same log but for what the clock says."""
    learnt, results, logs = [], [], []
    for experiment in (parts, whole):
        result = read_training_result(experiment)
        del result.curves["tokens_per_second"]
        results.append(result)
        last = Path(last_complete_checkpoint(experiment.checkpoints) or "")
        rows = json.loads((last / "trainer_state.json").read_text())["log_history"]
        learnt.append([(directory / name).read_bytes() for directory in (last, experiment.adapter) for name in WEIGHTS])
        logs.append([{k: v for k, v in row.items() if k not in ("tokens_per_second", "memory_gb")} for row in rows])
    assert learnt[0] == learnt[1]
    assert results[0] == results[1]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_killed_at_random_moments_the_training_is_an_uninterrupted_one(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    start = forking(train_command.command)
    settings = {"max_steps": 120, "save_every": 10, "log_every": 7, "gradient_accumulation_steps": 2, "batch_size": 4}
    config = config.model_copy(update={"train": config.train.model_copy(update=settings)})
    warm = distill(tmp_path / "warm", config)
    pregenerate(warm)

    def fresh(name: str) -> Experiment:
        experiment = distill(tmp_path / name, config)
        experiment.completions.symlink_to(warm.completions)
        return experiment

    whole = fresh("whole")
    for experiment in (warm, whole):
        begun = time.monotonic()
        process = start(experiment.directory)
        process.join(PATIENCE)
        assert process.exitcode == 0
    usual, moments, reached = time.monotonic() - begun, random.Random(0), Counter[str | None]()
    names = map(str, itertools.count())
    parts = fresh(next(names))
    while reached.total() < 8:
        process = start(parts.directory)
        process.join(moments.uniform(0.1, 0.8) * usual)
        if process.exitcode is None:
            process.kill()
            process.join(PATIENCE)
            last = last_complete_checkpoint(parts.checkpoints)
            reached[last and Path(last).name] += 1
        else:
            assert process.exitcode == 0
            check_same(parts, whole)
            parts = fresh(next(names))
    process = start(parts.directory)
    process.join(PATIENCE)
    assert process.exitcode == 0
    check_same(parts, whole)
    assert len(reached) > 2, f"kills by last checkpoint: {reached}"


@pytest.mark.parametrize(
    "full_at", ["adapter_model.safetensors", "adapter_config.json", "ptp_config.json", TRAINING_RESULT]
)
def test_a_disk_too_full_for_the_adapter_is_one_line_and_leaves_none_that_looks_whole(
    finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    shutil.copytree(finished.directory, tmp_path / "experiment")
    experiment = Experiment.load(tmp_path / "experiment")
    result = read_training_result(experiment)
    # The order of its curves is another after a resumption.
    whole = {path: content for path, content in files(experiment.adapter).items() if path.name != TRAINING_RESULT}

    def open_unless_full(path: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        if full_at in str(path) and experiment.adapter in Path(path).parents and "r" not in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *arguments, **settings)

    opened = io.open
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", open_unless_full)
        patch.setattr("builtins.open", open_unless_full)
        if full_at.endswith(".safetensors"):
            patch.setattr("ptp.model.adapter.save_file", lambda tensors, path, **_: open_unless_full(path, "wb"))
        with pytest.raises(DataError) as caught:
            train(experiment)
    message = str(caught.value)
    assert "No space left on device" in message
    assert "\n" not in message
    assert not has_adapter(experiment)
    if full_at != TRAINING_RESULT:
        assert message.startswith(f"{experiment.adapter} could not be written ([Errno 28] No space left on device")
        with pytest.raises(AdapterError, match="holds no adapter"):
            PTPModel.from_pretrained(experiment.directory)
    train(experiment)
    assert read_training_result(experiment) == result
    written = files(experiment.adapter)
    assert {path: written[path] for path in whole} == whole


# What is refused


@pytest.mark.parametrize("override", ["sampling.temperature=0.9", "sampling.order=probability"])
def test_a_rule_changed_after_pregeneration_is_refused(finished: Experiment, override: str) -> None:
    before = files(finished.directory)
    with pytest.raises(ConfigError, match=r"the completions were sampled with temperature 0\.7.*the experiment says"):
        train(changed(finished, override))
    assert files(finished.directory) == before


def test_a_base_model_changed_after_pregeneration_is_refused(
    finished: Experiment, tiny_experiment: Callable, tmp_path: Path
) -> None:
    before = files(finished.directory)
    with pytest.raises(DataError, match="was sampled from another base model"):
        train(changed(finished, f"base_model={tiny_experiment(tmp_path, seed=1).base_model}"))
    assert files(finished.directory) == before


def test_a_store_in_the_tokens_of_another_tokenizer_is_refused(
    finished: Experiment, config: ExperimentConfig, tmp_path: Path
) -> None:
    shutil.copytree(config.base_model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = (token for token, number in vocabulary.items() if number in (100, 101))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    before = files(finished.directory)
    with pytest.raises(DataError, match=r"a tokenizer of another vocabulary than that of .*; pregenerate into a new"):
        train(changed(finished, f"base_model={tmp_path / 'model'}"))
    assert files(finished.directory) == before


@pytest.mark.parametrize("mode", ["fixed", "full-chat"])
def test_tokens_that_the_base_model_has_no_embedding_for_are_refused(
    chat_experiment: Callable, tiny_llama: Callable, tmp_path: Path, mode: Mode
) -> None:
    config = chat_experiment(tmp_path, mode)
    tiny_llama(vocab_size=120, context=96).save_pretrained(config.base_model)
    experiment = distill(tmp_path / "experiment", config)
    with pytest.raises(DataError, match=r"hold the token id \d+, the base model has embeddings for 120 tokens"):
        train(experiment)
    assert not experiment.checkpoints.exists()


def test_held_out_documents_on_which_nothing_can_be_measured_are_refused_at_once(
    sampled: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = training_data(sampled)
    short = [replace(held, spans=((len(held) - 1, len(held)),), lower=None, upper=None) for held in data.validation]
    monkeypatch.setattr("ptp.stages.train.training_data", lambda *_: replace(data, validation=Documents.of(short)))
    with pytest.raises(DataError, match=r"none of the \d held-out documents has two trained tokens in a row"):
        train(sampled)
    assert not sampled.checkpoints.exists()


def test_training_before_pregenerating_says_so(config: ExperimentConfig, tmp_path: Path) -> None:
    experiment = distill(tmp_path, config)
    before = files(tmp_path)
    with pytest.raises(
        DataError, match=f"{experiment.completions} holds no completions; make them with ptp_pregenerate"
    ):
        train(experiment)
    assert files(tmp_path) == before


def test_sequences_too_short_for_what_is_stored_are_refused(finished: Experiment) -> None:
    longest = int(CompletionStore(finished.completions).load().lengths.max())
    data = finished.config.train.model_copy(update={"sequence_length": longest - 1})
    short = Experiment(finished.directory, finished.config.model_copy(update={"train": data}))
    message = rf"train\.sequence_length is {longest - 1}, the longest completion has {longest} tokens; raise it"
    with pytest.raises(ConfigError, match=message):
        train(short)


@pytest.mark.parametrize("mode", ["fixed", "full-chat"])
def test_too_little_data_to_hold_any_out_is_refused(chat_experiment: Callable, tmp_path: Path, mode: Mode) -> None:
    experiment = distill(tmp_path / "experiment", chat_experiment(tmp_path, mode, num_rows=9))
    with pytest.raises(DataError, match="9 documents are too few to hold any out; give at least 10"):
        train(experiment)
    assert not experiment.checkpoints.exists()


def test_a_damaged_store_is_named(config: ExperimentConfig, finished: Experiment, tmp_path: Path) -> None:
    experiment = distill(tmp_path, config)
    pregenerate(experiment)
    shard = experiment.completions / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{shard} is corrupt .*; remove it and run the command again"):
        train(experiment)
    # What the message says to do.
    shard.unlink()
    pregenerate(experiment)
    assert shard.read_bytes() == (finished.completions / shard.name).read_bytes()


def test_the_curve_of_training_is_kept(sampled: Experiment) -> None:
    result = train(changed(sampled, "train.max_steps=20", "train.save_every=100"))
    steps = [step for step, _ in result.curves["loss"]]
    assert steps == [10, 20]


# What is reported


def events(experiment: Experiment) -> dict[str, list[int]]:
    """Steps of each quantity in tensorboard's events."""
    accumulator = EventAccumulator(str(experiment.events)).Reload()
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_s_events_are_in_the_experiment_s_directory(sampled: Experiment) -> None:
    result = train(changed(sampled, "train.max_steps=20", "train.save_every=100"))
    accumulator = EventAccumulator(str(sampled.events)).Reload()
    losses = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in result.curves["loss"]]
    assert [step for step, _ in losses] == [10, 20]
    assert not list(sampled.checkpoints.glob("**/events.*"))


def test_a_resumed_training_adds_to_the_events(sampled: Experiment) -> None:
    longer = changed(sampled, "train.max_steps=30", "train.save_every=10")
    with pytest.raises(KeyboardInterrupt):
        train(longer, [Kill(15)])
    assert events(sampled)["train/loss"] == [10]
    train(longer)
    assert events(sampled)["train/loss"] == [10, 20, 30]


def test_a_directory_that_tensorboard_was_given_elsewhere_is_kept(
    sampled: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    train(sampled)
    assert list((tmp_path / "elsewhere").iterdir())
    assert not sampled.events.exists()


def test_without_a_tracker_there_are_no_events(sampled: Experiment) -> None:
    train(changed(sampled, "train.report_to=[]"))
    assert not sampled.events.exists()


def test_nothing_of_a_training_is_held_when_it_is_over(sampled: Experiment) -> None:
    """So that a GPU that had room for training has room for decoding."""
    callback, held = TrainerCallback(), []
    callback.on_train_begin = lambda *_, model, **__: held.extend(map(weakref.ref, model.parameters()))
    gc.disable()
    try:
        train(sampled, [callback])
        assert held
        assert not any(parameter() is not None for parameter in held)
    finally:
        gc.enable()


# Size

PEAK = """
import sys
from pathlib import Path

from ptp.config import DataConfig, TrainConfig, PTPConfig
from ptp.experiment import ExperimentConfig
from ptp.sampling import SamplingRule
from ptp.stages.distill import distill
from ptp.stages.train import train, training_data


def peak_megabytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1000


model, *sets = sys.argv[1:]
for path in sets:
    config = ExperimentConfig(
        base_model=model,
        data=DataConfig(path=path, mode="fixed"),
        sampling=SamplingRule(),
        model=PTPConfig(window=4, lora_rank=2),
        train=TrainConfig(max_steps=1, sequence_length=96, windows_per_sequence=8, warmup_steps=0, dtype="float32"),
    )
    experiment = distill(Path(path).with_suffix(""), config)
    train(experiment)
    print(int(training_data(experiment).training.lengths.sum()), peak_megabytes())
"""
"""Prints trained tokens and peak memory so far for each data set it is given."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_five_million_tokens_take_little_more_memory_than_a_few(config: ExperimentConfig, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("few", 50), ("many", 2600)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                numbers = " ".join(map(str, draw.integers(0, 10, 1000)))
                file.write(json.dumps({"text": numbers}) + "\n")
    command = [sys.executable, "-c", PEAK, config.base_model, str(tmp_path / "few.jsonl"), str(tmp_path / "many.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (few, base), (many, peak) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert few < 200_000
    assert many > 4_500_000
    # Held as a whole by the tokenizer, at 170 bytes a token, or as Python's lists, at 124, they would take 600 MB.
    assert peak - base < 250
