"""Pancreas in CT: NIH Pancreas-CT of The Cancer Imaging Archive.

PANCREAS_NNNN/<study>/<series>/*.dcm and labelNNNN.nii.gz. The header of a label claims another orientation than the
DICOM series has, so each label is put into the orientation in which its surface follows the image.
Cases 25 and 70 were withdrawn from the archive; older copies have their images, and all copies have their labels.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from dataset_conversion.common import Case, Download, Scan, Source, by_name, labels_of, read_series, read_volume
from nnunet_semiseg.datasets import CaseError

WITHDRAWN = (25, 70)
# The published lists (CoraNet, BCP) are in the order of the numbers, without the withdrawn: 62 train, 18 test.
LAST_TRAINING_CASE = 63
# How much better the best orientation has to be than the second best. On MR of the left atrium, which has far fewer
# voxels and weaker edges than CT, the right one was better by 14 % or more in 80 of 80 scans.
MARGIN = 1.03


def cases(download: Download, args: Namespace) -> list[Case]:
    labels = by_name(download.find("label[0-9][0-9][0-9][0-9].nii.gz"), lambda file: file.name[5:9])
    result = []
    folders = by_name(download.find("PANCREAS_[0-9][0-9][0-9][0-9]"), lambda folder: folder.name)
    for name, folder in folders.items():
        number = name[-4:]
        series = sorted({file.parent for file in folder.rglob("[!.]*.dcm")})
        # The archive keeps empty folders of withdrawn cases.
        if int(number) in WITHDRAWN or not series:
            continue
        if len(series) > 1:
            raise ValueError(f"{folder} has {len(series)} series. Keep the one that the label was drawn on")
        if number not in labels:
            raise ValueError(f"{folder} has no label{number}.nii.gz. Download the labels into {download}, too")
        split = "train" if int(number) <= LAST_TRAINING_CASE else "test"
        result.append(Case(name, name, (series[0],), labels[number], split))
    if not result:
        raise ValueError(f"{download} has no folders PANCREAS_NNNN with .dcm files: it is not Pancreas-CT")
    return sorted(result, key=lambda case: case.name)


def read(case: Case, with_label: bool) -> Scan:
    image = read_series(case.images[0])
    if not with_label or case.label is None:
        return Scan([image])
    notes: list[str] = []
    label = read_volume(case.label, notes)
    if label.GetSize() != image.GetSize():
        raise CaseError(f"{case.label} has the size {label.GetSize()}, but {case.images[0]} has {image.GetSize()}")
    mask = labels_of(label, case.label, frozenset({0, 1}))
    if not mask.any():
        raise CaseError(f"{case.label} is empty. Download it again")
    scores = orientation_scores(sitk.GetArrayViewFromImage(image), mask > 0)
    second, best = sorted(scores, key=lambda orientation: scores[orientation])[-2:]
    if scores[best] < MARGIN * scores[second]:
        raise CaseError(
            f"{case.label} does not fit {case.images[0]} in any orientation (edges agree by {scores[best]:.2f} and "
            f"{scores[second]:.2f} in the two best ones). Are they of the same case?"
        )
    fitted = sitk.GetImageFromArray(np.flip(mask, best))
    fitted.CopyInformation(image)
    flipped = (
        f"label flipped along {' and '.join('zyx'[axis] for axis in best)}" if best else "label rows as in the DICOM"
    )
    return Scan([image], fitted, [*notes, f"{flipped}; its header ignored"])


def orientation_scores(image: np.ndarray, mask: np.ndarray) -> dict[tuple[int, ...], float]:
    """How well the surface of a mask follows the edges of the image, for each of the eight ways to flip the mask.

    The mean over the surface of the squared cosine of the angle between the gradients of image and mask: 1/3 for
    gradients that have nothing to do with each other. It knows neither anatomy nor intensities (normalized gradient
    fields: Haber and Modersitzki, MICCAI 2006).

    Args:
        image, mask: (Z, Y, X), the mask not empty.

    Returns:
        {axes to flip the mask along: score}
    """
    inside = np.nonzero(mask)
    margin = 6  # voxels; the filters reach 4
    box = tuple(slice(max(0, i.min() - margin), i.max() + margin + 1) for i in inside)
    normal = _gradient(mask[box])
    steepness = np.linalg.norm(normal, axis=0)
    surface = steepness > steepness.max() / 2
    normal = normal[:, surface] / steepness[surface]
    scores = {}
    for axes in (axes for count in range(4) for axes in combinations(range(3), count)):
        gradient = _gradient(np.flip(image, axes)[box])[:, surface]
        square = (gradient**2).sum(0)
        scores[axes] = float(((gradient * normal).sum(0) ** 2 / np.maximum(square, 1e-6)).mean())
    return scores


def _gradient(array: np.ndarray) -> np.ndarray:
    """(3, Z, Y, X) gradient per voxel of an array smoothed by one voxel."""
    array = array.astype(np.float32)
    return np.stack([gaussian_filter(array, 1.0, order=[int(axis == a) for a in range(3)]) for axis in range(3)])


SOURCE = Source(
    title="pancreas, CT (NIH Pancreas-CT)",
    channels=("CT",),
    labels={"pancreas": (1,)},
    cases=cases,
    read=read,
    reference="https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU; cite Roth et al., MICCAI 2015",
    license="CC BY 3.0",
)
