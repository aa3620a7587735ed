"""``nnunet_semiseg doctor``: is everything in place, and if not, what to do."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nnunet_semiseg
from nnunet_semiseg import DISCOVERY_FOLDER

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class Report:
    """Prints findings as they come, and counts the problems."""

    def __init__(self):
        self.problems = 0

    def ok(self, text: str) -> None:
        print(f"  ok       {text}")

    def warn(self, text: str, cure: str) -> None:
        print(f"  warning  {text}\n           -> {cure}")

    def problem(self, text: str, cure: str) -> None:
        self.problems += 1
        print(f"  PROBLEM  {text}\n           -> {cure}")


def add_arguments(parser):
    parser.add_argument("-d", help="also check this dataset (id or name)")
    parser.add_argument("-p", "-plans_name", default=None, help="plans to check (default: all of the dataset)")


def run(args) -> int:
    report = Report()
    print("Installation")
    _check_versions(report)
    print("Folders")
    _check_folders(report)
    print("Trainers")
    _check_discovery(report)
    if args.d:
        _check_dataset(report, args.d, args.p)
    print("No problems." if not report.problems else f"{report.problems} problem(s).")
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
            "nnU-Net's search for trainers fails then",
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
        elif not os.path.isdir(value):
            report.problem(f"{name} is {value}, which is not a folder", f"mkdir -p {value}")
        elif not os.access(value, os.W_OK) and name != "nnUNet_raw":
            report.problem(
                f"{name} is {value}, which you cannot write to", "choose another folder or mend its permissions"
            )
        else:
            report.ok(f"{name} = {value}")


def _check_discovery(report: Report) -> None:
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
            report.ok(f"{name}: {file}")


def _check_dataset(report: Report, name_or_id: str, plans_name: str | None) -> None:
    from nnunet_semiseg.datasets import Dataset, dataset_name

    try:
        dataset = Dataset(dataset_name(name_or_id))
        print(f"Dataset {dataset.name}")
        labeled = dataset.labeled_cases()
    except (ValueError, OSError) as error:
        report.problem(str(error), "see nnU-Net's documentation of the dataset format")
        return
    if labeled:
        report.ok(f"{len(labeled)} labeled cases")
    else:
        report.problem("there are no labeled cases", f"put labels into {dataset.raw / 'labelsTr'}")
    images = {}
    folders = ["imagesTr", "imagesUn"]
    if not (dataset.raw / "imagesUn").exists() and _hides_labels(dataset):
        folders.remove("imagesUn")
    for folder in folders:
        try:
            images[folder] = dataset.images(folder)
            if folder == "imagesUn":
                report.ok(f"{len(images[folder])} unlabeled cases, {dataset.num_channels} channel(s) each")
        except (ValueError, OSError) as error:
            if folder == "imagesUn":
                report.problem(str(error), "or hide labels of labeled cases: nnunet_semiseg split")
    both = sorted(set(images.get("imagesTr", {})) & set(images.get("imagesUn", {})))
    if both:
        report.problem(f"{', '.join(both[:5])} is in imagesTr and in imagesUn", "remove or rename it in imagesUn")
    _check_images(report, dataset, images)
    _check_plans(report, dataset, plans_name)


def _hides_labels(dataset) -> bool:
    """Whether a fold of splits_final.json withholds labels, so that the dataset needs no imagesUn."""
    from batchgenerators.utilities.file_and_folder_operations import load_json

    splits = dataset.preprocessed / "splits_final.json"
    return splits.is_file() and any(fold.get("unlabeled") for fold in load_json(str(splits)))


def _check_images(report: Report, dataset, images: dict) -> None:
    """Read every image once: damage, content that occurs twice, spacing, orientation and intensities."""
    import numpy as np
    from tqdm import tqdm

    from nnunet_semiseg.datasets import INTENSITY_SDS, CaseError, content_hash, read_images

    plans_files = sorted(dataset.preprocessed.glob("*Plans*.json"))
    if not plans_files:
        report.problem("the dataset is not planned", f"nnUNetv2_plan_and_preprocess -d {dataset.name}")
        return
    plans = dataset.plans(plans_files[0].stem)
    hashes: dict[str, tuple[str, str]] = {}
    statistics: dict[str, dict[str, tuple]] = {"imagesTr": {}, "imagesUn": {}}
    orientations: dict[str, dict[str, str | None]] = {"imagesTr": {}, "imagesUn": {}}
    with tqdm(total=sum(map(len, images.values())), desc="Reading images", unit="case", leave=False) as bar:
        for folder, cases in images.items():
            for case, files in cases.items():
                bar.update()
                try:
                    data, properties = read_images(files, plans, dataset.num_channels)
                except CaseError as error:
                    report.problem(str(error), "mend, replace or remove the file")
                    continue
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
                orientations[folder][case] = dataset.orientation(files)
                if folder == "imagesUn":
                    odd = dataset.spacing_warning(np.asarray(properties["spacing"]))
                    if odd:
                        message, cure = odd.split(". ", 1)
                        report.warn(f"imagesUn/{case}: {message}", cure)
    usual = set(orientations["imagesTr"].values())
    for case, orientation in orientations["imagesUn"].items():
        if usual and orientation not in usual:
            report.warn(
                f"imagesUn/{case}: orientation {orientation}, labeled cases are {', '.join(map(str, usual))}",
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


def _check_plans(report: Report, dataset, plans_name: str | None) -> None:
    from nnunet_semiseg.data.splits import hidden_cases
    from nnunet_semiseg.data.unlabeled import check_store, store_folder

    names = [plans_name] if plans_name else sorted(p.stem for p in dataset.preprocessed.glob("*Plans*.json"))
    for name in names:
        try:
            plans = dataset.plans(name)
        except OSError as error:
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
    splits = dataset.preprocessed / "splits_final.json"
    if splits.is_file():
        from batchgenerators.utilities.file_and_folder_operations import load_json

        for fold in range(len(load_json(str(splits)))):
            try:
                hidden = hidden_cases(splits, fold, dataset.labeled_cases())
                report.ok(f"splits_final.json, fold {fold}: {len(hidden)} cases with hidden labels")
            except ValueError as error:
                report.problem(str(error), f"nnunet_semiseg split -d {dataset.name} --overwrite ...")
    unfinished = [p for p in Path(dataset.preprocessed).glob("*.unfinished")]
    if unfinished:
        report.warn(f"{unfinished[0].name}: a preprocessing was interrupted", "run nnunet_semiseg preprocess again")
