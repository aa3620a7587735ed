"""How far the members of a consensus agree, for each case and class: the score of Eq. 2 and its companions.

Reference: Pham, Nguyen-Ho, Dao, Nguyen and Tran, Semi-supervised organ segmentation with mask propagation refinement
and uncertainty estimation for data generation (FLARE 2022), Eq. 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_semiseg.segmentations import Classes
from pseudo_label.consensus import count_components, tally

AGREEMENT = ("dice", "iou")
BOTH_EMPTY = ("skip", "one")


@dataclass(frozen=True)
class ClassScore:
    """Agreement on one class or region in one case; None is undefined.

    Args:
        score: Mean over members (and slices) of Dice, or IoU, with the consensus.
        pairwise_mean, pairwise_min: The same of the pairs of members: their mean, and that of the worst pair.
        entropy: Mean entropy in [0, 1] over the voxels in which a member or the consensus has the class.
        disagreement: Mean share of members whose label is not the consensus, over the same voxels.
        volume_mm3: Of the class in the consensus; mm2 in a 2D image.
        volume_zscore: How many standard deviations it is from the mean of the labeled cases.
        components: Number of connected components in the consensus.
    """

    score: float | None
    pairwise_mean: float | None
    pairwise_min: float | None
    entropy: float | None
    disagreement: float | None
    volume_mm3: float
    volume_zscore: float | None
    components: int


@dataclass(frozen=True)
class CaseScore:
    """Agreement in one case; all None if neither a member nor the consensus has any foreground.

    Args:
        case: Its name.
        score: Eq. 2: the mean over members (and slices) of the mean over classes.
        pairwise_mean, pairwise_min: The same of the pairs of members: their mean, and that of the worst pair.
        entropy, disagreement: As of a class, over the voxels in which a member or the consensus has any foreground.
        classes: {name: its scores}.
    """

    case: str
    score: float | None
    pairwise_mean: float | None
    pairwise_min: float | None
    entropy: float | None
    disagreement: float | None
    classes: dict[str, ClassScore]


def agreement(overlap: np.ndarray, metric: str = "dice", both_empty: str = "skip") -> np.ndarray:
    """Dice (Eq. 3), 2 |X and Y| / (|X| + |Y|), or IoU, |X and Y| / |X or Y|, of every two masks.

    Args:
        overlap: (..., N, N) voxels that two masks share; the diagonal has their sizes.
        metric: dice or iou.
        both_empty: Of two empty masks: ``skip`` for NaN, ``one`` for 1.

    Returns:
        (..., N, N).
    """
    sizes = np.diagonal(overlap, axis1=-2, axis2=-1)
    total = sizes[..., None] + sizes[..., None, :]
    with np.errstate(invalid="ignore"):
        result = 2 * overlap / total if metric == "dice" else overlap / (total - overlap)
    return result if both_empty == "skip" else np.where(total, result, 1.0)


def _mean(values: np.ndarray, axis: int | None = None) -> Any:
    """Mean of what is not NaN; NaN where nothing is left."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / np.count_nonzero(~np.isnan(values), axis)


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _pairs(values: np.ndarray) -> tuple[float | None, float | None]:
    """Mean and minimum over pairs of members of (S, M + 1, M + 1) values, each pair's mean over slices first."""
    of_pairs = _mean(values, 0)[np.triu_indices(values.shape[-1] - 1, 1)]
    return _defined(_mean(of_pairs)), _defined(min(of_pairs[~np.isnan(of_pairs)], default=np.nan))


def score_labels(
    labels: Sequence[np.ndarray],
    classes: Classes,
    spacing: Sequence[float],
    consensus: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    per_slice: bool = False,
    metric: str = "dice",
    both_empty: str = "skip",
    labeled: tuple[np.ndarray, np.ndarray] | None = None,
    case: str = "",
) -> tuple[CaseScore, list[float | None], np.ndarray, np.ndarray]:
    """Score the members' label maps of one case.

    Eq. 2, score = 1 / (K M) sum over K slices and M members of DSC(member, consensus), leaves open what DSC of several
    classes is and what happens where both masks are empty. Here it is the mean over the classes that the member or the
    consensus has (``skip``), or over all classes, those in neither being 1 (``one``). Where no class is left, the slice
    (or member) is left out of the mean. Without ``per_slice`` the volume is the only slice.

    Args:
        labels: M label maps (Z, Y, X) or (Y, X).
        classes: What they show.
        spacing: In mm.
        consensus: Label map; None for the majority vote (see :func:`tally`).
        entropy: Of each voxel, in [0, 1]; None if not known.
        per_slice: Average over slices of the first axis, as printed in Eq. 2.
        metric: dice or iou.
        both_empty: skip or one.
        labeled: Mean and standard deviation of the volume of each class in labeled cases, (R,) each, in mm3.
        case: Its name.

    Returns:
        The scores, each member's part in the case's score, the consensus, and the number of members that differ from
        it in each voxel.
    """
    consensus, differing, counts = tally(labels, classes, consensus, entropy, per_slice)
    # (S, R, M + 1, M + 1); the consensus is the last mask.
    values = agreement(counts.overlap, metric, both_empty)
    if not counts.union[-1]:
        values[:] = np.nan
    macro = _mean(values, 1)
    with np.errstate(invalid="ignore"):
        disagreement = counts.disagreement / counts.union
        entropies = np.full(len(disagreement), np.nan) if entropy is None else counts.entropy / counts.union
    volumes = counts.overlap[:, :, -1, -1].sum(0) * np.prod(spacing)
    mean, deviation = labeled or np.full((2, len(volumes)), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        zscores = np.where(deviation > 0, (volumes - mean) / deviation, np.nan)
    of_classes = {
        name: ClassScore(
            _defined(_mean(values[:, r, :-1, -1])),
            *_pairs(values[:, r]),
            _defined(entropies[r]),
            _defined(disagreement[r]),
            float(volumes[r]),
            _defined(zscores[r]),
            components,
        )
        for r, (name, components) in enumerate(zip(classes.names, count_components(consensus, classes)))
    }
    score = CaseScore(
        case,
        _defined(_mean(macro[:, :-1, -1])),
        *_pairs(macro),
        _defined(entropies[-1]),
        _defined(disagreement[-1]),
        of_classes,
    )
    return score, [_defined(value) for value in _mean(macro[:, :-1, -1], 0)], consensus, differing
