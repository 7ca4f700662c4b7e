from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from ptp.config import PTPConfig
from ptp.errors import PTPError
from ptp.model.auxiliary import EMBEDDINGS
from ptp.model.ptp_model import PTPModel

WINDOW = 4
LENGTHS = [[5, 9, 3], [12, 4]]
SIZE = 18
STARTS = torch.tensor([[2, 6, 7, 12, 16], [1, 5, 11, 13, 14]])


def packed() -> dict[str, Tensor]:
    """Two rows of documents with padding behind, windows that overlap, start early and run over their ends."""
    generator = torch.Generator().manual_seed(1)
    document, positions = torch.full((2, SIZE), -1), torch.zeros(2, SIZE, dtype=torch.int64)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths):
            document[row, begin : begin + length] = number
            positions[row, begin : begin + length] = torch.arange(length)
            begin += length
    ids = torch.randint(40, (2, SIZE), generator=generator)
    u = torch.rand(*STARTS.shape, WINDOW, generator=generator)
    return {"ids": ids, "document": document, "positions": positions, "starts": STARTS, "u": u}


def window_logits(model: PTPModel, batch: dict[str, Tensor]) -> Tensor:
    """(B, N, L, V)."""
    return model(**batch).windows.unflatten(1, (STARTS.shape[1], WINDOW))


def one_window_alone(model: PTPModel, batch: dict[str, Tensor], row: int, number: int) -> Tensor:
    """(L, V) of one window, with nothing in the call but its document before its start."""
    start = int(batch["starts"][row, number])
    begin = start - int(batch["positions"][row, start])
    context = batch["ids"][row : row + 1, begin:start]
    cache = DynamicCache(config=model.base_model.config)
    model.base_model(input_ids=context, past_key_values=cache)
    inputs = model.auxiliary(batch["u"][row, number])
    anchor = model.token_embedding(context[0, -1])
    if model.ptp_config.anchor == "all":
        inputs = inputs + anchor
    if model.ptp_config.anchor == "first":
        inputs = torch.cat([inputs[:1] + anchor, inputs[1:]])
    first = context.shape[1] - (model.ptp_config.variant == "one_hot")
    positions = torch.arange(first, first + WINDOW).unsqueeze(0)
    with model.gate.opened(0):
        output = model.base_model(inputs_embeds=inputs.unsqueeze(0), position_ids=positions, past_key_values=cache)
    return output.logits[0]


@pytest.fixture
def make_model(tiny_llama: Callable, tiny_gpt2: Callable, random_adapter: Callable) -> Callable[..., PTPModel]:
    def make(base: str = "llama", **settings: object) -> PTPModel:
        bases = {
            "llama": tiny_llama,
            "gpt2": tiny_gpt2,
            "eager llama": lambda: tiny_llama(attention="eager"),
        }
        return random_adapter(PTPModel(bases[base](), PTPConfig(window=WINDOW, lora_rank=4, **settings)), std=0.1)

    return make


@torch.no_grad()
@pytest.mark.parametrize("base", ["llama", "gpt2", "eager llama"])
@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
@pytest.mark.parametrize("anchor", ["none", "first", "all"])
def test_a_packed_window_is_the_same_window_computed_alone(
    make_model: Callable, base: str, variant: str, anchor: str
) -> None:
    model, batch = make_model(base, variant=variant, anchor=anchor), packed()
    logits = window_logits(model, batch)
    for row in range(2):
        for number in range(STARTS.shape[1]):
            alone = one_window_alone(model, batch, row, number)
            torch.testing.assert_close(logits[row, number], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("auxiliary", EMBEDDINGS)
def test_every_embedding_reaches_the_logits_of_its_place_and_later_ones_only(
    make_model: Callable, auxiliary: str
) -> None:
    model, batch = make_model(auxiliary=auxiliary), packed()
    before = window_logits(model, batch)
    batch["u"] = batch["u"].clone()
    batch["u"][0, 1, 2] = (batch["u"][0, 1, 2] + 0.5) % 1
    changed = (window_logits(model, batch) != before).any(-1)
    expected = torch.zeros_like(changed)
    expected[0, 1, 2:] = auxiliary != "none"
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_a_window_depends_on_every_token_of_its_document_before_it_and_on_no_other(make_model: Callable) -> None:
    model, batch = make_model(), packed()
    before = window_logits(model, batch)
    for row in range(2):
        for place in range(SIZE):
            ids = batch["ids"].clone()
            ids[row, place] = (ids[row, place] + 1) % 40
            changed = (window_logits(model, {**batch, "ids": ids}) != before).flatten(2).any(-1)
            own = batch["document"].gather(1, STARTS) == batch["document"][row, place]
            expected = own & (place < STARTS)
            expected[1 - row] = False
            assert torch.equal(changed, expected), (row, place)


@torch.no_grad()
def test_context_logits_are_the_base_model_s_own(make_model: Callable, tiny_llama: Callable) -> None:
    model, batch, base = make_model(), packed(), tiny_llama()
    context = model(**batch, context_logits=True).context
    assert model(**batch).context is None
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            alone = base(input_ids=batch["ids"][row : row + 1, begin : begin + length]).logits[0]
            torch.testing.assert_close(context[row, begin : begin + length], alone, rtol=1e-4, atol=1e-4)
            begin += length


def test_only_the_adapter_learns(make_model: Callable) -> None:
    model = make_model()
    before = deepcopy(model)
    model(**packed()).windows.square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = {name for name, _ in model.named_parameters()}
    assert learning == {name for name in names if "lora_" in name or name.startswith("auxiliary.")}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1).step()
    ids = packed()["ids"]
    assert torch.equal(model.base_model(input_ids=ids).logits, before.base_model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("anchor", "anchored"), [("none", [False] * 4), ("first", [True] + [False] * 3), ("all", [True] * 4)]
)
def test_an_anchor_adds_the_last_context_token_s_embedding(
    make_model: Callable, anchor: str, anchored: list[bool]
) -> None:
    model = make_model(anchor=anchor)
    u, token = torch.rand(WINDOW), torch.full((WINDOW,), 7)
    added = model.add_anchor(model.embed_u(u), token, torch.arange(WINDOW) == 0) - model.auxiliary(u)
    expected = torch.tensor(anchored).unsqueeze(1) * model.token_embedding(torch.tensor(7))
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_untrained_anchored_window_behind_one_token_predicts_as_the_base_does(tiny_llama: Callable) -> None:
    model, batch = PTPModel(tiny_llama(), PTPConfig(variant="one_hot", anchor="first", window=WINDOW)), packed()
    for parameter in model.auxiliary.parameters():
        parameter.zero_()
    output = model(**batch, context_logits=True)
    first = output.windows.unflatten(1, (-1, WINDOW))[:, :, 0]
    before = output.context.gather(1, (STARTS - 1).unsqueeze(-1).expand(-1, -1, 40))
    # With one token of context, the window's first position repeats the only key there is.
    behind_one = batch["positions"].gather(1, STARTS) == 1
    assert behind_one.sum() == 3
    torch.testing.assert_close(first[behind_one], before[behind_one], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["categorical", "one_hot"])
def test_a_window_may_run_past_the_end_of_a_document_as_long_as_the_model_s_context(
    tiny_gpt2: Callable, variant: str
) -> None:
    model = PTPModel(tiny_gpt2(context=16), PTPConfig(variant=variant, window=6))
    batch = {
        "ids": torch.arange(16).unsqueeze(0),
        "document": torch.zeros(1, 16, dtype=torch.int64),
        "positions": torch.arange(16).unsqueeze(0),
        "starts": torch.tensor([[14]]),
        "u": torch.rand(1, 1, 6),
    }
    assert model(**batch).windows.isfinite().all()


@torch.no_grad()
def test_a_base_model_with_sliding_attention_is_served_right_or_refused(tiny_mistral: Callable) -> None:
    ids = torch.arange(12).unsqueeze(0)
    expected = tiny_mistral(sliding_window=4)(input_ids=ids).logits
    batch = {
        "ids": ids,
        "document": torch.zeros_like(ids),
        "positions": ids.clone(),
        "starts": torch.tensor([[8]]),
        "u": torch.rand(1, 1, WINDOW),
    }
    with suppress(PTPError):
        model = PTPModel(tiny_mistral(sliding_window=4), PTPConfig(window=WINDOW))
        torch.testing.assert_close(model(**batch, context_logits=True).context, expected, rtol=1e-4, atol=1e-4)
