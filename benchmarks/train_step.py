"""What a training step costs: beside a plain LoRA step on a CPU, beside the machine's own limit on a GPU.

    python benchmarks/train_step.py                              # the ratio to plain LoRA
    python benchmarks/train_step.py --device cuda                # tokens per second, for three sizes
    python benchmarks/train_step.py --device cuda --size 7B      # the same for one; does it fit?

The models are random Llamas of the paper's shapes, or of Llama-2-7B's, with 32,000 tokens and a LoRA on all linear
layers; the base model's intervals are stored, and a step is forward, backward and AdamW.

On a CPU the other step is `transformers`' own model and loss behind PEFT, of the same rank on the same ids. Times are
taken in turn in one process; peaks of resident memory each in a process of its own, less what it takes to load the
model. Beside the ratio of times stands the one that counting multiplications gives. Four sizes show how a step grows
with the number of window positions.

On a GPU (or with --throughput) the step attends by flex attention there, and the count is set against the largest
product of matrices' own speed. 7B keeps little for the backward pass (gradient checkpointing); what it computes a
second time is not counted. One JSON line at the end.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine slower still

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptp.attention import use_flex_attention
from ptp.config import PTPConfig, TrainConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.evaluation.experiment_report import hardware
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.scaling import LADDER
from ptp.training.objective import Objective, make_stream, measured_pass

VOCABULARY, WINDOW = 32_000, 16
RULE = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)
MATRIX = {"cuda": 8192, "cpu": 1024}
"""Rows of the square matrices whose product measures the peak."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Setup:
    """A model's shape, and the step it makes.

    length: context tokens of a sequence; num_positions: window positions of one, N·L.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    batch: int
    length: int
    num_positions: int
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Throughput:
    """What a step did in a second.

    peak_share: multiplications over those that a large product of matrices makes. peak_memory: GB, of device_memory.
    """

    seconds: list[float]
    context_tokens: float
    window_positions: float
    peak_share: float
    peak_memory: float | None
    device_memory: float | None


def make_model(setup: Setup) -> PreTrainedModel:
    """A random Llama, made on the device in its own dtype."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setup.hidden_size,
        intermediate_size=setup.intermediate_size,
        num_hidden_layers=setup.num_layers,
        num_attention_heads=setup.num_heads,
        max_position_embeddings=setup.length,
    )
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(config, dtype=setup.dtype)


def lora_step(model: PreTrainedModel, setup: Setup) -> Step:
    """A step of plain LoRA, as PEFT and transformers do it."""
    lora = get_peft_model(
        model, LoraConfig(r=setup.rank, lora_alpha=setup.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-4)
    ids = ptp_batch(setup)["ids"]

    def step() -> None:
        lora(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ptp_step(model: PreTrainedModel, setup: Setup) -> Step:
    """A step of PTP with stored intervals, as the Trainer of `ptp.training` makes it."""
    config = PTPConfig(lora_rank=setup.rank, lora_alpha=setup.rank, window=WINDOW)
    ptp = PTPModel(model, config).train()
    ptp.rule, ptp.gradient_checkpointing = RULE, setup.gradient_checkpointing
    if setup.device == "cuda":
        use_flex_attention(ptp.base_model)
    optimizer = torch.optim.AdamW([p for p in ptp.parameters() if p.requires_grad], lr=1e-4)
    inputs = ptp_batch(setup)
    objective = Objective(RULE, torch.ones(WINDOW, device=setup.device), TrainConfig().kl_share(config))
    num_targets = objective.num_items(inputs, ptp)

    def step() -> None:
        (measured_pass(ptp, inputs, objective)[0] / num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ptp_batch(setup: Setup) -> dict[str, torch.Tensor]:
    """Texts of random tokens with random intervals, each as long as a sequence."""
    draw = np.random.default_rng(0)
    documents = []
    for number in range(setup.batch):
        lower, upper = np.sort(draw.random((2, setup.length - 1), np.float32), axis=0)
        ids = draw.integers(VOCABULARY, size=setup.length).astype(np.int32)
        documents.append(Document(ids, ((1, setup.length),), lower, upper, number=number))
    config = TrainConfig(sequence_length=setup.length, windows_per_sequence=setup.num_positions // WINDOW)
    stream = make_stream(Documents.of(documents), config, WINDOW)
    return {name: field.to(setup.device) for name, field in collate([stream[i] for i in range(setup.batch)]).items()}


def lora_multiplications(setup: Setup) -> float:
    """Those of a plain LoRA step, for one sequence.

    Forward, a token is multiplied with every linear layer, with LoRA's two matrices beside it and with the head; and
    with as many keys as the mask lets it see, half of a causal square, once for scores and once for sums. Backward,
    frozen weights give gradients of their inputs only, LoRA's also of themselves, and attention's two products become
    four. Nothing below the first layer learns, so what enters its queries, keys and values needs no gradient.
    """
    layers, adapters, head, key = _per_token(setup)
    keys = key * setup.length / 2
    unneeded = 3 * setup.hidden_size * (setup.hidden_size + setup.rank)
    return setup.length * (2 * (layers + head) + 3 * (adapters + keys) - unneeded)


def ptp_multiplications(setup: Setup) -> float:
    """Those of a PTP step with stored intervals, for one sequence.

    The context goes forward only, without LoRA and head. Windows go both ways; the embedding of u, below the first
    layer, learns. Of each window position's draft and of the one without a position, chain and head go both ways; the
    chain reads the tokens before them once. The teacher's head goes forward, once for both.
    """
    layers, adapters, head, key = _per_token(setup)
    config = PTPConfig()
    keys = key * setup.length / 2
    own = key * WINDOW / 2
    chain = setup.hidden_size * config.chain_size * (2 * config.num_kinds + config.chain)
    heads = (2 * config.num_kinds + 1) * head
    window = 2 * layers + heads + 3 * (adapters + keys + own + chain)
    return setup.length * (layers + keys) + setup.num_positions * window


def _per_token(setup: Setup) -> tuple[float, float, float, float]:
    """Multiplications of a token with the linear layers, with their LoRA, with the head, and for each key it sees."""
    hidden, intermediate = setup.hidden_size, setup.intermediate_size
    return (
        setup.num_layers * (4 * hidden**2 + 3 * hidden * intermediate),
        setup.num_layers * setup.rank * (4 * 2 * hidden + 3 * (hidden + intermediate)),
        hidden * VOCABULARY,
        setup.num_layers * 2 * hidden,
    )


def measure_peak(kind: str, setup: Setup) -> float:
    """Two steps in this process; the growth of its peak over what the loaded model takes, in MB."""
    model = make_model(setup)
    model(input_ids=torch.zeros(1, 8, dtype=torch.int64))
    before = psutil.Process().memory_info().rss
    step = {"lora": lora_step, "ptp": ptp_step}[kind](model, setup)
    step()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / 1e6


def peak_of(kind: str, setup: Setup) -> float:
    """`measure_peak` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_peak, kind, setup).result()


def timed(steps: dict[str, Step], repetitions: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step, taken in turn, after one of each unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            started = _now(device)
            step()
            elapsed = _now(device) - started
            if repetition:
                seconds[name].append(elapsed)
    return seconds


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(setup: Setup, peaks: dict[str, float], repetitions: int) -> dict[str, object]:
    """Times of PTP steps over those of a plain LoRA step, for four numbers of window positions.

    peaks: megabytes of a step of each kind, with as many window positions as context tokens.
    """
    steps = {"lora": lora_step(make_model(setup), setup)}
    length = setup.length
    setups = {count: replace(setup, num_positions=count) for count in (length // 4, length // 2, length, 2 * length)}
    for count, sized in setups.items():
        steps[f"ptp {count}"] = ptp_step(make_model(sized), sized)
    seconds = timed(steps, repetitions)
    lora = seconds["lora"]
    print(
        f"LoRA step {statistics.median(lora):.2f} s ({min(lora):.2f} to {max(lora):.2f}), peak +{peaks['lora']:.0f} MB"
    )
    result: dict[str, object] = {"peak_mb": peaks, "lora_seconds": lora}
    for count, sized in setups.items():
        ratios = [ptp / plain for ptp, plain in zip(seconds[f"ptp {count}"], lora, strict=True)]
        floor = ptp_multiplications(sized) / lora_multiplications(sized)
        result[str(count)] = {"ratios": ratios, "floor": floor}
        print(
            f"PTP step, {count:5} window positions: {statistics.median(ratios):.2f} x LoRA "
            f"({min(ratios):.2f} to {max(ratios):.2f}); multiplications {floor:.2f} x"
        )
    print(f"peak memory of a PTP step of {length} positions: {peaks['ptp'] / peaks['lora']:.2f} x LoRA")
    return result


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Multiplications per second in a product of large square matrices, the best of a few."""
    size = MATRIX[device]
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    best = min(timed({"product": lambda: torch.mm(left, right)}, 20, device)["product"])
    return size**3 / best


def throughput(setup: Setup, repetitions: int, peak: float) -> Throughput:
    """Steps of PTP alone, on any device. peak: of `matrix_peak`."""
    on_gpu = setup.device == "cuda"
    if on_gpu:
        # What the size before took, and was compiled for, is no concern of this one.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
    seconds = timed({"ptp": ptp_step(make_model(setup), setup)}, repetitions, setup.device)["ptp"]
    a_step = statistics.median(seconds)
    return Throughput(
        seconds=seconds,
        context_tokens=setup.batch * setup.length / a_step,
        window_positions=setup.batch * setup.num_positions / a_step,
        peak_share=setup.batch * ptp_multiplications(setup) / a_step / peak,
        peak_memory=torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        device_memory=torch.cuda.get_device_properties().total_memory / 1e9 if on_gpu else None,
    )


def print_throughput(name: str, setup: Setup, found: Throughput) -> None:
    memory = "" if found.peak_memory is None else f", peak {found.peak_memory:.1f} of {found.device_memory:.0f} GB"
    print(
        f"{name:>5}, rank {setup.rank}, {setup.batch} x ({setup.length} context tokens + {setup.num_positions} window "
        f"positions): {statistics.median(found.seconds):.3f} s, {found.context_tokens:,.0f} context tokens and "
        f"{found.window_positions:,.0f} window positions per second, {found.peak_share:.0%} of the matrix peak{memory}"
    )


def setup_of(name: str, options: argparse.Namespace) -> Setup:
    """The shape of that name, and the step for it."""
    work = {
        "batch": options.batch,
        "length": options.sequence_length,
        "num_positions": options.positions or options.sequence_length,
        "dtype": getattr(torch, options.dtype),
        "device": options.device,
    }
    if name == "7B":
        return Setup(4096, 11008, 32, 32, **{**work, "batch": 1}, rank=128, gradient_checkpointing=True)
    shape = LADDER[name]
    return Setup(shape.hidden_size, shape.intermediate_size, shape.num_layers, shape.num_heads, **work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=[*LADDER, "7B"], help="may be given again [34M; GPU: four]")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--throughput", action="store_true", help="on a CPU too")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (of 7B: 1)")
    parser.add_argument("--sequence-length", type=int, help="[512; GPU: 2048]")
    parser.add_argument("--positions", type=int, help="window positions of a sequence [its length; CPU: four numbers]")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.sequence_length = options.sequence_length or (2048 if on_gpu else 512)
    sizes = options.size or (["34M", "268M", "1.1B", "7B"] if on_gpu else ["34M"])

    print(f"{hardware()}; {options.dtype}, {torch.get_num_threads()} threads")
    results: dict[str, object] = {}
    peak = matrix_peak(options.device, getattr(torch, options.dtype)) if on_gpu or options.throughput else None
    if peak is not None:
        print(f"matrix peak: {2 * peak / 1e12:.2f} TFLOP/s")
        results["matrix_tflops"] = 2 * peak / 1e12
    setups = {name: setup_of(name, options) for name in sizes}
    # First, because a process inherits the peak of the one that starts it.
    peaks = {} if peak else {name: {kind: peak_of(kind, setups[name]) for kind in ("lora", "ptp")} for name in sizes}
    for name, setup in setups.items():
        if peak is None:
            print(f"{name}, {setup.batch} sequences of {setup.length}")
            results[name] = compare(setup, peaks[name], options.repetitions)
        else:
            found = throughput(setup, options.repetitions, peak)
            print_throughput(name, setup, found)
            results[name] = asdict(found)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
