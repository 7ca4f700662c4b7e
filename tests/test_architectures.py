"""Every family of models decodes losslessly, trains what decoding uses, samples what it would write, and is kept."""

import importlib.util
import re
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from architectures import FAMILIES, WINDOW
from torch import Tensor
from trainings import random_batch, step_loss
from transformers import PreTrainedModel

from ptp.cache import RollbackCache
from ptp.config import PTPConfig
from ptp.data.teacher import Prompt, sample_completions
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.model.gated_lora import lora_layers
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule, interval, warp

PROMPT = [3, 17, 5, 38, 9, 22, 31, 8, 8, 25, 14, 36, 7, 30]
assert len(PROMPT) > 2 * WINDOW, "the prompt must be longer than what sliding layers see"
RULES = [SamplingRule(temperature=0), SamplingRule(temperature=0.7, top_k=20, top_p=0.9), SamplingRule()]
LENGTHS = (40, 19, 2)
NUM_TOKENS = 10


DISTINCT = {
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "falcon",
    "mixtral",
    "llama4_text",
    "opt",
}
"""Families that differ in what decoding must know of them; the others run with the slow tests."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, marks=[] if family.model_type in DISTINCT else [pytest.mark.slow]) for family in FAMILIES
    ],
    ids=lambda family: family.model_type,
)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param.make()


def adapted(base: PreTrainedModel, std: float = 0.1, **settings: object) -> PTPModel:
    """A PTP model of a copy, with an adapter of noise."""
    torch.manual_seed(1)
    model = PTPModel(deepcopy(base), PTPConfig(**{"window": 4, "lora_rank": 4, **settings}))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=std)
    if model.chain is not None:
        torch.nn.init.normal_(model.chain.write.weight, std=std)
    return model


def test_the_text_is_the_base_model_s_own_alone_and_beside_others(base: PreTrainedModel) -> None:
    model = adapted(base)
    for seed, rule in enumerate(RULES):
        decoder, prompts = Decoder(model, rule, budget=14), [PROMPT, PROMPT[:9]]
        alone = decoder.generate(PROMPT, NUM_TOKENS, seed, end_token_ids=[])
        texts = decoder.generate_batch(prompts, NUM_TOKENS, seed, end_token_ids=[], batch_size=2)
        assert alone.num_draft_tokens > 0
        assert alone.token_ids == texts[0].token_ids
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            request = make_request(base, prompt, NUM_TOKENS, seed, number, end_token_ids=[])
            assert text.token_ids == decode_plainly(base, request, rule)
        assert len(set(alone.token_ids)) > 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
def test_a_branch_behind_drafts_and_a_cached_context_is_the_training_window(
    base: PreTrainedModel, variant: str
) -> None:
    model = adapted(base, variant=variant).eval()
    ids, u, drafts = torch.tensor([PROMPT]), torch.tensor([0.9, 0.1, 0.5, 0.7]), [11, 12, 13]
    size, num_rows = len(PROMPT), 1 + len(drafts) + len(u)
    z = u.view(1, 1, -1)
    output = model(
        ids=torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], dim=1),
        document=torch.zeros(1, size + 4, dtype=torch.int64),
        positions=torch.arange(size + 4).unsqueeze(0),
        span=torch.zeros(1, size + 4, dtype=torch.int64),
        starts=torch.tensor([[size]]),
        z=z,
        lower=torch.zeros(1, size + 4),
        upper=torch.ones(1, size + 4),
    )
    cache = RollbackCache(model.num_layers, size)
    model.read(ids[:, :-1], torch.arange(size - 1).unsqueeze(0), causal(size - 1), cache)
    window = model.add_anchor(model.embed_u(u), ids[0, -1].expand(4), torch.arange(4) == 0)
    verify = model.token_embedding(torch.tensor([PROMPT[-1], *drafts]))
    local = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    local[: 1 + len(drafts), : 1 + len(drafts)] = causal(1 + len(drafts))[0, 0]
    local[1 + len(drafts) :, 0] = True
    local[1 + len(drafts) :, 1 + len(drafts) :] = causal(len(u))[0, 0]
    first = size + model.ptp_config.shift
    positions = torch.cat([torch.arange(size - 1, size + len(drafts)), torch.arange(first, first + len(u))])
    mask = torch.cat([local.new_ones(num_rows, size - 1), local], dim=1)[None, None]
    inputs = torch.cat([verify, window]).unsqueeze(0)
    hidden = model.read(inputs, positions.unsqueeze(0), mask, cache, 1 + len(drafts))
    torch.testing.assert_close(
        model.logits(hidden)[0, -len(u) :], model.logits(output.windows)[0], rtol=1e-3, atol=1e-3
    )


def causal(size: int) -> Tensor:
    return torch.ones(1, 1, size, size).tril().bool()


@torch.no_grad()
def test_packed_documents_are_read_and_drafted_for_as_each_alone(base: PreTrainedModel) -> None:
    model, batch = adapted(base).eval(), random_batch(LENGTHS, 64, num_windows=12)
    output = model(**batch)
    windows = output.windows.unflatten(1, (-1, 4))
    num_compared = 0
    for document in range(len(LENGTHS)):
        for row in range(len(batch["ids"])):
            own = (batch["document"][row] == document).nonzero().flatten()
            if not len(own):
                continue
            alone = base(input_ids=batch["ids"][row, own].unsqueeze(0)).logits[0]
            torch.testing.assert_close(model.logits(output.context[row, own]), alone, rtol=1e-3, atol=1e-3)
            inside = batch["document"][row, batch["starts"][row]] == document
            fields = ("ids", "document", "positions", "span", "lower", "upper")
            single = {name: batch[name][row : row + 1, own] for name in fields}
            starts, z = batch["starts"][row, inside] - own[0], batch["z"][row, inside]
            if len(starts):
                read = model(**single, starts=starts.unsqueeze(0), z=z.unsqueeze(0)).windows
                torch.testing.assert_close(read.unflatten(1, (-1, 4))[0], windows[row, inside], rtol=1e-3, atol=1e-3)
                num_compared += len(starts)
    assert num_compared == batch["starts"].numel()


@torch.no_grad()
def test_u_of_inverse_training_lies_where_the_whole_window_puts_it(base: PreTrainedModel) -> None:
    model, batch = adapted(base, variant="categorical").eval(), random_batch((40, 19), 60, num_windows=6)
    model.rule = SamplingRule()
    output = model(**batch, inverse=True)
    logits = model.logits(output.windows).unflatten(1, (-1, 4))
    for row, window in np.ndindex(*batch["starts"].shape):
        start = int(batch["starts"][row, window])
        inside = batch["span"][row, start : start + 5] == batch["span"][row, start]
        for k in range(min(4, int(inside.sum()) - 1)):
            token = batch["ids"][row, start + k + 1]
            lower, upper = interval(warp(logits[row, window, k : k + 1], model.rule), token.view(1))
            assert lower - 1e-3 <= output.u[row, window, k + 1] <= upper + 1e-3


def test_a_training_step_lowers_the_loss_and_gradient_checkpointing_finds_the_same_gradients(
    base: PreTrainedModel,
) -> None:
    model, batch = adapted(base).train(), random_batch(LENGTHS, 64, num_windows=12)
    before = {name: value.clone() for name, value in model.base_model.state_dict().items() if "lora" not in name}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        loss = step_loss(model, batch)
        loss.backward()
        found.append([parameter.grad.clone() for parameter in trained])
    assert all(gradient.abs().sum() > 0 for gradient in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    torch.optim.Adam(trained, lr=1e-3).step()
    assert step_loss(model, batch) < loss
    after = model.base_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@torch.no_grad()
def test_experts_keep_their_weights_and_every_other_linear_layer_is_adapted(base: PreTrainedModel) -> None:
    model = adapted(base)
    names = lora_layers(model.base_model)
    assert names
    assert not [name for name in names if "expert" in name or "router" in name or name.endswith(".gate")]


def test_a_saved_adapter_is_the_same_model_when_loaded(base: PreTrainedModel, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    model = adapted(type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PTPModel.from_pretrained(tmp_path / "adapter")
    texts = [Decoder(each, RULES[1], 14).generate(PROMPT, NUM_TOKENS, end_token_ids=[]) for each in (model, loaded)]
    assert texts[0] == texts[1]
    batch = random_batch((20,), 20, num_windows=4)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).windows, loaded(**batch).windows)


def test_completions_sampled_side_by_side_are_those_of_plain_decoding(base: PreTrainedModel) -> None:
    prompts = [Prompt(np.array(PROMPT[: 2 + 4 * n], np.int32), [2 * n, 2 * n + 1]) for n in range(3)]
    documents = sample_completions(
        deepcopy(base),
        prompts,
        RULES[1],
        seed=3,
        max_length=64,
        max_new_tokens=NUM_TOKENS,
        end_token_ids=[2],
        batch_size=4,
    )
    assert len(documents) == 6
    for document in documents:
        ((start, end),) = document.spans
        request = make_request(base, document.ids[:start].tolist(), NUM_TOKENS, 3, document.number, end_token_ids=[2])
        assert document.ids[start:end].tolist() == decode_plainly(base, request, RULES[1])


def load_make_architectures() -> ModuleType:
    path = Path(__file__).parent.parent / "docs" / "make_architectures.py"
    spec = importlib.util.spec_from_file_location("make_architectures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_architectures_lists_what_is_tested_here() -> None:
    make = load_make_architectures()
    assert make.families() in make.PAGE.read_text(encoding="utf-8"), "run python docs/make_architectures.py"


@pytest.mark.slow
def test_every_type_of_transformers_writes_the_right_text_or_is_refused() -> None:
    make = load_make_architectures()
    text = make.PAGE.read_text(encoding="utf-8")
    found = dict(make.survey())
    works = {name for name, result in found.items() if result == make.WORKS}
    if f"transformers {transformers.__version__}" in text:
        assert text == make.page(found), "run python docs/make_architectures.py"
    # A version that has fewer types supports what it has of those on the page.
    promised = set(re.findall(r"`([^`]+)`", text.partition("**Work too:**")[2].partition("**Refused:**")[0]))
    assert promised & found.keys() <= works
