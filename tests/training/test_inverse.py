"""Inverse autoregressive training: u lies in the intervals of what the model itself predicts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trainings import CONFIG, Kill, step_loss
from transformers import LlamaConfig

from ptp.config import PTPConfig, StudentConfig, TrainConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.errors import AdapterError, ConfigError
from ptp.evaluation.experiment_report import verify_experiment
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.ptp_model import PTPModel, states_before
from ptp.model.student import StudentModel
from ptp.sampling import SamplingRule, inside, interval, pick, warp
from ptp.scaling import build_student
from ptp.stages.distill import distill
from ptp.stages.train import train
from ptp.training.checkpoints import last_complete_checkpoint
from ptp.training.objective import evaluate_windows, make_stream
from ptp.training.trainer import PTPTrainer

WINDOW, VOCABULARY = 4, 40
RULE = SamplingRule(temperature=0.7)
INVERSE = CONFIG.model_copy(update={"objective": "inverse_autoregressive"})
SIZE = StudentConfig(hidden_size=32, num_layers=2, num_heads=2)
OWN: dict[str, Any] = {"variant": "categorical", "chain": 0, "pick": "exact"}
"""Windows that have distributions of their own, under which u can be drawn."""

CHATS = [(30, ((3, 12), (15, 16), (19, 30))), (11, ((0, 4), (4, 9))), (6, ((2, 6),)), (14, ((1, 14),))]
"""Lengths and spans of documents that make one packed sequence together; some spans are shorter than a window."""

Batch = dict[str, Tensor]


def documents(count: int = 1) -> Documents:
    draw = np.random.default_rng(0)
    return Documents.of(
        [
            Document(draw.integers(3, VOCABULARY, length).astype(np.int32), spans, group=number, number=number)
            for number, (length, spans) in enumerate(count * CHATS)
        ]
    )


def batch_of() -> Batch:
    stream = make_stream(documents(), INVERSE.model_copy(update={"windows_per_sequence": 40}), WINDOW)
    stream.length = 2
    return collate([stream[0], stream[1]])


@pytest.fixture
def make_model(tiny_llama: Callable, tiny_gpt2: Callable, random_adapter: Callable) -> Callable[..., PTPModel]:
    """Makes a model that predicts wildly: an adapter on a base model, a student, or a base model to be fine-tuned."""

    def make(kind: str = "llama", seed: int = 0, **settings: Any) -> PTPModel:
        settings = {**OWN, "window": WINDOW, "lora_rank": 4, **settings}
        torch.manual_seed(seed)
        if kind == "student":
            student = build_student(SIZE, LlamaConfig(vocab_size=VOCABULARY), INVERSE.sequence_length)
            model: PTPModel = StudentModel(student, PTPConfig(student=SIZE, **settings), "teacher", "")
            for parameter in student.parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.3)
        elif kind == "fine-tuned":
            model = StudentModel(tiny_llama(), PTPConfig(trained="all", **settings), "base", "")
        else:
            base = {"llama": tiny_llama, "gpt2": tiny_gpt2, "eager": lambda: tiny_llama(attention="eager")}[kind]()
            model = random_adapter(PTPModel(base, PTPConfig(**settings)), std=0.1)
        model.rule = RULE
        return model.eval()

    return make


def alone(model: PTPModel, batch: Batch, row: int, number: int, u: Tensor) -> Tensor:
    """Logits (1 + K, V) of a window's first token and behind each u (K,), from one plain call without a cache."""
    start = int(batch["starts"][row, number])
    position = int(batch["positions"][row, start])
    context = batch["ids"][row, start - position : start]
    anchored = {"none": 0.0, "first": torch.eye(WINDOW)[0, : len(u)], "all": 1.0}[model.ptp_config.anchor]
    anchor = torch.as_tensor(anchored).expand(len(u)).unsqueeze(1) * model.token_embedding(context[-1])
    inputs = torch.cat([model.token_embedding(context), model.auxiliary(u) + anchor]).unsqueeze(0)
    with model.gate.opened(len(context)):
        logits = model.base_model(inputs_embeds=inputs, position_ids=torch.arange(inputs.shape[1])[None]).logits
    return logits[0, len(context) - 1 :]


KINDS = [
    ("llama", "first"),
    ("llama", "all"),
    ("gpt2", "none"),
    ("eager", "first"),
    ("student", "first"),
    ("fine-tuned", "all"),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "anchor"), KINDS)
def test_each_u_lies_in_its_token_s_interval_under_what_the_u_before_it_lead_to(
    make_model: Callable, kind: str, anchor: str
) -> None:
    model, batch = make_model(kind, anchor=anchor), batch_of()
    output = model(**batch, inverse=True)
    assert output.u.shape == batch["z"].shape
    windows = model.logits(output.windows).unflatten(1, (-1, WINDOW))
    num_inside = 0
    for row, number in np.ndindex(*batch["starts"].shape):
        logits = alone(model, batch, row, number, output.u[row, number, :WINDOW])
        # What all positions predict when they are read at once, u known, is what each predicted before the next.
        torch.testing.assert_close(windows[row, number], logits[1:], rtol=1e-4, atol=1e-4)
        start = int(batch["starts"][row, number])
        for k in range(WINDOW + 1):
            held = start + k < 64 and batch["span"][row, start + k] == batch["span"][row, start]
            if not held:
                assert output.u[row, number, k] == 0
                continue
            lower, upper = interval(warp(logits[k], RULE), batch["ids"][row, start + k])
            expected = inside(lower, upper, batch["z"][row, number, k])
            torch.testing.assert_close(output.u[row, number, k], expected, rtol=1e-5, atol=1e-5)
            num_inside += 1
    assert 0 < num_inside < output.u.numel()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "student"])
def test_every_u_picks_its_token_back(make_model: Callable, kind: str) -> None:
    model, batch = make_model(kind), batch_of()
    batch["z"] = 0.05 + 0.9 * batch["z"]
    output = model(**batch, inverse=True)
    first = model.logits(states_before(batch["starts"], output.context)).unsqueeze(2)
    windows = model.logits(output.windows).unflatten(1, (-1, WINDOW))
    distribution = warp(torch.cat([first, windows], dim=2), RULE)
    index = (batch["starts"].unsqueeze(-1) + torch.arange(WINDOW + 1)).clamp(max=63)
    tokens = batch["ids"].gather(1, index.flatten(1)).view_as(index)
    lower, upper = interval(distribution, tokens)
    held = (
        batch["span"].gather(1, index.flatten(1)).view_as(index) == batch["span"].gather(1, batch["starts"])[..., None]
    )
    # At rounding's distance from an interval's edge, either side may come out.
    clear = held & (upper - lower > 1e-4)
    assert clear.float().mean() > 0.5
    assert torch.equal(pick(distribution, output.u)[clear], tokens[clear])


@torch.no_grad()
def test_a_window_s_first_u_is_the_one_that_the_base_model_s_intervals_give(make_model: Callable) -> None:
    model, batch = make_model(), batch_of()
    own, base = model(**batch, inverse=True), model(**batch)
    torch.testing.assert_close(own.u[..., 0], base.u[..., 0], rtol=1e-6, atol=1e-6)
    assert (own.u[..., 1:] - base.u[..., 1:]).abs().mean() > 0.01


@torch.no_grad()
def test_intervals_that_are_stored_change_nothing(make_model: Callable) -> None:
    model, batch = make_model(), batch_of()
    edges = {"lower": torch.zeros_like(batch["ids"]).float(), "upper": torch.ones_like(batch["ids"]).float()}
    assert torch.equal(model(**batch, **edges, inverse=True).u, model(**batch, inverse=True).u)


@pytest.mark.parametrize("kind", ["llama", "student"])
def test_the_loss_is_minus_log_of_a_window_s_likelihood_of_which_a_frozen_context_has_no_part(
    make_model: Callable, kind: str
) -> None:
    model, batch = make_model(kind), batch_of()
    weights = torch.tensor([1.0, 0.5, 0.25, 0.125])
    loss = step_loss(model, batch, RULE, weights, inverse=True)
    with torch.no_grad():
        u = model(**batch, inverse=True).u
        total = share = 0.0
        for row, number in np.ndindex(*batch["starts"].shape):
            start = int(batch["starts"][row, number])
            logs = F.log_softmax(alone(model, batch, row, number, u[row, number, :WINDOW]) / RULE.temperature, -1)
            for k, weight in enumerate([1.0 if kind == "student" else 0.0, *weights.tolist()]):
                if start + k < 64 and batch["span"][row, start + k] == batch["span"][row, start]:
                    total -= weight * float(logs[k, batch["ids"][row, start + k]])
                    share += weight
    assert float(loss.detach()) == pytest.approx(total / share, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "student", "fine-tuned"])
def test_gradients_are_those_of_the_loss_with_u_as_given_numbers(make_model: Callable, kind: str) -> None:
    # Of the embeddings, one through which a gradient could pass.
    model, batch = make_model(kind, auxiliary="linear"), batch_of()
    loss = step_loss(model, batch, RULE, inverse=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.no_grad():
        u = model(**batch, inverse=True).u
    losses = []
    for row, number in np.ndindex(*batch["starts"].shape):
        start = int(batch["starts"][row, number])
        held = (batch["span"][row, start : start + WINDOW + 1] == batch["span"][row, start]).nonzero().flatten()
        logits = alone(model, batch, row, number, u[row, number, :WINDOW])[held] / RULE.temperature
        each = F.cross_entropy(logits, batch["ids"][row, start + held], reduction="none")
        losses.append(each if model.learns_to_read else each[1:])
    torch.cat(losses).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_in_bfloat16_arithmetic_every_weight_of_a_student_still_gets_a_gradient(make_model: Callable) -> None:
    model = make_model("student", auxiliary="linear")
    with torch.autocast("cpu", torch.bfloat16):
        step_loss(model, batch_of(), RULE, inverse=True).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def run(model: PTPModel, output: Path, *callbacks: Any, resume: str | None = None, **changes: Any) -> None:
    config = INVERSE.model_copy(update=changes)
    PTPTrainer(model, config, RULE, documents(8), output, callbacks).train(resume_from_checkpoint=resume)


def weights(model: PTPModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", "float32"), ("student", "float32"), ("student", "bfloat16"), ("fine-tuned", "float32")],
)
def test_a_few_documents_are_learnt(
    make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    monkeypatch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 100)
    model = make_model(kind)
    frozen = {name: value for name, value in weights(model).items() if not model.get_parameter(name).requires_grad}
    before = evaluate_windows(model, documents(), INVERSE, RULE)
    run(model, tmp_path, max_steps=60, save_every=60, dtype=dtype)
    after = evaluate_windows(model, documents(), INVERSE, RULE)
    assert after.mean_loss < 0.6 * before.mean_loss
    assert same({name: weights(model)[name] for name in frozen}, frozen)
    assert bool(frozen) == (kind == "llama")


def chain(num_tokens: int, draw: np.random.Generator) -> np.ndarray:
    """Tokens of which each leaves two for the next, and any after three: one of eight, the last three bits drawn."""
    bits = draw.integers(0, 2, num_tokens + 2)
    return (4 * bits[:-2] + 2 * bits[1:-1] + bits[2:]).astype(np.int32)


def test_a_model_from_scratch_learns_to_read_u(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 500)
    draw = np.random.default_rng(0)
    both = [Documents.of([Document(chain(24, draw), ((1, 24),)) for _ in range(count)]) for count in (100, 20)]
    changes = {"sequence_length": 24, "max_steps": 100, "save_every": 100}
    config = TrainConfig(**{**dict(INVERSE), **changes})
    torch.manual_seed(0)
    student = build_student(SIZE, LlamaConfig(vocab_size=8), 24)
    settings = PTPConfig(**OWN, window=2, student=SIZE, auxiliary="linear")
    model = StudentModel(student, settings, "teacher", "")
    model.rule = SamplingRule()
    PTPTrainer(model, config, model.rule, both[0], tmp_path).train()
    loss = evaluate_windows(model, both[1], config, model.rule).mean_loss
    # A window's three tokens have one unknown bit each for who knows those before it, by u, and else one, two, three.
    bit = np.log(2)
    assert bit < loss < 1.5 * bit


@pytest.mark.parametrize("kind", ["llama", "student"])
def test_a_killed_and_resumed_training_ends_as_an_uninterrupted_one(
    make_model: Callable, tmp_path: Path, kind: str
) -> None:
    whole = make_model(kind)
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(make_model(kind), tmp_path / "parts", Kill(3))
    checkpoint = last_complete_checkpoint(tmp_path / "parts")
    assert checkpoint == str(tmp_path / "parts" / "checkpoint-2")
    # Another start, so that whatever is not restored shows; the base model is no part of a LoRA's checkpoint.
    resumed = make_model(kind, seed=1)
    run(resumed, tmp_path / "parts", resume=checkpoint)
    assert same(weights(resumed), weights(whole))
    assert not same(weights(resumed), weights(make_model(kind)))


@pytest.mark.parametrize("kind", ["llama", "student"])
def test_what_is_right_is_told_by_the_distributions_that_verify_not_by_the_ones_u_was_drawn_under(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 100)
    model = make_model(kind)
    metrics = evaluate_windows(model, documents(), INVERSE, RULE)
    # Under its own intervals a model that knows nothing would be right everywhere.
    assert 0 < max(metrics.accuracy) < 0.5
    assert metrics.num_masked == 0
    if kind == "llama":
        by_teacher = evaluate_windows(model, documents(), CONFIG, RULE)
        assert metrics.accuracy == pytest.approx(by_teacher.accuracy)
        assert metrics.mean_loss != pytest.approx(by_teacher.mean_loss, rel=1e-3)


# Through the stages


def changed(config: ExperimentConfig, model: dict[str, Any], **training: Any) -> ExperimentConfig:
    training = {"objective": "inverse_autoregressive", **training}
    return ExperimentConfig(
        **{
            **dict(config),
            "sampling": RULE,
            "model": PTPConfig(**{**dict(config.model), **OWN, **model}),
            "train": TrainConfig(**{**dict(config.train), **training}),
        }
    )


SCRATCH = {"student": StudentConfig(hidden_size=16, num_layers=1, num_heads=1)}


@pytest.mark.parametrize(
    ("mode", "model"),
    [("fixed", {}), ("fixed", SCRATCH), ("full-chat", {"trained": "all"}), ("full-chat", SCRATCH)],
    ids=str,
)
def test_any_text_trains_an_adapter_or_all_weights_without_a_teacher(
    chat_experiment: Callable[..., ExperimentConfig], tmp_path: Path, mode: str, model: dict[str, Any]
) -> None:
    experiment = distill(tmp_path / "experiment", changed(chat_experiment(tmp_path, mode), model))
    result = train(experiment)
    assert 0 < result.validation_loss < 10
    assert result.config["train"]["objective"] == "inverse_autoregressive"
    if model:
        with pytest.raises(AdapterError, match="train an adapter with model") as caught:
            PTPModel.from_pretrained(experiment.directory)
        assert "\n" not in str(caught.value)
    else:
        verification = verify_experiment(experiment, num_prompts=2, max_new_tokens=12, budget=8)
        assert {comparison.verdict for comparison in verification.comparisons} == {"identical"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.variant=one_hot"], "needs model.variant categorical"),
        (["model.chain=2"], "set model.chain to 0 and model.pick to exact; got 2 and exact"),
        (["model.pick=soft"], "set model.chain to 0 and model.pick to exact; got 0 and soft"),
        (["sampling.top_k=50"], "an interval for every token: set sampling.top_k to 0"),
        (["sampling.top_p=0.9"], "got temperature 0.7, top-k 0, top-p 0.9"),
        (["sampling.temperature=0"], "sampling.temperature above 0; got temperature 0,"),
        (["model.trained=all", "train.distillation=1"], "which training with model.trained=all does not compute"),
        (["model.trained=all", "train.dtype=float16"], "model.trained=all cannot be trained in train.dtype float16"),
        (["model.trained=all", "train.objective=teacher"], "or train without a teacher by train.objective=inverse"),
        (["model.trained=some"], "trained: input should be 'lora' or 'all'; got 'some'"),
        (["train.objective=distillation"], "objective: input should be 'teacher' or 'inverse_autoregressive'; got"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    chat_experiment: Callable[..., ExperimentConfig], tmp_path: Path, overrides: list[str], message: str
) -> None:
    Experiment(tmp_path / "experiment", changed(chat_experiment(tmp_path, "fixed"), {})).write()
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Experiment.load(tmp_path / "experiment", overrides)
    assert "\n" not in str(caught.value)
