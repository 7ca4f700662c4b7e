from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from architectures import FAMILIES
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from trainings import RULE, loss_and_gradients, random_batch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from ptp import attention
from ptp.attention import FLEX, attend, use_flex_attention
from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder, Generation
from ptp.errors import ConfigError
from ptp.model.masks import context_mask, window_mask
from ptp.model.ptp_model import PTPModel

WINDOW = 4
DOCUMENT = torch.tensor([[0] * 90 + [1] * 50 + [-1] * 10, [0] * 20 + [1] * 130])
STARTS = torch.tensor([[3, 40, 91, 139], [1, 19, 21, 149]])


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses flex attention's backward pass on the CPU, but for fused kernels' sake only: unfused, it has it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


@pytest.fixture
def make_model(tiny_llama: Callable, tiny_gpt2: Callable, random_adapter: Callable) -> Callable[..., PTPModel]:
    def make(base: str = "llama", attention: str = "sdpa", **settings: object) -> PTPModel:
        torch.manual_seed(0)
        bases = {
            "llama": lambda: tiny_llama(attention=attention),
            "gpt2": tiny_gpt2,
            "opt": tiny_opt,
            "gemma3": tiny_gemma3,
        }
        return random_adapter(PTPModel(bases[base](), PTPConfig(window=WINDOW, lora_rank=4, **settings)), std=0.1)

    return make


def tiny_gemma3() -> PreTrainedModel:
    """A sliding window in one layer, the whole text in the other."""
    return next(family for family in FAMILIES if family.model_type == "gemma3_text").make()


def tiny_opt() -> OPTForCausalLM:
    """Learned positions, which cannot be passed, and dropout."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            word_embed_proj_dim=32,
            max_position_embeddings=60,
            init_std=0.3,
            attention_dropout=0.1,
            **sizes,
        )
    )


@torch.no_grad()
@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(2, 2), (4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("mask", [context_mask(DOCUMENT), window_mask(DOCUMENT, STARTS, WINDOW)])
def test_flex_attention_and_sdpa_give_the_same(num_heads: int, num_key_value_heads: int, mask: attention.Mask) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, num_heads, mask.queries, 16, generator=generator)
    key, value = torch.randn(2, 2, num_key_value_heads, mask.keys, 16, generator=generator)
    layer = SimpleNamespace(num_key_value_groups=num_heads // num_key_value_heads, is_causal=True)
    blockwise, dense = (
        attend(layer, query, key, value, form, scaling=0.3)[0] for form in (mask.blocks(), mask.dense())
    )
    torch.testing.assert_close(blockwise, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
def test_loss_and_gradients_are_the_same_with_flex_attention_and_sdpa(
    make_model: Callable, backward_on_cpu: None, base: str, variant: str
) -> None:
    model, batch = make_model(base, variant=variant).train(), random_batch()
    expected = loss_and_gradients(model, batch)
    use_flex_attention(model.base_model)
    assert model.base_model.config._attn_implementation == FLEX
    for name, value in loss_and_gradients(model, batch).items():
        largest = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention's kernels need a CUDA device; none is here")
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
def test_loss_and_gradients_are_the_same_with_flex_attention_and_sdpa_on_a_gpu(
    make_model: Callable, variant: str, checkpoints: bool
) -> None:
    model = make_model(variant=variant).train().cuda()
    lengths = (300, 120, 40)
    batch = {name: tensor.cuda() for name, tensor in random_batch(lengths, 310, num_windows=70).items()}
    expected = loss_and_gradients(model, batch)
    use_flex_attention(model.base_model)
    model.gradient_checkpointing = checkpoints
    torch.testing.assert_close(loss_and_gradients(model, batch), expected, rtol=1e-3, atol=1e-4)


def test_flex_attention_is_compiled_once_for_all_batches_and_for_what_checkpointing_computes_again(
    make_model: Callable, backward_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_model().train(), random_batch(lengths=(50, 50))
    use_flex_attention(model.base_model)
    first, second = ({name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2))
    assert not torch.equal(first["starts"], second["starts"])
    expected = loss_and_gradients(model, second)

    def compiled(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False, backend="aot_eager")

    torch.compiler.reset()
    monkeypatch.setattr(attention, "flex_attention", compiled(flex_attention))
    monkeypatch.setattr(attention, "create_block_mask", compiled(create_block_mask))
    loss_and_gradients(model, first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for model.gradient_checkpointing in (False, True):
            torch.testing.assert_close(loss_and_gradients(model, second), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_and_plain_calls_are_as_before_bit_for_bit(make_model: Callable) -> None:
    model = make_model().eval()
    decoder = Decoder(model, rule=RULE, budget=12)
    ids, padded = torch.arange(18).view(2, 9), torch.ones(2, 9, dtype=torch.int64)
    padded[0, :4] = 0

    def texts_and_logits() -> tuple[Generation, Tensor, Tensor]:
        text = decoder.generate([5, 3], max_new_tokens=20, seed=0)
        return text, model.base_model(ids).logits, model.base_model(ids, attention_mask=padded).logits

    before = texts_and_logits()
    use_flex_attention(model.base_model)
    after = texts_and_logits()
    assert (before[0].token_ids, before[0].num_calls) == (after[0].token_ids, after[0].num_calls)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize(("base", "implementation"), [("llama", "eager"), ("gpt2", "sdpa")])
def test_models_that_cannot_use_it_keep_their_attention(make_model: Callable, base: str, implementation: str) -> None:
    model, batch = make_model(base, implementation).train(), random_batch()
    assert model.base_model._supports_flex_attn == (base == "llama")
    expected = loss_and_gradients(model, batch)
    use_flex_attention(model.base_model)
    assert model.base_model.config._attn_implementation == implementation
    torch.testing.assert_close(loss_and_gradients(model, batch), expected, rtol=0, atol=0)


def test_flex_attention_takes_what_autocast_leaves_in_two_types() -> None:
    mask, layer = context_mask(DOCUMENT), SimpleNamespace(num_key_value_groups=1, is_causal=True)
    query, key, value = torch.randn(3, 2, 2, 150, 16)
    output, _ = attend(layer, query, key, value.bfloat16(), mask.blocks())
    assert output.dtype == torch.bfloat16


def test_dropout_that_flex_attention_has_not_got_is_one_clear_line() -> None:
    states = torch.randn(2, 2, 150, 16)
    with pytest.raises(ConfigError, match=r"^flex attention has no dropout; got 0\.1: set .* attention dropout to 0$"):
        attend(nn.Module(), states, states, states, context_mask(DOCUMENT).blocks(), dropout=0.1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_share_one_mask(tiny_llama: Callable, make_model: Callable, implementation: str) -> None:
    model, batch = make_model(attention=implementation).train(), random_batch()
    shape = window_mask(batch["document"], batch["starts"], WINDOW).dense().shape
    kept = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == shape:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch)
    assert output.windows.requires_grad
    assert len(kept) == (1 if implementation == "sdpa" else 0)
