"""Evaluations of several models on the same cases: read, checked against each other, tested and plotted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_semiseg.evaluation.cases import RESULTS
from nnunet_semiseg.evaluation.statistics import PairedTest, comparable, decide, paired_test
from nnunet_semiseg.files import read_json, whole

MEAN = "mean of classes"


@dataclass(frozen=True)
class Evaluation:
    """Results of one model.

    Args:
        folder: In which they lie.
        settings: Of ``nnunet_semiseg evaluate``.
        cases: Sorted names of N cases.
        values: (N, K, M) of K classes and the M metrics that were asked for; NaN is a value that is left out.
        n_ref: (N, K) voxels of the ground truth.
    """

    folder: Path
    settings: dict
    cases: list[str]
    values: np.ndarray
    n_ref: np.ndarray

    @property
    def classes(self) -> list[str]:
        return list(self.settings["labels"])


def read_evaluation(folder: Path, metrics: Sequence[str]) -> Evaluation:
    """The results of one model.

    Raises:
        FileNotFoundError, ValueError: with the file that is missing, or is none with these metrics.
    """
    file = folder / RESULTS
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
        return Evaluation(folder, content["settings"], list(cases), values, n_ref[..., 0])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"{file} is no output of nnunet_semiseg evaluate, or lacks {', '.join(metrics)}. Write it again"
        ) from None


def check_same(first: Evaluation, other: Evaluation) -> None:
    """Raise ValueError unless both have the same settings, cases and ground truth."""
    for key, value in first.settings.items():
        if key not in ("ground_truth", "prediction", "patient") and other.settings.get(key) != value:
            raise ValueError(
                f"{other.folder} was evaluated with {key} {other.settings.get(key)}, but {first.folder} with {value}. "
                "Evaluate both in the same way"
            )
    for a, b in ((first, other), (other, first)):
        missing = [case for case in a.cases if case not in b.cases]
        if missing:
            raise ValueError(
                f"{b.folder} has no case {missing[0]}, which {a.folder} has ({len(missing)} are missing in all). "
                "Evaluate both on the same cases"
            )
    different = np.argwhere(first.n_ref != other.n_ref)
    if len(different):
        case, class_index = different[0]
        raise ValueError(
            f"{other.folder} and {first.folder} were evaluated with different ground truth of case "
            f"{first.cases[case]}: {first.classes[class_index]} has not the same number of voxels. Evaluate both with "
            "one"
        )


def compare(
    names: Sequence[str], values: np.ndarray, patients: Sequence[str], classes: Sequence[str], metrics: Sequence[str]
) -> list[PairedTest]:
    """Tests of every other model against the first, with Holm's correction for all of them.

    Args:
        names: Of the models.
        values: (models, N, K, metrics) of N cases and K classes.
        patients: Of the N cases.
    """
    shown = shown_classes(classes)
    tests = []
    for other in range(1, len(names)):
        pair = comparable(values[[0, other]], patients)
        tests += [
            paired_test(names[0], names[other], metric, class_name, *pair[:, :, c, m])
            for m, metric in enumerate(metrics)
            for c, class_name in enumerate(shown)
        ]
    decide(tests)
    return tests


def shown_classes(classes: Sequence[str]) -> list[str]:
    """The classes that ``comparable`` has: last comes the mean, unless there is only one."""
    return [*classes, MEAN] if len(classes) > 1 else list(classes)


def colors(number: int) -> list[str]:
    """So many colors of lines, as in HTML; beyond 20 they come again."""
    import matplotlib
    from matplotlib.colors import to_hex

    palette, size = ("tab10", 10) if number <= 10 else ("tab20", 20)
    return [to_hex(matplotlib.colormaps[palette](i % size)) for i in range(number)]


def plot(file: Path, values: np.ndarray, names: Sequence[str], classes: Sequence[str], labels: Sequence[str]) -> None:
    """Boxes (quartiles; whiskers to 1.5 of their range) and all cases, of (models, cases, classes, metrics) values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 0.5 * len(classes) * (len(names) + 1), 3.5 * len(labels)), layout="constrained")
    palette = colors(len(names))
    starts = np.arange(len(classes)) * (len(names) + 1)
    for metric, (axes, label) in enumerate(zip(np.ravel(figure.subplots(len(labels), 1)), labels)):
        for model, name in enumerate(names):
            color = palette[model]
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
