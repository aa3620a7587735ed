"""Consensus and scores of all cases of two or more members."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.files import write_json
from nnunet_semiseg.parallel import default_processes, over_cases, raise_failures
from nnunet_semiseg.segmentations import FILE_ENDINGS, Classes, find_files, read_labels, write_labels, write_map
from pseudo_label.consensus import mean_probabilities, staple
from pseudo_label.members import find_cases, find_probabilities, read_labels_of, refuse_identical
from pseudo_label.score_files import check_out, read_finished, read_labeled_volumes, remove_scores, write_tables
from pseudo_label.scores import CaseScore, score_labels

CONSENSUS = ("mean", "majority", "staple")
# Formats that cannot hold what is written, and the ones that are written instead.
_MASK_ENDINGS = {".mhd": ".mha"}
_MAP_ENDINGS = {**_MASK_ENDINGS, ".png": ".tif", ".bmp": ".tif"}


def score_members(
    members: Sequence[Path],
    out: Path,
    classes: Classes,
    consensus: str | None = None,
    per_slice: bool = False,
    metric: str = "dice",
    both_empty: str = "skip",
    labeled: Path | None = None,
    processes: int | None = None,
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
        per_slice, metric, both_empty: See :func:`pseudo_label.scores.score_labels`.
        labeled: Folder of the label maps of labeled cases, with which volumes are compared; None for no comparison.
        processes: Each holds one case in memory; None for as many as nnU-Net would use.
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
    processes = default_processes() if processes is None else processes
    files = find_cases(members)
    probabilities = find_probabilities(members, files, consensus)
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
    check_out(out, settings, overwrite)
    done = set() if overwrite else {file.stem for file in (out / "cases").glob("[!.]*.json")}
    stale = sorted(done - set(files))
    if stale:
        raise ValueError(
            f"{out} has the case {stale[0]}, which the members no longer have. Use --overwrite, or another -o"
        )
    if not done and not allow_identical:
        refuse_identical(files, classes, reader)
    if overwrite:
        remove_scores(out)
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
    raise_failures(
        failures,
        f"{len(failures)} of {len(files)} cases could not be scored (above); the others are done. Fix them, or remove "
        "them from all members, and run the command again",
    )
    scores = read_finished(out)
    write_tables(out, scores)
    return scores


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in dict.fromkeys(warnings):
        print(f"Warning: {warning}", file=sys.stderr)


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
        raise_failures(
            failures, f"{len(failures)} of {len(jobs)} labeled cases in {folder} cannot be read (above). Fix them"
        )
        _print_warnings(warning for _, warning in found.values() if warning)
        write_json(file, {case: volumes for case, (volumes, _) in found.items()})
    volumes = np.array([list(of_case.values()) for of_case in read_labeled_volumes(out).values()])
    return (volumes.mean(0), volumes.std(0, ddof=1)) if len(volumes) > 1 else None


def _volumes_of(
    file: Path, classes: Classes, reader: type[BaseReaderWriter] | None
) -> tuple[dict[str, float], str | None]:
    """Of each class, and a warning."""
    labels, geometry = read_labels(file, classes.known, reader)
    # One plane after the other: bincount turns what it counts into 8 bytes each.
    counts = sum(np.bincount(plane.ravel(), minlength=classes.num_values) for plane in labels)
    volumes = classes.membership() @ counts * np.prod(geometry.spacing)
    return dict(zip(classes.names, volumes.tolist())), geometry.warning


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
    labels, geometries = read_labels_of(case, files, classes, reader)
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
