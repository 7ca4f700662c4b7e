"""Setting up an experiment: look at model and data, choose settings that fit them, write the directory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptp.config import Mode, Tracker, Turns
from ptp.data.columns import FIRST_MESSAGE, Shape, default_mode, default_scheme, recognise
from ptp.data.documents import Document
from ptp.data.preparation import Preparation, described
from ptp.data.sources import load_source
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment, ExperimentConfig, check_new
from ptp.files import write_atomically
from ptp.model.architectures import check_architecture
from ptp.model.loading import load_context_length, load_tokenizer
from ptp.stages.prepare import open_preparation, open_source

TEMPLATE_FILE = "chat_template.jinja"
"""Where an experiment keeps a chat template of its own."""

MOST_TOKENS = 1024
"""Default length of a packed sequence, where the model's context is not shorter."""

SURVEYED_ROWS = 200
"""Rows that are looked at to see what a dataset holds."""

CHAT_MODES: tuple[Mode, ...] = ("prompt-distill", "full-chat")


@dataclass(frozen=True)
class Survey:
    """What a look at model and data found. context: the model's, in tokens, if its config says."""

    shape: Shape
    num_rows: int
    has_template: bool
    context: int | None

    @property
    def described(self) -> str:
        """One line on the data."""
        rows = f"{self.num_rows:,} {'row' if self.num_rows == 1 else 'rows'}"
        columns = ", ".join(self.shape.columns) or "none with text"
        is_chats = self.shape.kind in FIRST_MESSAGE
        chats = f"; chats in '{self.shape.column}' ({self.shape.kind})" if is_chats else ""
        return f"{rows}; text columns: {columns}{chats}"

    @property
    def mode(self) -> Mode:
        """The mode that suits the data; chats are answered only if the model has a template for them."""
        mode = default_mode(self.shape)
        if mode in CHAT_MODES and not self.has_template:
            raise ConfigError(
                "the dataset holds chats, but the tokenizer has no chat template; give one with --chat-template FILE, "
                "or choose --mode prompt-scheme-distill or fixed"
            )
        return mode

    def columns(self, mode: Mode) -> tuple[str, ...]:
        """The columns a mode can read, the best first; there may be none."""
        if mode in CHAT_MODES:
            return (self.shape.column,) if self.shape.column and self.shape.kind in FIRST_MESSAGE else ()
        # The first of a list of texts may be a prompt ("turns[0]"), but is no column.
        return tuple(name for name in self.shape.columns if not name.endswith("]"))

    def suits(self, mode: Mode) -> bool:
        """Whether the data and the tokenizer have what a mode needs."""
        if mode in CHAT_MODES and not self.has_template:
            return False
        return mode == "prompt-scheme-distill" or bool(self.columns(mode))

    @property
    def max_length(self) -> int:
        """A length of packed sequences that suits the model."""
        return min(MOST_TOKENS, self.context or MOST_TOKENS)


def survey(base_model: str, data: Mapping[str, Any]) -> Survey:
    """Look at a model's tokenizer and at the first rows of a dataset. data: settings of `DataConfig` given so far."""
    tokenizer = load_tokenizer(base_model)
    path = Path(data["path"])
    source = load_source(
        data["path"],
        config=data.get("config"),
        split=data.get("split"),
        revision=data.get("revision"),
        # Prose comes as files, prompts as lines of one file.
        whole_files=path.is_dir() or path.suffix == ".md",
    )
    rows = list(itertools.islice(source.rows, SURVEYED_ROWS))
    return Survey(
        shape=recognise(source.rows.column_names, rows),
        num_rows=len(source.rows),
        has_template=data.get("chat_template") is not None or tokenizer.chat_template is not None,
        context=load_context_length(base_model),
    )


@dataclass(frozen=True)
class Answers:
    """What a person decides when setting up an experiment; None takes what suits model and data.

    column: of the chats or texts; without a prompt scheme, also the one that a prompt is. user_turn: the prompt scheme
    is what the user says in a chat, by default if there is a chat template. max_length: tokens of a packed sequence,
    half of them for a prompt. windows_per_sequence: by default, so many that they cover a sequence once.
    """

    mode: Mode | None = None
    column: str | None = None
    prompt_scheme: str | None = None
    user_turn: bool | None = None
    turns: Turns = "each"
    drop_system: bool = False
    window: int = 16
    windows_per_sequence: int | None = None
    max_length: int | None = None
    num_prompts: int | None = None
    completions_per_prompt: int = 1
    lora_rank: int = 32
    tracker: Tracker = "tensorboard"

    def scheme(self, found: Survey) -> str:
        """The prompt scheme, as far as it is decided."""
        return self.prompt_scheme or (f"{{{self.column}}}" if self.column else default_scheme(found.shape))

    def settings(self, found: Survey) -> dict[str, dict[str, Any]]:
        """The sections of `ExperimentConfig` that they decide."""
        mode = self.mode or ("prompt-scheme-distill" if self.prompt_scheme else found.mode)
        data: dict[str, Any] = {"mode": mode}
        if mode == "prompt-scheme-distill":
            scheme = self.scheme(found)
            user_turn = found.has_template if self.user_turn is None else self.user_turn
            data["prompt_scheme"] = [{"role": "user", "content": scheme}] if user_turn else scheme
        elif columns := (self.column,) if self.column else found.columns(mode):
            data["column"] = columns[0]
        else:
            held = "chats" if mode in CHAT_MODES else "text"
            raise DataError(f"no column holds {held}, which {mode} needs; name one with --column")
        if mode in CHAT_MODES:
            data |= {"turns": self.turns, "drop_system": self.drop_system, "tools": found.shape.tools}
        max_length = self.max_length or found.max_length
        return {
            "data": data,
            "pregenerate": {
                "max_prompt_tokens": max_length // 2,
                "max_length": max_length,
                "num_prompts": self.num_prompts,
                "completions_per_prompt": self.completions_per_prompt,
            },
            "model": {"window": self.window, "lora_rank": self.lora_rank, "lora_alpha": self.lora_rank},
            "train": {
                "sequence_length": max_length,
                "windows_per_sequence": self.windows_per_sequence or max(1, max_length // self.window),
                "report_to": [] if self.tracker == "none" else [self.tracker],
            },
        }


@dataclass(frozen=True)
class Example:
    """A document as (text, whether it is trained) pieces; a prompt's answer is yet to be written."""

    pieces: list[tuple[str, bool]]
    is_prompt: bool


def distill(
    directory: Path, config: ExperimentConfig, show: Callable[[Example], None] = lambda example: None
) -> Experiment:
    """Set up an experiment directory, after checking that its model and data can be used; a template is copied in.

    show: gets the first example before anything is written; an exception of it leaves nothing behind.
    Raises `ConfigError` if there is an experiment already, or another file in its place, or the model cannot be made
    parallel; `DataError` if no row gives a document.
    """
    experiment = Experiment(directory, config)
    check_new(directory)
    show(example(experiment))
    contents: dict[str, bytes] = {}
    if config.data.chat_template is not None:
        contents[TEMPLATE_FILE] = Path(experiment.resolve(config.data.chat_template)).read_bytes()
        data = config.data.model_copy(update={"chat_template": TEMPLATE_FILE})
        experiment = Experiment(directory, config.model_copy(update={"data": data}))
    contents["README.md"] = _readme(experiment).encode()
    for name, content in contents.items():
        path = directory / name
        if path.exists() and path.read_bytes() != content:
            raise ConfigError(f"{path} is there already; choose another directory with --output-dir")
    for name, content in contents.items():
        write_atomically(directory / name, content)
    experiment.write()
    return experiment


def example(experiment: Experiment) -> Example:
    """The first document that the experiment's rows give, after checking that its model can be made parallel.

    Raises `ConfigError` for a chat mode without a template, `DataError` if none of the first rows gives a document.
    """
    check_architecture(experiment.base_model)
    data = experiment.config.data
    source, preparation = open_source(experiment), open_preparation(experiment)
    chats = data.mode in CHAT_MODES or not isinstance(data.prompt_scheme, str)
    if chats and preparation.tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {experiment.config.base_model} has no chat template, which {data.mode} needs here; "
            "give one with --chat-template FILE"
        )
    rows = itertools.islice(source.rows, SURVEYED_ROWS)
    document = next(preparation.documents(rows), None)
    if document is None:
        raise DataError(
            f"none of the first {min(SURVEYED_ROWS, len(source.rows))} rows of {source.name} gives anything to use: "
            f"{described(preparation.left_out)}"
        )
    return Example(_pieces(document, preparation), is_prompt=data.distils)


def _pieces(document: Document, preparation: Preparation) -> list[tuple[str, bool]]:
    edges = [0, *itertools.chain.from_iterable(document.spans), len(document)]
    parts = [document.ids[begin:end].tolist() for begin, end in itertools.pairwise(edges)]
    return [(str(preparation.tokenizer.decode(part)), number % 2 == 1) for number, part in enumerate(parts) if part]


def _readme(experiment: Experiment) -> str:
    directory, config = experiment.directory, experiment.config
    data = config.data
    what = {
        "prompt-distill": "its own answers in the chats of",
        "prompt-scheme-distill": "its own completions of prompts made from",
        "full-chat": "the assistant's turns in",
        "fixed": "the texts of",
    }[data.mode]
    sampling = f"    ptp_pregenerate {directory}\n" if data.distils else ""
    stages = ("pregenerate", "train") if data.distils else ("train",)
    several = "".join(f"    torchrun --nproc-per-node 4 -m ptp.cli.main {stage} {directory}\n" for stage in stages)
    return f"""# {directory.name}

Makes `{config.base_model}` parallel with {what} `{data.path}`. Sampling rule of every stage: {config.sampling}.

{sampling}    ptp_train {directory}
    ptp verify {directory}
    ptp_generate {directory}
    ptp bench {directory}
    ptp serve {directory}

Settings are in `experiment.yaml`, `pregenerate.yaml` and `train.yaml`; one may be given for a single run, as in
`ptp_train {directory} train.max_steps=4000`. Every stage goes on where it was stopped.

On four GPUs, with `train.batch_size` a fourth of what it is here, since it is that of a process:

{several}"""
