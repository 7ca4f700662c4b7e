import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from ptp.attention import Mask
from ptp.errors import ConfigError
from ptp.layer_kinds import LayerKind, context_length, layer_kinds
from ptp.model.masks import context_mask

FULL = LayerKind("full_attention")


def matrix(picture: str) -> Tensor:
    return torch.tensor([[mark == "1" for mark in row.split()] for row in picture.strip().splitlines()])


def narrowed(kind: LayerKind) -> Mask:
    """Documents of four and two tokens, packed."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    return context_mask(torch.tensor([[0, 0, 0, 0, 1, 1]])).narrowed(kind, positions, positions)


def test_a_window_ends_so_many_positions_back_in_every_document() -> None:
    expected = matrix("""
        1 . . . . .
        1 1 . . . .
        . 1 1 . . .
        . . 1 1 . .
        . . . . 1 .
        . . . . 1 1
    """)
    assert torch.equal(narrowed(LayerKind("sliding_attention", window=2)).dense()[0, 0], expected)


def test_chunks_begin_anew_in_every_document() -> None:
    expected = matrix("""
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . . . 1 . .
        . . . . 1 .
        . . . . 1 1
    """)
    assert torch.equal(narrowed(LayerKind("chunked_attention", chunk=3)).dense()[0, 0], expected)


def test_positions_count_and_not_places() -> None:
    mask = Mask(lambda row, query, key: key >= 0, 1, 2, 3, torch.device("cpu"))
    seen = mask.narrowed(LayerKind("", window=3), torch.tensor([[9, 4]]), torch.tensor([[2, 7, 4]])).dense()
    assert seen.tolist() == [[[[False, True, False], [True, True, True]]]]


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (GPT2Config(), (FULL,)),
        (MistralConfig(sliding_window=None), (FULL,)),
        (MistralConfig(sliding_window=64), (LayerKind("sliding_attention", window=64),)),
        (MistralConfig(sliding_window=64, max_position_embeddings=64), (FULL,)),
        (Qwen2Config(sliding_window=64), (FULL,)),
        (
            Gemma3TextConfig(sliding_window=64),
            (FULL, LayerKind("sliding_attention", window=64)),
        ),
        (Llama4TextConfig(attention_chunk_size=64), (LayerKind("chunked_attention", chunk=64), FULL)),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_kinds_are_those_of_the_configuration_that_limit_anything(
    config: PreTrainedConfig, kinds: tuple[LayerKind, ...]
) -> None:
    assert layer_kinds(config) == kinds


def test_a_kind_that_is_not_known_is_one_clear_line() -> None:
    config = Gemma3TextConfig(num_hidden_layers=1)
    config.layer_types = ["spiral_attention"]
    with pytest.raises(ConfigError, match=r"^gemma3_text has layers of kind spiral_attention; supported are those"):
        layer_kinds(config)


def test_a_text_ends_before_long_rotary_embeddings_change_their_frequencies() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=rope)
    assert context_length(config) == 4096
    assert context_length(Phi3Config(max_position_embeddings=131072)) == 131072
