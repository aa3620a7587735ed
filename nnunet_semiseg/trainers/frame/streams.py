"""The labeled and the unlabeled batches of a training."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnunet_semiseg.data.splits import hidden_cases
from nnunet_semiseg.data.unlabeled import (
    ForegroundLocations,
    UnlabeledDataLoader,
    UnlabeledDataset,
    check_store,
    store_folder,
)
from nnunet_semiseg.data.views import TwoViewTransform
from nnunet_semiseg.data.workers import Augmenter
from nnunet_semiseg.trainers.frame.hooks import as_key
from nnunet_semiseg.trainers.frame.part import Part


class Streams(Part):
    """Mixin: which cases a training may see, and the loaders that draw from them."""

    @property
    def _preprocess_command(self) -> str:
        plans = self.plans_manager
        return f"nnunet_semiseg preprocess -d {plans.dataset_name} -c {self.configuration_name} -p {plans.plans_name}"

    @property
    def _splits_file(self) -> Path:
        return Path(self.preprocessed_dataset_folder_base) / "splits_final.json"

    def _hidden_cases(self) -> list[str]:
        """Labeled cases whose labels this fold hides, after a check of the fold."""
        known = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        return hidden_cases(self._splits_file, self.fold, known)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's, after a check of the fold: labels are read through here, and not otherwise."""
        self._hidden_cases()
        return super().do_split()

    def unlabeled_dataset(self) -> UnlabeledDataset:
        """All unlabeled cases of this fold: the store, and the labeled cases whose labels the fold hides.

        Raises:
            ValueError: if there are none, or they do not fit to this training.
        """
        labeled_folder = Path(self.preprocessed_dataset_folder)
        store = store_folder(labeled_folder)
        labeled_cases = self.dataset_class.get_identifiers(str(labeled_folder))
        hidden = self._hidden_cases()
        stored = check_store(store, self.plans_manager, self.configuration_manager, self._preprocess_command)
        twice = sorted(set(stored) & set(labeled_cases))
        if twice:
            raise ValueError(
                f"Case {twice[0]} is both labeled and unlabeled. Remove or rename it in imagesUn, and delete its files "
                f"in {store}"
            )
        if not stored and not hidden:
            raise ValueError(
                f"There are no unlabeled cases for {self.configuration_name}: {store} has none, and "
                f"fold {self.fold} of splits_final.json hides none. Put images into imagesUn and run: "
                f"{self._preprocess_command}"
            )
        self.print_to_log_file(
            f"Unlabeled cases: {len(stored)} from {store.name}, {len(hidden)} with hidden labels", add_timestamp=False
        )
        locations = ForegroundLocations(self._foreground_file) if self.options.unlabeled_foreground_sampling else None
        return UnlabeledDataset([(str(store), stored), (str(labeled_folder), hidden)], locations)

    def _check_labeled_classes(self) -> None:
        """Find the classes that are in none of the labeled training cases.

        Raises:
            ValueError: if there are any, and ``allow_absent_classes`` is off.
        """
        dataset, _ = self.get_tr_and_val_datasets()
        if not dataset.identifiers:
            raise ValueError(f"Fold {self.fold} has no labeled training cases. Write it with nnunet_semiseg split")
        self.trained_on.update(map(str, dataset.identifiers))
        absent = dict(zip(self.class_names, map(as_key, self.labels.foreground_names)))
        for case in dataset.identifiers:
            locations = dataset.load_case(case)[3]["class_locations"]
            absent = {name: key for name, key in absent.items() if len(locations.get(key, ())) == 0}
            if not absent:
                break
        self.absent_classes = set(absent)
        if not absent:
            return
        named = ", ".join(absent)
        message = f"No labeled training case of fold {self.fold} contains {named}, so it cannot be learned"
        if not self.options.allow_absent_classes:
            raise ValueError(
                f"{message}. Choose labeled cases that contain it (nnunet_semiseg split --labeled-cases ...), or train "
                f"{self.__class__.__name__}_allow_absent_classes=true"
            )
        self.print_to_log_file(f"WARNING: {message}.")

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net's, of the labeled and of the unlabeled batch."""
        super()._set_batch_size_and_oversample()
        if self.options.half_batches:
            self.batch_size = math.ceil(self.batch_size / 2)

    @cached_property
    def _target_transforms(self) -> list:
        """The same objects for both streams, so that the unlabeled one knows which to leave out."""
        return list(self.target_transforms())

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """nnU-Net's, and what the method adds."""
        transforms = super().get_training_transforms(*args, **kwargs)
        transforms.transforms.extend(self._target_transforms)
        return transforms

    def _unlabeled_loader(self, dataset: UnlabeledDataset) -> Augmenter:
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size = self.configuration_manager.patch_size
        transforms = self.get_training_transforms(
            patch_size,
            rotation,
            None,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )
        loader = UnlabeledDataLoader(
            dataset,
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            oversample_foreground_percent=self.options.unlabeled_foreground_sampling,
            transforms=TwoViewTransform(transforms, self.options.strong_view, self._target_transforms),
        )
        # The labeled loader keeps nnU-Net's number of processes; a step with both halves takes twice as long, so half
        # of it keeps up.
        return self._augmenter(loader, "unlabeled", 0.5)

    @property
    def _foreground_file(self) -> Path:
        return Path(self.output_folder) / f"unlabeled_foreground_{self.local_rank}.npz"
