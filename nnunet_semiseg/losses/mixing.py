"""Copy-paste of one image into another (Bai et al. 2023), and boxes exchanged between patches (Yun et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def beta_side(dimensions: int, alpha: float) -> float:
    """Side of a box whose share of the patch is drawn from Beta(alpha, alpha): the d-th root of the draw."""
    return float(torch.distributions.Beta(alpha, alpha).sample()) ** (1 / dimensions)


def random_cuboid(shape: Sequence[int], fraction: float) -> torch.Tensor:
    """A mask that is True inside a cuboid (2D: a rectangle) at a random place.

    Args:
        shape: Spatial shape, any dimension.
        fraction: The cuboid's side as a share of the patch's, in every axis: int(fraction * side), at least 1 voxel.

    Returns:
        (1, 1, *shape) bool; it covers about fraction^d of the patch.
    """
    mask = torch.zeros((1, 1, *shape), dtype=torch.bool)
    box = [slice(None), slice(None)]
    for side in shape:
        length = max(1, int(fraction * side))
        start = int(torch.randint(0, side - length + 1, ()))
        box.append(slice(start, start + length))
    mask[tuple(box)] = True
    return mask
