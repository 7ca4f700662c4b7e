"""Transformers' own `generate`, several tokens per call.

    faster = ptp.custom_generate("experiments/demo")
    model.generate(**inputs, custom_generate=faster, max_new_tokens=64)

    model.generate ── config, processors, criteria ──► a request for each row ── Decoder ──► ids, padded on the right

The text is the one `generate` would have sampled with the same u. The adapter acts on the caller's own model, which
has its own layers again when the call is over.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ptp.decoding.decoder import Budget, Decoder, Generation
from ptp.decoding.options import sampling_rule
from ptp.decoding.requests import Request, make_request
from ptp.decoding.session import Step
from ptp.errors import AdapterError, ConfigError, DecodingError
from ptp.model.gated_lora import GatedLoRA, installed, lora_layers
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

TAKEN_OVER = {"attention_mask", "position_ids", "past_key_values"}
"""Arguments of the model's forward that have their meaning here; see `_padding` and `_check_inputs`."""

NO_EFFECT = {"use_cache", "logits_to_keep"}
"""Those on which no token depends."""

SEEDS = 2**62
"""Where no seed is given, torch's generator draws one below this."""


@dataclass
class ParallelOutput(GenerateDecoderOnlyOutput):
    """What `return_dict_in_generate` gives: `sequences`, and how each row was written."""

    generations: list[Generation] | None = None


def custom_generate(adapter: str | Path | PTPModel, budget: Budget = "auto") -> ParallelGenerate:
    """What `model.generate` of transformers takes as `custom_generate`, to write several tokens per call.

    adapter: an adapter or experiment directory, an adapter's hub id, or a PTP model around that very `model`. budget:
    see `Decoder`. Loaded at the first call; keep it for the next ones.
    """
    return ParallelGenerate(adapter, budget)


class ParallelGenerate:
    """Decodes the rows of a batch, each by the rule, processors and criteria that `generate` has prepared.

    Rows are texts of their own: a processor or criterion sees one row at a time, padding included, and only the tokens
    that stay. Raises `ConfigError` for an option that cannot be served (see `ptp.decoding.options`), `AdapterError` if
    the adapter was made for another model.
    """

    def __init__(self, adapter: str | Path | PTPModel, budget: Budget, **where: Any) -> None:
        self.adapter, self.budget, self.where = adapter, budget, where
        self.model: PTPModel | None = None
        self.layers: dict[str, GatedLoRA] = {}
        self.decoder: Decoder | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> Tensor | ParallelOutput:
        """Called by `generate`. input_ids: (B, S), padded on the left. Returns (B, S + new tokens).

        seed: names the stream of u, of which row i is the sequence i; without one, torch's generator draws it.
        """
        streamer = streamer or argument_of_generate("streamer")
        _check_inputs(model_kwargs)
        config = copy(generation_config)
        config.num_return_sequences, config.return_dict_in_generate = 1, False  # rows of their own; `ParallelOutput`
        if seed is None:
            seed = int(torch.randint(SEEDS, ())) if config.do_sample else 0
        with self._serving(model) as ptp_model:
            rule = sampling_rule(config, ptp_model.rule or SamplingRule())
            processors = logits_processor[: len(logits_processor) - _num_warpers(config)]
            requests = [
                _request(model, ids, padding, seed, row, rule, processors, stopping_criteria)
                for row, (ids, padding) in enumerate(zip(input_ids, _padding(input_ids, model_kwargs), strict=True))
            ]
            steps = _steps(self._decoder(ptp_model, rule), requests, config.pad_token_id, streamer)
        rows = [[token for step in row for token in step.token_ids] for row in steps]
        longest = max(map(len, rows))
        written = torch.tensor([_column(rows, place, config.pad_token_id) for place in range(longest)])
        sequences = torch.cat([input_ids, written.t().to(input_ids.device)], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return ParallelOutput(sequences=cast(Any, sequences), generations=[Generation.of(row) for row in steps])

    @contextmanager
    def _serving(self, model: PreTrainedModel) -> Iterator[PTPModel]:
        """The PTP model around the caller's inside the block; outside, the caller's is as it was."""
        training = [module for module in model.modules() if module.training]
        try:
            if isinstance(self.adapter, PTPModel):
                if self.adapter.base_model is not model:
                    raise AdapterError("the PTP model is around another model: call generate on its `base_model`")
                yield self.adapter.eval()
                return
            if self.model is None or not self._fits(self.model, model):
                self.model, self.decoder = self._load(model, self.adapter), None
            with installed(model, self.layers):
                yield self.model.eval()
        finally:
            for module in training:
                module.training = True

    def _load(self, model: PreTrainedModel, adapter: str | Path) -> PTPModel:
        if lora_layers(model):
            raise AdapterError("the model carries an adapter already; give ptp.custom_generate the PTPModel around it")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with _own_random_numbers(model):
                return PTPModel.from_pretrained(adapter, model, **self.where)
        finally:
            self.layers = lora_layers(model)
            for name, layer in self.layers.items():
                model.set_submodule(name, layer.base)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _fits(self, loaded: PTPModel, model: PreTrainedModel) -> bool:
        """Whether what was loaded is around this model, with the same layers, and where they are."""
        return loaded.base_model is model and all(
            model.get_submodule(name) is layer.base and layer.lora_A.device == layer.base.weight.device
            for name, layer in self.layers.items()
        )

    def _decoder(self, model: PTPModel, rule: SamplingRule) -> Decoder:
        if self.decoder is None:
            with _own_random_numbers(model.base_model):
                self.decoder = Decoder(model, rule, self.budget)
        for layer in self.layers.values():
            if layer.is_outdated:
                layer.join()
        return self.decoder


def generate_of_repository(model: PreTrainedModel, budget: Budget = "auto", **arguments: Any) -> Any:
    """`model.generate` with the adapter that it was given by name, as `custom_generate`.

    Called by the custom_generate/generate.py of adapters (see `ptp.model.repository`), those published long ago
    included. arguments: all others of `generate`; revision and token are the hub's.
    """
    name = argument_of_generate("custom_generate")
    where = {key: arguments.pop(key, None) for key in ("revision", "token")}
    kept = vars(model).get("_ptp_generate")
    if kept is None or (kept.adapter, kept.budget, kept.where) != (name, budget, where):
        # With the model, so that neither outlives the other.
        kept = model._ptp_generate = ParallelGenerate(name, budget, **where)  # type: ignore[assignment]
    arguments = _with_stop_strings(model, **arguments)
    return model.generate(**arguments, custom_generate=kept)  # type: ignore[operator]


def argument_of_generate(name: str) -> Any:
    """An argument of the `generate` that is running; None if none is.

    Transformers gives a callable no streamer, and a repository's code not the repository's name.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals.get(name)


def _own_random_numbers(model: PreTrainedModel) -> AbstractContextManager[None]:
    """A block in which new modules are filled, with numbers that the caller does not miss afterwards."""
    return torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])


def _with_stop_strings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Arguments of `generate` with the stop strings among the criteria: for a callable it loses the tokenizer."""
    strings = stop_strings or (generation_config and generation_config.stop_strings)
    if strings and tokenizer is not None:
        stopping_criteria = [*(stopping_criteria or ()), StopStringCriteria(tokenizer, strings)]
        stop_strings, generation_config = None, copy(generation_config)
        if generation_config is not None:
            generation_config.stop_strings = None
    criteria = None if stopping_criteria is None else StoppingCriteriaList(stopping_criteria)
    named = {"generation_config": generation_config, "stopping_criteria": criteria, "stop_strings": stop_strings}
    return others | {key: value for key, value in named.items() if value is not None}


def _check_inputs(model_kwargs: dict[str, Any]) -> None:
    """Raises `ConfigError` for an input that would change the text and is not heeded."""
    for name, value in model_kwargs.items():
        if value is not None and value is not False and name not in TAKEN_OVER | NO_EFFECT:
            raise ConfigError(f"{name} cannot be decoded with: a text is a function of input_ids and attention_mask")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError("past_key_values holds a text already: leave it out and pass the whole text as input_ids")


def _padding(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[int]:
    """How many tokens before each row's text are padding."""
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.int64)
    num_padding = (mask == 0).sum(1)
    if mask.shape != input_ids.shape or not torch.equal(mask.cumsum(1).clamp(max=1), mask):
        raise ConfigError("attention_mask must leave out padding on the left alone (padding_side='left')")
    positions = model_kwargs.get("position_ids")
    text = mask.bool()
    if positions is not None and not torch.equal(positions.expand_as(mask)[text], (mask.cumsum(1) - 1)[text]):
        raise ConfigError("position_ids must count each row's tokens from 0 on; leave them out")
    return num_padding.tolist()


def _num_warpers(config: GenerationConfig) -> int:
    """How many processors at the end of the prepared ones do what the sampling rule does, or normalise."""
    changes = {
        TemperatureLogitsWarper: config.temperature not in (None, 1),
        TopKLogitsWarper: config.top_k not in (None, 0),
        TopPLogitsWarper: config.top_p is not None and config.top_p < 1,
        MinPLogitsWarper: config.min_p is not None,
    }
    return sum(changes.values()) * bool(config.do_sample) + (config.renormalize_logits is True)


def _request(
    model: PreTrainedModel,
    ids: Tensor,
    num_padding: int,
    seed: int,
    row: int,
    rule: SamplingRule,
    processors: Sequence[LogitsProcessor],
    criteria: Sequence[StoppingCriteria],
) -> Request:
    """One row, (S,): its text, and what `generate` prepared for it."""
    own = LogitsProcessorList([_of_row(processor, row) for processor in processors])
    ends, max_length, others = list[int](), sys.maxsize, StoppingCriteriaList()
    for criterion in criteria:
        # These two are known to a request by what they are, and cost nothing there.
        if type(criterion) is EosTokenCriteria:
            ends += criterion.eos_token_id.tolist()
        elif type(criterion) is MaxLengthCriteria:
            max_length = min(max_length, criterion.max_length)
        else:
            others.append(criterion)
    padding = ids[:num_padding].unsqueeze(0)
    return make_request(
        model,
        ids[num_padding:],
        max_length - len(ids),
        seed,
        row,
        ends,
        processors=[_Padded(own, padding)] if own else [],
        stopping=[_PaddedStopping(others, padding)] if others else [],
        rule=rule,
    )


class _Padded(LogitsProcessor):
    """Processors that see a row as transformers shows it: behind its padding, (1, n), and where the inputs lie."""

    def __init__(self, processors: LogitsProcessorList, padding: Tensor) -> None:
        self.processors, self.padding = processors, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = torch.cat([self.padding, input_ids.to(self.padding.device)], dim=1)
        processed = self.processors(cast(Any, ids), cast(Any, scores.to(self.padding.device)))
        return processed.to(scores.device)


class _PaddedStopping(StoppingCriteria):
    """The same of stopping criteria."""

    def __init__(self, criteria: StoppingCriteriaList, padding: Tensor) -> None:
        self.criteria, self.padding = criteria, padding

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ids = torch.cat([self.padding, input_ids.to(self.padding.device)], dim=1)
        return self.criteria(cast(Any, ids), scores).to(input_ids.device)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A processor for one row alone; two of transformers' know rows by their number."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, int(processor.prompt_ignore_length[row]))
    return processor


def _steps(
    decoder: Decoder, requests: Sequence[Request], padding: int | None, streamer: BaseStreamer | None
) -> list[list[Step]]:
    """Decode rows together. The streamer gets (B,) tokens as soon as every row has its next, or has ended."""
    steps: list[list[Step]] = [[] for _ in requests]
    rows: list[list[int]] = [[] for _ in requests]
    unfinished, num_put = set(range(len(requests))), 0
    for number, step in decoder.steps_of(requests, len(requests)):
        steps[number].append(step)
        rows[number] += step.token_ids
        if step.finish_reason is not None:
            unfinished.remove(number)
        ready = min((len(rows[row]) for row in unfinished), default=max(map(len, rows)))
        if streamer is not None:
            for place in range(num_put, ready):
                streamer.put(torch.tensor(_column(rows, place, padding)))
            num_put = max(num_put, ready)
    if streamer is not None:
        streamer.end()
    return steps


def _column(rows: Sequence[Sequence[int]], place: int, padding: int | None) -> list[int]:
    """The tokens of all rows at a place, padding where a row has ended."""
    if padding is None and any(place >= len(row) for row in rows):
        raise DecodingError("the rows end at different lengths and there is no token to fill them: set pad_token_id")
    return [row[place] if place < len(row) else cast(int, padding) for row in rows]
