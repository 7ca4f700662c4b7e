"""Tiny random models and adapters: everything runs on the CPU, from configurations, without network or files."""

import os
import tempfile

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
# What tests read must not lie in the caches of who runs them.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="ptp-datasets-")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="ptp-modules-")

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

from ptp.config import DataConfig, Mode, PregenerateConfig, PTPConfig, TrainConfig
from ptp.demo import make_tokenizer
from ptp.experiment import ExperimentConfig
from ptp.model.gated_lora import lora_layers
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

torch.set_num_threads(1)
settings.register_profile(
    "ptp", deadline=None, print_blob=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ptp")


@pytest.fixture
def no_foreign_bars() -> Iterator[None]:
    """Programs switch other libraries' bars off before these are imported, which is too late here."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a Llama with weights large enough that its distributions vary; bos 0, end 1, padding 2."""

    def make(
        vocab_size: int = 40,
        hidden: int = 32,
        layers: int = 2,
        context: int = 512,
        attention: str = "sdpa",
        seed: int = 0,
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=[1],
            pad_token_id=2,
            attn_implementation=attention,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Makes a GPT-2: Conv1D layers and learned positions, which cannot be passed."""

    def make(
        vocab_size: int = 40, hidden: int = 32, layers: int = 2, context: int = 64, seed: int = 0
    ) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden,
            n_layer=layers,
            n_head=2,
            n_positions=context,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        return GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., PTPModel]:
    """Fills all that begins with zeros, from lora_B on, with noise: a model that drafts wrongly in every way."""

    def fill(model: PTPModel, std: float = 1.0, seed: int = 0) -> PTPModel:
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_B.normal_(std=std, generator=generator)
        for part in (model.chain, model.blur, model.continuation):
            for parameter in part.parameters() if part is not None else ():
                with torch.no_grad():
                    parameter.normal_(std=std, generator=generator)
        return model

    return fill


@pytest.fixture(scope="session")
def tiny_experiment(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[[Path], ExperimentConfig]:
    """Writes a Llama with its tokenizer (model/) and prompts.jsonl; returns an experiment of seconds on them."""

    def write(directory: Path, num_prompts: int = 24, seed: int = 0) -> ExperimentConfig:
        prompts = [f"def f{number}({'x, ' * (number % 5)}y):" for number in range(num_prompts)]
        tokenizer = make_tokenizer(prompts, 270)
        tiny_llama(vocab_size=len(tokenizer), context=96, seed=seed).save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
        (directory / "prompts.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
        return ExperimentConfig(
            base_model=str(directory / "model"),
            data=DataConfig(path=str(directory / "prompts.jsonl"), mode="prompt-scheme-distill"),
            sampling=SamplingRule(temperature=0.7, top_k=50, top_p=0.95),
            pregenerate=PregenerateConfig(
                max_prompt_tokens=32, max_new_tokens=16, max_length=48, batch_size=3, shard_size=5
            ),
            model=PTPConfig(window=4, lora_rank=2),
            train=TrainConfig(
                max_steps=4,
                batch_size=8,
                sequence_length=48,
                windows_per_sequence=32,
                # Muon computes in bfloat16, in which what is the same up to rounding is no longer.
                optimizer="adamw",
                learning_rate=1e-4,
                warmup_steps=0,
                dtype="float32",
                save_every=2,
            ),
        )

    return write


@pytest.fixture(scope="module")
def config(
    tiny_experiment: Callable[..., ExperimentConfig], tmp_path_factory: pytest.TempPathFactory
) -> ExperimentConfig:
    """An experiment of seconds, its inputs written."""
    return tiny_experiment(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def chat_experiment(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., ExperimentConfig]:
    """Writes a chat model (model/), chats.jsonl and texts.jsonl; returns an experiment of seconds in the mode.

    The template is Zephyr's: a system message, and two answers in each chat, which end with the model's end token.
    """
    template = Path(__file__).with_name("fixtures") / "chat_templates" / "zephyr.jinja"

    def chat(number: int) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{number}+1?"},
            {"role": "assistant", "content": f"{number + 1}"},
            {"role": "user", "content": "And 2 more?"},
            {"role": "assistant", "content": f"{number + 3}, of course"},
        ]

    def write(directory: Path, mode: Mode = "prompt-distill", num_rows: int = 24) -> ExperimentConfig:
        chats = [chat(number) for number in range(num_rows)]
        texts = [f"{number} and {number + 1} are {2 * number + 1}" for number in range(num_rows)]
        headers = ["<|system|>\n", "<|user|>\n", "<|assistant|>\n"]
        tokenizer = make_tokenizer(headers + [message["content"] for chat in chats for message in chat] + texts, 300)
        tokenizer.chat_template = template.read_text()
        tokenizer.save_pretrained(directory / "model")
        tiny_llama(vocab_size=len(tokenizer), context=96).save_pretrained(directory / "model")
        (directory / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        holds_chats = mode in ("prompt-distill", "full-chat")
        return ExperimentConfig(
            base_model=str(directory / "model"),
            data=DataConfig(
                path=str(directory / ("chats.jsonl" if holds_chats else "texts.jsonl")),
                mode=mode,
                column="messages" if holds_chats else "text",
            ),
            sampling=SamplingRule(temperature=0.7, top_k=50, top_p=0.95),
            pregenerate=PregenerateConfig(max_prompt_tokens=64, max_length=80, batch_size=8, shard_size=20),
            model=PTPConfig(window=4, lora_rank=2),
            train=TrainConfig(
                max_steps=2, sequence_length=80, windows_per_sequence=8, warmup_steps=0, dtype="float32", save_every=2
            ),
        )

    return write
