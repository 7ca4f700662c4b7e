"""Measure an experiment against other ways of decoding, on its held-out prompts or on a file's."""

from __future__ import annotations

import datetime
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptp.decoding.decoder import Budget, Decoder
from ptp.decoding.requests import Request, make_request
from ptp.errors import ConfigError, DataError
from ptp.evaluation.bench import Figures, Round, figures, take_turns
from ptp.evaluation.experiment_report import decoding_threads, hardware
from ptp.evaluation.methods import PLAIN, PTP, Method, make_methods
from ptp.evaluation.prompts import Question, prompt_ids, read_questions, spread_out
from ptp.evaluation.verify import compare
from ptp.experiment import Experiment, versions
from ptp.layer_kinds import context_length
from ptp.model.adapter import find_adapter, weights_hash
from ptp.model.loading import load_base_model
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.stages import Progress, unheard
from ptp.stages.prepare import open_tokenizer
from ptp.stages.train import validation_prompts

HELD_OUT = "held-out prompts"
"""The task of an experiment's own prompts."""

VERDICTS = ("identical", "near-tie", "mismatch")
MEASURED = "questions measured"


@dataclass(frozen=True)
class Bench:
    """What was measured, how, and where (docs/formats.md).

    adapter: its `weights_hash`. prompts: the file, or null for held-out prompts. num_left_out: prompts that leave no
    room for max_new_tokens. num_prompts: prompts measured, each turn of a question counted; of these PTP wrote as
    verdicts says (`compare`). results: figures by task and method, over all tasks first.
    """

    date: str
    command: list[str]
    hardware: str
    versions: dict[str, str]
    num_threads: int
    base_model: str
    adapter: str
    assistant: str | None
    dtype: str
    sampling: dict[str, Any]
    seed: int
    budget: Budget
    max_new_tokens: int
    repetitions: int
    prompts: str | None
    num_left_out: int
    num_prompts: int
    verdicts: dict[str, int]
    results: dict[str, dict[str, Figures]]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)


def held_out_requests(
    experiment: Experiment, plain_model: PreTrainedModel, num_prompts: int, max_new_tokens: int
) -> list[Request]:
    """Held-out prompts as requests, each a sequence of seed 0."""
    prompts = validation_prompts(experiment, num_prompts)
    return [make_request(plain_model, ids, max_new_tokens, seed=0, sequence=i) for i, ids in enumerate(prompts)]


def bench_experiment(
    experiment: Experiment,
    *,
    prompts: str | None = None,
    column: str | None = None,
    num_prompts: int,
    max_new_tokens: int,
    budget: Budget,
    repetitions: int,
    assistant: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress = unheard,
) -> Bench:
    """Answer the same prompts by PTP, the plain loop, `generate`, prompt lookup and with an assistant, in turn.

    All methods but PTP run on a base model without an adapter; dtype, rule, threads and lengths are the same, and
    nothing is compiled. num_prompts: questions of each task. Raises `DataError` if no prompt leaves room for an answer.
    """
    if prompts is None and column is not None:
        raise ConfigError(f"--column {column} is of a file: give one with --prompts")
    plain_model = load_base_model(experiment.base_model, dtype).eval()
    model = PTPModel.from_pretrained(experiment.directory, dtype=dtype)
    num_parameters = plain_model.num_parameters()
    with decoding_threads(num_parameters):
        # A budget that is measured is measured as it will be used.
        decoder = Decoder(model, experiment.config.sampling, budget)
    methods = make_methods(decoder, plain_model, experiment.base_model, assistant)
    if prompts is None:
        questions = [Question(HELD_OUT, (tuple(ids),)) for ids in validation_prompts(experiment, num_prompts)]
    else:
        questions = read_questions(prompts, column)
    asker = _Asker(plain_model, open_tokenizer(experiment), max_new_tokens, seed)
    fitting = [question for question in questions if asker.request(question, [], 0) is not None]
    if not fitting:
        raise DataError(
            f"none of the {len(questions)} prompts leaves room for {max_new_tokens} tokens in the model's context of "
            f"{context_length(plain_model.config)}; lower --max-new-tokens, or choose shorter prompts"
        )
    chosen = spread_out(fitting, num_prompts)
    rounds: list[Round] = []
    with decoding_threads(num_parameters), torch.random.fork_rng():
        num_threads = torch.get_num_threads()
        # One round unmeasured: the first calls of a process pay for what later ones reuse.
        next(_rounds(asker, methods, chosen[:1], repetitions=1))
        for played in _rounds(asker, methods, chosen, repetitions):
            progress(MEASURED, played.question, len(chosen))
            rounds.append(played)
        progress(MEASURED, len(chosen), len(chosen))
    verdicts = Counter(_verdict(plain_model, decoder.rule, played) for played in rounds)
    num_chosen = sum(len(question.turns) for question in chosen)
    return Bench(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        hardware=hardware(),
        versions=versions(),
        num_threads=num_threads,
        base_model=experiment.base_model,
        adapter=weights_hash(find_adapter(experiment.directory)),
        assistant=assistant,
        dtype=str(plain_model.dtype).removeprefix("torch."),
        sampling=decoder.rule.model_dump(mode="json"),
        seed=seed,
        budget=budget,
        max_new_tokens=max_new_tokens,
        repetitions=repetitions,
        prompts=prompts,
        num_left_out=len(questions) - len(fitting) + num_chosen - len(rounds),
        num_prompts=len(rounds),
        verdicts={verdict: verdicts[verdict] for verdict in VERDICTS},
        results=figures(rounds),
    )


@dataclass(frozen=True)
class _Asker:
    """Makes requests of questions; token ids of the answers go into the prompts of later turns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    seed: int

    def request(self, question: Question, answers: Sequence[list[int]], sequence: int) -> Request | None:
        """The question's next turn; None if it leaves no room for max_new_tokens in the model's context."""
        said = [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        ids = prompt_ids(question, said, self.tokenizer)
        context = context_length(self.model.config)
        if context is not None and len(ids) + self.max_new_tokens > context:
            return None
        return make_request(self.model, ids, self.max_new_tokens, self.seed, sequence)


def _rounds(
    asker: _Asker, methods: Mapping[str, Method], questions: Sequence[Question], repetitions: int
) -> Iterator[Round]:
    """Every turn of every question, as far as there is room. The base model's own text is the answer that a later turn
    follows, for all methods."""
    sequence = 0
    for number, question in enumerate(questions):
        answers: list[list[int]] = []
        for _ in question.turns:
            request = asker.request(question, answers, sequence)
            if request is None:
                break
            trials = take_turns(methods, request, repetitions, first=sequence)
            yield Round(number, question.task, request, trials)
            answers.append(trials[PLAIN].answer.token_ids)
            sequence += 1


def _verdict(plain_model: PreTrainedModel, rule: SamplingRule, played: Round) -> str:
    written, plain = (played.trials[name].answer.token_ids for name in (PTP, PLAIN))
    return compare(plain_model, played.request, rule, written, plain)
