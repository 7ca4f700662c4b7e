"""The settings of a PTP model and of an experiment, typed and strict."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ptp.records import Record


class StudentConfig(Record):
    """Size of a student: a Llama trained from scratch on the base model's completions (METHOD §6)."""

    hidden_size: int = Field(ge=2)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads(self) -> StudentConfig:
        # Rotary position embeddings turn pairs of numbers.
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"a student's hidden_size must be an even number for each head; got {self.hidden_size} for "
                f"{self.num_heads} heads"
            )
        return self

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden_size


class PTPConfig(Record):
    """What makes a base model a PTP model.

    variant: "categorical" (C-PTP) outputs the distribution of the token after each u, in which u picks the token;
        "one_hot" (O-PTP) outputs the token itself as the argmax.
    pick: how u picks (categorical only): "soft" learns how far the distribution may be off (see `ptp.soft_pick`),
        "exact" trusts it.
    chain, chain_size: how many tokens directly before a draft its prediction is corrected by, 0 for none, and the
        hidden numbers of that correction (see `ptp.model.proposal`).
    continuation: whether drafts without a window position continue those that have one, from the base model's state
        that predicts the bonus token (categorical with a chain only; see `ptp.model.proposal.Continuation`).
    window: L, window positions trained together, and the most positions one branch may have in decoding.
    auxiliary, auxiliary_size: name and size of the embedding of u (see `ptp.model.auxiliary`).
    anchor: add the embedding of the last context token to no window position, the "first", or "all".
    lora_rank, lora_alpha, lora_targets: the gated LoRA; targets are "all-linear" or last parts of module names.
    trained: a gated "lora" on the frozen base model, or "all" weights of the base model, without a gate.
    student: train a student of this size in place of the base model, all its weights. Where all weights train, the
        lora_ settings say nothing.
    """

    variant: Literal["one_hot", "categorical"] = "categorical"
    pick: Literal["soft", "exact"] = "soft"
    chain: int = Field(3, ge=0)
    chain_size: int = Field(512, ge=1)
    continuation: bool = True
    window: int = Field(16, ge=1)
    auxiliary: str = "binary"
    auxiliary_size: int = Field(32, ge=2)
    anchor: Literal["none", "first", "all"] = "first"
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    trained: Literal["lora", "all"] = "lora"
    student: StudentConfig | None = None

    @property
    def picks_softly(self) -> bool:
        """Whether what a window position proposes is a soft pick."""
        return self.variant == "categorical" and self.pick == "soft"

    @property
    def continues(self) -> bool:
        """Whether drafts are made without window positions too: a chain leads them, and u picks them."""
        return self.continuation and self.variant == "categorical" and self.chain > 0 and not self.trains_all

    @property
    def num_kinds(self) -> int:
        """Ways to make drafts that are trained and measured: windows, and continuations of nothing if there are."""
        return 1 + self.continues

    @property
    def num_candidates(self) -> int:
        """Tokens that are proposed for each place: a soft pick that continues has a second one to fall back on."""
        return 1 + (self.continues and self.picks_softly)

    @property
    def num_curves(self) -> int:
        """Curves of `Calibration`: what a draft's confidence is worth is learnt apart for so many classes of drafts."""
        return self.num_kinds + self.lead

    @property
    def trains_all(self) -> bool:
        """Whether all weights train: no gate, and no frozen base model to verify with."""
        return self.trained == "all" or self.student is not None

    @property
    def shift(self) -> int:
        """Position of a window input minus the position of the token whose u it carries.

        An input that carries u_p stands at position p − 1 and predicts token p in O-PTP; it stands at p and predicts
        the distribution of token p + 1 in C-PTP.
        """
        return 0 if self.variant == "categorical" else -1

    @property
    def lead(self) -> int:
        """Positions a branch spends before its first draft: O-PTP's first output is the bonus token, known anyway."""
        return -self.shift

    @property
    def num_drafts(self) -> int:
        """Drafts a full window proposes."""
        return self.window - self.lead


Mode = Literal["prompt-distill", "prompt-scheme-distill", "full-chat", "fixed"]
"""What is learnt from a dataset: the base model's answers to its chats or to prompts made by a scheme, or the chats'
own assistant turns, or its texts."""

Turns = Literal["each", "first"]
"""Which turns of a chat's assistant are answered anew."""

Tracker = Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
"""Trackers offered; `train.report_to` takes any that transformers knows."""


class SchemeTurn(Record):
    """One turn of a prompt scheme that is a chat; `content` is a format string over the dataset's columns."""

    role: str
    content: str


class DataConfig(Record):
    """The dataset and how prompts or documents are made of it.

    path, config, split, revision: as `datasets.load_dataset` takes them, or a local file or folder. column: the one
    that holds the chats or the texts. prompt_scheme: a format string over the columns, or turns of a chat, the last of
    which, if it is the assistant's, is left open. turns: a prompt before "each" assistant turn or the "first" one.
    drop_system: leave system messages out. roles: further role names, as {"narrator": "assistant"}. tools: column of
    tool definitions for the chat template. chat_template: a file used in place of the tokenizer's own.
    """

    path: str
    mode: Mode
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    column: str = "text"
    prompt_scheme: str | tuple[SchemeTurn, ...] = "{text}"
    turns: Turns = "each"
    drop_system: bool = False
    roles: dict[str, str] = Field(default_factory=dict)
    tools: str | None = None
    chat_template: str | None = None

    @property
    def distils(self) -> bool:
        """Whether the base model answers prompts; else the dataset's own text is trained."""
        return self.mode in ("prompt-distill", "prompt-scheme-distill")


class Endpoint(Record):
    """An OpenAI-compatible server that samples in place of the base model.

    url: its base, such as http://host:8000/v1. model: the base model's name there. api_key_env: environment variable
    that holds the key. concurrency: requests in flight. timeout: seconds a request may take. max_retries: further
    tries of a request that failed for a passing reason.
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(64, ge=1)
    timeout: float = Field(600.0, gt=0)
    max_retries: int = Field(8, ge=0)

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        # A port that is no number, or a bracket left open, is a ValueError with words of its own.
        with suppress(ValueError):
            parts = urlsplit(value)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                return value
        raise ValueError(f"url must be the server's base address, such as http://host:8000/v1; got {value!r}")

    @field_validator("api_key_env")
    @classmethod
    def _api_key_env(cls, value: str) -> str:
        if not value.isidentifier():
            # Not repeated: it may be the key.
            raise ValueError("api_key_env must be the name of an environment variable, such as OPENAI_API_KEY")
        return value


class PregenerateConfig(Record):
    """How the base model's completions are sampled.

    Lengths are in tokens. max_prompt_tokens: longer prompts are left out and counted. max_new_tokens: most tokens
    of a completion, if not null. max_length: most of prompt and completion together. num_prompts: the first so many
    only. shard_size: completions of one shard, which is written at once: a kill loses at most one. batch_size: rows of
    a call; "auto" takes what fits into memory. engine: an endpoint to sample with instead.
    """

    max_prompt_tokens: int = Field(512, ge=1)
    max_new_tokens: int | None = Field(None, ge=2)
    max_length: int = Field(1024, ge=3)
    num_prompts: int | None = Field(None, ge=1)
    completions_per_prompt: int = Field(1, ge=1)
    batch_size: Literal["auto"] | int = "auto"
    shard_size: int = Field(1024, ge=1)
    seed: int = Field(0, ge=0)
    engine: Endpoint | None = None

    @model_validator(mode="after")
    def _sizes(self) -> PregenerateConfig:
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ValueError(f"pregenerate.batch_size must be auto or a positive number of rows; got {self.batch_size}")
        if self.max_prompt_tokens > self.max_length - 2:
            raise ValueError(
                f"pregenerate.max_prompt_tokens is {self.max_prompt_tokens}, which leaves no room for a completion in "
                f"pregenerate.max_length {self.max_length}"
            )
        return self


class TrainConfig(Record):
    """How the adapter, or a model all of whose weights train, is trained.

    objective: whose intervals u lies in: the "teacher"'s, so that windows learn to say what it would; or the model's
    own, which is "inverse_autoregressive" training without a teacher (categorical only; METHOD §3). max_steps:
    optimiser steps; num_epochs: passes over the data in their place. batch_size: packed sequences per step and process,
    gradient_accumulation_steps times. sequence_length: tokens of one. windows_per_sequence: N. optimizer: "muon" or
    "adamw" (see `ptp.training.optimizers.make_optimizer`). dtype: of the base model's weights; where all weights train
    they are float32, and computed with in dtype. beta: concentration of u's place in its interval (METHOD §3).
    distillation: share of the KL to the teacher's distribution in what windows learn theirs from, that of the text's
    own tokens being the rest (categorical only; null: see `kl_share`). position_decay: γ, weight γ^k of window index k.
    gradient_checkpointing: keep less for the backward pass and compute it again there, for less memory and more time.
    save_every: steps between checkpoints, each evaluated on held-out windows; save_minutes: minutes between further
    ones. log_every: steps between rows of metrics. budget: positions of a decoding call that τ is simulated for. fsdp:
    the base model's weights are shared out between the processes of several GPUs. report_to: trackers, as transformers
    names them.
    """

    objective: Literal["teacher", "inverse_autoregressive"] = "teacher"
    max_steps: int | None = Field(2000, ge=1)
    num_epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    sequence_length: int = Field(1024, ge=8)
    windows_per_sequence: int = Field(64, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    optimizer: str = "muon"
    warmup_steps: int = Field(50, ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    beta: float = Field(0.3, gt=0)
    distillation: float | None = Field(None, ge=0, le=1)
    position_decay: float = Field(1.0, gt=0, le=1)
    gradient_checkpointing: bool = False
    save_every: int = Field(250, ge=1)
    save_minutes: float | None = Field(None, gt=0)
    log_every: int = Field(10, ge=1)
    budget: int = Field(24, ge=0)
    fsdp: bool = False
    report_to: tuple[str, ...] = ("tensorboard",)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"give one of train.max_steps and train.num_epochs, the other null; got {self.max_steps} and "
                f"{self.num_epochs}"
            )
        return self

    def kl_share(self, model: PTPConfig) -> float:
        """`distillation`; unless it is set, all where windows have a distribution and a teacher, else nothing."""
        if self.distillation is not None:
            return self.distillation
        return float(model.variant == "categorical" and not model.trains_all and not self.inverse)

    @property
    def inverse(self) -> bool:
        """Whether u is drawn in intervals of the model's own distributions."""
        return self.objective == "inverse_autoregressive"

    def num_steps(self, num_sequences: int, num_processes: int = 1) -> int:
        """Optimiser steps for a data set that packs into so many sequences."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return max(1, round(self.num_epochs * num_sequences / self.sequences_per_step(num_processes)))

    def sequences_per_step(self, num_processes: int = 1) -> int:
        """Packed sequences of an optimiser step, of all processes."""
        return self.batch_size * self.gradient_accumulation_steps * num_processes
