"""How does the number of correct tokens grow with the size of a student trained from scratch?

    python benchmarks/paper/sizes.py experiments/demo
    python benchmarks/paper/sizes.py DIR --steps 100000 --sizes 525k 4.2M 34M 268M

Students of `ptp.scaling.LADDER` learn the completions of one teacher, the experiment's base model, from the intervals
stored with them, with the same steps, seeds and data. `correct` is the mean number of drafts of a held-out window that
are right before its first error.

The directory is one that `ptp_pregenerate` has filled: `make demo`'s takes about five minutes a seed on a thread of a
CPU; those of the paper's ladder are for a GPU. What differs from the paper: hundreds of steps in place of a million, so
that the table says how fast a size learns, not where it ends; a teacher of the size of the smaller students, and its
vocabulary; one learning rate for all sizes, the experiment's. A student learns the language and u at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from shared import FIRST_INDICES, first_accuracies, make_parser, measure, open_arm, print_results, spread, trained_arms

from ptp.scaling import LADDER
from ptp.stages.train import training_data


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(LADDER)[:3], choices=LADDER)
    options = parser.parse_args(arguments)
    data = training_data(open_arm(options))
    arms = {name: (f"model.student={LADDER[name].model_dump_json()}",) for name in options.sizes}

    correct, accuracies, num_parameters = defaultdict(list), defaultdict(list), {}
    for name, experiment, model in trained_arms(options, arms, data.training):
        metrics = measure(model, data.validation, experiment)
        correct[name].append(metrics.mean_correct)
        accuracies[name].append(first_accuracies(metrics, experiment))
        num_parameters[name] = model.base_model.num_parameters()

    drafts = [f"accuracy of draft {number + 1}" for number in range(FIRST_INDICES)]
    table = [["student", "parameters, embeddings included", "correct", *drafts]]
    for name in arms:
        columns = map(spread, zip(*accuracies[name], strict=True))
        table.append([name, f"{num_parameters[name]:,}", spread(correct[name]), *columns])
    print_results(options, table, {"correct": correct, "accuracy": accuracies, "num_parameters": num_parameters})


if __name__ == "__main__":
    main()
