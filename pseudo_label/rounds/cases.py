"""The cases of round 0: labeled ones, unlabeled ones, and the folds of the members."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_semiseg.data.splits import choose_folds, make_folds, read_splits
from nnunet_semiseg.datasets import CaseError, Dataset, check_there
from nnunet_semiseg.files import visible_files


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

    def as_json(self) -> dict:
        """For the manifest."""
        folds = {str(fold): of for fold, of in self.folds.items()}
        return {"labeled": list(self.labeled), "unlabeled": list(self.unlabeled), "folds": folds}

    def check_unchanged(self, before: dict, splits_file: Path) -> None:
        """Raises ValueError if cases were added, removed or moved to another part since round 0.

        Args:
            before: What ``as_json`` gave then.
            splits_file: Of the dataset of round 0.
        """
        now = self.as_json()
        for part in ("labeled", "unlabeled"):
            changed = sorted(set(before[part]) ^ set(now[part]))
            if changed:
                how = "no longer" if changed[0] in before[part] else "new as"
                raise ValueError(
                    f"Since these rounds began, the case {changed[0]} is {how} {part}. Undo that, or start new rounds "
                    "with another -o"
                )
        if before["folds"] != now["folds"]:
            raise ValueError(
                f"{splits_file} has changed since these rounds began. Restore it, or start new rounds with another -o"
            )


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
    splits_file = dataset.splits_file
    if splits_file.is_file():
        splits = read_splits(splits_file)
    elif len(labeled) < 5:
        raise ValueError(
            f"{dataset.name} has {len(labeled)} labeled cases, too few for the 5 folds that nnU-Net makes. Write "
            f"{splits_file} with fewer folds"
        )
    else:
        # As nnU-Net makes it with the first training.
        splits = make_folds(labeled)
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
