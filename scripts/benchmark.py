"""Does a method work? Trainers x label budgets x seeds on one dataset, all through stock nnUNetv2_train.

    python scripts/benchmark.py FILE.json [--profile cpu|gpu] [--minutes M] [--report] [--dry-run]

docs/benchmark.md explains FILE.json and the outputs. The same command continues what was stopped or killed.
Exit code: 0 everything is done, 1 a run failed, 2 it cannot start, 3 stopped by --minutes, 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg import checkpoints
from nnunet_semiseg.data.splits import read_splits
from nnunet_semiseg.data.unlabeled import check_store, store_folder
from nnunet_semiseg.datasets import Dataset, check_variables, dataset_name
from nnunet_semiseg.files import read_json, read_table, read_text, whole, write_csv, write_json, write_text
from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.networks.second import second_plans
from nnunet_semiseg.trainers.options import OptionError
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer

VANILLA, ALL = "vanilla", "all labels"
# Equals nnU-Net's own trainer bit for bit, and takes the same schedule options as the others.
VANILLA_TRAINER = "MeanTeacher_consistency_weight=0"
PREFIX = "nnUNetTrainer"
RECORD, SNAPSHOTS, QUALITY = "benchmark.json", "snapshots", "pseudo_label_quality.csv"
QUALITY_COLUMNS = ["epoch", "network", "class", "dice"]
# Checkpoints of a run whose pseudo labels are scored.
NUM_SNAPSHOTS = 20
GPU_MINUTES = 9.0
POLL_SECONDS = 0.2


class OutOfTime(Exception):
    """--minutes are over."""


# --------------------------------------------------------------------------------------------------------- the settings


def _number(low: int):
    return lambda value: type(value) is int and value >= low


def _text(value) -> bool:
    return isinstance(value, str) and bool(value)


def _list(valid):
    return lambda value: isinstance(value, list) and bool(value) and all(map(valid, value))


def _budgets(value) -> bool:
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
    "all_labels": (lambda v: isinstance(v, bool), "true or false"),
    "quality_cases": (_number(0), "a whole number; 0 turns the scoring of pseudo labels off"),
}


@dataclass(frozen=True)
class Settings:
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
    all_labels: bool = True
    quality_cases: int = 8


def read_settings(file: Path) -> Settings:
    """The settings in a file.

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
    for field in fields(Settings):
        if field.default is MISSING and field.name not in content:
            raise ValueError(f"{file}: the key '{field.name}' is missing. It has to be {_VALID[field.name][1]}")
    return Settings(**content)


def make_folds(
    cases: list[str], validation: list[str], budgets, split_seed: int, all_labels: bool, has_more_unlabeled: bool
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


# ------------------------------------------------------------------------------------------------- what a run remembers


def read_if_whole(file: Path) -> dict | None:
    """The content, or None if the file is missing or cut off."""
    with suppress(FileNotFoundError, ValueError):
        return read_json(file)
    return None


def update_record(fold: Path, **values) -> dict:
    """Change what the benchmark remembers of a run, in a file beside run.log."""
    record = {**(read_if_whole(fold / RECORD) or {}), **values}
    write_json(fold / RECORD, record)
    return record


# ----------------------------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        method: As FILE.json calls it.
        trainer: Name for ``nnUNetv2_train -tr``.
        budget: As FILE.json calls it.
        number: nnU-Net's fold.
        fold: Its folder in nnUNet_results.
    """

    method: str
    trainer: str
    budget: str
    number: int
    seed: int
    fold: Path

    def __str__(self):
        return f"{self.method}, {self.budget}, seed {self.seed}"

    @property
    def record(self) -> dict:
        return read_if_whole(self.fold / RECORD) or {}

    @property
    def summary(self) -> dict | None:
        """nnU-Net's validation of whole cases, once it is there."""
        return read_if_whole(self.fold / "validation" / "summary.json")

    @property
    def started(self) -> bool:
        return any(self.fold.glob("checkpoint_*.pth"))

    def reached(self) -> dict[str, int]:
        """What a call that continues can stand on: files and when they were written."""
        files = [*self.fold.glob("checkpoint_*.pth"), *self.fold.glob("validation/summary.json"), self.fold / QUALITY]
        return {file.name: file.stat().st_mtime_ns for file in files if file.is_file()}

    @property
    def done(self) -> bool:
        return self.summary is not None and "training_minutes" in self.record

    @property
    def mean(self) -> float:
        """Mean Dice over the foreground classes, of a run with a summary."""
        return self.summary["foreground_mean"]["Dice"]

    @property
    def peak_gib(self) -> float | None:
        """On CUDA what the trainer logs, on the CPU the resident memory of the training process."""
        if self.record.get("device") != "cuda":
            return self.record.get("peak_rss_gib")
        with suppress(FileNotFoundError):
            rows = read_table(self.fold / "progress_semiseg.csv")
            values = [float(row["peak_memory_gib"]) for row in rows if row.get("peak_memory_gib")]
            return max(values, default=None)
        return None


class Benchmark:
    """The checked matrix of runs.

    Args:
        file: FILE.json.
        profile: "cpu" or "gpu".

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with settings, dataset or results, and the cure.
    """

    def __init__(self, file: Path, profile: str):
        self.file, self.profile = file, profile
        self.device = {"cpu": "cpu", "gpu": "cuda"}[profile]
        self.settings = s = read_settings(file)
        # Beside FILE.json, wherever the command is given.
        self.output = file.resolve().parent / s.output
        self.dataset = Dataset(dataset_name(str(s.dataset)))
        self.splits_file = self.dataset.preprocessed / "splits_final.json"
        self.lock_file = self.dataset.preprocessed / "benchmark.lock"
        self.child_lock = self.dataset.preprocessed / "benchmark_training.lock"
        check_variables(nnUNet_results)
        self.plans = self.dataset.plans(s.plans)
        self.cases, stored = self._preprocessed_cases()
        self.folds = make_folds(self.cases, self._validation(), s.budgets, s.split_seed, s.all_labels, bool(stored))
        self.runs = self._runs()
        self._refuse_other_results()

    def _preprocessed_cases(self) -> tuple[list[str], list[str]]:
        """The preprocessed cases with labels, and those of imagesUn."""
        s, name = self.settings, self.dataset.name
        known = self.plans.available_configurations
        if s.configuration not in known:
            raise ValueError(f"{s.plans} has no configuration {s.configuration}. It has {', '.join(known)}")
        configuration = self.plans.get_configuration(s.configuration)
        folder = self.dataset.preprocessed / configuration.data_identifier
        cure = f"nnUNetv2_preprocess -d {self.dataset.number} -plans_name {s.plans} -c {s.configuration}"
        there = sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder))) if folder.is_dir() else []
        missing = sorted(set(self.dataset.labeled_cases()) - set(there))
        if missing or not there:
            raise FileNotFoundError(f"{folder} {f'lacks case {missing[0]}' if there else 'has no cases'}. Run: {cure}")
        cure = f"nnunet_semiseg preprocess -d {name} -c {s.configuration} -p {s.plans}"
        stored = check_store(store_folder(folder), self.plans, configuration, cure)
        images = self.dataset.images("imagesUn") if (self.dataset.raw / "imagesUn").is_dir() else {}
        missing = sorted(set(images) - set(stored))
        if missing:
            raise FileNotFoundError(f"Case {missing[0]} of imagesUn is not preprocessed. Run: {cure}")
        return there, stored

    def _validation(self) -> list[str]:
        if self.settings.validation:
            return self.settings.validation
        if self.splits_file.is_file():
            return read_splits(self.splits_file)[0]["val"]
        if len(self.cases) < 5:
            raise ValueError(
                f"{self.dataset.name} has {len(self.cases)} cases, too few for nnU-Net's own split. Name the "
                f"validation cases in {self.file}"
            )
        return [str(case) for case in generate_crossval_split(self.cases)[0]["val"]]

    def trainer(self, method: str, seed: int) -> str:
        """The name that nnU-Net knows the trainer by.

        Raises:
            ValueError: if there is no such trainer, or it has not such an option (OptionError).
        """
        s = self.settings
        name = (
            f"{PREFIX}{VANILLA_TRAINER if method == VANILLA else method.removeprefix(PREFIX)}_{s.epochs}epochs"
            f"_num_iterations_per_epoch={s.iterations}_num_val_iterations_per_epoch={s.val_iterations}"
            f"_save_every=1_seed={seed}"
        )
        try:
            if find_trainer(name) is not None:
                return name
        except OptionError as error:
            raise OptionError(f"Trainer '{method}': {error}") from None
        known = ", ".join(trainer.removeprefix(PREFIX) for trainer in TRAINERS)
        raise ValueError(f"There is no trainer '{method}'. Trainers: {VANILLA}, {known}")

    def _runs(self) -> list[Run]:
        s, runs = self.settings, []
        for seed in s.seeds:
            for number, budget in enumerate(self.folds):
                for method in [VANILLA] if budget == ALL else s.trainers:
                    trainer = self.trainer(method, seed)
                    model = f"{trainer}__{self.plans.plans_name}__{s.configuration}"
                    if len(model) > 240:
                        raise ValueError(
                            f"'{method}' makes a folder name that is too long ({model}). Set fewer options"
                        )
                    folder = Path(str(nnUNet_results)) / self.dataset.name / model / f"fold_{number}"
                    runs.append(Run(method, trainer, budget, number, seed, folder))
        twice = {run.fold for run in runs if sum(other.fold == run.fold for other in runs) > 1}
        if twice:
            raise ValueError(f"Two entries of 'trainers' are the same trainer: {twice.pop().parent.name}. Remove one")
        return runs

    def _refuse_other_results(self) -> None:
        """Raise ValueError where results in nnUNet_results were made with other cases than these folds have."""
        cure = "Set nnUNet_results to another folder, or remove that one"
        folds = list(self.folds.values())
        for file in (Path(str(nnUNet_results)) / self.dataset.name).glob(f"*/fold_*/{RECORD}"):
            number = int(file.parent.name.removeprefix("fold_"))
            if number >= len(folds) or (read_if_whole(file) or {}).get("split") != folds[number]:
                raise ValueError(f"{file.parent} was made by a benchmark with other cases in fold {number}. {cure}")
        for run in self.runs:
            if not run.record and (run.started or run.summary is not None):
                raise ValueError(f"{run.fold} holds a training that this benchmark did not start. {cure}")

    def write_splits(self) -> None:
        """Make splits_final.json what the folds are; another one is kept under a new name."""
        text = json.dumps(list(self.folds.values()), indent=4)
        if self.splits_file.is_file():
            if read_splits(self.splits_file) == json.loads(text):
                return
            former = read_text(self.splits_file)
            backup, number = self.splits_file.with_name("splits_final.json.before_benchmark"), 1
            while backup.is_file() and backup.read_text() != former:
                number += 1
                backup = backup.with_name(f"splits_final.json.before_benchmark_{number}")
            write_text(backup, former)
            print(f"The former {self.splits_file} is kept as {backup.name}")
        write_text(self.splits_file, text)

    def command(self, run: Run) -> list[str]:
        s = self.settings
        return [
            *("nnUNetv2_train", self.dataset.name, s.configuration, str(run.number)),
            *("-tr", run.trainer, "-p", s.plans, "-device", self.device),
            *(["--c"] if run.started else []),
        ]

    def finished(self, method: str, budget: str) -> list[Run]:
        """The validated runs of all seeds."""
        return [r for r in self.runs if (r.method, r.budget) == (method, budget) and r.summary is not None]

    def run(self, deadline: float) -> int:
        """Do what is left to do until ``deadline`` (of time.monotonic); the exit code."""
        waiting = [run for run in self.runs if not run.done]
        # What failed before comes last, so that it does not use up the time of every call.
        waiting.sort(key=lambda run: run.record.get("failed", False))
        finished = len(self.runs) - len(waiting)
        print(f"{finished} of {len(self.runs)} runs are done")
        failed = False
        for i, run in enumerate(waiting):
            print(f"[{finished + i + 1}/{len(self.runs)}] {run}: ", end="", flush=True)
            try:
                error = self.execute(run, deadline, whole_call=i == 0)
            except OutOfTime:
                print("stopped, the time is up. The same command continues")
                return 3
            except KeyboardInterrupt:
                print("interrupted. The same command continues")
                return 130
            update_record(run.fold, failed=error is not None)
            if error is not None:
                failed = True
                print(f"FAILED: {error}")
                continue
            left = self._minutes_left(waiting[i + 1 :])
            print(f"mean Dice {run.mean:.3f}, {run.record['wall_minutes']:.1f} min; about {left:.0f} min are left")
        return int(failed)

    def _minutes_left(self, waiting: list[Run]) -> float:
        """What the waiting runs will take, by those that are done, of the same method where there are any."""
        taken = defaultdict(list)
        for run in self.runs:
            if run.done:
                for key in (run.method, None):
                    taken[key].append(run.record["wall_minutes"])
        return float(sum(np.mean(taken.get(run.method, taken[None])) for run in waiting))

    def execute(self, run: Run, deadline: float, whole_call: bool) -> str | None:
        """Train and score; what went wrong, or None.

        Args:
            whole_call: Whether this call has done nothing else before. If the run then gets nowhere, no other call
                will do better.

        Raises:
            OutOfTime: at the deadline, after the training has been stopped.
        """
        begin = time.monotonic()
        if begin > deadline:
            raise OutOfTime
        reached = run.reached()
        before = update_record(run.fold, split=self.folds[run.budget], device=self.device)
        log = run.fold / "run.log"
        try:
            if run.summary is None:
                scored = self.settings.quality_cases > 0 and run.budget != ALL
                look = Snapshots(run.fold, self.settings.epochs).look if scored else lambda: None
                child = Child(self.command(run), log, self.child_lock, self.device)
                try:
                    child.wait(deadline, look)
                finally:
                    update_record(run.fold, peak_rss_gib=max(child.peak_gib, before.get("peak_rss_gib", 0.0)))
                if child.exit_code or run.summary is None:
                    return _failure(log, child.exit_code)
            # A process of its own: the memory that it takes is not counted as the next training's, and is given back.
            score = [sys.executable, __file__, str(self.file), "--profile", self.profile, "--score", str(run.fold)]
            child = Child(score, log, self.child_lock, self.device)
            child.wait(deadline)
            return _failure(log, child.exit_code) if child.exit_code else None
        except checkpoints.CheckpointError as error:
            return str(error)
        except OutOfTime:
            if whole_call and run.reached() == reached:
                return (
                    "nothing was saved in all the time of this call, and the next would be no better. Give more "
                    "--minutes (the final validation cannot be continued), or make epochs shorter"
                )
            raise
        finally:
            update_record(run.fold, wall_minutes=before.get("wall_minutes", 0.0) + (time.monotonic() - begin) / 60)


def _failure(log: Path, exit_code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n    ".join([f"exit code {exit_code}, the end of {log}:", *lines[-5:]])


def _lock(file: Path):
    """The open file with the lock on it, or None if another process has it."""
    stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115 (the lock lasts as long as it is open)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def end_processes(lock_file: Path) -> None:
    """End the process group whose number is in the file, for as long as one of its processes has the lock on it.

    That is also how a training is found whose benchmark was killed. The lock makes sure that the number is still that
    group's.

    Raises:
        RuntimeError: if it does not end.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        for attempt in range(300):
            lock = _lock(lock_file)
            if lock is not None:
                lock.close()
                return
            if attempt == 0:
                with suppress(ProcessLookupError):
                    os.killpg(int(lock_file.read_text(encoding="utf-8")), number)
            time.sleep(0.05)
    raise RuntimeError(
        f"The training of process group {lock_file.read_text(encoding='utf-8')} does not end. End it by hand"
    )


class Child:
    """A command in a process group of its own, which holds a lock for as long as any process of it lives.

    Args:
        command: Program and arguments.
        log: File that its output is added to.
        lock_file: File for the lock and the group's number.
        device: "cpu" or "cuda".
    """

    def __init__(self, command: list[str], log: Path, lock_file: Path, device: str):
        self.lock_file = lock_file
        self.peak_gib = 0.0
        environment = {"nnUNet_compile": "f", **os.environ} if device == "cpu" else dict(os.environ)
        # nnU-Net's commands lie beside this interpreter, even where its environment is not activated.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        program = shutil.which(command[0], path=environment["PATH"])
        if program is None:
            raise FileNotFoundError(f"There is no {command[0]}. Install nnU-Net where {sys.executable} is")
        with open(log, "ab") as output, _lock(lock_file) as lock:
            self.process = subprocess.Popen(
                [program, *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
            lock.truncate(0)
            lock.write(str(self.process.pid))

    @property
    def exit_code(self) -> int | None:
        return self.process.returncode

    def running(self) -> bool:
        if self.process.returncode is None:
            # Unlike poll(), this tells the memory of this very process. It is born with its parent's peak, which is
            # below that of any training.
            ended, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if ended:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_gib = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        return self.process.returncode is None

    def wait(self, deadline: float, look=lambda: None) -> None:
        """Wait for the end, looking after something meanwhile; whatever happens, no process of it is left.

        Raises:
            OutOfTime: at the deadline.
        """
        try:
            while self.running():
                if time.monotonic() > deadline:
                    raise OutOfTime
                look()
                time.sleep(POLL_SECONDS)
        finally:
            end_processes(self.lock_file)
            while self.running():
                time.sleep(0.01)


# --------------------------------------------------------------------------------------------- quality of pseudo labels


class Snapshots:
    """Keeps about NUM_SNAPSHOTS checkpoints, evenly spaced over a run, without the training's help.

    Args:
        fold: The training's folder.
        epochs: Epochs of the whole run.
    """

    def __init__(self, fold: Path, epochs: int):
        self.latest = fold / "checkpoint_latest.pth"
        self.folder = fold / SNAPSHOTS
        self.folder.mkdir(exist_ok=True)
        self.epochs = epochs
        self._seen = None

    def _share(self, epoch: int) -> int:
        return epoch * NUM_SNAPSHOTS // self.epochs

    def look(self) -> None:
        """Keep the checkpoint if there is a new one and its turn has come."""
        incoming = self.folder / "incoming.pth"
        incoming.unlink(missing_ok=True)
        try:
            status = self.latest.stat()
            stamp = status.st_ino, status.st_mtime_ns
            if stamp == self._seen:
                return
            try:
                # A checkpoint is never written into, only replaced.
                os.link(self.latest, incoming)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(self.latest, incoming)
        except FileNotFoundError:
            return
        self._seen = stamp
        epoch = checkpoints.read(incoming)["current_epoch"]
        last = max((_epoch(file) for file in self.folder.glob("epoch_*.pth")), default=0)
        if self._share(epoch) > self._share(last):
            os.replace(incoming, self.folder / f"epoch_{epoch:03d}.pth")
        else:
            incoming.unlink()


def _epoch(snapshot: Path) -> int:
    return int(snapshot.stem.removeprefix("epoch_"))


class Scorer:
    """Predicts withheld cases with the networks of a checkpoint.

    Args:
        fold: The training's folder.
        preprocessed: The dataset's folder in nnUNet_preprocessed.
        cases: Cases to predict.
        device: "cpu" or "cuda".
    """

    def __init__(self, fold: Path, preprocessed: Path, cases: list[str], device: str):
        trainer, _, configuration = fold.parent.name.split("__")
        self.trainer, self.configuration, self.device = trainer, configuration, torch.device(device)
        self.plans = read_json(fold.parent / "plans.json")
        self.dataset_json = read_json(fold.parent / "dataset.json")
        manager = PlansManager(self.plans)
        self.labels = LabelAdapter(manager.get_label_manager(self.dataset_json))
        self.class_names = class_names(self.dataset_json)
        folder = str(preprocessed / manager.get_configuration(configuration).data_identifier)
        self.data = infer_dataset_class(folder)(folder, list(cases))

    def networks(self, checkpoint: dict):
        """Yield name, weights and plans of every network in it that segments."""
        state = checkpoint[checkpoints.STATE_KEY]
        yield "student", state.get("student", checkpoint["network_weights"]), self.plans
        for name, prefix in (("teacher", "teacher.module."), ("second", "second.")):
            companions = state["companions"].items()
            weights = {key.removeprefix(prefix): value for key, value in companions if key.startswith(prefix)}
            if weights:
                architecture = state["options"]["second_network"] if name == "second" else "same"
                yield name, weights, second_plans(self.plans, self.configuration, architecture)

    def dice(self, weights: dict, plans: dict) -> dict[str, float]:
        """{class: mean Dice of the cases}; a case without the class in both label and prediction does not count."""
        plans = PlansManager(plans)
        configuration = plans.get_configuration(self.configuration)
        channels = determine_num_input_channels(plans, configuration, self.dataset_json)
        network = find_trainer(self.trainer).build_network_architecture(
            plans, configuration, channels, self.labels.num_outputs, enable_deep_supervision=False
        )
        network.load_state_dict(weights)
        predictor = nnUNetPredictor(
            tile_step_size=1.0,
            use_mirroring=False,
            perform_everything_on_device=self.device.type == "cuda",
            device=self.device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            network, plans, configuration, None, self.dataset_json, self.trainer, inference_allowed_mirroring_axes=None
        )
        dice = []
        for case in self.data.identifiers:
            image, truth, *_ = self.data.load_case(case)
            image, truth = (np.asarray(array[:]) for array in (image, truth))
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).cpu()
            predicted, _ = self.labels.one_vs_rest(self.labels.hard(logits[None]))
            dice.append(class_dice(predicted[0].bool().numpy(), truth, self.labels))
        names = [class_name(self.class_names, label) for label in self.labels.foreground_names]
        return dict(zip(names, map(float, np.nanmean(dice, axis=0))))


def class_dice(predicted: np.ndarray, truth: np.ndarray, labels: LabelAdapter) -> list[float]:
    """Dice of each foreground class or region, 2 |A and B| / (|A| + |B|), without ignored voxels.

    Args:
        predicted: (K, Z, Y, X) bool.
        truth: (1, Z, Y, X) label map as nnU-Net preprocesses it (-1: outside the image, background).
        labels: Of the dataset.

    Returns:
        K values; NaN for a class that is neither in the prediction nor in the label map, as in nnU-Net's evaluation.
    """
    valid = np.ones_like(truth, dtype=bool) if labels.ignore_label is None else truth != labels.ignore_label
    result = []
    for label, mask in zip(labels.foreground_names, predicted):
        true, mask = np.isin(truth, label) & valid, mask & valid
        size = true.sum() + mask.sum()
        result.append(2 * (true & mask).sum() / size if size else np.nan)
    return result


def class_names(dataset_json: dict) -> dict[str, str]:
    """{label or region as nnU-Net's summary.json writes it: name}."""
    labels = dataset_json["labels"]
    return {str(tuple(v) if isinstance(v, list) else v): name for name, v in labels.items()}


def class_name(names: dict[str, str], label) -> str:
    return names.get(str(label), str(label))


def score(fold: Path, benchmark: Benchmark) -> None:
    """Everything about a finished training that needs its checkpoints: pseudo labels, curves and time."""
    os.environ["nnUNet_compile"] = "f"
    final = fold / "checkpoint_final.pth"
    log = checkpoints.read(final)["logging"]
    snapshots = {_epoch(file): file for file in sorted((fold / SNAPSHOTS).glob("epoch_*.pth"))}
    hidden = read_if_whole(fold / RECORD)["split"]["unlabeled"]
    if (fold / SNAPSHOTS).is_dir() and hidden:
        snapshots[len(log["mean_fg_dice"])] = final
        number = min(benchmark.settings.quality_cases, len(hidden))
        cases = [hidden[i] for i in np.linspace(0, len(hidden) - 1, number).round().astype(int)]
        scorer = Scorer(fold, benchmark.dataset.preprocessed, cases, benchmark.device)
        rows = read_quality(fold)
        for epoch, file in snapshots.items():
            if epoch not in {row[0] for row in rows}:
                for name, weights, plans in scorer.networks(checkpoints.read(file)):
                    rows += [(epoch, name, *pair) for pair in scorer.dice(weights, plans).items()]
                write_csv(fold / QUALITY, QUALITY_COLUMNS, rows)
            if file != final:
                file.unlink()
    shutil.rmtree(fold / SNAPSHOTS, ignore_errors=True)
    # The logger is part of the checkpoint, so that an epoch counts once, however often the run was stopped.
    seconds = sum(end - start for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"]))
    curve = [float(dice) for dice in log["mean_fg_dice"]]
    update_record(fold, training_minutes=float(seconds) / 60, validation_dice=curve)


def read_quality(fold: Path) -> list[tuple[int, str, str, float]]:
    """Epoch, network, class and Dice."""
    if not (fold / QUALITY).is_file():
        return []
    rows = read_table(fold / QUALITY, QUALITY_COLUMNS, "Remove it")
    return [(int(row["epoch"]), row["network"], row["class"], float(row["dice"])) for row in rows]


# ----------------------------------------------------------------------------------------------------------- the report


PAGE = """\
# {title}

{overview}
Mean Dice over the foreground classes of {validation} whole validation cases (nnU-Net's own validation: final
checkpoint, sliding window, mirroring); {seeds}. vanilla is nnU-Net's own training. {state}

![Dice against the number of labeled cases](label_efficiency.png)

## Runs

{runs}
Training: sum of the epochs, without the final validation. Peak memory: {memory}.

## How it was made

```
{command}
```

{name}:

```json
{content}
```

The runs, on the folds in `splits_final.json` beside this file:

```
{commands}
```
"""


def _cell(values: list[float], wanted: int) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "–"
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.3f}"
    return text if len(values) == wanted else f"{text} ({len(values)} of {wanted} seeds)"


def _table(header: list[str], rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(benchmark: Benchmark) -> None:
    """Write tables and pictures of what is done into the output folder."""
    folds, output = benchmark.folds, benchmark.output
    methods = list(dict.fromkeys(run.method for run in benchmark.runs))
    results = [run for run in benchmark.runs if run.summary is not None]
    names = class_names(benchmark.dataset.json)
    dice = {
        run: {class_name(names, label): values["Dice"] for label, values in run.summary["mean"].items()}
        for run in results
    }
    write_text(output / "results.md", results_page(benchmark, methods, dice))
    rows = []
    for run in results:
        start = [run.method, run.trainer, run.budget, len(folds[run.budget]["train"]), run.number, run.seed]
        costs = [run.record.get("training_minutes", ""), "" if run.peak_gib is None else run.peak_gib]
        rows += [[*start, name, value, *costs] for name, value in {**dice[run], "mean": run.mean}.items()]
    header = ["method", "trainer", "budget", "labeled_cases", "fold", "seed", "class", "dice", "training_minutes"]
    write_csv(output / "results.csv", [*header, "peak_memory_gib"], rows)
    write_json(output / "splits_final.json", list(folds.values()))

    import matplotlib

    colors = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"].colors
    style = {method: dict(color=colors[i % len(colors)], label=method) for i, method in enumerate(methods)}
    label_efficiency(benchmark, style)
    panels(benchmark, style, "validation_curves.png", "nnU-Net's validation pseudo Dice (0 to 1)", draw_validation)
    quality = "Dice of withheld cases (0 to 1)\nsolid: network that labels; dashed: student"
    panels(benchmark, style, "pseudo_label_quality.png", quality, draw_quality)


def results_page(benchmark: Benchmark, methods: list[str], dice: dict[Run, dict[str, float]]) -> str:
    """results.md. ``dice``: that of each class, for every validated run."""
    s, folds = benchmark.settings, benchmark.folds
    overview = [
        [method, *(_cell([run.mean for run in benchmark.finished(method, budget)], len(s.seeds)) for budget in folds)]
        for method in methods
    ]
    # All runs have the same validation cases, and so the same classes.
    classes = list(next(iter(dice.values()), {}))
    runs = []
    for run, values in dice.items():
        costs = ["–" if cost is None else f"{cost:.2f}" for cost in (run.record.get("training_minutes"), run.peak_gib)]
        numbers = [f"{value:.3f}" for value in (*(values[name] for name in classes), run.mean)]
        runs.append([run.method, run.budget, str(run.seed), *numbers, *costs])
    return PAGE.format(
        title=f"{benchmark.dataset.name}, {s.configuration}",
        overview=_table(
            ["method", *(f"{name} ({len(fold['train'])} labeled)" for name, fold in folds.items())], overview
        ),
        validation=len(next(iter(folds.values()))["val"]),
        seeds=f"{len(s.seeds)} seeds ± their standard deviation" if len(s.seeds) > 1 else "one seed",
        state=f"{len(dice)} of {len(benchmark.runs)} runs are done.",
        runs=_table(["method", "budget", "seed", *classes, "mean Dice", "training, min", "peak memory, GiB"], runs),
        memory="of the GPU" if benchmark.profile == "gpu" else "resident, of the training process",
        command=f"python scripts/benchmark.py {benchmark.file.name} --profile {benchmark.profile}",
        name=benchmark.file.name,
        content=benchmark.file.read_text().strip(),
        commands="\n".join(" ".join(benchmark.command(run)).removesuffix(" --c") for run in benchmark.runs),
    )


def label_efficiency(benchmark: Benchmark, style: dict) -> None:
    """Mean Dice against the number of labeled cases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    sizes = {budget: len(fold["train"]) for budget, fold in benchmark.folds.items() if budget != ALL}
    several = len(benchmark.settings.seeds) > 1
    for method, look in style.items():
        points = []
        for budget in sorted(sizes, key=sizes.get):
            values = [run.mean for run in benchmark.finished(method, budget)]
            if values:
                points.append((sizes[budget], np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0))
        if points:
            x, mean, deviation = zip(*points)
            axes.errorbar(x, mean, deviation if several else None, marker="o", capsize=3, **look)
    ceiling = [run.mean for run in benchmark.finished(VANILLA, ALL)]
    if ceiling:
        number = len(benchmark.folds[ALL]["train"])
        axes.axhline(np.mean(ceiling), color="black", linestyle=":", label=f"{VANILLA}, all {number} labels")
    ticks = sorted(set(sizes.values()))
    axes.set_xscale("log")
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set(xlabel="labeled cases (logarithmic)", ylabel="mean foreground Dice (0 to 1)", title=benchmark.dataset.name)
    _save(figure, benchmark.output / "label_efficiency.png")


def panels(benchmark: Benchmark, style: dict, file: str, ylabel: str, draw) -> None:
    """A picture with one panel for each budget; ``draw(axes, runs, look)`` draws a method's line."""
    from matplotlib.figure import Figure

    budgets = [budget for budget in benchmark.folds if budget != ALL]
    figure = Figure(figsize=(3 + 4.5 * len(budgets), 4.5), layout="constrained")
    for axes, budget in zip(np.ravel(figure.subplots(1, len(budgets), sharey=True)), budgets):
        for method, look in style.items():
            draw(axes, benchmark.finished(method, budget), look)
        axes.set_xlabel(f"epoch ({benchmark.settings.iterations} training steps each)")
        axes.set_title(f"{budget} ({len(benchmark.folds[budget]['train'])} labeled)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].set_ylabel(ylabel)
    _save(figure, benchmark.output / file)


def draw_validation(axes, runs: list[Run], look: dict) -> None:
    """Mean over the seeds."""
    curves = [curve for run in runs if (curve := run.record.get("validation_dice"))]
    if curves:
        mean = np.mean(curves, axis=0)
        axes.plot(range(1, len(mean) + 1), mean, **look)


def draw_quality(axes, runs: list[Run], look: dict) -> None:
    """Mean over classes and seeds; solid for the network that makes the labels, dashed for the student beside it."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for epoch, network, _, dice in read_quality(run.fold):
            found[network][epoch].append(dice)
    if not found:
        return
    by_student = runs[0].method == VANILLA or find_trainer(runs[0].trainer).labeled_by == "student"
    order = ("student",) if by_student else ("teacher", "second", "student")
    labeling = next(network for network in order if network in found)
    for network in dict.fromkeys((labeling, "student")):
        # Epochs that all seeds have.
        most = max(map(len, found[network].values()))
        points = sorted((epoch, np.nanmean(dice)) for epoch, dice in found[network].items() if len(dice) == most)
        dashed = {} if network == labeling else {"label": None, "linestyle": "--"}
        axes.plot(*zip(*points), marker=".", **{**look, **dashed})


def _save(figure, file: Path) -> None:
    """Add grids and one legend for all panels, and write."""
    entries = {}
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper")
    with whole(file) as temporary:
        figure.savefig(temporary, dpi=100)


# --------------------------------------------------------------------------------------------------------- command line


def dry_run(benchmark: Benchmark) -> None:
    """Print what would be done."""
    for number, (name, fold) in enumerate(benchmark.folds.items()):
        print(f"Fold {number}, {name}: " + ", ".join(f"{len(cases)} {key}" for key, cases in fold.items()))
    for i, run in enumerate(benchmark.runs, 1):
        state = "done" if run.done else "to continue" if run.started else "to do"
        print(f"[{i}/{len(benchmark.runs)}] {run}: {state}\n    {' '.join(benchmark.command(run))}")


def main(arguments: list[str] | None = None) -> int:
    """The exit code; see the top of this file."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="cpu", help="device (default %(default)s)")
    parser.add_argument("--minutes", type=float, help=f"stop after so long (gpu: {GPU_MINUTES:g} unless given)")
    parser.add_argument("--report", action="store_true", help="only write the report, of what is done")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    minutes = args.minutes
    if minutes is None:
        minutes = GPU_MINUTES if args.profile == "gpu" else float("inf")
    try:
        benchmark = Benchmark(args.file, args.profile)
        if args.score:
            score(args.score, benchmark)
            return 0
        if args.dry_run:
            dry_run(benchmark)
            return 0
        code = 0
        if not args.report:
            if args.profile == "gpu" and not torch.cuda.is_available():
                raise ValueError("There is no CUDA device. Use --profile cpu")
            # Held until this process ends.
            lock = _lock(benchmark.lock_file)
            if lock is None:
                raise ValueError(f"Another benchmark of {benchmark.dataset.name} is running. Wait for it, or stop it")
            with lock:
                end_processes(benchmark.child_lock)
                benchmark.write_splits()
                code = benchmark.run(begin + 60 * minutes)
        report(benchmark)
        print(f"Report: {benchmark.output / 'results.md'}")
        return code
    except (ValueError, OSError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    # So that a closed terminal or a plain kill stops the training as Ctrl-C does; nohup stays nohup.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.exit(main())
