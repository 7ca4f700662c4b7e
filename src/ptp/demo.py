"""The demo: from nothing to a parallel language model in minutes, with no network and no file beside the package.

(1) A small Llama with its own byte-level BPE tokenizer learns Python from the interpreter's standard library; then
the ordinary stages: (2) distill, (3) pregenerate, (4) train, (5) verify on held-out function headers and report.
Every stage is skipped when its result is there, and goes on where it was stopped.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ptp.config import DataConfig, PregenerateConfig, PTPConfig, TrainConfig
from ptp.data.documents import content_group
from ptp.data.split import held_out
from ptp.experiment import Experiment, ExperimentConfig
from ptp.files import write_atomically
from ptp.sampling import SamplingRule
from ptp.stages.distill import distill
from ptp.stages.train import last_complete_checkpoint
from ptp.training.optimizers import make_optimizer

FUNCTION_CHARACTERS = (40, 3000)
"""Functions shorter or longer than this are left out."""

NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"}
"""Folders that are left out: what others installed, tests, and programs."""


@dataclass(frozen=True)
class DemoSize:
    """How large a pair of teacher and adapter is, and how long it learns; the defaults are `make demo`'s."""

    vocab_size: int = 384
    hidden_size: int = 128
    num_layers: int = 4
    teacher_steps: int = 650
    num_prompts: int = 2000
    max_new_tokens: int = 112
    adapter_steps: int = 600
    num_verified: int = 24

    sequence_length: int = 256
    budget: int = 12
    teacher_batch_size: int = 8
    teacher_learning_rate: float = 2e-2
    adapter_learning_rate: float = 1e-2


DEMO = DemoSize()
TINY = DemoSize(
    hidden_size=64, num_layers=2, teacher_steps=30, num_prompts=120, max_new_tokens=48, adapter_steps=30, num_verified=6
)
STARTER = DemoSize(
    vocab_size=1024, hidden_size=192, num_layers=5, teacher_steps=2400, num_prompts=8000, adapter_steps=1000
)
"""The pair that comes with the package (scripts/make_starter.py)."""


@dataclass(frozen=True)
class Function:
    """A function of the standard library: its header, all before the line end of its last line, and its source."""

    header: str
    source: str


def library_functions() -> list[Function]:
    """Every function of the interpreter's standard library, each once, in a fixed shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Function] = {}
    for path in sorted(root.rglob("*.py")):
        if NOT_OF_THE_LIBRARY & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for function in _functions(tree, source.splitlines()):
            if FUNCTION_CHARACTERS[0] < len(function.source) < FUNCTION_CHARACTERS[1]:
                found[function.source] = function
    functions = [found[source] for source in sorted(found)]
    random.Random(0).shuffle(functions)
    return functions


def _functions(tree: ast.Module, lines: list[str]) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.body[0].lineno > node.lineno:
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            header = "\n".join(source.splitlines()[: node.body[0].lineno - node.lineno])
            yield Function(header, source)


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins every text with <s>; </s> ends a function."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of one long stream of tokens for plain language modelling; item i is a pure function of (seed, i)."""

    def __init__(self, tokens: Tensor, block: int, length: int, seed: int) -> None:
        self.tokens, self.block, self.length, self.seed = tokens, block, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = random.Random(f"{self.seed}/{index}").randrange(len(self.tokens) - self.block)
        block = self.tokens[start : start + self.block]
        return {"input_ids": block, "labels": block}


def train_teacher(
    directory: Path, functions: Sequence[Function], size: DemoSize, callbacks: Sequence[TrainerCallback]
) -> None:
    """Train the demo's base model and write it to `directory` as any Hugging Face model."""
    set_seed(0)
    tokenizer = make_tokenizer([function.source for function in functions], size.vocab_size)
    encoded = tokenizer([function.source for function in functions])["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // 64,
        num_key_value_heads=size.hidden_size // 64,
        intermediate_size=3 * size.hidden_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory.parent / "teacher-checkpoints"),
            max_steps=size.teacher_steps,
            per_device_train_batch_size=size.teacher_batch_size,
            learning_rate=size.teacher_learning_rate,
            warmup_steps=min(30, size.teacher_steps // 4),
            lr_scheduler_type="linear",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="steps",
            save_steps=200,
            save_total_limit=1,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            logging_steps=50,
        ),
        train_dataset=TokenBlocks(stream, size.sequence_length, size.teacher_steps * size.teacher_batch_size, seed=0),
        optimizers=(make_optimizer("muon", model.named_parameters(), size.teacher_learning_rate), None),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(directory.parent / "teacher-checkpoints"))
    temporary = directory.with_name(f".teacher-{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(directory)


def make_teacher(
    directory: Path,
    size: DemoSize,
    callbacks: Sequence[TrainerCallback] = (),
    functions: Sequence[Function] | None = None,
) -> None:
    """Stage (1): the base model in `directory`/teacher and the prompts beside it; kept if they are there.

    functions: what it learns, or other texts with their headers; by default `library_functions`.
    """
    if (directory / "teacher" / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    functions = library_functions() if functions is None else functions
    headers = list(dict.fromkeys(function.header for function in functions))[: size.num_prompts]
    lines = "".join(json.dumps({"header": header}) + "\n" for header in headers)
    write_atomically(directory / "prompts.jsonl", lines.encode())
    out = held_out(np.array([content_group(header) for header in headers]))
    unseen = {header for header, is_out in zip(headers, out, strict=True) if is_out}
    # Neither the teacher nor the adapter sees a function whose header is held out.
    train_teacher(directory / "teacher", [f for f in functions if f.header not in unseen], size, callbacks)


def make_experiment(directory: Path, size: DemoSize) -> Experiment:
    """Stage (2): the experiment directory, as `ptp_distill` sets one up; kept if it is there."""
    if (directory / "experiment.yaml").exists():
        return Experiment.load(directory)
    return distill(directory, demo_config(size))


def demo_config(size: DemoSize) -> ExperimentConfig:
    """The demo's experiment."""
    return ExperimentConfig(
        base_model="teacher",
        data=DataConfig(path="prompts.jsonl", mode="prompt-scheme-distill", prompt_scheme="{header}"),
        # The usual setting for code (Chen et al. 2021, HumanEval's pass@1).
        sampling=SamplingRule(temperature=0.2, top_p=0.95),
        pregenerate=PregenerateConfig(
            max_prompt_tokens=96, max_new_tokens=size.max_new_tokens, max_length=size.sequence_length
        ),
        # On a model this small a call's time goes into single operations: fewer gated layers, of higher rank, pay.
        model=PTPConfig(
            window=8,
            lora_rank=64,
            lora_alpha=64,
            lora_targets=("gate_proj", "up_proj", "down_proj"),
        ),
        train=TrainConfig(
            max_steps=size.adapter_steps,
            batch_size=8,
            sequence_length=size.sequence_length,
            windows_per_sequence=24,
            learning_rate=size.adapter_learning_rate,
            optimizer="muon",
            warmup_steps=min(20, size.adapter_steps // 4),
            save_every=200,
            budget=size.budget,
        ),
    )
