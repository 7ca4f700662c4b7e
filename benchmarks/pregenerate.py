"""Useful tokens per second of the teacher against `model.generate`, the same model, prompts, rule and end tokens.

    python benchmarks/pregenerate.py
    python benchmarks/pregenerate.py --model experiments/demo/teacher --prompts experiments/demo/prompts.jsonl

(a) `sample_completions` with 8 completions of a prompt, against (b) `model.generate` one prompt at a time with 8
returned sequences; (d) `sample_completions` with one completion of a prompt, against (c) `model.generate` on batches
of 32 different prompts, padded on the left. Useful are the tokens of a completion up to its first end token. The four
take turns in one process, on one thread. Prints medians with the lowest and highest of the repetitions, the ratios
a/b and d/c, and one JSON line.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine slower still

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptp.data.teacher import Prompt, find_batch_size, sample_completions
from ptp.evaluation.experiment_report import hardware
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.model.ptp_model import end_token_ids
from ptp.sampling import SamplingRule

ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[2] / "shared/assets"))
RULE = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)
COMPLETIONS_PER_PROMPT = 8
GENERATE_BATCH = 32
BEGINNING = (4, 40)
"""Tokens of a text's beginning that make a prompt: each from this range."""

Ids = list[int]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, column: str, num_prompts: int) -> list[Ids]:
    """A column of a .jsonl file as it is; of any other text file, a random beginning of each paragraph."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        texts = [json.loads(line)[column] for line in text.splitlines()[:num_prompts]]
        return [tokenizer(text)["input_ids"] for text in texts]
    rng = random.Random(0)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if len(paragraph) > 4 * BEGINNING[1]]
    return [tokenizer(text)["input_ids"][: rng.randint(*BEGINNING)] for text in paragraphs[:num_prompts]]


def useful(completion: Sequence[int], ends: Sequence[int]) -> int:
    """Tokens up to and including the first end token."""
    return next((i + 1 for i, token in enumerate(completion) if token in ends), len(completion))


class Contest:
    """Four ways to complete prompts; each returns its useful tokens and the seconds it took."""

    def __init__(self, model: PreTrainedModel, prompts: list[Ids], max_new_tokens: int, batch_size: int) -> None:
        self.model, self.prompts, self.max_new_tokens, self.batch_size = model, prompts, max_new_tokens, batch_size
        self.ends = end_token_ids(model)

    def ways(self) -> dict[str, Callable[[int], tuple[int, float]]]:
        few = self.prompts[: max(1, len(self.prompts) // COMPLETIONS_PER_PROMPT)]
        return {
            "a": lambda seed: self.teacher(few, COMPLETIONS_PER_PROMPT, seed),
            "b": lambda seed: self.generate([[ids] for ids in few], COMPLETIONS_PER_PROMPT, seed),
            "c": lambda seed: self.generate(self.mixed_batches(), 1, seed),
            "d": lambda seed: self.teacher(self.prompts, 1, seed),
        }

    def mixed_batches(self) -> list[list[Ids]]:
        return [self.prompts[start : start + GENERATE_BATCH] for start in range(0, len(self.prompts), GENERATE_BATCH)]

    def teacher(self, prompts: list[Ids], completions: int, seed: int) -> tuple[int, float]:
        wanted = [
            Prompt(np.array(ids, np.int32), range(place * completions, (place + 1) * completions))
            for place, ids in enumerate(prompts)
        ]
        start = time.perf_counter()
        documents = sample_completions(
            self.model,
            wanted,
            RULE,
            seed=seed,
            max_length=max(map(len, prompts)) + self.max_new_tokens,
            max_new_tokens=self.max_new_tokens,
            end_token_ids=self.ends,
            batch_size=self.batch_size,
        )
        seconds = time.perf_counter() - start
        return sum(useful(document.ids[document.prompt_length :], self.ends) for document in documents), seconds

    def generate(self, batches: list[list[Ids]], completions: int, seed: int) -> tuple[int, float]:
        torch.manual_seed(seed)
        written: list[Tensor] = []
        start = time.perf_counter()
        for batch in batches:
            width = max(map(len, batch))
            pad = self.ends[0] if self.ends else 0
            inputs = torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=self.model.device)
            visible = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]).to(inputs)
            outputs = self.model.generate(
                inputs,
                attention_mask=visible,
                do_sample=True,
                temperature=RULE.temperature,
                top_k=RULE.top_k,
                top_p=RULE.top_p,
                max_new_tokens=self.max_new_tokens,
                num_return_sequences=completions,
                eos_token_id=self.ends or None,
                pad_token_id=pad,
            )
            written.append(outputs[:, width:].cpu())
        seconds = time.perf_counter() - start
        return sum(useful(row, self.ends) for rows in written for row in rows.tolist()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ASSETS / "models/stories260K", help="model directory with its tokenizer")
    parser.add_argument(
        "--prompts", type=Path, default=ASSETS / "corpora/tinystories-valid/tinystories_val.txt", help=".txt or .jsonl"
    )
    parser.add_argument("--column", default="header", help="column of a .jsonl file")
    parser.add_argument("--num-prompts", type=int, default=512, help="for c and d; a and b take an eighth of them")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, help="of a and d; found from free memory, at most 256, if not given")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for option, path in (("--model", Path(arguments.model)), ("--prompts", arguments.prompts)):
        if not path.exists():
            parser.error(f"{path} does not exist; pass a path with {option}, or the assets' folder in PTP_ASSETS")

    torch.set_num_threads(1)
    model = load_base_model(str(arguments.model)).to(arguments.device).eval()
    prompts = read_prompts(
        arguments.prompts, load_tokenizer(str(arguments.model)), arguments.column, arguments.num_prompts
    )
    max_length = max(map(len, prompts)) + arguments.max_new_tokens
    batch_size = arguments.batch_size or find_batch_size(model, max_length, limit=256)
    for warm_up in Contest(model, prompts[:GENERATE_BATCH], 8, batch_size).ways().values():
        warm_up(0)

    names = {
        "a": f"teacher, {COMPLETIONS_PER_PROMPT} completions of a prompt",
        "b": f"generate, a prompt at a time, {COMPLETIONS_PER_PROMPT} sequences",
        "c": f"generate, mixed batches of {GENERATE_BATCH}",
        "d": "teacher, a completion of a prompt",
    }
    ways = Contest(model, prompts, arguments.max_new_tokens, batch_size).ways()
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = dict.fromkeys(ways, 0)
    for repetition in range(arguments.repetitions):
        for name, way in ways.items():
            tokens[name], seconds = way(repetition + 1)
            speeds[name].append(tokens[name] / seconds)
    ratios = {
        f"{ours}/{theirs}": [mine / other for mine, other in zip(speeds[ours], speeds[theirs], strict=True)]
        for ours, theirs in (("a", "b"), ("d", "c"))
    }

    print(f"{'':44} {'tokens/s':>9} {'lowest–highest':>17} {'tokens':>8}")
    for name, values in speeds.items():
        spread = f"{min(values):.0f}–{max(values):.0f}"
        print(f"{name} {names[name]:42} {statistics.median(values):9.0f} {spread:>17} {tokens[name]:8d}")
    for name, values in ratios.items():
        spread = f"{min(values):.2f}–{max(values):.2f}"
        print(f"{name:44} {statistics.median(values):8.2f}x {spread:>17}")
    report = {
        "hardware": hardware(),
        "device": arguments.device,
        "model": str(arguments.model),
        "num_prompts": len(prompts),
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": batch_size,
        "tokens_per_second": speeds,
        "ratios": ratios,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
