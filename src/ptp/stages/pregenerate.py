"""Pregeneration: the base model, or an endpoint that serves it, completes the experiment's prompts (METHOD §3).

    dataset ──► prompts (cache/) ──► groups of prompts ──► sampled, a shard each ──► completions/

A group is sampled by itself, whatever ran before it: its shard is the same after a kill, on another process, in
another order. Of R processes (torchrun, accelerate launch), process r takes every R-th group.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptp.data.documents import Document, content_group
from ptp.data.endpoint import Request, complete, retokenize
from ptp.data.preparation import described
from ptp.data.sources import load_source
from ptp.data.split import held_out
from ptp.data.store import CompletionStore, Provenance
from ptp.data.teacher import Prompt, find_batch_size, halving, sample_completions
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment
from ptp.files import appearing
from ptp.model.adapter import fingerprint
from ptp.model.architectures import check_architecture, check_calls
from ptp.model.loading import (
    load_base_model,
    load_context_length,
    load_end_tokens,
    load_tokenizer,
    vocabulary_fingerprint,
)
from ptp.model.ptp_model import end_token_ids
from ptp.processes import rank, world_size
from ptp.stages import Progress, unheard
from ptp.stages.prepare import Prepared, open_tokenizer, prepare

COMPLETIONS = "completions"

MOST_ROWS = 256
"""Rows of a call that batch_size "auto" takes at most."""


@dataclass(frozen=True)
class Pregenerated:
    """The store, and why prompts or answers were left out of it."""

    store: CompletionStore
    left_out: Counter[str]


Report = Callable[[int, int], None]
"""Told how many completions of a shard are done, and the tokens sampled since it was told before."""

Sampler = Callable[[int, Sequence[Prompt], Report], Sequence[Document]]
"""Completions of the prompts of a shard, whose number it is told."""


def pregenerate(
    experiment: Experiment, progress: Progress = unheard, announce: Callable[[str], None] = lambda text: None
) -> Pregenerated:
    """Sample completions of all prompts that are not in the store yet, or this process's share of them.

    announce: told, before the sampling begins, what it will be of.
    """
    settings = experiment.config.pregenerate
    check_distils(experiment)
    experiment.check_inside("completions")
    prepared = fitting_prompts(experiment, progress)
    left_out = Counter(prepared.left_out)
    open_sampler = _endpoint if settings.engine else _base_model
    store, sample = open_sampler(experiment, prepared.fingerprint, left_out)
    experiment.record_run("pregenerate", prepared.fingerprint)

    num_prompts, size = len(prepared.documents), max(1, settings.shard_size // settings.completions_per_prompt)
    groups = [range(begin, min(begin + size, num_prompts)) for begin in range(0, num_prompts, size)]
    per_prompt = settings.completions_per_prompt
    total = per_prompt * num_prompts

    def num_stored() -> int:
        # Shards of other processes count too.
        return per_prompt * sum(len(groups[number]) for number in store.shard_numbers() if number < len(groups))

    def report(num_done: int, num_tokens: int) -> None:
        progress(COMPLETIONS, stored + num_done, total, num_tokens)

    stored = num_stored()
    announce(
        f"{num_prompts:,} prompts, {per_prompt} completions of each; {stored:,} of {total:,} stored; "
        f"left out: {described(left_out)}"
    )
    report(0, 0)
    for number in range(rank(), len(groups), world_size()):
        if not store.holds(number):
            prompts = [_prompt(experiment, prepared.documents[place]) for place in groups[number]]
            store.add(number, sample(number, prompts, report))
            stored = num_stored()
            report(0, 0)
    return Pregenerated(store, left_out)


def check_distils(experiment: Experiment) -> None:
    """Raises `ConfigError` for a mode that trains without completions."""
    if not experiment.config.data.distils:
        raise ConfigError(
            f"data.mode {experiment.config.data.mode} trains on the dataset's own text: there is nothing to "
            "pregenerate; go on with ptp_train"
        )


def fitting_prompts(experiment: Experiment, progress: Progress) -> Prepared:
    """The experiment's prompts, as many as are asked for, that leave room for a completion in the model's context."""
    settings, prepared = experiment.config.pregenerate, prepare(experiment, progress)
    documents, left_out = prepared.documents, Counter(prepared.left_out)
    context = load_context_length(experiment.base_model)
    if context is not None and (too_long := documents.lengths > context - 2).any():
        left_out[f"too long for the model's context of {context} tokens"] += int(too_long.sum())
        documents = documents.select(~too_long)
    if not len(documents):
        raise DataError(
            f"none of the {len(prepared.documents)} prompts fits into the model's context of {context} tokens"
        )
    documents = documents.select(np.arange(len(documents))[: settings.num_prompts])
    held_out(documents.groups)  # training will have to hold some out: better said now than after the sampling
    return Prepared(documents, left_out, prepared.fingerprint)


def import_completions(experiment: Experiment, file: Path) -> Pregenerated:
    """Fill an empty store with completions of the user's own: rows with the columns "prompt" and "completion".

    A completion is taken to be whole: the end token is added to it. Intervals are computed in training.
    """
    check_distils(experiment)
    experiment.check_inside("completions")
    if any(experiment.completions.glob("shard-*")):
        raise DataError(f"{experiment.completions} already holds completions; remove it, or set up another experiment")
    settings, source = experiment.config.pregenerate, load_source(str(file))
    tokenizer = open_tokenizer(experiment)
    ends = load_end_tokens(experiment.base_model, tokenizer)
    # Of several, the tokenizer's own is the one that ends a text.
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id in ends else ends[:1]
    left_out: Counter[str] = Counter()
    documents: list[Document] = []
    for number, row in enumerate(source.rows, start=1):
        texts = [row.get(name) for name in ("prompt", "completion")]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{file}, row {number}: expected texts 'prompt' and 'completion'; it has: {', '.join(row)}")
        prompt, completion = (str(text) for text in texts)
        prompt_ids = tokenizer(prompt)["input_ids"]
        completed = retokenize(completion, prompt_ids, tokenizer)
        if not prompt_ids or not completed:
            left_out["empty, or a text that no tokens give back exactly"] += 1
            continue
        document = _completed(
            Prompt(prompt_ids, [number - 1], content_group(prompt)), number - 1, [*completed, *end], True
        )
        if len(document) > settings.max_length:
            left_out[f"longer than {settings.max_length} tokens"] += 1
            continue
        documents.append(document)
    if not documents:
        raise DataError(f"{file}: none of {len(source.rows)} completions can be used; left out: {described(left_out)}")
    held_out(np.asarray([document.group for document in documents]))
    if experiment.completions.exists():
        shutil.rmtree(experiment.completions)  # holds no shard, as was checked above
    with appearing(experiment.completions) as directory:
        store = CompletionStore(directory, _provenance(experiment, "file", "", source.fingerprint))
        for shard, begin in enumerate(range(0, len(documents), settings.shard_size)):
            store.add(shard, documents[begin : begin + settings.shard_size])
    experiment.record_run("pregenerate", source.fingerprint)
    return Pregenerated(CompletionStore(experiment.completions), left_out)


def _base_model(
    experiment: Experiment, prompts_fingerprint: str, left_out: Counter[str]
) -> tuple[CompletionStore, Sampler]:
    settings = experiment.config.pregenerate
    check_architecture(experiment.base_model)
    base_model = load_base_model(experiment.base_model).eval()
    check_calls(base_model)
    store = CompletionStore(
        experiment.completions, _provenance(experiment, "base model", fingerprint(base_model), prompts_fingerprint)
    )
    if settings.batch_size == "auto":
        batch_size = store.batch_size(lambda: find_batch_size(base_model, settings.max_length, MOST_ROWS))
    else:
        batch_size = settings.batch_size

    def sample(number: int, prompts: Sequence[Prompt], report: Report) -> Sequence[Document]:
        nonlocal batch_size
        documents, batch_size = halving(
            lambda size: sample_completions(
                base_model,
                prompts,
                experiment.config.sampling,
                seed=settings.seed,
                max_length=settings.max_length,
                max_new_tokens=settings.max_new_tokens,
                end_token_ids=end_token_ids(base_model),
                batch_size=size,
                progress=report,
            ),
            batch_size,
        )
        return documents

    return store, sample


def _endpoint(
    experiment: Experiment, prompts_fingerprint: str, left_out: Counter[str]
) -> tuple[CompletionStore, Sampler]:
    settings, rule, tokenizer = experiment.config.pregenerate, experiment.config.sampling, open_tokenizer(experiment)
    assert settings.engine is not None
    engine = settings.engine
    store = CompletionStore(
        experiment.completions, _provenance(experiment, f"endpoint {engine.model}", "", prompts_fingerprint)
    )
    ends = load_end_tokens(experiment.base_model, tokenizer)
    # A server refuses what may run past the model's context.
    longest = min(settings.max_length, load_context_length(experiment.base_model) or settings.max_length)

    def sample(shard: int, prompts: Sequence[Prompt], report: Report) -> Sequence[Document]:
        by_number = {number: prompt for prompt in prompts for number in prompt.numbers}
        most = settings.max_new_tokens or longest
        requests = [
            Request(
                number=number,
                prompt_ids=tuple(prompt.ids.tolist()),
                max_new_tokens=min(most, longest - len(prompt.ids)),
                seed=settings.seed + number,
            )
            for number, prompt in by_number.items()
        ]
        # The shard is written when all its answers are there; until then each is kept in the journal.
        outcome = complete(
            engine, requests, rule, tokenizer, ends, store.journal(shard), lambda done, total: report(done, 0)
        )
        left_out.update(outcome.left_out)
        return [
            _completed(by_number[answer.number], answer.number, answer.ids, answer.finished)
            for answer in outcome.answers
        ]

    return store, sample


def _completed(prompt: Prompt, number: int, ids: Sequence[int], finished: bool) -> Document:
    """A prompt with a completion whose intervals are not known."""
    whole = np.concatenate([prompt.ids, ids]).astype(np.int32)
    return Document(whole, ((len(prompt.ids), len(whole)),), group=prompt.group, number=number, finished=finished)


def _prompt(experiment: Experiment, document: Document) -> Prompt:
    count = experiment.config.pregenerate.completions_per_prompt
    first = document.number * count
    return Prompt(document.ids, range(first, first + count), document.group)


def _provenance(experiment: Experiment, source: str, base_fingerprint: str, prompts_fingerprint: str) -> Provenance:
    settings = experiment.config.pregenerate
    return Provenance(
        source=source,
        base_fingerprint=base_fingerprint,
        rule=experiment.config.sampling,
        seed=settings.seed,
        max_length=settings.max_length,
        max_new_tokens=settings.max_new_tokens,
        num_prompts=settings.num_prompts,
        completions_per_prompt=settings.completions_per_prompt,
        shard_size=settings.shard_size,
        prompts_fingerprint=prompts_fingerprint,
        vocabulary_fingerprint=vocabulary_fingerprint(load_tokenizer(experiment.base_model)),
    )
