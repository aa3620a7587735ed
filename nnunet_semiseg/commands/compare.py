"""``nnunet_semiseg compare``: do models differ, by their evaluations on the same cases?"""

from __future__ import annotations

import argparse
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np

from nnunet_semiseg.evaluation.comparison import check_same, compare, plot, read_evaluation, shown_classes
from nnunet_semiseg.evaluation.metrics import DISTANCES, METRICS
from nnunet_semiseg.evaluation.statistics import SIGNIFICANT, PairedTest, cases_needed, comparable
from nnunet_semiseg.files import write_csv
from nnunet_semiseg.markdown import table
from nnunet_semiseg.segmentations import patients_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="outputs of nnunet_semiseg evaluate, two or more; every other one is compared with the first",
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the models (default: what differs in FOLDERs)")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=["Dice", "HD95"], help="default: Dice HD95", metavar="METRIC"
    )
    parser.add_argument(
        "--patient",
        metavar="REGEX",
        help=r"the patient in a case's name, such as 'patient\d+': patients are compared, by the means of their cases",
    )
    parser.add_argument(
        "-o", metavar="OUT", default=".", help="folder for comparison.csv and comparison.png (default .)"
    )


def run(args: argparse.Namespace) -> None:
    folders = [Path(f).parent if Path(f).is_file() else Path(f) for f in args.folders]
    names = names_of(folders, args.names)
    evaluations = [read_evaluation(folder, args.metrics) for folder in folders]
    first = evaluations[0]
    for other in evaluations[1:]:
        check_same(first, other)
    patients = patients_of(first.cases, args.patient) if args.patient else first.cases
    values = np.stack([evaluation.values for evaluation in evaluations])
    tests = compare(names, values, patients, first.classes, args.metrics)
    output = Path(args.o)
    labels = [f"{m}, {first.settings['unit']}" if m in DISTANCES else m for m in args.metrics]
    write_csv(output / "comparison.csv", [field.name for field in fields(PairedTest)], map(astuple, tests))
    plot(output / "comparison.png", comparable(values, patients), names, shown_classes(first.classes), labels)
    print(page(tests, dict(zip(args.metrics, labels)), "patients" if args.patient else "cases"))
    print(f"\nWritten to {output / 'comparison.csv'} and {output / 'comparison.png'}")


def names_of(folders: list[Path], given: list[str] | None, what: str = "FOLDER") -> list[str]:
    """The names of what is compared, by default the short ones.

    Raises:
        ValueError: if there is only one, or two have the same name, or not all have one.
    """
    if len(folders) < 2:
        raise ValueError(f"One {what} is given. Give two or more to compare")
    if given and len(given) != len(folders):
        raise ValueError(f"--names has {len(given)} names for {len(folders)} {what}s")
    names = given or short_names(folders)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is given twice. Give different {what}s, and different --names")
    return names


def short_names(folders: list[Path]) -> list[str]:
    """The parts of the folders' paths between what all have in common."""
    parts = [list(folder.resolve().parts) for folder in folders]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({p[end] for p in parts}) == 1:
            for p in parts:
                del p[end]
    return ["/".join(p) for p in parts]


def page(tests: list[PairedTest], labels: dict[str, str], compared: str) -> str:
    """A table for each model that is compared with the first, and what one has to know to read them, as markdown.

    Args:
        labels: Of the metrics, with units.
        compared: "cases" or "patients".
    """
    parts = []
    for other in dict.fromkeys(test.other for test in tests):
        rows = []
        for t in (t for t in tests if t.other == other):
            digits = 2 if t.metric in DISTANCES else 3
            first, second, difference, low, high = (
                f"{value:.{digits}f}".replace("nan", "–")
                for value in (t.first_mean, t.other_mean, t.difference, t.low, t.high)
            )
            numbers = [first, second, f"{difference} [{low}, {high}]", f"{t.p:.4f}", f"{t.p_holm:.4f}"]
            rows.append([labels[t.metric], t.class_name, str(t.pairs), *numbers, t.verdict])
        header = ["metric", "class", compared, "first", "second", "difference [95 %]", "p", "p (Holm)", "second is"]
        parts.append(f"First: {tests[0].first}\nSecond: {other}\n\n{table(header, rows)}")
    parts.append(
        f"Means over the {compared} that both have a value for; difference: second - first, with the bootstrap "
        f"interval of its mean. p: Wilcoxon's signed-rank test, two-sided; after Holm's correction for the "
        f"{len(tests)} tests of this call, {SIGNIFICANT:g} or less counts as a difference."
    )
    if compared == "cases":
        parts.append("Each case counts as a patient of its own. If some are of one patient, say so with --patient.")
    if any(test.verdict == "too few cases" for test in tests):
        parts.append(
            f"Too few cases to tell: with {len(tests)} tests the smallest p can be significant from "
            f"{cases_needed(len(tests))} {compared} on that differ. Evaluate more, or compare fewer metrics or models "
            "in one call."
        )
    return "\n\n".join(parts)
