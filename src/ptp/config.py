"""The settings of a PTP model and of an experiment, typed and strict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ptp.records import Record


class PTPConfig(Record):
    """What makes a base model a PTP model.

    variant: "categorical" (C-PTP) outputs the distribution of the token after each u, which `pick` turns into a
        token; "one_hot" (O-PTP) outputs the token itself as the argmax.
    window: L, window positions trained together, and the most positions one branch may have in decoding.
    auxiliary, auxiliary_size: name and size of the embedding of u (see `ptp.model.auxiliary`).
    anchor: add the embedding of the last context token to no window position, the "first", or "all".
    lora_rank, lora_alpha, lora_targets: the gated LoRA; targets are "all-linear" or last parts of module names.
    """

    variant: Literal["one_hot", "categorical"] = "one_hot"
    window: int = Field(16, ge=1)
    auxiliary: str = "binary"
    auxiliary_size: int = Field(32, ge=2)
    anchor: Literal["none", "first", "all"] = "first"
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"

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


class PregenerateConfig(Record):
    """How the base model's completions are sampled.

    Lengths are in tokens; longer prompts are left out and counted.
    """

    max_prompt_tokens: int = Field(512, ge=1)
    max_new_tokens: int = Field(512, ge=2)
    batch_size: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)


class TrainConfig(Record):
    """How the adapter is trained.

    max_steps: optimiser steps. batch_size: packed sequences per step and process. sequence_length: tokens of one;
    windows_per_sequence: N. beta: concentration of u's place in its interval (METHOD §3). distillation: weight of the
    KL to the teacher beside the cross-entropy's 1 (categorical only). position_decay: γ, weight γ^k of window
    index k. save_every: steps between checkpoints.
    """

    max_steps: int = Field(2000, ge=1)
    batch_size: int = Field(8, ge=1)
    sequence_length: int = Field(1024, ge=8)
    windows_per_sequence: int = Field(64, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    optimizer: str = "adamw"
    warmup_steps: int = Field(50, ge=0)
    beta: float = Field(0.3, gt=0)
    distillation: float = Field(0.0, ge=0)
    position_decay: float = Field(1.0, gt=0, le=1)
    bf16: bool = True
    save_every: int = Field(250, ge=1)
    seed: int = Field(0, ge=0)
