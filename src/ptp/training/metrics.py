"""What windows predict and how often it is right, as sums and counts (METHOD §3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ptp.calibration import NUM_BINS, Calibration, confidence_bin
from ptp.config import PTPConfig
from ptp.model.ptp_model import PTPModel
from ptp.training.losses import Targets


@dataclass(frozen=True)
class WindowMetrics:
    """Sums over windows, float32 tensors: those of parts, steps and processes add up to those of the whole.

    correct, counted: (L,) right and valid predictions by window index. survived, tried: (kinds, L − lead) for each
    draft w, windows whose first w drafts are all right, of those whose first w − 1 are and whose w-th has a target; of
    drafts with positions and, if there are such, of continued ones. sure_right, sure_tried: (curves, NUM_BINS) the same
    drafts by the curve of `Calibration` and the bin of their confidence, of windows whose first token has a target.
    missed, second_right: () drafts tried that are wrong, and those of them whose second candidate is right.
    cross_entropy, scored: () its sum over valid targets, once for each kind, and how many terms it has. masked: ()
    targets without mass.
    tokens: () tokens read.
    """

    correct: Tensor
    counted: Tensor
    survived: Tensor
    tried: Tensor
    sure_right: Tensor
    sure_tried: Tensor
    missed: Tensor
    second_right: Tensor
    cross_entropy: Tensor
    scored: Tensor
    masked: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, config: PTPConfig) -> WindowMetrics:
        """Nothing counted yet."""
        by_index, by_draft = torch.zeros(config.window), torch.zeros(config.num_kinds, config.num_drafts)
        by_confidence = torch.zeros(config.num_curves, NUM_BINS)
        return cls(by_index, by_index, by_draft, by_draft, by_confidence, by_confidence, *torch.zeros(6))

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

        predicted: tokens and confidences, each (B, N, L, kinds, candidates), the likeliest first, or None for targets
        that are not judged. cross_entropy, tokens: ().
        """
        unjudged = replace(
            cls.zeros(config),
            cross_entropy=cross_entropy.detach().float(),
            scored=config.num_kinds * targets.valid.sum().float(),
            masked=(targets.in_span & ~targets.valid).sum().float(),
            tokens=tokens.float(),
        )
        if predicted is None:
            return unjudged
        # (B, kinds, N, L)
        candidates, confidences = predicted[0].movedim(3, 1), predicted[1][..., 0].movedim(3, 1)
        all_valid = targets.valid.unsqueeze(1).expand(confidences.shape)
        hits = (candidates == targets.token_ids[:, None, ..., None]) & all_valid.unsqueeze(-1)
        right, others = hits[..., 0], hits[..., 1:].any(-1)
        drafted, valid = right[..., config.lead :].long(), all_valid[..., config.lead :]
        run = drafted.cumprod(-1)
        before = torch.cat([torch.ones_like(run[..., :1]), run[..., :-1]], dim=-1)
        tried = before.bool() & valid
        # A curve of its own for windows whose output in front of the drafts, if they have one, is right.
        curve = right[..., : config.lead].sum(-1, keepdim=True)
        curve = curve + torch.arange(config.num_kinds, device=curve.device)[:, None, None]
        entry = curve * NUM_BINS + confidence_bin(confidences[..., config.lead :])
        asked = tried & all_valid[..., :1]

        def by_confidence(drafts: Tensor) -> Tensor:
            sums = torch.zeros(config.num_curves * NUM_BINS, device=drafts.device)
            return sums.index_add(0, entry.flatten(), drafts.flatten().float()).view(-1, NUM_BINS)

        return replace(
            unjudged,
            correct=right[:, 0].sum((0, 1)).float(),
            counted=all_valid[:, 0].sum((0, 1)).float(),
            survived=run.sum((0, 2)).float(),
            tried=tried.sum((0, 2)).float(),
            sure_right=by_confidence(asked & drafted.bool()),
            sure_tried=by_confidence(asked),
            missed=(tried & ~drafted.bool()).sum().float(),
            second_right=(tried & others[..., config.lead :]).sum().float(),
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
        """The acceptance profile: s_w, the chance that the first w drafts of a branch of positions are all accepted.

        A product of conditional rates, so it never rises, and windows cut short by their document's end count for as
        far as they go.
        """
        return self._survival(0)

    @property
    def continued(self) -> tuple[float, ...]:
        """The same of drafts none of which has a position; empty where such are not made."""
        return self._survival(1) if len(self.survived) > 1 else ()

    @property
    def second(self) -> float:
        """The chance that the second candidate is right where a draft is wrong; 0 without second candidates."""
        return float(self.second_right) / max(1.0, float(self.missed))

    def tell(self, model: PTPModel) -> None:
        """Let a model know what its drafts are worth, as decoding asks and adapters keep."""
        model.survival, model.continued, model.second = self.survival, self.continued, self.second
        model.calibration = self.calibration

    def _survival(self, kind: int) -> tuple[float, ...]:
        return tuple((self.survived / self.tried.clamp(min=1))[kind].cumprod(0).tolist())

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
        return int(self.scored) // len(self.survived)

    @property
    def num_masked(self) -> int:
        """Targets the sampling rule gives no mass."""
        return int(self.masked)

    @property
    def mean_loss(self) -> float:
        """Cross-entropy of a valid target, in nats; the mean of windows and of what continues them."""
        return float(self.cross_entropy) / max(1, int(self.scored))

    def rates(self) -> dict[str, float]:
        """What is logged of them, by name."""
        return {
            "loss": self.mean_loss,
            "correct": self.mean_correct,
            **({"correct_continued": sum(self.continued)} if self.continued else {}),
            "accuracy": float(self.correct.sum()) / max(1, int(self.counted.sum())),
            "masked": self.num_masked / max(1, self.num_targets + self.num_masked),
            **{f"accuracy/{index}": share for index, share in enumerate(self.accuracy)},
        }
