"""The matrix of runs: checked before anything starts, run one after the other, continued after a stop."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_semiseg import checkpoints
from nnunet_semiseg.benchmark.processes import Child, OutOfTime
from nnunet_semiseg.benchmark.quality import Snapshots
from nnunet_semiseg.benchmark.records import RECORD, Run, read_if_whole, update_record
from nnunet_semiseg.benchmark.suite import ALL, FORK, VANILLA, folds_of_budgets, read_suite
from nnunet_semiseg.data.splits import make_folds, read_splits
from nnunet_semiseg.data.unlabeled import check_store, store_folder
from nnunet_semiseg.datasets import Dataset, check_variables, dataset_name
from nnunet_semiseg.files import read_text, write_text
from nnunet_semiseg.jobs import Job, end_of, exit_reason
from nnunet_semiseg.trainers.options import OptionError
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer

PREFIX = "nnUNetTrainer"
# Added to the seed for the epochs before a fork: with the same one, the runs would draw their batches once more.
FORK_SEED = 1000


class Benchmark:
    """The checked matrix of runs.

    Args:
        file: FILE.json.
        profile: "cpu" or "gpu".

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with file, dataset or results, and the cure.
    """

    def __init__(self, file: Path, profile: str):
        self.file, self.profile = file, profile
        self.device = {"cpu": "cpu", "gpu": "cuda"}[profile]
        self.suite = s = read_suite(file)
        # Beside FILE.json, wherever the command is given.
        self.output = file.resolve().parent / s.output
        self.dataset = Dataset(dataset_name(str(s.dataset)))
        self.splits_file = self.dataset.preprocessed / "splits_final.json"
        self.lock_file = self.dataset.preprocessed / "benchmark.lock"
        self.child_lock = self.dataset.preprocessed / "benchmark_training.lock"
        check_variables(nnUNet_results)
        self.plans = self.dataset.plans(s.plans)
        self.cases, stored = self._preprocessed_cases()
        self.folds = folds_of_budgets(
            self.cases, self._validation(), s.budgets, s.split_seed, s.all_labels, bool(stored)
        )
        self.runs = self._runs()
        self._refuse_other_results()

    def _preprocessed_cases(self) -> tuple[list[str], list[str]]:
        """The preprocessed cases with labels, and those of imagesUn."""
        s, name = self.suite, self.dataset.name
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
        if self.suite.validation:
            return self.suite.validation
        if self.splits_file.is_file():
            return read_splits(self.splits_file)[0]["val"]
        if len(self.cases) < 5:
            raise ValueError(
                f"{self.dataset.name} has {len(self.cases)} cases, too few for nnU-Net's own split. Name the "
                f"validation cases in {self.file}"
            )
        return make_folds(self.cases)[0]["val"]

    def trainer(self, method: str, seed: int, epochs: int) -> str:
        """The name that nnU-Net knows the trainer by.

        Raises:
            ValueError: if there is no such trainer, or it has not such an option (OptionError).
        """
        s = self.suite
        name = (
            f"{PREFIX}{'' if method == VANILLA else method.removeprefix(PREFIX)}_{epochs}epochs"
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
        s, runs = self.suite, []
        for seed in s.seeds:
            for number, budget in enumerate(self.folds):
                base = None
                if s.fork_after is not None:
                    trainer = self.trainer(VANILLA, seed + FORK_SEED, s.fork_after)
                    base = Run(FORK, trainer, budget, number, seed, self._fold_folder(FORK, trainer, number))
                    runs.append(base)
                for method in [VANILLA] if budget == ALL else s.trainers:
                    trainer = self.trainer(method, seed, s.own_epochs)
                    folder = self._fold_folder(method, trainer, number)
                    runs.append(Run(method, trainer, budget, number, seed, folder, base, s.shared_epochs))
        twice = {run.fold for run in runs if sum(other.fold == run.fold for other in runs) > 1}
        if twice:
            raise ValueError(f"Two entries of 'trainers' are the same trainer: {twice.pop().parent.name}. Remove one")
        return runs

    def _fold_folder(self, method: str, trainer: str, number: int) -> Path:
        """Raises ValueError if nnU-Net cannot make it."""
        model = f"{trainer}__{self.plans.plans_name}__{self.suite.configuration}"
        if len(model) > 240:
            raise ValueError(f"'{method}' makes a folder name that is too long ({model}). Set fewer options")
        return Path(str(nnUNet_results)) / self.dataset.name / model / f"fold_{number}"

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
            if run.record and run.record.get("fork") != run.fork:
                raise ValueError(f"{run.fold} was made by a benchmark with another 'fork_after'. {cure}")

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
        s = self.suite
        return [
            *("nnUNetv2_train", self.dataset.name, s.configuration, str(run.number)),
            *("-tr", run.trainer, "-p", s.plans, "-device", self.device),
            *(["--c"] if run.started or run.base is not None else []),
        ]

    def fork_command(self, run: Run) -> list[str]:
        """Of a run that does not start untrained: what makes its first checkpoint."""
        assert run.base is not None
        return [
            *("nnunet_semiseg", "fork", "-d", self.dataset.name, "-c", self.suite.configuration, "-f", str(run.number)),
            *("-tr", run.trainer, "-p", self.suite.plans, "--from", str(run.base.fold)),
        ]

    def command_lines(self, run: Run) -> list[str]:
        """The commands of a run from its start, as a user would give them."""
        train = " ".join(self.command(run))
        if run.base is None:
            return [train.removesuffix(" --c")]
        return [" ".join(self.fork_command(run)).replace(str(nnUNet_results), "$nnUNet_results"), train]

    def _scoring(self, run: Run) -> list[str]:
        return ["nnunet_semiseg", "benchmark", str(self.file), "--profile", self.profile, "--score", str(run.fold)]

    def _start(self, name: str, command: list[str], log: Path) -> Child:
        if command[0] == "nnunet_semiseg":
            # This installation's.
            command = [sys.executable, "-m", "nnunet_semiseg.cli", *command[1:]]
        return Child(Job(name, tuple(command), log), self.child_lock, self.device)

    def finished(self, method: str, budget: str) -> list[Run]:
        """The validated runs of all seeds."""
        return [r for r in self.runs if (r.method, r.budget) == (method, budget) and r.summary is not None]

    def run(self, deadline: float) -> int:
        """Do what is left to do until ``deadline`` (of time.monotonic); the exit code."""
        waiting = [run for run in self.runs if not run.done]
        # What failed before comes last, so that it does not use up the time of every call, with what starts from it.
        waiting.sort(key=lambda run: any(of.record.get("failed", False) for of in (run.base, run) if of is not None))
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
            # SystemExit: SIGTERM, or SIGHUP.
            except (KeyboardInterrupt, SystemExit):
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
        before = update_record(run.fold, split=self.folds[run.budget], device=self.device, fork=run.fork)
        log = run.fold / "run.log"
        try:
            if run.summary is None:
                error = self._fork(run, deadline, log)
                if error is not None:
                    return error
                scored = self.suite.quality_cases > 0 and run.budget != ALL and run.method != FORK
                look = Snapshots(run.fold, self.suite.own_epochs).look if scored else lambda: None
                child = self._start(f"training of {run}", self.command(run), log)
                try:
                    child.wait(deadline, look)
                finally:
                    update_record(run.fold, peak_rss_gib=max(child.peak_gib, before.get("peak_rss_gib", 0.0)))
                if child.exit_code or run.summary is None:
                    return _failure(log, child.exit_code)
            # A process of its own: the memory that it takes is not counted as the next training's, and is given back.
            child = self._start(f"scoring of {run}", self._scoring(run), log)
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

    def _fork(self, run: Run, deadline: float, log: Path) -> str | None:
        """Make the first checkpoint of a run that does not start untrained; what went wrong, or None."""
        if run.base is None or run.started:
            return None
        if not run.base.done:
            return f"it starts from {run.base}, which is not done"
        child = self._start(f"fork of {run}", self.fork_command(run), log)
        child.wait(deadline)
        return None if run.started else _failure(log, child.exit_code)


def _failure(log: Path, exit_code: int | None) -> str:
    return f"{exit_reason(exit_code or 0)}. {end_of(log)}"


def dry_run(benchmark: Benchmark) -> None:
    """Print what would be done."""
    for number, (name, fold) in enumerate(benchmark.folds.items()):
        print(f"Fold {number}, {name}: " + ", ".join(f"{len(cases)} {key}" for key, cases in fold.items()))
    for i, run in enumerate(benchmark.runs, 1):
        state = "done" if run.done else "to continue" if run.started else "to do"
        lines = [" ".join(benchmark.command(run))] if run.started else benchmark.command_lines(run)
        print("\n    ".join([f"[{i}/{len(benchmark.runs)}] {run}: {state}", *lines]))
