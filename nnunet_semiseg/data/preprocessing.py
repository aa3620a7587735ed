"""Images, and labels where there are some, made ready for training with a dataset's plans."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_semiseg.data.unlabeled import DIGEST_KEY, preprocessing_digest
from nnunet_semiseg.datasets import Dataset, orientation, read_images
from nnunet_semiseg.parallel import over_cases

# In the order in which they appear under their final name: a case counts as done once it has its properties.
STORED_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")


def preprocess_cases(
    dataset: Dataset,
    plans_name: str,
    configuration_name: str,
    images: Mapping[str, list[Path]],
    folder: Path,
    processes: int,
    labels: Mapping[str, Path] | None = None,
) -> list[str]:
    """Run nnU-Net's preprocessor on the cases that ``folder`` lacks.

    Args:
        images: {case: its channel files}.
        folder: Where the preprocessed cases go; a case that is there is complete.
        labels: {case: label map} of labeled cases; None for unlabeled ones.

    Returns:
        One line for each case that failed; the others are done.
    """
    missing = [case for case in images if not (folder / f"{case}.pkl").is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that a rename publishes a finished file; not inside the folder, because nnU-Net looks
    # at every file there.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    usual = None
    try:
        files, _ = next(iter(dataset.labeled_files.values()), ([], None))
        if missing and files:
            reader = dataset.plans(plans_name).image_reader_writer_class
            usual = orientation(read_images(files, reader, dataset.num_channels)[1])
    except (ValueError, OSError) as error:
        print(f"Warning: orientations are not compared with the labeled cases' ({error})", file=sys.stderr)
    jobs = {
        case: (
            *(dataset.name, plans_name, configuration_name, case, images[case]),
            *(labels and labels[case], unfinished, folder, usual),
        )
        for case in missing
    }
    try:
        warnings, failures = over_cases(
            _preprocess_case,
            jobs,
            processes,
            f"{dataset.name} {configuration_name}",
            done=len(images) - len(missing),
        )
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for warning in chain.from_iterable(warnings.values()):
        print(f"Warning: {warning}", file=sys.stderr)
    return failures


def _preprocess_case(
    name: str,
    plans_name: str,
    configuration_name: str,
    case: str,
    files: list[Path],
    label: Path | None,
    unfinished: str | Path,
    folder: Path,
    usual: str | None,
) -> list[str]:
    """One case, from its images to its three files under their final names. Returns warnings."""
    dataset = Dataset(name)
    plans = dataset.plans(plans_name)
    configuration = plans.get_configuration(configuration_name)
    _, properties, warnings = read_images(files, plans.image_reader_writer_class, dataset.num_channels)
    odd_spacing = dataset.spacing_warning(np.asarray(properties["spacing"]))
    if odd_spacing:
        warnings.append(f"{case}: {odd_spacing}")
    own = orientation(properties)
    if own != usual and None not in (own, usual):
        warnings.append(
            f"{case}: orientation {own}, the labeled cases are {usual}. nnU-Net does not reorient images; reorient the "
            "file, or leave the case out"
        )
    target = Path(unfinished) / case
    try:
        configuration.preprocessor_class(verbose=False).run_case_save(
            str(target), [str(f) for f in files], label and str(label), plans, configuration, dataset.json
        )
        if label is None:
            properties = load_pickle(f"{target}.pkl")
            # nnU-Net's loader expects the key; an unlabeled case has no locations to offer.
            write_pickle(
                {**properties, "class_locations": {}, DIGEST_KEY: preprocessing_digest(plans, configuration)},
                f"{target}.pkl",
            )
        # Read back what a full disk may have cut off.
        written, *_ = nnUNetDatasetBlosc2(str(unfinished), [case]).load_case(case)
        written[:]
    except Exception as error:
        free = shutil.disk_usage(unfinished).free / 1e6
        for suffix in STORED_SUFFIXES:
            Path(f"{target}{suffix}").unlink(missing_ok=True)
        raise OSError(
            f"case {case} could not be written to {folder} ({type(error).__name__}: {error}; {free:.0f} MB are free "
            "there). If the disk is full, free some space; then run the command again: finished cases are kept"
        ) from None
    for suffix in STORED_SUFFIXES:
        os.replace(f"{target}{suffix}", folder / f"{case}{suffix}")
    return warnings
