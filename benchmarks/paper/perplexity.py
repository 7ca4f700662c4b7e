"""Categorical PTP from scratch by inverse autoregressive training, against plain autoregression: validation perplexity.

    python benchmarks/paper/perplexity.py FILE_OR_FOLDER_OF_TEXTS
    python benchmarks/paper/perplexity.py FOLDER --device cuda --size 34M --vocab-size 8192 --sequence-length 1024 ...

The paper's experiment (19.88 against 19.81) in small: about ten minutes on a CPU as it stands, with a vocabulary of
single bytes. Two Llamas of one size start from the same weights and learn the same sequences in the same order, as many
steps, with as many targets a step: one by transformers' own next-token loss, one in windows, each of whose tokens is
predicted from the context and from u of the window's tokens before it. What differs: every place is a target of plain
training once a pass, while windows start at random, so some places are targets of several windows and some of none; and
PTP reads its windows besides the context, once to draw u and once to learn: a step is more than twice the work.

PTP's perplexity is exp(−mean log P_k(t_k)) over window positions, u drawn uniformly in each token's interval under the
model's own distribution. The model generates text by picking tokens with uniform u, so it generates t with probability
P_0(t_0) · E[P_1(t_1 | u_0) · …], u uniform in those intervals (Theorem 2). The mean of the logarithm lies below the
logarithm of this mean (Jensen): the figure can only be too high. Both models are measured on the same tokens; "one by
one" is the PTP model's context pass, which predicts each token from the tokens before it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine slower still

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel, get_linear_schedule_with_warmup

from ptp.config import PTPConfig, StudentConfig, TrainConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import WindowStream, collate
from ptp.demo import make_tokenizer
from ptp.evaluation.experiment_report import hardware
from ptp.model.auxiliary import EMBEDDINGS
from ptp.model.student import StudentModel
from ptp.sampling import SamplingRule
from ptp.scaling import LADDER, build_student
from ptp.training.objective import Objective, make_stream, measured_pass, targets_of, trained_states
from ptp.training.optimizers import make_optimizer

VALIDATION_SHARE = 20
"""The last piece in so many of the text is for validation."""

SIZES = {"small": StudentConfig(hidden_size=128, num_layers=4, num_heads=2), **LADDER}
"""The smallest rungs have too few layers to turn u into a token, and that into what follows."""

NAMES = ("plain autoregression", "PTP in windows", "PTP one by one")
Batch = dict[str, Tensor]


def read_pieces(path: Path, vocab_size: int, length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A text, or all of a folder one after another, in pieces of so many tokens: to train on, and to validate with."""
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files if file.suffix in (".txt", ".md"))
    lines = text.splitlines(keepends=True)
    tokenizer = make_tokenizer(lines[: len(lines) - len(lines) // VALIDATION_SHARE], vocab_size)
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    ids = np.concatenate([np.asarray(line, np.int32) for line in encoded])
    pieces = np.split(ids[: len(ids) // length * length], len(ids) // length)
    num_validation = max(1, len(pieces) // VALIDATION_SHARE)
    return pieces[:-num_validation], pieces[-num_validation:]


def stream_of(pieces: list[np.ndarray], config: TrainConfig, window: int, length: int) -> WindowStream:
    """Pieces with random windows, so many in all; each is a document, every token but its first trained."""
    documents = [Document(piece, ((1, len(piece)),), number=number) for number, piece in enumerate(pieces)]
    stream = make_stream(Documents.of(documents), config, window)
    stream.length = length
    return stream


def batches(stream: WindowStream, size: int, device: str) -> list[Batch]:
    """All items of a stream, some at a time."""
    items = [
        collate([stream[i] for i in range(begin, begin + size)]) for begin in range(0, len(stream) - size + 1, size)
    ]
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in items]


def train(
    model: nn.Module, loss_of: Callable[[Batch], Tensor], stream: WindowStream, config: TrainConfig, device: str
) -> float:
    """Train all weights; returns seconds. Loss is printed ten times."""
    num_steps = config.num_steps(len(stream))
    optimizer = make_optimizer(config.optimizer, model.named_parameters(), config.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, config.warmup_steps, num_steps)
    started = time.perf_counter()
    model.train()
    for step in range(num_steps):
        items = [stream[i] for i in range(step * config.batch_size, (step + 1) * config.batch_size)]
        batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, num_steps // 10) == 0:
            print(f"  step {step + 1:6} loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    model.eval()
    return time.perf_counter() - started


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """−log P of tokens (...) under logits (..., V), in float32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none").view_as(tokens)


@torch.no_grad()
def measure(plain: PreTrainedModel, ptp: StudentModel, validation: list[Batch]) -> tuple[Tensor, Tensor]:
    """Sums of −log P by way of `NAMES` and place in the window, (3, L + 1); and how many tokens each place had."""
    sums = torch.zeros(len(NAMES), ptp.ptp_config.window + 1, dtype=torch.float64)
    counts = torch.zeros(sums.shape[1])
    for batch in validation:
        output = ptp(**batch, inverse=True)
        states = trained_states(output, batch, ptp, first=True).squeeze(3)
        targets = targets_of(batch, output.mass, ptp, first=True)
        before, ids = targets.index.flatten(1) - 1, batch["ids"]

        def one_by_one(logits: Tensor, ids: Tensor = ids, before: Tensor = before) -> Tensor:
            return token_losses(logits[:, :-1], ids[:, 1:]).gather(1, before.clamp(max=ids.shape[1] - 2))

        in_windows = torch.stack(
            [token_losses(ptp.logits(states[:, :, k]), targets.token_ids[:, :, k]) for k in range(states.shape[2])], 2
        )
        losses = [one_by_one(plain(ids).logits), in_windows.flatten(1), one_by_one(ptp.logits(output.context))]
        valid = targets.valid
        sums += torch.stack([(loss.view_as(valid) * valid).sum((0, 1)).cpu() for loss in losses])
        counts += valid.sum((0, 1)).cpu()
    return sums, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=259)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--optimizer", default="muon", choices=["adamw", "muon"])
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--auxiliary", default="linear", choices=EMBEDDINGS)
    parser.add_argument(
        "--beta", type=float, default=1.0, help="of u in training; 1 is what perplexity is measured with"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    size, window, length, device = SIZES[options.size], options.window, options.sequence_length, options.device

    config = TrainConfig(
        objective="inverse_autoregressive",
        max_steps=options.steps,
        batch_size=options.batch,
        sequence_length=length,
        # As many targets as plain training has: every token of a sequence but its first.
        windows_per_sequence=max(1, round((length - 1) / (window + 1))),
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
        beta=options.beta,
        seed=options.seed,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    training, held_out = read_pieces(options.texts, options.vocab_size, length)
    stream = stream_of(training, config, window, options.steps * options.batch)
    uniform = config.model_copy(update={"beta": 1.0})
    validation = batches(stream_of(held_out, uniform, window, 4 * len(held_out)), min(4, len(held_out)), device)

    def new_student() -> PreTrainedModel:
        torch.manual_seed(options.seed)
        return build_student(size, LlamaConfig(vocab_size=options.vocab_size), length).to(device)

    plain = new_student()
    settings = PTPConfig(variant="categorical", window=window, auxiliary=options.auxiliary, student=size)
    ptp = StudentModel(new_student(), settings, teacher="", teacher_fingerprint="").to(device)
    ptp.rule = rule = SamplingRule()
    objective = Objective(rule, torch.ones(window, device=device), inverse=True)

    def loss_in_windows(batch: Batch) -> Tensor:
        return measured_pass(ptp, batch, objective)[0] / objective.num_items(batch, ptp)

    print(f"{len(training)} pieces of {length} tokens; plain autoregression", file=sys.stderr)
    seconds = [train(plain, lambda batch: plain(batch["ids"], labels=batch["ids"]).loss, stream, config, device)]
    print("PTP", file=sys.stderr)
    seconds += [train(ptp, loss_in_windows, stream, config, device)]
    sums, counts = measure(plain, ptp, validation)

    by_place, overall = (sums / counts).exp(), (sums.sum(1) / counts.sum()).exp()
    print(
        f"{hardware()}; {options.size}, windows of {window}, vocabulary {options.vocab_size}, {options.steps} steps of "
        f"{options.batch} sequences of {length}, {options.optimizer} {options.learning_rate:g}, beta {options.beta:g}, "
        f"{options.auxiliary} embedding; "
        f"{int(counts.sum())} validation tokens; {seconds[0]:.0f} s and {seconds[1]:.0f} s of training\n"
    )
    print(f"| perplexity | {' | '.join(NAMES)} |\n|---|---|---|---|")
    for place in range(window + 1):
        print(f"| token {place} of a window | {' | '.join(f'{value:.2f}' for value in by_place[:, place].tolist())} |")
    print(f"| all | {' | '.join(f'**{value:.2f}**' for value in overall.tolist())} |\n")
    result = {
        "hardware": hardware(),
        "options": {name: str(value) for name, value in vars(options).items() if name != "texts"},
        "perplexity": dict(zip(NAMES, overall.tolist(), strict=True)),
        "by_place": dict(zip(NAMES, by_place.tolist(), strict=True)),
        "num_tokens": int(counts.sum()),
        "seconds": seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
