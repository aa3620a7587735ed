"""``splits_final.json``: nnU-Net's folds, with a list of cases whose labels a fold hides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.crossval_split import generate_crossval_split


def make_splits(
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
        raise ValueError(f"No labeled case is called {', '.join(unknown)}. Cases are called, e.g., {cases[0]}")
    others = [case for case in cases if case not in fixed]
    splits = max(folds, 2) if folds > 1 else 5
    if len(others) < splits:
        raise ValueError(
            f"{len(others)} cases are left for validation and hiding, too few for {splits} folds. "
            "Use fewer --folds or fewer labeled cases"
        )
    result = []
    for fold, split in enumerate(generate_crossval_split(others, seed=seed, n_splits=splits)[:folds]):
        train = sorted(str(case) for case in split["train"])
        if labeled_cases:
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
            {
                "train": labeled,
                "val": sorted(str(case) for case in split["val"]),
                "unlabeled": [case for case in train if case not in labeled],
            }
        )
    return result


def hidden_cases(splits_file: Path, fold: int | str, known: list[str]) -> list[str]:
    """The cases whose labels ``fold`` must not see, after a check of the whole fold.

    Args:
        splits_file: ``splits_final.json``; it may be missing.
        fold: nnU-Net's fold.
        known: All preprocessed labeled cases.

    Raises:
        ValueError: naming the file and the case, if the fold names an unknown case or an unlabeled case is also in
            ``train`` or ``val``.
    """
    if fold == "all" or not splits_file.is_file():
        return []
    splits = load_json(str(splits_file))
    if fold >= len(splits):
        return []
    split = splits[fold]
    hidden = split.get("unlabeled", [])
    known = set(known)
    for key in ("train", "val", "unlabeled"):
        unknown = [case for case in split.get(key, []) if case not in known]
        if unknown:
            raise ValueError(
                f"{splits_file}, fold {fold}: '{key}' names {unknown[0]}, which is not preprocessed"
                f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}. Preprocess it with "
                "nnUNetv2_preprocess, or write the splits anew with nnunet_semiseg split --overwrite"
            )
    for key in ("train", "val"):
        overlap = sorted(set(hidden) & set(split[key]))
        if overlap:
            raise ValueError(
                f"{splits_file}, fold {fold}: {overlap[0]} is in 'unlabeled' and in '{key}'. "
                "Write the splits anew with nnunet_semiseg split --overwrite"
            )
    return list(hidden)
