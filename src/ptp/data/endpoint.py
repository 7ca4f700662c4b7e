"""An OpenAI-compatible server (vLLM, SGLang, …) as the engine that samples the base model's completions.

    requests ── those not in the journal ──► /completions ──► answer, or why it is left out ──► a line of the journal

Prompts travel as token ids, so the server adds nothing to them. An answer is in the journal before the next one is
asked for: whatever stops a run, running it again asks only for what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from ptp.config import Endpoint
from ptp.errors import ConfigError, DataError
from ptp.sampling import SamplingRule

if TYPE_CHECKING:
    from openai import APIStatusError

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection; a server that is there accepts at once, however busy it is."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before a malformed reply is asked for again: doubled each time, as openai's client does for other faults."""

NO_KEY = "EMPTY"
"""Sent where the key's variable is not set: the client insists on a key, servers without one ignore it."""

MOST_WORDS = 300
"""Characters of a server's message that are passed on."""

SHOWN_IDS = 4
"""Token ids shown of a prompt: enough to see a doubled beginning."""

REPLACEMENT = "\ufffd"
"""Stands in a text for bytes that are no whole character; which tokens they were is lost."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for. number: its sequence number. seed: passed on to the server."""

    number: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """One completion. ids: the tokens after the prompt, with the end token if `finished`."""

    number: int
    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Outcome:
    """What came of the requests: answers in order of number, and how many were left out for which reason."""

    answers: list[Answer]
    left_out: Counter[str]


def complete(
    endpoint: Endpoint,
    requests: Sequence[Request],
    rule: SamplingRule,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Sequence[int],
    journal: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Ask the endpoint for every completion that `journal` does not hold yet.

    The server samples by temperature, top-k, top-p and min-p of the rule; intervals are not known. A server that
    ignores one of them without a word cannot be told from one that obeys.

    Raises `ConfigError` if the openai package is missing; `DataError` if the endpoint refuses a request or stays
    unreachable, or the journal is corrupt, full or of other requests. Answers that came are kept.
    """
    keys = {request.number: _key(endpoint, rule, request) for request in requests}
    settled = {entry.number for entry in _entries(journal, keys)}
    todo = [request for request in requests if request.number not in settled]
    vocab_size = 1 + max(tokenizer.get_vocab().values())

    def keep(request: Request, choice: _Choice) -> None:
        answer = read_choice(choice, request, tokenizer, vocab_size, end_token_ids)
        _append(journal, _Entry.of(request.number, keys[request.number], answer))
        settled.add(request.number)
        progress(len(settled), len(requests))

    progress(len(settled), len(requests))
    if todo:
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(_ask_all(_Server(endpoint, rule), todo, endpoint.concurrency, keep))
        except DataError as error:
            kept = f"{len(settled)} of {len(requests)} completions are kept"
            raise DataError(f"{error}; {kept}; run the command again to go on") from None
    # By number: two runs at the same time may have written an answer twice.
    entries = [entry for _, entry in sorted({entry.number: entry for entry in _entries(journal, keys)}.items())]
    return Outcome(
        answers=[Answer(entry.number, entry.ids, entry.finished) for entry in entries if entry.left_out is None],
        left_out=Counter(entry.left_out for entry in entries if entry.left_out is not None),
    )


class _Choice(BaseModel):
    """The part of a reply that is read. Ids are vLLM's; the end token is `stop_reason` there, `matched_stop` in SGLang.

    Any other finish reason (vLLM's "abort") is that of a completion cut by the server: not a reply to keep.
    """

    model_config = ConfigDict(strict=True)

    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True)

    choices: list[_Choice] = Field(min_length=1, max_length=1)


def read_choice(
    choice: _Choice,
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    end_token_ids: Sequence[int],
) -> Answer | str:
    """The answer in a reply, or why there is none.

    Nothing after the first end token is kept. A completion that the server calls stopped, without saying by what,
    stopped at the only end token, or of several at the tokenizer's.
    """
    if choice.finish_reason == "content_filter":
        return "withheld by the server's content filter"
    ids = choice.token_ids
    if not ids:
        # A completion cut at its last token may be cut within a character.
        text = choice.text.rstrip(REPLACEMENT) if choice.finish_reason == "length" else choice.text
        ids = retokenize(text, request.prompt_ids, tokenizer)
    if ids is None:
        return "text that no tokens give back exactly"
    if not all(0 <= token < vocab_size for token in ids):
        return "token ids outside the vocabulary"
    ends = set(end_token_ids)
    if choice.finish_reason == "stop":
        reason = choice.stop_reason if choice.stop_reason is not None else choice.matched_stop
        if reason is None:
            reason = end_token_ids[0] if len(ends) == 1 else tokenizer.eos_token_id
        if reason in ends:
            ids = [*ids, reason]
    length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    ids = ids[: min(length, request.max_new_tokens)]
    if not ids:
        return "empty"
    return Answer(request.number, tuple(ids), finished=ids[-1] in ends)


def retokenize(text: str, prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Token ids that continue the prompt with exactly this text, or None if none are found.

    The text is tokenised alone. Tokenizers that mark where a text begins (SentencePiece has "▁Hello" there for
    "Hello") need more: behind the prompt's last words, those after its last added token such as <s>, which must keep
    their ids; or without the space it begins with, for which that mark then stands. Each way counts only if prompt
    and completion decoded together are the prompt's text and then this text.

    Where several segmentations give the same text, another one than the model sampled may be found.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    if REPLACEMENT in text:
        return None
    prompt, added = list(prompt_ids), tokenizer.added_tokens_decoder
    last_words = prompt[1 + max((place for place, token in enumerate(prompt) if token in added), default=-1) :]
    for before, words in (([], text), (last_words, text), ([], text.removeprefix(" "))):
        together = list(tokenizer(decode(before) + words, add_special_tokens=False)["input_ids"])
        ids = together[len(before) :]
        if together[: len(before)] == before and decode(prompt + ids) == decode(prompt) + text:
            return ids
    return None


class _Server:
    """The endpoint, asked for one completion at a time; remembers whether it takes settings beyond OpenAI's own.

    Faults that may pass are repeated: by openai's client (no connection, dropped, timeout, 408, 409, 429 with
    Retry-After, 5xx), and here what it takes for success (replies that are no completion).
    """

    def __init__(self, endpoint: Endpoint, rule: SamplingRule) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError("an endpoint needs the openai package; pip install openai") from None
        self.endpoint, self.rule = endpoint, rule
        self.client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=os.environ.get(endpoint.api_key_env) or NO_KEY,
            max_retries=endpoint.max_retries,
            # Requests beyond the client's pool of connections wait in it for as long as the others take.
            timeout=openai.Timeout(endpoint.timeout, connect=min(endpoint.timeout, CONNECT_TIMEOUT), pool=None),
        )
        # top-k and min-p are part of the rule where they are on. The rest could be done without: servers may otherwise
        # take penalties and truncations from the model's generation_config; ids and special tokens make answers exact.
        # vLLM and SGLang both switch top-k off by −1; older ones refuse 0.
        warpers: dict[str, object] = {"top_k": rule.top_k or -1, "min_p": rule.min_p}
        self.required = {name: value for name, value in warpers.items() if getattr(rule, name)}
        self.optional: dict[str, object] = {
            **{name: value for name, value in warpers.items() if name not in self.required},
            "repetition_penalty": 1.0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }

    async def ask(self, request: Request) -> _Choice:
        """Raises `DataError` if the server refuses, or every try has failed."""
        import openai

        wrong = ""
        for attempt in range(self.endpoint.max_retries + 1):
            if attempt:
                pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.75, 1))
            try:
                choice = _Reply.model_validate_json(await self._post(request)).choices[0]
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                wrong = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
            except openai.APIStatusError as error:
                raise self._error(f"prompt {request.number}: {_words(error)}{self._hint(error)}") from None
            except openai.APIConnectionError as error:
                raise self._error(f"{error.message} {error.__cause__ or ''}") from None
            else:
                self._check_prompt(choice, request)
                return choice
        raise self._error(f"replies are no completions ({wrong})")

    async def _post(self, request: Request) -> bytes:
        """The body of a reply of status 200."""
        import openai

        optional = self.optional
        try:
            return await self._send(request, optional)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if not optional:
                raise
        # If one of these settings was refused, this succeeds; if the request itself was, it says so again.
        body = await self._send(request, {})
        self.optional = {}
        return body

    async def _send(self, request: Request, optional: dict[str, object]) -> bytes:
        # The raw reply: openai builds its records without checking, and hands on a body that is not JSON as it is.
        reply = await self.client.completions.with_raw_response.create(
            model=self.endpoint.model,
            prompt=list(request.prompt_ids),
            max_tokens=request.max_new_tokens,
            seed=request.seed,
            temperature=self.rule.temperature,
            top_p=self.rule.top_p,
            extra_body={**self.required, **optional},
        )
        return reply.http_response.content

    def _check_prompt(self, choice: _Choice, request: Request) -> None:
        seen = choice.prompt_token_ids
        if seen is not None and seen != list(request.prompt_ids):
            raise self._error(
                f"prompt {request.number}: sent {_start(request.prompt_ids)}, the server saw {_start(seen)}; "
                "it must take token ids as they are"
            )

    def _hint(self, error: APIStatusError) -> str:
        if error.status_code in (401, 403):
            return f"; the key is read from the environment variable {self.endpoint.api_key_env}"
        if error.status_code == 404:
            return f"; url is the base address, such as http://host:8000/v1, and model '{self.endpoint.model}' its name"
        return ""

    def _error(self, message: str) -> DataError:
        return DataError(f"endpoint {self.endpoint.url}: {' '.join(message.split()).rstrip('. ')}")


def _start(ids: Sequence[int]) -> str:
    return f"{len(ids)} tokens ({', '.join(map(str, ids[:SHOWN_IDS]))} …)"


def _words(error: APIStatusError) -> str:
    """Status and words of the server, on one line."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    words = str(said or error.response.text or error.response.reason_phrase)
    return f"{error.status_code} {textwrap.shorten(words, MOST_WORDS, placeholder=' …')}"


async def _ask_all(
    server: _Server, requests: Sequence[Request], concurrency: int, keep: Callable[[Request, _Choice], None]
) -> None:
    """Ask for all, `concurrency` at a time; the first error ends it."""
    waiting = iter(requests)

    async def work() -> None:
        for request in waiting:
            keep(request, await server.ask(request))

    async with server.client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(requests))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


class _Entry(BaseModel):
    """A line of the journal: an answer, or why it is left out. key: hash of what was asked."""

    model_config = ConfigDict(strict=True, extra="forbid")

    number: int
    key: str
    ids: tuple[int, ...] = ()
    finished: bool = False
    left_out: str | None = None

    @classmethod
    def of(cls, number: int, key: str, answer: Answer | str) -> _Entry:
        if isinstance(answer, str):
            return cls(number=number, key=key, left_out=answer)
        return cls(number=number, key=key, ids=answer.ids, finished=answer.finished)


def _key(endpoint: Endpoint, rule: SamplingRule, request: Request) -> str:
    """Hash of all that a completion depends on."""
    sampling = [rule.temperature, rule.top_k, rule.top_p, request.seed]
    # Journals begun before there was min-p hold keys without it.
    sampling += [rule.min_p] if rule.min_p else []
    asked = [endpoint.model, sampling, request.prompt_ids, request.max_new_tokens]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _entries(journal: Path, keys: dict[int, str]) -> Iterator[_Entry]:
    """Entries of the requests with these keys by number; a last line cut short by a kill is cut off the file."""
    if not journal.exists():
        return
    whole = 0
    with journal.open("r+b") as file:
        for place, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                file.truncate(whole)
                return
            whole += len(line)
            try:
                entry = _Entry.model_validate_json(line)
            except ValidationError:
                raise DataError(f"{journal}, line {place}: not a completion; remove the line") from None
            if entry.number not in keys:
                continue
            if entry.key != keys[entry.number]:
                raise DataError(
                    f"{journal}, line {place}: made with another prompt, model, seed, length or sampling rule; "
                    "remove the file or use another experiment directory"
                )
            yield entry


def _append(journal: Path, entry: _Entry) -> None:
    """Add a line, whole or not at all."""
    line = entry.model_dump_json(exclude_none=True).encode() + b"\n"
    length = journal.stat().st_size if journal.exists() else 0
    try:
        with journal.open("ab") as file:
            file.write(line)
    except OSError as error:
        if journal.exists():
            os.truncate(journal, length)
        raise DataError(f"cannot write {journal}: {error.strerror}") from None
