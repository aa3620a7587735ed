"""Unlabeled cases: where they lie on disk, and how training reads them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_semiseg.files import whole

# The key under which a preprocessed case remembers with what it was made.
DIGEST_KEY = "semiseg_preprocessing"


def store_folder(preprocessed_folder: str | os.PathLike) -> Path:
    """Folder of the preprocessed unlabeled cases, beside the labeled one.

    Never inside it: nnU-Net takes every case of the labeled folder for a labeled case.

    Args:
        preprocessed_folder: ``<nnUNet_preprocessed>/<Dataset>/<data_identifier>``.
    """
    folder = Path(preprocessed_folder)
    return folder.with_name(folder.name + "_unlabeled")


def store_identifiers(store: Path) -> list[str]:
    """The complete cases of a store, sorted. A case's properties are written last."""
    return sorted(path.stem for path in store.glob("[!.]*.pkl")) if store.is_dir() else []


def preprocessing_digest(plans: PlansManager, configuration: ConfigurationManager) -> str:
    """A fingerprint of all in the plans that decides what a preprocessed case looks like."""
    settings = {
        key: configuration.configuration.get(key)
        for key in (
            "preprocessor_name",
            "spacing",
            "normalization_schemes",
            "use_mask_for_norm",
            "resampling_fn_data",
            "resampling_fn_data_kwargs",
        )
    }
    settings["transpose_forward"] = plans.transpose_forward
    settings["intensities"] = plans.foreground_intensity_properties_per_channel
    settings["reader"] = plans.plans["image_reader_writer"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_store(store: Path, plans: PlansManager, configuration: ConfigurationManager, cure: str) -> list[str]:
    """The store's cases, after a check that they were made with these plans.

    Raises:
        ValueError: naming the first case that was not; ``cure`` is the command that fixes it.
    """
    identifiers = store_identifiers(store)
    expected = preprocessing_digest(plans, configuration)
    for identifier in identifiers:
        try:
            digest = load_pickle(str(store / f"{identifier}.pkl")).get(DIGEST_KEY)
        except Exception as error:
            raise ValueError(f"{store / identifier}.pkl is damaged ({error}). Run: {cure} --overwrite") from None
        if digest != expected:
            raise ValueError(
                f"Unlabeled case {identifier} in {store} was preprocessed with other plans than "
                f"{plans.plans_name}. Run: {cure} --overwrite"
            )
    return identifiers


class ForegroundLocations:
    """Voxels that the network calls foreground, in a file that the loader's worker processes read.

    The file has the cases, and one (N, 5) int32 table of case, class, z, y, x; voxels are those of the preprocessed
    image.
    """

    def __init__(self, file: str | os.PathLike):
        self.file = Path(file)
        self._stamp: tuple[int, int] | None = None
        self._rows: dict[str, np.ndarray] = {}

    def of(self, identifier: str) -> dict:
        """{class: (N, 4) int32 of (0, z, y, x)} of a case, as nnU-Net's own ``class_locations``.

        Empty before the case's first prediction.
        """
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return {}
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            with np.load(self.file) as archive:
                cases, rows = archive["cases"], archive["rows"]
            # Sorted by case.
            parts = np.split(rows, np.searchsorted(rows[:, 0], np.arange(1, len(cases))))
            self._rows = dict(zip(cases.tolist(), parts))
            self._stamp = stamp
        rows = self._rows.get(identifier, np.empty((0, 5), np.int32))
        return {int(k): np.pad(rows[rows[:, 1] == k, 2:], ((0, 0), (1, 0))) for k in np.unique(rows[:, 1])}

    def write(self, locations: dict) -> None:
        """Replace the file's content, in one step for its readers.

        Args:
            locations: {case: what ``of`` returns for it}.
        """
        rows = [
            np.column_stack((np.full(len(voxels), i), np.full(len(voxels), k), voxels[:, 1:]))
            for i, by_class in enumerate(locations.values())
            for k, voxels in by_class.items()
        ]
        table = np.concatenate([np.empty((0, 5), np.int32), *rows]).astype(np.int32)
        with whole(self.file) as temporary:
            np.savez(temporary, cases=np.array(list(locations)), rows=table)


class UnlabeledDataset(nnUNetBaseDataset):
    """Images without labels, from the store and from labeled cases whose labels this fold must not see.

    Whatever a source offers as segmentation or ``class_locations`` is dropped here, at the only door to the data:
    what training gets in their place is zeros, and the network's own foreground voxels if sampling asks for them.

    Args:
        sources: Pairs of folder and identifiers.
        locations: Where to look up foreground voxels, or None.
    """

    def __init__(self, sources: list[tuple[str, list[str]]], locations: ForegroundLocations | None = None):
        self._source_of = {}
        for folder, identifiers in sources:
            if identifiers:
                dataset = infer_dataset_class(str(folder))(str(folder), list(identifiers))
                self._source_of.update(dict.fromkeys(identifiers, dataset))
        self.identifiers = sorted(self._source_of)
        self.locations = locations

    def load_case(self, identifier: str) -> tuple[np.ndarray, np.ndarray, None, dict]:
        """(data, zeros, None, properties), as nnU-Net's datasets return it; data is (C, Z, Y, X), lazily read."""
        data, *_ = self._source_of[identifier].load_case(identifier)
        # A view of a single zero: no memory, and cropping works as for any array.
        no_segmentation = np.broadcast_to(np.int8(0), (1, *data.shape[1:]))
        locations = self.locations.of(identifier) if self.locations is not None else {}
        return data, no_segmentation, None, {"class_locations": locations}

    @staticmethod
    def save_case(data: np.ndarray, seg: np.ndarray, properties: dict, output_filename_truncated: str) -> None:
        raise NotImplementedError("unlabeled cases are written by `nnunet_semiseg preprocess`")

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        return store_identifiers(Path(folder))


class UnlabeledDataLoader(nnUNetDataLoader):
    """nnU-Net's loader over an UnlabeledDataset: crops anywhere in the volume, or centered on predicted foreground.

    Args as for nnUNetDataLoader; ``oversample_foreground_percent`` is the probability of centering a crop on a voxel
    of a random class that the network predicts in the case.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, probabilistic_oversampling=True, **kwargs)
        # With an ignore label nnU-Net crops around annotated voxels; here nothing is annotated.
        self.has_ignore = False

    def generate_train_batch(self) -> dict:
        """{weak, strong: (B, C, *) float32, keys: the cases}."""
        batch = super().generate_train_batch()
        weak, strong = batch["data"].chunk(2, dim=1)
        return {"weak": weak, "strong": strong, "keys": [str(key) for key in batch["keys"]]}
