"""``nnunet_semiseg compare``: do models differ, by their evaluations on the same cases?"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, wilcoxon

from nnunet_semiseg.commands.evaluate import table
from nnunet_semiseg.files import read_json, whole, write_csv
from nnunet_semiseg.metrics import DISTANCES, METRICS, bootstrap_means
from nnunet_semiseg.segmentations import patients_of

SIGNIFICANT = 0.05
EXACT = 50
MEAN = "mean of classes"


def add_arguments(parser):
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


@dataclass
class PairedTest:
    """A paired test of one metric and class: ``other`` against ``first``.

    Args:
        pairs: Cases, or patients, that both models have a value for.
        changed: Pairs whose values differ.
        left_out: Cases, or patients, that only one or none of the models has a value for.
        first_mean, other_mean: Over the pairs.
        difference, low, high: Mean of other - first, with its 95 % percentile bootstrap interval.
        p: Two-sided, of Wilcoxon's signed-rank test.
        sign: Of the sum of the signed ranks of other - first.
        p_holm: ``p`` after Holm's correction for all tests of the call.
    """

    first: str
    other: str
    metric: str
    class_name: str
    pairs: int
    changed: int
    left_out: int
    first_mean: float
    other_mean: float
    difference: float
    low: float
    high: float
    p: float
    sign: int
    p_holm: float = math.nan
    verdict: str = ""


def run(args) -> None:
    folders = [Path(f).parent if Path(f).is_file() else Path(f) for f in args.folders]
    if len(folders) < 2:
        raise ValueError("One FOLDER is given. Give two or more to compare")
    if args.names and len(args.names) != len(folders):
        raise ValueError(f"--names has {len(args.names)} names for {len(folders)} FOLDERs")
    names = args.names or short_names(folders)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is given twice. Give different FOLDERs, and different --names")
    evaluations = [_read(folder, args.metrics) for folder in folders]
    for folder, evaluation in zip(folders[1:], evaluations[1:]):
        _check_same(folders[0], evaluations[0], folder, evaluation)
    classes = list(evaluations[0]["settings"]["labels"])
    cases = evaluations[0]["cases"]
    patients = patients_of(cases, args.patient) if args.patient else cases
    values = np.stack([evaluation["values"] for evaluation in evaluations])
    shown = classes + [MEAN] * (len(classes) > 1)
    tests = []
    for other in range(1, len(names)):
        pair = comparable(values[[0, other]], patients)
        tests += [
            paired_test(names[0], names[other], metric, class_name, *pair[:, :, c, m])
            for m, metric in enumerate(args.metrics)
            for c, class_name in enumerate(shown)
        ]
    _decide(tests)
    output = Path(args.o)
    unit = evaluations[0]["settings"]["unit"]
    labels = [f"{m}, {unit}" if m in DISTANCES else m for m in args.metrics]
    write_csv(output / "comparison.csv", list(PairedTest.__dataclass_fields__), (list(vars(t).values()) for t in tests))
    _plot(output / "comparison.png", comparable(values, patients), names, shown, labels)
    print(page(tests, dict(zip(args.metrics, labels)), "patients" if args.patient else "cases"))
    print(f"\nWritten to {output / 'comparison.csv'} and {output / 'comparison.png'}")


def short_names(folders: list[Path]) -> list[str]:
    """The parts of the folders' paths between what all have in common."""
    parts = [list(folder.resolve().parts) for folder in folders]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({p[end] for p in parts}) == 1:
            for p in parts:
                del p[end]
    return ["/".join(p) for p in parts]


def _read(folder: Path, metrics: list[str]) -> dict:
    """``settings``, and the sorted ``cases`` with their ``values`` (N, K, metrics) and voxels ``n_ref`` (N, K)."""
    file = folder / "evaluation.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Write it with nnunet_semiseg evaluate -o {folder} ...")
    try:
        content = read_json(file)
        classes = content["settings"]["labels"]
        cases = dict(sorted((record["case"], record["metrics"]) for record in content["metric_per_case"]))
        values, n_ref = (
            np.array([[[case[c][m] for m in wanted] for c in classes] for case in cases.values()], dtype=float)
            for wanted in (metrics, ["n_ref"])
        )
        content["settings"]["unit"]
        return {"settings": content["settings"], "cases": list(cases), "values": values, "n_ref": n_ref[..., 0]}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"{file} is no output of nnunet_semiseg evaluate, or lacks {', '.join(metrics)}. Write it again"
        ) from None


def _check_same(first_folder: Path, first: dict, folder: Path, other: dict) -> None:
    """Raise ValueError unless both evaluations have the same settings, cases and ground truth."""
    for key, value in first["settings"].items():
        if key not in ("ground_truth", "prediction", "patient") and other["settings"].get(key) != value:
            raise ValueError(
                f"{folder} was evaluated with {key} {other['settings'].get(key)}, but {first_folder} with {value}. "
                "Evaluate both in the same way"
            )
    for (folder_a, a), (folder_b, b) in (
        ((first_folder, first), (folder, other)),
        ((folder, other), (first_folder, first)),
    ):
        missing = [case for case in a["cases"] if case not in b["cases"]]
        if missing:
            raise ValueError(
                f"{folder_b} has no case {missing[0]}, which {folder_a} has ({len(missing)} are missing in all). "
                "Evaluate both on the same cases"
            )
    different = np.argwhere(first["n_ref"] != other["n_ref"])
    if len(different):
        case, class_index = different[0]
        raise ValueError(
            f"{folder} and {first_folder} were evaluated with different ground truth of case {first['cases'][case]}: "
            f"{list(first['settings']['labels'])[class_index]} has not the same number of voxels. Evaluate both with "
            "one"
        )


def comparable(values: np.ndarray, patients: list[str]) -> np.ndarray:
    """The values that all models have, so that none gains by what it lacks; NaN where one of them has none.

    Args:
        values: (models, N, K, metrics) of N cases and K classes.
        patients: Of the N cases.

    Returns:
        (models, P, K + 1, metrics): of each patient the mean over its cases. Last comes the mean of each case over its
        classes, unless there is only one.
    """
    values = np.where(np.isfinite(values).all(0), values, np.nan)
    with warnings.catch_warnings():
        # A case may have no class, and a patient no value.
        warnings.simplefilter("ignore", RuntimeWarning)
        if values.shape[2] > 1:
            values = np.concatenate((values, np.nanmean(values, axis=2, keepdims=True)), axis=2)
        groups = [np.flatnonzero(np.array(patients) == patient) for patient in dict.fromkeys(patients)]
        return np.stack([np.nanmean(values[:, group], axis=1) for group in groups], axis=1)


def paired_test(first: str, other: str, metric: str, class_name: str, a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Of the values ``a`` of ``first`` and ``b`` of ``other``; pairs with a NaN are left out.

    Differences of zero are left out of the ranks (Wilcoxon 1945).
    """
    known = np.isfinite(a) & np.isfinite(b)
    difference = b[known] - a[known]
    changed = difference[difference != 0]
    low = high = math.nan
    if len(difference) > 1:
        low, high = np.percentile(bootstrap_means(difference), (2.5, 97.5))
    return PairedTest(
        first,
        other,
        metric,
        class_name,
        pairs=len(difference),
        changed=len(changed),
        left_out=int((~known).sum()),
        first_mean=_mean(a[known]),
        other_mean=_mean(b[known]),
        difference=_mean(difference),
        low=float(low),
        high=float(high),
        p=signed_rank_p(changed),
        sign=int(np.sign((rankdata(np.abs(changed)) * np.sign(changed)).sum())),
    )


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of differences other than zero.

    Exact up to EXACT differences, with ties too: ranks are what they are, signs are by chance. scipy's, which is the
    normal approximation, beyond.
    """
    if len(differences) > EXACT:
        return float(wilcoxon(differences).pvalue)
    # Twice the ranks are whole numbers: tied ones end in a half at most.
    ranks = np.rint(2 * rankdata(np.abs(differences))).astype(int)
    chance = np.ones(1)  # of each sum of the ranks with a positive sign
    for rank in ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    found = ranks[differences > 0].sum()
    return float(min(1, 2 * min(chance[: found + 1].sum(), chance[found:].sum())))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def holm(p: list[float]) -> np.ndarray:
    """p-values after Holm's step-down correction (Holm 1979), in the given order."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p)[order]).clip(max=1)
    return adjusted


def cases_needed(tests: int) -> int:
    """From which number of pairs that differ on the smallest of so many p can be significant after Holm's correction.

    The smallest two-sided p of n pairs is 2 / 2^n: all differences have one sign. The smallest p is multiplied by the
    number of tests.
    """
    return math.ceil(1 + math.log2(tests / SIGNIFICANT))


def _decide(tests: list[PairedTest]) -> None:
    for test, p in zip(tests, holm([test.p for test in tests])):
        test.p_holm = float(p)
        if p <= SIGNIFICANT:
            test.verdict = "better" if (test.sign < 0) == (test.metric in DISTANCES) else "worse"
        # Equal values are left out of the test. Where all are equal, they do say something.
        elif (test.changed or test.pairs) < cases_needed(len(tests)):
            test.verdict = "too few cases"
        else:
            test.verdict = "no difference shown"


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


def _plot(file: Path, values: np.ndarray, names: list[str], classes: list[str], labels: list[str]) -> None:
    """Boxes (quartiles; whiskers to 1.5 of their range) and all cases, of (models, cases, classes, metrics) values."""
    import matplotlib
    from matplotlib.figure import Figure

    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    figure = Figure(figsize=(3 + 0.5 * len(classes) * (len(names) + 1), 3.5 * len(labels)), layout="constrained")
    starts = np.arange(len(classes)) * (len(names) + 1)
    for metric, (axes, label) in enumerate(zip(np.ravel(figure.subplots(len(labels), 1)), labels)):
        for model, name in enumerate(names):
            color = colors[model % len(colors)]
            groups = [column[np.isfinite(column)] for column in values[model, :, :, metric].T]
            box = dict(facecolor=color, alpha=0.4)
            line = dict(color="black")
            axes.boxplot(
                groups,
                positions=starts + model,
                widths=0.7,
                patch_artist=True,
                showfliers=False,
                boxprops=box,
                medianprops=line,
            )
            at = np.repeat(starts + model, list(map(len, groups)))
            axes.plot(at, np.concatenate(groups), ".", color=color, markersize=4, label=name)
        axes.set_xticks(starts + (len(names) - 1) / 2, classes)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center")
    with whole(file) as temporary:
        figure.savefig(temporary, dpi=100)
