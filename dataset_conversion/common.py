"""What the conversions share: what a data set tells about itself, archives, reading scans, and writing one case.

A module ``DatasetXXX_Name.py`` has a ``SOURCE``, and nothing else is needed to make ``nnunet_semiseg convert Name``.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_semiseg.datasets import CaseError, content_hash, load_nifti
from nnunet_semiseg.files import link, whole, write_json
from nnunet_semiseg.segmentations import (
    Geometry,
    check_labels,
    geometry_difference,
    read_image,
    version,
    write_image,
    write_labels,
)

ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar")
# Where a case of a part goes: imagesTr and labelsTr, imagesUn, imagesTs and labelsTs.
SUFFIXES = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}


@dataclass(frozen=True)
class Case:
    """One scan, or one time point of it.

    Args:
        name: In the nnU-Net dataset.
        patient: Whose cases are never in two of training, validation and test.
        images: The files it is read from. For ``read_files``, a file or the folder of a DICOM series for each channel.
        label: The file with its label; None if nobody labeled it.
        split: ``train``, ``validation`` or ``test`` in the published protocol; None if the protocol leaves it out.
        frame: Of files that hold several, from 0.
    """

    name: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None = None
    split: str | None = "train"
    frame: int | None = None


@dataclass
class Scan:
    """What was read of a case.

    Args:
        images: One 2D or 3D image for each channel.
        label: None if it was not asked for.
        notes: What was found to be wrong and was repaired.
        as_is: The files of the case hold exactly this, and may be linked.
    """

    images: list[sitk.Image]
    label: sitk.Image | None = None
    notes: list[str] = field(default_factory=list)
    as_is: bool = False


class Download:
    """A folder as it was downloaded, or an archive; archives in it are unpacked, inner ones too.

    Args:
        path: The folder or archive.
        unpacked: Folder for what comes out of archives; nothing is written anywhere else.

    Raises:
        FileNotFoundError: if there is no such folder or archive.
        ValueError: naming the archive, if it is damaged, encrypted or packed in an unknown way, or holds a file that
            would land outside the folder.
    """

    def __init__(self, path: Path, unpacked: Path):
        if not path.is_dir() and not (path.is_file() and path.name.endswith(ARCHIVES)):
            raise FileNotFoundError(f"{path} is neither a folder nor one of the archives {', '.join(ARCHIVES)}")
        self.path, self.unpacked = path, unpacked
        self.roots = [path] if path.is_dir() else []
        waiting = [path] if path.is_file() else self._archives(path)
        while waiting:
            archive = waiting.pop(0)
            stem = archive.name[: -len(next(e for e in ARCHIVES if archive.name.endswith(e)))]
            base = next((root for root in self.roots if archive.is_relative_to(root)), archive.parent)
            inside = archive.parent.relative_to(base) / stem
            try:
                # Most people unpack the archives in a folder and leave them there.
                if archive == path or not _is_unpacked(archive, (archive.parent, archive.parent / stem)):
                    root = _root(archive, unpacked)
                    _unpack(archive, root, root / inside)
                    self.roots.append(root)
                    waiting += self._archives(root)
            except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"{archive} is damaged, or not an archive of this kind ({reason}). Download it again"
                ) from None
            except RuntimeError as error:
                # Encrypted, or packed in a way that Python does not know.
                raise ValueError(
                    f"{archive} cannot be unpacked ({error}). Unpack it into its folder with another program, and give "
                    "that folder"
                ) from None

    def __str__(self) -> str:
        return str(self.path)

    @staticmethod
    def _archives(folder: Path) -> list[Path]:
        return sorted(f for f in folder.rglob("*") if f.name.endswith(ARCHIVES) and not f.is_dir() and not junk(f))

    def find(self, pattern: str) -> list[Path]:
        """Files and folders at any depth whose name matches, sorted by path."""
        return sorted(f for root in self.roots for f in root.rglob(pattern) if not junk(f))


def junk(path: Path) -> bool:
    """Whether it is something that macOS and Windows put into archives, or a hidden file."""
    return path.name.startswith(".") or "__MACOSX" in path.parts


def _members(archive: Path) -> Iterator[tuple[str, Callable]]:
    """(name, function that opens it) of the files in an archive, in its order."""
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if not member.is_dir():
                    yield member.filename, lambda member=member: file.open(member)
        return
    with tarfile.open(archive) as tar:
        for entry in tar:
            if entry.isreg():
                yield entry.name, lambda entry=entry: tar.extractfile(entry)
            elif not entry.isdir():
                raise ValueError(f"{archive} holds the link or device {entry.name}, which is never unpacked")


def _is_unpacked(archive: Path, beside: tuple[Path, Path]) -> bool:
    """Whether one of two folders has the files of an archive, or there are none in it.

    All of a .zip file; only the first of the others, which have no table of contents.
    """
    files = (name for name, _ in _members(archive) if not junk(Path(name)))
    names = list(files) if archive.name.endswith(".zip") else list(islice(files, 1))
    found = max(sum((folder / name).exists() for name in names) for folder in beside)
    if 0 < found < len(names):
        print(
            f"Warning: only {found} of the {len(names)} files of {archive} are unpacked beside it, so it is unpacked "
            "elsewhere. Unpack all of it there, or remove these files",
            file=sys.stderr,
        )
    return found == len(names)


def _root(archive: Path, unpacked: Path) -> Path:
    """The folder in ``unpacked`` for this version of an archive; what came out of an earlier version is removed."""
    place, now = (hashlib.sha1(str(key).encode()).hexdigest()[:8] for key in (archive.resolve(), version(archive)))
    root = unpacked / f"{archive.name}-{place}-{now}"
    for old in unpacked.glob(f"*-{place}-*"):
        if old != root:
            shutil.rmtree(old)
    return root


def _unpack(archive: Path, root: Path, target: Path) -> None:
    done = root / ".unpacked"
    if done.exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    target = target.resolve()
    for name, opened in tqdm(_members(archive), desc=f"unpacking {archive.name}", unit="file", file=sys.stderr):
        file = (target / name).resolve()
        if not file.is_relative_to(target):
            raise ValueError(f"{archive} holds {name}, which would land outside the target folder. Do not trust it")
        # Unpacked before, by a run that was stopped.
        if not file.exists():
            with whole(file) as temporary, opened() as stream, open(temporary, "wb") as output:
                shutil.copyfileobj(stream, output)
    done.touch()


def in_order(found: Mapping[str, object], published: Sequence[str]) -> list[str]:
    """The names that were found, those of a published list first and in its order, the others sorted.

    Warns if names of the published list are missing.
    """
    missing = [name for name in published if name not in found]
    if missing:
        print(
            f"Warning: {len(missing)} of the {len(published)} names in the published lists are not in the download, "
            f"such as {missing[0]}. If it is incomplete, the labeled and test cases are not those of the papers",
            file=sys.stderr,
        )
    return [name for name in published if name in found] + sorted(set(found) - set(published))


def by_name(files: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """{name: file}. Raises ValueError naming both, if two files have the same name."""
    names: dict[str, Path] = {}
    for file in files:
        name = name_of(file)
        if names.setdefault(name, file) != file:
            raise ValueError(f"{names[name]} and {file} are both {name}. Remove one of them")
    return names


# ----------------------------------------------------------------------------------------------------------- reading


def read_files(case: Case, with_label: bool) -> Scan:
    """Images and label of any format that SimpleITK reads; an RGB image has three channels."""
    notes: list[str] = []
    images = [read_volume(file, notes) for file in case.images]
    label = read_volume(case.label, notes) if with_label and case.label else None
    channels = images[0].GetNumberOfComponentsPerPixel()
    if channels > 1:
        images = [sitk.VectorIndexSelectionCast(images[0], i) for i in range(channels)]
    return Scan(images, label, notes, as_is=not notes and channels == 1)


def read_volume(path: Path, notes: list[str]) -> sitk.Image:
    """A 2D or 3D image from a file, or from a folder with one DICOM series; repairs are added to ``notes``.

    Raises:
        CaseError: naming the file or folder, if it cannot be used.
    """
    if path.is_dir():
        return read_series(path)
    if path.name.endswith((".NII", ".NII.GZ")):
        # check_nifti goes by the ending, and SimpleITK does not notice if a part of the file is missing.
        raise CaseError(f"{path} must be named {path.name.replace('.NII', '.nii').replace('.GZ', '.gz')}")
    try:
        image = read_image(path)
    except CaseError as error:
        # ITK refuses cosines that are rounded; some files of the FLARE challenges are like that.
        if "orthonormal" not in str(error) or not path.name.endswith((".nii", ".nii.gz")):
            raise
        image = _with_orthonormal_directions(path)
        notes.append(f"direction cosines of {path.name} made orthonormal")
    if image.GetDimension() > 3:
        raise CaseError(f"{path} is {image.GetDimension()}D. Split it into one file for each time point")
    return image


def _with_orthonormal_directions(file: Path) -> sitk.Image:
    """A NIfTI file with the rotation that is nearest to its direction cosines, by polar decomposition."""
    nifti = load_nifti(file)
    affine = np.diag([-1, -1, 1, 1]) @ nifti.affine  # NIfTI counts to the right and front, ITK to the left and back
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    if np.abs(left @ right - affine[:3, :3] / spacing).max() > 0.05:
        raise CaseError(f"{file} has a sheared grid. Resample it, or remove it")
    image = sitk.GetImageFromArray(np.asanyarray(nifti.dataobj).T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((left @ right).ravel().tolist())
    return image


def labels_of(image: sitk.Image, file: Path, known: frozenset[int] | None = None) -> np.ndarray:
    """The label map of an image that was read from ``file``, (Z, Y, X) or (Y, X).

    Raises:
        CaseError: naming the file, if it has several channels, fractions, or labels that are not known.
    """
    voxels = sitk.GetArrayFromImage(image)
    several = image.GetNumberOfComponentsPerPixel() > 1
    return check_labels(np.moveaxis(voxels, -1, 0) if several else voxels[None], file, known)


def has_series(folder: Path) -> bool:
    """Whether there is a DICOM series in a folder or below."""
    folders = (folder, *(below for below in folder.rglob("*") if below.is_dir()))
    return any(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(place)) for place in folders)


def read_series(folder: Path) -> sitk.Image:
    """The DICOM series of a folder, or of the one below that has slices; they are sorted by position.

    Raises:
        CaseError: naming the folder, if it has no series or several, or if slices are damaged, missing or twice there.
    """
    ids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not ids:
        # Archives keep folders for study and series in that of the patient.
        below = [f for f in folder.rglob("*") if f.is_dir() and sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(f))]
        if len(below) > 1:
            raise CaseError(
                f"{folder} has {len(below)} folders with DICOM series, such as {min(below)}. Keep one of them"
            )
        if below:
            return read_series(below[0])
    if len(ids) != 1:
        raise CaseError(f"{folder} has {len(ids)} DICOM series, not one. Keep one series in a folder")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), ids[0]))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
        positions = [reader.GetMetaData(i, "0020|0032").split("\\") for i in range(len(reader.GetFileNames()))]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CaseError(f"{folder} has slices that cannot be read ({reason}). Copy them again") from None
    normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
    gaps = np.abs(np.diff(np.array(positions, dtype=float) @ normal))
    if len(gaps) and (gaps.max() > 1.5 * np.median(gaps) or gaps.min() < 0.5 * np.median(gaps)):
        at = int(np.argmax(np.abs(gaps - np.median(gaps))))
        raise CaseError(
            f"{folder}: slices {at + 1} and {at + 2} are {gaps[at]:.3g} mm apart, the others {np.median(gaps):.3g} mm. "
            "Slices are missing or twice there: copy the series again"
        )
    return image


def h5py() -> ModuleType:
    """The package, which is an extra. Raises ValueError with the command that installs it."""
    try:
        import h5py
    except ImportError:
        raise ValueError("Reading .h5 files needs h5py. Run pip install nnunet-semiseg[convert]") from None
    return h5py


def read_h5(file: Path, key: str) -> np.ndarray:
    """An array of an HDF5 file. Raises CaseError naming the file, if it is damaged or has no such key."""
    try:
        with h5py().File(file) as content:
            return content[key][()]
    except (OSError, KeyError) as error:
        raise CaseError(f"{file} cannot be read ({error}). Download it again") from None


def with_spacing(array: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """(Z, Y, X) array as an image with ``spacing`` in mm, x first."""
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(spacing)
    return image


# ----------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        title: One line for the help.
        channels: Names as nnU-Net wants them: ``CT`` is normalized in its own way. Empty if the user names them.
        labels: {class: its values in the download}; the first becomes 1, the second 2, ... Empty if the user names
            them.
        cases: ``cases(download, args)`` lists the cases, in the order of which the first are labeled.
        read: ``read(case, with_label)`` reads one; the label is opened only if it is asked for.
        reference: Where the data are, and what to cite.
        license: Terms of use.
    """

    title: str
    channels: tuple[str, ...]
    labels: dict[str, tuple[int, ...]]
    cases: Callable[[Download, Namespace], list[Case]]
    read: Callable[[Case, bool], Scan] = read_files
    reference: str = ""
    license: str = ""


def convert_case(case: Case, part: str, source: Source, target: Path, unpacked: Path, as_link: bool) -> None:
    """Write images and, unless it is unlabeled, the label of one case, and then ``records/CASE.json`` about them.

    Args:
        part: A key of SUFFIXES. The label of an unlabeled case is not opened.
        target: Its folder ``dataset`` becomes the nnU-Net dataset.
        unpacked: Files in here are no one's: they are linked in any case.
        as_link: Link files that need no change, instead of copying them.

    Raises:
        CaseError: naming the file that cannot be used.
    """
    scan = source.read(case, part != "unlabeled" and case.label is not None)
    image, folder, suffix = scan.images[0], target / "dataset", SUFFIXES[part]
    if len(scan.images) != len(source.channels):
        raise CaseError(
            f"{case.images[0]} has {len(scan.images)} channel(s), not {len(source.channels)}: "
            f"{', '.join(source.channels)}"
        )
    geometry = Geometry.of_image(image)
    for file, channel in zip(case.images, scan.images):
        difference = geometry_difference(geometry, Geometry.of_image(channel))
        if difference:
            raise CaseError(f"{case.images[0]} and {file} differ in geometry: {difference}")
    voxels = np.stack([sitk.GetArrayViewFromImage(channel) for channel in scan.images])
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise CaseError(f"{case.images[0]} has voxels that are NaN or infinite. Replace them, or remove the case")
    for i, channel in enumerate(scan.images):
        file = folder / f"images{suffix}" / f"{case.name}_{i:04d}.nii.gz"
        _put(file, case.images[i] if scan.as_is else None, unpacked, as_link, channel)
    record = {
        "patient": case.patient,
        "folder": f"images{suffix}",
        "size": image.GetSize(),
        "spacing": image.GetSpacing(),
        "image_hash": content_hash(voxels),
        "notes": scan.notes,
    }
    if scan.label is not None and case.label is not None:
        difference = geometry_difference(geometry, Geometry.of_image(scan.label))
        if difference:
            raise CaseError(
                f"{case.label} and its image {case.images[0]} differ in geometry: {difference}. If the voxels fit, "
                "give the label the image's header; otherwise remove both"
            )
        known = frozenset({0}.union(*source.labels.values()))
        labels = labels_of(scan.label, case.label, known)
        new_label = np.zeros(max(known) + 1, dtype=np.uint8)
        for i, values in enumerate(source.labels.values()):
            new_label[list(values)] = i + 1
        renamed = new_label[labels]
        file = folder / f"labels{suffix}" / f"{case.name}.nii.gz"
        if scan.as_is and scan.label.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt16) and np.all(labels == renamed):
            _put(file, case.label, unpacked, as_link, scan.label)
        else:
            write_labels(file, renamed, geometry)
        counts = np.bincount(renamed.ravel(), minlength=len(source.labels) + 1)
        record["shares"] = (counts[1:] / renamed.size).tolist()
        record["label_hash"] = content_hash(renamed)
        if not counts[1:].any():
            record["notes"] = [*scan.notes, "the label is empty"]
    write_json(target / "records" / f"{case.name}.json", record)


def _put(file: Path, original: Path | None, unpacked: Path, as_link: bool, image: sitk.Image) -> None:
    """``original`` under the name ``file``, without a change if it is a .nii.gz file; otherwise ``image``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if original is None or not original.name.endswith(".nii.gz"):
        write_image(file, image)
        return
    if original.is_relative_to(unpacked):
        file.unlink(missing_ok=True)
        with suppress(OSError):  # Some file systems have no hard links.
            os.link(original, file)
            return
    elif as_link:
        link(original, file)
        return
    with whole(file) as temporary:
        shutil.copyfile(original, temporary)
