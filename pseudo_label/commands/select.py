"""``pseudo_label select``: which scored cases become training cases, and which a person should annotate."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nnunet_semiseg.segmentations import Classes
from pseudo_label.score_files import read_labeled_volumes, read_scores, scored_classes
from pseudo_label.selection import SelectionRules, rejected_to_annotate, select
from pseudo_label.selection_files import (
    case_images,
    export_for_annotation,
    ignore_value,
    remove_selection,
    write_selection,
)

# With fewer than 20 labeled cases this is all of them.
DEFAULT_PRESENCE = 0.95


def add_rules(parser: argparse.ArgumentParser, meaning: str) -> None:
    """The flags of SelectionRules, which ``rounds`` has as well."""
    rules = parser.add_argument_group("rules", meaning)
    rules.add_argument("--threshold", type=float, metavar="T", help="lowest score (T itself is accepted)")
    rules.add_argument(
        "--class-threshold", nargs="+", type=_pair(float), default=[], metavar="NAME=T", help="lowest score of a class"
    )
    rules.add_argument(
        "--max-volume-zscore",
        type=float,
        metavar="Z",
        help="largest difference of a class's volume from the labeled cases', in standard deviations",
    )
    rules.add_argument(
        "--max-components",
        nargs="+",
        type=_pair(int),
        default=[],
        metavar="NAME=N",
        help="largest number of connected components of a class",
    )
    rules.add_argument("--top", type=int, metavar="K", help="at most the K best of the cases that fulfill the others")
    rules.add_argument(
        "--fraction", type=float, metavar="F", help="the same with K = F times the scored cases, rounded down"
    )
    rules.add_argument(
        "--balanced", action="store_true", help="with --top or --fraction: the classes take turns to choose a case"
    )
    rules.add_argument(
        "--presence",
        type=_share_or_off,
        metavar="S",
        help="classes that at least this share of the labeled cases has must be in the consensus; or off (default "
        f"{DEFAULT_PRESENCE}, if labeled cases are known)",
    )
    rules.add_argument("--may-be-absent", nargs="+", default=[], metavar="NAME", help="classes that --presence ignores")
    parser.add_argument(
        "--min-agreement",
        type=float,
        default=0.0,
        metavar="A",
        help="voxels of accepted cases on which a smaller share of the members agrees become the ignore label",
    )


T = TypeVar("T")


def _pair(kind: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    def pair(text: str) -> tuple[str, T]:
        name, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError
        return name, kind(value)

    pair.__name__ = "NAME=VALUE"
    return pair


def _share_or_off(text: str) -> float | str:
    return text if text == "off" else float(text)


_share_or_off.__name__ = "share"


def read_rules(args: argparse.Namespace, classes: Classes) -> SelectionRules:
    """Raises ValueError if a rule cannot be applied."""
    rules = SelectionRules(
        args.threshold,
        dict(args.class_threshold),
        args.max_volume_zscore,
        dict(args.max_components),
        args.top,
        args.fraction,
        args.balanced,
        {None: DEFAULT_PRESENCE, "off": None}.get(args.presence, args.presence),
        tuple(args.may_be_absent),
    )
    rules.check(classes.names)
    if not 0 <= args.min_agreement <= 1:
        raise ValueError(f"--min-agreement {args.min_agreement:g} is not between 0 and 1")
    return rules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="SCORED", help="folder that pseudo_label score wrote")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder of the decisions and label maps")
    add_rules(parser, "a case must satisfy --presence and every rule given; without any, it needs foreground")
    annotate = parser.add_argument_group("annotation by a person")
    annotate.add_argument(
        "--annotate",
        type=int,
        metavar="N",
        help="also list the N cases whose annotation should help most, of those that are not accepted",
    )
    annotate.add_argument("--images", type=Path, help="folder of the images (CASE_0000...), to open with these cases")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier selection in OUT")


def run(args: argparse.Namespace) -> None:
    classes, scores, labeled = scored_classes(args.i), read_scores(args.i), read_labeled_volumes(args.i)
    # The scores may be of a version that did not check it.
    classes.check_order(args.i / "score.json")
    rules = read_rules(args, classes)
    if args.presence is None and not labeled:
        rules = replace(rules, presence=None)
    images = None
    if args.annotate is not None:
        if args.annotate < 1:
            raise ValueError(f"--annotate {args.annotate} is not a number of cases. Use 1 or more")
        if args.images is None:
            raise ValueError("--annotate needs the images as well: --images FOLDER")
        images = case_images(args.images, scores)
    decisions = select(scores, rules, labeled)
    if args.overwrite:
        remove_selection(args.o)
    elif args.o.exists() and any(args.o.iterdir()):
        raise FileExistsError(f"{args.o} is not empty. Choose another -o, or replace what is there with --overwrite")
    chosen = [] if images is None else rejected_to_annotate(scores, decisions, args.annotate)
    if chosen and images is not None:
        export_for_annotation(args.i, args.o / "annotate", chosen, scores, images, classes)
    write_selection(args.i, args.o, decisions, scores, classes, args.min_agreement)
    accepted = [case for case, decision in decisions.items() if decision.accepted]
    print(f"{len(accepted)} of {len(decisions)} cases are accepted. Label maps: {args.o / 'labels'}")
    print(f"Reasons: {args.o / 'selection.csv'}")
    if args.presence is None and not labeled:
        print(
            "No labeled cases are known, so a class that all members missed goes unnoticed. Score with -d, or with "
            "--labeled"
        )
    if args.min_agreement > 0:
        ignore = ignore_value(classes)
        print(
            f'Voxels without agreement have the label {ignore}: put "ignore": {ignore} into the labels of dataset.json'
        )
    if images is not None and not chosen:
        print("To annotate next: none, as all cases are accepted")
    if chosen:
        print(f"To annotate next, most useful first: {', '.join(chosen)}. Open {args.o / 'annotate'}")
