"""What the engine tells, as OpenAI's API says it: whole answers, and the chunks of a stream.

Every choice, and every chunk of one, has a field `ptp` of ours: what the adapter did for it.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat import chat_completion as chat_types
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import CompletionChoice, Logprobs
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from ptp.server.engine import Call, Token, Totals

FinishReason = Literal["stop", "length"]

LEAST_LOGPROB = -9999.0
"""JSON has no −∞; OpenAI's API writes this."""


class TotalReport(BaseModel):
    """Of a finished choice; see `ptp.server.engine.Totals`. seed, sequence: the stream of u that chose its tokens."""

    seed: int
    sequence: int
    num_calls: int
    num_draft_tokens: int
    num_accepted_tokens: int
    tokens_per_call: float
    seconds: float
    tokens_per_second: float | None


class CallReport(BaseModel):
    """Of one call. pieces: the chunk's text as (text, number of the call that wrote it, an accepted draft or not)."""

    num_tokens: int
    num_drafts: int
    num_accepted: int
    pieces: list[tuple[str, int, bool]]
    total: TotalReport | None


class ChatChoice(chat_types.Choice):
    ptp: TotalReport


class ChatChunkChoice(chunk_types.Choice):
    ptp: CallReport | None = None


class TextChoice(CompletionChoice):
    ptp: TotalReport


class TextChunkChoice(CompletionChoice):
    # In a stream it comes with the last chunk; openai's type knows only whole answers.
    finish_reason: FinishReason | None  # type: ignore[assignment]
    ptp: CallReport


@dataclass
class Writer(ABC):
    """Writes the answers to one request. seed: of its choices; choice i is the sequence i."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    num_prompt_tokens: int
    seed: int
    num_tokens: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> CompletionUsage:
        """Tokens so far."""
        total = self.num_prompt_tokens + self.num_tokens
        return CompletionUsage(
            prompt_tokens=self.num_prompt_tokens, completion_tokens=self.num_tokens, total_tokens=total
        )

    @abstractmethod
    def begin(self, index: int) -> BaseModel | None:
        """The chunk before those of a choice's calls."""

    @abstractmethod
    def chunk(self, index: int, call: Call) -> BaseModel:
        """What a call adds to a choice."""

    @abstractmethod
    def usage_chunk(self) -> BaseModel:
        """The chunk behind all others that counts tokens."""

    @abstractmethod
    def whole(self, choices: Sequence[Sequence[Call]]) -> BaseModel:
        """The answer with all calls of each choice."""

    def total(self, index: int, totals: Totals) -> TotalReport:
        return TotalReport(
            seed=self.seed,
            sequence=index,
            num_calls=totals.num_calls,
            num_draft_tokens=totals.num_draft_tokens,
            num_accepted_tokens=totals.num_accepted_tokens,
            tokens_per_call=totals.tokens_per_call,
            seconds=totals.seconds,
            tokens_per_second=totals.tokens_per_second,
        )

    def report(self, index: int, call: Call) -> CallReport:
        self.num_tokens += len(call.tokens)
        return CallReport(
            num_tokens=len(call.tokens),
            num_drafts=call.num_drafts,
            num_accepted=call.num_accepted,
            pieces=[(piece.text, piece.call, piece.accepted) for piece in call.pieces],
            total=self.total(index, call.totals) if call.totals else None,
        )

    def last(self, index: int, calls: Sequence[Call]) -> tuple[TotalReport, FinishReason]:
        """What a choice's last call says of all of them."""
        self.num_tokens += sum(len(call.tokens) for call in calls)
        totals, reason = calls[-1].totals, calls[-1].finish_reason
        assert totals is not None and reason is not None
        return self.total(index, totals), cast(FinishReason, reason)

    def token_text(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id]))


class ChatWriter(Writer):
    """/v1/chat/completions"""

    def begin(self, index: int) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index, delta=chunk_types.ChoiceDelta(role="assistant", content=""), finish_reason=None, logprobs=None
        )
        return self._chunk([choice], None)

    def chunk(self, index: int, call: Call) -> ChatCompletionChunk:
        content = self._logprobs(call.tokens)
        choice = ChatChunkChoice(
            index=index,
            delta=chunk_types.ChoiceDelta(content=call.text),
            finish_reason=cast(FinishReason | None, call.finish_reason),
            logprobs=None if content is None else chunk_types.ChoiceLogprobs(content=content),
            ptp=self.report(index, call),
        )
        return self._chunk([choice], None)

    def usage_chunk(self) -> ChatCompletionChunk:
        return self._chunk([], self.usage())

    def _chunk(self, choices: Sequence[chunk_types.Choice], usage: CompletionUsage | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=f"chatcmpl-{self.id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=list(choices),
            usage=usage,
        )

    def whole(self, choices: Sequence[Sequence[Call]]) -> ChatCompletion:
        return ChatCompletion(
            id=f"chatcmpl-{self.id}",
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(index, calls) for index, calls in enumerate(choices)],
            usage=self.usage(),
        )

    def _choice(self, index: int, calls: Sequence[Call]) -> chat_types.Choice:
        total, reason = self.last(index, calls)
        content = self._logprobs([token for call in calls for token in call.tokens])
        text = "".join(call.text for call in calls)
        return ChatChoice(
            index=index,
            message=ChatCompletionMessage(role="assistant", content=text),
            finish_reason=reason,
            logprobs=None if content is None else chat_types.ChoiceLogprobs(content=content),
            ptp=total,
        )

    def _logprobs(self, tokens: Sequence[Token]) -> list[ChatCompletionTokenLogprob] | None:
        return [self._logprob(token) for token in tokens] if _told(tokens) else None

    def _logprob(self, token: Token) -> ChatCompletionTokenLogprob:
        assert token.logprobs is not None
        own = self._entry(token.id, token.logprobs.token)
        best = [self._entry(token_id, value) for token_id, value in token.logprobs.most_likely]
        return ChatCompletionTokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=best)

    def _entry(self, token_id: int, logprob: float) -> TopLogprob:
        text = self.token_text(token_id)
        # Of half a character the bytes are not known here.
        content = None if "�" in text else list(text.encode())
        return TopLogprob(token=text, logprob=max(logprob, LEAST_LOGPROB), bytes=content)


class CompletionWriter(Writer):
    """/v1/completions"""

    def begin(self, index: int) -> None:
        return None

    def chunk(self, index: int, call: Call) -> Completion:
        choice = TextChunkChoice(
            index=index,
            text=call.text,
            finish_reason=cast(FinishReason | None, call.finish_reason),
            logprobs=self._logprobs(call.tokens),
            ptp=self.report(index, call),
        )
        return self._completion([choice], None)

    def usage_chunk(self) -> Completion:
        return self._completion([], self.usage())

    def whole(self, choices: Sequence[Sequence[Call]]) -> Completion:
        return self._completion([self._choice(index, calls) for index, calls in enumerate(choices)], self.usage())

    def _choice(self, index: int, calls: Sequence[Call]) -> CompletionChoice:
        total, reason = self.last(index, calls)
        logprobs = self._logprobs([token for call in calls for token in call.tokens])
        text = "".join(call.text for call in calls)
        return TextChoice(index=index, text=text, finish_reason=reason, logprobs=logprobs, ptp=total)

    def _completion(self, choices: Sequence[CompletionChoice], usage: CompletionUsage | None) -> Completion:
        return Completion(
            id=f"cmpl-{self.id}",
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=list(choices),
            usage=usage,
        )

    def _logprobs(self, tokens: Sequence[Token]) -> Logprobs | None:
        if not _told(tokens):
            return None
        told = [token.logprobs for token in tokens if token.logprobs]
        best = [{self.token_text(each): max(value, LEAST_LOGPROB) for each, value in one.most_likely} for one in told]
        return Logprobs(
            tokens=[self.token_text(token.id) for token in tokens],
            token_logprobs=[max(one.token, LEAST_LOGPROB) for one in told],
            top_logprobs=best,
            text_offset=[token.offset for token in tokens],
        )


def _told(tokens: Sequence[Token]) -> bool:
    return bool(tokens) and tokens[0].logprobs is not None
