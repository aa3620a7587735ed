"""The predictions of the members of a consensus: folders with the same cases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.datasets import CaseError, check_there
from nnunet_semiseg.parallel import over_cases, raise_failures
from nnunet_semiseg.segmentations import Classes, Geometry, find_files, geometry_difference, read_labels


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
    raise_failures(failures, f"{len(failures)} of {len(files)} cases cannot be read (above). Fix or remove them")
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


def find_probabilities(
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


def refuse_identical(files: dict[str, list[Path]], classes: Classes, reader: type[BaseReaderWriter] | None) -> None:
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


def read_labels_of(
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
