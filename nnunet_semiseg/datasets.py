"""An nnU-Net dataset as the commands see it: its folders, plans, cases and images."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_semiseg.files import CaseError, read_json, visible_files

# How far an unlabeled image may be from the labeled ones before it is called an outlier.
SPACING_RATIO = 2.0
INTENSITY_SDS = 5.0


def check_variables(*variables: Any) -> None:
    """Raises ValueError naming the first of nnU-Net's variables that is not set, or is set with quotation marks."""
    for variable in variables:
        value = variable.get()
        if not value:
            raise ValueError(f"The variable {variable.env_var_name} is not set. Set it to a folder of your choice")
        if quoted(value):
            raise ValueError(
                f"The variable {variable.env_var_name} is {value}, including quotation marks. Set it without them"
            )


def quoted(folder: str) -> bool:
    """Whether a variable's value has quotation marks around it, which a shell removes but a settings file does not."""
    return not Path(folder).exists() and (folder[0] in "\"'" or folder[-1] in "\"'")


def dataset_name(name_or_id: str) -> str:
    """``501`` or ``Dataset501_Name`` to the name, with a clear error if there is no such dataset, or two."""
    check_variables(nnUNet_raw, nnUNet_preprocessed)
    name = str(name_or_id)
    if name.startswith("Dataset"):
        return name
    found = find_candidate_datasets(int(name)).tolist() if name.isdecimal() else []
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} datasets {name}: {', '.join(found)}, in {nnUNet_raw}, {nnUNet_preprocessed} or "
            f"{nnUNet_results.get()}. nnU-Net wants one for each id: rename or remove the other, or give the full name"
        )
    if not found:
        raise ValueError(f"There is no dataset {name_or_id} in {nnUNet_raw} or {nnUNet_preprocessed}")
    return found[0]


def read_dataset_json(file: Path, keys: Iterable[str] = ("labels",)) -> dict:
    """The content of a dataset.json.

    Args:
        keys: That it has to have.

    Raises:
        OSError, ValueError: naming the file, what is missing and the cure.
    """
    cure = "docs/data.md shows what nnU-Net wants there"
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is missing. Every nnU-Net dataset needs one")
    content = read_json(file, ("labels",), cure)
    if isinstance(content["labels"], dict) and isinstance(content["labels"].get("0"), str):
        raise ValueError(
            f"{file} is of nnU-Net v1: its labels are {{value: name}}. Convert the dataset with "
            "nnUNetv2_convert_old_nnUNet_dataset"
        )
    for key in keys:
        if key not in content and not (key == "channel_names" and "modality" in content):
            raise ValueError(f"{file} has no key '{key}'. {cure}")
    for key, kind in _DATASET_KEYS.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"{file}: '{key}' is {content[key]!r}, which is not {_KINDS[kind]}. {cure}")
    return content


_DATASET_KEYS = {"labels": dict, "channel_names": dict, "modality": dict, "dataset": dict, "file_ending": str}
_KINDS = {dict: "an object {name: value}", str: "text"}


@dataclass
class Dataset:
    """Folders and files of one dataset.

    Args:
        name: ``Dataset501_Name``.
    """

    name: str

    @property
    def number(self) -> str:
        """Its id: nnU-Net's commands for planning and preprocessing take no name."""
        return self.name[len("Dataset") :].partition("_")[0]

    @property
    def raw(self) -> Path:
        return Path(str(nnUNet_raw)) / self.name

    @property
    def preprocessed(self) -> Path:
        return Path(str(nnUNet_preprocessed)) / self.name

    @property
    def splits_file(self) -> Path:
        """nnU-Net's folds; it may be missing."""
        return self.preprocessed / "splits_final.json"

    @property
    def json_file(self) -> Path:
        """The dataset.json beside the preprocessed data; before there is one, the raw one."""
        file = self.preprocessed / "dataset.json"
        return file if file.is_file() else self.raw / "dataset.json"

    @cached_property
    def json(self) -> dict:
        return read_dataset_json(self.json_file, ("channel_names", "labels", "file_ending"))

    @property
    def file_ending(self) -> str:
        return self.json["file_ending"]

    @property
    def num_channels(self) -> int:
        return len(self.json["channel_names"] if "channel_names" in self.json else self.json["modality"])

    def plans_names(self) -> list[str]:
        """Of all plans, whatever they are called, sorted."""
        return sorted(file.stem for file in self.preprocessed.glob("[!.]*.json") if _is_plans(file))

    def plans(self, plans_name: str) -> PlansManager:
        """Raises OSError, ValueError naming the file, if there are no such plans, or they cannot be used."""
        file = self.preprocessed / f"{plans_name}.json"
        if not file.is_file():
            there = ", ".join(self.plans_names())
            raise FileNotFoundError(
                f"{file} is missing. {f'Choose other plans with -p: {there}' if there else 'Plan first'}, or run "
                f"nnUNetv2_plan_and_preprocess -d {self.number}"
            )
        cure = f"Make the plans again: nnUNetv2_plan_experiment -d {self.number}"
        plans = read_json(file, _PLANS_KEYS, cure)
        plans_reader(plans, file)
        return PlansManager(plans)

    @cached_property
    def reader(self) -> type[BaseReaderWriter] | None:
        """nnU-Net's reader of all files, by the plans or dataset.json; None if the files' ending decides."""
        # All plans of a dataset have the same one.
        for name in self.plans_names():
            try:
                return plans_reader(self.plans(name).plans, self.preprocessed / f"{name}.json")
            except (OSError, ValueError):
                continue
        return dataset_reader(self.json)

    def labeled_cases(self) -> list[str]:
        """All cases with labels, by the ground truth that nnU-Net keeps beside the preprocessed data or by labelsTr."""
        listed = sorted(self.json.get("dataset", {}))
        for folder in (self.preprocessed / "gt_segmentations", self.raw / "labelsTr"):
            if folder.name == "labelsTr" and listed:
                break
            files = visible_files(folder) if folder.is_dir() else []
            cases = [p.name[: -len(self.file_ending)] for p in files if p.name.endswith(self.file_ending)]
            if cases:
                return sorted(cases)
        return listed

    @cached_property
    def labeled_files(self) -> dict[str, tuple[list[Path], Path]]:
        """{case: (its channel files in order, its label map)}, as nnU-Net lists them for planning and preprocessing.

        Of ``imagesTr`` and ``labelsTr``, or where the key ``dataset`` of dataset.json says. Nobody has looked whether
        the files are there, and all channels.

        Raises:
            FileNotFoundError: if there is no ``imagesTr``.
            ValueError: naming the case that dataset.json does not list as nnU-Net wants it.
        """
        folder = self.raw / "imagesTr"
        description = deepcopy(self.json)
        listed = description.get("dataset")
        if listed is not None:
            for case, entry in listed.items():
                if not isinstance(entry, dict) or not {"images", "label"} <= set(entry):
                    raise ValueError(f"{self.json_file}: 'dataset' has no images and label of case {case}. Add them")
        elif not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing. Put the labeled images there")
        found = get_filenames_of_train_images_and_targets(str(self.raw), description)
        cases = {
            str(case): ([Path(file) for file in files["images"]], Path(files["label"]))
            for case, files in found.items()
            if listed is not None or not case.startswith(".")
        }
        if listed is None:
            # nnU-Net does not see links whose target is gone.
            for file in visible_files(folder):
                if not file.exists() and file.name.endswith(self.file_ending):
                    case = file.name[: -len(self.file_ending)].rpartition("_")[0]
                    images, _ = cases.setdefault(case, ([], self.raw / "labelsTr" / f"{case}{self.file_ending}"))
                    images.append(file)
                    images.sort()
        return dict(sorted(cases.items()))

    def check_channels(self, case: str, files: list[Path], folder: Path) -> None:
        """Raises CaseError if these are not a case's channels 0000, 0001, ... as many as the dataset has."""
        # One file may hold all channels, as RGB images do.
        expected = [f"{case}_{i:04d}{self.file_ending}" for i in range(self.num_channels)]
        if [p.name for p in files] not in (expected, expected[:1]):
            raise CaseError(
                f"Case {case} in {folder} has the channels {', '.join(p.name for p in files)}, but the dataset "
                f"has {self.num_channels}: {', '.join(expected)}"
            )

    def images(self, folder: str) -> dict[str, list[Path]]:
        """{case: its channel files in order} of ``imagesTr`` or ``imagesUn``.

        Raises:
            FileNotFoundError: if the folder does not exist or holds no image of the dataset's file ending.
            CaseError: naming the case that has not all channels.
        """
        path = self.raw / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} is missing. Put the unlabeled images there, named CASE_0000{self.file_ending}"
            )
        images: list[Path] = []
        others: list[Path] = []
        for file in visible_files(path):
            (images if file.name.endswith(self.file_ending) else others).append(file)
        # Files of spacings that Tiff3DIO wants beside the images.
        sidecars = {sidecar(file, channel=True) for file in images} if self._may_have_sidecars else set()
        for file in others:
            if file in sidecars:
                continue
            if self._may_have_sidecars and file.suffix == ".json":
                raise CaseError(
                    f"{file} is the spacing of an image {file.stem}_0000{self.file_ending}, which is not there. Rename "
                    "or remove it"
                )
            raise CaseError(f"{file} does not end in {self.file_ending}, as dataset.json says. Convert or remove it")
        cases: dict[str, list[Path]] = {}
        for file in images:
            case, channel = file.name[: -len(self.file_ending)].rpartition("_")[::2]
            if not case or len(channel) != 4 or not channel.isdigit():
                raise CaseError(
                    f"{file} is not named CASE_0000{self.file_ending} (four digits for the channel). Rename it"
                )
            cases.setdefault(case, []).append(file)
        if not cases:
            raise FileNotFoundError(
                f"{path} holds no images. Put the unlabeled ones there, named CASE_0000{self.file_ending}"
            )
        for case, channels in cases.items():
            self.check_channels(case, channels, path)
        return cases

    @property
    def _may_have_sidecars(self) -> bool:
        return self.file_ending.lower() in Tiff3DIO.supported_file_endings and self.reader in (None, Tiff3DIO)

    @cached_property
    def fingerprint(self) -> dict:
        file = self.preprocessed / "dataset_fingerprint.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing. Run nnUNetv2_extract_fingerprint -d {self.number}")
        cure = f"Make it again: nnUNetv2_extract_fingerprint -d {self.number} --clean"
        return read_json(file, ("spacings",), cure)

    def spacing_warning(self, spacing: np.ndarray) -> str | None:
        """What is unusual about a spacing in mm (array axis order), against the labeled cases."""
        labeled = np.asarray(self.fingerprint["spacings"])
        low, high = labeled.min(0) / SPACING_RATIO, labeled.max(0) * SPACING_RATIO
        if np.all((spacing >= low) & (spacing <= high)):
            return None
        shown = " x ".join(f"{s:.3g}" for s in spacing)
        usual = " x ".join(f"{a:.3g}-{b:.3g}" for a, b in zip(labeled.min(0), labeled.max(0)))
        return f"spacing {shown} mm is far from the labeled cases' {usual} mm. Check the header, or leave the case out"


def check_there(file: Path) -> None:
    """Raises CaseError naming the file, if it is gone, or what it links to."""
    file = Path(file)
    if file.is_symlink() and not file.exists():
        raise CaseError(
            f"{file} cannot be read: it links to {os.readlink(file)}, which is gone. Mount its disk, or remove the link"
        )
    if not file.exists():
        raise CaseError(f"{file} is missing. Put it there, or remove its case")


# What the commands read of plans.
_PLANS_KEYS = ("configurations", "image_reader_writer", "transpose_forward")


def _is_plans(file: Path) -> bool:
    try:
        content = read_json(file)
    except ValueError:
        # Damaged; whoever reads it is told.
        return "Plans" in file.stem
    return isinstance(content, dict) and "configurations" in content


def plans_reader(plans: dict, file: Path) -> type[BaseReaderWriter]:
    """nnU-Net's reader that plans name. Raises ValueError naming ``file``, if nnU-Net has none of that name."""
    name = plans["image_reader_writer"]
    try:
        return recursive_find_reader_writer_by_name(name)
    except RuntimeError:
        raise ValueError(
            f"{file}: nnU-Net has no reader {name}. Put its module into nnunetv2/imageio, or plan again"
        ) from None


def dataset_reader(dataset_json: dict) -> type[BaseReaderWriter] | None:
    """The reader that a dataset.json asks for; None if there is no such one, and the files' ending decides."""
    name = dataset_json.get("overwrite_image_reader_writer", "None")
    try:
        return None if name == "None" else recursive_find_reader_writer_by_name(name)
    except RuntimeError:
        # nnU-Net, too, goes by the ending then.
        return None


def sidecar(file: Path, channel: bool) -> Path:
    """Where Tiff3DIO looks for the spacing of a TIFF file.

    Args:
        channel: ``file`` is an image, named CASE_0000, and no label map.
    """
    stem = file.name[: -len(file.suffix)]
    return file.with_name(f"{stem[:-5] if channel else stem}.json")


def check_sidecar(file: Path, channel: bool) -> str | None:
    """What nnU-Net does about a file that is read with Tiff3DIO and has no sidecar, or None if it has one.

    Raises:
        CaseError: naming the sidecar, if it has no spacing.
    """
    own = sidecar(file, channel)
    cure = 'Write {"spacing": [Z, Y, X]} there'
    if not own.exists():
        return f"{own} is missing, so the spacing of {file.name} is taken as 1 x 1 x 1 mm. {cure}"
    try:
        spacing = read_json(own, ("spacing",), cure)["spacing"]
    except ValueError as error:
        raise CaseError(str(error)) from None
    try:
        fits = len(spacing) == 3 and all(0 < float(s) < float("inf") for s in spacing)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise CaseError(f"{own} has the spacing {spacing}, not three positive numbers. {cure}")
    return None


def affine(properties: dict) -> np.ndarray | None:
    """(4, 4) from voxels (x, y, z) of what a reader gave to mm (right, front, up); None in 2D or without positions."""
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return stuff.get("reoriented_affine", stuff["original_affine"])
    stuff = properties.get("sitk_stuff")
    if stuff is None or len(stuff["spacing"]) != 3:
        return None
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(stuff["direction"], (3, 3)) * stuff["spacing"]
    matrix[:3, 3] = stuff["origin"]
    # ITK counts to the left and back.
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def orientation(properties: dict) -> str | None:
    """Axis codes of what a reader gave, such as LPS; None where there are none. A reader may have reoriented it."""
    matrix = affine(properties)
    return None if matrix is None else "".join(code or "?" for code in nibabel.aff2axcodes(matrix))


def read_images(
    files: list[Path], reader: type[BaseReaderWriter], num_channels: int
) -> tuple[np.ndarray, dict, list[str]]:
    """The case's (C, Z, Y, X) images and properties, read as nnU-Net reads them and checked, and nnU-Net's warnings.

    Raises:
        CaseError: naming the file, if it is damaged, 4D, or has voxels that are no numbers.
    """
    for file in files:
        check_there(file)
        check_nifti(file)
    warnings = []
    if issubclass(reader, Tiff3DIO):
        warnings.append(check_sidecar(files[0], channel=True))
    data, properties, printed = run_reader(lambda: reader().read_images([str(file) for file in files]), files[0])
    if not issubclass(reader, Tiff3DIO):
        # A line for each: what differs, and the values.
        for text in re.split("WARNING!? *", printed)[1:]:
            warnings.append(f"{files[0]}: {' '.join(text.partition('Image files')[0].split())[:300]}")
    if len(data) != num_channels:
        if issubclass(reader, NaturalImage2DIO):
            raise CaseError(
                f"{files[0]} has {len(data)} channels, the labeled cases have {num_channels}. Save it "
                f"{'without transparency' if len(data) == 4 else 'with the same channels'}, or remove it"
            )
        raise CaseError(
            f"{files[0]} holds {len(data)} channel(s) or volumes, but the dataset has {num_channels} channel(s). Split "
            "a 4D image into one file for each time point, and give one file for each channel"
        )
    for channel, file in zip(data, files):
        _check_finite(channel, file)
    return data, properties, [warning for warning in warnings if warning]


def run_reader(read: Callable[[], tuple[np.ndarray, dict]], file: Path) -> tuple[np.ndarray, dict, str]:
    """What ``read`` returns, and what nnU-Net prints meanwhile.

    Raises:
        CaseError: naming ``file``, if it cannot be read.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            return *read(), printed.getvalue()
    except Exception as error:
        reason = " ".join(f"{printed.getvalue()} {error}".split())[:300] or type(error).__name__
        raise CaseError(f"{file} cannot be read ({reason}). Copy or convert it again, or remove it") from None


def _check_finite(voxels: np.ndarray, file: Path) -> None:
    bad = int(voxels.size - np.isfinite(voxels).sum())
    if bad:
        raise CaseError(f"{file} has {bad} voxels that are NaN or infinite. Replace them (by 0, say), or remove it")


def load_nifti(file: Path) -> nibabel.Nifti1Pair:
    """A NIfTI file by nibabel, whose own function may return images of any kind."""
    return cast("nibabel.Nifti1Pair", nibabel.load(file))


def check_nifti(file: Path) -> None:
    """Read a NIfTI file with nibabel, which complains where SimpleITK does not.

    SimpleITK turns NaN into 0 and fills the missing part of a truncated file with anything, without a word.
    """
    if file.name.endswith((".nii", ".nii.gz")):
        voxels, *_ = run_reader(lambda: (np.asanyarray(load_nifti(file).dataobj), {}), file)
        _check_finite(voxels, file)


def content_hash(data: np.ndarray) -> str:
    """A hash of the voxel values and the shape, whatever the file's name, compression and data type."""
    return hashlib.sha1(np.ascontiguousarray(data, dtype=np.float32).data).hexdigest() + str(data.shape)
