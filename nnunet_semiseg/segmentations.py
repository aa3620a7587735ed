"""Label maps in files: which classes they have, reading and writing them, and their geometry."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_semiseg.datasets import CaseError, check_nifti, check_there, read_dataset_json
from nnunet_semiseg.files import visible_files, whole

# Longest first: .nii.gz ends in .gz.
FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".tiff", ".tif", ".png", ".bmp")
# How far two positions of the same voxel may be apart, as a share of the spacing.
GEOMETRY_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Classes:
    """The foreground classes or regions of label maps.

    Args:
        names: Of the K foreground classes or regions.
        values: For each, the label values that belong to it: one for a class, one or more for a region.
        ignore: The label value of voxels that nobody annotated, or None.
        region_order: For regions, the label value that each one is written with, in the order in which they are
            painted over each other (nnU-Net's regions_class_order); None for classes.
        known: All label values that a map may have.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignore: int | None = None
    region_order: tuple[int, ...] | None = None
    known: frozenset[int] = frozenset()

    @classmethod
    def from_dataset_json(cls, dataset_json: dict) -> Classes:
        """Raises ValueError if the labels in dataset.json are not what nnU-Net asks for."""
        try:
            # Some programs write numbers as text.
            labels = {
                name: [int(v) for v in value] if isinstance(value, (list, tuple)) else int(value)
                for name, value in dataset_json["labels"].items()
            }
            manager = LabelManager(labels, dataset_json.get("regions_class_order"))
            foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
            order = tuple(map(int, manager.regions_class_order)) if manager.has_regions else None
        except Exception as error:
            raise ValueError(f"The labels in dataset.json cannot be used: {error or type(error).__name__}") from None
        values = tuple(tuple(v) if isinstance(v, (tuple, list)) else (int(v),) for v in foreground)
        by_values = {tuple(np.atleast_1d(value).tolist()): name for name, value in labels.items()}
        known = {0, *(int(v) for value in labels.values() for v in np.atleast_1d(value))}
        return cls(
            names=tuple(by_values[value] for value in values),
            values=values,
            ignore=manager.ignore_label,
            region_order=order,
            known=frozenset(known),
        )

    @classmethod
    def from_file(cls, file: Path) -> Classes:
        """Of a dataset.json.

        Raises:
            OSError, ValueError: naming the file, what is wrong and the cure.
        """
        content = read_dataset_json(file)
        try:
            return cls.from_dataset_json(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def check_order(self, file: Path | str = "dataset.json") -> None:
        """Raises ValueError naming ``file``, if a map of labels has others once it is painted from their regions.

        The last painted region that contains a label has to be written as that label.
        """
        if self.region_order is None:
            return
        unknown = [value for value in self.region_order if value not in self.known - {0, self.ignore}]
        if unknown:
            raise ValueError(
                f"{file}: regions_class_order {list(self.region_order)} has {unknown[0]}, which no region contains"
            )
        written: dict[int, list[int]] = {row: [] for row in range(len(self.values))}
        wrong = []
        for label in sorted(self.known - {0, self.ignore}):
            row = max(row for row, values in enumerate(self.values) if label in values)
            written[row].append(label)
            if self.region_order[row] != label:
                wrong.append(f"label {label} becomes {self.region_order[row]}")
        if not wrong:
            return
        order = list(self.region_order)
        problem = f"{file}: regions_class_order {order} does not give the labels back: {', '.join(wrong)}. "
        mixed = next((row for row, labels in written.items() if len(labels) > 1), None)
        if mixed is None:
            right = [labels[0] if labels else self.region_order[row] for row, labels in written.items()]
            raise ValueError(f"{problem}For these regions it has to be {right} (docs/data.md)")
        raise ValueError(
            f"{problem}{self.names[mixed]} is the last region of labels {', '.join(map(str, written[mixed]))}. List "
            "each region after those that contain it, and give each label one of its own (docs/data.md)"
        )

    @classmethod
    def from_labels(cls, labels) -> Classes:
        """One class for every label value, named by it; 0 is background."""
        values = sorted({int(v) for v in labels} - {0})
        return cls(tuple(map(str, values)), tuple((v,) for v in values), known=frozenset({0, *values}))

    @property
    def num_values(self) -> int:
        """One more than the highest label value."""
        return max(self.known) + 1

    def membership(self) -> np.ndarray:
        """(K, num_values) bool: which label values belong to a class or region."""
        table = np.zeros((len(self.names), self.num_values), dtype=bool)
        for row, values in zip(table, self.values):
            row[list(values)] = True
        return table


def find_files(folder: Path, ending: str | None = None, more: tuple[str, ...] = ()) -> dict[str, Path]:
    """{case: file} of the images in a folder, sorted; other files are left alone.

    Args:
        folder: Searched without its sub-folders.
        ending: Only files that end in it; None for the one ending of FILE_ENDINGS that they have.
        more: Further endings, longest first. With them, endings may be in upper case, too.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if the images have several endings.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}")
    endings = (ending,) if ending else (*more, *FILE_ENDINGS)
    found: dict[str, dict[str, Path]] = {}
    for file in visible_files(folder):
        name = file.name.lower() if more else file.name
        own = next((e for e in endings if name.endswith(e)), None)
        if own:
            found.setdefault(own, {})[file.name[: -len(own)]] = file
    if not found:
        raise FileNotFoundError(f"{folder} has no files that end in {' or '.join(endings)}")
    if len(found) > 1:
        raise ValueError(f"{folder} has files that end in {' and in '.join(found)}. Keep those of one kind there")
    return next(iter(found.values()))


def patients_of(cases: Iterable[str], pattern: str) -> list[str]:
    """The patient of each case: what the regular expression ``pattern`` finds in its name.

    Raises:
        ValueError: if it is no regular expression; naming the case, if it finds nothing there.
    """
    patients = []
    for case in cases:
        try:
            match = re.search(pattern, case)
        except re.error as error:
            raise ValueError(f"--patient {pattern} is not a regular expression: {error}") from None
        if not match:
            raise ValueError(f"--patient {pattern} matches nothing in case {case}")
        patients.append(match[0])
    return patients


def version(path: Path) -> list[tuple[str, int, int]]:
    """Path, size in bytes and time of change in ns of a file, or of all files in a folder: what tells a new one.

    A file that is gone has no version; it is for its reader to say so.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def read_image(file: Path) -> sitk.Image:
    """An image of any format that SimpleITK reads.

    Raises:
        CaseError: naming the file, if it is missing, damaged, or has voxels that are NaN or infinite.
    """
    check_there(file)
    try:
        check_nifti(Path(file))
        return sitk.ReadImage(str(file))
    except CaseError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CaseError(
            f"{file} cannot be read ({reason[0].strip()}). Copy or convert it again, or remove it"
        ) from None


def read_labels(file: Path, known: frozenset[int] | None = None) -> tuple[np.ndarray, sitk.Image]:
    """A label map as ((Z, Y, X) or (Y, X) array of the smallest unsigned type, image whose geometry it has).

    Whole numbers stored as floating point are accepted: many tools write them so.

    Args:
        known: The label values that are allowed; None for any from 0 to 65535.

    Raises:
        CaseError: naming the file, if it is damaged, or has several channels, fractions, or labels that are not known.
    """
    image = read_image(file)
    return labels_of(image, file, known), image


def labels_of(image: sitk.Image, file: Path, known: frozenset[int] | None = None) -> np.ndarray:
    """The label map of an image that was read from ``file`` in another way; otherwise as ``read_labels``."""
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise CaseError(f"{file} has several channels. A label map has one whole number for each voxel")
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = (voxels.min(), voxels.max()) if voxels.size else (0, 0)
    if voxels.dtype.kind == "f" and not np.array_equal(voxels, np.rint(voxels)):
        raise CaseError(
            f"{file} has fractions, such as {voxels[voxels != np.rint(voxels)][0]:.3g}. A label map has "
            "whole numbers: is this an image, a probability, or a map resampled with interpolation?"
        )
    if low < 0 or high > 65535:
        raise CaseError(f"{file} has the label {low if low < 0 else high:.0f}. Labels are from 0 to 65535")
    labels = voxels.astype(np.uint8 if high < 256 else np.uint16)
    if known is not None:
        unknown = sorted(set(np.unique(labels).tolist()) - known)
        if unknown:
            raise CaseError(
                f"{file} has the label {unknown[0]}, but only {', '.join(map(str, sorted(known)))} are known"
            )
    return labels


def write_labels(file: Path, labels: np.ndarray, like: sitk.Image) -> None:
    """Write an array with the geometry of ``like``, as ``write_image``."""
    image = sitk.GetImageFromArray(labels)
    image.CopyInformation(like)
    write_image(file, image)


def write_image(file: Path, image: sitk.Image) -> None:
    """Write an image; the file appears when it is complete.

    Raises:
        OSError: naming the file, if it cannot be written, as when the disk is full.
    """
    size = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    with whole(file) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
            complete = _ends_as_written(temporary, size)
        except RuntimeError:
            complete = False
        if not complete:
            free = shutil.disk_usage(temporary.parent).free / 1e6
            raise OSError(
                f"{file} could not be written ({free:.0f} MB are free there). If the disk is full, free some space; "
                "then run the command again"
            )


def _ends_as_written(file: Path, size: int) -> bool:
    """Whether a file has all ``size`` bytes of voxels: on a full disk SimpleITK cuts NIfTI without a word."""
    if not file.name.endswith((".nii", ".nii.gz")):
        return True
    size += 352  # the header
    if file.name.endswith(".nii"):
        return file.stat().st_size >= size
    with open(file, "rb") as stream:
        # gzip ends with the size of its content, modulo 2**32.
        stream.seek(-min(4, file.stat().st_size), os.SEEK_END)
        return int.from_bytes(stream.read(), "little") == size % 2**32


def geometry_difference(first: sitk.Image, second: sitk.Image) -> str | None:
    """What differs in size, spacing, position or direction, or None if a voxel of both is the same place."""
    if first.GetSize() != second.GetSize():
        return f"sizes {_times(first.GetSize())} and {_times(second.GetSize())}"
    spacings = [np.array(image.GetSpacing()) for image in (first, second)]
    tolerance = GEOMETRY_TOLERANCE * spacings[0]
    # Over the whole image, or a small difference of spacing would shift its far end.
    if (np.abs(spacings[0] - spacings[1]) * np.array(first.GetSize()) > spacings[0] / 2).any() or (
        np.abs(spacings[0] - spacings[1]) > tolerance
    ).any():
        return f"spacings {_times(spacings[0])} and {_times(spacings[1])} mm"
    if not np.allclose(first.GetDirection(), second.GetDirection(), atol=1e-3):
        return "directions"
    if (np.abs(np.subtract(first.GetOrigin(), second.GetOrigin())) > np.maximum(tolerance, 1e-3)).any():
        return f"origins {_shown(first.GetOrigin())} and {_shown(second.GetOrigin())} mm"
    return None


def _times(values) -> str:
    return " x ".join(f"{value:.6g}" for value in values)


def _shown(values) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"
