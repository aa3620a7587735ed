"""13 organs in abdominal CT: the FLARE challenge of 2022, with 50 labeled and 2000 unlabeled training cases.

Training/FLARE22_LabeledCase50/images and labels (FLARE22_Tr_NNNN), Training/FLARE22_UnlabeledCase*/Case_NNNNN, and
Tuning or Validation/FLARETs_NNNN (50). Images end in _0000.nii.gz. Testing (200) uses the names of Tuning again and has
no labels, so it is left alone.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from dataset_conversion.common import Case, Download, Source, by_name

ORGANS = (
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)


def images_and_labels(download: Download, pattern: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """{case: file} of the images and labels whose names match ``pattern``, such as FLARE22_Tr_*."""
    files = [file for file in download.find(f"{pattern}.nii.gz") if file.parent.name != "Testing"]
    # Some copies of unlabeledTr1800 have no _0000 in the names.
    images = {file for file in files if file.name.endswith("_0000.nii.gz") or "unlabel" in file.parent.name.lower()}

    def by_case(chosen: Iterable[Path]) -> dict[str, Path]:
        return by_name(chosen, lambda file: file.name.removesuffix(".nii.gz").removesuffix("_0000"))

    return by_case(sorted(images)), by_case(file for file in files if file not in images)


def cases(download: Download, args: Namespace) -> list[Case]:
    images, labels = images_and_labels(download, "FLARE22_Tr_*")
    if not images:
        raise ValueError(f"{download} has no FLARE22_Tr_NNNN_0000.nii.gz: it is not the FLARE22 training set")
    without = sorted(set(images) ^ set(labels))
    if without:
        raise ValueError(f"{download} has {without[0]} only as an image or only as a label. Download both folders")
    result = [Case(name, name, (file,), labels[name]) for name, file in sorted(images.items())]
    result += [Case(name, name, (file,)) for name, file in sorted(images_and_labels(download, "Case_*")[0].items())]
    return result + tuning_cases(download, "FLARETs_*")


def tuning_cases(download: Download, pattern: str) -> list[Case]:
    images, labels = images_and_labels(download, pattern)
    return [Case(name, name, (file,), labels.get(name), "test") for name, file in sorted(images.items())]


SOURCE = Source(
    title="13 abdominal organs, CT (FLARE22)",
    channels=("CT",),
    labels={name: (i + 1,) for i, name in enumerate(ORGANS)},
    cases=cases,
    reference="https://flare22.grand-challenge.org/Dataset/; cite Ma et al., The Lancet Digital Health 6 (2024) "
    "e815-e826",
    license="terms of the FLARE challenge",
)
