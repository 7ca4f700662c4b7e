"""What a training step costs, beside a plain PEFT LoRA step of the same model on the same ids.

    python benchmarks/train_step.py

The model is a random Llama of the paper's 34M shape with 32,000 tokens; both steps are forward, backward and AdamW on a
LoRA of the same rank and layers: `transformers`' own model and loss behind PEFT, and a PTP step with stored intervals.
Times are taken in turn in one process; peaks of resident memory each in a process of its own, less what it takes to
load the model. Beside the ratio of times stands the one that counting the multiplications of linear layers, head
and attention gives. Four sizes show how a step grows with the number of window positions. One JSON line at the end.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine slower still

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ptp.config import PTPConfig, TrainConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.evaluation.experiment_report import hardware
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.scaling import LADDER
from ptp.training.trainer import make_stream, training_loss

VOCABULARY, RANK, WINDOW = 32_000, 32, 16
RULE = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)

Step = Callable[[], None]


def make_model(size: str, sequence_length: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of a rung of the paper's ladder."""
    torch.manual_seed(0)
    shape = LADDER[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=sequence_length,
    )
    return LlamaForCausalLM(config).to(dtype)


def lora_step(model: PreTrainedModel, batch: int, sequence_length: int) -> Step:
    """A step of plain LoRA, as PEFT and transformers do it."""
    lora = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(VOCABULARY, (batch, sequence_length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        lora(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ptp_step(model: PreTrainedModel, batch: int, sequence_length: int, num_positions: int) -> Step:
    """A step of PTP on windows of so many positions in all, with stored intervals."""
    ptp = PTPModel(model, PTPConfig(lora_rank=RANK, window=WINDOW))
    ptp.rule = RULE
    optimizer = torch.optim.AdamW([p for p in ptp.parameters() if p.requires_grad], lr=1e-4)
    config = TrainConfig(sequence_length=sequence_length, windows_per_sequence=num_positions // WINDOW)
    inputs = collate([make_stream(documents(batch, sequence_length), config, WINDOW)[i] for i in range(batch)])
    weights = torch.ones(WINDOW)

    def step() -> None:
        training_loss(ptp, inputs, RULE, weights, 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def documents(count: int, length: int) -> Documents:
    """Texts of random tokens with random intervals, each as long as a sequence."""
    draw = np.random.default_rng(0)
    edges = np.sort(draw.random((count, 2, length - 1), np.float32), axis=1)
    return Documents.of(
        [
            Document(
                draw.integers(VOCABULARY, size=length).astype(np.int32), ((1, length),), lower, upper, number=number
            )
            for number, (lower, upper) in enumerate(edges)
        ]
    )


def multiplications(size: str, sequence_length: int, num_positions: int) -> float:
    """Those of a PTP step over those of a LoRA step.

    A pass forward multiplies with every linear layer once, and so does one backward, since frozen weights take no
    gradient of their own. The context goes forward only and has no head; keys are counted as far as masks let them be
    seen, half of a causal square.
    """
    shape = LADDER[size]
    layers = shape.num_layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size)
    head = shape.hidden_size * VOCABULARY
    # Scores and sums: two products of hidden size for each key.
    attention = 2 * shape.num_layers * shape.hidden_size
    context = sequence_length * (layers + attention * sequence_length / 2)
    windows = num_positions * (layers + head + attention * (sequence_length / 2 + WINDOW / 2))
    lora = sequence_length * (layers + head + attention * sequence_length / 2)
    # Backward, attention has four products instead of two.
    extra = attention * sequence_length / 2
    return (context + 2 * windows + num_positions * extra) / (2 * lora + sequence_length * extra)


def measure_peak(kind: str, size: str, batch: int, sequence_length: int, dtype: torch.dtype, results: object) -> None:
    """Two steps in this process; puts the growth of the peak over the loaded model, in MB."""
    model = make_model(size, sequence_length, dtype)
    model(input_ids=torch.zeros(1, 8, dtype=torch.int64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = (
        lora_step(model, batch, sequence_length)
        if kind == "lora"
        else ptp_step(model, batch, sequence_length, sequence_length)
    )
    step()
    step()
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)  # type: ignore[attr-defined]


def timed(steps: dict[str, Step], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn, after one of each unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="34M", choices=LADDER)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    size, batch, length, dtype = options.size, options.batch, options.sequence_length, getattr(torch, options.dtype)

    steps = {"lora": lora_step(make_model(size, length, dtype), batch, length)}
    counts = [length // 4, length // 2, length, 2 * length]
    for count in counts:
        steps[f"ptp {count}"] = ptp_step(make_model(size, length, dtype), batch, length, count)
    seconds = timed(steps, options.repetitions)
    lora = seconds["lora"]

    peaks = {}
    context = multiprocessing.get_context("spawn")
    for kind in ("lora", "ptp"):
        queue = context.Queue()
        process = context.Process(target=measure_peak, args=(kind, size, batch, length, dtype, queue))
        process.start()
        peaks[kind] = queue.get()
        process.join()

    print(f"{hardware()}; {size}, {options.dtype}, {batch} sequences of {length}, {torch.get_num_threads()} threads")
    print(
        f"LoRA step {statistics.median(lora):.2f} s ({min(lora):.2f} to {max(lora):.2f}), peak +{peaks['lora']:.0f} MB"
    )
    result: dict[str, object] = {"peak_mb": peaks, "lora_seconds": lora}
    for count in counts:
        ratios = [ptp / plain for ptp, plain in zip(seconds[f"ptp {count}"], lora, strict=True)]
        floor = multiplications(size, length, count)
        result[str(count)] = {"ratios": ratios, "floor": floor}
        print(
            f"PTP step, {count:5} window positions: {statistics.median(ratios):.2f} x LoRA "
            f"({min(ratios):.2f} to {max(ratios):.2f}); multiplications {floor:.2f} x"
        )
    # Steps so small that they need no more than loading did show nothing.
    print(f"peak memory of a PTP step of {length} positions: {peaks['ptp'] / max(peaks['lora'], 1):.2f} x LoRA")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
