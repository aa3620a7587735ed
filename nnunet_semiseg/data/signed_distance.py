"""Signed distance to the boundary of every class, as a training target (DTML's and DTC's transform of a mask)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import SegOnlyTransform
from scipy.ndimage import distance_transform_edt

try:
    import edt
except ImportError:
    edt = None

# The two agree to float32 precision; edt takes about half of the time.
BACKEND = "scipy" if edt is None else "edt"


def _check_scale(spacing: Sequence[float], max_distance: float) -> tuple[float, ...]:
    spacing = tuple(float(s) for s in spacing)
    if not spacing or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing has to be one positive number per axis, but is {spacing}.")
    if not 0 < max_distance < math.inf:
        raise ValueError(f"max_distance has to be a positive number, but is {max_distance}.")
    return spacing


def _grown_box(mask: np.ndarray, voxels: Sequence[int]) -> tuple[slice, ...]:
    """Bounding box of a mask that is not empty, grown by this many voxels per axis as far as the array reaches."""
    box = []
    for axis, margin in enumerate(voxels):
        occupied = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(occupied[0]) - margin, 0), int(occupied[-1]) + 1 + margin))
    return tuple(box)


def _other_side_edt(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of every voxel to the nearest one of the other kind; the mask has voxels of both."""
    # Between labels 1 and 2, edt measures both sides in one pass; two passes over binary masks take twice as long.
    labels = np.add(mask, 1, dtype=np.uint8, order="C")
    return edt.edt(labels, anisotropy=spacing, black_border=False, parallel=1)


def _other_side_scipy(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """As ``_other_side_edt``."""
    distance = distance_transform_edt(~mask, sampling=spacing).astype(np.float32)
    # What is nearest to a voxel inside is no farther than the layer of voxels around the bounding box.
    tight = _grown_box(mask, [1] * mask.ndim)
    distance[tight] += distance_transform_edt(mask[tight], sampling=spacing)
    return distance


_OTHER_SIDE = {"edt": _other_side_edt, "scipy": _other_side_scipy}


def signed_distance(
    masks: np.ndarray, spacing: Sequence[float], max_distance: float, backend: str = BACKEND
) -> np.ndarray:
    """Signed Euclidean distance to the boundary of each mask; inside negative, outside positive.

    With d the distance between the centers of a voxel and of the nearest voxel of the other kind, and
    h = min(spacing) / 2,

        phi = clip(+(d - h) / max_distance, -1, 1)   outside,
        phi = clip(-(d - h) / max_distance, -1, 1)   inside.

    The boundary lies half a voxel before that nearest voxel, so phi is never 0 and sigmoid(-k phi) gives the mask back
    for a large k.

    The border of the patch is no boundary. Where the nearest boundary lies inside the patch, phi does not depend on
    where the patch was cut; elsewhere |phi| is at least what it is in the whole image.

    A mask without a voxel has no boundary in the patch. It is +1 everywhere, and a mask that fills the patch is -1:
    the limit of a boundary that moves away, and what a patch farther than ``max_distance`` from an object has anyway.

    Args:
        masks: (K, *) bool; * is (Y, X) or (Z, Y, X). They may overlap.
        spacing: Of the spatial axes, in the order of the array's axes. In mm for distances in mm, all 1 for distances
            in voxels.
        max_distance: Distance that maps to 1, in the unit of ``spacing``.
        backend: "edt" (the package of this name, ``pip install nnunet-semiseg[distance]``) or "scipy". By default the
            former where it is installed.

    Returns:
        (K, *) float32 in [-1, 1].

    Raises:
        ValueError: If ``spacing`` is not one positive number per spatial axis, ``max_distance`` is not positive, or
            the backend is unknown or not installed.

    References:
        Luo et al., "Semi-supervised medical image segmentation through dual-task consistency" (DTC), AAAI 2021, and
        Zhang and Zhang, dual-task mutual learning (DTML), whose signs these are. Corrected against their code:

        * It divides either side by its maximum in the patch, so that the same voxel has another value in the next
          patch. Here the divisor is a constant.
        * A patch without the object is 0 everywhere there, which says "boundary everywhere", and a patch full of it is
          NaN. Here +1 and -1.
        * The inner layer of voxels is 0 there, which sigmoid(-k phi) makes half foreground. Here no voxel is 0.
    """
    masks = np.asarray(masks, dtype=bool)
    spacing = _check_scale(spacing, max_distance)
    if len(spacing) != masks.ndim - 1:
        raise ValueError(f"spacing {spacing} does not have one number for each of the {masks.ndim - 1} spatial axes.")
    if backend not in _OTHER_SIDE:
        raise ValueError(f"Backend '{backend}' is neither 'edt' nor 'scipy'.")
    if backend == "edt" and edt is None:
        raise ValueError("The package edt is not installed. Install nnunet-semiseg[distance], or use backend='scipy'.")

    half_voxel = min(spacing) / 2
    # The first voxel beyond this margin is at least max_distance + half_voxel from the class: +1. One voxel is kept in
    # any case, as it is what the inside is measured to.
    margin = [max(math.ceil((max_distance + half_voxel) / s) - 1, 1) for s in spacing]
    result = np.ones(masks.shape, dtype=np.float32)
    for mask, phi in zip(masks, result):
        if not mask.any():
            continue
        if mask.all():
            phi[:] = -1
            continue
        near = _grown_box(mask, margin)
        distance = _OTHER_SIDE[backend](mask[near], spacing)
        distance -= half_voxel
        distance /= max_distance
        np.minimum(distance, 1, out=distance)
        np.negative(distance, out=distance, where=mask[near])
        phi[near] = distance
    return result


class SignedDistanceTransform(SegOnlyTransform):
    """Appends the signed distance of the full-resolution target to the targets. The last of the training transforms.

    The sample's segmentation becomes a list: the targets as they were (one per scale of deep supervision, or the only
    one), then the (K, *) float32 distance. nnU-Net's loader stacks lists entry by entry, whatever their shapes and
    types, so a batch has it as ``target[-1]``, (B, K, *). It has to be taken off the list before nnU-Net's loss.

    The target is (1, *) of labels, of which 1 to K are classes, or (R [+ 1 ignore], *) of regions, of which the
    first K = R are. What lies outside the image counts as background, as it does in nnU-Net's own target. Where the
    nearest ignored voxel is as near as the boundary or nearer, the boundary may lie there: the distance is NaN, which
    ``distance_error`` leaves out.

    Distances are measured after augmentation, in a patch whose voxels are taken to have ``spacing``.

    Args:
        num_foreground: K.
        has_regions: Whether the target holds regions.
        ignore_label: The label that means "not annotated" in a target of labels. (Regions have a channel for it.)
        spacing, max_distance: As for ``signed_distance``.

    Raises:
        ValueError: As ``signed_distance`` does, and on a target with a number of channels that fits no K classes.
    """

    def __init__(
        self,
        num_foreground: int,
        has_regions: bool,
        ignore_label: int | None,
        spacing: Sequence[float],
        max_distance: float,
    ):
        super().__init__()
        self.num_foreground = num_foreground
        self.has_regions = has_regions
        self.ignore_label = ignore_label
        # Checked here, too, so that a mistake is not first noticed in a background process.
        self.spacing = _check_scale(spacing, max_distance)
        self.max_distance = max_distance

    def _apply_to_segmentation(
        self, segmentation: torch.Tensor | list[torch.Tensor], **params: Any
    ) -> list[torch.Tensor]:
        targets = list(segmentation) if isinstance(segmentation, (list, tuple)) else [segmentation]
        masks, ignored = self._masks(targets[0])
        distance = signed_distance(masks, self.spacing, self.max_distance)
        if ignored is not None and ignored.any():
            unknown_from = distance_transform_edt(~ignored, sampling=self.spacing)
            measured = np.abs(distance) * self.max_distance + min(self.spacing) / 2
            # Both are distances between centers of voxels; what is equal but for rounding is not known either.
            distance[unknown_from <= measured * (1 + 1e-5)] = np.nan
        return [*targets, torch.from_numpy(distance)]

    def _masks(self, target: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """The full-resolution target to (K, *) bool, and (*) bool of ignored voxels or None."""
        channels, k = len(target), self.num_foreground
        if self.has_regions:
            if channels not in (k, k + 1):
                raise ValueError(f"A target of {k} regions has {k} or, with ignore, {k + 1} channels, not {channels}.")
            ignored = target[k].numpy().astype(bool) if channels > k else None
            return target[:k].numpy().astype(bool), ignored
        if channels != 1:
            raise ValueError(f"A target of labels has one channel, not {channels}.")
        classes = np.arange(1, k + 1).reshape(-1, *[1] * (target.ndim - 1))
        ignored = None if self.ignore_label is None else target[0].numpy() == self.ignore_label
        return target.numpy() == classes, ignored
