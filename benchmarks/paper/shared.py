"""What the paper's experiments in small share: one experiment directory, trained in several ways, measured alike.

    completions ──► training documents ──► an arm's model, with each seed ──► held-out windows ──► table

An arm is what one would type behind `ptp_train DIR`: dotted overrides. It is trained as `ptp_train` trains, but for
checkpoints; all arms are measured on the same held-out windows, u uniform in each token's interval.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine slower still

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import set_seed

from ptp.data.documents import Documents
from ptp.evaluation.experiment_report import hardware
from ptp.experiment import Experiment
from ptp.model.ptp_model import PTPModel
from ptp.stages.train import check_lengths, new_model
from ptp.training.metrics import WindowMetrics
from ptp.training.objective import evaluate_windows
from ptp.training.trainer import PTPTrainer

WINDOWS = ("model.variant=one_hot", "model.pick=exact", "model.chain=0")
"""The paper's: what a position proposes comes out of one call, of u alone."""

FIRST_INDICES = 3
"""Window indices whose accuracy tables show, from the first draft's on."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments all scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="experiment directory, with completions")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, as ptp_train takes them")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each arm (default: %(default)s)")
    return parser


def open_arm(options: argparse.Namespace, *overrides: str, seed: int = 0) -> Experiment:
    """The experiment with an arm's settings on top of the ones given for all."""
    length = (f"train.max_steps={options.steps}", "train.num_epochs=null")
    return Experiment.load(options.directory, [*WINDOWS, *length, *options.overrides, *overrides, f"train.seed={seed}"])


def train(experiment: Experiment, documents: Documents) -> PTPModel:
    """What `ptp_train` makes of the experiment and these documents; the last step's model, not the best."""
    settings = experiment.config.train.model_copy(update={"report_to": ()})
    check_lengths(documents.lengths, settings.sequence_length)
    set_seed(settings.seed)
    model = new_model(experiment)
    model.rule = experiment.config.sampling
    with TemporaryDirectory() as checkpoints:
        PTPTrainer(model, settings, model.rule, documents, Path(checkpoints)).train()
    return model.eval()


def trained_arms(
    options: argparse.Namespace, arms: Mapping[str, Sequence[str]], documents: Documents
) -> Iterator[tuple[str, Experiment, PTPModel]]:
    """Every arm, by name and overrides, with every seed: its name, its experiment and its model."""
    for name, overrides in arms.items():
        for seed in range(options.seeds):
            started = time.perf_counter()
            experiment = open_arm(options, *overrides, seed=seed)
            model = train(experiment, documents)
            print(f"{name}, seed {seed}: trained in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            yield name, experiment, model


def measure(model: PTPModel, documents: Documents, experiment: Experiment) -> WindowMetrics:
    """What windows of held-out documents say of a model; the same windows whatever the seed of its training."""
    settings = experiment.config.train.model_copy(update={"seed": 0})
    return evaluate_windows(model, documents, settings, experiment.config.sampling)


def first_accuracies(metrics: WindowMetrics, experiment: Experiment) -> list[float]:
    """Share of right predictions at the first drafts' window indices, whatever stood before them."""
    lead = experiment.config.model.lead
    return metrics.accuracy[lead : lead + FIRST_INDICES]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The mean of some seeds and, in brackets, the lowest and the highest."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}}–{max(values):{form}})"


def print_results(options: argparse.Namespace, table: Sequence[Sequence[str]], results: Any) -> None:
    """The setting, a markdown table, its first row the header, and one JSON line."""
    experiment = open_arm(options)
    train = experiment.config.train
    print(
        f"{hardware()}; {experiment.config.sampling}; windows of {experiment.config.model.window}, "
        f"{train.max_steps} steps of {train.batch_size} sequences of {train.sequence_length} tokens with "
        f"{train.windows_per_sequence} windows, {train.optimizer} {train.learning_rate:g}; seeds: {options.seeds}, in "
        "brackets the lowest and the highest\n"
    )
    header, *rows = table
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    config = experiment.config.model_dump(mode="json", include={"sampling", "model", "train"})
    print("\n" + json.dumps({"hardware": hardware(), "seeds": options.seeds, "config": config, "results": results}))
