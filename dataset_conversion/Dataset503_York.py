"""Left ventricle in cine MR: the York University data set, the "MR endocardium" of the papers.

sol_yxzt_patN.mat has the sequence (y, x, z, t), manual_seg_32points_patN.mat the contours as a cell (z, t): 65 points
(x, y), counted from 1 as MATLAB does: 32 of the endocardium, a row of zeros, 32 of the epicardium; or -99999 where
nobody drew one. Each time point is a case. The files have no spacing.
"""

from __future__ import annotations

import re
from argparse import Namespace
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.io import loadmat
from skimage.draw import polygon

from dataset_conversion.common import Case, Download, Scan, Source, by_name, with_spacing
from nnunet_semiseg.datasets import CaseError

# The middle of the published 0.93-1.64 mm and 6-13 mm (x, y, z).
NOMINAL_SPACING = (1.3, 1.3, 9.5)
# There are no published lists: a fifth of the patients is drawn for testing, with nnU-Net's seed.
SEED = 12345


def cases(download: Download, args: Namespace) -> list[Case]:
    sequences, contours = (
        by_name(download.find(f"{key}_pat*.mat"), lambda file: re.sub(r".*_pat|\.mat", "", file.name))
        for key in ("sol_yxzt", "manual_seg_32points")
    )
    if not sequences:
        raise ValueError(f"{download} has no sol_yxzt_patN.mat: it is not the York cardiac MR data")
    drawn = np.random.RandomState(SEED).permutation(sorted(sequences)).tolist()
    test = drawn[: round(len(drawn) / 5)]
    result = []
    for number in drawn:
        image, label = sequences[number], contours.get(number)
        if label is None:
            raise ValueError(f"{image} has no contours: manual_seg_32points_pat{number}.mat is missing")
        drawings = _load(label, "manual_seg_32points")
        for frame in range(drawings.shape[1]):
            labeled = any(cell.size > 1 for cell in drawings[:, frame])
            result.append(
                Case(
                    f"pat{number:0>2}_t{frame + 1:02d}",
                    f"pat{number:0>2}",
                    (image,),
                    label if labeled else None,
                    "test" if number in test else "train",
                    frame,
                )
            )
    return result


def read(case: Case, with_label: bool) -> Scan:
    assert case.frame is not None
    sequence = _load(case.images[0], "sol_yxzt")
    if sequence.ndim != 4 or case.frame >= sequence.shape[3]:
        raise CaseError(
            f"{case.images[0]} has the size {sequence.shape}, not (y, x, z, t) with {case.frame + 1} frames"
        )
    voxels = sequence[..., case.frame].transpose(2, 0, 1)
    whole_numbers = np.array_equal(voxels, np.rint(voxels)) and np.abs(voxels).max() < 2**15
    image = with_spacing(voxels.astype(np.int16 if whole_numbers else np.float32), NOMINAL_SPACING)
    label = None
    if with_label and case.label is not None:
        mask = endocardium(_load(case.label, "manual_seg_32points")[:, case.frame], voxels.shape, case.label)
        label = sitk.GetImageFromArray(mask)
        label.CopyInformation(image)
    return Scan([image], label, ["nominal spacing of 1.3 x 1.3 x 9.5 mm, because .mat files have none"])


def endocardium(contours: np.ndarray, shape: tuple[int, int, int], file: Path) -> np.ndarray:
    """(Z, Y, X) mask of the pixels whose centers are inside the first 32 points; slices without contour are empty.

    Args:
        contours: Of the Z slices, each (65, 2) of x and y counted from 1, or one number.
        shape: (Z, Y, X).
        file: For the message.

    Raises:
        CaseError: if the number of slices differs, or a contour has another form or leaves the image.
    """
    if len(contours) != shape[0]:
        raise CaseError(f"{file} has contours of {len(contours)} slices, but the images have {shape[0]}")
    mask = np.zeros(shape, dtype=np.uint8)
    for z, cell in enumerate(contours):
        if cell.size > 1:
            points = cell[:32].astype(float) - 1
            if cell.shape[1:] != (2,) or len(points) < 32 or not ((points > -1) & (points < shape[:0:-1])).all():
                raise CaseError(f"{file}: the contour of slice {z + 1} is not 32 points (x, y) in the image")
            rows, columns = polygon(points[:, 1], points[:, 0], shape[1:])
            mask[z, rows, columns] = 1
    return mask


# The frames of a patient are converted one after the other: two files.
@lru_cache(maxsize=2)
def _load(file: Path, key: str) -> np.ndarray:
    try:
        return loadmat(file)[key]
    except Exception as error:
        raise CaseError(f"{file} cannot be read ({type(error).__name__}: {error}). Download it again") from None


SOURCE = Source(
    title="left ventricle, cine MR (York University)",
    channels=("cineMRI",),
    labels={"endocardium": (1,)},
    cases=cases,
    read=read,
    reference="http://www.cse.yorku.ca/~mridataset/; cite Andreopoulos and Tsotsos, Medical Image Analysis 12 (2008) "
    "335-357",
    license="free for research, with the citation",
)
