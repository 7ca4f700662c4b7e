"""Compiled calls: the same text, and nothing compiled again after the first calls."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from architectures import FAMILIES
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from ptp.config import PTPConfig
from ptp.decoding import decoder as decoder_module
from ptp.decoding.decoder import Decoder
from ptp.decoding.device import Functions, draft, settle
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.decoding.session import Session
from ptp.model.gated_lora import lora_layers
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

RULE = SamplingRule(temperature=0.8)


@pytest.fixture(autouse=True)
def forget() -> None:
    """What is compiled of a function counts for all models of a process together."""
    torch.compiler.reset()


class Inspected:
    """A compiler that runs what it is given as it is, and notes of each graph's inputs which keep their place."""

    def __init__(self) -> None:
        self.inputs: list[list[tuple[str, Tensor, bool]]] = []

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes = graph.graph.find_nodes(op="placeholder")
        self.inputs.append(
            [
                (node.name, value, "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}))
                for node, value in zip(nodes, inputs, strict=True)
                if isinstance(value, Tensor)
            ]
        )
        return graph.forward


def traced(model: PTPModel, backend: Any = "eager", fullgraph: bool = True) -> Functions:
    """Calls traced as for the compiler, with the same guards on when to trace anew, but run as they are."""
    compiled = partial(torch.compile, dynamic=False, fullgraph=fullgraph, backend=backend)
    return Functions(compiled(model.base_model.get_decoder()), compiled(settle), compiled(draft))


def write(session: Session, base: PreTrainedModel, prompt: list[int], num_tokens: int, seed: int) -> None:
    request = make_request(base, prompt, num_tokens, seed, end_token_ids=[])
    text = session.enter(request)
    while text in session.texts:
        session.step()
    assert text.tokens[len(prompt) :] == decode_plainly(base, request, RULE)


def check(base: PreTrainedModel, random_adapter: Callable, variant: str, num_slots: int) -> None:
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(variant=variant, window=5)), std=0.3)
    model.survival = tuple(0.8**k for k in range(1, model.ptp_config.num_drafts + 1))
    session = Decoder(model, RULE, budget=8, compile=True).session(num_slots)
    write(session, base, [1, 2, 3], 30, seed=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        write(session, base, [1, 2, 3, 4, 5], 60, seed=1)
        write(session, base, [4], 1, seed=2)
        # Beside another text, where there is room for one.
        if num_slots > 1:
            session.enter(make_request(base, [2] * 20, 300, 3, end_token_ids=[]))
        write(session, base, [5] * 30, 25, seed=4)


@pytest.mark.parametrize(("variant", "num_slots"), [("categorical", 1), ("one_hot", 1), ("one_hot", 3)])
def test_no_call_is_traced_again_whatever_the_texts(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable, random_adapter: Callable, variant: str, num_slots: int
) -> None:
    monkeypatch.setattr(decoder_module, "compiled_functions", traced)
    check(tiny_llama(20), random_adapter, variant, num_slots)


def test_a_free_slot_stands_at_no_position_that_the_model_lacks(
    monkeypatch: pytest.MonkeyPatch, tiny_gpt2: Callable, random_adapter: Callable
) -> None:
    """Learned positions end with the context, and a cache in multiples of some size goes on."""
    monkeypatch.setattr(decoder_module, "compiled_functions", traced)
    base = tiny_gpt2(20, context=64)
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(window=5)), std=0.3)
    session = Decoder(model, RULE, budget=8, compile=True).session(3)
    assert session.step() == []
    write(session, base, [1, 2, 3], 61, seed=0)
    assert session.cache.capacity > 64


@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
@pytest.mark.parametrize("rule", [RULE, SamplingRule(temperature=0.8, top_k=4, top_p=0.9), SamplingRule(temperature=0)])
def test_compiled_calls_draft_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable, random_adapter: Callable, variant: str, rule: SamplingRule
) -> None:
    monkeypatch.setattr(decoder_module, "compiled_functions", traced)
    # Few tokens: drafts are often right by chance.
    model = random_adapter(PTPModel(tiny_llama(6), PTPConfig(variant=variant, window=5)), std=0.1)
    plain, compiled = (
        Decoder(model, rule, budget=8, compile=each).generate([1, 2, 3], 60, end_token_ids=[]) for each in (False, True)
    )
    assert compiled.steps == plain.steps
    assert plain.num_accepted_tokens > (2 if rule.temperature == 0 else 3)


def test_texts_one_after_the_other_write_to_one_cache_that_a_graph_may_be_bound_to(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable, random_adapter: Callable
) -> None:
    """A CUDA graph is given up if it writes to what may move, and copies its other inputs before each call."""
    compiler = Inspected()
    monkeypatch.setattr(decoder_module, "compiled_functions", partial(traced, backend=compiler))
    model = random_adapter(PTPModel(tiny_llama(20), PTPConfig(window=5)), std=0.3)
    decoder = Decoder(model, RULE, budget=8, compile=True)
    decoder.generate([1, 2, 3], 20, end_token_ids=[])
    buffers = [buffer.data_ptr() for layer in decoder.caches[1].layers for buffer in (layer.keys, layer.values)]
    weights = {tensor.data_ptr() for tensor in model.state_dict().values()} | {
        tensor.data_ptr()
        for layer in lora_layers(model.base_model).values()
        for tensor in vars(layer.joined).values()
        if tensor is not None
    }
    with torch.compiler.set_stance("fail_on_recompile"):
        decoder.generate([4, 5], 30, end_token_ids=[])
    assert buffers == [buffer.data_ptr() for layer in decoder.caches[1].layers for buffer in (layer.keys, layer.values)]
    weights |= {tensor.data_ptr() for tensor in vars(decoder.drafter).values() if isinstance(tensor, Tensor)}
    stays = {*buffers, *weights}
    found = [given for graph in compiler.inputs for given in graph]
    assert stays & {value.data_ptr() for _, value, _ in found} > set(buffers)
    moves = [name for name, value, is_static in found if value.data_ptr() in stays and not is_static]
    assert not moves


def test_a_head_that_does_more_than_a_product_runs_between_the_graphs(
    monkeypatch: pytest.MonkeyPatch, random_adapter: Callable
) -> None:
    monkeypatch.setattr(decoder_module, "compiled_functions", partial(traced, fullgraph=False))
    base = next(family for family in FAMILIES if family.model_type == "gemma2").make()
    model = random_adapter(PTPModel(deepcopy(base), PTPConfig(window=5)), std=0.3)
    decoder = Decoder(model, RULE, budget=8, compile=True)
    request = make_request(base, [1, 2, 3], 20, seed=0, end_token_ids=[])
    assert decoder.answer(request).token_ids == decode_plainly(base, request, RULE)


@pytest.mark.slow
def test_compiled_calls_write_the_same_text(tiny_llama: Callable, random_adapter: Callable) -> None:
    check(tiny_llama(20), random_adapter, "one_hot", num_slots=2)
