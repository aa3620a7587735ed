"""Losses in which one kind of mistake costs more (CoraNet, section III.B)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cost_sensitive_bce(
    logits: torch.Tensor,
    foreground: torch.Tensor,
    valid: torch.Tensor,
    background_cost: float,
    foreground_cost: float,
) -> torch.Tensor:
    """Weighted binary cross-entropy, mean over voxels and over the binary problems.

    L_ce-con has (background_cost, foreground_cost) = (alpha, 1): calling background foreground is expensive, so only
    the safe core of an object is predicted. L_ce-rad has (1, alpha). Only the costs' ratio matters: they are scaled
    to a mean of 1, because a background that weighs five times as much as in nnU-Net's own loss makes SGD with
    momentum 0.99 drive the logits to -50, where foreground is no longer learned.

    Args:
        logits: (B, K, *) one logit for each binary problem.
        foreground: (B, K, *) float in {0, 1}.
        valid: (B, 1, *) bool; voxels outside do not count.
        background_cost, foreground_cost: The paper's w_0 and w_1.

    Returns:
        A scalar; 0 with a graph if no voxel is valid.
    """
    scale = 2.0 / (background_cost + foreground_cost)
    weight = torch.where(foreground > 0.5, scale * foreground_cost, scale * background_cost) * valid
    axes = [0, *range(2, logits.ndim)]
    loss = F.binary_cross_entropy_with_logits(logits.float(), foreground, weight=weight, reduction="none")
    return (loss.sum(axes) / valid.sum().clamp(min=1)).mean()


def cost_sensitive_dice(
    logits: torch.Tensor,
    foreground: torch.Tensor,
    valid: torch.Tensor,
    background_cost: float,
    foreground_cost: float,
) -> torch.Tensor:
    """1 - soft Dice over the batch in which false positives and false negatives cost unequally (Tversky index).

    TP / (TP + a FP + b FN), a : b = background_cost : foreground_cost, a + b = 1; equal costs give Dice. It is to the
    cost-sensitive cross-entropy what Dice is to the cross-entropy in nnU-Net's loss: without it, the few foreground
    voxels take long to matter under SGD.

    Args and return value as for ``cost_sensitive_bce``.
    """
    probability, valid = logits.float().sigmoid(), valid.float()
    axes = [0, *range(2, logits.ndim)]
    hit = (probability * foreground * valid).sum(axes)
    false_positive = (probability * (1 - foreground) * valid).sum(axes)
    false_negative = ((1 - probability) * foreground * valid).sum(axes)
    total = background_cost + foreground_cost
    errors = (background_cost * false_positive + foreground_cost * false_negative) / total
    # nnU-Net's smoothing.
    return (1 - (hit + 1e-5) / (hit + errors + 1e-5)).mean()
