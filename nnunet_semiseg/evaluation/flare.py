"""The rules of the FLARE challenges: how their scripts compute DSC and NSD, and how FLARE22 ranks teams.

The facts are those of the scripts at https://github.com/JunMa11/FLARE: FLARE22_DSC_NSD_Eval.py (2022),
FLARE23_DSC_NSD_Eval.py (2023), T2andT3_FLARE24_DSC_NSD_Eval.py (2024, tasks 2 and 3). FLARE22's ranking scheme is that
of https://flare22.grand-challenge.org: teams are ranked for each case and measure, and these ranks are averaged, those
of the GPU and of the CPU with half the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.evaluation.metrics import Challenge, Rules
from nnunet_semiseg.files import write_csv, write_text
from nnunet_semiseg.segmentations import Classes, Geometry, read_voxels

# Labels 1, 2, ...: name, name in the challenges' tables, tolerance of NSD in mm.
ORGANS = (
    ("liver", "Liver", 5.0),
    ("right kidney", "RK", 3.0),
    ("spleen", "Spleen", 3.0),
    ("pancreas", "Pancreas", 5.0),
    ("aorta", "Aorta", 2.0),
    ("inferior vena cava", "IVC", 2.0),
    ("right adrenal gland", "RAG", 2.0),
    ("left adrenal gland", "LAG", 2.0),
    ("gallbladder", "Gallbladder", 2.0),
    ("esophagus", "Esophagus", 3.0),
    ("stomach", "Stomach", 5.0),
    ("duodenum", "Duodenum", 7.0),
    ("left kidney", "LK", 3.0),
)
LESION = ("lesion", "Lesion", 2.0)
IN_SLICES = ("aorta", "inferior vena cava", "esophagus")
# {preset: (classes, NSD is 0 where Dice is lower, type that the voxels are cast to)}
PRESETS = {
    "flare22": (ORGANS, 0.0, np.uint8),
    "flare23": ((*ORGANS, LESION), 0.2, np.int8),
    "flare24": (ORGANS, 0.2, np.uint8),
}
DIGITS = 4
# Beside evaluation.csv: a row for each case as the challenges' scripts write it, and the means over cases.
CASES, SCORES = "DSC_NSD.csv", "scores.txt"


def preset_rules(preset: str, corrected: bool) -> tuple[Classes, Rules]:
    """The classes and rules of a challenge; ``corrected`` without the slips of its script."""
    organs, lowest_dice, _ = PRESETS[preset]
    values = tuple((label,) for label in range(1, len(organs) + 1))
    # A script casts whatever it finds.
    known = frozenset(range(len(organs) + 1 if corrected else 256))
    classes = Classes(tuple(name for name, *_ in organs), values, known=known)
    challenge = Challenge(preset, IN_SLICES, lowest_dice, slips=not corrected)
    return classes, Rules(tuple(t for *_, t in organs), both_empty="perfect", challenge=challenge)


def read_as_the_script(file: Path, preset: str) -> tuple[np.ndarray, Geometry]:
    """A label map as the script of a challenge reads it: fractions are cut off, and other values wrap around.

    Returns:
        (Z, Y, X) uint8, and its geometry. Negative values of int8 are 0: no organ has them.

    Raises:
        CaseError: naming the file, if it is missing, damaged or has several channels.
    """
    voxels, geometry = read_voxels(file, SimpleITKIO)
    if len(voxels) > 1:
        raise CaseError(f"{file} has several channels. A label map has one whole number for each voxel")
    cast = voxels[0].astype(np.int64).astype(PRESETS[preset][2])
    return np.maximum(cast, 0).astype(np.uint8), geometry


def write_scores(output: Path, records: Sequence[dict], challenge: Challenge) -> dict[str, float]:
    """Write CASES and SCORES, the tables of a challenge.

    Args:
        records: Of ``evaluate_files``.

    Returns:
        {"Liver_DSC": mean over cases, ..., "Organ_DSC": mean over the organs' means, without lesions, ...}
    """
    # FLARE23 rounds the means of classes before it averages them.
    rounded = challenge.slips and challenge.preset == "flare23"
    columns, scores, organs = {}, {}, {}
    for short, metric in (("DSC", "Dice"), ("NSD", "NSD")):
        for name, abbreviation, _ in PRESETS[challenge.preset][0]:
            values = [record["metrics"][name][metric] for record in records]
            columns[f"{abbreviation}_{short}"] = values
            mean = np.mean(values)
            scores[f"{abbreviation}_{short}"] = float(np.round(mean, DIGITS) if rounded else mean)
        of_organs = [score for key, score in scores.items() if key.endswith(short) and not key.startswith("Lesion")]
        organs[f"Organ_{short}"] = float(np.mean(of_organs))
    scores |= organs
    rows = zip([f"{record['case']}.nii.gz" for record in records], *columns.values())
    write_csv(output / CASES, ["Name", *columns], rows)
    write_text(output / SCORES, "".join(f"{key}: {value:.{DIGITS}f}\n" for key, value in scores.items()))
    return scores
