"""The state of rounds on disk: what was asked for, and which steps are done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunet_semiseg import __version__
from nnunet_semiseg.files import read_json, write_json

# What a later call may change: more rounds, and when to stop.
MAY_CHANGE = ("rounds", "dataset_ids", "max_drop", "allow_drift")


@dataclass
class Manifest:
    """``manifest.json`` of a work folder; every change is written at once, as a whole.

    Args:
        file: Where it is.
        arguments: Those that decide what comes out, by name.
        rounds: For each round what is known of it: "dataset", "steps" with the finished ones, and what steps record.
        stopped: Why no further round follows, or None.
        versions: Of the packages that the first call used.
        calls: The command lines that did something, in their order.
        cases: The labeled and unlabeled cases and the folds of round 0.
    """

    file: Path
    arguments: dict
    rounds: list[dict] = field(default_factory=list)
    stopped: str | None = None
    versions: dict = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    cases: dict = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, arguments: dict) -> Manifest:
        """The manifest in the file, or a new one, which is not written yet.

        Raises:
            ValueError: if the file belongs to a call with other arguments, naming those that differ, or is damaged.
        """
        if not file.is_file():
            return cls(file, arguments, versions=_versions())
        manifest = cls.read(file)
        before, now = _flat(manifest.arguments), _flat(arguments)
        changed = [
            f"{name} {json.dumps(before.get(name))}, not {json.dumps(now.get(name))}"
            for name in {**before, **now}
            # An option that is newer than the manifest may be missing there, if it is not used now.
            if before.get(name, False if now.get(name) is False else None) != now.get(name) and name not in MAY_CHANGE
        ]
        if changed:
            raise ValueError(
                f"{file} belongs to a call with {'; '.join(changed)}. Continue with the arguments of that call, or "
                "choose another -o"
            )
        if arguments["rounds"] < len(manifest.rounds) - 1:
            raise ValueError(f"{file} is in round {len(manifest.rounds) - 1} already. Use --rounds of that or more")
        if any(manifest.arguments[name] != arguments[name] for name in MAY_CHANGE):
            manifest.stopped = None
        manifest.arguments = arguments
        return manifest

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Raises FileNotFoundError or ValueError, naming the file, if there is none or it is damaged."""
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing. Give the -o folder of pseudo_label rounds")
        cure = "Restore it, or choose another -o"
        content = read_json(file, ("arguments", "rounds", "stopped"), cure)
        try:
            manifest = cls(file, **content)
            lacking = [name for name in MAY_CHANGE if name not in manifest.arguments]
            lacking += [key for of in manifest.rounds for key in ("dataset", "steps") if key not in of]
        except TypeError as error:
            raise ValueError(f"{file} is damaged ({error}). {cure}") from None
        if lacking:
            raise ValueError(f"{file} is damaged (it has no {lacking[0]}). {cure}")
        return manifest

    def write(self) -> None:
        write_json(self.file, {key: value for key, value in vars(self).items() if key != "file"})

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets of the rounds that have begun."""
        return [of["dataset"] for of in self.rounds]

    def begin_round(self, dataset: str) -> None:
        self.rounds.append({"dataset": dataset, "steps": {}})
        self.write()

    def is_done(self, number: int, step: str) -> bool:
        return len(self.rounds) > number and step in self.rounds[number]["steps"]

    @contextmanager
    def step(self, number: int, step: str) -> Iterator[dict]:
        """Its body does the step and may put what it found into the round, which is given; then the step is done."""
        start = time.time()
        of = self.rounds[number]
        yield of
        of["steps"][step] = {
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "minutes": round((time.time() - start) / 60, 2),
        }
        self.write()


def _flat(arguments: dict) -> dict:
    """As JSON keeps them, those in groups (the rules) beside the others."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(arguments)).items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _versions() -> dict[str, str]:
    found = {"nnunet-semiseg": __version__}
    for package in ("nnunetv2", "torch", "numpy", "SimpleITK"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
