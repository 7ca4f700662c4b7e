"""Training by several processes: what they make together is what one makes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptp.errors import ConfigError
from ptp.experiment import Experiment, ExperimentConfig
from ptp.stages.distill import distill
from ptp.stages.pregenerate import pregenerate
from ptp.stages.train import TrainingResult, read_training_result, train

SETTINGS = (
    *("train.max_steps=12", "train.batch_size=4", "train.log_every=1", "train.save_every=5", "train.warmup_steps=2"),
    *("train.dtype=float32", "train.optimizer=adamw", "train.learning_rate=1e-2"),
)
TOGETHER = (*SETTINGS, "train.batch_size=1", "train.gradient_accumulation_steps=2")

LEFT = "a process left with its connections to others open"

# accelerate shares out weights between GPUs only; between CPUs it works as well, if it is told to.
PROGRAM = f"""
import atexit

import torch
from accelerate.state import AcceleratorState, DistributedType

from ptp.cli.main import main

by_accelerate = AcceleratorState.__init__


def on_cpus_too(self, *args, fsdp_plugin=None, **kwargs):
    by_accelerate(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = on_cpus_too
atexit.register(lambda: torch.distributed.is_initialized() and print("{LEFT}"))
main()
"""


@pytest.fixture(scope="module")
def alone(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Trained by one process; not to be changed."""
    experiment = distill(tmp_path_factory.mktemp("alone") / "experiment", config)
    pregenerate(experiment)
    train(Experiment.load(experiment.directory, SETTINGS))
    return experiment


@pytest.fixture
def sampled(config: ExperimentConfig, alone: Experiment, tmp_path: Path) -> Experiment:
    experiment = distill(tmp_path / "experiment", config)
    experiment.completions.symlink_to(alone.completions)
    return experiment


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")


def start(
    experiment: Experiment,
    *settings: str,
    program: str = PROGRAM,
    launcher: Sequence[str] = (*TORCHRUN, "2", "--standalone"),
) -> subprocess.Popen[str]:
    """Processes that train together; two, unless the launcher says otherwise."""
    path = experiment.directory.parent / "program.py"
    path.write_text(program)
    command = [*launcher, str(path), "train", str(experiment.directory), *settings, "--no-measure"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        # What aborts says where.
        "PYTHONFAULTHANDLER": "1",
    }
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait until all have ended well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    said = "\n\n".join(outputs)
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert LEFT not in said, said


def check_same(experiment: Experiment, alone: Experiment) -> None:
    """The curves and the adapter are those of one process, up to rounding."""
    found, expected = read_training_result(experiment), read_training_result(alone)
    assert curves(found) == {name: pytest.approx(curve, rel=1e-4, abs=1e-4) for name, curve in curves(expected).items()}
    assert found.validation_loss == pytest.approx(expected.validation_loss, rel=1e-4)
    for name in ("adapter_model.safetensors", "auxiliary.safetensors"):
        own, others = load_file(experiment.adapter / name), load_file(alone.adapter / name)
        assert own.keys() == others.keys()
        for key, weight in own.items():
            torch.testing.assert_close(weight, others[key], rtol=1e-3, atol=1e-4)


def curves(result: TrainingResult) -> dict[str, list[float]]:
    """All but how fast it went."""
    return {
        name: [number for point in curve for number in point]
        for name, curve in result.curves.items()
        if name != "tokens_per_second"
    }


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_with_the_same_sequences_in_a_step(
    sampled: Experiment, alone: Experiment, engine: str
) -> None:
    process = start(sampled, *TOGETHER, f"train.fsdp={str(engine == 'fsdp').lower()}")
    finish(process)
    assert len(curves(read_training_result(sampled))["loss"]) == 2 * 12
    check_same(sampled, alone)
    # An adapter, and what goes on from it; never the base model.
    weights = sum(path.stat().st_size for path in sampled.adapter.glob("*.safetensors"))
    for checkpoint in sampled.checkpoints.glob("checkpoint-*"):
        assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 4 * weights + 100_000
    # torch's sharded states, which are read by unpickling.
    assert not list(sampled.checkpoints.rglob(".metadata"))


@pytest.mark.slow
def test_two_processes_learn_by_muon_what_one_does(
    config: ExperimentConfig, sampled: Experiment, alone: Experiment
) -> None:
    """Nearly: it computes in bfloat16, which makes something of the last bits of a sum."""
    one = distill(sampled.directory.parent / "one", config)
    one.completions.symlink_to(alone.completions)
    muon = ("train.optimizer=muon", "train.learning_rate=3e-3")
    train(Experiment.load(one.directory, [*SETTINGS, *muon]))
    process = start(sampled, *TOGETHER, *muon)
    finish(process)
    found, expected = (curves(read_training_result(each))["loss"] for each in (sampled, one))
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_accelerate_launch_starts_them_too(sampled: Experiment, alone: Experiment) -> None:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    process = start(sampled, *TOGETHER, launcher=(accelerate, "launch", "--multi-gpu", "--num-processes", "2"))
    finish(process)
    check_same(sampled, alone)


@pytest.mark.slow
def test_two_machines_train_as_one_does(sampled: Experiment, alone: Experiment) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    machines = [start(sampled, *TOGETHER, launcher=(*TORCHRUN, "1", *meeting)) for _ in range(2)]
    finish(*machines)
    check_same(sampled, alone)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_processes_told_to_end_save_together_and_go_on(sampled: Experiment, alone: Experiment, engine: str) -> None:
    settings = (*TOGETHER, f"train.fsdp={str(engine == 'fsdp').lower()}")
    process = start(sampled, *settings, "train.save_minutes=0.0001")
    state = sampled.checkpoints / "checkpoint-3" / "trainer_state.json"
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    # What torchrun itself says comes behind.
    assert "stopped; what is done is kept" in output.partition("Traceback")[0], output
    assert not sampled.adapter.exists()
    (last, *_) = sorted(sampled.checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2]))
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] < 12
    process = start(sampled, *settings)
    finish(process)
    check_same(sampled, alone)


@pytest.mark.slow
def test_weights_are_not_shared_out_between_cpus_unasked(sampled: Experiment) -> None:
    process = start(
        sampled, "train.fsdp=true", "train.optimizer=adamw", program="from ptp.cli.main import main\nmain()"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: train.fsdp is true, but accelerate does not share out weights" in output
    assert not list(sampled.checkpoints.glob("checkpoint-*"))


def test_one_process_has_no_one_to_share_weights_with_and_says_so(
    sampled: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    short = ("train.max_steps=1", "train.warmup_steps=0", "train.fsdp=true")
    train(Experiment.load(sampled.directory, [*SETTINGS, *short]))
    assert "this is one by itself, which holds them whole; torchrun starts several" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.trained=all", "where all weights train, each process needs them whole: set train.fsdp to false"),
        ("train.optimizer=muon", "got muon: set train.optimizer=adamw train.learning_rate=1e-3"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(sampled: Experiment, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Experiment.load(sampled.directory, ["train.fsdp=true", setting])
