"""The paper's scaling ladder: students of growing size, trained from scratch on one teacher's completions (METHOD §6).

A student has its teacher's vocabulary, hence its tokenizer, and nothing else of it.
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from ptp.config import StudentConfig
from ptp.layer_kinds import context_length

LADDER = {
    "66k": StudentConfig(hidden_size=64, num_layers=1, num_heads=1),
    "525k": StudentConfig(hidden_size=128, num_layers=2, num_heads=2),
    "4.2M": StudentConfig(hidden_size=256, num_layers=4, num_heads=4),
    "34M": StudentConfig(hidden_size=512, num_layers=8, num_heads=8),
    "268M": StudentConfig(hidden_size=1024, num_layers=16, num_heads=16),
    "1.1B": StudentConfig(hidden_size=2048, num_layers=22, num_heads=32),
}
"""Sizes by the paper's names, which count the parameters of the layers; only "1.1B" has more, 1.5 billion, with an MLP
four times as wide as its hidden size."""


def build_student(student: StudentConfig, teacher: PreTrainedConfig, sequence_length: int) -> LlamaForCausalLM:
    """A Llama with random weights in float32 that reads and writes the teacher's tokens.

    Its context is the teacher's, or `sequence_length` tokens where that is longer or the teacher's is not known.
    """
    text = teacher.get_text_config()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=student.hidden_size,
            intermediate_size=student.intermediate_size,
            num_hidden_layers=student.num_layers,
            num_attention_heads=student.num_heads,
            max_position_embeddings=max(context_length(teacher) or 0, sequence_length),
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
        )
    )
