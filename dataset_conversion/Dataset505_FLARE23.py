"""13 organs in abdominal CT: the FLARE challenge of 2023, whose labels are partial.

imagesTr2200 and labelsTr2200 (FLARE23_NNNN), unlabeledTr1800, and validation (FLARE23Ts_NNNN). Most labels have only
some of the organs; the others are background there, which would teach a network that they do not exist. So only cases
in which all 13 organs are drawn are labeled, the others are unlabeled. Tumors (14) hide which organ is below, so
nnU-Net ignores these voxels.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np

from dataset_conversion.common import Case, Download, Source, labels_of, read_volume
from dataset_conversion.Dataset504_FLARE22 import ORGANS, images_and_labels, tuning_cases
from nnunet_semiseg.files import read_json, write_json
from nnunet_semiseg.parallel import over_cases
from nnunet_semiseg.segmentations import version


def cases(download: Download, args: Namespace) -> list[Case]:
    images, labels = images_and_labels(download, "FLARE23_*")
    if not labels:
        raise ValueError(f"{download} has no FLARE23_NNNN.nii.gz in labelsTr2200: it is not the FLARE23 training set")
    alone = sorted(set(labels) - set(images))
    if alone:
        raise ValueError(f"{labels[alone[0]]} has no image {alone[0]}_0000.nii.gz. Download imagesTr2200")
    # Beside what is unpacked: a second call does not read them again.
    known = download.unpacked.with_name("complete")
    jobs = {name: (file, known / f"{name}.json") for name, file in labels.items()}
    complete, failures = over_cases(_is_complete, jobs, args.np, "which are complete")
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise ValueError(f"{len(failures)} of {len(labels)} labels cannot be read (above), each with its cure")
    return [
        Case(name, name, (file,), labels[name] if complete.get(name) else None) for name, file in sorted(images.items())
    ] + tuning_cases(download, "FLARE23Ts_*")


def _is_complete(file: Path, known: Path) -> bool:
    """Whether a label has all organs, from ``known`` if that is of the same file."""
    key = json.dumps(version(file))
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(known)
        if content["key"] == key:
            return content["complete"]
    values = np.unique(labels_of(read_volume(file, []), file)).tolist()
    complete = set(range(1, len(ORGANS) + 1)) <= set(values)
    write_json(known, {"key": key, "complete": complete})
    return complete


SOURCE = Source(
    title="13 abdominal organs, CT, partial labels (FLARE23)",
    channels=("CT",),
    labels={**{name: (i + 1,) for i, name in enumerate(ORGANS)}, "ignore": (14,)},
    cases=cases,
    reference="https://codalab.lisn.upsaclay.fr/competitions/12239; cite Ma et al., arXiv:2408.12534",
    license="terms of the FLARE challenge",
)
