"""What does it cost to draw the u's of training in other intervals than those the data was sampled from?

    python benchmarks/paper/mismatched.py experiments/demo
    python benchmarks/paper/mismatched.py DIR --steps 20000 --seeds 3

The same completions are trained on with four sets of intervals: those stored, of the rule that sampled them
("matched"); those that the same teacher gives the same tokens under another rule, as if the sampling settings had been
lost on the way: without truncation, and at temperature 1 besides (where the data was sampled so, nothing is lost); and
all of [0, 1) for every token, in which u says nothing. All tokens, steps and seeds are the same.

agreement: the chance that u, drawn uniformly in a token's interval of training, picks that token under the sampling
rule, mean over training tokens. `correct` is the mean number of drafts of a held-out window that are right before its
first error, with u of the true intervals, as in decoding; "own intervals" is the same with u of the intervals of
training, which is what a validation sees that shares the mistake.

The directory is one that `ptp_pregenerate` has filled: `make demo`'s takes about eight minutes on a thread of a CPU,
but u pays only later (`--steps 600 --seeds 1`, twelve minutes); the paper's are for a GPU. What differs from the
paper: it distils data of a teacher in its own intervals only. The readings of "mismatched" here are those an
implementation was seen to make by mistake.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from shared import make_parser, measure, open_arm, print_results, spread, trained_arms
from transformers import PreTrainedModel

from ptp.data.documents import Document, Documents
from ptp.model.head import project
from ptp.model.loading import load_base_model
from ptp.sampling import SamplingRule, token_intervals
from ptp.stages.train import TrainingData, training_data


def other_rules(rule: SamplingRule) -> dict[str, SamplingRule]:
    """Rules that the sampling settings turn into when some of them are lost."""
    untruncated = rule.model_copy(update={"top_k": 0, "top_p": 1.0})
    return {
        "without top-k and top-p": untruncated,
        "at temperature 1 besides": untruncated.model_copy(update={"temperature": 1.0}),
    }


@torch.no_grad()
def under_rule(documents: Documents, teacher: PreTrainedModel, rule: SamplingRule) -> Documents:
    """The same tokens with the intervals that a teacher gives them under a rule."""

    def changed(document: Document) -> Document:
        ids = torch.from_numpy(document.ids.astype(np.int64)).unsqueeze(0).to(teacher.device)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for first, last in document.spans:
            wanted[:, first:last] = True
        states = teacher.get_decoder()(ids).last_hidden_state
        edges = token_intervals(states, lambda hidden: project(teacher, hidden), ids, wanted, rule)
        lower, upper = (edge[wanted].cpu().numpy() for edge in edges)
        return replace(document, lower=lower, upper=upper)

    return Documents.of([changed(document) for document in documents])


def uninformative(documents: Documents) -> Documents:
    """The same tokens, each with all of [0, 1) for its interval."""
    return Documents.of([replace(d, lower=np.zeros_like(d.lower), upper=np.ones_like(d.upper)) for d in documents])


def agreement(used: Documents, true: Documents) -> float:
    """The chance that u, uniform in a token's interval of the one, lies in that of the other; mean over tokens.

    An empty interval is masked in training and does not count.
    """
    lower, upper, true_lower, true_upper = (
        np.concatenate([getattr(document, edge) for document in documents])
        for documents in (used, true)
        for edge in ("lower", "upper")
    )
    common = np.clip(np.minimum(upper, true_upper) - np.maximum(lower, true_lower), 0, None)
    filled = upper > lower
    return float((common[filled] / (upper - lower)[filled]).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    options = parser.parse_args(arguments)
    experiment = open_arm(options)
    data = training_data(experiment)
    if not data.training.has_intervals:
        parser.error(f"{experiment.completions} holds no intervals; sample with the base model itself")
    teacher = load_base_model(experiment.base_model).eval()

    def with_intervals(of: Callable[[Documents], Documents]) -> TrainingData:
        return replace(data, training=of(data.training), validation=of(data.validation))

    datasets = {"matched": data}
    for name, rule in other_rules(experiment.config.sampling).items():
        datasets[name] = with_intervals(partial(under_rule, teacher=teacher, rule=rule))
    datasets["u says nothing"] = with_intervals(uninformative)

    agreements = {name: agreement(used.training, data.training) for name, used in datasets.items()}
    correct, own = defaultdict(list), defaultdict(list)
    for name, used in datasets.items():
        for _, arm, model in trained_arms(options, {name: ()}, used.training):
            correct[name].append(measure(model, data.validation, arm).mean_correct)
            own[name].append(measure(model, used.validation, arm).mean_correct)

    table = [["intervals of training", "agreement", "correct", "correct, own intervals"]]
    for name, share in agreements.items():
        table.append([name, f"{share:.0%}", spread(correct[name]), spread(own[name])])
    print_results(options, table, {"agreement": agreements, "correct": correct, "own_intervals": own})


if __name__ == "__main__":
    main()
