"""A training that is stopped, or runs into something, keeps what it has and goes on as if nothing had happened."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import disk_with_room_for_files_of, files
from torch import Tensor
from trainings import CONFIG, RULE, Kill
from transformers import LlamaForCausalLM, TrainerCallback, TrainerState

from ptp.config import PTPConfig, TrainConfig
from ptp.data.documents import Document, Documents
from ptp.errors import ConfigError, DataError, Terminated
from ptp.model.ptp_model import PTPModel
from ptp.training import saving
from ptp.training import trainer as module
from ptp.training.checkpoints import last_complete_checkpoint
from ptp.training.metrics import WindowMetrics
from ptp.training.trainer import PTPTrainer

TIMED = {"tokens_per_second", "memory_gb"}
SETTINGS = CONFIG.model_copy(
    update={
        **{"max_steps": 11, "save_every": 4, "log_every": 3},
        **{"batch_size": 2, "gradient_accumulation_steps": 2, "sequence_length": 40, "windows_per_sequence": 8},
    }
)
"""Rows of the log lie across checkpoints, and some checkpoints between two of them."""


def promised(metrics: WindowMetrics) -> float:
    """In place of τ: drafts right before the first error."""
    return metrics.mean_correct


def texts(count: int, seed: int) -> Documents:
    """Random tokens, in random intervals."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        length = int(rng.integers(12, 40))
        lower, upper = np.sort(rng.random((2, length - 1), np.float32), axis=0)
        ids = rng.integers(2, 12, length).astype(np.int32)
        documents.append(Document(ids, ((1, length),), lower, upper, number=number))
    return Documents.of(documents)


TRAINING, VALIDATION = texts(24, seed=0), texts(4, seed=1)


class At(TrainerCallback):
    """Does something at an event of the first training step that it comes at, or after."""

    def __init__(self, event: str, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act
        setattr(self, event, self._heed)

    def _heed(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        if state.global_step == self.step:
            self.act()


class Saved(TrainerCallback):
    """Notes the steps that are saved, and the weights that are."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}

    def on_save(self, args: object, state: TrainerState, *_: object, model: PTPModel, **__: object) -> None:
        self.weights[state.global_step] = weights(model)


def saved_by(trainer: PTPTrainer) -> Saved:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Saved))


def weights(model: PTPModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def new_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., PTPModel]:
    def make(seed: int = 0, variant: str = "categorical") -> PTPModel:
        base = tiny_llama(12)
        torch.manual_seed(seed)
        model = PTPModel(base, PTPConfig(variant=variant, window=4, lora_rank=4))
        model.rule = RULE
        return model

    return make


@pytest.fixture
def new_trainer(new_model: Callable[..., PTPModel], tmp_path: Path) -> Callable[..., PTPTrainer]:
    """Makes a trainer, to go on from what is in its directory."""

    def make(
        output: str = "output",
        callbacks: Sequence[TrainerCallback] = (),
        config: TrainConfig = SETTINGS,
        validation: Documents | None = VALIDATION,
        model: PTPModel | None = None,
    ) -> PTPTrainer:
        # Another start than that of what it goes on from, so that whatever is not restored shows.
        resumes = last_complete_checkpoint(tmp_path / output) is not None
        return PTPTrainer(
            model or new_model(seed=int(resumes)),
            config,
            RULE,
            TRAINING,
            tmp_path / output,
            callbacks,
            validation,
            promised,
        )

    return make


def run(trainer: PTPTrainer) -> PTPTrainer:
    """Train, from the last checkpoint if there is one."""
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.output_dir))
    return trainer


def log(trainer: PTPTrainer) -> list[dict[str, float]]:
    """The rows of steps, without what the clock says; the last row is of the run as a whole."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in trainer.state.log_history[:-1]]


def check_same(trainer: PTPTrainer, whole: PTPTrainer) -> None:
    assert torch.equal(weights(trainer.model), weights(whole.model))
    assert log(trainer) == log(whole)
    kept = [last_complete_checkpoint(each.output_dir) for each in (trainer, whole)]
    rows = [json.loads((Path(path) / "trainer_state.json").read_text())["log_history"] for path in kept if path]
    first, second = ([{k: v for k, v in row.items() if k not in TIMED} for row in each] for each in rows)
    assert first == second


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptp.training.objective.EVALUATION_WINDOWS", 60)
        yield


@pytest.fixture(scope="module")
def whole(new_model: Callable[..., PTPModel], tmp_path_factory: pytest.TempPathFactory) -> PTPTrainer:
    """What came of a training that nothing stopped; not to be changed."""
    directory = tmp_path_factory.mktemp("whole")
    return run(PTPTrainer(new_model(), SETTINGS, RULE, TRAINING, directory, (Saved(),), VALIDATION, promised))


@pytest.fixture(autouse=True)
def nobody_else_hears_signals() -> Iterator[None]:
    """A SIGTERM that training does not take for its own fails the test instead of ending all of them."""

    def unheard(*_: object) -> None:
        pytest.fail("SIGTERM was not heard")

    before = signal.signal(signal.SIGTERM, unheard)
    yield
    assert signal.signal(signal.SIGTERM, before) is unheard, "training gives the signal back"


def checkpoints(trainer: PTPTrainer) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in trainer.output_dir.glob("checkpoint-*"))


# Killed


def test_killed_again_and_again_the_log_and_the_weights_are_those_of_an_uninterrupted_run(
    new_trainer: Callable[..., PTPTrainer], whole: PTPTrainer
) -> None:
    # Before the first checkpoint, between log row and checkpoint and the other way round, and at the last step.
    for step in (2, 7, 5, 9, 10, 11):
        with pytest.raises(KeyboardInterrupt):
            run(new_trainer(callbacks=[Kill(step)]))
    check_same(run(new_trainer()), whole)
    assert [row["step"] for row in log(whole) if "loss" in row] == [3, 6, 9]
    assert [row["step"] for row in log(whole) if "eval_loss" in row] == [4, 8, 11]


@pytest.mark.parametrize("left", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_of_a_checkpoint_whose_writing_was_cut_short_nothing_is_left_in_the_way(
    new_trainer: Callable[..., PTPTrainer], whole: PTPTrainer, left: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(new_trainer(callbacks=[Kill(9)]))
    half = new_trainer().output_dir / "checkpoint-9"
    shutil.copytree(half.with_name("checkpoint-8"), half)
    for path in half.iterdir():
        if path.name == left:
            path.write_bytes(path.read_bytes()[:100])
        elif path.name == "trainer_state.json":
            path.unlink()
    there: list[bool] = []
    check_same(run(new_trainer(callbacks=[At("on_train_begin", 8, lambda: there.append(half.exists()))])), whole)
    assert there == [False]


# Told to end


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("on_step_begin", 6, 7),
        # While it evaluates for a checkpoint, which is not given up; the next step is saved too.
        ("on_evaluate", 4, 5),
        ("on_save", 8, 9),
        # When there is no next step any more.
        ("on_evaluate", 11, 11),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_saves_the_step_it_is_at_and_goes_on_from_there(
    new_trainer: Callable[..., PTPTrainer], whole: PTPTrainer, event: str, step: int, saved: int, number: int
) -> None:
    def tell() -> None:
        os.kill(os.getpid(), number)
        if number == signal.SIGTERM:
            # Who presses for it does no harm.
            os.kill(os.getpid(), number)

    trainer = new_trainer(callbacks=[At(event, step, tell)])
    with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt) as caught:
        run(trainer)
    assert number == signal.SIGINT or caught.value.code == 143
    assert trainer.state.global_step == saved
    assert max(checkpoints(trainer)) == saved
    check_same(run(new_trainer()), whole)


def test_a_second_ctrl_c_does_not_wait(new_trainer: Callable[..., PTPTrainer], whole: PTPTrainer) -> None:
    def press_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    trainer, before = new_trainer(callbacks=[At("on_step_begin", 6, press_twice)]), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert max(checkpoints(trainer)) < 6
    assert signal.getsignal(signal.SIGINT) is before
    check_same(run(new_trainer()), whole)


def test_it_saves_when_minutes_have_passed_since_the_last_checkpoint(
    new_trainer: Callable[..., PTPTrainer], whole: PTPTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(TrainerCallback):
        """A step takes a minute."""

        now = 1000.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.now += 60

    clock, saved = Clock(), Saved()
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: clock.now))
    config = SETTINGS.model_copy(update={"save_minutes": 2.5, "save_every": 5})
    trainer = run(new_trainer("timed", [clock, saved], config))
    assert list(saved.weights) == [3, 5, 8, 10, 11]
    assert torch.equal(saved.weights[11], saved_by(whole).weights[11])
    assert [row["step"] for row in log(trainer) if "eval_loss" in row] == [5, 10, 11]


# No number


def spoilt(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """From the second pass of a step on, of two, the loss or its gradient is no number."""
    passes = 0

    def pass_(model: PTPModel, *given: Any) -> tuple[Tensor, Any]:
        nonlocal passes
        total, metrics = measured_pass(model, *given)
        passes += model.training
        if passes >= 2 * step:
            zero = 0 * next(p for p in model.parameters() if p.requires_grad).sum()
            # The root of zero is zero, and rises without bound.
            total = total + (zero.sqrt() if what == "gradient" else zero * torch.nan)
        return total, metrics

    measured_pass = module.measured_pass
    monkeypatch.setattr(module, "measured_pass", pass_)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("step", "kept"), [(2, None), (4, None), (5, 4), (8, 4), (11, 8)])
def test_what_is_no_number_stops_training_and_the_step_is_named(
    new_trainer: Callable[..., PTPTrainer],
    new_model: Callable[..., PTPModel],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    step: int,
    kept: int | None,
) -> None:
    spoilt(monkeypatch, step, what)
    trainer = new_trainer()
    with pytest.raises(ConfigError) as caught:
        run(trainer)
    message = str(caught.value)
    assert message.startswith(f"the {what} is not finite at step {step}: training stopped, ")
    assert "lower train.learning_rate (0.01)" in message
    assert "\n" not in message
    assert max(checkpoints(trainer), default=None) == kept
    if kept is None:
        assert "there is no checkpoint yet" in message
        return
    assert f"checkpoint-{kept} is kept; remove {trainer.output_dir} and" in message
    model = new_model(seed=2)
    model.load_adapter(trainer.output_dir / f"checkpoint-{kept}")
    assert weights(model).isfinite().all()


def test_the_step_of_a_loss_that_is_no_number_is_right_after_a_resumption_too(
    new_trainer: Callable[..., PTPTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(new_trainer(callbacks=[Kill(6)]))
    spoilt(monkeypatch, 3, "loss")
    with pytest.raises(ConfigError, match="not finite at step 7: "):
        run(new_trainer())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_weights_that_a_step_spoilt_are_not_saved(
    new_trainer: Callable[..., PTPTrainer], new_model: Callable[..., PTPModel], value: float
) -> None:
    model = new_model()

    @torch.no_grad()
    def spoil() -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)

    trainer = new_trainer(callbacks=[At("on_step_end", 8, spoil)], model=model)
    with pytest.raises(ConfigError, match=r"the validation loss is not finite at step 8: .*checkpoint-4 is kept"):
        run(trainer)
    assert checkpoints(trainer) == [4]


# A full disk


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full_at", ["adapter_model.safetensors", "optimizer.pt", "metrics.json", "trainer_state.json"])
def test_a_full_disk_is_one_line_and_leaves_no_half_written_checkpoint(
    new_trainer: Callable[..., PTPTrainer], whole: PTPTrainer, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    last = last_complete_checkpoint(whole.output_dir)
    assert last is not None
    sizes = {path.name: path.stat().st_size for path in Path(last).iterdir()}
    # Of files that are larger than those before.
    too_large = full_at in ("adapter_model.safetensors", "optimizer.pt")
    room = disk_with_room_for_files_of(sizes[full_at] - 1)
    refusing = {
        "metrics.json": "ptp.training.trainer.Path.write_text",
        "trainer_state.json": "transformers.TrainerState.save_to_json",
    }

    def fill_disk() -> None:
        if too_large:
            room.__enter__()
        else:
            monkeypatch.setattr(refusing[full_at], refuse)

    trainer = new_trainer(callbacks=[At("on_evaluate", 8, fill_disk)])
    try:
        with pytest.raises(DataError) as caught:
            run(trainer)
    finally:
        if too_large:
            room.__exit__(None, None, None)
    message = str(caught.value)
    assert message.startswith(f"{trainer.output_dir / 'checkpoint-8'} could not be written (")
    assert message.endswith(
        f"; make room and run the same command again: {trainer.output_dir / 'checkpoint-4'} is kept"
    )
    assert "\n" not in message
    assert checkpoints(trainer) == [4]
    monkeypatch.undo()
    check_same(run(new_trainer()), whole)


def test_a_tracker_that_cannot_write_is_one_line_too(new_trainer: Callable[..., PTPTrainer]) -> None:
    trainer = new_trainer(callbacks=[At("on_log", 6, refuse)])
    with pytest.raises(DataError) as caught:
        run(trainer)
    kept = trainer.output_dir / "checkpoint-4"
    assert str(caught.value) == (
        f"training stopped ([Errno 28] No space left on device): {kept} is kept; mend that and run the same command "
        "again"
    )


# Too little memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 4 GB)"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_too_little_memory_is_one_line_that_says_what_to_lower(
    new_trainer: Callable[..., PTPTrainer], error: Exception, event: str
) -> None:
    def fail() -> None:
        raise error

    trainer = new_trainer(callbacks=[At(event, 8, fail)])
    with pytest.raises(ConfigError) as caught:
        run(trainer)
    kept = trainer.output_dir / "checkpoint-4"
    assert str(caught.value) == (
        f"out of memory with 2 sequences of 40 tokens at a time: {kept} is kept; go on with train.batch_size=1 "
        "train.gradient_accumulation_steps=4, which trains the same"
    )


def test_too_little_memory_for_a_checkpoint_is_not_a_full_disk(
    new_trainer: Callable[..., PTPTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ConfigError, match=r"^out of memory with"):
        run(new_trainer())


def test_an_error_of_ours_keeps_its_traceback(new_trainer: Callable[..., PTPTrainer]) -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(new_trainer(callbacks=[At("on_step_begin", 1, fail)]))


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch_size": 8}, "go on with train.batch_size=4 train.gradient_accumulation_steps=4, which trains the same"),
        ({"batch_size": 9}, "go on with train.batch_size=3 train.gradient_accumulation_steps=6, which trains the same"),
        (
            {"batch_size": 7},
            "go on with train.batch_size=1 train.gradient_accumulation_steps=14, which trains the same",
        ),
        ({"batch_size": 1}, "go on with train.gradient_checkpointing=true, which trains the same in more time"),
        (
            {"batch_size": 1, "gradient_checkpointing": True},
            "run it again and set train.windows_per_sequence to 4",
        ),
        (
            {"batch_size": 1, "gradient_checkpointing": True, "windows_per_sequence": 1},
            "run it again and lower train.sequence_length",
        ),
    ],
)
def test_what_is_to_be_lowered_leaves_the_same_training_as_long_as_it_can(
    new_trainer: Callable[..., PTPTrainer], changes: dict[str, Any], advice: str
) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError()

    trainer = new_trainer(callbacks=[At("on_step_begin", 0, fail)], config=SETTINGS.model_copy(update=changes))
    with pytest.raises(ConfigError) as caught:
        run(trainer)
    assert str(caught.value).endswith(f" at a time: there is no checkpoint yet; {advice}")
    numbers = dict(re.findall(r"train\.(batch_size|gradient_accumulation_steps)=(\d+)", advice))
    if numbers:
        assert int(numbers["batch_size"]) * int(numbers["gradient_accumulation_steps"]) == 2 * changes["batch_size"]


# The best


class Spoil(TrainerCallback):
    """Fills what has been learnt with noise, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def on_step_end(self, args: object, state: TrainerState, *_: object, model: PTPModel, **__: object) -> None:
        if state.global_step == self.step:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


BEST = SETTINGS.model_copy(update={"save_every": 2, "max_steps": 10, "learning_rate": 1e-5})


def test_the_best_checkpoint_is_kept_and_is_what_the_model_is_in_the_end(
    new_trainer: Callable[..., PTPTrainer],
) -> None:
    saved = Saved()
    trainer = run(new_trainer(callbacks=[Spoil(5), saved], config=BEST))
    correct = {row["step"]: row["eval_correct"] for row in log(trainer) if "eval_correct" in row}
    best = max(correct, key=lambda step: correct[step])
    assert list(correct) == list(saved.weights) == [2, 4, 6, 8, 10]
    assert best in (2, 4)
    assert checkpoints(trainer) == [best, 10]
    assert torch.equal(weights(trainer.model), saved.weights[best])
    assert not torch.equal(weights(trainer.model), saved.weights[10])


@pytest.mark.parametrize(("killed_at", "moves"), [(7, False), (10, False), (10, True)])
def test_the_best_is_found_again_after_a_resumption_also_where_the_directory_has_moved(
    new_trainer: Callable[..., PTPTrainer], tmp_path: Path, killed_at: int, moves: bool
) -> None:
    whole = run(new_trainer("whole", [Spoil(5)], BEST))
    event = "on_step_end" if killed_at < 10 else "on_train_end"

    def kill() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(new_trainer("parts", [Spoil(5), At(event, killed_at, kill)], BEST))
    if moves:
        (tmp_path / "parts").rename(tmp_path / "moved")
    resumed = run(new_trainer("moved" if moves else "parts", [Spoil(5)], BEST))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert checkpoints(resumed) == checkpoints(whole)


def test_of_checkpoints_that_are_as_good_the_first_is_the_best(
    new_trainer: Callable[..., PTPTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_trainer().measure()
    monkeypatch.setattr(PTPTrainer, "measure", lambda self: first)
    saved = Saved()
    trainer = run(new_trainer(callbacks=[saved]))
    assert checkpoints(trainer) == [4, 11]
    assert torch.equal(weights(trainer.model), saved.weights[4])


def test_without_validation_the_last_checkpoints_are_kept_and_the_last_is_the_model(
    new_trainer: Callable[..., PTPTrainer],
) -> None:
    saved = Saved()
    trainer = run(new_trainer(callbacks=[saved], validation=None))
    assert checkpoints(trainer) == [8, 11]
    assert torch.equal(weights(trainer.model), saved.weights[11])
    assert files(trainer.output_dir / "checkpoint-11")
