"""The nnU-Net dataset of the next round: the labeled cases, and pseudo-labeled ones among them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_semiseg.data.preprocessing import SUFFIXES, preprocess_cases
from nnunet_semiseg.data.splits import choose_folds, read_splits
from nnunet_semiseg.data.unlabeled import store_folder
from nnunet_semiseg.datasets import CaseError, Dataset, check_there, sidecar
from nnunet_semiseg.files import link, read_json, visible_files, write_json


@dataclass(frozen=True)
class Cases:
    """The cases of round 0, for the folds of its members.

    Args:
        labeled: {case: (its channel files, its label map)} of the training and validation cases of all folds.
        unlabeled: {case: its channel files}, of imagesUn and those with hidden labels.
        folds: {fold: {"train": cases, "val": cases}}.
    """

    labeled: dict[str, tuple[list[Path], Path]]
    unlabeled: dict[str, list[Path]]
    folds: dict[int, dict[str, list[str]]]

    @property
    def training(self) -> list[str]:
        """The labeled cases that a member trains on, of all folds."""
        return sorted({case for fold in self.folds.values() for case in fold["train"]})


def read_cases(dataset: Dataset, folds: list[int]) -> Cases:
    """Of a dataset that is planned and preprocessed.

    Raises:
        FileNotFoundError, ValueError, CaseError: naming what is missing, a case that is labeled and unlabeled, or folds
            that hide different labels.
    """
    labeled = dataset.labeled_files
    for case, (files, label) in labeled.items():
        if "dataset" not in dataset.json:
            dataset.check_channels(case, files, dataset.raw / "imagesTr")
        for file in (*files, label):
            check_there(file)
    splits_file = dataset.preprocessed / "splits_final.json"
    if splits_file.is_file():
        splits = read_splits(splits_file)
    else:
        # As nnU-Net makes it with the first training.
        splits = generate_crossval_split(sorted(labeled), seed=12345, n_splits=5)
    chosen = choose_folds(splits_file, splits, folds)
    hidden = [sorted(split.get("unlabeled", [])) for split in chosen.values()]
    unknown = sorted({c for cases in hidden for c in cases} - set(labeled))
    if unknown:
        raise CaseError(f"{splits_file} hides {unknown[0]}, which is not in {dataset.raw / 'imagesTr'}")
    if any(cases != hidden[0] for cases in hidden):
        raise ValueError(
            f"{splits_file}: the folds {', '.join(map(str, folds))} hide the labels of different cases, so that one "
            "member's unlabeled case is another's labeled one. Use members of the same fold"
        )
    unknown = sorted({c for split in chosen.values() for k in ("train", "val") for c in split[k]} - set(labeled))
    if unknown:
        raise CaseError(f"{splits_file} names {unknown[0]}, which is not in {dataset.raw / 'imagesTr'}")
    unlabeled = {case: labeled[case][0] for case in hidden[0]}
    folder = dataset.raw / "imagesUn"
    if not unlabeled or (folder.is_dir() and visible_files(folder)):
        more = dataset.images("imagesUn")
        both = sorted(set(more) & set(labeled))
        if both:
            raise CaseError(f"Case {both[0]} is in imagesUn and also labeled. Remove or rename it in imagesUn")
        for file in (file for files in more.values() for file in files):
            # nnU-Net's prediction does not see a link whose target is gone.
            check_there(file)
        unlabeled.update(more)
    return Cases(
        labeled={case: files for case, files in labeled.items() if case not in hidden[0]},
        unlabeled=dict(sorted(unlabeled.items())),
        folds={fold: {key: sorted(map(str, split[key])) for key in ("train", "val")} for fold, split in chosen.items()},
    )


def free_ids(first: int, number: int, owner: Path) -> list[int]:
    """The lowest dataset ids from ``first`` on that no folder of nnU-Net uses, and no other work folder will."""
    used = used_ids(owner)
    free = [i for i in range(first, 1000) if i not in used]
    if len(free) < number:
        raise ValueError(f"There are not {number} free dataset ids from {first} to 999. Choose some with --dataset-ids")
    return free[:number]


def used_ids(owner: Path) -> set[int]:
    """Dataset ids that have a folder, or that a work folder other than ``owner`` has reserved."""
    used = {
        int(folder.name[7:10])
        for variable in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results)
        if variable.is_set()
        for folder in Path(str(variable)).glob("Dataset[0-9][0-9][0-9]_*")
    }
    marks = Path(str(nnUNet_raw)).glob(f"{_MARK}[0-9][0-9][0-9]")
    return used | {int(mark.name[-3:]) for mark in marks if _other_owner(mark, owner)}


# A symbolic link in nnUNet_raw to the work folder whose round has the id and has not built its dataset yet: made with
# its content in one step.
_MARK = ".rounds_of_dataset_"


def _mark(number: int) -> Path:
    return Path(str(nnUNet_raw)) / f"{_MARK}{number:03d}"


def _other_owner(mark: Path, owner: Path) -> bool:
    """Whether the mark is that of another work folder, which still exists."""
    with suppress(FileNotFoundError):
        return Path(os.readlink(mark)) != owner and mark.exists()
    return False


def reserve_id(number: int, owner: Path) -> bool:
    """Keep a dataset id for a work folder; False if another one was faster."""
    mark = _mark(number)
    if not _other_owner(mark, owner):
        with suppress(FileNotFoundError):
            if Path(os.readlink(mark)) == owner:
                return True
            mark.unlink()
        with suppress(FileExistsError):
            mark.symlink_to(owner)
            return True
    return False


def release_id(number: int) -> None:
    """The dataset is there: its folder holds the id."""
    _mark(number).unlink(missing_ok=True)


@dataclass(frozen=True)
class NextDataset:
    """What a round adds to the one before.

    Args:
        first: The dataset of round 0: its plans, fingerprint and labels count.
        previous: The dataset of the round before, whose preprocessed cases are linked.
        name: ``Dataset504_Name``.
        cases: Of round 0.
        pseudo: {case: label map} of all accepted cases, of this and earlier rounds.
        provenance: {case: what dataset.json tells about its pseudo label}.
        ignore: The ignore label, if pseudo labels have one.
        plans_name, configuration_name: Of the members.
        repeat_real: How often a labeled case stands in a fold's training cases. nnU-Net draws cases with equal
            probability, so it is drawn that many times as often as a pseudo-labeled one.
        processes: For preprocessing.
    """

    first: Dataset
    previous: Dataset
    name: str
    cases: Cases
    pseudo: Mapping[str, Path]
    provenance: Mapping[str, dict]
    ignore: int | None
    plans_name: str
    configuration_name: str
    repeat_real: int
    processes: int

    @property
    def remaining(self) -> dict[str, list[Path]]:
        """The unlabeled cases that have no pseudo label."""
        return {case: files for case, files in self.cases.unlabeled.items() if case not in self.pseudo}

    def build(self) -> None:
        """Make the raw dataset and the preprocessed one; what an earlier call has finished is kept.

        Raises:
            CaseError: if cases cannot be preprocessed; one line for each was printed.
        """
        dataset = Dataset(self.name)
        self._build_raw(dataset)
        self._build_preprocessed(dataset)

    def _labels(self) -> dict:
        labels = dict(self.first.json["labels"])
        return {**labels, "ignore": self.ignore} if self.ignore is not None else labels

    def _build_raw(self, dataset: Dataset) -> None:
        if dataset.raw.is_dir():
            return
        unfinished = dataset.raw.with_name(f".unfinished_{self.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        ending = self.first.file_ending

        for case, (files, label) in self.cases.labeled.items():
            link_images(files, unfinished / "imagesTr", case, ending)
            link_labels(label, unfinished / "labelsTr" / f"{case}{ending}")
        for case, label in self.pseudo.items():
            link_images(self.cases.unlabeled[case], unfinished / "imagesTr", case, ending)
            link_labels(label, unfinished / "labelsTr" / f"{case}{ending}")
        for case, files in self.remaining.items():
            link_images(files, unfinished / "imagesUn", case, ending)
        description = {key: value for key, value in self.first.json.items() if key != "dataset"}
        description |= {
            "labels": self._labels(),
            "numTraining": len(self.cases.labeled) + len(self.pseudo),
            "pseudo_labels": dict(self.provenance),
        }
        write_json(unfinished / "dataset.json", description)
        os.replace(unfinished, dataset.raw)

    def _build_preprocessed(self, dataset: Dataset) -> None:
        folder = dataset.preprocessed
        shutil.copyfile(dataset.raw / "dataset.json", _made(folder / "dataset.json"))
        shutil.copyfile(self.first.preprocessed / "dataset_fingerprint.json", folder / "dataset_fingerprint.json")
        plans = read_json(self.first.preprocessed / f"{self.plans_name}.json")
        # After a training nnU-Net would look for this dataset's folder of the next stage, which nobody asked for.
        plans["configurations"][self.configuration_name].pop("next_stage", None)
        write_json(folder / f"{self.plans_name}.json", {**plans, "dataset_name": self.name})
        write_json(folder / "splits_final.json", self._splits())
        for file in visible_files(dataset.raw / "labelsTr"):
            link(file, folder / "gt_segmentations" / file.name)

        data = dataset.plans(self.plans_name).get_configuration(self.configuration_name).data_identifier
        before = self.previous.preprocessed / data
        adds_ignore = self.ignore is not None and "ignore" not in self.first.json["labels"]
        if self.previous.name != self.first.name or not adds_ignore:
            # Otherwise they are preprocessed: with an ignore label nnU-Net wants to know where annotated voxels are.
            self._link(before, folder / data, self.cases.labeled)
        if self.previous.name != self.first.name:
            # What the first dataset has under these names are the labels that its fold hides.
            self._link(before, folder / data, self.pseudo)
        self._link(store_folder(before), store_folder(folder / data), self.remaining)
        images = {case: files for case, (files, _) in self.cases.labeled.items()}
        images |= {case: self.cases.unlabeled[case] for case in self.pseudo}
        labels = {case: dataset.raw / "labelsTr" / f"{case}{self.first.file_ending}" for case in images}
        arguments = (dataset, self.plans_name, self.configuration_name)
        failures = preprocess_cases(*arguments, images, folder / data, self.processes, labels)
        failures += preprocess_cases(*arguments, self.remaining, store_folder(folder / data), self.processes)
        if failures:
            raise CaseError("\n".join([*failures, f"{len(failures)} cases could not be preprocessed. Fix them"]))

    def _link(self, source: Path, target: Path, cases: Iterable[str]) -> None:
        """Link preprocessed cases that the round before has, the file that says that a case is complete last."""
        for case in cases:
            if (source / f"{case}.pkl").is_file() and not (target / f"{case}.pkl").exists():
                for suffix in SUFFIXES:
                    if (source / f"{case}{suffix}").exists():
                        link(source / f"{case}{suffix}", target / f"{case}{suffix}")

    def _splits(self) -> list[dict]:
        """The folds of round 0 with more training cases; a fold that no member has is the first one that one has."""
        splits = []
        for fold in range(max(self.cases.folds) + 1):
            of = self.cases.folds.get(fold) or next(iter(self.cases.folds.values()))
            splits.append({"train": of["train"] * self.repeat_real + sorted(self.pseudo), "val": of["val"]})
        return splits


def link_images(files: list[Path], folder: Path, case: str, ending: str) -> None:
    """Link a case's channels as CASE_0000 and so on, and the file of their spacing, if they have one."""
    links = [folder / f"{case}_{channel:04d}{ending}" for channel in range(len(files))]
    spacing = sidecar(files[0], channel=True)
    if spacing.is_file():
        link(spacing, sidecar(links[0], channel=True))
    for file, target in zip(files, links):
        link(file, target)


def link_labels(file: Path, target: Path) -> None:
    """Link a label map, and the file of its spacing, if it has one."""
    spacing = sidecar(file, channel=False)
    if spacing.is_file():
        link(spacing, sidecar(target, channel=False))
    link(file, target)


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
