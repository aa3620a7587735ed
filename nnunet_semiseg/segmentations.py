"""Label maps in files: which classes they have, reading and writing them, and their geometry."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.arrayproxy import ArrayProxy
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_semiseg.datasets import (
    CaseError,
    affine,
    check_nifti,
    check_sidecar,
    check_there,
    dataset_reader,
    load_nifti,
    plans_reader,
    read_dataset_json,
    run_reader,
    sidecar,
)
from nnunet_semiseg.files import read_json, visible_files, whole, write_json

# Longest first: .nii.gz ends in .gz.
FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".tiff", ".tif", ".png", ".bmp")
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
        problem = f"{file}: regions_class_order {order} does not reproduce the labels: {', '.join(wrong)}. "
        mixed = next((row for row, labels in written.items() if len(labels) > 1), None)
        if mixed is None:
            right = [labels[0] if labels else self.region_order[row] for row, labels in written.items()]
            raise ValueError(f"{problem}For these regions it must be {right} (docs/data.md)")
        raise ValueError(
            f"{problem}{self.names[mixed]} is the last region of labels {', '.join(map(str, written[mixed]))}. List "
            "each region after those that contain it, and give each label one of its own (docs/data.md)"
        )

    @classmethod
    def from_labels(cls, labels: Iterable[int]) -> Classes:
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
        looked_for = ending or f"{', '.join(FILE_ENDINGS[:3])} or another ending of an image"
        there = [path.relative_to(folder) for path in folder.iterdir()]
        raise FileNotFoundError(f"{folder} has no files that end in {looked_for}. {holds(there)}")
    if len(found) > 1:
        raise ValueError(f"{folder} has files that end in {' and in '.join(found)}. Keep those of one kind there")
    return next(iter(found.values()))


def holds(paths: Sequence[Path]) -> str:
    """A sentence about what is in a folder; hidden files come last."""
    if not paths:
        return "It is empty"
    first = min(paths, key=lambda path: (path.name.startswith("."), path))
    return f"It holds {first}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"


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
    """Path, size in bytes and time of change in ns of a file and its sidecar, or of all in a folder.

    They tell whether something is new. A file that is gone has no version; it is for its reader to say so.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path, sidecar(path, channel=False)]
    files = [file for file in files if file.is_file()]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file are, and what it takes to write another file of the same voxels.

    Args:
        shape, spacing: Of the array: (Z, Y, X), or (Y, X) of a 2D file; in mm.
        origin, direction: Of the first voxel in mm and of the axes, x first, as ITK has them (to the left, back and
            up); None where the format has no positions.
        reader: nnU-Net's.
        properties: nnU-Net's.
        warning: What the reader had to assume, or None.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] | None = None
    direction: tuple[float, ...] | None = None
    reader: type[BaseReaderWriter] = SimpleITKIO
    properties: dict | None = None
    warning: str | None = None

    @classmethod
    def of_image(cls, image: sitk.Image) -> Geometry:
        """As SimpleITKIO has it."""
        spacing = image.GetSpacing()
        stuff = {"spacing": spacing, "origin": image.GetOrigin(), "direction": image.GetDirection()}
        # nnU-Net's images are 3D.
        of_array = [*([999 * max(spacing)] if len(spacing) == 2 else []), *spacing[::-1]]
        return cls(
            image.GetSize()[::-1],
            spacing[::-1],
            image.GetOrigin(),
            image.GetDirection(),
            properties={"sitk_stuff": stuff, "spacing": of_array},
        )

    @classmethod
    def of(
        cls, shape: tuple[int, ...], reader: type[BaseReaderWriter], properties: dict, warning: str | None = None
    ) -> Geometry:
        """Of a (Z, Y, X) or (Y, X) array that nnU-Net's reader gave, with one slice for a 2D file."""
        spacing = tuple(float(s) for s in properties["spacing"])[-len(shape) :]
        origin = direction = None
        if "sitk_stuff" in properties:
            origin, direction = properties["sitk_stuff"]["origin"], properties["sitk_stuff"]["direction"]
        elif "nibabel_stuff" in properties:
            to_ras = affine(properties)
            assert to_ras is not None
            matrix = np.diag([-1, -1, 1]) @ to_ras[:3]
            origin = tuple(matrix[:, 3].tolist())
            direction = tuple((matrix[:, :3] / np.linalg.norm(matrix[:, :3], axis=0)).ravel().tolist())
        return cls(shape, spacing, origin, direction, reader, properties, warning)


def find_reader(*folders: Path) -> type[BaseReaderWriter] | None:
    """nnU-Net's reader for label maps in these folders, by plans.json or dataset.json there (the first that tells).

    Returns:
        None where nothing tells, and the files' ending decides.

    Raises:
        OSError, ValueError: naming the JSON file that is damaged.
    """
    for folder in map(Path, folders):
        # nnU-Net writes both to predictions.
        file = folder / "plans.json"
        if file.is_file():
            return plans_reader(read_json(file, ("image_reader_writer",)), file)
        file = folder / "dataset.json"
        reader = dataset_reader(read_dataset_json(file)) if file.is_file() else None
        if reader:
            return reader
    return None


def read_voxels(file: Path, reader: type[BaseReaderWriter] | None = None) -> tuple[np.ndarray, Geometry]:
    """An image, label map or map of shares, as nnU-Net reads it.

    Args:
        reader: nnU-Net's; None for the first of those for the file's ending that can read it, as nnU-Net chooses.

    Returns:
        (C, Z, Y, X), or (C, Y, X) of a 2D file; of C channels, and (C, T, Z, Y, X) of a series.

    Raises:
        CaseError: naming the file, if it is missing, damaged, or has voxels that are NaN or infinite.
    """
    file = Path(file)
    errors = []
    for candidate in [reader] if reader else _readers(file):
        try:
            return _read_voxels(file, candidate)
        except CaseError as error:
            errors.append(error)
    # What is missing is missing for all.
    raise errors[0]


def _readers(file: Path) -> list[type[BaseReaderWriter]]:
    """nnU-Net's readers to try for a file."""
    ending = next((e for e in FILE_ENDINGS if file.name.endswith(e)), file.suffix).lower()
    fitting = [reader for reader in LIST_OF_IO_CLASSES if ending in reader.supported_file_endings]
    if Tiff3DIO in fitting and sidecar(file, channel=False).is_file():
        # skimage takes 3 or 4 slices for colors.
        return sorted(fitting, key=lambda reader: reader is not Tiff3DIO)
    # nnU-Net tries it for all other endings, too. Of .nii it gives what NibabelIO does, with less memory.
    return [SimpleITKIO, *fitting] if ending == ".nii" else [*fitting, *({SimpleITKIO} - set(fitting))]


def _read_voxels(file: Path, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, Geometry]:
    if reader is SimpleITKIO:
        # In the type of the file: nnU-Net's single precision takes four times the memory for a label map.
        image = read_image(file)
        voxels = sitk.GetArrayFromImage(image)
        several = image.GetNumberOfComponentsPerPixel() > 1
        return np.moveaxis(voxels, -1, 0) if several else voxels[None], Geometry.of_image(image)
    check_there(file)
    check_nifti(file)
    warning = check_sidecar(file, channel=False) if issubclass(reader, Tiff3DIO) else None
    voxels, properties, _ = run_reader(lambda: reader().read_seg(str(file)), file)
    if issubclass(reader, NaturalImage2DIO) or len(properties.get("sitk_stuff", {}).get("spacing", "123")) == 2:
        voxels = voxels[:, 0]
    return voxels, Geometry.of(voxels.shape[1:], reader, properties, warning)


def read_labels(
    file: Path, known: frozenset[int] | None = None, reader: type[BaseReaderWriter] | None = None
) -> tuple[np.ndarray, Geometry]:
    """A label map as ((Z, Y, X) or (Y, X) array of the smallest unsigned type, its geometry).

    Whole numbers stored as floating point are accepted: many tools write them so.

    Args:
        known: The label values that are allowed; None for any from 0 to 65535.
        reader: See ``read_voxels``.

    Raises:
        CaseError: naming the file, if it is damaged, or has several channels, fractions, or labels that are not known.
    """
    voxels, geometry = read_voxels(file, reader)
    return check_labels(voxels, file, known), geometry


def check_labels(voxels: np.ndarray, file: Path, known: frozenset[int] | None = None) -> np.ndarray:
    """The label map of (C, ...) voxels that were read from ``file``; otherwise as ``read_labels``."""
    if len(voxels) > 1:
        raise CaseError(
            f"{file} has several channels. A label map has one whole number for each voxel, not a color or a palette"
        )
    voxels = voxels[0]
    low, high = (voxels.min(), voxels.max()) if voxels.size else (0, 0)
    if voxels.dtype.kind == "f" and not np.array_equal(voxels, np.rint(voxels)):
        raise CaseError(
            f"{file} has fractions, such as {voxels[voxels != np.rint(voxels)][0]:.3g}. A label map has "
            "whole numbers: is this an image, a probability, or a map resampled with interpolation?"
        )
    if low < 0 or high > 65535:
        raise CaseError(f"{file} has the label {low if low < 0 else high:.0f}. Labels are from 0 to 65535")
    labels = voxels.astype(np.uint8 if high < 256 else np.uint16, copy=False)
    if known is not None:
        unknown = sorted(set(np.unique(labels).tolist()) - known)
        if unknown:
            raise CaseError(
                f"{file} has the label {unknown[0]}, but only {', '.join(map(str, sorted(known)))} are known"
            )
    return labels


def read_image(file: Path) -> sitk.Image:
    """An image of any format that SimpleITK reads: of no dataset yet, or of one whose reader is SimpleITKIO.

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


def write_labels(file: Path, labels: np.ndarray, like: Geometry) -> None:
    """Write a label map as nnU-Net does, with the geometry of ``like``; it appears when it is complete.

    Args:
        labels: (Z, Y, X) or (Y, X), as read from a file with this geometry.

    Raises:
        OSError: naming the file, if it cannot be written, as when the disk is full.
    """
    seg = labels.reshape((1,) * (3 - labels.ndim) + labels.shape)
    with _complete(file) as temporary:
        like.reader().write_seg(seg, str(temporary), like.properties)


def write_map(file: Path, values: np.ndarray, like: Geometry) -> None:
    """Write floating point numbers, which nnU-Net's readers read but do not write; otherwise as ``write_labels``."""
    properties = like.properties or {}
    with _complete(file) as temporary:
        if "sitk_stuff" in properties:
            stuff = properties["sitk_stuff"]
            image = sitk.GetImageFromArray(values)
            image.SetSpacing(stuff["spacing"])
            image.SetOrigin(stuff["origin"])
            image.SetDirection(stuff["direction"])
            if "original_orientation" in stuff:
                image = sitk.DICOMOrient(image, stuff["original_orientation"])
            sitk.WriteImage(image, str(temporary), True)
        elif "nibabel_stuff" in properties:
            stuff = properties["nibabel_stuff"]
            nifti = nibabel.Nifti1Image(values.T, affine(properties))
            back = ornt_transform(axcodes2ornt("RAS"), io_orientation(stuff["original_affine"]))
            nibabel.save(nifti.as_reoriented(back) if "reoriented_affine" in stuff else nifti, temporary)
        else:
            tifffile.imwrite(temporary, values, compression="zlib")
            if issubclass(like.reader, Tiff3DIO):
                write_json(sidecar(temporary, channel=False), {"spacing": properties["spacing"]})


@contextmanager
def _complete(file: Path) -> Iterator[Path]:
    """A path to write an image to. With the file its sidecar appears, if one is written."""
    with whole(file) as temporary:
        beside = sidecar(temporary, channel=False)
        try:
            try:
                yield temporary
                complete = _ends_as_written(temporary)
            except (RuntimeError, OSError):
                complete = False
            if not complete:
                free = shutil.disk_usage(temporary.parent).free / 1e6
                raise OSError(
                    f"{file} could not be written ({free:.0f} MB are free there). If the disk is full, free some "
                    "space; then run the command again"
                )
            if beside.is_file():
                os.replace(beside, sidecar(Path(file), channel=False))
        finally:
            beside.unlink(missing_ok=True)


def write_image(file: Path, image: sitk.Image) -> None:
    """Write an image; the file appears when it is complete.

    Raises:
        OSError: naming the file, if it cannot be written, as when the disk is full.
    """
    with _complete(file) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def _ends_as_written(file: Path) -> bool:
    """Whether a file has all of its voxels: on a full disk SimpleITK cuts NIfTI without a word."""
    if not file.name.endswith((".nii", ".nii.gz")):
        return True
    try:
        nifti = load_nifti(file)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError):
        return False
    size = cast(ArrayProxy, nifti.dataobj).offset + math.prod(nifti.shape) * nifti.get_data_dtype().itemsize
    if file.name.endswith(".nii"):
        return file.stat().st_size >= size
    with open(file, "rb") as stream:
        # gzip ends with the size of its content, modulo 2**32.
        stream.seek(-min(4, file.stat().st_size), os.SEEK_END)
        return int.from_bytes(stream.read(), "little") == size % 2**32


def geometry_difference(first: Geometry, second: Geometry) -> str | None:
    """What differs in size, spacing, position or direction, or None if a voxel of both is the same place.

    Positions and directions are compared if both have them.
    """
    sizes = [np.array(geometry.shape[::-1]) for geometry in (first, second)]
    if first.shape != second.shape:
        return f"sizes {_times(sizes[0])} and {_times(sizes[1])}"
    spacings = [np.array(geometry.spacing[::-1]) for geometry in (first, second)]
    tolerance = GEOMETRY_TOLERANCE * spacings[0]
    # Over the whole image, or a small difference of spacing would shift its far end.
    if (np.abs(spacings[0] - spacings[1]) * sizes[0] > spacings[0] / 2).any() or (
        np.abs(spacings[0] - spacings[1]) > tolerance
    ).any():
        assumed = [f". {geometry.warning}" for geometry in (first, second) if geometry.warning]
        return f"spacings {_times(spacings[0])} and {_times(spacings[1])} mm{''.join(assumed)}"
    if first.origin is None or second.origin is None:
        return None
    if (
        first.direction is not None
        and second.direction is not None
        and not np.allclose(first.direction, second.direction, atol=1e-3)
    ):
        return "directions"
    if (np.abs(np.subtract(first.origin, second.origin)) > np.maximum(tolerance, 1e-3)).any():
        return f"origins {_shown(first.origin)} and {_shown(second.origin)} mm"
    return None


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.6g}" for value in values)


def _shown(values: Iterable[float]) -> str:
    # Without a minus before zero.
    return f"({', '.join(f'{value + 0.0:.6g}' for value in values)})"
