"""Make the pair that comes with the package, src/ptp/starter: a base model, its adapter, and their card.

    make starter  # python scripts/make_starter.py --size starter

standard library ── stage 1 ──► base model ── bfloat16 ──► stages 2 to 5 ──► adapter, τ ── bench ──► folder and card

The stages are those of `ptp demo`, and go on where they were stopped. The base model is rounded before the others, so
that what is distilled, trained and measured is the model that is shipped, to the bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from ptp import Decoder, PTPModel
from ptp.cli.common import STARTER as FOLDER
from ptp.cli.common import note, progress_bar, run
from ptp.cli.demo import make_base_model, make_parallel
from ptp.demo import DEMO, STARTER, TINY, DemoSize
from ptp.errors import DataError
from ptp.evaluation.experiment_bench import bench_experiment
from ptp.experiment import Experiment
from ptp.files import appearing, append_line, write_atomically
from ptp.model.adapter import AUXILIARY_WEIGHTS, LORA_WEIGHTS, weights_hash, write_weights
from ptp.model.card import measured_card
from ptp.model.loading import load_config, load_tokenizer
from ptp.model.repository import copy_adapter
from ptp.stages.train import MEASUREMENT

SIZES = {"starter": STARTER, "demo": DEMO, "tiny": TINY}
MOST_BYTES = 20_000_000
LICENCE, ORIGIN = "LICENSE-PYTHON.txt", "origin.json"
REPETITIONS = 3
"""Times each prompt is answered by each way of decoding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="starter")
    parser.add_argument("--directory", type=Path, help="experiment directory (default: experiments/starter)")
    parser.add_argument("--to", type=Path, help="folder to replace (default: the package's; of other sizes, a new one)")
    parser.add_argument("--fresh", action="store_true", help="delete the experiment directory and start over")
    arguments = parser.parse_args()
    size, is_starter = SIZES[arguments.size], arguments.size == "starter"
    directory = arguments.directory or Path("experiments") / ("starter" if is_starter else f"starter-{arguments.size}")
    folder = arguments.to or (FOLDER if is_starter else directory / "starter")
    if arguments.fresh and directory.exists():
        shutil.rmtree(directory)
    # Programs of the package switch it off before transformers is imported.
    logging.disable_progress_bar()
    run(lambda: make_starter(directory, size, folder))


def make_starter(directory: Path, size: DemoSize, folder: Path) -> None:
    """All stages in an experiment directory, and then the folder. Nothing is written there after a mismatch."""
    make_base_model(directory, size)
    finish_base_model(directory / "teacher", size)
    if make_parallel(directory, size).count("mismatch"):
        raise DataError(f"a text differs from plain decoding, see {directory}/report.html; {folder} is left as it was")
    bench(Experiment.load(directory), size)
    write_starter(directory, folder)
    note(f"wrote {folder}; its README.md says what it is")


def finish_base_model(base_model: Path, size: DemoSize) -> None:
    """Round the weights to bfloat16 and store them so, with where they come from beside them; done again, the same.

    The configuration keeps saying float32: in this the model is loaded, and computes as it did in training.
    """
    weights = load_file(base_model / "model.safetensors")
    write_weights(base_model / "model.safetensors", {name: each.to(torch.bfloat16) for name, each in weights.items()})
    if not (base_model / ORIGIN).exists():
        shutil.copyfile(python_licence(), base_model / LICENCE)
        origin = {"python": platform.python_version(), "size": asdict(size)}
        write_atomically(base_model / ORIGIN, json.dumps(origin, indent=2).encode() + b"\n")


def python_licence() -> Path:
    """The licence of the interpreter and its library, which comes with both."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    for folder in (standard_library, standard_library.parent, Path(sys.base_prefix)):
        if (folder / "LICENSE.txt").is_file():
            return folder / "LICENSE.txt"
    raise DataError(f"no LICENSE.txt by {standard_library}, which must go with the model: use another installation")


def bench(experiment: Experiment, size: DemoSize) -> None:
    """Speed against other ways of decoding, as `ptp bench` measures it; kept of the same weights."""
    lines = experiment.directory / "bench.jsonl"
    if lines.is_file() and weights_hash(experiment.adapter) in lines.read_text(encoding="utf-8"):
        return
    with progress_bar() as progress:
        found = bench_experiment(
            experiment,
            num_prompts=size.num_verified,
            max_new_tokens=size.max_new_tokens,
            budget=size.budget,
            repetitions=REPETITIONS,
            progress=progress,
        )
    append_line(lines, found.to_json())


def write_starter(directory: Path, folder: Path) -> None:
    """Write the folder whole, in place of the one that is there. Raises `DataError` if it would be too large."""
    with appearing(folder) as temporary:
        shutil.copytree(directory / "teacher", temporary / "base_model", copy_function=shutil.copyfile)
        copy_adapter(directory / "adapter", temporary / "adapter", "../base_model")
        shutil.copyfile(directory / "adapter" / MEASUREMENT, temporary / "adapter" / MEASUREMENT)
        num_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        if num_bytes > MOST_BYTES:
            raise DataError(f"the pair takes {num_bytes:,} bytes, and {MOST_BYTES:,} may be shipped: make it smaller")
        (temporary / "README.md").write_text(card(directory, temporary, num_bytes), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)


def card(directory: Path, folder: Path, num_bytes: int) -> str:
    """The README.md: what is in a folder, from its files, and what was measured of it, from those of the experiment."""
    origin = json.loads((folder / "base_model" / ORIGIN).read_text(encoding="utf-8"))
    metadata = {"license": "apache-2.0", "model_name": "starter"}
    return measured_card(
        directory / "adapter",
        Path(__file__).with_name("starter.md.j2").read_text(encoding="utf-8"),
        metadata,
        f"functions of the standard library of Python {origin['python']}, see above",
        origin=origin,
        config=load_config(str(folder / "base_model")),
        num_parameters=num_parameters(folder / "base_model" / "model.safetensors"),
        num_adapter_parameters=sum(
            num_parameters(folder / "adapter" / name) for name in (LORA_WEIGHTS, AUXILIARY_WEIGHTS)
        ),
        megabytes=num_bytes / 1e6,
        example=example(folder),
    )


def num_parameters(weights: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(weights).values())


def example(folder: Path) -> dict[str, Any]:
    """What the pair writes when it is asked as the card says."""
    prompt = "def fibonacci(n):"
    model = PTPModel.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder / "base_model"))
    out = Decoder(model).generate(list(tokenizer(prompt)["input_ids"]), max_new_tokens=128)
    return {"prompt": prompt, "text": prompt + str(tokenizer.decode(out.token_ids, skip_special_tokens=True))}


if __name__ == "__main__":
    main()
