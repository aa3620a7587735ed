"""FILE.json: what a benchmark trains, and the folds that it trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_semiseg.files import read_json

VANILLA, ALL = "vanilla", "all labels"
# The row of the networks that all other runs start from.
FORK = "at the fork"
# Whether a key's value is of the kind that it has to be.
Check = Callable[[Any], bool]


def _number(low: int) -> Check:
    return lambda value: type(value) is int and value >= low


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _list(valid: Check) -> Check:
    return lambda value: isinstance(value, list) and bool(value) and all(map(valid, value))


def _budgets(value: Any) -> bool:
    by_name = isinstance(value, dict) and bool(value) and all(map(_list(_text), value.values()))
    return by_name or _list(_number(1))(value)


_COUNT = (_number(1), "a whole number of at least 1")
_VALID = {
    "dataset": (lambda v: _number(1)(v) or _text(v), "a dataset's number or name"),
    "configuration": (_text, "a configuration, such as 2d"),
    "plans": (_text, "the name of a plans file, such as nnUNetPlans"),
    "output": (_text, "a folder"),
    "trainers": (_list(_text), f"a list of {VANILLA} and trainers, such as BCP or BCP_pseudo_weight=0.3"),
    "budgets": (_budgets, "{name: [labeled cases]}, or a list of numbers of labeled cases"),
    "validation": (lambda v: v is None or _list(_text)(v), "a list of cases"),
    "split_seed": (_number(0), "a whole number"),
    "seeds": (_list(_number(0)), "a list of whole numbers"),
    "epochs": _COUNT,
    "iterations": _COUNT,
    "val_iterations": _COUNT,
    "fork_after": (lambda v: v is None or _number(1)(v), "a number of epochs, less than 'epochs'"),
    "all_labels": (lambda v: isinstance(v, bool), "true or false"),
    "quality_cases": (_number(0), "a whole number; 0 turns the scoring of pseudo labels off"),
}


@dataclass(frozen=True)
class Suite:
    """The content of FILE.json; docs/benchmark.md explains the keys."""

    dataset: int | str
    configuration: str
    plans: str
    output: str
    trainers: list[str]
    budgets: dict[str, list[str]] | list[int]
    validation: list[str] | None = None
    split_seed: int = 12345
    seeds: tuple[int, ...] | list[int] = (1,)
    epochs: int = 1000
    iterations: int = 250
    val_iterations: int = 50
    fork_after: int | None = None
    all_labels: bool = True
    quality_cases: int = 8

    @property
    def shared_epochs(self) -> int:
        """Epochs on labels alone that the runs of a budget and seed have in common."""
        return self.fork_after or 0

    @property
    def own_epochs(self) -> int:
        """Epochs of each run, after the fork if there is one."""
        return self.epochs - self.shared_epochs


def read_suite(file: Path) -> Suite:
    """What a file says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the key and what it takes, if a key is unknown, missing, or of another kind.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}. docs/benchmark.md shows what to write into it")
    content = read_json(file, cure="docs/benchmark.md shows what to write into it")
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object. docs/benchmark.md shows what to write into it")
    for key, value in content.items():
        if key not in _VALID:
            raise ValueError(f"{file}: there is no key '{key}'. Keys: {', '.join(_VALID)}")
        valid, meaning = _VALID[key]
        if not valid(value):
            raise ValueError(f"{file}: '{key}' is {json.dumps(value)}, but has to be {meaning}")
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError(f"{file}: '{key}' names something twice. Remove one of the two")
    for field in fields(Suite):
        if field.default is MISSING and field.name not in content:
            raise ValueError(f"{file}: the key '{field.name}' is missing. It has to be {_VALID[field.name][1]}")
    suite = Suite(**content)
    if suite.own_epochs < 1:
        raise ValueError(
            f"{file}: 'fork_after' is {suite.fork_after}, but has to be less than 'epochs', {suite.epochs}: the runs "
            "have the epochs that are left"
        )
    return suite


def folds_of_budgets(
    cases: list[str],
    validation: list[str],
    budgets: dict[str, list[str]] | list[int],
    split_seed: int,
    all_labels: bool,
    has_more_unlabeled: bool,
) -> dict[str, dict]:
    """{budget: fold}, in the order of nnU-Net's fold numbers; a fold's train, val and unlabeled are disjoint.

    Args:
        cases: All cases that have labels.
        validation: Those that every fold validates on.
        budgets: {name: labeled cases}; or numbers of labeled cases, drawn so that a smaller budget is part of a larger.
        split_seed: Seed of that draw.
        all_labels: Whether a last fold has every training case labeled.
        has_more_unlabeled: Whether there are unlabeled cases beside ``cases``.

    Raises:
        ValueError: naming the case or budget, if a case is unknown, given twice or in a budget and in validation, or a
            budget leaves no case unlabeled.
    """
    train = sorted(set(cases) - set(validation))
    if isinstance(budgets, list):
        order = [train[i] for i in np.random.RandomState(split_seed).permutation(len(train))]
        too_many = [number for number in budgets if number > len(train)]
        if too_many:
            raise ValueError(
                f"A budget has {too_many[0]} labeled cases, but there are only {len(train)} that are not for "
                f"validation. Use a smaller number"
            )
        budgets = {f"{number} cases": order[:number] for number in budgets}
    if ALL in budgets:
        raise ValueError(f"No budget can be called '{ALL}': that is the last fold. Use another name")
    for name, group in {"validation": validation, **budgets}.items():
        unknown = sorted(set(group) - set(cases))
        if unknown:
            raise ValueError(
                f"'{name}' names {unknown[0]}, which is not among the {len(cases)} cases with labels. They are called, "
                f"e.g., {cases[0]}"
            )
        if len(set(group)) < len(group):
            raise ValueError(f"'{name}' names a case twice. Remove one of the two")
    folds = {}
    for name, labeled in budgets.items():
        overlap = sorted(set(labeled) & set(validation))
        if overlap:
            raise ValueError(f"{overlap[0]} is in '{name}' and in the validation cases. Remove it from one of them")
        hidden = [case for case in train if case not in labeled]
        if not hidden and not has_more_unlabeled:
            raise ValueError(f"'{name}' leaves no case unlabeled. Remove it: all_labels covers that end")
        folds[name] = {"train": sorted(labeled), "val": sorted(validation), "unlabeled": hidden}
    if all_labels:
        folds[ALL] = {"train": train, "val": sorted(validation), "unlabeled": []}
    return folds
