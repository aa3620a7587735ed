"""Images in nnU-Net's axis order, and label maps in the geometry of their image."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.arrayproxy import is_proxy
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from nnunet_semiseg.files import CaseError, visible_files, whole

# Readers whose NIfTI files nibabel reads to the same voxels and spacings.
_BY_NIBABEL = ("NibabelIO", "NibabelIOWithReorient", "SimpleITKIO")
# nnU-Net's other readers, which need their own libraries.
_MODULES = {
    "SimpleITKIOWithReorient": "simpleitk_reader_writer",
    "NaturalImage2DIO": "natural_image_reader_writer",
    "Tiff3DIO": "tif_reader_writer",
}


@dataclass(frozen=True)
class Image:
    """What was read of a case.

    Args:
        data: (C, Z, Y, X) float32.
        spacing: In mm, (Z, Y, X).
        origin: How its label map is written; see ``write``.
    """

    data: np.ndarray
    spacing: tuple[float, ...]
    origin: _Origin


@dataclass(frozen=True)
class _Origin:
    reader: str
    # The header of a NIfTI file, or the properties that nnU-Net's reader gave.
    header: Any = None
    properties: dict | None = None


def find_cases(folder: Path, ending: str) -> dict[str, list[Path]]:
    """{case: its channels in order} of a folder of files CASE_0000.nii.gz, CASE_0001.nii.gz, ...

    Raises:
        FileNotFoundError: if there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}")
    cases: dict[str, list[Path]] = {}
    for file in visible_files(folder):
        case, _, channel = file.name.removesuffix(ending).rpartition("_")
        if file.name.endswith(ending) and case and len(channel) == 4 and channel.isdigit():
            cases.setdefault(case, []).append(file)
    if not cases:
        raise FileNotFoundError(f"{folder} has no images named CASE_0000{ending}, as the model wants them")
    return cases


def check_channels(case: str, files: Sequence[Path], channels: int, ending: str) -> None:
    """Raises CaseError naming the case, if a file is missing or there are too many."""
    expected = [f"{case}_{i:04d}{ending}" for i in range(channels)]
    # One file may hold all channels, as RGB images do.
    if [file.name for file in files] not in (expected, expected[:1]):
        raise CaseError(
            f"Case {case} in {files[0].parent} has {', '.join(file.name for file in files)}, but the model wants "
            f"{', '.join(expected)}"
        )


def shape_of(files: Sequence[Path], reader: str) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Shape (Z, Y, X) and spacing of a NIfTI image by its header alone; None if only reading it tells."""
    if not _is_nifti(files[0]) or reader not in ("NibabelIO", "SimpleITKIO"):
        return None
    nifti = _load(files[0])
    if nifti.ndim != 3:
        return None
    return nifti.shape[::-1], _spacing(nifti)


def read(files: Sequence[Path], reader: str, channels: int) -> Image:
    """A case as nnU-Net's reader of that name reads it.

    Args:
        files: One for each channel.

    Raises:
        CaseError: naming the file, if it is missing or damaged, is 4D, has other channels, or voxels that are no
            numbers.
        NotImplementedError: if there is no such reader.
    """
    for file in files:
        if not file.exists():
            raise CaseError(f"{file} is missing. Put it there, or remove its case")
    try:
        image = _read_nifti(files, reader) if all(map(_is_nifti, files)) and reader in _BY_NIBABEL else None
        if image is None:
            image = _read_by_simpleitk(files) if reader == "SimpleITKIO" else _read_by_nnunet(files, reader)
    except (CaseError, NotImplementedError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CaseError(f"{files[0]} cannot be read ({reason}). Copy or convert it again, or remove it") from None
    if len(image.data) != channels:
        raise CaseError(
            f"{files[0]} holds {len(image.data)} channel(s) or volumes, but the model has {channels}. Split a 4D image "
            "into one file for each time point, and give one file for each channel"
        )
    # NaN and infinity survive sums; the sum of the squares of others does not reach infinity in double precision.
    if not np.isfinite(sum(float(np.sum(channel, dtype=np.float64)) for channel in image.data)):
        raise CaseError(f"{files[0]} has voxels that are NaN or infinite. Replace them (by 0, say), or remove it")
    return image


def write(file: Path, labels: np.ndarray, image: Image) -> None:
    """Write a (Z, Y, X) label map in the geometry of its image; it appears when it is complete.

    Raises:
        OSError: naming the file, if it cannot be written, as when the disk is full.
    """
    labels = labels.astype(np.uint8 if labels.max() < 255 else np.uint16, copy=False)
    origin = image.origin
    with whole(file) as temporary:
        try:
            if origin.header is not None:
                nibabel.save(_nifti(labels, origin), temporary)
            elif origin.reader == "SimpleITKIO":
                _write_by_simpleitk(temporary, labels, origin)
            else:
                _nnunet_reader(origin.reader)().write_seg(labels, str(temporary), origin.properties)
            complete = temporary.is_file()
        except RuntimeError:
            complete = False
        if not complete:
            raise OSError(f"{file} could not be written. If the disk is full, free some space")


def _is_nifti(file: Path) -> bool:
    return file.name.endswith((".nii", ".nii.gz"))


def _load(file: Path) -> nibabel.Nifti1Image:
    try:
        return nibabel.load(file)  # type: ignore[return-value]
    except FileNotFoundError:
        raise CaseError(f"{file} is missing. Put it there, or remove its case") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CaseError(f"{file} cannot be read ({reason}). Copy or convert it again, or remove it") from None


def _spacing(nifti: nibabel.Nifti1Image) -> tuple[float, ...]:
    return tuple(float(zoom) for zoom in nifti.header.get_zooms()[::-1])


def _read_nifti(files: Sequence[Path], reader: str) -> Image | None:
    """None if only SimpleITK knows what is meant."""
    volumes, spacings = [], []
    first: Any = None
    for file in files:
        nifti = _load(file)
        if nifti.ndim != 3:
            if reader == "SimpleITKIO" and nifti.ndim in (2, 4):
                return None
            raise CaseError(f"{file} is {nifti.ndim}D. Split a 4D image into one 3D file for each time point")
        first = first or nifti
        if reader == "NibabelIOWithReorient":
            nifti = nifti.as_reoriented(io_orientation(nifti.affine))
        proxy: Any = nifti.dataobj
        if is_proxy(proxy) and (proxy.slope, proxy.inter) != (1, 0):
            # As nnU-Net does: in double precision.
            voxels = nifti.get_fdata(caching="unchanged")
        else:
            voxels = np.asanyarray(proxy)
        if voxels.dtype.kind not in "iuf":
            raise CaseError(f"{file} has {voxels.dtype} voxels. Save it with one number for each voxel")
        volumes.append(voxels.T)
        spacings.append(_spacing(nifti))
    _check_equal(files, volumes, spacings)
    data = np.empty((len(volumes), *volumes[0].shape), dtype=np.float32)
    for channel, volume in zip(data, volumes):
        channel[...] = volume
    spacing = spacings[0]
    if reader == "SimpleITKIO":
        spacing = tuple(abs(s) for s in spacing)
    return Image(data, spacing, _Origin(reader, header=first.header))


def _check_equal(files: Sequence[Path], volumes: Sequence[np.ndarray], spacings: Sequence[Sequence[float]]) -> None:
    """Raises CaseError naming the file, if the channels of a case do not fit on each other."""
    for file, volume, spacing in zip(files, volumes, spacings):
        if volume.shape != volumes[0].shape or spacing != spacings[0]:
            raise CaseError(
                f"{file} has another size or spacing than {files[0].name}: {volume.shape}, {spacing} and "
                f"{volumes[0].shape}, {spacings[0]}. Resample one to the other"
            )


def _nifti(labels: np.ndarray, origin: _Origin) -> nibabel.Nifti1Image:
    """A label map with the header of its image, so that every program puts both in the same place."""
    voxels = labels.T
    header = origin.header.copy()
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    if origin.reader == "NibabelIOWithReorient":
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(header.get_best_affine()))
        voxels = apply_orientation(voxels, back)
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    header["descrip"] = b""
    header.set_intent("none")
    header.extensions.clear()
    return kind(voxels, None, header)


def _read_by_simpleitk(files: Sequence[Path]) -> Image:
    """As nnU-Net's SimpleITKIO reads what is not 3D or not NIfTI."""
    import SimpleITK as sitk

    volumes, spacings = [], []
    first = None
    for file in files:
        image = sitk.ReadImage(str(file))
        voxels = sitk.GetArrayFromImage(image)
        spacing = [abs(s) for s in image.GetSpacing()[::-1]]
        if voxels.ndim == 2:
            voxels, spacing = voxels[None], [max(spacing) * 999, *spacing]
        volumes.append(voxels if voxels.ndim == 4 else voxels[None])
        spacings.append(spacing[-3:])
        first = first or image
    _check_equal(files, volumes, spacings)
    assert first is not None
    properties = {"spacing": first.GetSpacing(), "origin": first.GetOrigin(), "direction": first.GetDirection()}
    data = np.concatenate(volumes, dtype=np.float32, casting="unsafe")
    return Image(data, tuple(spacings[0]), _Origin("SimpleITKIO", properties=properties))


def _write_by_simpleitk(file: Path, labels: np.ndarray, origin: _Origin) -> None:
    import SimpleITK as sitk

    assert origin.properties is not None
    image = sitk.GetImageFromArray(labels[0] if len(origin.properties["spacing"]) == 2 else labels)
    image.SetSpacing(origin.properties["spacing"])
    image.SetOrigin(origin.properties["origin"])
    image.SetDirection(origin.properties["direction"])
    sitk.WriteImage(image, str(file), True)


def _nnunet_reader(name: str) -> Any:
    """nnU-Net's reader class of that name."""
    try:
        module = importlib.import_module(f"nnunetv2.imageio.{_MODULES[name]}")
    except KeyError:
        raise NotImplementedError(f"The plans read images with {name}, which this runner does not know") from None
    except ImportError as error:
        raise NotImplementedError(
            f"The plans read images with {name}, which needs nnunetv2 here ({error}). Install it"
        ) from None
    return getattr(module, name)


def _read_by_nnunet(files: Sequence[Path], reader: str) -> Image:
    data, properties = _nnunet_reader(reader)().read_images([str(file) for file in files])
    spacing = tuple(float(s) for s in properties["spacing"])
    return Image(data, spacing, _Origin(reader, properties=properties))
