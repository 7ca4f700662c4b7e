"""How many tokens does a call yield after how much training? One bench for every idea about the recipe.

    python benchmarks/recipe.py FOLDER                                # the demo's teacher, all arms, three seeds
    python benchmarks/recipe.py FOLDER --teacher stories260K --arms recipe paper
    python benchmarks/recipe.py FOLDER --teacher code-34M --steps 20000 train.batch_size=32

FOLDER/TEACHER is made once and kept: a base model, held-out prompts, completions at temperature 0.7, top-k 50, top-p
0.95. An arm is the recipe with something changed, as dotted settings of `ptp_train` would. It learns from the same
completions for the same number of tokens, with every seed. Then it decodes held-out prompts, at a fixed budget of
positions, under the rule it was trained for, greedily, and at temperature 1 without truncation; τ is verified tokens
per call. Each training is kept in FOLDER/TEACHER/recipe.jsonl and not made again, so a bench that was stopped goes on,
and new arms join the table.

    code          the demo's base model: 0.8 M parameters, functions of the standard library
    code-5M       the same of 5.4 M
    code-34M      the same of the paper's 34M rung, for a GPU
    starter       the base model that comes with the package: 2.6 M parameters, the same functions
    books-34M     the same size, on the English books that the environment variable PTP_ASSETS leads to
    stories260K   the children's stories model there
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine slower still

import argparse
import json
import logging
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ptp.cli.common import STARTER
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.demo import DEMO, Function, demo_config, library_functions, make_teacher
from ptp.evaluation.experiment_report import hardware
from ptp.experiment import Experiment
from ptp.files import append_line, write_atomically
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.scaling import LADDER
from ptp.stages.distill import distill
from ptp.stages.pregenerate import pregenerate
from ptp.stages.train import training_data, validation_prompts
from ptp.training.objective import evaluate_windows

sys.path.insert(0, str(Path(__file__).parent / "paper"))
from mismatched import under_rule
from shared import spread, train

RUNG = LADDER["34M"]
LARGE = replace(DEMO, vocab_size=4096, hidden_size=RUNG.hidden_size, num_layers=RUNG.num_layers, teacher_steps=6000)
TRAINED = {
    "code": DEMO,
    "code-5M": replace(DEMO, vocab_size=1024, hidden_size=256, num_layers=6, teacher_steps=1600),
    "code-34M": LARGE,
    "books-34M": LARGE,
}
"""Base models that are trained here, and their sizes."""

TEACHERS = (*TRAINED, "starter", "stories260K")

COMPARED = {"sampling", "model", "train"}
"""Settings by which a run is told from others."""

TRAINED_FOR = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)
RULES = {"0.7": TRAINED_FOR, "greedy": SamplingRule(temperature=0), "1": SamplingRule()}
"""What decoding is measured under, by what tables call it."""

PAPER = ("model.variant=one_hot", "model.chain=0", "model.anchor=none")
"""Binary embedding, vocabulary order, no anchor, one-hot, cross-entropy, Beta(0.3, 0.3)."""

ARMS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "paper": PAPER,
    "paper, anchor first": (*PAPER, "model.anchor=first"),
    "paper, AdamW at 1e-3": (*PAPER, "train.optimizer=adamw", "train.learning_rate=0.001"),
    "paper, chain": (*PAPER, "model.chain=3"),
    "paper, categorical": (*PAPER, "model.variant=categorical", "model.pick=exact", "train.distillation=0"),
    "paper, categorical, soft pick": (*PAPER, "model.variant=categorical", "train.distillation=0"),
    "no continuation": ("model.continuation=false",),
    "no chain": ("model.chain=0",),
    "chain of 1": ("model.chain=1",),
    "chain of 2": ("model.chain=2",),
    "chain of 4": ("model.chain=4",),
    "chain of half the size": ("model.chain_size=256",),
    "exact pick": ("model.pick=exact",),
    "one-hot": ("model.variant=one_hot",),
    "hard labels alone": ("train.distillation=0",),
    "hard labels and KL": ("train.distillation=0.5",),
    "u withheld": ("model.auxiliary=none",),
    "probability order": ("sampling.order=probability",),
    **{f"{name} embedding": (f"model.auxiliary={name}",) for name in ("linear", "fourier", "sawtooth", "bins")},
    "no anchor": ("model.anchor=none",),
    "anchor to all": ("model.anchor=all",),
    "Beta(1, 1)": ("train.beta=1",),
    "positions weigh 0.8^k": ("train.position_decay=0.8",),
    "windows of 4": ("model.window=4", "train.windows_per_sequence=48"),
    "windows of 16": ("model.window=16", "train.windows_per_sequence=12"),
    "half the windows": ("train.windows_per_sequence=12",),
    "all linear layers, rank 32": ("model.lora_targets=all-linear", "model.lora_rank=32"),
    "rank 16": ("model.lora_rank=16", "model.lora_alpha=16"),
    **{f"Muon at {rate}": (f"train.learning_rate={rate}",) for rate in ("3e-3", "2e-2")},
    **{
        f"AdamW at {rate}": ("train.optimizer=adamw", f"train.learning_rate={rate}")
        for rate in ("1e-4", "1e-3", "3e-3")
    },
}
"""What each changes in the recipe, which is that of `open_bench`."""

SHARES = {"a tenth of the completions": 0.1}
"""Arms that change nothing but how many of the training documents there are."""


@dataclass(frozen=True)
class Run:
    """One training, and what its adapter reached.

    settings: of the training, all of them. correct: drafts right before the first error on held-out windows; survival:
    their acceptance profile. tau: by rule, verified tokens per call. num_wrong: texts that were not those of plain
    decoding. seconds: of the training.
    """

    arm: str
    seed: int
    settings: dict[str, Any]
    correct: float
    survival: list[float]
    tau: dict[str, float]
    num_wrong: int
    seconds: float
    hardware: str


def books(folder: Path) -> list[Function]:
    """Paragraphs of English books, each with its first line for a header."""
    passages = []
    for path in sorted(folder.glob("*.md")):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            lines = paragraph.strip().splitlines()
            if len(lines) > 3:
                passages.append(Function(lines[0], "\n".join(lines)))
    return passages


def make_base_model(directory: Path, teacher: str) -> None:
    """The base model in directory/teacher, and prompts.jsonl beside it."""
    if (directory / "prompts.jsonl").exists() and (directory / "teacher").exists():
        return
    if teacher in TRAINED:
        texts = books(assets() / "corpora" / "classic-books") if teacher == "books-34M" else None
        make_teacher(directory, TRAINED[teacher], functions=texts)
        return
    if teacher == "starter":
        found, prompts = STARTER / "base_model", [function.header for function in library_functions()]
        prompts = list(dict.fromkeys(prompts))[: DEMO.num_prompts]
    else:
        found = assets() / "models" / teacher
        stories = (assets() / "corpora" / "tinystories-valid" / "tinystories_val.txt").read_text(encoding="utf-8")
        prompts = list(dict.fromkeys(" ".join(line.split()[:8]) for line in stories.splitlines() if len(line) > 100))
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(found, directory / "teacher", copy_function=shutil.copyfile)
    lines = [json.dumps({"header": prompt}) + "\n" for prompt in prompts]
    write_atomically(directory / "prompts.jsonl", "".join(lines).encode())


def assets() -> Path:
    """Where real models and texts lie."""
    folder = os.environ.get("PTP_ASSETS")
    if not folder:
        raise SystemExit("this base model needs the environment variable PTP_ASSETS: a folder of models and texts")
    return Path(folder)


def open_bench(folder: Path, teacher: str) -> Experiment:
    """The experiment that all arms share, with its completions; its settings are the recipe."""
    directory = folder / teacher
    make_base_model(directory, teacher)
    if not (directory / "experiment.yaml").exists():
        config = demo_config(DEMO)
        pregenerated = config.pregenerate.model_copy(update={"completions_per_prompt": 4})
        distill(directory, config.model_copy(update={"sampling": TRAINED_FOR, "pregenerate": pregenerated}))
    experiment = Experiment.load(directory)
    pregenerate(experiment)
    return experiment


def changed_by(arm: str, seed: int, experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with an arm's settings."""
    return Experiment.load(experiment.directory, [*ARMS.get(arm, ()), *overrides, f"train.seed={seed}"])


def run_arm(arm: str, seed: int, experiment: Experiment, options: argparse.Namespace) -> Run:
    """Train an arm and measure what it learnt."""
    changed = changed_by(arm, seed, experiment, options.overrides)
    rule, data = changed.config.sampling, training_data(experiment)
    training, validation = data.training, data.validation
    base_model = load_base_model(experiment.base_model, dtype="float32").eval()
    if rule != experiment.config.sampling:
        training, validation = (under_rule(documents, base_model, rule) for documents in (training, validation))
    num_documents = int(SHARES.get(arm, 1.0) * len(training))
    started = time.perf_counter()
    model = train(changed, training.select(np.arange(len(training)) < num_documents))
    seconds = time.perf_counter() - started
    metrics = evaluate_windows(model, validation, changed.config.train.model_copy(update={"seed": 0}), rule)
    metrics.tell(model)
    with TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        model = PTPModel.from_pretrained(adapter, dtype="float32")
    prompts = validation_prompts(experiment, options.num_prompts)
    tau, num_wrong = {}, 0
    for name, asked in RULES.items():
        # Which u gives which token is the order's business; a rule's texts are as likely in any.
        asked = asked.model_copy(update={"order": rule.order})
        tau[name], wrong = decoded(Decoder(model, asked, options.budget), base_model, prompts, options.max_new_tokens)
        num_wrong += wrong
    settings = changed.config.model_dump(mode="json", include=COMPARED)
    return Run(arm, seed, settings, metrics.mean_correct, list(metrics.survival), tau, num_wrong, seconds, hardware())


def decoded(
    decoder: Decoder, base_model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[float, int]:
    """τ over all prompts, and how many texts are not those of plain decoding."""
    num_tokens = num_calls = num_wrong = 0
    for number, prompt in enumerate(prompts):
        request = make_request(base_model, prompt, max_new_tokens, seed=0, sequence=number)
        answer = decoder.answer(request)
        num_tokens, num_calls = num_tokens + len(answer.token_ids), num_calls + answer.num_calls
        num_wrong += answer.token_ids != decode_plainly(base_model, request, decoder.rule)
    return num_tokens / num_calls, num_wrong


def kept_runs(path: Path) -> list[Run]:
    """Those of earlier benches."""
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def table(runs: Sequence[Run]) -> Iterator[list[str]]:
    """A row for each arm, the best first; ratios are of drafted tokens per call, τ − 1, at the rule trained for."""
    by_arm: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_arm[run.arm].append(run)
    trained_for = next(iter(RULES))

    def drafted(arm: str) -> float:
        return statistics.mean(run.tau[trained_for] for run in by_arm[arm]) - 1

    yield ["arm", "seeds", "correct", *(f"τ at {name}" for name in RULES), "drafted, over the paper's", "minutes"]
    for arm in sorted(by_arm, key=drafted, reverse=True):
        own = by_arm[arm]
        yield [
            arm,
            str(len(own)),
            spread([run.correct for run in own]),
            *(spread([run.tau[name] for run in own]) for name in RULES),
            f"{drafted(arm) / drafted('paper'):.2f}" if "paper" in by_arm and drafted("paper") > 0 else "",
            spread([run.seconds / 60 for run in own], ".1f"),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where base models, completions and results are kept")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all arms")
    parser.add_argument("--teacher", default="code", choices=TEACHERS)
    parser.add_argument("--arms", nargs="+", default=[*ARMS, *SHARES], choices=[*ARMS, *SHARES], metavar="ARM")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=12, help="positions of a call (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=24, help="decoded (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Each arm is asked for texts by rules that it was not trained for.
    logging.getLogger("ptp").setLevel(logging.ERROR)
    options.overrides = [f"train.max_steps={options.steps}", *options.overrides]
    experiment = open_bench(options.folder, options.teacher)
    path = experiment.directory / "recipe.jsonl"
    wanted = []
    for seed in range(options.seeds):
        for arm in options.arms:
            settings = changed_by(arm, seed, experiment, options.overrides).config.model_dump(
                mode="json", include=COMPARED
            )
            run = next((kept for kept in kept_runs(path) if (kept.arm, kept.settings) == (arm, settings)), None)
            if run is None:
                run = run_arm(arm, seed, experiment, options)
                append_line(path, json.dumps(asdict(run)))
            tau = ", ".join(f"{value:.2f}" for value in run.tau.values())
            print(f"{arm}, seed {seed}: τ {tau}; trained in {run.seconds:.0f} s", file=sys.stderr, flush=True)
            wanted.append(run)
    shared = Experiment.load(experiment.directory, options.overrides).config.train
    batch, length = shared.batch_size, shared.sequence_length
    print(
        f"{hardware()}; base model {options.teacher}; {options.steps} steps of {batch} sequences of {length} tokens; "
        f"budget {options.budget}, {options.num_prompts} held-out prompts of at most {options.max_new_tokens} new "
        "tokens; in brackets the lowest and the highest of the seeds\n"
    )
    header, *rows = table(wanted)
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    print(f"\ntexts that were not those of plain decoding: {sum(run.num_wrong for run in wanted)}")


if __name__ == "__main__":
    main()
