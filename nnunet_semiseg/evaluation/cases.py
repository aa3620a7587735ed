"""Label maps evaluated file by file, so that a stopped call continues, and the files of the results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.evaluation import flare
from nnunet_semiseg.evaluation.metrics import METRICS, Rules, case_metrics
from nnunet_semiseg.evaluation.statistics import Summary, summarize
from nnunet_semiseg.files import read_json, write_csv, write_json
from nnunet_semiseg.parallel import over_cases
from nnunet_semiseg.segmentations import Classes, geometry_difference, read_labels, version

COUNTS = ("TP", "FP", "FN", "n_ref", "n_pred")
TABLE, RESULTS = "evaluation.csv", "evaluation.json"
# In the folder of the results, a file for each finished case until all are there.
UNFINISHED = "evaluation.unfinished"


def evaluate_files(
    files: Mapping[str, tuple[Path, Path]],
    classes: Classes,
    rules: Rules,
    output: Path,
    processes: int,
    reader: type | None = None,
) -> tuple[list[dict], list[str]]:
    """Evaluate cases, but for those that an earlier call with the same files and rules finished.

    If there is anything to evaluate, the results of an earlier call are removed first: should a case fail now, nobody
    takes them for those of these files.

    Args:
        files: {case: (ground truth, prediction)}.
        output: Folder of the results.
        reader: nnU-Net's; None for that of the files' ending.

    Returns:
        The records of the cases, in the order of ``files``, and a line for each case that failed.
    """
    unfinished = output / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    jobs, records = {}, {}
    for case, pair in files.items():
        # With the metrics: another version may have others.
        key = json.dumps([METRICS, _described(classes, rules), reader and reader.__name__, *map(version, pair)])
        part = unfinished / f"{case}.json"
        records[case] = _finished(part, key)
        if records[case] is None:
            jobs[case] = (case, *pair, classes, rules, part, key, reader)
    if jobs:
        for result in (TABLE, RESULTS, flare.CASES, flare.SCORES):
            (output / result).unlink(missing_ok=True)
    done, failures = over_cases(evaluate_case, jobs, processes, "Evaluating", done=len(files) - len(jobs))
    records |= done
    return [record for record in records.values() if record], failures


def _described(classes: Classes, rules: Rules) -> dict:
    """What results depend on, apart from the files."""
    return {
        "labels": dict(zip(classes.names, classes.values)),
        "ignore": classes.ignore,
        **asdict(rules),
        "tolerances": dict(zip(classes.names, rules.tolerances)),
    }


def _finished(part: Path, key: str) -> dict | None:
    """The record of a case that an earlier call finished, if nothing changed since."""
    try:
        content = read_json(part)
        return content["record"] if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def evaluate_case(
    case: str,
    truth_file: Path,
    prediction_file: Path,
    classes: Classes,
    rules: Rules,
    part: Path,
    key: str,
    reader: type | None = None,
) -> dict:
    """Evaluate one case, write its record to ``part``, and return it.

    Args:
        reader: nnU-Net's; None for that of the files' ending.

    Raises:
        CaseError: naming the file that is damaged or has unknown labels, or the two that do not fit.
    """
    warnings = []
    as_the_script = rules.challenge is not None and rules.challenge.slips
    if rules.challenge is not None and as_the_script:
        truth, geometry = flare.read_as_the_script(truth_file, rules.challenge.preset)
        prediction, predicted = flare.read_as_the_script(prediction_file, rules.challenge.preset)
    else:
        truth, geometry = read_labels(truth_file, classes.known, reader)
        prediction, predicted = read_labels(prediction_file, classes.known, reader)
    if np.squeeze(truth).ndim > 3:
        raise CaseError(f"{truth_file} is {truth.ndim}D. Split it into one file for each time point")
    if rules.challenge is not None and truth.ndim != 3:
        raise CaseError(f"{truth_file} is {truth.ndim}D. The rules of {rules.challenge.preset} are for 3D label maps")
    difference = geometry_difference(geometry, predicted)
    if difference and as_the_script and truth.shape == prediction.shape:
        warnings.append(f"{truth_file} and {prediction_file} have different {difference}; the script takes no notice")
    elif difference:
        raise CaseError(
            f"{truth_file} and {prediction_file} have different geometry: {difference}. Predict the image that the "
            "ground truth belongs to, or resample the prediction to it"
        )
    try:
        metrics = case_metrics(truth, prediction, geometry.spacing, classes, rules)
    except CaseError as error:
        raise CaseError(f"{truth_file}: {error}") from None
    record = {
        "case": case,
        "reference_file": str(truth_file),
        "prediction_file": str(prediction_file),
        "spacing": geometry.spacing,
        "metrics": metrics,
        "warnings": [*warnings, *(g.warning for g in (geometry, predicted) if g.warning)],
    }
    write_json(part, {"key": key, "record": record})
    return record


def write_results(
    output: Path,
    records: Sequence[dict],
    classes: Classes,
    rules: Rules,
    patients: Sequence[str] | None,
    settings: dict,
) -> Summary:
    """Write TABLE and RESULTS, and remove what ``evaluate_files`` kept.

    Args:
        patients: Of the records, for intervals for patients; None for cases.
        settings: What else is to stand in the settings of RESULTS, beside classes and rules.
    """
    values = np.array(
        [[[record["metrics"][name][m] for m in METRICS] for name in classes.names] for record in records], dtype=float
    )
    summary = summarize(values, patients)
    tolerance = dict(zip(classes.names, rules.tolerances))
    write_csv(
        output / TABLE,
        ["case", "class", *COUNTS, *METRICS, "NSD_tolerance_mm", "distance_unit"],
        (
            [r["case"], name, *(r["metrics"][name][m] for m in (*COUNTS, *METRICS)), tolerance[name], rules.unit]
            for r in records
            for name in classes.names
        ),
    )

    def number(array: np.ndarray, *index: int) -> float | None:
        return None if np.isnan(array[index]) else float(array[index])

    statistics = {
        name: {
            metric: {
                "mean": number(summary.mean, row, column),
                "sd": number(summary.sd, row, column),
                "ci95": [number(summary.low, row, column), number(summary.high, row, column)],
                "cases": int(summary.cases[row, column]),
            }
            for column, metric in enumerate(METRICS)
        }
        for row, name in enumerate((*classes.names, "foreground_mean"))
    }
    mean = {name: {metric: s["mean"] for metric, s in by_metric.items()} for name, by_metric in statistics.items()}
    write_json(
        output / RESULTS,
        {
            "settings": {**settings, **_described(classes, rules)},
            # As in nnU-Net's summary.json.
            "foreground_mean": mean.pop("foreground_mean"),
            "mean": mean,
            "summary": statistics,
            "metric_per_case": [{key: r[key] for key in r if key != "warnings"} for r in records],
        },
    )
    shutil.rmtree(output / UNFINISHED)
    return summary
