"""``nnunet_semiseg doctor``: is everything in place, and if not, what to do."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import nnunet_semiseg
from nnunet_semiseg import DISCOVERY_FOLDER

if TYPE_CHECKING:
    import numpy as np

    from nnunet_semiseg.datasets import Dataset

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class Report:
    """Prints findings as they come, counts the problems, and keeps which checks could not be made."""

    def __init__(self) -> None:
        self.problems = 0
        self.not_checked: list[str] = []

    def ok(self, text: str) -> None:
        print(f"  ok       {text}")

    def warn(self, text: str, cure: str) -> None:
        print(f"  warning  {text}\n           -> {cure}")

    def problem(self, text: str, cure: str) -> None:
        self.problems += 1
        print(f"  PROBLEM  {text}\n           -> {cure}")

    def could_not_check(self, checks: str, text: str, cure: str) -> None:
        """A problem because of which ``checks`` say nothing."""
        self.problem(text, cure)
        self.not_checked.append(checks)

    def summary(self) -> str:
        if not self.problems:
            return "No problems."
        checks = list(dict.fromkeys(self.not_checked))
        not_checked = f" Not checked: {'; '.join(checks)}." if checks else ""
        return f"{self.problems} problem(s).{not_checked}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", help="also check this dataset (id or name)")
    parser.add_argument("-p", "-plans_name", default=None, help="plans to check (default: all of the dataset)")
    parser.add_argument("--trainers", action="store_true", help="list the trainers and their files")


def run(args: argparse.Namespace) -> int:
    report = Report()
    if args.d:
        _check_dataset(report, args.d, args.p)
    print("Installation")
    _check_versions(report)
    print("Folders")
    _check_folders(report)
    print("Trainers")
    _check_discovery(report, args.trainers)
    print(report.summary())
    return 1 if report.problems else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_versions(report: Report) -> None:
    report.ok(f"Python {platform.python_version()} ({sys.executable}), nnunet_semiseg {nnunet_semiseg.__version__}")
    nnunet = _version("nnunetv2")
    if nnunet is None or not ((2, 8, 1) <= tuple(int(p) for p in nnunet.split(".")[:3] if p.isdigit()) < (2, 9)):
        report.problem(f"nnunetv2 is {nnunet or 'missing'}", 'pip install "nnunetv2>=2.8.1,<2.9"')
        return
    import nnunetv2

    report.ok(f"nnunetv2 {nnunet} ({nnunetv2.__path__[0]})")
    try:
        import torch
        import torchvision  # noqa: F401  (fails to import where it does not match torch)
    except Exception as error:
        report.problem(
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not work together ({error}); "
            "nnU-Net's search for trainers then fails",
            "pip install --upgrade --force-reinstall torch torchvision (both at once, from the same source)",
        )
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only (nnUNetv2_train ... -device cpu)"
    report.ok(f"torch {torch.__version__} and torchvision {torchvision.__version__}; device: {device}")


def _check_folders(report: Report) -> None:
    for name in _FOLDERS:
        value = os.environ.get(name)
        if not value:
            report.problem(f"{name} is not set", f"export {name}=/a/folder/of/yours")
        elif not os.path.isdir(value) and value.strip("\"'") != value:
            report.problem(f"{name} is {value}, including quotation marks", "set it without them")
        elif not os.path.isdir(value):
            report.problem(f"{name} is {value}, which is not a folder", f"mkdir -p {value}")
        elif not os.access(value, os.W_OK) and name != "nnUNet_raw":
            report.problem(
                f"{name} is {value}, which you cannot write to", "choose another folder or fix its permissions"
            )
        else:
            report.ok(f"{name} = {value}")


def _check_discovery(report: Report, listed: bool) -> None:
    import contextlib
    import inspect
    import io

    from nnunet_semiseg.trainers.registry import TRAINERS

    if DISCOVERY_FOLDER not in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep):
        report.problem(
            "nnUNet_extTrainer, where nnU-Net searches, does not name this package (nnunet_semiseg.pth did not run)",
            f"pip install --force-reinstall --no-deps nnunet-semiseg, or export nnUNet_extTrainer={DISCOVERY_FOLDER}",
        )
        return
    here = []
    for name in TRAINERS:
        try:
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            with contextlib.redirect_stdout(io.StringIO()):
                found = recursive_find_trainer_class_by_name(name)
        except Exception as error:
            report.problem(f"nnU-Net does not find {name} ({error})", "read the error; reinstall the package it names")
            continue
        file = inspect.getfile(found)
        if not found.__module__.startswith("nnunet_semiseg."):
            report.problem(f"nnU-Net takes {name} from {file}, not from this package", "rename or remove that class")
        else:
            here.append(f"{name}: {file}")
    if listed:
        for line in here:
            report.ok(line)
    elif here:
        report.ok(f"nnU-Net finds {len(here)} of {len(TRAINERS)} trainers in {Path(nnunet_semiseg.__file__).parent}")


# What _check_images looks for, if there are images of both kinds.
_IMAGE_CHECKS = "labeled scans among the unlabeled ones, spacing, orientation and intensities"


def _check_dataset(report: Report, name_or_id: str, plans_name: str | None) -> None:
    try:
        from nnunet_semiseg.datasets import Dataset, dataset_name
        from nnunet_semiseg.segmentations import Classes
    except Exception as error:
        print(f"Dataset {name_or_id}")
        report.could_not_check("the dataset", f"nnU-Net cannot be imported ({error})", "see Installation below")
        return
    try:
        dataset = Dataset(dataset_name(name_or_id))
        print(f"Dataset {dataset.name}")
        classes = Classes.from_file(dataset.json_file)
        labeled = dataset.labeled_cases()
    except (ValueError, OSError) as error:
        report.could_not_check("the dataset", str(error), "see nnU-Net's documentation of the dataset format")
        return
    try:
        classes.check_order(dataset.json_file)
    except ValueError as error:
        report.problem(
            str(error), "predictions, consensus and pseudo labels would have wrong labels; correct it and train again"
        )
    if labeled:
        report.ok(f"{len(labeled)} labeled cases")
    else:
        report.problem("there are no labeled cases", f"put labels into {dataset.raw / 'labelsTr'}")
    images = {}
    try:
        images["imagesTr"] = {case: files for case, (files, _) in dataset.labeled_files.items()}
    except (ValueError, OSError) as error:
        report.could_not_check(_IMAGE_CHECKS, str(error), "needed for every comparison with the labeled images")
    _check_labeled_files(report, dataset, images.get("imagesTr", {}))
    if (dataset.raw / "imagesUn").exists() or not _hides_labels(dataset):
        try:
            images["imagesUn"] = dataset.images("imagesUn")
            report.ok(f"{len(images['imagesUn'])} unlabeled cases, {dataset.num_channels} channel(s) each")
        except FileNotFoundError as error:
            report.problem(str(error), "or hide labels of labeled cases: nnunet_semiseg split")
        except (ValueError, OSError) as error:
            report.could_not_check(_IMAGE_CHECKS, str(error), "then run nnunet_semiseg doctor again")
    both = sorted(set(images.get("imagesTr", {})) & set(images.get("imagesUn", {})))
    if both:
        report.problem(f"{', '.join(both[:5])} is in imagesTr and in imagesUn", "remove or rename it in imagesUn")
    names = [plans_name] if plans_name else dataset.plans_names()
    if names:
        _check_images(report, dataset, images, names[0])
    else:
        report.could_not_check(
            _IMAGE_CHECKS, "the dataset is not planned", f"nnUNetv2_plan_and_preprocess -d {dataset.number}"
        )
    _check_plans(report, dataset, names)


def _check_labeled_files(report: Report, dataset: Dataset, images: dict) -> None:
    """Names that nnU-Net takes for cases or channels, and label maps that are missing."""
    from nnunet_semiseg.datasets import CaseError, check_there

    folder = dataset.raw / "imagesTr"
    for case, files in images.items():
        checks: list[tuple[Callable, tuple]] = [(check_there, (dataset.labeled_files[case][1],))]
        # How files that dataset.json lists are called does not matter.
        if "dataset" not in dataset.json:
            checks.insert(0, (dataset.check_channels, (case, files, folder)))
        for check, arguments in checks:
            try:
                check(*arguments)
            except CaseError as error:
                report.problem(str(error), "nnU-Net plans and trains with what is there")
        # What is too many is reported, and the rest is still compared.
        del files[dataset.num_channels :]
    hidden = sorted(p.name for p in folder.glob(f".*{dataset.file_ending}")) if "dataset" not in dataset.json else ()
    if hidden:
        report.problem(
            f"nnU-Net takes the hidden file {folder / hidden[0]} for a case ({len(hidden)} such files)",
            f"find {folder} -name '.*' -type f -delete",
        )


def _hides_labels(dataset: Dataset) -> bool:
    """Whether a fold of splits_final.json withholds labels, so that the dataset needs no imagesUn."""
    from nnunet_semiseg.data.splits import all_hidden_cases

    try:
        return bool(all_hidden_cases(dataset.splits_file))
    except ValueError:
        # Reported where the folds are checked.
        return False


def _check_images(report: Report, dataset: Dataset, images: dict, plans_name: str) -> None:
    """Read every image once: damage, content that occurs twice, spacing, orientation and intensities."""
    import numpy as np
    from tqdm import tqdm

    from nnunet_semiseg.datasets import INTENSITY_SDS, CaseError, content_hash, orientation, read_images

    try:
        reader = dataset.plans(plans_name).image_reader_writer_class
    except (ValueError, OSError):
        # _check_plans tells.
        report.not_checked.append(_IMAGE_CHECKS)
        return
    unread = 0
    hashes: dict[str, tuple[str, str]] = {}
    statistics: dict[str, dict[str, tuple]] = {"imagesTr": {}, "imagesUn": {}}
    orientations: dict[str, dict[str, str | None]] = {"imagesTr": {}, "imagesUn": {}}
    with tqdm(total=sum(map(len, images.values())), desc="Reading images", unit="case", leave=False) as bar:
        for folder, cases in images.items():
            for case, files in cases.items():
                bar.update()
                try:
                    data, properties, warnings = read_images(files, reader, dataset.num_channels)
                except CaseError as error:
                    report.problem(str(error), "fix, replace or remove the file")
                    unread += 1
                    continue
                for warning in warnings:
                    report.warn(f"{folder}/{case}: {warning}", "correct the file's header, or the file next to it")
                key = content_hash(data)
                if key in hashes and folder == "imagesUn":
                    where, other = hashes[key]
                    message = f"imagesUn/{case} has the same voxels as {where}/{other}"
                    if where == "imagesTr":
                        report.problem(message, f"remove {case} from imagesUn: it is not a new case")
                    else:
                        report.warn(message, f"remove one of the two: {case} counts twice")
                hashes.setdefault(key, (folder, case))
                foreground = data[:, (data != data.min()).any(0)]
                if foreground.size:
                    statistics[folder][case] = tuple(np.median(foreground, 1))
                orientations[folder][case] = orientation(properties)
                if folder == "imagesUn":
                    odd = _spacing_warning(report, dataset, np.asarray(properties["spacing"]))
                    if odd:
                        message, cure = odd.split(". ", 1)
                        report.warn(f"imagesUn/{case}: {message}", cure)
    if unread:
        report.not_checked.append(f"the images of {unread} case(s)")
    usual = set(orientations["imagesTr"].values())
    for case, own in orientations["imagesUn"].items():
        if usual and own not in usual:
            report.warn(
                f"imagesUn/{case}: orientation {own}, labeled cases are {', '.join(map(str, usual))}",
                "reorient the file: nnU-Net does not",
            )
    if len(statistics["imagesTr"]) < 2:
        return
    labeled = np.asarray(list(statistics["imagesTr"].values()))
    center = labeled.mean(0)
    # Of few and similar cases the SD is far too small a yardstick.
    spread = np.maximum(labeled.std(0), 0.1 * np.abs(center) + 1e-6)
    for case, medians in statistics["imagesUn"].items():
        off = np.abs(np.asarray(medians) - center) / spread
        for channel in np.flatnonzero(off > INTENSITY_SDS):
            report.warn(
                f"imagesUn/{case}: median intensity {medians[channel]:.4g} in channel {channel}, labeled cases have "
                f"{center[channel]:.4g} +- {spread[channel]:.4g}",
                "check the file's units and modality",
            )


def _spacing_warning(report: Report, dataset: Dataset, spacing: np.ndarray) -> str | None:
    try:
        return dataset.spacing_warning(spacing)
    except (ValueError, OSError) as error:
        if "spacing" not in report.not_checked:
            report.could_not_check("spacing", str(error), "spacings are compared with those in the fingerprint")
        return None


def _check_plans(report: Report, dataset: Dataset, names: list[str]) -> None:
    from nnunet_semiseg.data.splits import hidden_cases, read_splits
    from nnunet_semiseg.data.unlabeled import check_store, store_folder

    for name in names:
        try:
            plans = dataset.plans(name)
        except (ValueError, OSError) as error:
            report.problem(str(error), "plan first")
            continue
        for configuration_name in plans.available_configurations:
            configuration = plans.get_configuration(configuration_name)
            folder = dataset.preprocessed / configuration.data_identifier
            if configuration.previous_stage_name is not None or not folder.is_dir():
                continue
            command = f"nnunet_semiseg preprocess -d {dataset.name} -c {configuration_name} -p {name}"
            try:
                cases = check_store(store_folder(folder), plans, configuration, command)
            except ValueError as error:
                report.problem(str(error), f"{command} --overwrite")
                continue
            message = f"{name} {configuration_name}: {len(cases)} unlabeled cases preprocessed"
            if cases:
                report.ok(message)
            elif (dataset.raw / "imagesUn").exists():
                report.warn(message, command)
    splits = dataset.splits_file
    if splits.is_file():
        try:
            folds = len(read_splits(splits))
        except ValueError as error:
            message, cure = str(error).rsplit(". ", 1)
            report.problem(message, cure)
            folds = 0
        for fold in range(folds):
            try:
                hidden = hidden_cases(splits, fold, dataset.labeled_cases())
                report.ok(f"splits_final.json, fold {fold}: {len(hidden)} cases with hidden labels")
            except ValueError as error:
                report.problem(str(error), f"nnunet_semiseg split -d {dataset.name} --overwrite ...")
    unfinished = [p for p in Path(dataset.preprocessed).glob("*.unfinished")]
    if unfinished:
        report.warn(f"{unfinished[0].name}: a preprocessing was interrupted", "run nnunet_semiseg preprocess again")
