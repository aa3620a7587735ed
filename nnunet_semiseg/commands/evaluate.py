"""``nnunet_semiseg evaluate``: overlap and surface distances of predictions, for each case and class."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.datasets import CaseError, Dataset, dataset_name, dataset_reader
from nnunet_semiseg.evaluation import flare
from nnunet_semiseg.evaluation.cases import RESULTS, TABLE, evaluate_files, write_results
from nnunet_semiseg.evaluation.metrics import METRICS, TOLERANCE, Rules
from nnunet_semiseg.evaluation.statistics import Summary
from nnunet_semiseg.files import read_json
from nnunet_semiseg.markdown import table
from nnunet_semiseg.parallel import add_processes_argument, print_failures
from nnunet_semiseg.segmentations import Classes, find_files, find_reader, patients_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-g", required=True, metavar="GROUND_TRUTH", help="folder with the ground truth's label maps")
    parser.add_argument("-p", required=True, metavar="PREDICTION", help="folder with the predicted label maps")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "-d", help="dataset id or name: its labels and reader (default: PREDICTION's or GROUND_TRUTH's)"
    )
    labels.add_argument("-djfile", "--dataset-json", metavar="FILE", help="a dataset.json, for its labels")
    labels.add_argument("--labels", nargs="+", help="the labels: 1 2 3, or with names: liver=1 kidneys=2,3 ignore=255")
    labels.add_argument(
        "--preset",
        choices=tuple(flare.PRESETS),
        help="the labels, tolerances and rules of a FLARE challenge, computed as its script does",
    )
    parser.add_argument("--corrected", action="store_true", help="with --preset: without the slips of the script")
    parser.add_argument("-o", metavar="OUT", help="folder for evaluation.csv and evaluation.json (default: PREDICTION)")
    parser.add_argument(
        "--tolerance",
        nargs="+",
        default=[],
        help=f"of NSD in mm: 1, or for single classes: liver=5 (default {TOLERANCE:g})",
    )
    parser.add_argument("--unit", choices=("mm", "voxel"), default="mm", help="of distances (default %(default)s)")
    parser.add_argument(
        "--both-empty",
        choices=("leave-out", "perfect"),
        default="leave-out",
        help="a class that neither map has: left out of means, or overlap 1 and distance 0 (default %(default)s)",
    )
    parser.add_argument(
        "--one-empty",
        choices=("diagonal", "leave-out"),
        default="diagonal",
        help="distances of a class that one map lacks: the image's diagonal, or left out (default %(default)s)",
    )
    parser.add_argument(
        "--patient",
        metavar="REGEX",
        help=r"the patient in a case's name, such as 'patient\d+': intervals are for patients, not cases",
    )
    parser.add_argument("--chill", action="store_true", help="allow ground truth of cases that were not predicted")
    add_processes_argument(parser)


def run(args: argparse.Namespace) -> int:
    ending: str | None
    reader: type | None
    if args.preset:
        classes, rules = _preset(args)
        ending, reader = ".nii.gz", SimpleITKIO
    elif args.corrected:
        raise ValueError("--corrected is for a --preset. Give one, or leave --corrected out")
    else:
        classes, ending, reader = _classes(args)
        rules = Rules(tolerances(args.tolerance, classes), args.unit, args.both_empty, args.one_empty)
    files = _pairs(find_files(args.g, ending), find_files(args.p, ending), args)
    patients = patients_of(files, args.patient) if args.patient else None
    output = Path(args.o or args.p)
    records, failures = evaluate_files(files, classes, rules, output, args.np, reader)
    if failures:
        print_failures(
            failures,
            f"{len(failures)} of {len(files)} cases could not be evaluated (above), so {TABLE} is not written. "
            "Fix these and run the command again: the others are kept.",
        )
        return 1
    for warning in dict.fromkeys(warning for record in records for warning in record["warnings"]):
        print(f"Warning: {warning}", file=sys.stderr)
    settings = {"ground_truth": str(args.g), "prediction": str(args.p), "patient": args.patient}
    summary = write_results(output, records, classes, rules, patients, settings)
    print(page(records, summary, classes, rules))
    written = [output / TABLE, output / RESULTS]
    if rules.challenge:
        scores = flare.write_scores(output, records, rules.challenge)
        print(
            f"\nOrgan_DSC {scores['Organ_DSC']:.4f}, Organ_NSD {scores['Organ_NSD']:.4f} by the rules of {args.preset}"
        )
        written += [output / flare.CASES, output / flare.SCORES]
    print(f"\nWritten to {', '.join(map(str, written[:-1]))} and {written[-1]}")
    return 0


def _preset(args: argparse.Namespace) -> tuple[Classes, Rules]:
    """The classes and rules of a challenge; only the unit of distances is open."""
    given = {
        "--tolerance": args.tolerance,
        "--both-empty": args.both_empty != "leave-out",
        "--one-empty": args.one_empty != "diagonal",
        "--chill": args.chill,
    }
    for option, is_given in given.items():
        if is_given:
            raise ValueError(f"--preset {args.preset} has rules of its own. Leave {option} out")
    classes, rules = flare.preset_rules(args.preset, args.corrected)
    return classes, replace(rules, unit=args.unit)


def _classes(args: argparse.Namespace) -> tuple[Classes, str | None, type | None]:
    """The classes, the file ending that dataset.json gives, and nnU-Net's reader if something tells it."""
    prediction, truth = Path(args.p), Path(args.g)
    folders = (prediction, truth, truth.resolve().parent)
    if args.labels:
        return parse_labels(args.labels), None, find_reader(*folders)
    if args.d:
        dataset = Dataset(dataset_name(args.d))
        return Classes.from_file(dataset.json_file), dataset.file_ending, dataset.reader
    if args.dataset_json:
        file = Path(args.dataset_json)
    else:
        # nnU-Net writes it to predictions, and has it beside labelsTr and gt_segmentations.
        files = [f / "dataset.json" for f in folders if (f / "dataset.json").is_file()]
        if not files:
            raise ValueError(
                f"There is no dataset.json in {prediction} or beside {truth}. Give the labels: -d, -djfile or --labels"
            )
        file = files[0]
    classes = Classes.from_file(file)
    content = read_json(file)
    reader = dataset_reader(content) if args.dataset_json else None
    return classes, content.get("file_ending"), reader or find_reader(*folders)


def parse_labels(labels: list[str]) -> Classes:
    """``1 2``, ``liver=1 kidneys=2,3 ignore=255`` to classes.

    Raises:
        ValueError: naming what is no label, or occurs twice.
    """
    named: dict[str, tuple[int, ...]] = {}
    for label in labels:
        name, _, values = label.rpartition("=")
        try:
            numbers = tuple(map(int, values.split(",")))
        except ValueError:
            numbers = (0,)
        if min(numbers) < 1 or max(numbers) > 65535:
            raise ValueError(f"--labels {label} is not a label or NAME=LABEL. Labels are from 1 to 65535")
        name = name or values
        if name in named:
            raise ValueError(f"--labels has {name} twice")
        named[name] = numbers
    ignored = named.pop("ignore", ())
    if len(ignored) > 1:
        raise ValueError(
            f"--labels ignore={ignored[0]},{ignored[1]}: only one label can be ignored. Make them one in the files"
        )
    if not named:
        raise ValueError("--labels has no class")
    known = frozenset({0, *(v for values in named.values() for v in values), *ignored})
    return Classes(tuple(named), tuple(named.values()), ignored[0] if ignored else None, known=known)


def tolerances(given: list[str], classes: Classes) -> tuple[float, ...]:
    """``1 liver=5`` to a tolerance in mm for each class.

    Raises:
        ValueError: naming what is no tolerance, or of no class.
    """
    by_class = dict.fromkeys(classes.names, TOLERANCE)
    # Those for all classes first, wherever they are written.
    for text in sorted(given, key=lambda text: "=" in text):
        name, _, number = text.rpartition("=")
        try:
            tolerance = float(number)
        except ValueError:
            tolerance = -1
        if not 0 <= tolerance < float("inf"):
            raise ValueError(f"--tolerance {text} is not a number of mm, or NAME=NUMBER")
        if name and name not in by_class:
            raise ValueError(f"--tolerance {text}: there is no class {name}, but {', '.join(classes.names)}")
        by_class |= dict.fromkeys([name] if name else classes.names, tolerance)
    return tuple(by_class.values())


def _pairs(
    truths: dict[str, Path], predictions: dict[str, Path], args: argparse.Namespace
) -> dict[str, tuple[Path, Path]]:
    """{case: (ground truth, prediction)} of the predicted cases."""
    without = [case for case in predictions if case not in truths]
    if without:
        raise CaseError(
            f"{predictions[without[0]]} has no ground truth in {args.g} ({len(without)} of {len(predictions)} "
            "predictions have none). Add it, or remove the prediction"
        )
    extra = [case for case in truths if case not in predictions]
    if extra and not args.chill:
        raise CaseError(
            f"{truths[extra[0]]} has no prediction in {args.p} ({len(extra)} of {len(truths)} cases have none). "
            f"Predict them{'' if args.preset else ', or evaluate only those that are there with --chill'}"
        )
    return {case: (truths[case], predictions[case]) for case in predictions}


def page(records: list[dict], summary: Summary, classes: Classes, rules: Rules) -> str:
    """The tables of means, and what one has to know to read them, as markdown."""
    rows = (*classes.names, "mean") if len(classes.names) > 1 else classes.names
    tolerance = [*(f"{t:g} mm" for t in rules.tolerances), ""]

    def cell(row: int, metric: str, digits: int) -> str:
        column = METRICS.index(metric)
        if not summary.cases[row, column]:
            return "–"
        mean, sd, low, high = (
            f"{a[row, column]:.{digits}f}".replace("nan", "–")
            for a in (summary.mean, summary.sd, summary.low, summary.high)
        )
        return f"{mean} ± {sd} [{low}, {high}]"

    overlap = {"Dice": "Dice", "Jaccard": "Jaccard = CSI", "Precision": "Precision", "Recall": "Recall"}
    shown = ("HD", "HD95", "ASSD") if rules.unit == "mm" else ("HD", "HD95", "ASSD", "HD95_pooled", "ASD")
    tables = [
        table(
            ["class", "cases", *overlap.values()],
            [[name, str(summary.cases[i, 0]), *(cell(i, m, 3) for m in overlap)] for i, name in enumerate(rows)],
        ),
        table(
            ["class", "cases", *(f"{metric}, {rules.unit}" for metric in shown), "NSD", "tolerance"],
            [
                [name, str(summary.cases[i, METRICS.index("HD")]), *(cell(i, m, 2) for m in shown), cell(i, "NSD", 3)]
                + [tolerance[i]]
                for i, name in enumerate(rows)
            ],
        ),
    ]
    spacings = np.array([record["spacing"] for record in records])
    spacing = " x ".join(
        f"{a:.3g}" if np.isclose(a, b) else f"{a:.3g}-{b:.3g}" for a, b in zip(spacings.min(0), spacings.max(0))
    )
    notes = [
        f"Mean ± standard deviation over {len(records)} cases [95 % bootstrap interval of the mean]. "
        f"Spacing ({', '.join('zyx'[-spacings.shape[1] :])}) {spacing} mm. HD95: larger of the two directed 95th "
        "percentiles; ASSD: over the surface voxels of both; NSD: share of the surface area within the tolerance, with "
        "DeepMind's surface elements."
    ]
    one = f"overlap 0, distances {'the diagonal of the image' if rules.one_empty == 'diagonal' else 'left out'}"
    meanings = {
        (False, False): f"neither map has it ({'left out' if rules.both_empty == 'leave-out' else 'perfect'})",
        (True, False): f"the prediction misses it ({one})",
        (False, True): f"only the prediction has it ({one})",
    }
    for name in classes.names:
        present = [(r["metrics"][name]["n_ref"] > 0, r["metrics"][name]["n_pred"] > 0) for r in records]
        notes += [
            f"{name}: in {present.count(k)} case(s) {meaning}." for k, meaning in meanings.items() if k in present
        ]
    return "\n\n".join([*tables, "\n".join(notes)])
