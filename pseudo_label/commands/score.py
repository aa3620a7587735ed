"""``pseudo_label score``: the consensus of several members' predictions, and how far they agree."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_semiseg.data.splits import all_hidden_cases
from nnunet_semiseg.datasets import Dataset, dataset_name, dataset_reader
from nnunet_semiseg.files import read_json
from nnunet_semiseg.parallel import add_processes_argument
from nnunet_semiseg.segmentations import Classes, find_reader
from pseudo_label.members import find_labels
from pseudo_label.scores import AGREEMENT, BOTH_EMPTY
from pseudo_label.scoring import CONSENSUS, score_members


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        nargs="+",
        type=Path,
        required=True,
        metavar="MEMBER_DIR",
        help="two or more folders of label maps of the same cases, as nnUNetv2_predict writes them",
    )
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder of consensus and scores")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "-d", help="dataset id or name: for its labels, its reader and the volumes of its labeled cases"
    )
    labels.add_argument(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="a dataset.json with the labels (default: the one in the first folder, else the labels found)",
    )
    parser.add_argument(
        "--labeled",
        type=Path,
        metavar="FOLDER",
        help="label maps of labeled cases to compare volumes with (default: with -d, those of its labelsTr that "
        "no fold hides)",
    )
    parser.add_argument(
        "--fold",
        nargs="+",
        type=int,
        metavar="F",
        help="with -d: the members' folds, which decide what is hidden (default: all of splits_final.json)",
    )
    parser.add_argument(
        "--consensus",
        choices=CONSENSUS,
        help="mean of the probabilities, majority vote, or STAPLE (default: mean if all members have probabilities, "
        "else majority)",
    )
    parser.add_argument("--per-slice", action="store_true", help="average over slices (default: the whole volume)")
    parser.add_argument("--metric", choices=AGREEMENT, default=AGREEMENT[0], help="default %(default)s")
    parser.add_argument(
        "--both-empty",
        choices=BOTH_EMPTY,
        default=BOTH_EMPTY[0],
        help="a class that neither mask has: leave it out, or count it as 1 (default %(default)s)",
    )
    add_processes_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="score again from the start")


def run(args: argparse.Namespace) -> None:
    if args.fold is not None and not args.d:
        raise ValueError("--fold needs -d, whose splits_final.json says what a fold hides")
    if args.labeled is not None and not args.labeled.is_dir():
        raise FileNotFoundError(f"--labeled {args.labeled} is not a folder")
    classes, labeled, hidden, reader = _classes(args)
    scores = score_members(
        args.i,
        args.o,
        classes,
        args.consensus,
        args.per_slice,
        args.metric,
        args.both_empty,
        labeled,
        args.np,
        args.overwrite,
        hidden=hidden,
        reader=reader,
    )
    empty = [case for case, score in scores.items() if score.score is None]
    if empty:
        print(f"No member has any foreground in {', '.join(empty)}: no score")
    defined = {case: score.score for case, score in scores.items() if score.score is not None}
    if defined:
        lowest = min(defined, key=lambda case: defined[case])
        print(
            f"Mean score of {len(defined)} cases: {sum(defined.values()) / len(defined):.3f}, lowest: "
            f"{defined[lowest]:.3f} ({lowest})"
        )
    print(f"Written to {args.o}")


def _classes(args: argparse.Namespace) -> tuple[Classes, Path | None, set[str], type | None]:
    """The classes, the folder of the labeled cases' label maps and those of them that are hidden, nnU-Net's reader.

    What nothing tells is None.

    Raises:
        ValueError, OSError: naming the file; also if so many labels are hidden that none is left to compare with.
    """
    labeled, hidden, reader = args.labeled, set(), None
    if args.d:
        dataset = Dataset(dataset_name(args.d))
        reader = dataset.reader
        classes = Classes.from_file(dataset.json_file)
        classes.check_order(dataset.json_file)
        # nnU-Net keeps a copy beside the preprocessed data.
        folders = (dataset.raw / "labelsTr", dataset.preprocessed / "gt_segmentations")
        if labeled is None:
            labeled = next((folder for folder in folders if folder.is_dir()), None)
        # Another folder has what its owner put there, such as the training cases of one fold.
        if labeled is not None and labeled.resolve() in [folder.resolve() for folder in folders]:
            hidden = _hidden(dataset, args.fold)
    elif args.dataset_json or (args.i[0] / "dataset.json").is_file():
        file = args.dataset_json or args.i[0] / "dataset.json"
        classes = Classes.from_file(file)
        classes.check_order(file)
        reader = dataset_reader(read_json(file))
    reader = reader or find_reader(*args.i)
    if not (args.d or args.dataset_json or (args.i[0] / "dataset.json").is_file()):
        return find_labels(args.i, args.np, reader), labeled, hidden, reader
    for member in args.i:
        file = member / "dataset.json"
        if file.is_file():
            own = Classes.from_file(file)
            # A member may know an ignore label, which it never predicts.
            if (own.names, own.values, own.region_order) != (classes.names, classes.values, classes.region_order):
                raise ValueError(
                    f"{file} has the classes {', '.join(own.names)} with other names, values or order than "
                    f"{', '.join(classes.names)}. Members must have the same labels, and -d or --dataset-json, too"
                )
    return classes, labeled, hidden, reader


def _hidden(dataset: Dataset, folds: list[int] | None) -> set[str]:
    """The labeled cases that one of the folds hides; of all folds, if None is given.

    Raises:
        ValueError: if there is no such fold; or if none is given and too few cases are visible in all of them.
    """
    splits_file = dataset.splits_file
    hidden, labeled = all_hidden_cases(splits_file, folds), set(dataset.labeled_cases())
    if hidden and folds is None and len(labeled - hidden) < 2:
        raise ValueError(
            f"The folds of {splits_file} hide {len(labeled & hidden)} of {len(labeled)} labeled cases, so there are no "
            "volumes to compare with. Name the members' folds with --fold, or a folder of label maps with --labeled"
        )
    return hidden
