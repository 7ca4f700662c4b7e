"""Verify an experiment on its held-out prompts, and gather what its report shows."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
import transformers

from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.decoder import Decoder
from ptp.decoding.threads import decoding_threads
from ptp.evaluation.report import Report, Sample, Speed, pieces
from ptp.evaluation.verify import Verification, verify
from ptp.experiment import FILES, Experiment
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.model.ptp_model import PTPModel
from ptp.stages import Progress, unheard
from ptp.stages.train import read_training_result, validation_prompts
from ptp.training.curves import BY_INDEX, Curve

DECODED = "prompts decoded both ways"


def verify_experiment(
    experiment: Experiment,
    *,
    num_prompts: int,
    max_new_tokens: int,
    budget: int,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress = unheard,
) -> Verification:
    """Decode held-out prompts in parallel and plainly, with the base model loaded anew for the plain side."""
    plain_model = load_base_model(experiment.base_model, dtype).eval()
    model = PTPModel.from_pretrained(experiment.directory, dtype=dtype)
    prompts = validation_prompts(experiment, num_prompts)
    decoder = Decoder(model, experiment.config.sampling, budget)
    comparisons = []
    with decoding_threads(plain_model.num_parameters()):
        # One prompt unmeasured: the first calls of a process pay for what later ones reuse.
        list(verify(decoder, plain_model, prompts[:1], max_new_tokens=8, seed=seed, repetitions=1))
        progress(DECODED, 0, len(prompts))
        for comparison in verify(decoder, plain_model, prompts, max_new_tokens=max_new_tokens, seed=seed):
            comparisons.append(comparison)
            progress(DECODED, len(comparisons), len(prompts))
    return Verification(comparisons)


def make_report(experiment: Experiment, verification: Verification, budget: int) -> Report:
    """Everything the experiment's page shows."""
    config, result = experiment.config, read_training_result(experiment)
    tokenizer = load_tokenizer(experiment.base_model)
    comparisons = verification.comparisons

    def decode(ids: list[int]) -> str:
        return cast(str, tokenizer.decode(ids, skip_special_tokens=True))

    samples = [
        Sample(
            prompt=decode(c.request.prompt_ids),
            pieces=pieces(c.generation, decode),
            tokens_per_call=c.generation.tokens_per_call,
            num_calls=c.generation.num_calls,
            lossless=c.verdict == "identical",
        )
        for c in comparisons
    ]
    settings = {
        name.removesuffix(".yaml"): {key: str(value) for key, value in _flat(result.config, keys)}
        for name, keys in FILES.items()
    }
    settings["decoding"] = {
        "budget": str(budget),
        "prompts": str(len(comparisons)),
        "max_new_tokens": str(max(c.request.max_new_tokens for c in comparisons)),
    }
    return Report(
        title=experiment.directory.name,
        model=config.base_model,
        hardware=hardware(),
        date=datetime.date.today().isoformat(),
        tokens_per_call=verification.tokens_per_call,
        tokens_per_call_simulated=simulated_tokens_per_call(result.profile, budget),
        speedup=verification.speedup,
        overhead=verification.overhead,
        num_prompts=len(comparisons),
        num_mismatches=verification.count("mismatch"),
        num_near_ties=verification.count("near-tie"),
        samples=samples,
        accepted_per_call=[step.num_accepted for c in comparisons for step in c.generation.steps],
        accuracy_by_index=result.accuracy,
        speeds=[
            _speed("plain decoding", verification.tokens_per_second(parallel=False)),
            _speed("PTP", verification.tokens_per_second(parallel=True)),
        ],
        curves=figures(result.curves),
        settings=settings,
    )


FIGURES = {
    "Loss": {"training": "loss", "validation": "eval_loss"},
    "Drafts right before the first error": {"training": "correct", "validation": "eval_correct"},
    "Simulated tokens per call": {"training": "tokens_per_call", "validation": "eval_tokens_per_call"},
    "Tokens per second": {"training": "tokens_per_second"},
}
"""Names of the curves that are drawn together, by their figure's title and what they are called there."""


def figures(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The curves of a training by figure and line (see `Report`)."""
    accuracies = {f"index {name.removeprefix(BY_INDEX)}": name for name in curves if name.startswith(BY_INDEX)}
    lines_of = FIGURES | {"Accuracy by window index": accuracies}
    return {
        title: {line: curves[name] for line, name in names.items() if name in curves}
        for title, names in lines_of.items()
    }


def hardware() -> str:
    """The processor or accelerator and the library versions, in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {os.cpu_count()} cores"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _speed(name: str, values: list[float]) -> Speed:
    if len(values) < 2:
        return Speed(name, values[0], (values[0], values[0]))
    lower, median, upper = statistics.quantiles(values, n=4)
    return Speed(name, median, (lower, upper))


def _flat(values: dict[str, object], keys: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    for key in keys:
        value = values[key]
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", content) for inner, content in value.items())
        else:
            yield key, value
