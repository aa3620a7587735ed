"""Any folders of images and labels, DICOM series, or a table of them."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dataset_conversion.common import Case, Download, Source, has_series, junk
from nnunet_semiseg.files import read_table
from nnunet_semiseg.segmentations import FILE_ENDINGS, find_files, holds, patients_of

# Of further formats that SimpleITK reads; of pairs of files, the one with the header.
ENDINGS = (".gipl.gz", ".hdr.gz", ".gipl", ".hdr", ".jpeg", ".jpg", ".mnc", ".nhdr", ".vtk")
# From the first wildcard to the last.
_WILDCARDS = re.compile(r"([*?]|\[.+\])(.*([*?]|\[.+\]))?")


def _label(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    if not name or not re.fullmatch(r"\d+(,\d+)*", values) or "0" in values.split(","):
        raise argparse.ArgumentTypeError(
            f"{text} is not NAME=VALUE, such as liver=1 or kidney=2,13; 0 is background. The files of the labels are "
            "given with --segmentations"
        )
    return name, tuple(int(value) for value in values.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        type=_label,
        nargs="+",
        required=True,
        metavar="NAME=VALUE",
        help="classes and their values in the files: liver=1 kidney=2,13; they become 1, 2, ...",
    )
    parser.add_argument("--channels", nargs="+", required=True, metavar="NAME", help="such as CT or MRI, for nnU-Net")
    parser.add_argument(
        "--images",
        nargs="+",
        default=["images"],
        metavar="FOLDER",
        help="folder of the images in DOWNLOAD (default images); or, with a folder for each case, a pattern such as "
        "'*/imaging.nii.gz', one for each channel",
    )
    parser.add_argument(
        "--segmentations",
        default="labels",
        metavar="FOLDER",
        help="folder of the labels (default %(default)s), or a pattern such as '*/segmentation.nii.gz'",
    )
    parser.add_argument("--csv", type=Path, help="table with columns image, and maybe case, patient, label, split")
    parser.add_argument("--patient", metavar="REGEX", help=r"the patient in a case's name, such as 'patient\d+'")


def cases(download: Download, args: Namespace) -> list[Case]:
    names = [name for name, _ in args.labels]
    values = [value for _, of_class in args.labels for value in of_class]
    if len(set(names)) < len(names) or len(set(values)) < len(values) or "background" in names:
        raise ValueError("--labels has a class or a value twice, or background, which is 0 in any case")
    if "ignore" in names[:-1]:
        raise ValueError("--labels: ignore must be the last, because nnU-Net needs the highest label for it")
    by_pattern = not args.csv and any(map(_is_pattern, (*args.images, args.segmentations)))
    result = (_of_table if args.csv else _of_patterns if by_pattern else _of_folders)(download, args)
    if not args.patient:
        return result
    patients = patients_of((case.name for case in result), args.patient)
    return [replace(case, patient=patient) for case, patient in zip(result, patients)]


def _is_pattern(text: str) -> bool:
    return bool(_WILDCARDS.search(text))


def _of_patterns(download: Download, args: Namespace) -> list[Case]:
    """A folder for each case, or any pattern of files: what its wildcards stand for is the case's name."""
    patterns = (*args.images, args.segmentations)
    if len(args.images) != len(args.channels) or not all(map(_is_pattern, patterns)):
        raise ValueError(
            f"{' '.join(patterns)}: give --images a pattern such as '*/imaging.nii.gz' for each of the "
            f"{len(args.channels)} --channels, and --segmentations one as well. Put them in quotation marks"
        )
    if any("**" in pattern for pattern in patterns):
        raise ValueError(f"{' '.join(patterns)}: ** leaves open how deep the files are. Write * for each folder: */*/")
    for pattern in patterns:
        if not _is_pattern(str(Path(pattern).parent)) and _is_pattern(pattern[-1]):
            raise ValueError(f"{pattern} must end with the file ending, such as .nii.gz")
    *channels, labels = (_matching(download, pattern) for pattern in patterns)
    for case in labels:
        if case not in channels[0]:
            raise ValueError(f"{labels[case]} has no image named {args.images[0]}")
    for case in channels[0]:
        for found, pattern in zip(channels, args.images):
            if case not in found:
                raise ValueError(f"{channels[0][case]} is of a case that has no {pattern}. Add it, or remove the case")
    return [Case(case, case, tuple(found[case] for found in channels), labels.get(case)) for case in channels[0]]


def _matching(download: Download, pattern: str) -> dict[str, Path]:
    """{case: file} of a pattern relative to the download, or else to the folders in it."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if _is_pattern(part))
    fixed, rest = parts[:first], parts[first:]
    names: dict[str, Path] = {}
    for root in download.roots:
        inner = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not junk(folder)]
        below = chain.from_iterable(_found(folder, fixed, rest) for folder in inner)
        for file, found in _found(root, fixed, rest) or below:
            name = _name(found, rest)
            if names.setdefault(name, file) != file:
                raise ValueError(
                    f"{names[name]} and {file} are both case {name}. Give a pattern that fits one of them, or a table "
                    "(--csv)"
                )
    if not names:
        there = [file.relative_to(root) for root in download.roots for file in root.rglob("*") if not file.is_dir()]
        raise FileNotFoundError(f"{download} has nothing named {pattern}. {holds(there)}")
    return names


def _found(folder: Path, fixed: tuple[str, ...], rest: tuple[str, ...]) -> list[tuple[Path, tuple[str, ...]]]:
    """(file, its last parts) of what is not hidden and is called as the pattern's parts ``rest`` below ``fixed``."""
    # If these begin with the root of the file system, the folder does not count.
    base = folder.joinpath(*fixed)
    found = [(file, file.relative_to(base)) for file in sorted(base.glob("/".join(rest)))]
    return [(file, path.parts) for file, path in found if not any(map(junk, (path, *path.parents)))]


def _name(found: tuple[str, ...], pattern: tuple[str, ...]) -> str:
    """The folders that have wildcards; without any, what the wildcards in the file's name stand for."""
    folders = [name for name, part in zip(found[:-1], pattern) if _is_pattern(part)]
    wildcards = _WILDCARDS.search(pattern[-1])
    begin, end = wildcards.span() if wildcards and not folders else (0, 0)
    return "_".join(folders) or found[-1][begin : len(found[-1]) - len(pattern[-1]) + end]


def _of_folders(download: Download, args: Namespace) -> list[Case]:
    if len(args.images) > 1:
        raise ValueError(
            f"--images {' '.join(args.images)} are several folders. Give one, in which channels are called "
            "CASE_0000, CASE_0001, ...; or, with a folder for each case, a pattern for each channel"
        )
    images, labels = (_inside(download, name) for name in (args.images[0], args.segmentations))
    try:
        files = find_files(images, more=ENDINGS)
    except FileNotFoundError:
        # Then every sub-folder is a DICOM series.
        files = {f.name: f for f in sorted(images.iterdir()) if f.is_dir() and not f.name.startswith(".")}
        if not files:
            raise
        _check_series(images, next(iter(files.values())))
    found = find_files(labels, more=ENDINGS)
    # CASE_0000 and CASE_0001, as nnU-Net names channels. The number of scan_2019 is no channel, nor is one that labels
    # have as well, or that there are more of than channels; unless a label is called CASE, or there is no other number.
    numbered: dict[str, list[str]] = {}
    for name in files:
        if base := _base(name):
            numbered.setdefault(base, []).append(name)
    cases_of = {
        name: base
        for base, several in numbered.items()
        if f"{base}_0000" in several
        and (
            base in found or len(several) == 1 or (len(several) <= len(args.channels) and not set(several) & set(found))
        )
        for name in several
    }
    # Labels that are called as the first channel.
    found = {name if cases_of.get(name) in found else cases_of.get(name, name): file for name, file in found.items()}
    channels: dict[str, list[Path]] = {}
    for name, file in files.items():
        channels.setdefault(cases_of.get(name, name), []).append(file)
    alone = sorted(set(found) - set(channels))
    if alone:
        raise ValueError(f"{found[alone[0]]} has no image in {images}. Images are named, e.g., {next(iter(files))}")
    return [Case(name, name, tuple(files), found.get(name)) for name, files in channels.items()]


def _base(name: str) -> str:
    """CASE of CASE_0001; empty for other names."""
    base, number = name.rpartition("_")[::2]
    return base if re.fullmatch(r"\d{4}", number) else ""


def _check_series(folder: Path, first: Path) -> None:
    """Raises ValueError if the first of the folders in ``folder`` holds images other than DICOM series."""
    images = (file for file in sorted(first.iterdir()) if file.name.lower().endswith((*ENDINGS, *FILE_ENDINGS)))
    image = next((file for file in images if not junk(file)), None)
    if image and not has_series(first):
        raise ValueError(
            f"{folder} has a folder for each case, with files such as {image}. Give patterns: --images "
            f"'*/{image.name}', and --segmentations as well"
        )


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
    found = (re.fullmatch(r"image(\d*)", key or "") for key in (rows[0] if rows else ()))
    channels = [match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1] or 1))]
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
        result.append(Case(row.get("case") or "", row.get("patient") or "", images, label, split))
    names = [case.images[0].name.split(".")[0] for case in result]
    several = Counter(map(_base, set(names)))
    for i, name in enumerate(names):
        # The number of case_0000 is a channel's, but not beside case_0001.
        case = result[i].name or (name.removesuffix("_0000") if several[_base(name)] == 1 else name)
        result[i] = replace(result[i], name=case, patient=result[i].patient or case)
    return result


SOURCE = Source(
    title="folders of images and labels in any format that SimpleITK reads, or DICOM series",
    channels=(),
    labels={},
    cases=cases,
)
