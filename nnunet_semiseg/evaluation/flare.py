"""The rules of the FLARE challenges: how their scripts compute DSC and NSD, and how FLARE22 ranks teams.

The facts are those of the scripts at https://github.com/JunMa11/FLARE: FLARE22_DSC_NSD_Eval.py (2022),
FLARE23_DSC_NSD_Eval.py (2023), T2andT3_FLARE24_DSC_NSD_Eval.py (2024, tasks 2 and 3). FLARE22's ranking scheme is that
of https://flare22.grand-challenge.org: teams are ranked for each case and measure, and these ranks are averaged, those
of the GPU and of the CPU with half the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.stats import rankdata

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.evaluation.metrics import Challenge, Rules
from nnunet_semiseg.files import read_table, visible_files, write_csv, write_text
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
# Of FLARE22's ranking: {measure: (weight, whether more is better)}
MEASURES = {
    "DSC": (1.0, True),
    "NSD": (1.0, True),
    "Time": (1.0, False),
    "AUC_GPU_Time": (0.5, False),
    "AUC_CPU_Time": (0.5, False),
}
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


# ------------------------------------------------------------------------------------------------------------- ranking


def read_team(folder: Path) -> dict[str, dict[str, float]]:
    """{case: {measure: value}} of a team, from the two tables of its folder, those of this package or of FLARE22.

    DSC and NSD are means over the 13 organs. NaN is a GPU that was not measured.

    Raises:
        OSError, ValueError: naming the table that is missing or damaged, or the case that is in one of them alone.
    """
    scores = _of_cases(_the_one(folder, "DSC_NSD", "evaluate --preset"))
    efficiency = _of_cases(_the_one(folder, "Efficiency", "measure"))
    for first, second in ((scores, efficiency), (efficiency, scores)):
        for case in first.rows:
            if case not in second.rows:
                raise CaseError(f"{second.file} has no case {case}, which {first.file} has. Both need the same cases")
    team = {}
    for case in scores.rows:
        values = {}
        for short in ("DSC", "NSD"):
            values[short] = float(np.mean([scores.number(case, f"{organ}_{short}") for _, organ, _ in ORGANS]))
        team[case] = values | {key: efficiency.number(case, key) for key in MEASURES if key not in values}
    return team


@dataclass(frozen=True)
class _Table:
    """{case: row} of a file."""

    file: Path
    rows: dict[str, dict[str, str]]

    def number(self, case: str, column: str) -> float:
        try:
            value = float(self.rows[case][column])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.file} has no number in column '{column}' of case {case}. Write it again") from None
        if np.isnan(value) and "GPU" not in column:
            raise ValueError(f"{self.file} has nan in column '{column}' of case {case}. Evaluate or measure it again")
        return value


def _the_one(folder: Path, part: str, command: str) -> Path:
    """The table of a folder that has ``part`` in its name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}")
    found = [f for f in visible_files(folder) if part.lower() in f.name.lower() and f.suffix == ".csv"]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}. Keep one table of a kind for each team")
    raise FileNotFoundError(
        f"{folder} has no table with {part} in its name. Write it with nnunet_semiseg {command} -o {folder} ..."
    )


def _of_cases(file: Path) -> _Table:
    rows: dict[str, dict[str, str]] = {}
    for row in read_table(file, ("Name",)):
        # FLARE22's measurements are named after the image, and its scores after the label map.
        case = row["Name"].removesuffix(".nii.gz").removesuffix("_0000")
        if case in rows:
            raise ValueError(f"{file} has case {case} twice. Keep one row")
        rows[case] = row
    if not rows:
        raise ValueError(f"{file} has no case. Write it again")
    return _Table(file, rows)


def rank(values: np.ndarray, weights: np.ndarray, more_is_better: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank first, then average: FLARE22's scheme.

    Equal values have the best of their ranks (``rankThenAggregate`` of challengeR, with which FLARE22 was ranked).

    Args:
        values: (T, N, M) of T teams, N cases and M measures.
        weights, more_is_better: (M,).

    Returns:
        (T, M) mean ranks over cases, and (T,) their weighted mean.
    """
    signed = np.where(more_is_better, -values, values)
    of_measures = rankdata(signed, method="min", axis=0).mean(axis=1)
    return of_measures, of_measures @ weights / weights.sum()
