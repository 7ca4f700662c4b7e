"""What a decoding call costs beside a plain forward call of as many positions, and beside one plainly decoded token.

    python benchmarks/decode_call.py
    python benchmarks/decode_call.py --models demo --dtypes float32 --targets all-linear --positions 20

Two models with random weights: the shape of the demo's teacher, on one thread as it is decoded with, and a Llama of
110 M parameters with 32,000 tokens. For each, a prompt of 128 tokens, an adapter of rank 32, and n positions, of which
a quarter verify. Three bars: a decoding call against `model(...)` of n positions with all their logits, at most 1.25
(demo) and 1.15 (110M); a step, with all that is around its call, against a token of the bare autoregressive loop
(break-even), at most 1.7 at budget 20 in bfloat16; the share of a step that is outside the model, at most 10 %. All of
a row's times are taken in turn, in one run; medians, in brackets the quartiles. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ptp.cache import RollbackCache
from ptp.config import PTPConfig
from ptp.decoding.allocation import Profile
from ptp.decoding.budget import FixedBudget
from ptp.decoding.decoder import Decoder
from ptp.decoding.drafting import Drafter
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.decoding.session import Session
from ptp.demo import DEMO
from ptp.evaluation.experiment_report import hardware
from ptp.model.gated_lora import lora_layers
from ptp.model.loading import cast_parameters
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

CONTEXT = 128
MLP = ("gate_proj", "up_proj", "down_proj")
SHAPES = {
    "demo": LlamaConfig(
        vocab_size=DEMO.vocab_size,
        hidden_size=DEMO.hidden_size,
        num_hidden_layers=DEMO.num_layers,
        num_attention_heads=DEMO.hidden_size // 64,
        intermediate_size=3 * DEMO.hidden_size,
        max_position_embeddings=1024,
    ),
    "110M": LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        num_hidden_layers=8,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=1024,
    ),
}
RULE = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)


@dataclass(frozen=True)
class Row:
    """positions: n of the call, drafts and branches n − 1. call: over a plain call of n positions; break_even: a step
    over a token of the bare loop; outside: share of a step. Each lower quartile, median, upper quartile."""

    model: str
    dtype: str
    targets: str
    positions: int
    call: tuple[float, float, float]
    break_even: tuple[float, float, float]
    outside: float


def made(shape: str, dtype: torch.dtype, targets: str | tuple[str, ...]) -> tuple[PreTrainedModel, PTPModel]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPES[shape]).eval()
    model = PTPModel(deepcopy(base), PTPConfig(lora_rank=32, lora_targets=targets, window=16)).eval()
    for layer in lora_layers(model.base_model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    for module in (base, model):
        cast_parameters(module, dtype)
    return base, model


def spread(values: list[float]) -> tuple[float, float, float]:
    lower, median, upper = statistics.quantiles(values, n=4)
    return lower, median, upper


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class Clocked:
    """The time spent in a function since the last look."""

    def __init__(self, function: Callable) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return result


def measure(shape: str, dtype: torch.dtype, targets: str | tuple[str, ...], sizes: list[int], rounds: int) -> list[Row]:
    base, model = made(shape, dtype, targets)
    decoder = Decoder(model, RULE)
    prompt = torch.randint(DEMO.vocab_size, (CONTEXT,)).tolist()
    request = make_request(base, prompt, 64, seed=0, end_token_ids=[])
    read, head = Clocked(model.read), Clocked(decoder.drafter.logits_of)
    drafter = Drafter(model, head)
    profile = Profile(tuple(0.95**k for k in range(1, model.ptp_config.num_drafts + 1)), model.ptp_config.lead)
    rows = []
    for size in sizes:
        session = Session(model, RULE, drafter, FixedBudget(profile, size - 1))
        model.read = read  # type: ignore[method-assign]

        def step(session: Session = session, size: int = size) -> float:
            text = session.enter(request)
            text.drafts = [0] * min(model.ptp_config.num_drafts, size // 4)
            text.confidences = [0.9] * len(text.drafts)
            read.seconds = head.seconds = 0.0
            seconds = timed(session.step)
            for text in session.texts:
                session.leave(text)
            return seconds

        cache = RollbackCache(model.num_layers, CONTEXT + size)
        with torch.inference_mode():
            base(input_ids=torch.tensor([prompt]), past_key_values=cache)
        ids = torch.randint(DEMO.vocab_size, (1, size))

        @torch.inference_mode()
        def plain_call(cache: RollbackCache = cache, ids: torch.Tensor = ids) -> None:
            cache.rollback(CONTEXT)
            base(input_ids=ids, past_key_values=cache, use_cache=True)

        def plain_token() -> float:
            # The difference of two texts leaves the prompt's call out.
            long, short = (make_request(base, prompt, n, seed=0, end_token_ids=[]) for n in (6, 2))
            return (
                timed(lambda: decode_plainly(base, long, RULE)) - timed(lambda: decode_plainly(base, short, RULE))
            ) / 4

        calls, tokens, outside = [], [], []
        for number in range(rounds + 2):
            plain = timed(plain_call)
            token = plain_token()
            whole = step()
            inside = read.seconds + head.seconds
            if number >= 2:
                calls.append(inside / plain)
                tokens.append(whole / token)
                outside.append(1 - inside / whole)
        name = targets if isinstance(targets, str) else "mlp"
        rows.append(
            Row(
                shape,
                str(dtype).removeprefix("torch."),
                name,
                size,
                spread(calls),
                spread(tokens),
                statistics.median(outside),
            )
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    call, even = (f"{m:5.2f} ({a:.2f}–{b:.2f})" for a, m, b in (row.call, row.break_even))
    return f"{row.model:6} {row.dtype:9} {row.targets:10} {row.positions:4d} {call:>19} {even:>19} {row.outside:8.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--targets", nargs="+", choices=["all-linear", "mlp"], default=["all-linear", "mlp"])
    parser.add_argument("--positions", type=int, nargs="+", default=[8, 16, 20, 24, 40, 60])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    rows: list[Row] = []
    num_threads = torch.get_num_threads()
    print(f"{'model':6} {'dtype':9} {'layers':10} {'n':>4} {'call':>19} {'break-even':>19} {'outside':>8}")
    for shape in arguments.models:
        torch.set_num_threads(1 if shape == "demo" else num_threads)
        for dtype in arguments.dtypes:
            for targets in arguments.targets:
                chosen = MLP if targets == "mlp" else targets
                sizes = [budget + 1 for budget in arguments.positions]
                rows += measure(shape, getattr(torch, dtype), chosen, sizes, arguments.rounds)
    print(json.dumps({"hardware": hardware(), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
