"""Throughput against the number of texts decoded together, for a trained experiment.

    python benchmarks/batches.py experiments/demo

Held-out prompts are answered in batches of 1 to 32 by plain decoding (budget 0), with a fixed budget, and with the
measured one ("auto"), all three in turn for each size, repeated; a text that ends gives its place to the next. Prints
tokens per second, medians and in brackets lowest and highest, then one JSON line. Every text is compared with that of
plain decoding one by one: how many differ is printed, too (rounding, in the wider calls of bfloat16).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.evaluation.experiment_bench import held_out_requests
from ptp.evaluation.experiment_report import decoding_threads, hardware
from ptp.experiment import Experiment
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--budget", type=int, default=12)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.directory)
    rule = experiment.config.sampling
    plain_model = load_base_model(experiment.base_model, arguments.dtype).eval()
    model = PTPModel.from_pretrained(experiment.directory, dtype=arguments.dtype)
    requests = held_out_requests(experiment, plain_model, arguments.num_prompts, arguments.max_new_tokens)
    rows = []
    with decoding_threads(plain_model.num_parameters()):
        expected = [decode_plainly(plain_model, request, rule) for request in requests]
        decoders = {str(budget): Decoder(model, rule, budget) for budget in (0, arguments.budget, "auto")}
        print(f"{'texts':>5}" + "".join(f"{'budget ' + name:>26}" for name in decoders) + f"{'differ':>8}")
        for size in arguments.sizes:
            speeds: dict[str, list[float]] = {name: [] for name in decoders}
            num_different = 0
            for repetition in range(arguments.repetitions + 1):
                for name, decoder in decoders.items():
                    started = time.perf_counter()
                    texts: list[list[int]] = [[] for _ in requests]
                    for number, step in decoder.steps_of(requests, size):
                        texts[number] += step.token_ids
                    seconds = time.perf_counter() - started
                    # The first round warms up.
                    if repetition:
                        speeds[name].append(sum(map(len, texts)) / seconds)
                        num_different += sum(a != b for a, b in zip(texts, expected, strict=True))
            print(
                f"{size:5d}"
                + "".join(
                    f"{statistics.median(v):12.0f} ({min(v):.0f}–{max(v):.0f})".rjust(26) for v in speeds.values()
                )
                + f"{num_different:8d}",
                flush=True,
            )
            rows.append({"texts": size, "tokens_per_second": speeds, "different": num_different})
    print(json.dumps({"hardware": hardware(), "dtype": arguments.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
