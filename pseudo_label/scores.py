"""How far the members of a consensus agree, for each case and class: the score of Eq. 2 and its companions.

Reference: Pham, Nguyen-Ho, Dao, Nguyen and Tran, Semi-supervised organ segmentation with mask propagation refinement
and uncertainty estimation for data generation (FLARE 2022), Eq. 2 and 3.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.datasets import CaseError, check_there
from nnunet_semiseg.files import read_json, write_csv, write_json
from nnunet_semiseg.parallel import DEFAULT_PROCESSES, over_cases
from nnunet_semiseg.segmentations import (
    FILE_ENDINGS,
    Classes,
    Geometry,
    find_files,
    geometry_difference,
    read_labels,
    write_labels,
    write_map,
)
from pseudo_label.consensus import count_components, mean_probabilities, staple, tally

CONSENSUS = ("mean", "majority", "staple")
AGREEMENT = ("dice", "iou")
BOTH_EMPTY = ("skip", "one")
# What a run leaves in its folder, in the order in which --overwrite removes it: without cases.csv the folder is
# not finished, and a case without its file is not done.
_OUTPUTS = ("cases.csv", "cases", "scores.csv", "labeled_volumes.json", "consensus", "disagreement", "entropy")
# Formats that cannot hold what is written, and the ones that are written instead.
_MASK_ENDINGS = {".mhd": ".mha"}
_MAP_ENDINGS = {**_MASK_ENDINGS, ".png": ".tif", ".bmp": ".tif"}


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


def score_members(
    members: Sequence[Path],
    out: Path,
    classes: Classes,
    consensus: str | None = None,
    per_slice: bool = False,
    metric: str = "dice",
    both_empty: str = "skip",
    labeled: Path | None = None,
    processes: int = DEFAULT_PROCESSES,
    overwrite: bool = False,
    allow_identical: bool = False,
    hidden: Collection[str] = (),
    reader: type[BaseReaderWriter] | None = None,
) -> dict[str, CaseScore]:
    """Consensus and scores of all cases in the folders of two or more members.

    ``out`` gets consensus/CASE, disagreement/CASE, entropy/CASE (if all members have probabilities), cases/CASE.json,
    score.json with the settings, and at the end, when all cases are done, scores.csv and cases.csv. Called again it
    continues: a case is done when its cases/CASE.json is there.

    Args:
        members: Folders of label maps; probabilities are the CASE.npz beside them.
        out: New, empty, or of an earlier call with the same settings.
        classes: Of the label maps.
        consensus: mean, majority or staple; None for mean where all members have probabilities, else majority.
        per_slice, metric, both_empty: See :func:`score_labels`.
        labeled: Folder of the label maps of labeled cases, with which volumes are compared; None for no comparison.
        processes: Each holds one case in memory.
        overwrite: Remove what an earlier call left in ``out`` first.
        allow_identical: Members may agree in every voxel of every case.
        hidden: Cases in ``labeled`` whose label maps are not read.
        reader: nnU-Net's of all label maps; None for that of the files' ending.

    Returns:
        {case: its scores}, sorted.

    Raises:
        ValueError, OSError: before anything is written, naming folder or file, if members or ``out`` cannot be used.
        CaseError: at the end, if cases failed; one line for each was printed, and the others are done.
    """
    members, out = [Path(os.path.abspath(member)) for member in members], Path(out)
    files = find_cases(members)
    probabilities = _find_probabilities(members, files, consensus)
    consensus = consensus or ("majority" if probabilities is None else "mean")
    classes.check_order()
    for name, values in zip(classes.names, classes.values):
        if 0 in values:
            raise ValueError(f"The region {name} contains the background (0). Agreement on background is no score")
    settings = {
        "members": [str(member) for member in members],
        "consensus": consensus,
        "per_slice": per_slice,
        "metric": metric,
        "both_empty": both_empty,
        "labeled": labeled and os.path.abspath(labeled),
        **({"hidden": sorted(hidden)} if hidden else {}),
        "classes": {name: list(values) for name, values in zip(classes.names, classes.values)},
        "regions_class_order": classes.region_order and list(classes.region_order),
        "ignore": classes.ignore,
        "reader": reader and reader.__name__,
    }
    _check_out(out, settings, overwrite)
    done = set() if overwrite else {file.stem for file in (out / "cases").glob("[!.]*.json")}
    stale = sorted(done - set(files))
    if stale:
        raise ValueError(
            f"{out} has the case {stale[0]}, which the members no longer have. Use --overwrite, or another -o"
        )
    if not done and not allow_identical:
        _refuse_identical(files, classes, reader)
    if overwrite:
        for name in _OUTPUTS:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    write_json(out / "score.json", settings)

    volumes = labeled and _labeled_volumes(Path(labeled), out, classes, processes, hidden, reader)
    missing = [case for case in files if case not in done]
    if missing:
        # They are there when all cases are done, and only then.
        for name in ("cases.csv", "scores.csv"):
            (out / name).unlink(missing_ok=True)
    jobs = {
        case: (case, files[case], probabilities and probabilities[case], out, classes, settings, volumes, reader)
        for case in missing
    }
    warnings, failures = over_cases(_score_case, jobs, processes, "Scoring", done=len(done))
    _print_warnings(warning for of_case in warnings.values() for warning in of_case)
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise CaseError(
            f"{len(failures)} of {len(files)} cases could not be scored (above); the others are done. Fix them, or "
            "remove them from all members, and run the command again"
        )
    scores = _read_cases(out)
    _write_tables(out, scores)
    return scores


def find_cases(members: Sequence[Path]) -> dict[str, list[Path]]:
    """{case: its label map of each member}, sorted.

    Raises:
        ValueError, FileNotFoundError: naming the folder, if there is only one, or they have different cases.
    """
    if len(members) < 2:
        raise ValueError(f"-i names one member, {members[0]}. Agreement takes two or more")
    if len({os.path.realpath(member) for member in members}) < len(members):
        raise ValueError("-i names a folder twice. Give every member once")
    found = {member: find_files(member) for member in members}
    every = sorted(set().union(*found.values()))
    for member, cases in found.items():
        lacking = [case for case in every if case not in cases]
        if lacking:
            other = next(other for other in members if lacking[0] in found[other])
            raise ValueError(
                f"{other} has the case {lacking[0]}{f' (and {len(lacking) - 1} more)' if lacking[1:] else ''}, but "
                f"{member} has not. Predict it with every member, or remove it"
            )
    return {case: [found[member][case] for member in members] for case in every}


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in dict.fromkeys(warnings):
        print(f"Warning: {warning}", file=sys.stderr)


def find_labels(members: Sequence[Path], processes: int, reader: type[BaseReaderWriter] | None = None) -> Classes:
    """The classes that label maps have, where nothing else tells; each is named by its value.

    Raises:
        ValueError: if the members have different labels.
        CaseError: at the end, if cases failed; one line for each was printed.
    """
    files = find_cases(members)
    results, failures = over_cases(
        _labels_of, {case: (of_case, reader) for case, of_case in files.items()}, processes, "Labels"
    )
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise CaseError(f"{len(failures)} of {len(files)} cases cannot be read (above). Fix or remove them")
    labels = [set().union(*of_member) for of_member in zip(*results.values())]
    for member, of_member in zip(members, labels):
        if of_member != labels[0]:
            shown = [", ".join(map(str, sorted(values))) for values in (labels[0], of_member)]
            raise ValueError(
                f"{members[0]} has the labels {shown[0]}, but {member} has {shown[1]}. If they mean the same, and some "
                "are merely absent, say with -d or --dataset-json which labels there are"
            )
    return Classes.from_labels(labels[0])


def _labels_of(files: list[Path], reader: type[BaseReaderWriter] | None) -> list[set[int]]:
    return [set(np.unique(read_labels(file, reader=reader)[0]).tolist()) for file in files]


def _find_probabilities(
    members: list[Path], files: dict[str, list[Path]], consensus: str | None
) -> dict[str, list[Path]] | None:
    """{case: its probabilities of each member}, or None if not all are there."""
    found = {case: [member / f"{case}.npz" for member in members] for case in files}
    lacking = next((file for of_case in found.values() for file in of_case if not file.is_file()), None)
    if lacking is None:
        return found
    if lacking.is_symlink():
        check_there(lacking)
    if consensus == "mean":
        raise FileNotFoundError(
            f"{lacking} is missing. The mean needs probabilities: predict with --save_probabilities, or use "
            "--consensus majority"
        )
    return None


def _check_out(out: Path, settings: dict, overwrite: bool) -> None:
    file = out / "score.json"
    if not file.is_file():
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(f"{out} has other files and no score.json. Choose a new or empty folder for -o")
        return
    before = settings if overwrite else read_json(file, settings, "Use --overwrite to score again, or another -o")
    for key, value in settings.items():
        if before[key] != value:
            raise ValueError(
                f"{out} was scored with {key} {_shown(before[key])}, not {_shown(value)}. Use --overwrite to score "
                "it anew, or another -o"
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {'+'.join(map(str, values))}" for name, values in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse_identical(files: dict[str, list[Path]], classes: Classes, reader: type[BaseReaderWriter] | None) -> None:
    """Raises ValueError if the members' label maps are the same in all cases, which is no agreement of several models.

    The first case is usually enough to see that they are not.
    """
    any_foreground = False
    for of_case in files.values():
        try:
            first = read_labels(of_case[0], classes.known, reader)[0]
            any_foreground |= bool(first.any())
            if not all(np.array_equal(first, read_labels(file, classes.known, reader)[0]) for file in of_case[1:]):
                return
        except CaseError:
            # It is reported when its turn comes.
            continue
    if any_foreground:
        raise ValueError(
            f"All members have the same label maps in all {len(files)} cases, so every score would be 1 and mean "
            "nothing. Use members that were trained differently, such as folds; is a folder a copy of another?"
        )


def _labeled_volumes(
    folder: Path,
    out: Path,
    classes: Classes,
    processes: int,
    hidden: Collection[str],
    reader: type[BaseReaderWriter] | None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation over labeled cases of each class's volume in mm3, (R,) each; None for fewer than two.

    A case without the class counts as 0. The volumes are kept in ``out``.
    """
    file = out / "labeled_volumes.json"
    if not file.is_file():
        jobs = {case: (path, classes, reader) for case, path in find_files(folder).items() if case not in hidden}
        found, failures = over_cases(_volumes_of, jobs, processes, "Volumes of labeled cases")
        if failures:
            print("\n".join(failures), file=sys.stderr)
            raise CaseError(
                f"{len(failures)} of {len(jobs)} labeled cases in {folder} cannot be read (above). Fix them"
            )
        _print_warnings(warning for _, warning in found.values() if warning)
        write_json(file, {case: volumes for case, (volumes, _) in found.items()})
    volumes = np.array([list(of_case.values()) for of_case in read_labeled_volumes(out).values()])
    return (volumes.mean(0), volumes.std(0, ddof=1)) if len(volumes) > 1 else None


def read_labeled_volumes(out: Path) -> dict[str, dict[str, float]]:
    """{labeled case: {class: its volume in mm3}} of a scored folder; empty if it was compared with none."""
    file = Path(out) / "labeled_volumes.json"
    return read_json(file, cure="Score again with --overwrite") if file.is_file() else {}


def _volumes_of(
    file: Path, classes: Classes, reader: type[BaseReaderWriter] | None
) -> tuple[dict[str, float], str | None]:
    """Of each class, and a warning."""
    labels, geometry = read_labels(file, classes.known, reader)
    # One plane after the other: bincount turns what it counts into 8 bytes each.
    counts = sum(np.bincount(plane.ravel(), minlength=classes.num_values) for plane in labels)
    volumes = classes.membership() @ counts * np.prod(geometry.spacing)
    return dict(zip(classes.names, volumes.tolist())), geometry.warning


def _read_members(
    case: str, files: list[Path], classes: Classes, reader: type[BaseReaderWriter] | None
) -> tuple[list[np.ndarray], list[Geometry]]:
    """The members' label maps of a case, and their geometries, which are the same but for warnings."""
    labels: list[np.ndarray] = []
    geometries: list[Geometry] = []
    for file in files:
        own, geometry = read_labels(file, classes.known, reader)
        if own.ndim not in (2, 3):
            raise CaseError(
                f"{file} has {own.ndim} dimensions. A label map has 2 or 3: split it into one for each time"
            )
        difference = geometry_difference(geometries[0], geometry) if geometries else None
        if difference:
            raise CaseError(
                f"case {case}: {files[0]} and {file} have different {difference}. Predict it with all members from the "
                "same image"
            )
        labels.append(own)
        geometries.append(geometry)
    return labels, geometries


def _score_case(
    case: str,
    files: list[Path],
    probabilities: list[Path] | None,
    out: Path,
    classes: Classes,
    settings: dict,
    volumes: tuple[np.ndarray, np.ndarray] | None,
    reader: type[BaseReaderWriter] | None,
) -> list[str]:
    """All files of one case; cases/CASE.json is the last. Returns warnings."""
    labels, geometries = _read_members(case, files, classes, reader)
    like = geometries[0]
    consensus = entropy = None
    if probabilities is not None:
        consensus, entropy = mean_probabilities(probabilities, labels, classes)
    if settings["consensus"] == "staple":
        consensus = staple(labels, classes)
    elif settings["consensus"] == "majority":
        consensus = None
    options = {key: settings[key] for key in ("per_slice", "metric", "both_empty")}
    score, of_members, consensus, differing = score_labels(
        labels, classes, like.spacing, consensus, entropy, **options, labeled=volumes, case=case
    )
    # Larger maps follow, and each is needed once.
    number = len(labels)
    del labels
    ending = next(ending for ending in FILE_ENDINGS if files[0].name.endswith(ending))
    write_labels(out / "consensus" / f"{case}{_MASK_ENDINGS.get(ending, ending)}", consensus, like)
    del consensus
    name = f"{case}{_MAP_ENDINGS.get(ending, ending)}"
    if entropy is not None:
        write_map(out / "entropy" / name, entropy, like)
        del entropy
    differing = np.divide(differing, number, dtype=np.float32)
    write_map(out / "disagreement" / name, differing, like)
    write_json(out / "cases" / f"{case}.json", {**asdict(score), "members": dict(zip(settings["members"], of_members))})
    return [geometry.warning for geometry in geometries if geometry.warning]


def read_scores(out: Path) -> dict[str, CaseScore]:
    """{case: its scores} that :func:`score_members` left in a folder, sorted.

    Raises:
        FileNotFoundError: if the folder is not scored, or not all of its cases.
        ValueError: naming the file that is damaged.
    """
    if not (Path(out) / "score.json").is_file():
        raise FileNotFoundError(f"{out} has no score.json. Score members into it: pseudo_label score -i ... -o {out}")
    # It is written when all cases are done.
    if not (Path(out) / "cases.csv").is_file():
        raise FileNotFoundError(
            f"{out} has no cases.csv, so not all of its cases are scored. Run the same pseudo_label score again"
        )
    return _read_cases(Path(out))


def _read_cases(out: Path) -> dict[str, CaseScore]:
    scores = {}
    for file in sorted((out / "cases").glob("[!.]*.json"), key=lambda file: file.stem):
        again = "Remove it, and run the same pseudo_label score again"
        content = read_json(file, ("members", *(field.name for field in fields(CaseScore))), again)
        del content["members"]
        try:
            content["classes"] = {name: ClassScore(**values) for name, values in content["classes"].items()}
            scores[content["case"]] = CaseScore(**content)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{file} does not hold what pseudo_label score writes ({error}). {again}") from None
    return scores


def _write_tables(out: Path, scores: dict[str, CaseScore]) -> None:
    write_csv(
        out / "scores.csv",
        ["case", "class", *(field.name for field in fields(ClassScore))],
        ([case, name, *astuple(values)] for case, score in scores.items() for name, values in score.classes.items()),
    )
    write_csv(
        out / "cases.csv",
        [field.name for field in fields(CaseScore)[:-1]],
        (astuple(score)[:-1] for score in scores.values()),
    )
