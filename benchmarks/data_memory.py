"""Memory and time of tokenising, packing and reading a large data set of texts, in a process of its own.

    python benchmarks/data_memory.py --model MODEL --tokens 100000000

Writes texts of about so many tokens (random words of the interpreter's own library sources), prepares them as
`ptp_train` does in mode fixed, packs them, draws windows on 200 sequences, and prints the peak of resident memory
(pages of mapped files included) beside that of the same steps on a thousandth of the texts. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sysconfig
import tempfile
import time
from pathlib import Path

SEQUENCE_LENGTH, NUM_READ = 512, 200
CHARACTERS_PER_TEXT = 3000


def write_texts(path: Path, num_characters: int) -> None:
    """A file with a JSON row for each text."""
    words = [
        word
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        for word in file.read_text(encoding="utf-8", errors="ignore").split()
    ]
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(max(100, num_characters // CHARACTERS_PER_TEXT)):
            begin = draw.randrange(len(words) - CHARACTERS_PER_TEXT)
            text = " ".join(words[begin : begin + CHARACTERS_PER_TEXT])[:CHARACTERS_PER_TEXT]
            file.write(json.dumps({"text": text}) + "\n")


def measure(model: str, texts: str, directory: str, results: multiprocessing.Queue) -> None:
    """Prepare, pack and read; the peak is this process's own."""
    from ptp.config import DataConfig, TrainConfig
    from ptp.data.packing import WindowStream
    from ptp.experiment import Experiment, ExperimentConfig
    from ptp.sampling import SamplingRule
    from ptp.stages.prepare import prepare

    config = ExperimentConfig(
        base_model=model,
        data=DataConfig(path=texts, mode="fixed"),
        sampling=SamplingRule(),
        train=TrainConfig(sequence_length=SEQUENCE_LENGTH),
    )
    started = time.monotonic()
    documents = prepare(Experiment(Path(directory), config)).documents
    prepared = time.monotonic()
    stream = WindowStream(
        documents, sequence_length=SEQUENCE_LENGTH, num_windows=32, window=16, beta=0.3, seed=0, length=None
    )
    packed = time.monotonic()
    for index in range(min(NUM_READ, len(stream))):
        stream[index]
    done = time.monotonic()
    results.put(
        {
            "tokens": int(documents.lengths.sum()),
            "documents": len(documents),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "tokenise_seconds": prepared - started,
            "pack_seconds": packed - prepared,
            "read_milliseconds_per_sequence": 1000 * (done - packed) / min(NUM_READ, len(stream)),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's directory or hub id; only its tokenizer is used")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--characters-per-token", type=float, default=2.0, help="of this tokenizer, roughly")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, float]] = {}
    for name, num_tokens in (("a thousandth", arguments.tokens // 1000), ("all", arguments.tokens)):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
            texts = Path(folder) / "texts.jsonl"
            write_texts(texts, int(num_tokens * arguments.characters_per_token))
            queue = context.Queue()
            process = context.Process(target=measure, args=(arguments.model, str(texts), folder, queue))
            process.start()
            results[name] = queue.get()
            process.join()
        print(f"{name:13}" + "".join(f"  {key} {value:,.1f}" for key, value in results[name].items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
