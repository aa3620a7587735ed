"""Rounds of training that grow the labeled set by consensus (FLARE22 two-stage method, "Pseudo labeling")."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_semiseg import checkpoints
from nnunet_semiseg.data.splits import check_trained_on
from nnunet_semiseg.datasets import CaseError, Dataset
from nnunet_semiseg.executors import Failure
from nnunet_semiseg.files import read_json
from nnunet_semiseg.jobs import Job, end_of, lock
from nnunet_semiseg.parallel import over_cases
from nnunet_semiseg.segmentations import Classes, read_labels
from nnunet_semiseg.trainers.frame import SemiSupervisedTrainer
from nnunet_semiseg.trainers.options import MAX_NAME, OptionError, check_folder_name
from nnunet_semiseg.trainers.registry import find_trainer
from pseudo_label.manifest import Manifest
from pseudo_label.next_dataset import (
    NextDataset,
    free_ids,
    link_images,
    link_labels,
    read_cases,
    release_id,
    reserve_id,
    used_ids,
)
from pseudo_label.scores import CaseScore, read_labeled_volumes, read_scores, score_members
from pseudo_label.selection import Rules, select, to_annotate
from pseudo_label.selection_files import export_for_annotation, ignore_value, write_selection

# A class whose mean volume changes by more than this factor has drifted: from the labeled cases, which are few and
# other ones, and from a round to the next, on the same cases.
DRIFT_FROM_LABELED, DRIFT_BETWEEN_ROUNDS = 3.0, 2.0
STEPS = ("predict", "score", "select", "build", "train")


@dataclass(frozen=True)
class Member:
    """One of the models of a consensus.

    Args:
        trainer: For ``nnUNetv2_train -tr``.
        fold: nnU-Net's.
    """

    trainer: str
    fold: int

    @classmethod
    def of(cls, text: str) -> Member:
        """``TRAINER`` or ``TRAINER:FOLD``; fold 0 without one.

        Raises:
            ValueError: naming what is wrong.
        """
        trainer, colon, fold = text.partition(":")
        if colon and not fold.isdigit():
            raise ValueError(
                f"The fold of member {text} is not a number. A member is TRAINER or TRAINER:FOLD; fold 'all' has no "
                "validation cases that tell whether a round helped"
            )
        try:
            known = find_trainer(trainer)
        except OptionError as error:
            raise ValueError(f"Member {text}: {error}") from None
        if known is None:
            try:
                recursive_find_trainer_class_by_name(trainer)
            except RuntimeError:
                raise ValueError(
                    f"nnU-Net finds no trainer {trainer}. nnunet_semiseg trainers lists those of this package"
                ) from None
        return cls(trainer, int(fold or 0))

    @property
    def name(self) -> str:
        return f"{self.trainer}_fold{self.fold}"


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of rounds; kept in the manifest.

    Args:
        dataset: Of round 0, ``Dataset501_Name``.
        members: Two or more, all different.
        rounds: How often the labeled set grows, at most.
        dataset_ids: Of the rounds' datasets; empty for free ones.
        min_agreement: Voxels with less agreement become the ignore label; 0 for none.
        finetune: A round starts from all weights of the one before, rather than anew.
        repeat_real: How often a labeled case counts as one with a pseudo label.
        max_drop: By how much the members' mean validation Dice may fall from a round to the next.
        allow_drift: Go on although a class has drifted or is gone.
        annotate: How many cases to propose for annotation in each round.
    """

    dataset: str
    configuration: str
    plans: str
    members: tuple[str, ...]
    rounds: int
    rules: Rules
    dataset_ids: tuple[int, ...] = ()
    consensus: str | None = None
    metric: str = "dice"
    per_slice: bool = False
    min_agreement: float = 0.0
    finetune: bool = False
    repeat_real: int = 1
    max_drop: float = 0.0
    allow_drift: bool = False
    annotate: int = 5
    disable_tta: bool = False


class Rounds:
    """A work folder with a manifest, and the datasets and trainings that belong to it.

    A step is done when its output is complete and the manifest says so; one that was killed is done again from its
    inputs, and finds what it had finished. Nothing is deleted.

    Args:
        settings: Those of the first call, except for more rounds and ``allow_drift``.
        folder: The work folder.
        executor: Runs trainings and predictions.
        parts: Into how many jobs a member's prediction is cut.
        processes: For scoring and preprocessing; up to 3 for reading and writing of predictions.

    Raises:
        ValueError, FileNotFoundError, CaseError: naming what cannot be used.
    """

    def __init__(self, settings: Settings, folder: Path, executor, parts: int, processes: int):
        self.settings = s = settings
        self.folder, self.executor, self.parts, self.processes = folder.resolve(), executor, parts, processes
        self.members = [Member.of(text) for text in s.members]
        if len(self.members) < 2:
            raise ValueError("One member agrees with itself always. Give two or more --members")
        twice = [m for i, m in enumerate(self.members) if m in self.members[:i]]
        if twice:
            raise ValueError(f"Member {twice[0].name} is given twice. Use another fold, or another _seed=")
        for name, lowest in (("rounds", 1), ("repeat_real", 1), ("annotate", 0)):
            if getattr(s, name) < lowest:
                raise ValueError(f"{name} is {getattr(s, name)}. Use {lowest} or more")
        if parts < 1:
            raise ValueError(f"parts is {parts}. Use 1 or more")
        self.first = Dataset(s.dataset)
        self.classes = Classes.from_file(self.first.json_file)
        self.classes.check_order(self.first.json_file)
        s.rules.check(self.classes.names)
        plans = self.first.plans(s.plans)
        if s.configuration not in plans.available_configurations:
            raise ValueError(
                f"{s.plans} has no configuration {s.configuration}. It has {', '.join(plans.available_configurations)}"
            )
        if plans.get_configuration(s.configuration).previous_stage_name:
            raise ValueError(
                f"{s.configuration} is the second stage of a cascade. Use the members' first stage for rounds"
            )
        for member in self.members:
            trainer = find_trainer(member.trainer)
            second = "" if trainer is None else trainer.folder_suffix()
            check_folder_name(member.trainer + second, s.plans, s.configuration)
            # Of the files in the work folder, the lock beside the log of a prediction has the longest name.
            excess = len(f".predict_{member.name}_part{parts - 1}.log.lock".encode()) - MAX_NAME
            if excess > 0:
                raise ValueError(f"The name of member {member.name} is {excess} characters too long. Set fewer options")
        self.reader = plans.image_reader_writer_class
        self.cases = read_cases(self.first, sorted({member.fold for member in self.members}))
        self.manifest = Manifest.open(self.folder / "manifest.json", json.loads(json.dumps(asdict(s))))
        self._check_cases()
        self._check_dataset_ids()

    def _check_cases(self) -> None:
        """Raises ValueError if cases were added, removed or moved to another part since round 0."""
        folds = {str(fold): of for fold, of in self.cases.folds.items()}
        now = {"labeled": list(self.cases.labeled), "unlabeled": list(self.cases.unlabeled), "folds": folds}
        before = self.manifest.cases or now
        for part in ("labeled", "unlabeled"):
            changed = sorted(set(before[part]) ^ set(now[part]))
            if changed:
                how = "no longer" if changed[0] in before[part] else "new as"
                raise ValueError(
                    f"Since these rounds began, the case {changed[0]} is {how} {part}. Undo that, or start new rounds "
                    "with another -o"
                )
        if before["folds"] != folds:
            raise ValueError(
                f"{self.first.preprocessed / 'splits_final.json'} has changed since these rounds began. Restore it, or "
                "start new rounds with another -o"
            )
        self.manifest.cases = now

    def _check_dataset_ids(self) -> None:
        ids, own = self.settings.dataset_ids, [int(of["dataset"][7:10]) for of in self.manifest.rounds[1:]]
        if not ids:
            return
        if len(ids) != self.settings.rounds:
            raise ValueError(f"{len(ids)} dataset ids for {self.settings.rounds} rounds. Give one for each")
        if len(set(ids)) < len(ids) or not all(0 < number < 1000 for number in ids):
            raise ValueError(f"The dataset ids {' '.join(map(str, ids))} are not different numbers from 1 to 999")
        if list(ids[: len(own)]) != own:
            raise ValueError(
                f"The first rounds have the dataset ids {' '.join(map(str, own))}. Give these, and then new ones"
            )
        taken = sorted(set(ids[len(own) :]) & used_ids(self.folder))
        if taken:
            raise ValueError(f"The dataset id {taken[0]} is taken. Use another one, or leave --dataset-ids out")

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, call: str | None = None) -> str:
        """Do what is left to do; returns why the rounds stopped.

        Args:
            call: The command line, for the manifest.

        Raises:
            RuntimeError: with the ends of the logs, if trainings or predictions failed; a further call continues.
            CaseError, OSError: naming the case or file.
        """
        held = lock(self.folder / ".lock")
        if held is None:
            raise ValueError(f"Another call works on {self.folder}. Wait for it, or stop it")
        with held:
            # Another call may have gone on since this one read it.
            self.manifest = Manifest.open(self.manifest.file, self.manifest.arguments)
            self._check_cases()
            if call and self.manifest.stopped is None:
                self.manifest.calls.append(call)
            self._loop()
        return self.manifest.stopped

    def _loop(self) -> None:
        manifest = self.manifest
        if not manifest.rounds:
            manifest.rounds.append({"dataset": self.first.name, "steps": {}})
            manifest.write()
        if not manifest.is_done(0, "train"):
            print("Round 0: train", flush=True)
            with manifest.step(0, "train") as of:
                of["reused"] = self._already_trained()
                of["validation"] = self._train(0)
        while manifest.stopped is None:
            number = len(manifest.rounds) - 1
            if manifest.is_done(number, "train"):
                # It may have been killed before it stopped, or be asked for more rounds after it did.
                reason = self._reason_to_stop(number, "train") if number else None
                if reason or number >= self.settings.rounds:
                    self._stop(reason or f"All {number} rounds are done")
                    break
                number += 1
                manifest.rounds.append({"dataset": self._take_name(number), "steps": {}})
                manifest.write()
            self._round(number)

    def _round(self, number: int) -> None:
        """The steps of a round that are not done; it may stop the rounds."""
        for step in STEPS:
            if not self.manifest.is_done(number, step):
                print(f"Round {number}: {step}", flush=True)
                with self.manifest.step(number, step) as of:
                    getattr(self, f"_{step}_step")(number, of)
            reason = self._reason_to_stop(number, step)
            if reason:
                self._stop(reason)
                return

    def _stop(self, reason: str) -> None:
        self.manifest.stopped = reason
        self.manifest.write()

    def _reason_to_stop(self, number: int, step: str) -> str | None:
        of = self.manifest.rounds[number]
        if step == "score" and of["drift"] and not self.settings.allow_drift:
            return (
                f"The classes drift in round {number}: {'; '.join(of['drift'])}. Look at {self.round_folder(number)}; "
                "--allow-drift goes on"
            )
        if step == "select" and not of["accepted"]:
            return f"No case is accepted in round {number}"
        if step == "build" and of["remaining"] == 0 and self._members_that_need_unlabeled():
            return (
                f"Every case has a pseudo label after round {number}, and nothing is left for "
                f"{', '.join(self._members_that_need_unlabeled())} to learn from unlabeled. {of['dataset']} has them "
                f"all: nnUNetv2_train {of['dataset']} {self.settings.configuration} 0 -p {self.settings.plans}"
            )
        if step == "train":
            before, now = (_mean(self.manifest.rounds[i]["validation"]) for i in (number - 1, number))
            if now < before - self.settings.max_drop:
                return (
                    f"The members' mean validation Dice fell from {before:.4f} to {now:.4f} in round {number}: the "
                    f"models of round {number - 1} are the better ones"
                )
            if of["remaining"] == 0:
                return f"Every case has a pseudo label after round {number}"
        return None

    def _members_that_need_unlabeled(self) -> list[str]:
        return [member.trainer for member in self.members if _learns_from_unlabeled(member.trainer)]

    # ----------------------------------------------------------------------------------------------------- the steps

    def _train_step(self, number: int, of: dict) -> None:
        of["validation"] = self._train(number)

    def _train(self, number: int) -> dict[str, float]:
        """Train the members that are not trained; returns {member: mean validation Dice on its fold}."""
        waiting = [member for member in self.members if self._validation(number, member) is None]
        if self.settings.finetune and number > 0:
            for member in waiting:
                self._start_from_round_before(number, member)
        self._run([self._training(number, member) for member in waiting])
        found = {member.name: self._validation(number, member) for member in self.members}
        for member in self.members:
            if found[member.name] is None:
                raise RuntimeError(
                    f"The training of {member.name} left no {self._summary(number, member)}. "
                    f"{end_of(self._log(number, member))}"
                )
        return found

    def _already_trained(self) -> list[str]:
        """The members whose models of round 0 are not of these rounds.

        Raises:
            ValueError: if one was validated on other cases than its fold has, or trained on labels that it now hides.
        """
        found = []
        for member in self.members:
            file = self._summary(0, member)
            if self._validation(0, member) is None or self._log(0, member).is_file():
                continue
            cure = f"Move {file.parent.parent} away, and the member is trained"
            cases = {Path(of["reference_file"]).name for of in read_json(file)["metric_per_case"]}
            if cases != {f"{case}{self.first.file_ending}" for case in self.cases.folds[member.fold]["val"]}:
                raise ValueError(f"{file} is of other validation cases than fold {member.fold} has. {cure}")
            if find_trainer(member.trainer) is not None:
                checkpoint = file.parent.parent / "checkpoint_final.pth"
                state = checkpoints.read(checkpoint).get(checkpoints.STATE_KEY, {})
                splits_file = self.first.preprocessed / "splits_final.json"
                check_trained_on(splits_file, member.fold, state.get("trained_on", ()), checkpoint, cure)
            print(f"{member.name} is trained already, and is used as it is: {file.parent.parent}")
            found.append(member.name)
        return found

    def _start_from_round_before(self, number: int, member: Member) -> None:
        """Put a checkpoint there with which ``--c`` starts, unless the training has its own already."""
        fold = self._fold_folder(number, member)
        if not any(fold.glob("checkpoint_*.pth")):
            fold.mkdir(parents=True, exist_ok=True)
            before = checkpoints.read(self._fold_folder(number - 1, member) / "checkpoint_final.pth")
            checkpoints.write(checkpoints.restarted(before), fold / "checkpoint_latest.pth")

    def _validation(self, number: int, member: Member) -> float | None:
        """Mean Dice over the classes that the validation cases have; None while the training is not finished.

        Raises:
            ValueError: if the validation cases have no class at all.
        """
        file = self._summary(number, member)
        try:
            # nnU-Net's own mean over classes is NaN if one is in no validation case.
            of_classes = read_json(file)["mean"].values()
        except (FileNotFoundError, ValueError):
            # A kill cuts it off; --c makes it anew.
            return None
        dice = [of["Dice"] for of in of_classes if of["n_ref"] > 0]
        if not dice:
            raise ValueError(
                f"The validation cases of fold {member.fold} have no foreground, so no round can be judged"
            )
        return sum(dice) / len(dice)

    def _predict_step(self, number: int, of: dict) -> None:
        images = self.round_folder(number) / "images"
        remaining = self._next(number).remaining
        for case, files in remaining.items():
            link_images(files, images, case, self.first.file_ending)
        self._predict(number, remaining)
        # A kill of an earlier call, or of a job that the executor tried again, cuts off files, which
        # --continue_prediction takes for finished. They are looked for only now: jobs on a cluster go on after a kill
        # and may have been writing them.
        damaged = self._damaged(number, remaining)
        for file in damaged:
            file.unlink()
        if damaged:
            self._predict(number, remaining)
        of["predicted"] = len(remaining)

    def _predict(self, number: int, cases) -> None:
        """Run the predictions of members that lack cases. Raises RuntimeError naming a case that is lacking then."""
        waiting = [member for member in self.members if self._unpredicted(number, member, cases)]
        self._run([job for member in waiting for job in self._predictions(number, member)])
        for member in waiting:
            missing = self._unpredicted(number, member, cases)
            if missing:
                logs = [end_of(job.log) for job in self._predictions(number, member)]
                left = f"The prediction of {member.name} left no {missing[0]} in {self._predicted(number, member)}."
                raise RuntimeError("\n".join([left, *logs]))

    def _unpredicted(self, number: int, member: Member, cases) -> list[str]:
        """The cases without one of a member's files."""
        files = {case: self._prediction_files(number, member, case) for case in cases}
        return [case for case in cases if not all(file.is_file() for file in files[case])]

    def _prediction_files(self, number: int, member: Member, case: str) -> list[Path]:
        folder = self._predicted(number, member)
        endings = [self.first.file_ending, *([".npz"] if self._needs_probabilities else [])]
        return [folder / f"{case}{ending}" for ending in endings]

    def _damaged(self, number: int, cases) -> list[Path]:
        jobs = {
            f"{member.name} {case}": (self._prediction_files(number, member, case), self.classes, self.reader)
            for member in self.members
            for case in cases
        }
        found, failures = over_cases(_damaged_files, jobs, self.processes, "Checking")
        if failures:
            raise CaseError("\n".join(failures))
        return [file for files in found.values() for file in files]

    def _score_step(self, number: int, of: dict) -> None:
        scores = score_members(
            [self._predicted(number, member) for member in self.members],
            self.scored(number),
            self.classes,
            self.settings.consensus or "mean",
            self.settings.per_slice,
            self.settings.metric,
            labeled=self._labels_of_training_cases(),
            processes=self.processes,
            # On the few cases that are left members that differ may agree.
            allow_identical=number > 1,
            reader=self.reader,
        )
        of["score_command"] = shlex.join(self._score_command(number))
        of["drift"] = self._drift(number, scores)
        of["mean_score"] = _mean({c: s.score for c, s in scores.items() if s.score is not None})

    def _select_step(self, number: int, of: dict) -> None:
        scores, s = self._scores(number), self.settings
        decisions = select(scores, s.rules, read_labeled_volumes(self.scored(number)))
        folder = self.round_folder(number) / "selection"
        of["select_command"] = shlex.join(self._select_command(number))
        of["accepted"] = [case for case, decision in decisions.items() if decision.accepted]
        left = {case: scores[case] for case, decision in decisions.items() if not decision.accepted}
        lacking = {case for case, decision in decisions.items() if decision.lacking}
        of["annotate"] = to_annotate(left, s.annotate, lacking)
        if of["annotate"]:
            images = {case: self.cases.unlabeled[case] for case in of["annotate"]}
            export_for_annotation(
                self.scored(number),
                folder / "annotate",
                of["annotate"],
                scores,
                images,
                self.classes,
                self.first.json["channel_names"],
            )
        write_selection(self.scored(number), folder, decisions, scores, self.classes, s.min_agreement)

    def _build_step(self, number: int, of: dict) -> None:
        following = self._next(number)
        following.build()
        release_id(int(following.name[7:10]))
        of["remaining"] = len(following.remaining)

    # ------------------------------------------------------------------------------------------------- drift of classes

    def _drift(self, number: int, scores: dict[str, CaseScore]) -> list[str]:
        """What is suspicious about the classes' mean volumes: one line for each class, empty if nothing is.

        Round 1 is compared with the labeled cases; a later one with the round before and, so that small steps do not
        add up unseen, with round 1. That is on the cases that both have: those that are left are harder ones, which is
        no drift.
        """
        volumes = _volumes(scores, scores)
        if number == 1:
            labeled = read_labeled_volumes(self.scored(1))
            compared = [("the labeled cases", list(labeled.values()), DRIFT_FROM_LABELED)]
        else:
            # In round 2 the round before is round 1.
            factors = {number - 1: DRIFT_BETWEEN_ROUNDS}
            factors.setdefault(1, DRIFT_FROM_LABELED)
            compared = [(f"round {i}", _volumes(self._scores(i), scores), factor) for i, factor in factors.items()]
        found = []
        for name in self.classes.names:
            new = _mean(of[name] for of in volumes)
            for what, before, factor in compared:
                old = _mean(of[name] for of in before)
                if new == 0 and old > 0:
                    found.append(f"no case has {name}")
                    break
                if old > 0 and not 1 / factor <= new / old <= factor:
                    found.append(f"{name} has {new:.3g} mm3 in the mean case, in {what} it has {old:.3g}")
                    break
        return found

    def _labels_of_training_cases(self) -> Path:
        """A folder of links: the volumes of hidden and of validation cases are none of the rounds' business."""
        for case in self.cases.training:
            link_labels(self.cases.labeled[case][1], self._labeled / f"{case}{self.first.file_ending}")
        return self._labeled

    # ---------------------------------------------------------------------------------------------- names and commands

    @property
    def _labeled(self) -> Path:
        return self.folder / "labeled"

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round_{number}"

    def scored(self, number: int) -> Path:
        return self.round_folder(number) / "scores"

    def _predicted(self, number: int, member: Member) -> Path:
        return self.round_folder(number) / "members" / member.name

    def _log(self, number: int, member: Member) -> Path:
        return self.round_folder(number) / "logs" / f"train_{member.name}.log"

    def _scores(self, number: int) -> dict[str, CaseScore]:
        return read_scores(self.scored(number))

    def _take_name(self, number: int) -> str:
        """A name whose id no other rounds can take until the dataset is there."""
        while True:
            name = self._next_name(number)
            own = int(name[7:10])
            if reserve_id(own, self.folder):
                return name
            if self.settings.dataset_ids:
                raise ValueError(f"The dataset id {own} is taken by other rounds. Use another one")

    def _next_name(self, number: int) -> str:
        first_id, _, name = self.first.name[len("Dataset") :].partition("_")
        ids = self.settings.dataset_ids
        own = ids[number - 1] if ids else free_ids(int(first_id) + 1, 1, self.folder)[0]
        return f"Dataset{own:03d}_{name}_round{number}"

    def _next(self, number: int) -> NextDataset:
        """The dataset that round ``number`` makes, as far as the manifest knows it."""
        rounds = self.manifest.rounds
        pseudo, provenance = {}, {}
        for i in range(1, number + 1):
            accepted = rounds[i].get("accepted", [])
            scores = self._scores(i) if accepted else {}
            for case in accepted:
                pseudo[case] = self.round_folder(i) / "selection" / "labels" / f"{case}{self.first.file_ending}"
                provenance[case] = {
                    "round": i,
                    "score": scores[case].score,
                    "members": [member.name for member in self.members],
                }
        return NextDataset(
            first=self.first,
            previous=Dataset(rounds[number - 1]["dataset"]),
            name=rounds[number]["dataset"],
            cases=self.cases,
            pseudo=pseudo,
            provenance=provenance,
            ignore=ignore_value(self.classes) if self.settings.min_agreement > 0 else None,
            plans_name=self.settings.plans,
            configuration_name=self.settings.configuration,
            repeat_real=self.settings.repeat_real,
            processes=self.processes,
        )

    def _fold_folder(self, number: int, member: Member) -> Path:
        model = f"{member.trainer}__{self.settings.plans}__{self.settings.configuration}"
        return Path(str(nnUNet_results)) / self.manifest.rounds[number]["dataset"] / model / f"fold_{member.fold}"

    def _summary(self, number: int, member: Member) -> Path:
        """nnU-Net's validation, which it writes at the very end of a training."""
        return self._fold_folder(number, member) / "validation" / "summary.json"

    def _training(self, number: int, member: Member) -> Job:
        s = self.settings
        command = ["nnUNetv2_train", self.manifest.rounds[number]["dataset"], s.configuration, str(member.fold)]
        # Starts anew where there is nothing to continue.
        command += ["-tr", member.trainer, "-p", s.plans, "--c"]
        return Job(f"train_{member.name}", tuple(command), self._log(number, member))

    def _predictions(self, number: int, member: Member) -> list[Job]:
        s = self.settings
        command = ["nnUNetv2_predict", "-i", str(self.round_folder(number) / "images")]
        command += ["-o", str(self._predicted(number, member)), "-d", self.manifest.rounds[number - 1]["dataset"]]
        command += ["-c", s.configuration, "-tr", member.trainer, "-p", s.plans, "-f", str(member.fold)]
        command += ["--continue_prediction"]
        command += ["--save_probabilities"] if self._needs_probabilities else []
        command += ["--disable_tta"] if s.disable_tta else []
        # nnU-Net's own number is 3 for each.
        command += [f for flag in ("-npp", "-nps") for f in (flag, str(min(3, self.processes)))]
        jobs = []
        for part in range(self.parts):
            name = f"predict_{member.name}" + (f"_part{part}" if self.parts > 1 else "")
            own = ("-num_parts", str(self.parts), "-part_id", str(part)) if self.parts > 1 else ()
            jobs.append(Job(name, (*command, *own), self.round_folder(number) / "logs" / f"{name}.log"))
        return jobs

    @property
    def _needs_probabilities(self) -> bool:
        return self.settings.consensus in (None, "mean")

    def _run(self, jobs: Sequence[Job]) -> None:
        failures: list[Failure] = self.executor.run(jobs)
        if failures:
            raise RuntimeError("\n".join([*map(str, failures), "The same command continues after the cause is fixed"]))

    def describe(self) -> list[str]:
        """The command lines of all rounds, in their order, as if no round stopped them early."""
        s, manifest = self.settings, self.manifest
        rounds = list(manifest.rounds)
        try:
            names = iter(free_ids(int(s.dataset[7:10]) + 1, s.rounds, self.folder))
            for number in range(len(rounds), s.rounds + 1):
                name = s.dataset if number == 0 else self._next_name(number)
                if number and not s.dataset_ids:
                    name = f"Dataset{next(names):03d}{name[10:]}"
                manifest.rounds.append({"dataset": name, "steps": {}})
            lines = self.executor.describe([self._training(0, member) for member in self.members])
            lines.append(f"# Link the labels of the training cases in {self._labeled}")
            for number in range(1, s.rounds + 1):
                folder = self.round_folder(number)
                lines += [f"# Round {number}: link the images of the unlabeled cases in {folder / 'images'}"]
                lines += self.executor.describe([job for m in self.members for job in self._predictions(number, m)])
                lines.append(shlex.join(self._score_command(number)))
                lines.append(shlex.join(self._select_command(number)))
                lines.append(f"# Link and preprocess {manifest.rounds[number]['dataset']}")
                if s.finetune:
                    lines.append(f"# Start each member from its checkpoint of {manifest.rounds[number - 1]['dataset']}")
                lines += self.executor.describe([self._training(number, member) for member in self.members])
            return lines
        finally:
            manifest.rounds = rounds

    def _score_command(self, number: int) -> list[str]:
        s = self.settings
        command = ["pseudo_label", "score", "-d", s.dataset, "--labeled", str(self._labeled), "--metric", s.metric]
        command += ["-o", str(self.scored(number)), "-i"]
        command += [str(self._predicted(number, member)) for member in self.members]
        command += ["--consensus", s.consensus] if s.consensus else []
        return command + (["--per-slice"] if s.per_slice else [])

    def _select_command(self, number: int) -> list[str]:
        rules = self.settings.rules
        command = ["pseudo_label", "select", "-i", str(self.scored(number))]
        command += ["-o", str(self.round_folder(number) / "selection")]
        for flag in ("threshold", "max_volume_zscore", "top", "fraction"):
            if getattr(rules, flag) is not None:
                command += [f"--{flag.replace('_', '-')}", str(getattr(rules, flag))]
        pairs = {"--class-threshold": rules.class_thresholds, "--max-components": rules.max_components}
        for flag, values in pairs.items():
            command += [flag, *(f"{name}={value}" for name, value in values.items())] if values else []
        command += ["--balanced"] if rules.balanced else []
        command += ["--presence", "off" if rules.presence is None else str(rules.presence)]
        command += ["--may-be-absent", *rules.may_be_absent] if rules.may_be_absent else []
        s = self.settings
        command += ["--min-agreement", str(s.min_agreement)] if s.min_agreement else []
        images = str(self.round_folder(number) / "images")
        return command + (["--annotate", str(s.annotate), "--images", images] if s.annotate else [])


def _learns_from_unlabeled(name: str) -> bool:
    trainer = find_trainer(name) or recursive_find_trainer_class_by_name(name)
    return issubclass(trainer, SemiSupervisedTrainer) and trainer.learns_from_unlabeled()


def _volumes(scores: dict[str, CaseScore], cases) -> list[dict[str, float]]:
    """The volume of each class, of each of the cases."""
    return [{name: own.volume_mm3 for name, own in scores[case].classes.items()} for case in cases]


def _mean(values) -> float | None:
    values = list(values.values() if isinstance(values, dict) else values)
    return sum(values) / len(values) if values else None


def _damaged_files(files: list[Path], classes: Classes, reader: type[BaseReaderWriter]) -> list[Path]:
    """Those of a case's label map and probabilities that are cut off; both, or nnU-Net would write only one."""
    try:
        read_labels(files[0], classes.known, reader)
    except CaseError:
        return files
    return files if not all(zipfile.is_zipfile(file) for file in files[1:]) else []
