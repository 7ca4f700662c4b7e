"""Tokens per call and speed against the budget, for a trained experiment.

    python benchmarks/budget.py experiments/demo --budgets 0 4 8 12 16 24 40

For every budget: τ, the wall-clock speed-up over a bare autoregressive loop of the same model, dtype and sampling
rule (mean over held-out prompts, median of interleaved repetitions), and the break-even, the time of a call over the
time of one plainly decoded token: drafting pays where τ is larger. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics

from ptp.evaluation.experiment_report import hardware, verify_experiment
from ptp.evaluation.verify import Verification
from ptp.experiment import Experiment


def break_even(verification: Verification) -> float:
    """Median over prompts of (seconds per call) / (seconds per plainly decoded token)."""
    ratios = []
    for comparison in verification.comparisons:
        plain, parallel = (statistics.median(times) for times in zip(*comparison.seconds, strict=True))
        ratios.append((parallel / comparison.generation.num_calls) / (plain / len(comparison.plain_ids)))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 4, 8, 12, 16, 24, 40])
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.directory)
    rows = []
    print(f"{'budget':>6} {'tau':>6} {'speed-up':>9} {'quartiles':>13} {'break-even':>10} {'mismatches':>10}")
    for budget in arguments.budgets:
        verification = verify_experiment(
            experiment,
            num_prompts=arguments.num_prompts,
            max_new_tokens=arguments.max_new_tokens,
            budget=budget,
            dtype=arguments.dtype,
        )
        speedups = [comparison.speedup for comparison in verification.comparisons]
        lower, _, upper = statistics.quantiles(speedups, n=4)
        row = {
            "budget": budget,
            "tokens_per_call": verification.tokens_per_call,
            "speedup": verification.speedup,
            "speedup_quartiles": [lower, upper],
            "break_even": break_even(verification),
            "mismatches": verification.count("mismatch"),
        }
        rows.append(row)
        print(
            f"{budget:6d} {row['tokens_per_call']:6.2f} {row['speedup']:8.2f}x {lower:6.2f}–{upper:5.2f} "
            f"{row['break_even']:10.2f} {row['mismatches']:10d}",
            flush=True,
        )
    print(json.dumps({"hardware": hardware(), "dtype": arguments.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
