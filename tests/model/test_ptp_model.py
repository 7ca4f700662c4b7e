from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import loss_and_gradients, random_batch
from transformers import DynamicCache, PreTrainedModel

from ptp.config import PTPConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import WindowStream, collate
from ptp.data.teacher import Prompt, sample_completions
from ptp.model.auxiliary import EMBEDDINGS
from ptp.model.ptp_model import PTPModel, dividing
from ptp.sampling import SamplingRule, interval, token_intervals, warp

WINDOW = 4
LENGTHS = [[5, 9, 3], [12, 4]]
SIZE = 18
STARTS = torch.tensor([[2, 6, 7, 12, 16], [1, 5, 11, 13, 14]])


def packed() -> dict[str, Tensor]:
    """Two rows of documents with padding behind, windows that overlap, start early and run over their ends.

    Each document is one span; u is z in it, and 0 past its end.
    """
    generator = torch.Generator().manual_seed(1)
    document, positions = torch.full((2, SIZE), -1), torch.zeros(2, SIZE, dtype=torch.int64)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths):
            document[row, begin : begin + length] = number
            positions[row, begin : begin + length] = torch.arange(length)
            begin += length
    ids = torch.randint(40, (2, SIZE), generator=generator)
    z = torch.rand(*STARTS.shape, WINDOW, generator=generator)
    edges = {"lower": torch.zeros(2, SIZE), "upper": torch.ones(2, SIZE)}
    return {
        "ids": ids,
        "document": document,
        "positions": positions,
        "span": document,
        "starts": STARTS,
        "z": z,
        **edges,
    }


def one_document(length: int, start: int, window: int) -> dict[str, Tensor]:
    """One row with one document and one window."""
    ids, zeros = torch.arange(length).unsqueeze(0), torch.zeros(1, length)
    return {
        "ids": ids,
        "document": torch.zeros_like(ids),
        "positions": ids.clone(),
        "span": torch.zeros_like(ids),
        "starts": torch.tensor([[start]]),
        "z": torch.rand(1, 1, window),
        "lower": zeros,
        "upper": zeros + 1,
    }


def unknown(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without its intervals."""
    return {name: value for name, value in batch.items() if name not in ("lower", "upper")}


def window_logits(model: PTPModel, batch: dict[str, Tensor]) -> Tensor:
    """(B, N, L, V)."""
    return model.logits(model(**batch).windows).unflatten(1, (-1, WINDOW))


def one_window_alone(model: PTPModel, batch: dict[str, Tensor], row: int, number: int) -> Tensor:
    """(L, V) of one window, with nothing in the call but its document before its start."""
    start = int(batch["starts"][row, number])
    begin = start - int(batch["positions"][row, start])
    inside = batch["document"][row, start : start + WINDOW] == batch["document"][row, start]
    u = torch.zeros(WINDOW).index_copy(0, inside.nonzero().flatten(), batch["z"][row, number, : len(inside)][inside])
    context = batch["ids"][row : row + 1, begin:start]
    cache = DynamicCache(config=model.base_model.config)
    model.base_model(input_ids=context, past_key_values=cache)
    inputs = model.auxiliary(u)
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
    batch["z"][0, 1, 2] = (batch["z"][0, 1, 2] + 0.5) % 1
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
    context = model.logits(model(**batch).context)
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
    output = model(**batch)
    first = model.logits(output.windows).unflatten(1, (-1, WINDOW))[:, :, 0]
    before = model.logits(output.context).gather(1, (STARTS - 1).unsqueeze(-1).expand(-1, -1, 40))
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
    assert model(**one_document(16, start=14, window=6)).windows.isfinite().all()


# --- Intervals and u --------------------------------------------------------------------------------------------------

RULE = SamplingRule(temperature=0.7, top_k=12)
CHATS = [
    (30, ((3, 12), (15, 16), (19, 30))),
    # Spans that touch, and one whose first token has none before it.
    (11, ((0, 4), (4, 9))),
    (6, ((2, 6),)),
]
"""Lengths and spans of documents that make one packed sequence together."""


def chats(ids: list[Tensor], edges: list[tuple[np.ndarray, np.ndarray]] | None = None) -> Documents:
    """`CHATS` with these tokens, and with intervals if given."""
    known = edges or [(None, None)] * len(CHATS)
    return Documents.of(
        [
            Document(tokens.numpy().astype(np.int32), spans, lower, upper, number=number)
            for number, (tokens, (_, spans), (lower, upper)) in enumerate(zip(ids, CHATS, known, strict=True))
        ]
    )


def random_ids(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (length,), generator=generator) for length, _ in CHATS]


def items_of(documents: Documents, num_items: int = 4) -> dict[str, Tensor]:
    stream = WindowStream(
        documents, sequence_length=48, num_windows=40, window=WINDOW + 1, beta=0.3, seed=0, length=num_items
    )
    return collate([stream[i] for i in range(num_items)])


@torch.no_grad()
def alone(base: PreTrainedModel, ids: Tensor, rule: SamplingRule) -> tuple[Tensor, Tensor]:
    """Intervals of every token but the first of a document, from a call with nothing else in it."""
    return interval(warp(base(input_ids=ids[None]).logits[0, :-1], rule), ids[1:])


def places(batch: dict[str, Tensor]) -> list[tuple[int, int, int, int]]:
    """Row, window, index in the window and packed index of every u a batch asks for."""
    rows, windows, width = batch["z"].shape
    return [
        (row, window, k, int(batch["starts"][row, window]) + k)
        for row in range(rows)
        for window in range(windows)
        for k in range(width)
    ]


@torch.no_grad()
def test_u_lies_in_the_interval_of_its_own_token_and_is_zero_past_the_span(make_model: Callable) -> None:
    rng = np.random.default_rng(0)
    edges = []
    for _, spans in CHATS:
        lower, upper = np.sort(rng.random((2, sum(last - first for first, last in spans)), np.float32), axis=0)
        # Every fifth token has no mass.
        upper[::5] = lower[::5]
        edges.append((lower, upper))
    batch = items_of(chats(random_ids(), edges))
    output = make_model()(**batch)
    assert output.u.dtype == torch.float32
    assert torch.equal(output.mass, batch["upper"] > batch["lower"])
    num_inside = 0
    for row, window, k, place in places(batch):
        u, start = float(output.u[row, window, k]), int(batch["starts"][row, window])
        if place >= 48 or batch["span"][row, place] != batch["span"][row, start]:
            assert u == 0
            continue
        lower, upper = float(batch["lower"][row, place]), float(batch["upper"][row, place])
        assert lower <= u < upper or u == lower == upper
        num_inside += 1
    assert 0 < num_inside < output.u.numel()


@torch.no_grad()
@pytest.mark.parametrize("rule", [RULE, SamplingRule(), SamplingRule(top_p=0.8, order="probability")], ids=str)
def test_intervals_that_are_not_stored_are_those_of_each_document_alone(
    make_model: Callable, tiny_llama: Callable, rule: SamplingRule
) -> None:
    ids, base, model = random_ids(), tiny_llama(), make_model()
    model.rule = rule
    edges = []
    for tokens, (_, spans) in zip(ids, CHATS, strict=True):
        # The first token of a text has no distribution.
        lower, upper = (torch.cat([edge.new_zeros(1), edge]) for edge in alone(base, tokens, rule))
        trained = [place for first, last in spans for place in range(first, last)]
        edges.append((lower[trained].numpy(), upper[trained].numpy()))
    known, bare = items_of(chats(ids, edges)), items_of(chats(ids))
    stored, computed = model(**known), model(**bare)
    torch.testing.assert_close(computed.u, stored.u, rtol=1e-4, atol=1e-4)
    assert torch.equal(computed.mass, stored.mass)
    assert torch.equal(computed.mass, known["upper"] > known["lower"])
    # Text that is not the model's own has tokens that the rule would not give it.
    trained = (bare["span"] >= 0) & (bare["positions"] > 0)
    assert computed.mass[trained].any()
    assert computed.mass[trained].all() == (rule == SamplingRule())


@torch.no_grad()
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_completions_have_the_same_u_whether_their_intervals_are_stored_or_computed(
    make_model: Callable, base: str
) -> None:
    model = make_model(base)
    model.rule = RULE
    prompts = [Prompt(np.arange(3, 4 + number, dtype=np.int32), [number]) for number in range(12)]
    documents = sample_completions(
        model.base_model, prompts, RULE, seed=0, max_length=40, max_new_tokens=24, end_token_ids=[1], batch_size=5
    )
    batch = items_of(Documents.of(documents))
    stored, computed = model(**batch), model(**unknown(batch))
    torch.testing.assert_close(computed.u, stored.u, rtol=1e-4, atol=1e-4)
    assert torch.equal(computed.mass, stored.mass)
    # What the teacher wrote, its rule can give.
    assert torch.equal(stored.mass, batch["span"] >= 0)
    # A binary embedding shows the last bit of u; with the same bits everything is the same.
    bare = unknown(batch)
    context = model(**bare).context
    lower, upper = token_intervals(context, model.logits, batch["ids"], batch["span"] >= 0, RULE)
    given = model(**bare, lower=lower, upper=upper)
    assert torch.equal(given.u, computed.u)
    assert torch.equal(given.windows, computed.windows)


def test_intervals_are_those_of_the_base_model_while_the_adapter_learns(make_model: Callable) -> None:
    model, batch = make_model(), items_of(chats(random_ids()))
    model.rule = RULE
    before = model(**batch)
    before.windows.square().mean().backward()
    assert not before.u.requires_grad
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1).step()
    after = model(**batch)
    assert not torch.equal(after.windows, before.windows)
    assert torch.equal(after.u, before.u)


def test_a_frozen_base_model_has_no_dropout_while_the_adapter_learns(make_model: Callable) -> None:
    model, batch = make_model("gpt2"), packed()
    assert model.base_model.config.attn_pdrop > 0
    with torch.no_grad():
        before = model.eval()(**batch)
        after = model.train()(**batch)
    assert model.training
    assert torch.equal(after.context, before.context)
    assert torch.equal(after.windows, before.windows)


@pytest.mark.parametrize(
    ("number", "most", "divisor"), [(24, 5, 4), (24, 24, 24), (24, 1, 1), (23, 22, 1), (6, 100, 6)]
)
def test_windows_are_shared_out_evenly(number: int, most: int, divisor: int) -> None:
    assert dividing(number, most) == divisor


def test_windows_learn_the_same_read_in_several_rows_or_in_one(
    tiny_llama: Callable, random_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_adapter(PTPModel(tiny_llama(), PTPConfig(window=4, lora_rank=4)), std=0.1).train()
    model.rule = RULE
    batch = random_batch(num_windows=24)
    found, rows = [], []
    read = PTPModel.read

    def counted(self: PTPModel, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(inputs))
        return read(self, inputs, *args, **kwargs)

    monkeypatch.setattr(PTPModel, "read", counted)
    for most in (3, 1):
        monkeypatch.setattr("ptp.model.ptp_model.dividing", lambda number, _, most=most: dividing(number, most))
        found.append(loss_and_gradients(model, batch))
    num_rows = len(batch["ids"])
    assert rows == [num_rows, 3 * num_rows, num_rows, num_rows]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)
