"""Which auxiliary embedding tells a window most about u?

    python benchmarks/paper/embeddings.py experiments/demo
    python benchmarks/paper/embeddings.py DIR --steps 20000 --seeds 3

Every embedding of `ptp.model.auxiliary.EMBEDDINGS` is trained on the experiment's completions with the same steps,
seeds and data; "none" withholds u. `correct` is the mean number of drafts of a held-out window that are right before
its first error; accuracy is the share of right drafts at a place, whatever stood before it.

The directory is one that `ptp_pregenerate` has filled: `make demo`'s takes about six minutes a seed on a thread of a
CPU; the paper's are for a GPU. What differs from the paper: the demo's model and data are smaller by far, and training
is a matter of minutes, in which an embedding that is learnt fast is ahead; `auxiliary_size` is the same number for all,
though it counts points, octaves or bins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from shared import FIRST_INDICES, first_accuracies, make_parser, measure, open_arm, print_results, spread, trained_arms

from ptp.model.auxiliary import EMBEDDINGS
from ptp.stages.train import training_data


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--embeddings", nargs="+", default=list(EMBEDDINGS), choices=EMBEDDINGS)
    options = parser.parse_args(arguments)
    data = training_data(open_arm(options))
    arms = {name: (f"model.auxiliary={name}",) for name in options.embeddings}

    correct, accuracies = defaultdict(list), defaultdict(list)
    for name, experiment, model in trained_arms(options, arms, data.training):
        metrics = measure(model, data.validation, experiment)
        correct[name].append(metrics.mean_correct)
        accuracies[name].append(first_accuracies(metrics, experiment))

    table = [["embedding", "correct", *(f"accuracy of draft {number + 1}" for number in range(FIRST_INDICES))]]
    for name in sorted(arms, key=lambda name: -sum(correct[name])):
        table.append([name, spread(correct[name]), *map(spread, zip(*accuracies[name], strict=True))])
    print_results(options, table, {"correct": correct, "accuracy": accuracies})


if __name__ == "__main__":
    main()
