"""How answers are written: the settings of one text or of a chat, which `/set NAME VALUE` changes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptp.decoding.decoder import Budget
from ptp.decoding.options import request_from
from ptp.decoding.requests import Request
from ptp.errors import ConfigError
from ptp.records import Record, unknown_key
from ptp.sampling import SamplingRule

WARPERS = ("temperature", "top_k", "top_p", "min_p")
"""What of the rule may be set; its order is the adapter's."""


class Settings(Record):
    """rule: how tokens are sampled. stop: texts, each of which ends the answer. budget: see `ptp.decoding.decoder`.

    seed: names the stream of u. The rest is what `GenerationConfig` means by it.
    """

    rule: SamplingRule
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    seed: int = 0
    budget: Budget = "auto"

    def request(
        self,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        sequence: int = 0,
    ) -> Request:
        """What is asked of a decoder. Raises `ConfigError` or `DecodingError` for what cannot be served."""
        config = GenerationConfig(
            repetition_penalty=self.repetition_penalty,
            min_new_tokens=self.min_new_tokens,
            stop_strings=list(self.stop),
        )
        # Not among them: a configuration refuses a length in words of its own.
        config.max_new_tokens = self.max_new_tokens
        request = request_from(
            config, base_model, self.rule, prompt_ids, seed=self.seed, sequence=sequence, tokenizer=tokenizer
        )
        return replace(request, rule=self.rule)

    def changed(self, name: str, value: str) -> Settings:
        """The settings with another value, as it is typed. Raises `ConfigError` for a name or a value that is none."""
        name = name.replace("-", "_")
        if name in WARPERS:
            return self._with(rule=SamplingRule(**{**dict(self.rule), name: value}))
        names = [known for known, _ in self.named()]
        if name not in names:
            raise ConfigError(unknown_key(name, names, "/set"))
        if name == "budget" and value != "auto" and not value.isdecimal():
            raise ConfigError(f"budget must be auto or a number from 0 up; got {value!r}")
        if name == "seed" and not value.isdecimal():
            raise ConfigError(f"seed must be a number from 0 up; got {value!r}")
        return self._with(**{name: _texts(value) if name == "stop" else value})

    def named(self) -> Iterator[tuple[str, object]]:
        """Every setting by the name it has in `/set`."""
        for name in WARPERS:
            yield name, getattr(self.rule, name)
        for name in type(self).model_fields:
            if name != "rule":
                yield name, getattr(self, name)

    def _with(self, **changes: Any) -> Settings:
        return Settings(**{**dict(self), **changes})


def _texts(value: str) -> tuple[str, ...]:
    r"""Words as a shell would part them, \n in them a line break; "off" for none.

    '"\n\n" END' are a blank line and END.
    """
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ConfigError(f"stop: {str(error).lower()} in {value!r}") from None
    return () if words == ["off"] else tuple(word.replace(r"\n", "\n") for word in words)
