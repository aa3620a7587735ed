"""An nnU-Net dataset as the commands see it: its folders, plans, cases and images."""

from __future__ import annotations

import hashlib
import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

# How far an unlabeled image may be from the labeled ones before it is called an outlier.
SPACING_RATIO = 2.0
INTENSITY_SDS = 5.0


def dataset_name(name_or_id: str) -> str:
    """``501`` or ``Dataset501_Name`` to the name, with a clear error if there is no such dataset."""
    for variable in (nnUNet_raw, nnUNet_preprocessed):
        if not variable.is_set():
            raise ValueError(f"The variable {variable.env_var_name} is not set. Set it to a folder of your choice")
    try:
        return maybe_convert_to_dataset_name(int(name_or_id) if str(name_or_id).isdigit() else name_or_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"There is no dataset {name_or_id} in {nnUNet_raw} or {nnUNet_preprocessed}") from error


class CaseError(ValueError):
    """A case whose images cannot be used; the message names file or case, and the cure."""


@dataclass
class Dataset:
    """Folders and files of one dataset.

    Args:
        name: ``Dataset501_Name``.
    """

    name: str

    @property
    def raw(self) -> Path:
        return Path(str(nnUNet_raw)) / self.name

    @property
    def preprocessed(self) -> Path:
        return Path(str(nnUNet_preprocessed)) / self.name

    @cached_property
    def json(self) -> dict:
        for folder in (self.preprocessed, self.raw):
            if (folder / "dataset.json").is_file():
                return load_json(str(folder / "dataset.json"))
        raise FileNotFoundError(f"{self.raw / 'dataset.json'} is missing. Every nnU-Net dataset needs one")

    @property
    def file_ending(self) -> str:
        return self.json["file_ending"]

    @property
    def num_channels(self) -> int:
        return len(self.json.get("channel_names", self.json.get("modality")))

    def plans(self, plans_name: str) -> PlansManager:
        file = self.preprocessed / f"{plans_name}.json"
        if not file.is_file():
            there = ", ".join(sorted(p.stem for p in self.preprocessed.glob("*Plans*.json")))
            raise FileNotFoundError(
                f"{file} is missing. {f'Choose other plans with -p: {there}' if there else 'Plan first'}, or run "
                f"nnUNetv2_plan_and_preprocess -d {self.name}"
            )
        return PlansManager(str(file))

    def labeled_cases(self) -> list[str]:
        """All cases with labels, by the ground truth that nnU-Net keeps beside the preprocessed data or by labelsTr."""
        for folder in (self.preprocessed / "gt_segmentations", self.raw / "labelsTr"):
            cases = [p.name[: -len(self.file_ending)] for p in folder.glob("*" + self.file_ending)]
            if cases:
                return sorted(cases)
        return sorted(self.json.get("dataset", {}))

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
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        wrong = [p for p in files if not p.name.endswith(self.file_ending)]
        if wrong:
            raise CaseError(
                f"{wrong[0]} does not end in {self.file_ending}, as dataset.json says. Convert or remove it"
            )
        cases: dict[str, list[Path]] = {}
        for file in files:
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
            # One file may hold all channels, as RGB images do.
            expected = [f"{case}_{i:04d}{self.file_ending}" for i in range(self.num_channels)]
            if [p.name for p in channels] not in (expected, expected[:1]):
                raise CaseError(
                    f"Case {case} in {path} has the channels {', '.join(p.name for p in channels)}, but the dataset "
                    f"has {self.num_channels}: {', '.join(expected)}"
                )
        return cases

    def orientation(self, case_files: list[Path]) -> str | None:
        """Axis codes of the first file, such as LPS; None where the format has none."""
        try:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(case_files[0]))
            reader.ReadImageInformation()
            return sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(reader.GetDirection())
        except Exception:
            return None

    @cached_property
    def fingerprint(self) -> dict:
        file = self.preprocessed / "dataset_fingerprint.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing. Run nnUNetv2_extract_fingerprint -d {self.name}")
        return load_json(str(file))

    def spacing_warning(self, spacing) -> str | None:
        """What is unusual about a spacing in mm (array axis order), against the labeled cases."""
        labeled = np.asarray(self.fingerprint["spacings"])
        low, high = labeled.min(0) / SPACING_RATIO, labeled.max(0) * SPACING_RATIO
        if np.all((spacing >= low) & (spacing <= high)):
            return None
        shown = " x ".join(f"{s:.3g}" for s in spacing)
        usual = " x ".join(f"{a:.3g}-{b:.3g}" for a, b in zip(labeled.min(0), labeled.max(0)))
        return f"spacing {shown} mm is far from the labeled cases' {usual} mm. Check the header, or leave the case out"


def read_images(files: list[Path], plans: PlansManager, num_channels: int) -> tuple[np.ndarray, dict]:
    """The case's (C, Z, Y, X) images and properties, read as nnU-Net reads them and checked.

    Raises:
        CaseError: naming the file, if it is damaged, 4D, or has voxels that are no numbers.
    """
    printed = io.StringIO()
    try:
        for file in files:
            check_nifti(file)
        with redirect_stdout(printed):
            data, properties = plans.image_reader_writer_class().read_images([str(f) for f in files])
    except CaseError:
        raise
    except Exception as error:
        reason = " ".join(f"{printed.getvalue()} {error}".split())[:300]
        raise CaseError(f"{files[0]} cannot be read ({reason}). Copy or convert it again, or remove it") from None
    if len(data) != num_channels:
        raise CaseError(
            f"{files[0]} holds {len(data)} channel(s) or volumes, but the dataset has {num_channels} channel(s). Split "
            "a 4D image into one file for each time point, and give one file for each channel"
        )
    for channel, file in zip(data, files):
        _check_finite(channel, file)
    return data, properties


def _check_finite(voxels: np.ndarray, file: Path) -> None:
    bad = int(voxels.size - np.isfinite(voxels).sum())
    if bad:
        raise CaseError(f"{file} has {bad} voxels that are NaN or infinite. Replace them (by 0, say), or remove it")


def check_nifti(file: Path) -> None:
    """Read a NIfTI file with nibabel, which complains where SimpleITK does not.

    SimpleITK turns NaN into 0 and fills the missing part of a truncated file with anything, without a word.
    """
    if file.name.endswith((".nii", ".nii.gz")):
        _check_finite(np.asanyarray(nibabel.load(file).dataobj), file)


def content_hash(data: np.ndarray) -> str:
    """A hash of the voxel values and the shape, whatever the file's name, compression and data type."""
    return hashlib.sha1(np.ascontiguousarray(data, dtype=np.float32)).hexdigest() + str(data.shape)
