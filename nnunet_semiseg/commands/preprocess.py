"""``nnunet_semiseg preprocess``: the unlabeled images, made ready for training with the labeled cases' plans."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from nnunet_semiseg.data.preprocessing import STORED_SUFFIXES, preprocess_cases
from nnunet_semiseg.data.unlabeled import check_store, store_folder
from nnunet_semiseg.datasets import CaseError, Dataset, dataset_name
from nnunet_semiseg.parallel import add_processes_argument, print_failures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres"],
        help="configurations (default: those of 2d, 3d_fullres, 3d_lowres that are in the plans)",
    )
    parser.add_argument("-p", "-plans_name", default="nnUNetPlans", help="plans (default %(default)s)")
    add_processes_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="preprocess again what is already done")


def run(args: argparse.Namespace) -> int:
    dataset = Dataset(dataset_name(args.d))
    plans = dataset.plans(args.p)
    images = dataset.images("imagesUn")
    labeled = set(dataset.labeled_cases())
    both = sorted(set(images) & labeled)
    if both:
        raise CaseError(
            f"Case {both[0]} is in imagesUn and also labeled{f' (and {len(both) - 1} more)' if len(both) > 1 else ''}. "
            "Remove it from imagesUn, or rename it there if it is another scan"
        )
    default = args.c == ["2d", "3d_fullres", "3d_lowres"]
    done_folders = set()
    failures: list[str] = []
    for name in args.c:
        if name not in plans.available_configurations:
            if default:
                continue
            raise ValueError(
                f"{args.p} has no configuration {name}. It has {', '.join(plans.available_configurations)}"
            )
        configuration = plans.get_configuration(name)
        store = store_folder(dataset.preprocessed / configuration.data_identifier)
        if store not in done_folders:
            done_folders.add(store)
            failures += _preprocess(dataset, args, name, store, images)
    if failures:
        print_failures(
            sorted(set(failures)),
            f"{len(set(failures))} of {len(images)} cases could not be preprocessed (above); the others are done. "
            "Fix or remove these and run the command again.",
        )
        return 1
    return 0


def _preprocess(
    dataset: Dataset, args: argparse.Namespace, configuration_name: str, store: Path, images: dict
) -> list[str]:
    """Preprocess what is missing in ``store``; returns one line for each case that failed."""
    plans = dataset.plans(args.p)
    if args.overwrite:
        shutil.rmtree(store, ignore_errors=True)
    cure = f"nnunet_semiseg preprocess -d {dataset.name} -c {configuration_name} -p {args.p}"
    done = set(check_store(store, plans, plans.get_configuration(configuration_name), cure))
    for stale in sorted(done - set(images)):
        print(f"Removing {stale} from {store.name}: it is no longer in imagesUn.")
        for suffix in reversed(STORED_SUFFIXES):
            (store / f"{stale}{suffix}").unlink(missing_ok=True)
    return preprocess_cases(dataset, args.p, configuration_name, images, store, args.np)
