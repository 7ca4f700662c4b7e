"""τ of held-out prompts after training, beside the τ that the validation windows promised (METHOD §5)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt

from ptp.data.store import CompletionStore
from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.allocation import Profile
from ptp.decoding.decoder import Decoder, Generation
from ptp.evaluation.experiment_report import decoding_threads
from ptp.experiment import Experiment
from ptp.files import write_atomically
from ptp.model.ptp_model import PTPModel
from ptp.stages import Progress, unheard
from ptp.stages.train import MEASUREMENT, read_training_result, validation_prompts

NUM_PROMPTS, MAX_NEW_TOKENS = 32, 128
"""Enough to see whether training was worth its while, few enough for a large model: as in `ptp verify`."""

NOTABLE = 0.15
"""Share by which measured and simulated τ may differ without a word."""


@dataclass(frozen=True)
class Measurement:
    """τ of held-out prompts, and what was expected of them.

    budget: positions a call could spend. num_prompts, num_tokens, num_calls: of the texts written. tokens_per_call: τ,
    tokens over calls; standard_error: its spread over prompts, null for a single one. simulated: τ foreseen from the
    validation windows; simulated_short: the same for texts of no more calls than these.
    """

    budget: int
    num_prompts: int
    num_tokens: int
    num_calls: int
    tokens_per_call: float
    standard_error: float | None
    simulated: float
    simulated_short: float

    @classmethod
    def of(cls, generations: Sequence[Generation], profile: Profile, budget: int) -> Measurement:
        """Count what was written. profile: of the adapter that wrote it."""
        counts = [(len(generation.token_ids), generation.num_calls) for generation in generations]
        num_prompts = len(counts)
        num_tokens, num_calls = (sum(count) for count in zip(*counts, strict=True))
        found = num_tokens / num_calls
        # That of a ratio of two sums.
        squares = sum((tokens - found * calls) ** 2 for tokens, calls in counts)
        standard_error = sqrt(num_prompts / (num_prompts - 1) * squares) / num_calls if num_prompts > 1 else None
        return cls(
            budget=budget,
            num_prompts=num_prompts,
            num_tokens=num_tokens,
            num_calls=num_calls,
            tokens_per_call=found,
            standard_error=standard_error,
            simulated=simulated_tokens_per_call(profile, budget),
            simulated_short=simulated_tokens_per_call(profile, budget, max(1, round(num_calls / num_prompts))),
        )

    @property
    def difference(self) -> float:
        """How far measured lies above simulated, as a share of it."""
        return self.tokens_per_call / self.simulated - 1

    @property
    def may_be_chance(self) -> bool:
        """Whether so few prompts could lie that far from simulated by accident: within two standard errors."""
        return self.standard_error is None or abs(self.tokens_per_call - self.simulated) <= 2 * self.standard_error


def measure(experiment: Experiment, budget: int, progress: Progress = unheard) -> Measurement:
    """Decode held-out prompts with the adapter as it is stored, under the experiment's rule, and keep what was found.

    The model has the dtype it was trained in; only calls are counted, and nothing is compared with plain decoding.
    """
    model = PTPModel.from_pretrained(experiment.directory, dtype=experiment.config.train.dtype)
    num_parameters = model.base_model.num_parameters()
    decoder = Decoder(model, experiment.config.sampling, budget)
    prompts = validation_prompts(experiment, NUM_PROMPTS)
    generations = []
    with decoding_threads(num_parameters):
        for number, prompt in enumerate(prompts):
            progress("held-out prompts decoded", number, len(prompts))
            generations.append(decoder.generate(prompt, MAX_NEW_TOKENS, sequence=number))
        progress("held-out prompts decoded", len(prompts), len(prompts))
    return keep(experiment, generations, budget)


def keep(experiment: Experiment, generations: Sequence[Generation], budget: int) -> Measurement:
    """Write beside the adapter what it reached on held-out prompts."""
    found = Measurement.of(generations, read_training_result(experiment).profile, budget)
    write_atomically(experiment.adapter / MEASUREMENT, json.dumps(asdict(found), indent=2).encode() + b"\n")
    return found


def described(found: Measurement, learnt_from_itself: bool) -> Iterator[str]:
    """The measurement in lines to read; where it differs from the simulation, with the usual reasons.

    learnt_from_itself: whether the windows are of the base model's own samples (see `learns_from_itself`).
    """
    error = "" if found.standard_error is None else f"standard error {found.standard_error:.2f}; "
    yield (
        f"tokens per call at budget {found.budget}: measured {found.tokens_per_call:.2f} "
        f"({error}held-out prompts {found.num_prompts}, tokens {found.num_tokens:,}), "
        f"simulated from the windows {found.simulated:.2f}"
    )
    if abs(found.difference) <= NOTABLE:
        return
    side = "below" if found.difference < 0 else "above"
    yield f"measured lies {abs(found.difference):.0%} {side} simulated; why that usually happens:"
    if not learnt_from_itself:
        yield "- the windows are of texts the base model did not write, and decoding writes the model's own"
    if found.difference < 0:
        yield "- a window in decoding starts where a draft was refused, at a harder place than a validation window does"
        if found.simulated_short < found.simulated:
            calls = found.num_calls / found.num_prompts
            yield (
                f"- a text's first call has no drafts yet, and these texts have {calls:.0f} calls each: simulated for "
                f"so many, {found.simulated_short:.2f}"
            )
    else:
        yield "- the texts that were decoded are easier, or repeat themselves more, than the validation windows"
    if found.may_be_chance:
        yield f"- chance: {found.num_prompts} prompts are too few to tell the two apart"


def learns_from_itself(experiment: Experiment) -> bool:
    """Whether the training data are the base model's own samples."""
    return experiment.config.data.distils and CompletionStore(experiment.completions).provenance.source == "base model"
