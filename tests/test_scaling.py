import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from ptp.config import StudentConfig
from ptp.errors import ConfigError
from ptp.scaling import LADDER, build_student

TEACHER = LlamaConfig(vocab_size=77, max_position_embeddings=96, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
SIZES = {
    "66k": (64, 1, 1, 65_536),
    "525k": (128, 2, 2, 524_288),
    "4.2M": (256, 4, 4, 4_194_304),
    "34M": (512, 8, 8, 33_554_432),
    "268M": (1024, 16, 16, 268_435_456),
    # The paper's name is smaller than what its hidden size, layers and MLP make.
    "1.1B": (2048, 22, 32, 1_476_395_008),
}
SMALL = StudentConfig(hidden_size=8, num_layers=1, num_heads=2)


@pytest.mark.parametrize("name", SIZES)
def test_a_student_of_the_ladder_has_the_shape_the_paper_gives_and_the_parameters_that_makes(name: str) -> None:
    with torch.device("meta"):
        model = build_student(LADDER[name], TEACHER, 64)
    hidden, layers, heads, count = SIZES[name]
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (hidden, layers, heads)
    assert config.num_key_value_heads == heads
    assert config.intermediate_size == 4 * hidden
    assert sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2) == count
    assert model.num_parameters() == count + (2 * layers + 1) * hidden + 2 * TEACHER.vocab_size * hidden


@pytest.mark.parametrize(
    ("name", "count"), [("66k", 66e3), ("525k", 525e3), ("4.2M", 4.2e6), ("34M", 34e6), ("268M", 268e6)]
)
def test_a_name_counts_the_parameters_of_the_layers(name: str, count: float) -> None:
    assert SIZES[name][3] == pytest.approx(count, rel=0.02)
    assert list(SIZES) == list(LADDER)


def test_a_student_reads_and_writes_its_teacher_s_tokens() -> None:
    model = build_student(SMALL, TEACHER, 64)
    assert model(torch.arange(77).unsqueeze(0)).logits.shape == (1, 77, 77)
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, [4, 5], 6)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("teacher", "length", "context"),
    [
        (TEACHER, 64, 96),
        (TEACHER, 128, 128),
        (GPT2Config(n_positions=32), 16, 32),
        # Says nothing of its context.
        (BloomConfig(), 64, 64),
    ],
)
def test_a_student_s_context_holds_its_teacher_s_and_a_packed_sequence(
    teacher: PreTrainedConfig, length: int, context: int
) -> None:
    with torch.device("meta"):
        model = build_student(SMALL, teacher, length)
    assert model.config.max_position_embeddings == context
    assert model.config.vocab_size == teacher.vocab_size


@pytest.mark.parametrize(("hidden", "heads"), [(10, 3), (6, 2)])
def test_a_size_that_gives_no_even_head_is_refused(hidden: int, heads: int) -> None:
    with pytest.raises(ConfigError, match=f"an even number for each head; got {hidden} for {heads} heads"):
        StudentConfig(hidden_size=hidden, num_layers=1, num_heads=heads)
