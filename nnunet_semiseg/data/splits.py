"""``splits_final.json``: nnU-Net's folds, with a list of cases whose labels a fold hides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_semiseg.files import read_json


def make_folds(
    cases: Iterable[str], number: int = 5, seed: int = 12345, patients: Mapping[str, str] | None = None
) -> list[dict]:
    """Folds with ``train`` and ``val`` as nnU-Net makes them, with all cases of a patient in the same part.

    Args:
        cases: All labeled cases.
        number: Of folds.
        seed: nnU-Net's by default.
        patients: {case: its patient}, of which there are as many as folds or more; None if each case has its own.
    """
    cases = sorted(cases)
    patients = dict(zip(cases, cases)) if patients is None else patients
    taking_turns = sorted({patients[case] for case in cases})

    def cases_of(chosen: Iterable[str]) -> list[str]:
        chosen = set(chosen)
        return [case for case in cases if patients[case] in chosen]

    return [
        {key: cases_of(fold[key]) for key in ("train", "val")}
        for fold in generate_crossval_split(taking_turns, seed=seed, n_splits=number)
    ]


def hide_labels(
    cases: list[str], num_labeled: int | None, labeled_cases: list[str] | None, folds: int, seed: int
) -> list[dict]:
    """Folds with ``train``, ``val`` and ``unlabeled``, pairwise disjoint.

    With ``num_labeled`` the validation cases of a fold are those of nnU-Net's own split (same seed and number of
    folds), and of the rest so many are drawn as labeled; the draw for a larger budget contains that for a smaller one.
    With ``labeled_cases`` these are labeled in every fold and the others take turns as validation cases.

    Args:
        cases: All cases that have labels.
        num_labeled: Labeled cases per fold.
        labeled_cases: The labeled cases by name, instead of a number.
        folds: Number of folds; 1 makes the first of five.
        seed: nnU-Net's is 12345.

    Raises:
        ValueError: if a name is unknown or the budget leaves nothing to do.
    """
    cases = sorted(cases)
    fixed = sorted(set(labeled_cases or []))
    unknown = [case for case in fixed if case not in cases]
    if unknown:
        raise ValueError(f"No labeled case is named {', '.join(unknown)}. Cases are named, e.g., {cases[0]}")
    others = [case for case in cases if case not in fixed]
    splits = folds if folds > 1 else 5
    if len(others) < splits:
        raise ValueError(
            f"{len(others)} cases are left for validation and hiding, too few for {splits} folds. "
            "Use fewer --folds or fewer labeled cases"
        )
    result = []
    for fold, split in enumerate(make_folds(others, splits, seed)[:folds]):
        train = split["train"]
        if labeled_cases or num_labeled is None:
            labeled = fixed
        else:
            if num_labeled > len(train):
                raise ValueError(
                    f"--labeled {num_labeled} is more than the {len(train)} training cases of a fold "
                    f"({len(cases)} cases have labels). Use --labeled {len(train)} or less"
                )
            order = np.random.RandomState(seed + fold).permutation(len(train))
            labeled = sorted(train[i] for i in order[:num_labeled])
        result.append(
            {"train": labeled, "val": split["val"], "unlabeled": [case for case in train if case not in labeled]}
        )
    return result


_CURE = "Write the splits again with nnunet_semiseg split --overwrite"


def read_splits(file: Path) -> list[dict]:
    """The folds in a ``splits_final.json``.

    Raises:
        OSError, ValueError: naming the file, if it is no list of folds with lists of cases ``train`` and ``val``, and
            ``unlabeled`` if there is one.
    """
    splits = read_json(file, cure=_CURE)
    if not isinstance(splits, list) or not splits:
        kind = "an object" if isinstance(splits, dict) else "empty" if splits == [] else "no list"
        raise ValueError(f"{file} is {kind}; nnU-Net wants a list with an object for each fold. {_CURE}")
    for fold, split in enumerate(splits):
        if not isinstance(split, dict):
            raise ValueError(f"{file}, fold {fold} is not an object {{train: [case, ...], val: [case, ...]}}. {_CURE}")
        for key in ("train", "val", "unlabeled"):
            if key not in split and key != "unlabeled":
                raise ValueError(
                    f"{file}, fold {fold} has no key '{key}', only {', '.join(map(repr, split)) or 'none'}. Rename the "
                    "keys to 'train' and 'val', as nnU-Net calls them"
                )
            cases = split.get(key, [])
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise ValueError(f"{file}, fold {fold}: '{key}' is not a list of cases. {_CURE}")
        # nnU-Net permits other keys, but this one would show what it is meant to hide.
        for key in set(split) - {"unlabeled"}:
            if get_close_matches(key.lower(), ["unlabeled"], cutoff=0.9):
                raise ValueError(
                    f"{file}, fold {fold} has the key '{key}', which hides nothing. Rename it to 'unlabeled'"
                )
    return splits


def _number_of_folds(splits: list[dict]) -> str:
    return f"{len(splits)} fold{'s' if len(splits) > 1 else ''}"


def check_fold(splits_file: Path, fold: int | Literal["all"]) -> dict | None:
    """Refuse a fold whose training would see labels that other folds hide.

    nnU-Net trains fold ``all`` on every label, and a fold that the file lacks on a random 80 percent of them.

    Args:
        splits_file: ``splits_final.json``; it may be missing.
        fold: nnU-Net's fold.

    Returns:
        What the file has for the fold; None for ``all``, and if the file or the fold is missing.

    Raises:
        ValueError: naming the file and what to do; also as ``read_splits``.
    """
    if not splits_file.is_file():
        return None
    splits = read_splits(splits_file)
    if fold != "all" and 0 <= fold < len(splits):
        return splits[fold]
    hiding = sum(bool(split.get("unlabeled")) for split in splits)
    if not hiding:
        return None
    folds = _number_of_folds(splits)
    there = "fold 0" if len(splits) == 1 else f"one of the folds 0 to {len(splits) - 1}"
    if fold == "all":
        raise ValueError(
            f"{splits_file} hides labels in {hiding} of {folds}, and fold all would train on them. Train {there}; or "
            "move the file away, if nothing is to be hidden any more"
        )
    raise ValueError(
        f"{splits_file} has {folds}, there is no fold {fold}: nnU-Net would train it on a random part of all labels, "
        f"hidden ones included. Train {there}, or write more folds with nnunet_semiseg split --folds"
    )


def choose_folds(splits_file: Path, splits: list[dict], folds: Iterable[int]) -> dict[int, dict]:
    """{fold: what ``splits`` has for it}. Raises ValueError, naming the file, if it lacks one."""
    for fold in folds:
        if not 0 <= fold < len(splits):
            raise ValueError(
                f"{splits_file} has {_number_of_folds(splits)}, there is no fold {fold}. They count from 0"
            )
    return {fold: splits[fold] for fold in folds}


def all_hidden_cases(splits_file: Path, folds: list[int] | None = None) -> set[str]:
    """The cases whose labels one of ``folds`` hides; of all folds without it. None if the file is missing.

    Raises:
        OSError, ValueError: naming the file, if it lacks a fold; also as ``read_splits``.
    """
    if not splits_file.is_file():
        return set()
    splits = read_splits(splits_file)
    chosen = splits if folds is None else choose_folds(splits_file, splits, folds).values()
    return {case for split in chosen for case in split.get("unlabeled", [])}


def check_trained_on(
    splits_file: Path, fold: int | Literal["all"], cases: Iterable[str], checkpoint: Path, cure: str
) -> None:
    """Refuse weights that have learned from labels which a fold now keeps from training.

    Args:
        splits_file: ``splits_final.json``; it may be missing.
        fold: nnU-Net's fold.
        cases: On whose labels the weights were trained.
        checkpoint: The file of the weights.
        cure: What to do.

    Raises:
        ValueError: naming checkpoint and case; also as ``read_splits``.
    """
    if fold == "all" or not splits_file.is_file():
        return
    splits = read_splits(splits_file)
    if fold >= len(splits):
        return
    known = sorted(set(cases) - set(splits[fold]["train"]))
    for key, what in (
        ("unlabeled", "whose label fold {} of {} now hides"),
        ("val", "on which fold {} of {} now validates"),
    ):
        found = [case for case in known if case in splits[fold].get(key, [])]
        if found:
            raise ValueError(f"{checkpoint} was trained on {found[0]}, {what.format(fold, splits_file)}. {cure}")


def hidden_cases(splits_file: Path, fold: int | Literal["all"], known: list[str]) -> list[str]:
    """The cases whose labels ``fold`` must not see, after a check of the whole fold.

    Args:
        splits_file: ``splits_final.json``; it may be missing.
        fold: nnU-Net's fold.
        known: All preprocessed labeled cases.

    Raises:
        ValueError: naming the file and the case, if the fold names an unknown case or an unlabeled case is also in
            ``train`` or ``val``; also as ``check_fold``.
    """
    split = check_fold(splits_file, fold)
    if split is None:
        return []
    hidden = split.get("unlabeled", [])
    there = set(known)
    for key in ("train", "val", "unlabeled"):
        unknown = [case for case in split.get(key, []) if case not in there]
        if unknown:
            raise ValueError(
                f"{splits_file}, fold {fold}: '{key}' names {unknown[0]}, which is not preprocessed"
                f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}. Preprocess it with "
                "nnUNetv2_preprocess, or write the splits again with nnunet_semiseg split --overwrite"
            )
    for key in ("train", "val"):
        overlap = sorted(set(hidden) & set(split[key]))
        if overlap:
            raise ValueError(f"{splits_file}, fold {fold}: {overlap[0]} is in 'unlabeled' and in '{key}'. {_CURE}")
    return list(hidden)
