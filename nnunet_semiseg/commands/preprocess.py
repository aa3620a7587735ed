"""``nnunet_semiseg preprocess``: the unlabeled images, made ready for training with the labeled cases' plans."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from tqdm import tqdm

from nnunet_semiseg.data.unlabeled import DIGEST_KEY, check_store, preprocessing_digest, store_folder
from nnunet_semiseg.datasets import CaseError, Dataset, dataset_name, read_images

# In the order in which they appear under their final name: a case counts as done once it has its properties.
_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")


def add_arguments(parser):
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres"],
        help="configurations (default: those of 2d, 3d_fullres, 3d_lowres that are in the plans)",
    )
    parser.add_argument("-p", "-plans_name", default="nnUNetPlans", help="plans (default %(default)s)")
    parser.add_argument(
        "-np",
        type=int,
        default=min(default_num_processes, os.cpu_count()),
        help="processes; each holds one case in memory (default %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="redo cases that are already done")


def run(args) -> int:
    if args.np < 1:
        raise ValueError(f"-np {args.np} is not a number of processes. Use 1 or more")
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
        print("\n".join(sorted(set(failures))), file=sys.stderr)
        print(
            f"{len(set(failures))} of {len(images)} cases could not be preprocessed (above); the others are done. "
            "Mend or remove these and run the command again.",
            file=sys.stderr,
        )
        return 1
    return 0


def _preprocess(dataset: Dataset, args, configuration_name: str, store: Path, images: dict) -> list[str]:
    """Preprocess what is missing in ``store``; returns one line for each case that failed."""
    plans = dataset.plans(args.p)
    if args.overwrite:
        shutil.rmtree(store, ignore_errors=True)
    cure = f"nnunet_semiseg preprocess -d {dataset.name} -c {configuration_name} -p {args.p}"
    done = set(check_store(store, plans, plans.get_configuration(configuration_name), cure))
    for stale in sorted(done - set(images)):
        print(f"Removing {stale} from {store.name}: it is no longer in imagesUn.")
        for suffix in reversed(_SUFFIXES):
            (store / f"{stale}{suffix}").unlink(missing_ok=True)
    missing = [case for case in images if case not in done]
    store.mkdir(parents=True, exist_ok=True)
    # On the same file system as the store, so that a rename publishes a finished file; not inside it, because nnU-Net
    # looks at every file there.
    unfinished = store.with_name(store.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    labeled = sorted((dataset.raw / "imagesTr").glob(f"*_0000{dataset.file_ending}"))
    orientation = dataset.orientation(labeled[:1]) if labeled else None
    failures = []
    try:
        with (
            ProcessPoolExecutor(min(args.np, max(len(missing), 1)), mp_context=get_context("spawn")) as pool,
            tqdm(
                total=len(images),
                initial=len(images) - len(missing),
                desc=f"{dataset.name} {configuration_name}",
                unit="case",
            ) as bar,
        ):
            jobs = {
                pool.submit(
                    _preprocess_case,
                    dataset.name,
                    args.p,
                    configuration_name,
                    case,
                    images[case],
                    unfinished,
                    store,
                    orientation,
                ): case
                for case in missing
            }
            for job in as_completed(jobs):
                try:
                    for warning in job.result():
                        tqdm.write(f"Warning: {warning}", file=sys.stderr)
                except BrokenProcessPool:
                    raise
                except (CaseError, OSError) as error:
                    failures.append(f"Error: {error}")
                except Exception as error:
                    failures.append(f"Error: case {jobs[job]} failed: {type(error).__name__}: {error}")
                bar.update()
    except BrokenProcessPool:
        raise RuntimeError(
            "A worker process was killed, most likely because memory ran out. Finished cases are kept: run the command "
            f"again with fewer processes, -np {max(1, args.np // 2)}"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return failures


def _preprocess_case(name, plans_name, configuration_name, case, files, unfinished, store, orientation) -> list[str]:
    """One case, from its images to its three files under their final names. Returns warnings."""
    dataset = Dataset(name)
    plans = dataset.plans(plans_name)
    configuration = plans.get_configuration(configuration_name)
    data, properties = read_images(files, plans, dataset.num_channels)
    warnings = []
    odd_spacing = dataset.spacing_warning(np.asarray(properties["spacing"]))
    if odd_spacing:
        warnings.append(f"{case}: {odd_spacing}")
    own_orientation = dataset.orientation(files)
    if own_orientation != orientation and None not in (own_orientation, orientation):
        warnings.append(
            f"{case}: orientation {own_orientation}, the labeled cases are {orientation}. nnU-Net does not reorient "
            "images; reorient the file, or leave the case out"
        )
    target = Path(unfinished) / case
    try:
        configuration.preprocessor_class(verbose=False).run_case_save(
            str(target), [str(f) for f in files], None, plans, configuration, dataset.json
        )
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
        for suffix in _SUFFIXES:
            Path(f"{target}{suffix}").unlink(missing_ok=True)
        raise OSError(
            f"case {case} could not be written to {store} ({type(error).__name__}: {error}; {free:.0f} MB are free "
            "there). If the disk is full, free some space; then run the command again: finished cases are kept"
        ) from None
    for suffix in _SUFFIXES:
        os.replace(f"{target}{suffix}", store / f"{case}{suffix}")
    return warnings
