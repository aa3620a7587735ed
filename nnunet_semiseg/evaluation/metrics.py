"""How well label maps agree with the ground truth: overlap and surface distances of each class.

Surfaces are defined in two ways, because the metrics are:

* Distances (``HD``, ``HD95``, ``ASSD``, ...) are between the centers of surface voxels: voxels of the mask with a face
  neighbor outside it, as MedPy and MONAI have them.
* ``NSD`` is the share of the surfaces' area, as Nikolov et al. define it and DeepMind's surface-distance computes it: a
  triangulated element in each block of 2 x 2 x 2 voxels (a line in 2 x 2 pixels) that is partly in the mask.

For both, what is outside the image is outside the mask, an axis with a single slice is no axis, and there is no
surface where the annotation ends, that is between a mask and ignored voxels. Spacings are in mm, in array axis order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import find_objects
from scipy.spatial import KDTree
from skimage.measure import marching_cubes, mesh_surface_area

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.segmentations import Classes

OVERLAP = ("Dice", "Jaccard", "Precision", "Recall")
DISTANCES = ("HD", "HD95", "ASSD", "HD95_pooled", "ASD")
METRICS = (*OVERLAP, *DISTANCES, "NSD")
# Of NSD in mm, unless another one is asked for.
TOLERANCE = 2.0


@dataclass(frozen=True)
class Challenge:
    """What a challenge's script does beyond the metrics' definitions.

    Args:
        preset: Its name.
        in_slices: Classes that are evaluated only in the slices (of the first axis) from the first to the last one in
            which the truth has them. What the prediction has elsewhere does not count.
        lowest_dice: NSD is 0 where Dice is lower.
        slips: Whether to do as the script does where that can hardly be meant: it leaves out the last of the slices,
            rounds Dice and NSD to 4 decimals, and casts voxels to a small type.
    """

    preset: str
    in_slices: tuple[str, ...]
    lowest_dice: float
    slips: bool


@dataclass(frozen=True)
class Rules:
    """What is left open by the metrics' definitions.

    Args:
        tolerances: Of NSD in mm, for each class.
        unit: Of distances, "mm" or "voxel". NSD is in mm in any case.
        both_empty: A class that neither map has: "leave-out", or "perfect" (overlap and NSD 1, distances 0).
        one_empty: A class that only one of the maps has, with overlap and NSD 0: distances are the "diagonal" of the
            image, or "leave-out".
        challenge: Whose rules apply, for 3D label maps; an axis with a single slice is an axis then. None for no
            challenge's.
    """

    tolerances: tuple[float, ...]
    unit: str = "mm"
    both_empty: str = "leave-out"
    one_empty: str = "diagonal"
    challenge: Challenge | None = None


def case_metrics(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], classes: Classes, rules: Rules
) -> dict[str, dict[str, float | None]]:
    """{class: {metric: value}} of one case, with numbers of voxels beside them; None is a value that is left out.

    Args:
        truth: Label map, 1D to 3D. Its ignored voxels are left out of everything.
        prediction: Label map of the same shape. Voxels with the ignore label are of no class.
        spacing: One for each axis.

    Raises:
        CaseError: naming the class, if the challenge's script fails on it.
    """
    challenge = rules.challenge
    if challenge is None:
        spacing = tuple(float(s) for s, size in zip(spacing, truth.shape) if size > 1)
        truth, prediction = np.squeeze(truth), np.squeeze(prediction)
    units = spacing if rules.unit == "mm" else (1.0,) * truth.ndim
    diagonal = float(np.linalg.norm(np.multiply(truth.shape, units))) if rules.one_empty == "diagonal" else None
    boxes = [find_objects(labels) for labels in (truth, prediction)]
    results = {}
    for name, labels, members, tolerance in zip(classes.names, classes.values, classes.membership(), rules.tolerances):
        own, others = ([box for v in labels if v <= len(found) and (box := found[v - 1])] for found in boxes)
        crop = _union([*own, *others], truth.ndim)
        if challenge and name in challenge.in_slices and own and others:
            crop = (_slices(own, name, challenge), *crop[1:])
        true, predicted = members[truth[crop]], members[prediction[crop]]
        ignored = None
        if classes.ignore is not None:
            ignored = truth[crop] == classes.ignore
            predicted &= ~ignored
        tp, n_ref, n_pred = (int(np.count_nonzero(mask)) for mask in (true & predicted, true, predicted))
        fp, fn = n_pred - tp, n_ref - tp
        if n_ref and n_pred:
            values = {
                **overlap(tp, fp, fn),
                **distance_metrics(*surface_distances(predicted, true, units, ignored)),
                "NSD": surface_dice(predicted, true, spacing, tolerance, ignored, exact=challenge is not None),
            }
        elif n_ref or n_pred:
            values = {**dict.fromkeys(METRICS, 0.0), **dict.fromkeys(DISTANCES, diagonal)}
        elif rules.both_empty == "perfect":
            values = {**dict.fromkeys(METRICS, 1.0), **dict.fromkeys(DISTANCES, 0.0)}
        else:
            values = dict.fromkeys(METRICS)
        dice, nsd = values["Dice"], values["NSD"]
        if challenge and dice is not None and nsd is not None:
            values["NSD"] = nsd = 0.0 if dice < challenge.lowest_dice else nsd
            if challenge.slips:
                values |= {"Dice": float(np.round(dice, 4)), "NSD": float(np.round(nsd, 4))}
        results[name] = {"TP": tp, "FP": fp, "FN": fn, "n_ref": n_ref, "n_pred": n_pred, **values}
    return results


def _union(boxes: list[tuple[slice, ...]], ndim: int) -> tuple[slice, ...]:
    """The box around boxes, with a voxel more on each side, which may be an ignored one; an empty box of none."""
    if not boxes:
        return (slice(0, 0),) * ndim
    return tuple(slice(max(0, min(s.start for s in axis) - 1), max(s.stop for s in axis) + 1) for axis in zip(*boxes))


def _slices(own: list[tuple[slice, ...]], name: str, challenge: Challenge) -> slice:
    """The slices of the first axis in which a class is evaluated, from the boxes of its labels in the truth."""
    first, end = min(box[0].start for box in own), max(box[0].stop for box in own) - challenge.slips
    if first == end:
        raise CaseError(
            f"{name} is in a single slice, on which {challenge.preset}'s script fails: it leaves out the last one. "
            "Evaluate with --corrected"
        )
    return slice(first, end)


def overlap(tp: int, fp: int, fn: int) -> dict[str, float]:
    """Metrics of the numbers of true positive, false positive and false negative voxels.

    The critical success index (CSI) of some tables is Jaccard's index. CoraNet (Shi et al. 2022) prints the formula of
    recall for it.
    """
    return {
        "Dice": 2 * tp / (2 * tp + fp + fn),
        "Jaccard": tp / (tp + fp + fn),
        "Precision": tp / (tp + fp),
        "Recall": tp / (tp + fn),
    }


def surface_voxels(mask: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    """Bool, as ``mask``: its voxels with a face neighbor that is neither in it nor ignored."""
    solid = np.pad(mask if ignored is None else mask | ignored, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for side in (slice(None, -2), slice(2, None)):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = side
            inside &= solid[tuple(window)]
    return mask & ~inside


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], ignored: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of every surface voxel to the nearest one of the other mask.

    Args:
        prediction, truth: Bool, of the same shape; neither has ignored voxels.

    Returns:
        Those of the prediction's surface voxels, and of the truth's.
    """
    first, second = (surface_voxels(mask, ignored) for mask in (prediction, truth))
    return _nearest(first, second, spacing), _nearest(second, first, spacing)


def distance_metrics(from_prediction: np.ndarray, from_truth: np.ndarray) -> dict[str, float | None]:
    """Metrics of the two directions of ``surface_distances``; None if a mask is enclosed by ignored voxels.

    * ``HD``: the largest (Hausdorff) distance.
    * ``HD95``: the 95th percentile of each direction, and the larger of the two, as in MONAI.
    * ``ASSD``: the mean over the surface voxels of both (Heimann et al. 2009).
    * ``HD95_pooled`` and ``ASD``: MedPy's ``hd95``, the percentile of both directions together, and its ``asd``, the
      mean from prediction to truth alone. Tables of papers on semi-supervised segmentation have these, in voxels.

    Percentiles between two distances are interpolated linearly.
    """
    if not (len(from_prediction) and len(from_truth)):
        return dict.fromkeys(DISTANCES)
    both = np.concatenate((from_prediction, from_truth))
    values = {
        "HD": both.max(),
        "HD95": max(np.percentile(distances, 95) for distances in (from_prediction, from_truth)),
        "ASSD": both.mean(),
        "HD95_pooled": np.percentile(both, 95),
        "ASD": from_prediction.mean(),
    }
    return {name: float(value) for name, value in values.items()}


def surface_dice(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float,
    ignored: np.ndarray | None = None,
    exact: bool = False,
) -> float | None:
    """Normalized surface Dice: the share of both surfaces' area that is within ``tolerance`` mm of the other surface.

    Nikolov et al. 2018, https://arxiv.org/abs/1809.04430. The distance is that between elements' blocks.

    Args:
        exact: Without room for the rounding of spacings, as DeepMind's surface-distance has it.

    Returns:
        0 to 1; None if a mask has no surface, because ignored voxels enclose it.
    """
    # Spacings in files are rounded; without some room, three voxels of 0.7 mm would not be within 2.1 mm.
    limit = np.nextafter(tolerance, np.inf) if exact else tolerance * (1 + 1e-6)
    codes = [_surface_elements(mask, ignored) for mask in (prediction, truth)]
    if not all(map(np.any, codes)):
        return None
    areas = element_areas(spacing)
    within = total = 0.0
    for own, other in (codes, codes[::-1]):
        area = areas[own[own > 0]]
        within += area[np.isfinite(_nearest(own > 0, other > 0, spacing, limit))].sum()
        total += area.sum()
    return float(within / total)


def _nearest(points: np.ndarray, others: np.ndarray, spacing: tuple[float, ...], limit: float = np.inf) -> np.ndarray:
    """Distance of each True of ``points``, in C order, to the nearest True of ``others``; infinity from ``limit``."""
    distances = np.zeros(np.count_nonzero(points))
    apart = points & ~others
    if apart.any():
        # A tree takes time and memory for the surface alone. A distance map would for all of the box around it, which
        # a single wrong voxel makes as large as the image.
        tree = KDTree(np.argwhere(others) * spacing, balanced_tree=False, compact_nodes=False)
        distances[apart[points]] = tree.query(np.argwhere(apart) * spacing, distance_upper_bound=limit)[0]
    return distances


def _surface_elements(mask: np.ndarray, ignored: np.ndarray | None) -> np.ndarray:
    """(n + 1, ...) uint8: which voxels of each block are in the mask, a bit for each; 0 where there is no surface."""

    def codes(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1).view(np.uint8)
        codes = np.zeros(np.add(mask.shape, 1), dtype=np.uint8)
        for bit, corner in enumerate(np.ndindex((2,) * mask.ndim)):
            codes |= padded[tuple(slice(c, c + n + 1) for c, n in zip(corner, mask.shape))] << bit
        return codes

    full = 2**2**mask.ndim - 1
    if ignored is None or not ignored.any():
        result = codes(mask)
    else:
        result = codes(mask | ignored)
        result[codes(mask) == 0] = 0
    result[result == full] = 0
    return result


@cache
def element_areas(spacing: tuple[float, ...]) -> np.ndarray:
    """(256,) area in mm² of the surface within a block of 2 x 2 x 2 voxels; in 2D, (16,) length in mm.

    The index is the block's code: the bit i is set if its i-th voxel, in C order, is in the mask.
    """
    ndim = len(spacing)
    # A line is an area over one more axis of length 1.
    scale = np.array((1.0,) * (3 - ndim) + spacing)
    areas = np.zeros(2**2**ndim)
    for code in range(1, len(areas) - 1):
        inside = np.array([code >> bit & 1 for bit in range(2**ndim)], dtype=float).reshape((2,) * ndim)
        # Marching cubes (Lorensen and Cline 1987) triangulates up to four voxels; more are the complement of fewer.
        block = np.broadcast_to(min(inside, 1 - inside, key=np.sum), (2, 2, 2)).copy()
        vertices, faces, *_ = marching_cubes(block, 0.5, method="lorensen")
        areas[code] = mesh_surface_area(vertices * scale, faces)
    return areas
