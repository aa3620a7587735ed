"""The nnU-Net dataset of the next round: the labeled cases, and pseudo-labeled ones among them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunet_semiseg.data.preprocessing import STORED_SUFFIXES, preprocess_cases
from nnunet_semiseg.data.unlabeled import store_folder
from nnunet_semiseg.datasets import CaseError, Dataset
from nnunet_semiseg.files import link, read_json, visible_files, write_json
from pseudo_label.rounds.dataset_ids import release_id
from pseudo_label.rounds.links import link_images, link_labels
from pseudo_label.rounds.round import Round
from pseudo_label.rounds.setup import Setup
from pseudo_label.score_files import read_scores
from pseudo_label.selection_files import ignore_value


def build(current: Round) -> dict:
    """{"remaining": the number of cases that are still unlabeled}."""
    following = next_dataset(current)
    following.build()
    release_id(convert_dataset_name_to_id(following.name))
    return {"remaining": len(following.remaining)}


def next_dataset(current: Round) -> NextDataset:
    """The dataset that a round makes, as far as the manifest knows it."""
    setup = current.setup
    pseudo, provenance = {}, {}
    for number in [current.number] if setup.settings.relabel else range(1, current.number + 1):
        earlier = current.earlier(number)
        accepted = earlier.record.get("accepted", [])
        scores = read_scores(earlier.folder.scores) if accepted else {}
        for case in accepted:
            pseudo[case] = earlier.folder.selection / "labels" / f"{case}{setup.first.file_ending}"
            provenance[case] = {
                "round": number,
                "score": scores[case].score,
                "members": [member.name for member in setup.members],
            }
    return NextDataset(setup, Dataset(current.before.dataset), current.dataset, pseudo, provenance)


@dataclass(frozen=True)
class NextDataset:
    """What a round adds to the one before.

    Args:
        setup: The plans, fingerprint and labels of the dataset of round 0 count.
        previous: The dataset of the round before, whose preprocessed cases are linked.
        name: ``Dataset504_Name``.
        pseudo: {case: label map} of all accepted cases, of this and earlier rounds; with ``relabel``, of this one.
        provenance: {case: what dataset.json tells about its pseudo label}.
    """

    setup: Setup
    previous: Dataset
    name: str
    pseudo: Mapping[str, Path]
    provenance: Mapping[str, dict]

    @property
    def remaining(self) -> dict[str, list[Path]]:
        """The unlabeled cases that have no pseudo label."""
        return {case: files for case, files in self.setup.cases.unlabeled.items() if case not in self.pseudo}

    def build(self) -> None:
        """Make the raw dataset and the preprocessed one; what an earlier call has finished is kept.

        Raises:
            CaseError: if cases cannot be preprocessed; one line for each was printed.
        """
        dataset = Dataset(self.name)
        self._build_raw(dataset)
        self._build_preprocessed(dataset)

    @property
    def _labels(self) -> dict:
        """With an ignore label, if pseudo labels have one."""
        labels = dict(self.setup.first.json["labels"])
        return {**labels, "ignore": ignore_value(self.setup.classes)} if self._ignores else labels

    @property
    def _ignores(self) -> bool:
        return self.setup.settings.min_agreement > 0

    def _build_raw(self, dataset: Dataset) -> None:
        if dataset.raw.is_dir():
            return
        unfinished = dataset.raw.with_name(f".unfinished_{self.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        first, cases = self.setup.first, self.setup.cases
        ending = first.file_ending

        for case, (files, label) in cases.labeled.items():
            link_images(files, unfinished / "imagesTr", case, ending)
            link_labels(label, unfinished / "labelsTr" / f"{case}{ending}")
        for case, label in self.pseudo.items():
            link_images(cases.unlabeled[case], unfinished / "imagesTr", case, ending)
            link_labels(label, unfinished / "labelsTr" / f"{case}{ending}")
        for case, files in self.remaining.items():
            link_images(files, unfinished / "imagesUn", case, ending)
        description = {key: value for key, value in first.json.items() if key != "dataset"}
        description |= {
            "labels": self._labels,
            "numTraining": len(cases.labeled) + len(self.pseudo),
            "pseudo_labels": dict(self.provenance),
        }
        write_json(unfinished / "dataset.json", description)
        os.replace(unfinished, dataset.raw)

    def _build_preprocessed(self, dataset: Dataset) -> None:
        first, cases, s = self.setup.first, self.setup.cases, self.setup.settings
        folder = dataset.preprocessed
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dataset.raw / "dataset.json", folder / "dataset.json")
        shutil.copyfile(first.preprocessed / "dataset_fingerprint.json", folder / "dataset_fingerprint.json")
        plans = read_json(first.preprocessed / f"{s.plans}.json")
        # After a training nnU-Net would look for this dataset's folder of the next stage, which nobody asked for.
        plans["configurations"][s.configuration].pop("next_stage", None)
        write_json(folder / f"{s.plans}.json", {**plans, "dataset_name": self.name})
        write_json(dataset.splits_file, self._splits())
        for file in visible_files(dataset.raw / "labelsTr"):
            link(file, folder / "gt_segmentations" / file.name)

        data = dataset.plans(s.plans).get_configuration(s.configuration).data_identifier
        before, stored = self.previous.preprocessed / data, folder / data
        adds_ignore = self._ignores and "ignore" not in first.json["labels"]
        if self.previous.name != first.name or not adds_ignore:
            # Otherwise they are preprocessed: with an ignore label nnU-Net wants to know where annotated voxels are.
            _link_stored(before, stored, cases.labeled)
        if self.previous.name != first.name and not s.relabel:
            # What the first dataset has under these names are the labels that its fold hides; with ``relabel``, what
            # the round before has are labels of its own.
            _link_stored(before, stored, self.pseudo)
        _link_stored(store_folder(before), store_folder(stored), self.remaining)
        images = {case: files for case, (files, _) in cases.labeled.items()}
        images |= {case: cases.unlabeled[case] for case in self.pseudo}
        labels = {case: dataset.raw / "labelsTr" / f"{case}{first.file_ending}" for case in images}
        arguments = (dataset, s.plans, s.configuration)
        failures = preprocess_cases(*arguments, images, stored, self.setup.processes, labels)
        failures += preprocess_cases(*arguments, self.remaining, store_folder(stored), self.setup.processes)
        if failures:
            raise CaseError("\n".join([*failures, f"{len(failures)} cases could not be preprocessed. Fix them"]))

    def _splits(self) -> list[dict]:
        """The folds of round 0 with more training cases; a fold that no member has is the first one that one has."""
        folds = self.setup.cases.folds
        splits = []
        for fold in range(max(folds) + 1):
            of = folds.get(fold) or next(iter(folds.values()))
            for_a_third = max(1, math.ceil(len(self.pseudo) / (2 * len(of["train"]))))
            real = of["train"] * (self.setup.settings.repeat_real or for_a_third)
            splits.append({"train": real + sorted(self.pseudo), "val": of["val"]})
        return splits


def _link_stored(source: Path, target: Path, cases: Iterable[str]) -> None:
    """Link preprocessed cases that the round before has, the file that says that a case is complete last."""
    for case in cases:
        if (source / f"{case}.pkl").is_file() and not (target / f"{case}.pkl").exists():
            for suffix in STORED_SUFFIXES:
                if (source / f"{case}{suffix}").exists():
                    link(source / f"{case}{suffix}", target / f"{case}{suffix}")
