import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from trainings import CONFIG, RULE, Kill, step_loss
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from typer.testing import CliRunner

from ptp.cli.main import app
from ptp.config import PTPConfig, StudentConfig
from ptp.data.documents import Documents
from ptp.data.packing import collate
from ptp.data.teacher import Prompt, sample_completions
from ptp.decoding.decoder import Decoder
from ptp.errors import AdapterError, ConfigError
from ptp.evaluation.experiment_report import verify_experiment
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.adapter import fingerprint, read_settings
from ptp.model.ptp_model import PTPModel
from ptp.model.student import StudentModel
from ptp.scaling import build_student
from ptp.soft_pick import soft_pick
from ptp.stages import train as stage
from ptp.stages.pregenerate import import_completions, pregenerate
from ptp.stages.train import read_training_result, train
from ptp.training.checkpoints import last_complete_checkpoint
from ptp.training.objective import evaluate_windows, make_stream
from ptp.training.trainer import PTPTrainer

SIZE = StudentConfig(hidden_size=32, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def teacher(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(12)


@pytest.fixture(scope="module")
def documents(teacher: LlamaForCausalLM) -> Documents:
    """Completions of the teacher with their intervals."""
    prompts = [Prompt(np.array([0, 3 + n % 9, 3 + n // 9], np.int32), range(n, n + 1), n) for n in range(20)]
    return Documents.of(
        sample_completions(
            teacher, prompts, RULE, seed=0, max_length=40, max_new_tokens=None, end_token_ids=[1], batch_size=20
        )
    )


@pytest.fixture
def new_student(teacher: LlamaForCausalLM) -> Callable[..., StudentModel]:
    def make(seed: int = 0, size: StudentConfig = SIZE, **settings: Any) -> StudentModel:
        torch.manual_seed(seed)
        student = build_student(size, teacher.config, CONFIG.sequence_length)
        config = PTPConfig(window=4, student=size, **settings)
        model = StudentModel(student, config, "some/teacher", fingerprint(teacher))
        model.rule = RULE
        return model

    return make


def trainer_of(
    model: PTPModel, documents: Documents, output: Path, *callbacks: TrainerCallback, **changes: Any
) -> PTPTrainer:
    return PTPTrainer(model, CONFIG.model_copy(update=changes), RULE, documents, output, callbacks)


def weights(model: PTPModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def batch_of(documents: Documents) -> dict[str, Tensor]:
    return collate([make_stream(documents, CONFIG, 4)[0]])


@pytest.mark.parametrize("anchor", ["none", "first", "all"])
@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
def test_a_student_learns_as_if_each_window_and_the_context_it_reads_were_one_sequence(
    new_student: Callable, documents: Documents, variant: str, anchor: str
) -> None:
    # What stands behind the windows' states is not of the sequence.
    model, batch = new_student(variant=variant, anchor=anchor, pick="exact", chain=0), batch_of(documents)
    output = model(**batch)
    gradients = []
    num_windows = batch["starts"].shape[1]
    targets = torch.randint(12, (num_windows * 4,), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model.logits(output.windows)[0], targets).backward()
    gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    model.zero_grad()

    alone = []
    for number, start in enumerate(batch["starts"][0].tolist()):
        position = int(batch["positions"][0, start])
        context = batch["ids"][0, start - position : start]
        embed = model.token_embedding
        anchored = {"none": 0, "first": torch.eye(4)[0], "all": torch.ones(4)}[anchor]
        inputs = model.auxiliary(output.u[0, number, :4]) + torch.as_tensor(anchored)[..., None] * embed(context[-1])
        first = position - (variant == "one_hot")
        whole = torch.cat([embed(context), inputs])
        logits = model.base_model(
            inputs_embeds=whole.unsqueeze(0),
            position_ids=torch.cat([torch.arange(position), torch.arange(first, first + 4)]).unsqueeze(0),
            attention_mask=torch.ones(1, 1, len(whole), len(whole)).tril().bool(),
        ).logits
        alone.append(logits[0, position:])
    torch.testing.assert_close(model.logits(output.windows)[0], torch.cat(alone), rtol=1e-4, atol=1e-5)
    F.cross_entropy(torch.cat(alone), targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(gradients[0][name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_what_the_backward_pass_computes_again_is_not_counted_again(
    new_student: Callable, documents: Documents, random_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = mock.Mock(wraps=soft_pick)
    monkeypatch.setattr("ptp.training.losses.soft_pick", picked)
    model, batch = random_adapter(new_student(variant="categorical"), std=0.1), batch_of(documents)
    step_loss(model, batch).backward()
    picked.assert_called_once()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_u_comes_from_stored_intervals_and_never_from_the_student_s_own_head(
    new_student: Callable, documents: Documents
) -> None:
    model, batch = new_student(), batch_of(documents)
    del batch["lower"], batch["upper"]
    with pytest.raises(AssertionError, match="not its teacher's"):
        model(**batch)


@pytest.mark.parametrize(("variant", "dtype"), [("one_hot", "bfloat16"), ("categorical", "float32")])
def test_a_student_overfits_a_few_completions(
    new_student: Callable,
    documents: Documents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    dtype: str,
) -> None:
    monkeypatch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 100)
    model, few = new_student(variant=variant), documents.select(np.arange(4))
    before = evaluate_windows(model, few, CONFIG, RULE)
    trainer_of(model, few, tmp_path, max_steps=60, save_every=60, dtype=dtype).train()
    after = evaluate_windows(model, few, CONFIG, RULE)
    assert after.mean_loss < 0.3 * before.mean_loss
    assert after.mean_correct > 2 * before.mean_correct
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_bfloat16_is_for_computing_and_steps_too_small_for_it_still_count(
    new_student: Callable, documents: Documents, tmp_path: Path
) -> None:
    model, exact = new_student(), new_student()
    before = weights(model)
    settings: dict[str, Any] = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-5}
    trainer_of(model, documents, tmp_path / "bfloat16", dtype="bfloat16", **settings).train()
    trainer_of(exact, documents, tmp_path / "float32", dtype="float32", **settings).train()
    name = "base_model.model.layers.0.mlp.up_proj.weight"
    moved = weights(model)[name] != before[name]
    lost = moved & (weights(model)[name].bfloat16() == before[name].bfloat16())
    assert moved.float().mean() > 0.9
    assert lost.float().mean() > 0.5
    assert not same(weights(model), weights(exact))


def test_an_adapter_computes_in_its_base_model_s_own_type_also_after_a_student(
    tiny_llama: Callable, new_student: Callable, documents: Documents, tmp_path: Path
) -> None:
    def trained_adapter(dtype: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = PTPModel(tiny_llama(12), PTPConfig(window=4, lora_rank=2))
        trainer_of(model, documents, tmp_path / f"adapter {dtype}", dtype=dtype, max_steps=2).train()
        return weights(model)

    alone = trained_adapter("float32")
    trainer_of(new_student(), documents, tmp_path / "student", dtype="bfloat16", max_steps=2).train()
    assert same(trained_adapter("bfloat16"), alone)


def test_what_is_saved_is_loaded_and_any_program_can_read_the_student(
    new_student: Callable, documents: Documents, random_adapter: Callable, tmp_path: Path
) -> None:
    model, loaded, batch = random_adapter(new_student()), new_student(seed=1), batch_of(documents)
    with torch.no_grad():
        model.token_embedding.weight *= 3  # as learning may change them
    model.save_pretrained(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["auxiliary.safetensors", "ptp_config.json", "student/config.json", "student/model.safetensors"]
    assert not torch.equal(loaded(**batch).windows, model(**batch).windows)
    loaded.load_adapter(tmp_path)
    assert torch.equal(loaded(**batch).windows, model(**batch).windows)
    states, before = torch.randn(5, 32), torch.randint(12, (5, model.ptp_config.chain))
    assert torch.equal(loaded.chained(states, before), model.chained(states, before))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(alone(batch["ids"]).logits, model.base_model(batch["ids"]).logits)
    assert alone.generation_config.eos_token_id == [1]


def test_a_student_s_directory_names_its_teacher(
    new_student: Callable, teacher: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = new_student()
    model.save_pretrained(tmp_path / "a")
    settings = read_settings(tmp_path / "a")
    assert (settings.base_model, settings.base_fingerprint) == ("some/teacher", fingerprint(teacher))
    assert (settings.config, settings.rule, settings.survival) == (model.ptp_config, RULE, model.survival)
    # Found again when both directories move together.
    (tmp_path / "teacher").mkdir()
    model.teacher = str(tmp_path / "teacher")
    model.save_pretrained(tmp_path / "a")
    assert read_settings(tmp_path / "a").base_model == "../teacher"


def test_weights_that_do_not_fit_are_refused(new_student: Callable, tmp_path: Path) -> None:
    new_student().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="9 keys missing"):
        new_student(size=SIZE.model_copy(update={"num_layers": 3})).load_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"has shape .*, expected"):
        new_student(size=SIZE.model_copy(update={"hidden_size": 64})).load_adapter(tmp_path)
    file = tmp_path / "student" / "model.safetensors"
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
    with pytest.raises(AdapterError, match=r"1 unknown \(first: \['more'\]\)"):
        new_student().load_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="is corrupt"):
        new_student().load_adapter(tmp_path)
    file.unlink()
    with pytest.raises(AdapterError, match="is missing"):
        new_student().load_adapter(tmp_path)


def test_a_student_is_not_decoded_with(new_student: Callable, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    model = new_student()
    model.save_pretrained(tmp_path)
    for attempt in (
        lambda: Decoder(model),
        lambda: PTPModel.from_pretrained(tmp_path),
        lambda: PTPModel.from_pretrained(tmp_path, teacher),
        lambda: StudentModel.from_pretrained(tmp_path),
    ):
        with pytest.raises(AdapterError, match="a separate drafter, which the decoder does not run yet") as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_and_resumed_training_ends_with_the_same_student_as_an_uninterrupted_one(
    new_student: Callable, documents: Documents, tmp_path: Path, dtype: str
) -> None:
    whole = new_student()
    trainer_of(whole, documents, tmp_path / "whole", dtype=dtype).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(new_student(), documents, tmp_path / "parts", Kill(3), dtype=dtype).train()
    checkpoint = last_complete_checkpoint(tmp_path / "parts")
    assert checkpoint == str(tmp_path / "parts" / "checkpoint-2")
    # Another start, so that whatever is not restored shows.
    resumed = new_student(seed=1)
    trainer_of(resumed, documents, tmp_path / "parts", dtype=dtype).train(resume_from_checkpoint=checkpoint)
    assert same(weights(resumed), weights(whole))
    assert not same(weights(resumed), weights(new_student()))
    assert json.loads((tmp_path / "parts" / "checkpoint-6" / "ptp_config.json").read_text())["config"]["student"]


STUDENT = "model.student={hidden_size: 16, num_layers: 1, num_heads: 1}"


@pytest.fixture
def experiment(tiny_experiment: Callable[[Path], ExperimentConfig], tmp_path: Path) -> Experiment:
    Experiment(tmp_path / "experiment", tiny_experiment(tmp_path)).write()
    return Experiment.load(tmp_path / "experiment", [STUDENT])


def test_the_stages_train_a_student_that_the_programs_refuse_to_decode_with(experiment: Experiment) -> None:
    pregenerate(experiment)
    result = train(experiment)
    names = {path.name for path in experiment.adapter.iterdir()}
    assert names == {"student", "auxiliary.safetensors", "ptp_config.json", "training.json"}
    assert read_training_result(experiment).survival == result.survival
    settings = read_settings(experiment.adapter)
    assert (settings.config, settings.rule) == (experiment.config.model, experiment.config.sampling)
    assert settings.survival == tuple(result.survival)
    assert settings.base_fingerprint == fingerprint(AutoModelForCausalLM.from_pretrained(experiment.base_model))
    student = AutoModelForCausalLM.from_pretrained(experiment.adapter / "student")
    assert (student.config.hidden_size, student.config.vocab_size) == (16, 270)
    with pytest.raises(AdapterError, match="a separate drafter"):
        verify_experiment(experiment, num_prompts=1, max_new_tokens=4, budget=4)
    done = CliRunner().invoke(app, ["generate", str(experiment.directory), "--prompt", "def"])
    assert isinstance(done.exception, AdapterError)
    assert "a separate drafter" in str(done.exception)


def test_a_base_model_whose_own_weights_train_starts_from_them_and_moves_in_float32(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    pregenerate(experiment)
    base = AutoModelForCausalLM.from_pretrained(experiment.base_model, dtype=torch.bfloat16)
    base.save_pretrained(experiment.base_model)
    monkeypatch.setattr(stage, "check_teacher", lambda *_: None)
    settings = ["model.student=null", "model.trained=all", "train.dtype=bfloat16", "train.learning_rate=1e-5"]
    train(Experiment.load(experiment.directory, [*settings, "train.max_steps=2"]))
    tuned = AutoModelForCausalLM.from_pretrained(experiment.adapter / "student")
    assert tuned.config.architectures == base.config.architectures
    moved = [(p - base.get_parameter(name).float()).detach().abs() for name, p in tuned.named_parameters()]
    # Two steps of AdamW are at most twice the learning rate: far less than bfloat16 tells apart.
    assert np.mean([float((step > 0).float().mean()) for step in moved]) > 0.9
    assert max(float(step.max()) for step in moved) < 3e-5
    with pytest.raises(AdapterError, match=r"\(model.trained=all\) cannot verify what it drafts") as caught:
        PTPModel.from_pretrained(experiment.directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fine_tuned_base_model_learns_completions_and_is_saved_like_a_student(
    teacher: LlamaForCausalLM, documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    def new_model() -> StudentModel:
        torch.manual_seed(0)
        config = LlamaConfig(**{**teacher.config.to_dict(), "tie_word_embeddings": tied})
        model = StudentModel(LlamaForCausalLM(config), PTPConfig(window=4, trained="all"), "some/base", "")
        model.rule = RULE
        return model

    monkeypatch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 100)
    model, few, batch = new_model(), documents.select(np.arange(4)), batch_of(documents)
    before = evaluate_windows(model, few, CONFIG, RULE)
    trainer_of(model, few, tmp_path, max_steps=40, save_every=40).train()
    assert evaluate_windows(model, few, CONFIG, RULE).mean_loss < 0.5 * before.mean_loss
    loaded = new_model()
    assert not torch.equal(loaded(**batch).windows, model(**batch).windows)
    loaded.load_adapter(tmp_path / "checkpoint-40")
    assert torch.equal(loaded(**batch).windows, model(**batch).windows)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-40" / "student")
    assert torch.equal(alone(batch["ids"]).logits, model.base_model(batch["ids"]).logits)


def test_completions_without_intervals_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"def f{n}", "completion": f"(x): return {n}"}) + "\n" for n in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    import_completions(experiment, tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match=r"training all weights .* needs intervals, and .* holds none") as caught:
        train(experiment)
    assert "\n" not in str(caught.value)
    assert not experiment.checkpoints.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mode=fixed"], "data.mode fixed has none"),
        (["data.mode=full-chat"], "data.mode full-chat has none"),
        (["model.variant=categorical", "train.distillation=1"], "train.distillation needs the base model's logits"),
        (["train.dtype=float16"], "cannot be trained in train.dtype float16"),
        (["model.student.num_heads=3"], "an even number for each head; got 16 for 3 heads"),
        (["model.student.heads=3"], "unknown key 'heads' in StudentConfig; did you mean 'num_heads'?"),
        (["model.student={num_heads: 3}"], "StudentConfig needs 'hidden_size'"),
    ],
)
def test_settings_that_no_student_can_be_trained_with_are_refused(
    experiment: Experiment, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Experiment.load(experiment.directory, [STUDENT, *overrides])
    assert "\n" not in str(caught.value)


def test_a_student_is_written_down_and_changed_like_any_setting(experiment: Experiment, tmp_path: Path) -> None:
    Experiment(tmp_path / "copy", experiment.config).write()
    assert Experiment.load(tmp_path / "copy").config == experiment.config
    changed = Experiment.load(tmp_path / "copy", ["model.student.num_layers=3"]).config.model.student
    assert changed == StudentConfig(hidden_size=16, num_layers=3, num_heads=1)
    assert Experiment.load(tmp_path / "copy", ["model.student=null"]).config.model.student is None
