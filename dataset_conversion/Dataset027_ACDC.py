"""Right ventricle, myocardium and left ventricle in cine MR: the Automated Cardiac Diagnosis Challenge.

Official form: patientNNN/ with Info.cfg (which frames are end-diastole and end-systole; ED is not always the first),
patientNNN_4d.nii.gz, and patientNNN_frameNN[_gt].nii.gz of these two frames. training has patients 1 to 100, testing
101 to 150.
Shared form: volumes patientNNN_frame01.h5 (ED) and _frame02.h5 (ES), or slices patientNNN_frame01_slice_K.h5, min-max
normalized, without any spacing.
"""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataset_conversion.common import (
    Case,
    Download,
    Scan,
    Source,
    by_name,
    h5py,
    in_order,
    read_files,
    read_h5,
    with_spacing,
)
from nnunet_semiseg.files import read_text
from nnunet_semiseg.segmentations import read_image

# Of the .h5 files: what the data set mostly has (x, y, z in mm).
NOMINAL_SPACING = (1.5, 1.5, 10.0)
# The published lists (Luo et al., SSL4MIS): the first 3, 7 or 14 of 70 are labeled, 10 for validation, 20 for testing.
TRAIN = """99 38 50 100 58 21 49 20 72 40 60 89 4 56 98 96 31 18 94 47 48 55 97 74 43 41 63 37 95 54 26 88 32 69 6 71 12
    73 61 17 25 10 57 29 51 5 36 46 62 34 76 92 70 77 67 3 91 16 14 44 42 90 53 27 35 86 23 9 79 15"""
VALIDATION = "28 85 82 87 19 30 78 45 2 39"
TEST = "11 13 84 33 93 22 68 24 83 81 80 1 7 66 8 65 75 64 59 52"
SPLITS = {
    f"patient{int(number):03d}": split
    for split, numbers in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
    for number in numbers.split()
}
PHASES = ("ED", "ES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cine",
        action="store_true",
        help="also the frames between end-diastole and end-systole of the training patients, as unlabeled cases",
    )


def cases(download: Download, args: Namespace) -> list[Case]:
    infos = by_name(download.find("Info.cfg"), lambda file: file.parent.name)
    if infos:
        return [case for patient in in_order(infos, list(SPLITS)) for case in _official(infos[patient], args.cine)]
    if args.cine:
        raise ValueError(
            f"{download} has no Info.cfg, so it is not the official form. Only that has all frames (--cine)"
        )
    return _shared(download)


def _official(info: Path, cine: bool) -> list[Case]:
    folder, patient = info.parent, info.parent.name
    facts = dict(re.findall(r"^(\w+):\s*(\S+)", read_text(info), re.MULTILINE))
    result = []
    for phase in PHASES:
        if not facts.get(phase, "").isdigit():
            raise ValueError(f"{info} does not say which frame is {phase}. Download it again")
        image = folder / f"{patient}_frame{int(facts[phase]):02d}.nii.gz"
        if not image.is_file():
            raise ValueError(f"{image} is missing, although {info} says that it is {phase}")
        label = image.with_name(image.name.replace(".nii.gz", "_gt.nii.gz"))
        result.append(Case(f"{patient}_{phase}", patient, (image,), label, SPLITS.get(patient)))
    if cine and SPLITS.get(patient) == "train":
        file = folder / f"{patient}_4d.nii.gz"
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
            frames = reader.GetSize()[3]
        except (RuntimeError, IndexError):
            raise ValueError(f"{file} is missing or damaged, or not 4D. Download it again") from None
        for number in sorted(set(range(1, frames + 1)) - {int(facts[phase]) for phase in PHASES}):
            result.append(Case(f"{patient}_frame{number:02d}", patient, (file,), None, "train", number - 1))
    return result


def _shared(download: Download) -> list[Case]:
    volumes: dict[tuple[str, str], tuple[Path, ...]] = {}
    slices: dict[tuple[str, str], dict[int, Path]] = {}
    for stem, file in by_name(download.find("patient*_frame*.h5"), lambda file: file.stem).items():
        match = re.fullmatch(r"(patient\d{3})_frame0([12])(?:_slice_(\d+))?", stem)
        if match:
            patient, frame, number = match.groups()
            if number:
                slices.setdefault((patient, frame), {})[int(number)] = file
            else:
                volumes[patient, frame] = (file,)
    if not volumes and not slices:
        raise ValueError(f"{download} has neither patientNNN/Info.cfg nor patientNNN_frame01.h5: it is not ACDC")
    h5py()
    for key, numbered in slices.items():
        lacking = sorted(set(range(min(numbered), max(numbered))) - set(numbered))
        if lacking and key not in volumes:
            raise ValueError(f"{numbered[min(numbered)].parent} lacks slice {lacking[0]} of {key[0]}, frame {key[1]}")
    files = {key: tuple(numbered[n] for n in sorted(numbered)) for key, numbered in slices.items()} | volumes
    patients = {patient: None for patient, _ in files}
    return [
        Case(f"{patient}_{phase}", patient, files[patient, frame], files[patient, frame][0], SPLITS.get(patient))
        for patient in in_order(patients, list(SPLITS))
        for frame, phase in zip("12", PHASES)
        if (patient, frame) in files
    ]


def read(case: Case, with_label: bool) -> Scan:
    if case.images[0].suffix == ".h5":
        image = with_spacing(_volume(case.images, "image"), NOMINAL_SPACING)
        label = with_spacing(_volume(case.images, "label"), NOMINAL_SPACING) if with_label else None
        return Scan([image], label, ["nominal spacing of 1.5 x 1.5 x 10 mm, because .h5 files have none"])
    if case.frame is None:
        return read_files(case, with_label)
    return Scan([_frames(case.images[0])[:, :, :, case.frame]])


# The frames of a patient are converted one after the other.
@lru_cache(maxsize=1)
def _frames(file: Path) -> sitk.Image:
    return read_image(file)


def _volume(files: tuple[Path, ...], key: str) -> np.ndarray:
    """(Z, Y, X) of one volume, or of its slices in order."""
    arrays = [read_h5(file, key) for file in files]
    return arrays[0] if arrays[0].ndim == 3 else np.stack(arrays)


SOURCE = Source(
    title="heart, cine MR (Automated Cardiac Diagnosis Challenge)",
    channels=("cineMRI",),
    labels={"RV": (1,), "Myo": (2,), "LV": (3,)},
    cases=cases,
    read=read,
    reference="https://www.creatis.insa-lyon.fr/Challenge/acdc/; cite Bernard et al., IEEE TMI 37 (2018) 2514-2525",
    license="research, with the citation",
)
