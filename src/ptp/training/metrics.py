"""What windows predict and how often it is right, as sums and counts (METHOD §3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ptp.calibration import NUM_BINS, Calibration, confidence_bin
from ptp.config import PTPConfig
from ptp.training.losses import Targets


@dataclass(frozen=True)
class WindowMetrics:
    """Sums over windows, float32 tensors: those of parts, steps and processes add up to those of the whole.

    correct, counted: (L,) right and valid predictions by window index. survived, tried: (L − lead,) for each draft
    w, windows whose first w drafts are all right, of those whose first w − 1 are and whose w-th has a target.
    sure_right, sure_tried: (1 + lead, NUM_BINS) the same drafts by the curve of `Calibration` and the bin of their
    confidence, of windows whose first token has a target. cross_entropy, scored: () its sum over valid targets, and
    how many they are. masked: () targets without mass. tokens: () tokens read.
    """

    correct: Tensor
    counted: Tensor
    survived: Tensor
    tried: Tensor
    sure_right: Tensor
    sure_tried: Tensor
    cross_entropy: Tensor
    scored: Tensor
    masked: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, config: PTPConfig) -> WindowMetrics:
        """Nothing counted yet."""
        by_index, by_draft = torch.zeros(config.window), torch.zeros(config.num_drafts)
        by_confidence = torch.zeros(1 + config.lead, NUM_BINS)
        return cls(by_index, by_index, by_draft, by_draft, by_confidence, by_confidence, *torch.zeros(4))

    @classmethod
    def of(
        cls,
        predicted: tuple[Tensor, Tensor] | None,
        targets: Targets,
        cross_entropy: Tensor,
        tokens: Tensor,
        config: PTPConfig,
    ) -> WindowMetrics:
        """Count a batch.

        predicted: tokens and confidences, each (B, N, L), or None for targets that are not judged. cross_entropy,
        tokens: ().
        """
        unjudged = replace(
            cls.zeros(config),
            cross_entropy=cross_entropy.detach().float(),
            scored=targets.valid.sum().float(),
            masked=(targets.in_span & ~targets.valid).sum().float(),
            tokens=tokens.float(),
        )
        if predicted is None:
            return unjudged
        token_ids, confidences = predicted
        right = (token_ids == targets.token_ids) & targets.valid
        drafted, valid = right[..., config.lead :].long(), targets.valid[..., config.lead :]
        run = drafted.cumprod(-1)
        before = torch.cat([torch.ones_like(run[..., :1]), run[..., :-1]], dim=-1)
        tried = before.bool() & valid
        # A curve of its own for windows whose output in front of the drafts, if they have one, is right.
        curve = right[..., : config.lead].sum(-1, keepdim=True)
        entry = curve * NUM_BINS + confidence_bin(confidences[..., config.lead :])
        asked = tried & targets.valid[..., :1]

        def by_confidence(drafts: Tensor) -> Tensor:
            sums = torch.zeros((1 + config.lead) * NUM_BINS, device=drafts.device)
            return sums.index_add(0, entry.flatten(), drafts.flatten().float()).view(-1, NUM_BINS)

        return replace(
            unjudged,
            correct=right.sum((0, 1)).float(),
            counted=targets.valid.sum((0, 1)).float(),
            survived=run.sum((0, 1)).float(),
            tried=tried.sum((0, 1)).float(),
            sure_right=by_confidence(asked & drafted.bool()),
            sure_tried=by_confidence(asked),
        )

    def __add__(self, other: WindowMetrics) -> WindowMetrics:
        return WindowMetrics(*(a.to(b.device) + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> WindowMetrics:
        """The same with a linear function applied to all sums at once, such as their sum over processes."""
        parts = self.parts()
        joined = function(torch.cat([part.flatten() for part in parts]))
        split = joined.split([part.numel() for part in parts])
        return WindowMetrics(*(new.view_as(old) for new, old in zip(split, parts, strict=True)))

    def parts(self) -> list[Tensor]:
        """The sums in the order of their declaration."""
        return [getattr(self, field.name) for field in fields(self)]

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
    def calibration(self) -> Calibration:
        """What a draft's confidence is worth."""
        return Calibration.of(self.sure_tried, self.sure_right)

    @property
    def mean_correct(self) -> float:
        """Drafts right before the first error: what decoding can accept from a full window."""
        return sum(self.survival)

    @property
    def num_targets(self) -> int:
        """Valid targets."""
        return int(self.scored)

    @property
    def num_masked(self) -> int:
        """Targets the sampling rule gives no mass."""
        return int(self.masked)

    @property
    def mean_loss(self) -> float:
        """Cross-entropy of a valid target, in nats."""
        return float(self.cross_entropy) / max(1, self.num_targets)

    def rates(self) -> dict[str, float]:
        """What is logged of them, by name."""
        return {
            "loss": self.mean_loss,
            "correct": self.mean_correct,
            "accuracy": float(self.correct.sum()) / max(1, int(self.counted.sum())),
            "masked": self.num_masked / max(1, self.num_targets + self.num_masked),
            **{f"accuracy/{index}": share for index, share in enumerate(self.accuracy)},
        }
