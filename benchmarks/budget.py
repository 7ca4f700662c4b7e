"""Tokens per call and speed against the budget, for a trained experiment.

    python benchmarks/budget.py experiments/demo --budgets 0 4 8 12 16 24 40 auto

For every budget: τ, the wall-clock speed-up over a bare autoregressive loop of the same model, dtype and sampling rule
(as `ptp bench` defines it, with its quartiles over held-out prompts), and the break-even, the time of a call over the
time of one plainly decoded token: drafting pays where τ is larger. All budgets take turns on every prompt. Prints a
table, then one JSON line. With --compile every call is a compiled one, on a GPU a CUDA graph, those of the loop too.
"""

from __future__ import annotations

import argparse
import json

from ptp.decoding.decoder import Decoder
from ptp.evaluation.bench import OVERALL, Round, figures, take_turns
from ptp.evaluation.experiment_bench import HELD_OUT, held_out_requests
from ptp.evaluation.experiment_report import decoding_threads, hardware
from ptp.evaluation.methods import PLAIN, Method, by_decoder, by_plain_loop
from ptp.evaluation.verify import compare
from ptp.experiment import Experiment
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel


def budget_of(value: str) -> int | str:
    """A number of positions, or "auto"."""
    return value if value == "auto" else int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--budgets", type=budget_of, nargs="+", default=[0, 4, 8, 12, 16, 24, 40, "auto"])
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compare compiled calls with a compiled loop")
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.directory)
    rule = experiment.config.sampling
    plain_model = load_base_model(experiment.base_model, arguments.dtype).eval()
    model = PTPModel.from_pretrained(experiment.directory, dtype=arguments.dtype)
    num_parameters = plain_model.num_parameters()
    with decoding_threads(num_parameters):
        decoders = {budget: Decoder(model, rule, budget, compile=arguments.compile) for budget in arguments.budgets}
    methods: dict[str, Method] = {str(budget): by_decoder(decoder) for budget, decoder in decoders.items()}
    loop = Decoder(model, rule, 0, compile=True) if arguments.compile else None
    methods[PLAIN] = by_decoder(loop) if loop else by_plain_loop(plain_model, rule)
    requests = held_out_requests(experiment, plain_model, arguments.num_prompts, arguments.max_new_tokens)
    with decoding_threads(num_parameters):
        take_turns(methods, requests[0], repetitions=1, first=0)  # unmeasured
        rounds = [
            Round(number, HELD_OUT, request, take_turns(methods, request, arguments.repetitions, first=number))
            for number, request in enumerate(requests)
        ]
    found = figures(rounds)[OVERALL]
    rows = []
    print(f"{'budget':>6} {'tau':>6} {'speed-up':>9} {'quartiles':>13} {'break-even':>10} {'mismatches':>10}")
    for budget in map(str, arguments.budgets):
        texts = [(r.request, r.trials[budget].answer.token_ids, r.trials[PLAIN].answer.token_ids) for r in rounds]
        verdicts = [compare(plain_model, request, rule, text, plain) for request, text, plain in texts]
        lower, upper = found[budget].speedup_quartiles
        row = {
            "budget": budget,
            "tokens_per_call": found[budget].tokens_per_call,
            "speedup": found[budget].speedup,
            "speedup_quartiles": [lower, upper],
            "break_even": found[budget].ms_per_call / found[PLAIN].ms_per_call,
            "mismatches": verdicts.count("mismatch"),
        }
        rows.append(row)
        print(
            f"{budget:>6} {row['tokens_per_call']:6.2f} {row['speedup']:8.2f}x {lower:6.2f}–{upper:5.2f} "
            f"{row['break_even']:10.2f} {row['mismatches']:10d}"
        )
    print(json.dumps({"hardware": hardware(), "dtype": arguments.dtype, "compiled": arguments.compile, "rows": rows}))


if __name__ == "__main__":
    main()
