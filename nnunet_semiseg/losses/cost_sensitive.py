"""Cross-entropy in which one kind of mistake costs more (CoraNet, section III.B)."""

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
    the safe core of an object is predicted. L_ce-rad has (1, alpha). The sum is divided by the number of voxels;
    divided by the sum of the weights, as torch's own weighted loss does it, the conservative head's few foreground
    voxels would weigh alpha times less, and it learns to predict none.

    Args:
        logits: (B, K, *) one logit for each binary problem.
        foreground: (B, K, *) float in {0, 1}.
        valid: (B, 1, *) bool; voxels outside do not count.
        background_cost, foreground_cost: The paper's w_0 and w_1.

    Returns:
        A scalar; 0 with a graph if no voxel is valid.
    """
    weight = torch.where(foreground > 0.5, foreground_cost, background_cost) * valid
    axes = [0, *range(2, logits.ndim)]
    loss = F.binary_cross_entropy_with_logits(logits.float(), foreground, weight=weight, reduction="none")
    return (loss.sum(axes) / valid.sum().clamp(min=1)).mean()
