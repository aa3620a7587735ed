"""``nnunet_semiseg convert``: a public download, or folders of images and labels, as an nnU-Net dataset."""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import os
import pkgutil
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

import dataset_conversion
from dataset_conversion.common import SUFFIXES, Case, Download, Source, convert_case
from nnunet_semiseg import __version__
from nnunet_semiseg.data.splits import make_folds
from nnunet_semiseg.datasets import check_variables
from nnunet_semiseg.files import read_json, write_csv, write_json
from nnunet_semiseg.parallel import add_processes_argument, over_cases, print_failures
from nnunet_semiseg.segmentations import version

SPLITS = ("train", "validation", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in _modules().items():
        subparser = names.add_parser(name, help=module.SOURCE.title, description=f"Convert {module.SOURCE.title}.")
        subparser.add_argument("-i", required=True, type=Path, metavar="DOWNLOAD", help="folder or archive, unchanged")
        subparser.add_argument("-d", required=True, help="id of the new dataset, or Dataset501_Name")
        budget = subparser.add_mutually_exclusive_group()
        budget.add_argument(
            "--labeled",
            type=int,
            metavar="N",
            help="labeled training patients: the first of the published list, or by name",
        )
        budget.add_argument(
            "--budget", metavar="NAME", help="the labeled cases or patients: a list in --splits, such as LA/labeled_4"
        )
        subparser.add_argument(
            "--splits", type=Path, metavar="JSON", help="lists for --budget; beside it may be train, validation, test"
        )
        subparser.add_argument("--link", action="store_true", help="link files that need no change; do not copy them")
        add_processes_argument(subparser)
        getattr(module, "add_arguments", lambda parser: None)(subparser)


def _modules() -> dict:
    """{LA2018: the module Dataset501_LA2018, ...}"""
    names = [m.name for m in pkgutil.iter_modules(dataset_conversion.__path__) if m.name.startswith("Dataset")]
    return {n.partition("_")[2]: importlib.import_module(f"dataset_conversion.{n}") for n in sorted(names)}


def run(args: argparse.Namespace) -> int:
    source: Source = _modules()[args.name].SOURCE
    if not source.labels:
        source = replace(source, labels=dict(args.labels), channels=tuple(args.channels))
    name = _new_name(args.d, args.name)
    raw = Path(str(nnUNet_raw))
    # Beside the dataset, so that a rename publishes it; nnU-Net does not see names that do not start with Dataset.
    work = raw / f".unfinished-{name}"
    unpacked = work / "unpacked"
    lists = _read_lists(args.splits, args.budget)
    download = Download(args.i, unpacked)
    found = _checked(source.cases(download, args))
    parts = assign(found, args.labeled, lists)
    cases = {case.name: case for case in found if case.name in parts}
    folds = splits_of(cases, parts)
    splits_file = Path(str(nnUNet_preprocessed)) / name / "splits_final.json"
    if splits_file.is_file() and read_json(splits_file) != folds:
        raise FileExistsError(f"{splits_file} is of another dataset that was called {name}. Remove its folder")

    records = work / "records"
    _forget_changed(work, {"nnunet_semiseg": __version__, "labels": source.labels, "link": args.link}, cases, parts)
    # Of a process that was killed while it wrote them; nnU-Net would take them for cases.
    for leftover in (work / "dataset").rglob(".unfinished-*"):
        leftover.unlink()
    missing = [case for case in cases.values() if not (records / f"{case.name}.json").is_file()]
    jobs = {c.name: (c, parts[c.name], source, work, unpacked, args.link) for c in missing}
    _, failures = over_cases(convert_case, jobs, args.np, name, done=len(cases) - len(missing))
    if failures:
        print_failures(
            failures,
            f"{len(failures)} of {len(cases)} cases could not be converted (above), so there is no {name} yet. Fix or "
            "remove these and run the command again: finished cases are kept.",
        )
        return 1

    table = {case: read_json(records / f"{case}.json") for case in cases}
    dataset = work / "dataset"
    generate_dataset_json(
        str(dataset),
        channel_names=dict(enumerate(source.channels)),
        labels={"background": 0, **{label: i + 1 for i, label in enumerate(source.labels)}},
        num_training_cases=sum(record["folder"] == "imagesTr" for record in table.values()),
        file_ending=".nii.gz",
        dataset_name=name,
        reference=source.reference,
        license=source.license,
        converted_by=f"nnunet_semiseg {__version__} convert {args.name}",
    )
    header = ["case", "patient", "folder", "size_xyz", "spacing_xyz_mm", *map("share of {}".format, source.labels)]
    write_csv(dataset / "conversion.csv", [*header, "notes"], map(_row, table, table.values()))
    if folds:
        write_json(splits_file, folds)
    os.replace(dataset, raw / name)
    shutil.rmtree(work)
    print(_summary(table, source))
    for line in _duplicates(table, parts):
        print(f"Warning: {line}", file=sys.stderr)
    print(f"Written to {raw / name}{f'; folds to {splits_file}' if folds else ''}")
    return 0


def _forget_changed(work: Path, settings: dict, cases: dict[str, Case], parts: dict[str, str]) -> None:
    """Remove what an earlier, stopped run wrote of cases that are not the same now, and note what they are."""
    plan = {"settings": settings, "cases": {}}
    for case in cases.values():
        files = [*case.images, *([case.label] if case.label and parts[case.name] != "unlabeled" else [])]
        plan["cases"][case.name] = [parts[case.name], case.patient, case.frame, *map(version, files)]
    plan = json.loads(json.dumps(plan))
    plan_file = work / "plan.json"
    earlier = read_json(plan_file) if plan_file.is_file() else None
    if not earlier or earlier.get("settings") != plan["settings"]:
        for folder in ("records", "dataset"):
            shutil.rmtree(work / folder, ignore_errors=True)
    else:
        for name, description in earlier["cases"].items():
            if plan["cases"].get(name) != description:
                pattern = glob.escape(name)
                for found in ("records/{}.json", "dataset/labels*/{}.nii.gz", "dataset/images*/{}_????.nii.gz"):
                    for file in work.glob(found.format(pattern)):
                        file.unlink()
    write_json(plan_file, plan)


def _new_name(name_or_id: str, source: str) -> str:
    check_variables(nnUNet_raw, nnUNet_preprocessed)
    name = f"Dataset{int(name_or_id):03d}_{source}" if name_or_id.isdigit() else name_or_id
    if not re.fullmatch(r"Dataset(?!000)\d{3}_[\w.-]+", name):
        raise ValueError(f"-d {name_or_id} is neither an id from 1 to 999 nor a name such as Dataset501_Name")
    for variable in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):
        for folder in Path(str(variable)).glob(f"{name[:10]}*") if variable.is_set() else ():
            if folder.name != name or variable is nnUNet_raw:
                raise FileExistsError(f"The id {int(name[7:10])} is taken by {folder}. Choose another one with -d")
    return name


def _checked(cases: list[Case]) -> list[Case]:
    seen: dict[str, Case] = {}
    # The number of case_0000 beside case_0001 is theirs; that of scan_0000 alone is a channel's.
    bases = Counter(re.sub(r"_\d{4}$", "", case.name) for case in cases)
    for case in cases:
        is_channel = case.name.endswith("_0000") and bases[case.name[:-5]] == 1
        if not case.name or "/" in case.name or case.name.startswith(".") or is_channel:
            raise ValueError(f"{case.images[0]}: a case cannot be called {case.name!r}. Names do not end in _0000")
        if case.name in seen:
            raise ValueError(f"{seen[case.name].images[0]} and {case.images[0]} are both case {case.name}")
        seen[case.name] = case
    return cases


# ----------------------------------------------------------------------------------------------------- who is labeled


def _read_lists(file: Path | None, budget: str | None) -> dict[str, list[str]]:
    """The list of labeled cases or patients, and those of ``train``, ``validation`` and ``test`` beside it.

    Args:
        file: JSON objects in objects of lists.
        budget: Keys from the outermost object to the list, with / between them.

    Raises:
        ValueError: naming the file and the keys that it has.
    """
    if not file and not budget:
        return {}
    if not file or not budget:
        raise ValueError("--budget NAME and --splits JSON go together: NAME is a list in that file")
    try:
        group, chosen = {}, json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    for key in budget.split("/"):
        if not isinstance(chosen, dict) or key not in chosen:
            has = ", ".join(chosen) if isinstance(chosen, dict) else "a list"
            raise ValueError(f"{file} has no {budget}: where {key} should be, it has {has}")
        group, chosen = chosen, chosen[key]
    lists = {"labeled": chosen} | {key: group[key] for key in SPLITS if key in group}
    for key, entries in lists.items():
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{file}: {budget if key == 'labeled' else key} is not a list of cases or patients")
    return lists


def assign(cases: list[Case], num_labeled: int | None, lists: dict[str, list[str]]) -> dict[str, str]:
    """{case: labeled, unlabeled, validation or test}; cases that no list has are left out.

    Args:
        cases: In the order of which the first are labeled.
        num_labeled: Labeled training patients; None for all that have a label.
        lists: ``labeled``, and maybe ``train``, ``validation`` and ``test``, instead of a number: cases or patients.
            They go before the published split; if there is ``train``, nothing but the lists counts.

    Raises:
        ValueError: naming the case or patient, if it is unknown, in two splits, or without the label it needs.
    """
    named: dict[str, str] = {}
    labeled = set()
    for key, entries in lists.items():
        for entry in entries:
            chosen = [case for case in cases if entry in (case.name, case.patient)]
            if not chosen:
                raise ValueError(f"'{key}' has {entry}, but no case or patient is called so. A case: {cases[0].name}")
            for case in chosen:
                split = "train" if key == "labeled" else key
                if named.setdefault(case.name, split) != split:
                    raise ValueError(f"Case {case.name} is in the lists of {named[case.name]} and of {split}")
                if key == "labeled" and (case.label or entry == case.name):
                    labeled.add(case.name)
    splits = {case.name: named.get(case.name, None if "train" in lists else case.split) for case in cases}

    homes: dict[str, tuple[str, str]] = {}
    for case in cases:
        home = splits[case.name]
        if home and homes.setdefault(case.patient, (home, case.name))[0] != home:
            other, name = homes[case.patient]
            raise ValueError(f"Patient {case.patient} is in two splits: {name} in {other}, {case.name} in {home}")

    if not lists:
        patients = list(dict.fromkeys(c.patient for c in cases if splits[c.name] == "train" and c.label))
        if num_labeled is not None and not 1 <= num_labeled <= len(patients):
            raise ValueError(f"--labeled {num_labeled}: there are {len(patients)} training patients with labels")
        first = set(patients[:num_labeled])
        labeled = {c.name for c in cases if splits[c.name] == "train" and c.label and c.patient in first}
    if not labeled:
        raise ValueError("No training case would be labeled. nnU-Net needs at least one")
    parts = {}
    for case in cases:
        part = splits[case.name]
        if part == "train":
            part = "labeled" if case.name in labeled else "unlabeled"
        if part in ("labeled", "validation") and not case.label:
            raise ValueError(f"Case {case.name} ({case.images[0]}) has no label, but is to be in {part}")
        if part in ("labeled", "validation", "test") and case.label and not case.label.is_file():
            raise ValueError(f"{case.label}, the label of case {case.name}, is missing")
        if part:
            parts[case.name] = part
    left_out = len(cases) - len(parts)
    if left_out:
        print(f"{left_out} cases are in no list and are left out, such as {next(n for n in splits if n not in parts)}")
    return parts


def splits_of(cases: dict[str, Case], parts: dict[str, str]) -> list[dict] | None:
    """``splits_final.json``, or None where nnU-Net's own folds are right: one case of each of five or more patients.

    With a validation list there is one fold. Otherwise the patients, not the cases, take turns in up to five folds: for
    fewer than five cases nnU-Net makes none. A single patient is for training and validation.
    """
    labeled, validation = (sorted(n for n in parts if parts[n] == part) for part in ("labeled", "validation"))
    if validation:
        return [{"train": labeled, "val": validation}]
    patients = {name: cases[name].patient for name in labeled}
    number = len(set(patients.values()))
    if 5 <= number == len(labeled):
        return None
    if number == 1:
        patient = patients[labeled[0]]
        print(f"One patient is labeled, {patient}, who is for validation, too: such a validation tells nothing")
        return [{"train": labeled, "val": labeled}]
    return make_folds(labeled, min(5, number), patients=patients)


# ------------------------------------------------------------------------------------------------------------ summary


def _row(case: str, record: dict) -> list:
    sizes = ["x".join(f"{value:.6g}" for value in record[key]) for key in ("size", "spacing")]
    shares = [f"{share:.6g}" for share in record.get("shares", [])]
    return [case, record["patient"], record["folder"], *sizes, *shares, "; ".join(record["notes"])]


def _summary(table: dict[str, dict], source: Source) -> str:
    """Cases, grids and labels of each folder, and what was repaired."""
    lines = ["| folder | cases | patients | size (x, y, z) | spacing in mm (x, y, z) |", "|---|---|---|---|---|"]
    for folder in (f"images{suffix}" for suffix in dict.fromkeys(SUFFIXES.values())):
        records = [record for record in table.values() if record["folder"] == folder]
        if records:
            grids = (
                " x ".join(_range(values) for values in zip(*(record[key] for record in records)))
                for key in ("size", "spacing")
            )
            patients = len({record["patient"] for record in records})
            lines.append(f"| {folder} | {len(records)} | {patients} | {' | '.join(grids)} |")
    lines += ["", "| label | class | in cases | share of voxels, % |", "|---|---|---|---|"]
    opened = [record["shares"] for record in table.values() if "shares" in record]
    for i, (label, shares) in enumerate(zip(source.labels, zip(*opened))):
        present = [100 * share for share in shares if share]
        lines.append(f"| {i + 1} | {label} | {len(present)} of {len(opened)} | {_range(present) if present else 0} |")
    notes = Counter(note for record in table.values() for note in record["notes"])
    return "\n".join([*lines, *(f"{count} x {note}" for note, count in sorted(notes.items()))])


def _range(values: Iterable[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def _duplicates(table: dict[str, dict], parts: dict[str, str]) -> list[str]:
    """A line for each case whose image or label has the voxels of an earlier one."""
    lines = []
    for key in ("image", "label"):
        first: dict[str, str] = {}
        for case, record in table.items():
            # Empty labels say nothing.
            if f"{key}_hash" in record and (key == "image" or any(record["shares"])):
                other = first.setdefault(record[f"{key}_hash"], case)
                if other != case:
                    cases = f"{other} ({parts[other]}) and {case} ({parts[case]})"
                    lines.append(f"the {key}s of {cases} are the same voxel for voxel")
    return lines
