"""The consensus of several predictions of one case, and all voxel counts that scores need, in one pass."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import cc3d
import numpy as np
import SimpleITK as sitk
from scipy.special import entr

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.segmentations import Classes

# Voxels that are counted at once: few enough for the processor's cache.
BLOCK = 2**18
# A label that the argmax chose has at least the probability 1 / C; half precision needs the tolerance.
PROBABILITY_TOLERANCE = 1e-3
# Share of a label map's foreground that may be improbable: post-processing changes some voxels.
MAX_IMPROBABLE = 0.05


@dataclass
class Tally:
    """Voxels of one case, counted for S slices (1 for the whole volume), R classes or regions, and M + 1 masks.

    Args:
        overlap: (S, R, M + 1, M + 1), voxels that two masks share. The masks are the M members and, last, the
            consensus; the diagonal has their sizes.
        union: (R + 1,), voxels in which a member or the consensus has the class; last, any class.
        disagreement: (R + 1,), over these voxels, the sum of the share of members whose label is not the consensus.
        entropy: (R + 1,), over these voxels, the sum of the entropy; None without probabilities.
    """

    overlap: np.ndarray
    union: np.ndarray
    disagreement: np.ndarray
    entropy: np.ndarray | None


def tally(
    labels: Sequence[np.ndarray],
    classes: Classes,
    consensus: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    per_slice: bool = False,
) -> tuple[np.ndarray, np.ndarray, Tally]:
    """Compare members with their consensus and with each other.

    Everything follows from how often each combination of the members' labels occurs, and there are few of them. The
    voxels are read once to count the combinations, whatever the number of classes.

    Voxels in which a member has the ignore label are not counted; the consensus has the ignore label there.

    Args:
        labels: M label maps (Z, Y, X) or (Y, X).
        classes: What they show.
        consensus: Label map; None for the majority vote. Of labels with the same number of votes the lowest wins
            (towards background). A region is in the consensus if more than half of the members have it (half is not
            enough); the regions are then painted in the order of regions_class_order.
        entropy: Of each voxel, or None.
        per_slice: Count every slice of the first axis for itself.

    Returns:
        The consensus, of the smallest type of uint8 and uint16 that holds all labels; the number of members whose label
        is another one (uint8 or uint16); the counts.
    """
    shape, members, number = labels[0].shape, len(labels), len(classes.names)
    slices = shape[0] if per_slice and len(shape) == 3 else 1
    masks = [mask.reshape(slices, -1) for mask in (labels if consensus is None else [*labels, consensus])]
    values = np.array(sorted(classes.known), dtype=_label_type(classes))
    index = np.zeros(classes.num_values, dtype=np.intp)
    index[values] = np.arange(len(values))
    membership = classes.membership()[:, values]
    agreed = np.zeros(masks[0].shape, dtype=values.dtype)
    differing = np.zeros(masks[0].shape, dtype=np.min_scalar_type(members))
    counts = Tally(np.zeros((slices, number, members + 1, members + 1)), *np.zeros((3, number + 1)))
    for i, begin in product(range(slices), range(0, masks[0].shape[1], BLOCK)):
        block = np.stack([mask[i, begin : begin + BLOCK] for mask in masks])
        seen = block.any(0)
        if classes.ignore is not None:
            ignored = (block[:members] == classes.ignore).any(0)
            agreed[i, begin : begin + BLOCK][ignored] = classes.ignore
            seen &= ~ignored
        where = np.flatnonzero(seen)
        if not len(where):
            continue
        table, code = _combinations(index[block[:, where]], len(values))
        if consensus is None:
            table = np.column_stack([table, _majority(table, membership, classes, index)])
        where += begin
        differs = (table[:, :-1] != table[:, -1:]).sum(1)
        agreed[i, where] = values[table[:, -1]][code]
        differing[i, where] = differs[code]

        times = np.bincount(code)
        has = membership[:, table].astype(float)
        counts.overlap[i] += (has * times[:, None]).transpose(0, 2, 1) @ has
        anyone = has.any(-1)
        anyone = np.vstack([anyone, anyone.any(0)])
        counts.union += anyone @ times
        counts.disagreement += anyone @ (times * differs / members)
        if entropy is not None and counts.entropy is not None:
            counts.entropy += anyone @ np.bincount(code, weights=entropy.reshape(slices, -1)[i, where])
    if entropy is None:
        counts.entropy = None
    return agreed.reshape(shape), differing.reshape(shape), counts


def _label_type(classes: Classes) -> np.dtype:
    return np.min_scalar_type(classes.num_values - 1)


def _combinations(columns: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The different columns of (M, N) numbers below ``number``: as (U, M), and for each of N which one it is."""
    table, code = np.zeros((1, 0), dtype=np.intp), np.zeros(columns.shape[1], dtype=np.intp)
    for column in columns:
        code = code * number + column
        rank = np.bincount(code)
        present = np.flatnonzero(rank)
        table = np.column_stack([table[present // number], present % number])
        # Numbered anew after every member, so that the numbers stay small.
        rank[present] = np.arange(len(present))
        code = rank[code]
    return table, code


def _majority(table: np.ndarray, membership: np.ndarray, classes: Classes, index: np.ndarray) -> np.ndarray:
    """(U,) winners of (U, M) votes; both are places of labels in the list of all labels."""
    if classes.region_order is not None:
        return index[paint(membership[:, table].sum(-1) * 2 > table.shape[1], classes)]
    votes = np.zeros((len(table), membership.shape[1]), dtype=np.intp)
    for vote in table.T:
        votes[np.arange(len(table)), vote] += 1
    # Of equal ones argmax takes the first, which is the lowest label.
    return votes.argmax(1)


def paint(masks: Iterable[np.ndarray], classes: Classes) -> np.ndarray:
    """Label map of the regions' masks, later ones over earlier ones, as nnU-Net does it (regions_class_order)."""
    labels = None
    for mask, value in zip(masks, classes.region_order or ()):
        labels = np.zeros(mask.shape, dtype=_label_type(classes)) if labels is None else labels
        labels[mask] = value
    assert labels is not None, "no regions"
    return labels


def staple(labels: Sequence[np.ndarray], classes: Classes) -> np.ndarray:
    """Consensus by STAPLE, which weights every member by its estimated performance: SimpleITK's MultiLabelSTAPLE.

    Undecided voxels become background. For regions, SimpleITK's binary STAPLE above 0.5 of each region, painted.

    Reference: Warfield, Zou and Wells, IEEE Transactions on Medical Imaging 23 (2004).
    """
    result = np.zeros(labels[0].shape, dtype=_label_type(classes))
    counted = np.ones(result.shape, dtype=bool)
    for label in labels if classes.ignore is not None else ():
        counted &= label != classes.ignore
    # STAPLE knows no neighborhood: a row of the counted voxels gives the same as the volume.
    rows = [label[counted].astype(result.dtype)[None] for label in labels]
    if classes.region_order is None:
        decided = sitk.MultiLabelSTAPLE([sitk.GetImageFromArray(row) for row in rows], 0)
        result[counted] = sitk.GetArrayViewFromImage(decided)[0]
    else:
        result[counted] = paint(
            (_binary_staple([member[row] for row in rows]) for member in classes.membership()), classes
        )
    return result


def _binary_staple(masks: list[np.ndarray]) -> np.ndarray:
    """(N,) bool of (1, N) masks."""
    if all(np.array_equal(mask, masks[0]) for mask in masks):
        # STAPLE is undefined where nothing, or everything, is foreground.
        return masks[0][0]
    weights = sitk.STAPLE([sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in masks], 1.0)
    return sitk.GetArrayViewFromImage(weights)[0] > 0.5


def mean_probabilities(
    files: Sequence[Path], labels: Sequence[np.ndarray], classes: Classes
) -> tuple[np.ndarray, np.ndarray]:
    """Consensus by the mean of the members' probabilities, as nnUNetv2_ensemble forms it.

    The label with the highest mean wins, of equal ones the lowest. A region is in the consensus where its mean is above
    0.5; the regions are then painted in the order of regions_class_order.

    All files are read side by side, one slice of one channel at a time.

    Args:
        files: CASE.npz of each member, as ``nnUNetv2_predict --save_probabilities`` writes them.
        labels: The members' label maps (Z, Y, X) or (Y, X).
        classes: The channels are its labels in ascending order, or its regions.

    Returns:
        The consensus, and the entropy of the mean probability in [0, 1] as float32: that of the labels' distribution
        divided by log C, or the mean of the regions' binary entropies divided by log 2.

    Raises:
        CaseError: naming the file, if it is damaged, not of the label map's shape, or does not belong to the label map.
    """
    shape = (1,) * (3 - labels[0].ndim) + labels[0].shape
    maps = [label.reshape(shape) for label in labels]
    channels = classes.region_order or sorted(classes.known - {classes.ignore})
    least = (0.5 if classes.region_order else 1 / len(channels)) - PROBABILITY_TOLERANCE
    consensus = np.zeros(shape, dtype=_label_type(classes))
    highest = np.zeros(shape, dtype=np.float32)
    entropy = np.zeros(shape, dtype=np.float32)
    foreground, improbable = np.zeros((2, len(files)), dtype=int)
    streams = [_probabilities(file, (len(channels), *shape)) for file in files]
    for (label, z), members in zip(product(channels, range(shape[0])), zip(*streams)):
        mean = sum(members) / np.float32(len(files))
        if label:
            for m, probability in enumerate(members):
                own = probability[maps[m][z] == label]
                foreground[m] += own.size
                improbable[m] += np.count_nonzero(own < least)
        entropy[z] += entr(mean)
        if classes.region_order:
            entropy[z] += entr(1 - mean)
            consensus[z][mean > 0.5] = label
        else:
            higher = mean > highest[z]
            consensus[z][higher] = label
            highest[z][higher] = mean[higher]
    for m in np.flatnonzero(improbable > MAX_IMPROBABLE * foreground).tolist():
        raise CaseError(
            f"{files[m]} does not belong to the label map next to it: {100 * improbable[m] / foreground[m]:.0f} % of "
            "the map's foreground is improbable. Predict the case again. If the plans' reader is one that reorients "
            "images, give -d, or put plans.json beside the label maps, as nnUNetv2_predict does"
        )
    # Rounding may lift it a little above 1.
    entropy /= len(channels) * np.log(2) if classes.region_order else np.log(len(channels))
    return consensus.reshape(labels[0].shape), entropy.clip(0, 1, out=entropy).reshape(labels[0].shape)


def _probabilities(file: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The (Y, X) float32 slices of (C, Z, Y, X) probabilities in the file's order: the Z of the first channel, ..."""
    again = "Predict the case again with --save_probabilities"
    try:
        with zipfile.ZipFile(file) as archive, archive.open("probabilities.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            found, fortran, dtype = read_header(stream)
            if found != shape:
                raise CaseError(
                    f"{file} has probabilities of the shape {found}, but the classes and the label map beside it ask "
                    f"for {shape}. {again}, or give the right dataset.json"
                )
            if fortran or dtype.kind != "f":
                raise CaseError(f"{file} has no floating point numbers in C order, as nnU-Net writes them. {again}")
            size = shape[2] * shape[3] * dtype.itemsize
            for _ in range(shape[0] * shape[1]):
                content = stream.read(size)
                if len(content) < size:
                    raise EOFError("it ends early")
                block = np.frombuffer(content, dtype).reshape(shape[2:])
                if not (block.min() >= -PROBABILITY_TOLERANCE and block.max() <= 1 + PROBABILITY_TOLERANCE):
                    raise CaseError(f"{file} has values that are not from 0 to 1. Are these logits? {again}")
                yield block.astype(np.float32, copy=False).clip(0, 1)
    except CaseError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError) as error:
        raise CaseError(f"{file} cannot be read ({error}). {again}") from None


def count_components(labels: np.ndarray, classes: Classes) -> list[int]:
    """Number of connected components of each class or region; neighbors share a face, an edge or a corner."""
    box = []
    for axis in range(labels.ndim):
        planes = np.flatnonzero(labels.any(axis=tuple(a for a in range(labels.ndim) if a != axis)))
        box.append(slice(planes[0], planes[-1] + 1) if len(planes) else slice(0))
    labels = labels[tuple(box)]
    if not labels.size:
        return [0] * len(classes.names)
    connectivity: Literal[8, 26] = 8 if labels.ndim == 2 else 26
    if classes.region_order is not None:
        return [
            cc3d.connected_components(member[labels], connectivity=connectivity, return_N=True)[1]
            for member in classes.membership()
        ]
    # Touching components of different labels are told apart, so one pass does for all classes.
    components, number = cc3d.connected_components(labels, connectivity=connectivity, return_N=True)
    label = np.zeros(number + 1, dtype=labels.dtype)
    inside = labels > 0
    label[components[inside]] = labels[inside]
    return (classes.membership()[:, label[1:]]).sum(1).tolist()
