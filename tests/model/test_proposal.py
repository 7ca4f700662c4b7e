"""What makes proposals of the states of windows: the chain and its tokens."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainings import CONFIG, RULE

from ptp.config import PTPConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import make_request
from ptp.model.proposal import UNKNOWN, Blur, Chain, Continuation, propose, tokens_before
from ptp.model.ptp_model import PTPModel
from ptp.training.objective import make_stream, targets_of, trained_states

NONE = UNKNOWN


def test_tokens_before_are_those_of_the_own_document_the_nearest_first() -> None:
    ids = torch.tensor([[10, 11, 12, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    index = torch.tensor([[[1, 2], [3, 5]]])
    assert tokens_before(ids, positions, index, 3).tolist() == [
        [[[10, NONE, NONE], [11, 10, NONE]], [[NONE, NONE, NONE], [21, 20, NONE]]]
    ]
    assert tokens_before(ids, positions, index, 0).shape == (1, 2, 2, 0)


def test_an_untrained_chain_changes_nothing() -> None:
    states, before = torch.randn(3, 4, 8), torch.randn(3, 4, 2, 8)
    assert torch.equal(Chain(2, 16, 8)(states, before), states)


def test_a_chain_tells_the_places_of_tokens_apart() -> None:
    torch.manual_seed(0)
    chain = Chain(2, 16, 8)
    torch.nn.init.normal_(chain.write.weight)
    states, before = torch.randn(1, 8), torch.randn(1, 2, 8)
    assert not torch.allclose(chain(states, before), chain(states, before.flip(1)))


def test_an_untrained_continuation_repeats_the_anchor_s_state() -> None:
    anchor = torch.randn(2, 3, 8)
    states = Continuation(4, 8)(anchor)
    assert torch.equal(states, anchor.unsqueeze(2).expand(2, 3, 4, 8))


def test_blur_is_positive_whatever_the_state() -> None:
    blur = Blur(8)
    torch.nn.init.normal_(blur.linear.weight, std=100)
    assert (blur(torch.randn(50, 8)) > 0).all()


@pytest.mark.parametrize(
    ("variant", "pick", "width"),
    [
        *product(["one_hot", "categorical"], ["soft", "exact"], [4]),
        *product(["categorical"], ["soft", "exact"], [0, 1, 3]),
    ],
)
def test_what_training_judges_is_what_the_decoder_drafts(
    variant: str,
    pick: str,
    width: int,
    tiny_llama: Callable,
    random_adapter: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each draft is what training predicts at its place in the text made of the context, the bonus token and the
    drafts before it: chains know the tokens there, and u is each token's own. The first `width` have positions."""
    monkeypatch.setattr("ptp.decoding.drafting.LEAST_CHANCE", 0)
    config = PTPConfig(variant=variant, pick=pick, chain=3, chain_size=16, window=4, lora_rank=2)
    model = random_adapter(PTPModel(tiny_llama(), config), std=0.3).eval()
    model.rule = RULE
    # Only so many positions are of any use.
    model.survival = tuple(0.9 ** min(w, width) * 0.5 ** max(0, w - width) for w in range(1, config.num_drafts + 1))
    model.continued = tuple(0.5**w for w in range(1, 5)) if config.continues else ()
    rng = np.random.default_rng(0)
    for start in (1, 2, 7):
        context = rng.integers(3, 40, size=start).astype(np.int32)
        u = torch.from_numpy(rng.random(8).astype(np.float32))
        session = Decoder(model, RULE, budget=2 * config.window).session()
        request = replace(make_request(model.base_model, context.tolist(), 8, seed=0, end_token_ids=[]), u=u)
        text = session.enter(request)
        ((_, first),) = session.step()
        assert len(text.drafts) == config.num_drafts
        ids = np.array([*context, *first.token_ids, *text.drafts], np.int32)
        document = Document(ids, ((start, len(ids)),))
        stream = make_stream(Documents.of([document]), CONFIG.model_copy(update={"windows_per_sequence": 1}), 4)
        batch = collate([stream[0]]) | {"starts": torch.tensor([[start]]), "z": u[None, None, : config.window + 1]}
        # In intervals of [0, 1), u is the batch's z.
        everywhere = torch.ones_like(batch["ids"], dtype=torch.float32)
        output = model(**(batch | {"lower": 0 * everywhere, "upper": everywhere}))
        targets = targets_of(batch, torch.ones_like(batch["ids"], dtype=torch.bool), model, first=False)
        before = tokens_before(batch["ids"], batch["positions"], targets.index, config.chain)
        states = model.chained(trained_states(output, batch, model, first=False), before.unsqueeze(-2))
        own_u = output.u[..., 1 - config.lead :][..., : config.window, None]
        blur = None if model.blur is None else model.blur(states)
        proposed = propose(config, RULE, model.logits(states), own_u.expand(states.shape[:-1]), blur)
        predicted = [part[..., 0] for part in proposed]
        # Those with positions first; those that continue, of the places behind the width.
        tokens, confidences = (
            torch.cat([part[0, 0, : width + config.lead, 0], part[0, 0, width + config.lead :, -1]])
            for part in predicted
        )
        assert tokens[config.lead :].tolist() == text.drafts
        assert confidences[config.lead :].tolist() == pytest.approx(text.confidences, rel=1e-4)


def test_a_chain_learns_the_token_that_follows_from_the_one_before() -> None:
    """States say nothing, and the next token is the one before plus one: only the chain can know."""
    torch.manual_seed(0)
    embeddings, head = torch.randn(10, 16), torch.randn(10, 16)
    chain = Chain(1, 32, 16)
    optimizer = torch.optim.Adam(chain.parameters(), lr=1e-2)
    tokens = torch.arange(10)
    for _ in range(200):
        logits = chain(torch.zeros(10, 16), embeddings[tokens, None]) @ head.T
        loss = F.cross_entropy(logits, (tokens + 1) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.05
