"""What a window predicts and how often it is right, as sums and counts (METHOD §3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptp.config import PTPConfig
from ptp.sampling import SamplingRule, pick, warp
from ptp.training.losses import Targets


def predictions(logits: Tensor, target_u: Tensor, config: PTPConfig, rule: SamplingRule) -> Tensor:
    """The token each window position proposes, as in decoding. logits: (..., V); target_u: (...); returns (...)."""
    if config.variant == "one_hot":
        return logits.argmax(-1)
    return pick(warp(logits, rule), target_u)


@dataclass
class WindowMetrics:
    """Sums over windows, so that parts evaluated apart can be added.

    correct, counted: (L,) right and valid predictions by window index. survived, tried: (L − lead,) for each draft
    w, windows whose first w drafts are all right, of those whose first w − 1 are and whose w-th has a target.
    """

    correct: Tensor
    counted: Tensor
    survived: Tensor
    tried: Tensor
    loss: float = 0.0
    num_targets: int = 0
    num_masked: int = 0
    lead: int = field(default=0)

    @classmethod
    def empty(cls, config: PTPConfig) -> WindowMetrics:
        """Nothing counted yet."""
        by_index, by_draft = torch.zeros(config.window), torch.zeros(config.num_drafts)
        return cls(by_index, by_index.clone(), by_draft, by_draft.clone(), lead=config.lead)

    def add(self, predicted: Tensor, targets: Targets, loss: float) -> None:
        """Count a batch. predicted: (B, N, L); loss: mean over the batch's valid targets."""
        right = (predicted == targets.token_ids) & targets.valid
        self.correct += right.sum((0, 1)).cpu()
        self.counted += targets.valid.sum((0, 1)).cpu()
        num_targets = int(targets.valid.sum())
        self.loss += loss * num_targets
        self.num_targets += num_targets
        self.num_masked += int((targets.in_span & ~targets.valid).sum())
        drafted, valid = right[..., self.lead :].long(), targets.valid[..., self.lead :]
        run = drafted.cumprod(-1)
        before = torch.cat([torch.ones_like(run[..., :1]), run[..., :-1]], dim=-1)
        self.survived += run.sum((0, 1)).cpu()
        self.tried += (before.bool() & valid).sum((0, 1)).cpu()

    @property
    def accuracy(self) -> list[float]:
        """Share of right predictions by window index."""
        return (self.correct / self.counted.clamp(min=1)).tolist()

    @property
    def survival(self) -> tuple[float, ...]:
        """The acceptance profile: s_w, the chance that a branch's first w drafts are all accepted.

        A product of conditional rates, so it never rises, and windows cut short by their document's end count for as
        far as they go.
        """
        return tuple((self.survived / self.tried.clamp(min=1)).cumprod(0).tolist())

    @property
    def mean_correct(self) -> float:
        """Drafts right before the first error: what decoding can accept from a full window."""
        return sum(self.survival)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.num_targets)
