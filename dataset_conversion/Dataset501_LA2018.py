"""Left atrium in gadolinium-enhanced MR: the Atrial Segmentation Challenge of 2018.

Official form: a folder for each scan with lgemri.nrrd and laendo.nrrd (255 is the cavity), in "Training Set" (100) and
"Testing Set" (54). Their headers say 1 mm and have no position, while the challenge publishes 0.625 mm.
Shared form: mri_norm2.h5 in a folder for each of the 100 scans, cropped around the label and z-scored, axes x, y, z.
"""

from __future__ import annotations

from argparse import Namespace

from dataset_conversion.common import (
    Case,
    Download,
    Scan,
    Source,
    by_name,
    h5py,
    in_order,
    read_h5,
    read_volume,
    with_spacing,
)
from nnunet_semiseg.files import read_text

SPACING = (0.625, 0.625, 0.625)
LISTS = ("train.list", "test.list")
# The published lists (Yu et al., MICCAI 2019): the first 4, 8 or 16 of 80 are labeled, and 20 are for testing.
LABELED = """06SR5RBREL16DQ6M8LWS 0RZDK210BSMWAA6467LU 1D7CUD1955YZPGK8XHJX 1GU15S0GJ6PFNARO469W
    1MHBF3G6DCPWHSKG7XCP 23X6SY44VT9KFHR7S7OC 2XL5HSFSE93RMOJDRGR4 38CWS74285MFGZZXR09Z 3C2QTUNI0852XV7ZH4Q1
    3DA0T2V6JJ2NLUAV6FWM 4498CA6DZWELOXCBRYRF 45C45I6IXAFGNRO067W9 4CHFJGF6ZUM7CMZTNFQF 4EPVTT1HPA8U60CDUKXE
    57SGAJMLCTCH92QUA0EE 5BHTH9RHH3PQT913I59W"""
TEST = """UPT6DX9IQY9JAZ7HJKA7 UTBUJIWZMKP64E3N73YC ULHWPWKKLTE921LQLH1P V0MZOWJ6MU3RMRCV9EXR VDOF02M8ZHEAADFMS6NP
    VG4C826RAAKVMV9BQLVD VIXBEFTNVHZWKAKURJBN VQ2L3WM8KEVF6L44E6G9 WBG9WYZ1B25WDT5WAT8T WMDG2EFA6L2SNDZXIRU0
    WNPKE0W404QE9AELX1LR WSJB9P4JCXUVHBOYFVWL WW8F5CO4S4K5IM5Z7EXX X18LU5AOBNNDMLTA0JZL XYDLYJ5CS19FDBVLJIPI
    Y7ZU0B2APPF54WG6PDMF YDKD1HVHSME6NVMA8I39 Z9GMG63CJLL0VW893BB1 ZIJLJAVQV3FJ6JSQOH1E ZQPMJ4XEC5A4BISD45P1"""


def cases(download: Download, args: Namespace) -> list[Case]:
    files = download.find("lgemri.nrrd")
    if not files:
        files = download.find("mri_norm2.h5")
        h5py()
    if not files:
        raise ValueError(f"{download} has no lgemri.nrrd and no mri_norm2.h5: it is not the left atrium data of 2018")
    scans = by_name(files, lambda file: file.parent.name)
    # Copies of the shared form come with the lists; they decide if they are there.
    lists = [[line for file in download.find(name)[:1] for line in read_text(file).split()] for name in LISTS]
    train, test = lists if all(lists) else (LABELED.split(), TEST.split())
    result = []
    for name in in_order(scans, [*train, *test]):
        file = scans[name]
        left_out = file.parent.parent.name == "Testing Set"
        label = file.with_name("laendo.nrrd") if file.suffix == ".nrrd" else file
        result.append(Case(name, name, (file,), label, "test" if name in test else None if left_out else "train"))
    return result


def read(case: Case, with_label: bool) -> Scan:
    (file,) = case.images
    if file.suffix == ".h5":
        image = with_spacing(read_h5(file, "image").T, SPACING)
        label = with_spacing(read_h5(file, "label").T, SPACING) if with_label else None
        return Scan([image], label, ["spacing of 0.625 mm taken from the challenge's page"])
    notes: list[str] = []
    image = read_volume(file, notes)
    label = read_volume(case.label, notes) if with_label and case.label else None
    if image.GetSpacing() == (1.0, 1.0, 1.0):
        image.SetSpacing(SPACING)
        if label and label.GetSpacing() == (1.0, 1.0, 1.0):
            label.SetSpacing(SPACING)
        notes.append("spacing of 1 mm in the header corrected to the published 0.625 mm")
    return Scan([image], label, notes)


SOURCE = Source(
    title="left atrium, gadolinium-enhanced MR (Atrial Segmentation Challenge 2018)",
    channels=("MRI",),
    labels={"left atrium": (255, 1)},
    cases=cases,
    read=read,
    reference="https://www.cardiacatlas.org/atriaseg2018-challenge/atria-seg-data/; cite Xiong et al., Medical Image "
    "Analysis 67 (2021) 101832",
    license="policies of the Cardiac Atlas Project; no redistribution",
)
