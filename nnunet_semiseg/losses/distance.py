"""From signed distances to masks (DTC, Luo et al. 2021; DTML, Zhang and Zhang 2021)."""

from __future__ import annotations

import torch

from nnunet_semiseg.losses.consistency import masked_mean


def mask_of_distance(distance: torch.Tensor, steepness: float) -> torch.Tensor:
    """sigmoid(-k z), a smooth mask of a signed distance, negative inside (DTML, Eq. 2 with its sign corrected).

    Args:
        distance: z in [-1, 1], any shape; computed in float32, where k = 1500 does not overflow.
        steepness: k.
    """
    return torch.sigmoid(-steepness * distance.float())


def distance_error(distance: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean squared error of predicted distances over voxels and classes (L_dis of DTML, Table 1).

    Args:
        distance: (B, K, *), z in [-1, 1].
        target: The same of the labels; NaN where it is not known.
        valid: (B, 1, *) bool, the voxels that count.
    """
    known = valid & target.isfinite()
    return masked_mean((distance.float() - target.nan_to_num()).square(), known)


def cross_task_error(masks: torch.Tensor, probabilities: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Squared L2 distance of the two tasks' foreground, averaged over voxels (DTML, Eq. 4); no side is detached.

    Args:
        masks: (B, K, *) from ``mask_of_distance``.
        probabilities: (B, K, *) of the K foreground classes or regions.
        valid: (B, 1, *) bool.
    """
    return masked_mean((masks - probabilities).square().sum(1, keepdim=True), valid)
