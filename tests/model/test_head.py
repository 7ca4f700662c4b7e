"""Logits made a part at a time: the model's own, the same loss and gradients, and never all of them at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ptp.model import head
from ptp.model.head import output_head, project, summed_loss

VOCABULARY, HIDDEN, NUM_ROWS = 50, 32, 13
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS = [
    LlamaConfig(**SHAPE),
    LlamaConfig(**SHAPE, tie_word_embeddings=True),
    Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5),
    GraniteConfig(**SHAPE, logits_scaling=4.0),
    CohereConfig(**SHAPE, logit_scale=0.3),
    GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1),
    GPTNeoXConfig(**SHAPE),
]


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_logits_of_hidden_states_are_the_model_s_own(config: PreTrainedConfig) -> None:
    model, ids = made(config), torch.arange(14).view(2, 7) + 3
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        assert torch.equal(project(model, hidden), model(input_ids=ids).logits)
        # The layers are where they were.
        assert torch.equal(model.get_decoder()(input_ids=ids).last_hidden_state, hidden)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_the_head_of_a_model_is_the_quickest_that_gives_its_logits(config: PreTrainedConfig) -> None:
    model, hidden = made(config), torch.randn(2, 3, HIDDEN)
    head = output_head(model)
    torch.testing.assert_close(head(hidden), project(model, hidden))
    plain = config.model_type not in ("gemma2", "granite", "cohere")
    assert (head is model.get_output_embeddings()) == plain


def pieces(num_numbers: int = 0) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Hidden states and further numbers of rows, and a loss of them."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator, requires_grad=True)
    numbers = [(0.5 + torch.rand(NUM_ROWS, generator=generator)).requires_grad_() for _ in range(num_numbers)]
    tokens = torch.randint(VOCABULARY, (NUM_ROWS,), generator=generator)
    weights = torch.rand(NUM_ROWS, generator=generator)

    def loss(logits: Tensor, *rest: Any) -> Tensor:
        *own, part = rest
        scores = logits.float()
        for number in own:
            scores = scores / number.unsqueeze(-1)
        return (F.cross_entropy(scores, tokens[part], reduction="none") * weights[part]).sum()

    return [hidden, *numbers], loss


@pytest.mark.parametrize("num_numbers", [0, 2])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 13, 100])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: config.model_type)
def test_a_loss_summed_over_parts_has_the_value_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig, rows: int, learns: bool, num_numbers: int
) -> None:
    monkeypatch.setattr(head, "ROWS", rows)
    model = made(config).requires_grad_(learns)
    (hidden, *numbers), loss = pieces(num_numbers)
    weight = model.get_output_embeddings().weight
    wanted = [hidden, *numbers, *([weight] if learns else [])]
    whole = loss(project(model, hidden), *numbers, slice(None))
    parts = summed_loss(model, loss, hidden, *numbers)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    # Scaled, as a training scales it for accumulation.
    expected = torch.autograd.grad(whole * 0.5, wanted)
    for found, gradient in zip(torch.autograd.grad(parts * 0.5, wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert summed_loss(model, loss, hidden, *numbers).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("learns", [False, True])
def test_no_more_logits_than_one_part_s_are_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    monkeypatch.setattr(head, "ROWS", 4)
    model = made(CONFIGS[0]).requires_grad_(learns)
    (hidden,), loss = pieces()
    weight = model.get_output_embeddings().weight
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        # The head itself, (H, V) where it is transposed, is no logits.
        if tensor.shape[-1:] == (VOCABULARY,) and tensor.shape[-2:] not in (weight.shape, weight.T.shape):
            kept.append(tensor.numel() // VOCABULARY)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(project(model, hidden), slice(None))
        assert sum(kept) >= NUM_ROWS  # what is looked for is found where the whole is kept
        kept.clear()
        total = summed_loss(model, loss, hidden)
    if learns:
        assert not kept
    assert max(kept, default=0) <= 4
    total.backward()
    assert hidden.grad is not None


def test_rows_of_several_states_are_parted_by_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ROWS", 4)
    model, states = made(CONFIGS[0]).requires_grad_(False), torch.randn(7, 3, HIDDEN, requires_grad=True)
    weights, sizes = torch.rand(7), []

    def loss(logits: Tensor, part: slice) -> Tensor:
        sizes.append(tuple(logits.shape))
        return (logits.logsumexp(-1).sum(-1) * weights[part]).sum()

    total = summed_loss(model, loss, states)
    assert sizes == [(1, 3, VOCABULARY)] * 7
    expected = loss(project(model, states), slice(None))
    torch.testing.assert_close(total, expected)
    (found,), (gradient,) = torch.autograd.grad(total, [states]), torch.autograd.grad(expected, [states])
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("learns", [False, True])
def test_no_rows_have_loss_zero_and_gradient_zero(learns: bool) -> None:
    model = made(CONFIGS[0]).requires_grad_(learns)
    states = torch.randn(3, HIDDEN, requires_grad=True)
    total = summed_loss(model, lambda logits, part: logits.sum(), states[:0])
    total.backward()
    assert total.item() == 0
    assert states.grad is not None and not states.grad.any()
