"""A plain nnU-Net model folder."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_semiseg.files import read_json
from nnunet_semiseg.inference.resampling import Resampling

SCHEMES = (
    "CTNormalization",
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
_PLANS_KEYS = ("configurations", "image_reader_writer", "transpose_forward", "transpose_backward")


@dataclass(frozen=True)
class Model:
    """A model folder with one configuration.

    Args:
        folder: With plans.json, dataset.json and fold_*.
        name: Of the configuration, such as 3d_fullres.
        plans: The content of plans.json.
        dataset_json: The content of dataset.json.
        checkpoints: Of each fold that takes part. A file may be missing if its network is there for OpenVINO.
        mirroring_axes: Along which nnU-Net may mirror what it predicts, or None.
    """

    folder: Path
    name: str
    plans: dict
    dataset_json: dict
    checkpoints: tuple[Path, ...]
    mirroring_axes: tuple[int, ...] | None

    @cached_property
    def configuration(self) -> dict:
        return resolve(self.plans, self.name, self.folder / "plans.json")

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(self.configuration["patch_size"])

    @property
    def file_ending(self) -> str:
        return self.dataset_json["file_ending"]

    @property
    def channels(self) -> int:
        return len(self.dataset_json.get("modality", self.dataset_json.get("channel_names", ())))

    @cached_property
    def regions(self) -> tuple[int, ...] | None:
        """The label that each region is painted with, in order; None for a model of classes."""
        return regions(self.dataset_json)

    @cached_property
    def outputs(self) -> int:
        """How many classes or regions the network has."""
        return len(self.regions) if self.regions else len(all_labels(self.dataset_json))

    def intensities(self, channel: int) -> dict:
        # By its name in older plans.
        names = ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality")
        return next(self.plans[name] for name in names if name in self.plans)[str(channel)]

    def resampling(self, what: str) -> Resampling:
        """How ``data`` or ``probabilities`` are resampled."""
        return Resampling.of(self.configuration, what)

    def check(self) -> None:
        """Raises NotImplementedError with one line, if it needs more than this runner has."""
        configuration, file = self.configuration, self.folder / "plans.json"
        if configuration.get("previous_stage"):
            raise NotImplementedError(
                f"{self.folder}: {self.name} is the second stage of a cascade, which needs the label maps of "
                f"{configuration['previous_stage']}. Use nnUNetv2_predict -prev_stage_predictions, or another "
                "configuration"
            )
        if configuration.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
            raise NotImplementedError(
                f"{file}: {self.name} is preprocessed with {configuration['preprocessor_name']}, which only "
                "nnUNetv2_predict runs"
            )
        if self.plans.get("label_manager", "LabelManager") != "LabelManager":
            raise NotImplementedError(
                f"{file}: its labels are those of {self.plans['label_manager']}, which only nnUNetv2_predict reads"
            )
        schemes = configuration["normalization_schemes"]
        unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
        if unknown:
            raise NotImplementedError(f"{file}: {self.name} normalizes with {unknown[0]}. Use nnUNetv2_predict")
        if len(schemes) != self.channels:
            raise ValueError(
                f"{self.folder}: plans.json has {len(schemes)} channels, dataset.json {self.channels}. Restore both "
                "from the same training"
            )
        if not self.outputs:
            raise ValueError(f"{self.folder / 'dataset.json'} has no labels. Restore it from the training")
        self.resampling("data")
        self.resampling("probabilities")


def resolve(plans: dict, name: str, file: Path) -> dict:
    """A configuration with what it inherits. Raises ValueError naming ``file``, if there is none."""
    chain: list[dict] = []
    seen: list[str] = []
    following: str | None = name
    while following:
        if following in seen or following not in plans["configurations"]:
            raise ValueError(f"{file} has no configuration {following}. It has {', '.join(plans['configurations'])}")
        seen.append(following)
        chain.append(plans["configurations"][following])
        following = chain[-1].get("inherits_from")
    resolved: dict[str, Any] = {}
    for configuration in reversed(chain):
        resolved |= configuration
    return resolved


def all_labels(dataset_json: dict) -> list[int]:
    """All label values but the ignored one, sorted."""
    values = [value for name, value in dataset_json["labels"].items() if name != "ignore"]
    return sorted({int(v) for value in values for v in np.atleast_1d(value)})


def regions(dataset_json: dict) -> tuple[int, ...] | None:
    """nnU-Net's regions_class_order, if any label has several values, or None. Raises ValueError, if it is missing."""
    labels = dataset_json["labels"]
    if not any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values()):
        return None
    if "regions_class_order" not in dataset_json:
        raise ValueError("dataset.json has regions but no regions_class_order. Restore it from the training")
    return tuple(int(value) for value in dataset_json["regions_class_order"])


def read(folder: Path) -> tuple[dict, dict]:
    """plans.json and dataset.json of a model folder.

    Raises:
        OSError, ValueError: naming the folder or file, and the cure.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}")
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, so it is no model folder of nnU-Net. Give the folder above fold_0"
            )
    cure = "Restore it from the training"
    plans = read_json(folder / "plans.json", _PLANS_KEYS, cure)
    return plans, read_json(folder / "dataset.json", ("labels", "file_ending"), cure)


def find_checkpoints(folder: Path, folds: Sequence[str] | None, name: str) -> tuple[Path, ...]:
    """The checkpoints of folds; by default of all that nnU-Net would find, without ``all`` if there are others.

    Args:
        name: Of the checkpoint, such as checkpoint_final.pth.

    Raises:
        FileNotFoundError: naming the folder and what it has.
    """
    there = {path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{name}")}
    there |= {path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{converted(Path(name)).name}")}
    found = sorted(there, key=lambda fold: (len(fold), fold))
    if folds is None:
        folds = [fold for fold in found if fold != "all"] or found
    missing = [fold for fold in folds if fold not in there]
    if missing or not folds:
        which = f"no fold {missing[0]} with {name}" if missing else f"no fold with {name}"
        has = f"folds {', '.join(found)}" if found else _checkpoints(folder)
        raise FileNotFoundError(f"{folder} has {which}. It has {has}")
    return tuple(folder / f"fold_{fold}" / name for fold in folds)


def _checkpoints(folder: Path) -> str:
    found: Iterable[str] = sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/checkpoint_*.pth"))
    return ", ".join(found) or "no checkpoint"


def converted(checkpoint: Path) -> Path:
    """Where the network of a checkpoint is for OpenVINO: two files that end in .xml and .bin."""
    return checkpoint.with_suffix(".xml")


def fingerprint(checkpoint: Path) -> str:
    """Tells checkpoints from each other, by the check sums that the archive has of its parts: reads a few kilobytes."""
    if not zipfile.is_zipfile(checkpoint):
        return hashlib.sha1(checkpoint.read_bytes()).hexdigest()
    with zipfile.ZipFile(checkpoint) as archive:
        # The first folder is named after the file it was written as.
        parts = [(p.filename.partition("/")[2], p.CRC, p.file_size) for p in archive.infolist()]
    return hashlib.sha1(repr(parts).encode()).hexdigest()
