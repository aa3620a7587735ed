"""Agreement of two predictions of the same voxels."""

from __future__ import annotations

import torch


def masked_squared_distance(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared L2 distance over channels of two probability maps, averaged over the voxels of a mask (CoraNet, Eq. 8).

    Args:
        student: (B, C, *) probabilities, float32.
        teacher: The same shape; detached here.
        mask: (B, 1, *) bool.

    Returns:
        A scalar; 0 with a graph for an empty mask.
    """
    return masked_mean((student - teacher.detach()).square().sum(1, keepdim=True), mask)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values where a bool mask of the same shape is True; 0 with a graph for an empty mask."""
    weight = mask.float()
    return (values * weight).sum() / weight.sum().clamp(min=1.0)


def clamped_noise(data: torch.Tensor, deviation: float) -> torch.Tensor:
    """``data`` plus Gaussian noise that is clamped to two standard deviations (UA-MT's code and its descendants).

    Args:
        data: Any shape, in normalized intensities.
        deviation: Standard deviation of the noise before clamping, same unit.
    """
    noise = torch.randn_like(data).mul_(deviation)
    return data + noise.clamp_(-2 * deviation, 2 * deviation)
