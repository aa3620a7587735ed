"""Softmax labels, sigmoid regions and the ignore label behind one interface.

nnU-Net trains either on exclusive labels (softmax over C classes, class 0 is background) or on R overlapping regions
(one sigmoid each). Every method asks this adapter what a prediction means, so that no method needs to know which of
the two it runs on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from nnunetv2.utilities.label_handling.label_handling import LabelManager


class LabelAdapter:
    """Reads logits and targets of one dataset.

    Shapes below: B samples; C = ``num_outputs`` logit channels; K = ``num_foreground`` foreground classes or regions
    (C - 1 labels, or C regions); ``*`` is (Y, X) or (Z, Y, X).

    A *hard* prediction has the form of nnU-Net's own targets: (B, 1, *) int64 of label ids, or (B, R, *) bool.
    """

    def __init__(self, label_manager: LabelManager):
        self.has_regions: bool = label_manager.has_regions
        self.ignore_label: int | None = label_manager.ignore_label
        self.num_outputs: int = label_manager.num_segmentation_heads
        self.num_foreground: int = self.num_outputs if self.has_regions else self.num_outputs - 1
        self.foreground_names: list = (
            list(label_manager.foreground_regions) if self.has_regions else list(label_manager.foreground_labels)
        )

    @property
    def parents(self) -> list[list[int]]:
        """For each of the K foreground classes or regions, those that contain all of its label values, and more."""
        values = [{label} if isinstance(label, int) else set(label) for label in self.foreground_names]
        return [[p for p, outer in enumerate(values) if own < outer] for own in values]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, C, *) logits to (B, C, *) float32 probabilities."""
        return torch.sigmoid(logits.float()) if self.has_regions else torch.softmax(logits.float(), 1)

    def hard(self, scores: torch.Tensor) -> torch.Tensor:
        """(B, C, *) logits to the hard prediction. Never the ignore label."""
        # On the CPU, argmax over the channels takes more than ten times as long.
        return scores > 0 if self.has_regions else scores.max(1, keepdim=True).indices

    def confidence(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(B, C, *) probabilities to (B, 1, *): how sure the least sure decision in a voxel is."""
        if self.has_regions:
            return torch.maximum(probabilities, 1 - probabilities).amin(1, keepdim=True)
        return probabilities.amax(1, keepdim=True)

    def foreground_channels(self, outputs: torch.Tensor) -> torch.Tensor:
        """(B, C, *) logits or probabilities to those of the K foreground classes or regions."""
        return outputs[:, -self.num_foreground :]

    @staticmethod
    def differ(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) bool: where two hard predictions are not the same."""
        return (first != second).any(1, keepdim=True)

    def one_vs_rest(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A full-resolution target or hard prediction as K binary problems.

        Args:
            target: nnU-Net's target: (B, 1, *) integer labels, or (B, R[+1 ignore], *) regions.

        Returns:
            (B, K, *) float32 in {0, 1}, and a (B, 1, *) bool mask that is False where the label is ignored.
        """
        hard, valid = self.without_ignored(target)
        if self.has_regions:
            return hard.float(), valid
        classes = torch.arange(1, self.num_outputs, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
        return (hard == classes).float(), valid

    def without_ignored(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """nnU-Net's target as a hard prediction (background where the label is ignored), and where it is not ignored.

        Args:
            target: (B, 1, *) integer labels, or (B, R[+1 ignore], *) regions.

        Returns:
            (B, 1, *) int64 or (B, R, *) bool, and (B, 1, *) bool.
        """
        if self.has_regions:
            hard = target[:, : self.num_foreground].bool()
            if target.shape[1] > self.num_foreground:
                return hard, ~target[:, -1:].bool()
            return hard, torch.ones_like(hard[:, :1])
        target = target.long()
        if self.ignore_label is None:
            return target, torch.ones_like(target, dtype=torch.bool)
        valid = target != self.ignore_label
        return torch.where(valid, target, 0), valid

    def as_probabilities(self, hard: torch.Tensor) -> torch.Tensor:
        """A hard prediction as the (B, C, *) float32 probabilities of a network that is sure of it."""
        if self.has_regions:
            return hard.float()
        classes = torch.arange(self.num_outputs, device=hard.device).view(1, -1, *[1] * (hard.ndim - 2))
        return (hard == classes).float()

    def is_foreground(self, hard: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) bool: any foreground class in a hard prediction."""
        return hard.any(1, keepdim=True) if self.has_regions else hard > 0

    def is_class(self, hard: torch.Tensor, k: int) -> torch.Tensor:
        """(B, *) bool: the k-th of the K foreground classes or regions in a hard prediction."""
        return hard[:, k] if self.has_regions else hard[:, 0] == k + 1

    @property
    def max_entropy(self) -> float:
        """The entropy of knowing nothing, in nats: ln C, or R ln 2 for regions."""
        return self.num_outputs * math.log(2) if self.has_regions else math.log(self.num_outputs)

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, C, *) logits to (B, 1, *) float32 entropy in nats; for regions, the sum of the binary entropies."""
        logits = logits.float()
        if self.has_regions:
            p = logits.sigmoid()
            return (F.softplus(logits) - p * logits).sum(1, keepdim=True)
        log_p = logits.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1, keepdim=True)

    def probability_entropy(self, probabilities: torch.Tensor) -> torch.Tensor:
        """``entropy`` of (B, C, *) probabilities, for a mean over several predictions; without a useful gradient."""
        entropy = torch.special.entr(probabilities)
        if self.has_regions:
            entropy = entropy + torch.special.entr(1 - probabilities)
        return entropy.sum(1, keepdim=True)
