"""What is lost if a window predicts its tokens independently, without u of those before?

    python benchmarks/paper/independent.py experiments/demo
    python benchmarks/paper/independent.py DIR --steps 20000 --seeds 3

Each variant is trained on the experiment's completions with u and without ("none" in place of the auxiliary embedding),
same steps, seeds and data. Without u, a one-hot window proposes the likeliest token of each place; a categorical one
draws each token from its place's distribution with that token's own u, which is independent prediction as the paper
means it.

`correct`: mean number of drafts of a held-out window that are right before its first error. Impossible pairs: windows
are proposed as in decoding, at random places of held-out documents with uniform u: the base model says the bonus token,
the window its drafts x_1 … x_D. A pair (x_k, x_k+1), k ≥ 1, is impossible if the base model, having read the
document, the bonus token and x_1 … x_k, gives x_k+1 no mass under the sampling rule; or, beside it, a probability below
1/1000 at temperature 1 without truncation. All pairs count up to an end token; "first" pairs are those with nothing
impossible before, x_1 included, for in a text that is broken already anything is possible. A single draft can thus be
wrong, as it mostly is, without being impossible.

The directory is one that `ptp_pregenerate` has filled: `make demo`'s takes about eight minutes on a thread of a CPU,
but u pays only later (`--steps 600 --seeds 1`, twelve minutes); the paper's are for a GPU. What differs from the
paper: the measure of impossible pairs, for which it has its own; model, data and training are smaller by far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from shared import make_parser, measure, open_arm, print_results, spread, trained_arms
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ptp.config import TrainConfig
from ptp.data.documents import Documents
from ptp.data.packing import collate
from ptp.model.head import project
from ptp.model.loading import load_base_model
from ptp.model.proposal import propose
from ptp.model.ptp_model import PTPModel, end_token_ids, states_before
from ptp.sampling import SamplingRule, interval, pick, warp
from ptp.stages.train import training_data
from ptp.training.objective import make_stream

ARMS = {
    f"{variant.replace('_', '-')}, {name}": (f"model.variant={variant}", *overrides)
    for variant in ("one_hot", "categorical")
    for name, overrides in {"with u": (), "without": ("model.auxiliary=none",)}.items()
}

IMPROBABLE = 1e-3
"""Probability below which the base model at temperature 1 is taken to think a token impossible."""

ROWS = 32
"""Texts the base model reads at a time to judge a window each."""


@dataclass(frozen=True)
class Pairs:
    """Counts of adjacent drafts: all of them, and the first ones, and the impossible of both (see `count_pairs`)."""

    num_pairs: int = 0
    num_impossible: int = 0
    num_first: int = 0
    num_first_impossible: int = 0

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def share(self) -> float:
        """Impossible pairs among all."""
        return self.num_impossible / max(1, self.num_pairs)

    @property
    def first_share(self) -> float:
        """Impossible pairs among those with nothing impossible before."""
        return self.num_first_impossible / max(1, self.num_first)


def possible_tokens(logits: Tensor, tokens: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    """Whether tokens (...) have mass under a rule, and are probable at temperature 1. logits: (..., V)."""
    lower, upper = interval(warp(logits, rule), tokens)
    probability = logits.float().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return upper > lower, probability >= IMPROBABLE


def count_pairs(possible: Tensor, counted: Tensor) -> Pairs:
    """Count the adjacent pairs of windows.

    possible: (R, D) bool, whether a draft is possible after what is before it. counted: (R, D) bool, whether it belongs
    to the text: no end token before it. With P possible and I impossible, the pairs of P P I P are
    PP, PI and IP: one of three is impossible, and one of the first two, whose beginnings are possible.
    """
    pairs = counted[:, 1:]
    first = pairs & possible[:, :-1].cumprod(-1).bool()
    impossible = ~possible[:, 1:]
    return Pairs(*(int(chosen.sum()) for chosen in (pairs, pairs & impossible, first, first & impossible)))


@torch.no_grad()
def proposed_windows(model: PTPModel, batch: dict[str, Tensor], rule: SamplingRule) -> Tensor:
    """Windows proposed with uniform u, (B, N, 1 + D): the bonus token, which the base model says, and the drafts."""
    config, ids = model.ptp_config, batch["ids"]
    everywhere = torch.ones_like(ids, dtype=torch.float32)
    # In intervals of [0, 1), u is the batch's z. Texts may go on where the document's end, so spans do not.
    free = {"span": torch.zeros_like(ids), "lower": 0 * everywhere, "upper": everywhere}
    output = model(**(batch | free))
    bonus = pick(warp(model.logits(states_before(batch["starts"], output.context)), rule), output.u[..., 0])
    logits = model.logits(output.windows).unflatten(1, (-1, config.window))
    u = output.u[..., config.shift + 1 :][..., : config.window]
    tokens = propose(config, rule, logits, u)[0][..., 0]
    return torch.cat([bonus.unsqueeze(-1), tokens[..., config.lead :]], dim=-1)


@torch.no_grad()
def judge(
    teacher: PreTrainedModel, contexts: Sequence[Tensor], windows: Tensor, rule: SamplingRule
) -> tuple[Tensor, Tensor]:
    """Whether the drafts (R, D) of windows (R, 1 + D) are possible behind contexts, see `possible_tokens`."""
    texts = [torch.cat(pair) for pair in zip(contexts, windows, strict=True)]
    states = teacher.get_decoder()(pad_sequence(texts, batch_first=True)).last_hidden_state
    before = torch.tensor([len(context) for context in contexts], device=states.device).unsqueeze(-1)
    place = before + torch.arange(windows.shape[1] - 1, device=states.device)
    rows = states.gather(1, place.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return possible_tokens(project(teacher, rows), windows[:, 1:], rule)


def impossible_pairs(
    model: PTPModel,
    teacher: PreTrainedModel,
    documents: Documents,
    settings: TrainConfig,
    rule: SamplingRule,
    num_windows: int,
) -> tuple[Pairs, Pairs]:
    """Pairs of windows proposed in held-out documents: impossible under the rule, and improbable at temperature 1."""
    window = model.ptp_config.window
    stream = make_stream(documents, settings.model_copy(update={"beta": 1.0, "seed": 0}), window)
    stream.length = -(-num_windows // settings.windows_per_sequence)
    without_mass, improbable = Pairs(), Pairs()
    ends = torch.tensor(end_token_ids(teacher), device=model.device)
    for item in range(len(stream)):
        batch = {name: tensor.to(model.device) for name, tensor in collate([stream[item]]).items()}
        ids, starts, positions = (batch[name][0] for name in ("ids", "starts", "positions"))
        inside = starts + window < len(ids)  # u of a window that runs past the sequence is not at hand
        proposed = proposed_windows(model, batch, rule)[0][inside]
        contexts = [ids[start - int(positions[start]) : start] for start in starts[inside].tolist()]
        for begin in range(0, len(contexts), ROWS):
            part = slice(begin, begin + ROWS)
            has_mass, probable = judge(teacher, contexts[part], proposed[part], rule)
            ended = torch.isin(proposed[part], ends).cumsum(-1) > 0
            without_mass += count_pairs(has_mass, ~ended[:, :-1])
            improbable += count_pairs(probable, ~ended[:, :-1])
    return without_mass, improbable


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--windows", type=int, default=2000, help="proposed for pairs (default: %(default)s)")
    options = parser.parse_args(arguments)
    experiment = open_arm(options)
    if experiment.config.model.trains_all:
        parser.error("windows of a model all of whose weights train have no base model to say the bonus token")
    data, rule = training_data(experiment), experiment.config.sampling
    teacher = load_base_model(experiment.base_model).eval()

    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ARMS}
    for name, arm, model in trained_arms(options, ARMS, data.training):
        found[name]["correct"].append(measure(model, data.validation, arm).mean_correct)
        pairs = impossible_pairs(model, teacher, data.validation, arm.config.train, rule, options.windows)
        for kind, counts in zip(("no mass", "improbable"), pairs, strict=True):
            found[name][f"{kind}"].append(counts.share)
            found[name][f"{kind}, first"].append(counts.first_share)
            found[name][f"{kind}, number"].append(counts.num_pairs)
            found[name][f"{kind}, number of first"].append(counts.num_first)

    table = [["window", "correct", "pairs without mass", "first such", "pairs below 1/1000", "first such"]]
    for name, values in found.items():
        shares = (values[kind] for kind in ("no mass", "no mass, first", "improbable", "improbable, first"))
        table.append([name, spread(values["correct"]), *(spread(share, ".1%") for share in shares)])
    print_results(options, table, found)


if __name__ == "__main__":
    main()
