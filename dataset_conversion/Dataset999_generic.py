"""Any folders of images and labels, DICOM series, or a table of them."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from dataset_conversion.common import Case, Download, Source
from nnunet_semiseg.files import read_table
from nnunet_semiseg.segmentations import find_files, patients_of

# Of further formats that SimpleITK reads; of pairs of files, the one with the header.
ENDINGS = (".gipl.gz", ".hdr.gz", ".gipl", ".hdr", ".jpeg", ".jpg", ".mnc", ".nhdr", ".vtk")


def _label(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    if not name or not re.fullmatch(r"\d+(,\d+)*", values) or "0" in values.split(","):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE, such as liver=1 or kidney=2,13; 0 is background")
    return name, tuple(int(value) for value in values.split(","))


def add_arguments(parser) -> None:
    parser.add_argument(
        "--labels",
        type=_label,
        nargs="+",
        required=True,
        metavar="NAME=VALUE",
        help="classes and their values in the files: liver=1 kidney=2,13; they become 1, 2, ...",
    )
    parser.add_argument("--channels", nargs="+", required=True, metavar="NAME", help="such as CT or MRI, for nnU-Net")
    parser.add_argument("--images", default="images", help="folder of the images in DOWNLOAD (default %(default)s)")
    parser.add_argument("--segmentations", default="labels", help="folder of the labels (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="table with columns image, and maybe case, patient, label, split")
    parser.add_argument("--patient", metavar="REGEX", help=r"the patient in a case's name, such as 'patient\d+'")


def cases(download: Download, args: Namespace) -> list[Case]:
    names = [name for name, _ in args.labels]
    values = [value for _, of_class in args.labels for value in of_class]
    if len(set(names)) < len(names) or len(set(values)) < len(values) or "background" in names:
        raise ValueError("--labels has a class or a value twice, or background, which is 0 in any case")
    if "ignore" in names[:-1]:
        raise ValueError("--labels: ignore has to be the last, because nnU-Net wants the highest label for it")
    result = _of_table(download, args) if args.csv else _of_folders(download, args)
    if not args.patient:
        return result
    patients = patients_of((case.name for case in result), args.patient)
    return [replace(case, patient=patient) for case, patient in zip(result, patients)]


def _of_folders(download: Download, args: Namespace) -> list[Case]:
    images, labels = (_inside(download, name) for name in (args.images, args.segmentations))
    try:
        files = find_files(images, more=ENDINGS)
    except FileNotFoundError:
        # Then every sub-folder is a DICOM series.
        files = {f.name: f for f in sorted(images.iterdir()) if f.is_dir() and not f.name.startswith(".")}
        if not files:
            raise
    channels: dict[str, list[Path]] = {}
    for name, file in files.items():
        # CASE_0000 and CASE_0001, as nnU-Net names channels; the number of scan_2019 is no channel.
        base, number = name.rpartition("_")[::2]
        is_channel = re.fullmatch(r"\d{4}", number) and f"{base}_0000" in files
        channels.setdefault(base if is_channel else name, []).append(file)
    found = find_files(labels, more=ENDINGS)
    alone = sorted(set(found) - set(channels))
    if alone:
        raise ValueError(f"{found[alone[0]]} has no image in {images}. Images are called, e.g., {next(iter(files))}")
    return [Case(name, name, tuple(files), found.get(name)) for name, files in channels.items()]


def _inside(download: Download, path: str) -> Path:
    """``path`` in the download, or where it is least deep: archives often hold a folder around everything."""
    place = next((root / path for root in download.roots if (root / path).exists()), None)
    if not place:
        parts = Path(path).parts
        found = [file for file in download.find(parts[-1]) if file.parts[-len(parts) :] == parts]
        if not found:
            raise FileNotFoundError(
                f"{download} has no {path}. Name it with --images and --segmentations, or in the table"
            )
        place = min(found, key=lambda file: len(file.parts))
    # images.zip may hold a folder images.
    while (place / place.name).is_dir():
        place /= place.name
    return place


def _of_table(download: Download, args: Namespace) -> list[Case]:
    """Columns: image, image2, ... for the channels; case (default: the image's name), patient, label, split."""
    rows = read_table(args.csv)
    numbered = {key: re.fullmatch(r"image(\d*)", key or "") for key in (rows[0] if rows else ())}
    channels = sorted((key for key in numbered if numbered[key]), key=lambda key: int(numbered[key][1] or 1))
    if not rows or "image" not in rows[0]:
        raise ValueError(f"{args.csv} has no rows, or no column image")
    result = []
    for line, row in enumerate(rows, start=2):
        try:
            images = tuple(_inside(download, row[key]) for key in channels if row[key])
            label = _inside(download, row["label"]) if row.get("label") else None
        except FileNotFoundError as error:
            raise ValueError(f"{args.csv}, line {line}: {error}") from None
        split = row.get("split") or "train"
        if not images or split not in ("train", "validation", "test"):
            raise ValueError(f"{args.csv}, line {line}: no image, or a split that is not train, validation or test")
        case = row.get("case") or images[0].name.split(".")[0].removesuffix("_0000")
        result.append(Case(case, row.get("patient") or case, images, label, split))
    return result


SOURCE = Source(
    title="folders of images and labels in any format that SimpleITK reads, or DICOM series",
    channels=(),
    labels={},
    cases=cases,
)
