"""The documents of an experiment's dataset, tokenised once and kept in its cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptp.data.documents import Documents, write_documents
from ptp.data.preparation import Preparation, described
from ptp.data.sources import Source, load_source
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment
from ptp.files import appearing
from ptp.model.loading import load_context_length, load_end_tokens, load_tokenizer
from ptp.stages import Progress, unheard

LEFT_OUT = "left_out.json"
"""Beside the shards: why rows gave no document, and how many."""


@dataclass(frozen=True)
class Prepared:
    """Documents, why some rows gave none, and the hash of content and settings they come from."""

    documents: Documents
    left_out: Counter[str]
    fingerprint: str


def open_source(experiment: Experiment) -> Source:
    """The rows of the experiment's dataset."""
    data = experiment.config.data
    return load_source(
        experiment.resolve(data.path),
        config=data.config,
        split=data.split,
        revision=data.revision,
        whole_files=data.mode == "fixed",
    )


def open_tokenizer(experiment: Experiment) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the experiment's chat template if it has its own."""
    tokenizer = load_tokenizer(experiment.base_model)
    if (template := experiment.config.data.chat_template) is not None:
        try:
            tokenizer.chat_template = Path(experiment.resolve(template)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot read the chat template '{template}' (data.chat_template): {reason}") from None
    return tokenizer


def open_preparation(experiment: Experiment) -> Preparation:
    """How the experiment's rows become documents."""
    config, tokenizer = experiment.config, open_tokenizer(experiment)
    # A packed sequence may be longer than the model's context, a document may not.
    size = config.train.sequence_length
    longest = min(size, load_context_length(experiment.base_model) or size)
    return Preparation(
        data=config.data,
        tokenizer=tokenizer,
        max_tokens=config.pregenerate.max_prompt_tokens if config.data.distils else longest,
        end_token_ids=load_end_tokens(experiment.base_model, tokenizer),
    )


def prepare(experiment: Experiment, progress: Progress = unheard) -> Prepared:
    """Prompts, chats or texts of the dataset as documents: from the cache, or tokenised now.

    The cache is keyed on the data's content, the tokenizer, the template and the settings that shape documents; names
    and dates of files do not matter.
    """
    source, preparation = open_source(experiment), open_preparation(experiment)
    fingerprint = _fingerprint(source, preparation)
    directory = experiment.cache / fingerprint[:16]
    if not directory.exists():
        experiment.check_inside("cache")
        _write(directory, preparation, source, progress)
    try:
        left_out = Counter(json.loads((directory / LEFT_OUT).read_text(encoding="utf-8")))
        documents = Documents.load(directory)
    except (OSError, ValueError, DataError) as error:
        # Whole, for the rest would pass for the data.
        raise DataError(f"the cache {directory} is damaged; remove it and run the command again") from error
    if not len(documents):
        raise DataError(
            f"no row of {source.name} gives anything to use ({len(source.rows)} rows: {described(left_out)})"
        )
    return Prepared(documents, left_out, fingerprint)


def _write(directory: Path, preparation: Preparation, source: Source, progress: Progress) -> None:
    try:
        with appearing(directory) as temporary:
            temporary.mkdir()
            write_documents(temporary, preparation.documents(_watched(source, progress)))
            (temporary / LEFT_OUT).write_text(json.dumps(preparation.left_out), encoding="utf-8")
    except DataError:
        # Of several processes that prepare the same data at once, one is first; the others take what it wrote.
        if not directory.exists():
            raise


def _watched(source: Source, progress: Progress) -> Iterator[dict[str, Any]]:
    for done, row in enumerate(source.rows):
        if done % 1000 == 0:
            progress("rows tokenised", done, len(source.rows))
        yield row
    progress("rows tokenised", len(source.rows), len(source.rows))


def _fingerprint(source: Source, preparation: Preparation) -> str:
    tokenizer, data = preparation.tokenizer, preparation.data
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "source": source.fingerprint,
        # What the vocabulary and its rules are, not where they came from.
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "data": data.model_dump(mode="json", exclude={"path", "config", "split", "revision", "chat_template"}),
        "max_tokens": preparation.max_tokens,
        "end_token_ids": list(preparation.end_token_ids),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
