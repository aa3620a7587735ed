"""What a selection leaves in its folder: reasons, the label maps of accepted cases, and cases to annotate."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nnunet_semiseg.datasets import CaseError, sidecar
from nnunet_semiseg.files import link, remove, whole, write_csv, write_json
from nnunet_semiseg.segmentations import Classes, find_files, read_labels, read_voxels, write_labels
from pseudo_label.score_files import scored_reader
from pseudo_label.scores import CaseScore
from pseudo_label.selection import Decision

# In the order in which they are removed: the table is written last and says that the selection is complete.
_OUTPUTS = ("selection.csv", "labels", "annotate")


def ignore_value(classes: Classes) -> int:
    """The ignore label, or the one that nnU-Net asks for if there is none yet: the highest."""
    return classes.num_values if classes.ignore is None else classes.ignore


def agreed_labels(labels: np.ndarray, disagreement: np.ndarray, min_agreement: float, classes: Classes) -> np.ndarray:
    """A consensus in which voxels that a smaller share of the members agrees on have the ignore label.

    Args:
        labels: (Z, Y, X) consensus.
        disagreement: (Z, Y, X) share of the members whose label is another one, in [0, 1].
        min_agreement: Voxels of exactly this agreement keep their label.
    """
    # Shares are stored in single precision.
    unsure = 1.0 - disagreement < min_agreement - 1e-5
    return np.where(unsure, ignore_value(classes), labels).astype(np.min_scalar_type(ignore_value(classes)))


def write_selection(
    scored: Path,
    out: Path,
    decisions: Mapping[str, Decision],
    scores: Mapping[str, CaseScore],
    classes: Classes,
    min_agreement: float,
) -> dict[str, Path]:
    """Write labels/CASE of the accepted cases, and then selection.csv.

    Returns:
        {accepted case: its label map}.
    """
    consensus, disagreement = find_files(scored / "consensus"), find_files(scored / "disagreement")
    reader = scored_reader(scored)
    written = {}
    for case, decision in decisions.items():
        if decision.accepted:
            written[case] = out / "labels" / consensus[case].name
            labels, geometry = read_labels(consensus[case], classes.known, reader)
            if min_agreement > 0:
                share = read_voxels(disagreement[case], geometry.reader)[0][0]
                labels = agreed_labels(labels, share, min_agreement, classes)
            write_labels(written[case], labels, geometry)
    rows = (
        [case, "yes" if decision.accepted else "no", scores[case].score, "; ".join(decision.reasons)]
        for case, decision in decisions.items()
    )
    write_csv(out / "selection.csv", ["case", "accepted", "score", "reasons"], rows)
    return written


def remove_selection(out: Path) -> None:
    for name in _OUTPUTS:
        remove(out / name)


def case_images(folder: Path, cases: Iterable[str]) -> dict[str, list[Path]]:
    """{case: its channel files}, named CASE_0000 and so on.

    Raises:
        FileNotFoundError, CaseError: naming the case, if one has no image.
    """
    found: dict[str, list[Path]] = {}
    for name, file in find_files(folder).items():
        found.setdefault(name.rpartition("_")[0], []).append(file)
    for case in cases:
        if case not in found:
            raise CaseError(f"{folder} has no image {case}_0000. Give the folder that was predicted from")
    return {case: found[case] for case in cases}


def export_for_annotation(
    scored: Path,
    out: Path,
    cases: list[str],
    scores: Mapping[str, CaseScore],
    images: Mapping[str, list[Path]],
    classes: Classes,
    channel_names: Mapping[str, str] | None = None,
) -> None:
    """An nnU-Net-style folder: images (linked), the consensus to start from, and annotate.csv, most useful first."""
    consensus = find_files(scored / "consensus")
    for case in cases:
        for file in images[case]:
            link(file, out / "imagesTr" / file.name)
        spacing = sidecar(images[case][0], channel=True)
        if spacing.is_file():
            link(spacing, out / "imagesTr" / spacing.name)
        # Copies: they will be edited.
        for file in (sidecar(consensus[case], channel=False), consensus[case]):
            if file.is_file():
                with whole(out / "labelsTr" / file.name) as temporary:
                    shutil.copyfile(file, temporary)
    ending = consensus[cases[0]].name[len(cases[0]) :]
    labels = {name: list(v) if len(v) > 1 else v[0] for name, v in zip(classes.names, classes.values)}
    description = {
        "channel_names": channel_names or {str(i): f"channel {i}" for i in range(len(images[cases[0]]))},
        "labels": {"background": 0, **labels, **({} if classes.ignore is None else {"ignore": classes.ignore})},
        **({"regions_class_order": list(classes.region_order)} if classes.region_order else {}),
        "numTraining": len(cases),
        "file_ending": ending,
    }
    write_json(out / "dataset.json", description)
    rows = ([rank, case, scores[case].score] for rank, case in enumerate(cases, 1))
    write_csv(out / "annotate.csv", ["rank", "case", "score"], rows)
