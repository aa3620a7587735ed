"""``nnunet_semiseg split``: an experiment with few labels on a dataset that has all of them."""

from __future__ import annotations

import argparse
import shutil
from datetime import datetime

from nnunet_semiseg.data.splits import hide_labels
from nnunet_semiseg.datasets import Dataset, dataset_name
from nnunet_semiseg.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, help="dataset id or name")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--labeled", type=int, metavar="N", help="labeled training cases in each fold")
    budget.add_argument("--labeled-cases", nargs="+", metavar="CASE", help="the labeled cases by name, in every fold")
    parser.add_argument("--folds", type=int, default=5, help="number of folds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=12345, help="random seed (default %(default)s, as in nnU-Net)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file; a copy of it is kept")


def run(args: argparse.Namespace) -> None:
    if args.labeled is not None and args.labeled < 1:
        raise ValueError(f"--labeled {args.labeled}: at least one case must be labeled")
    if args.folds < 1:
        raise ValueError(f"--folds {args.folds}: at least one fold is needed")
    dataset = Dataset(dataset_name(args.d))
    cases = dataset.labeled_cases()
    if not cases:
        raise FileNotFoundError(f"{dataset.name} has no labeled cases in {dataset.raw / 'labelsTr'}")
    splits = hide_labels(cases, args.labeled, args.labeled_cases, args.folds, args.seed)
    file = dataset.splits_file
    if file.is_file():
        if not args.overwrite:
            raise FileExistsError(
                f"{file} exists. Trainings may rely on it; replace it with --overwrite (a copy is kept)"
            )
        backup = file.with_name(f"splits_final.{datetime.now():%Y%m%d-%H%M%S-%f}.json")
        shutil.copy2(file, backup)
        print(f"The former splits are kept in {backup}")
    write_json(file, splits)
    for fold, split in enumerate(splits):
        labeled, hidden, validation = (len(split[key]) for key in ("train", "unlabeled", "val"))
        print(f"Fold {fold}: {labeled} labeled, {hidden} hidden, {validation} validation")
    print(f"Written to {file}")
