"""The logic of rounds, with an executor that writes what trainings and predictions would leave."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from conftest import SHORT, from_start, make_case, write_image
from nnunetv2.paths import nnUNet_results

from nnunet_semiseg import checkpoints, files
from nnunet_semiseg.datasets import CaseError, Dataset
from nnunet_semiseg.executors import Failure
from pseudo_label.rounds import Rounds, RoundsSettings
from pseudo_label.rounds.cases import read_cases
from pseudo_label.rounds.dataset_ids import free_ids, planned_names, release_id, reserve_id, used_ids
from pseudo_label.selection import SelectionRules

MEMBERS = ("nnUNetTrainerMeanTeacher_seed=1", "nnUNetTrainerMeanTeacher_seed=2")
STOCK = ("nnUNetTrainer", "nnUNetTrainer_250epochs")
REAL = ["lab_00", "lab_01", "lab_02"]


def truth(case):
    return make_case(int(case[4:]) + (100 if case.startswith("unl") else 0))[1]


def predict(number, member, case):
    """The second member errs, more from case to case."""
    return np.roll(truth(case), int(case[4:]) % 3 if member else 0, 2)


class FakeExecutor:
    """Writes what the jobs' commands would write.

    Args:
        dice: ``dice(number of the dataset's round)`` is the validation Dice of its members.
        predict: ``predict(round, index of the member, case)`` is a label map.
    """

    def __init__(self, dice=lambda number: 0.5 + 0.1 * number, predict=predict, trainers=MEMBERS):
        self.dice, self.predict, self.trainers = dice, predict, trainers
        self.ran = []
        self.failing = None

    def describe(self, jobs):
        return [job.line for job in jobs]

    def run(self, jobs):
        for job in jobs:
            self.ran.append(job.name)
            if self.failing and self.failing in job.name:
                return [Failure(job, 1, "exit code 1", job.log, "the tail of the log")]
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.touch()
            (self._train if job.name.startswith("train_") else self._predict)(list(job.command))
        return []

    def _train(self, command):
        dataset, configuration, fold = command[1:4]
        trainer = command[command.index("-tr") + 1]
        number = int(dataset.partition("_round")[2] or 0)
        write_training(dataset, trainer, self.dice(number), fold)

    def _predict(self, command):
        def option(name):
            return command[command.index(name) + 1]

        images, out = Path(option("-i")), Path(option("-o"))
        cases = sorted(file.name[:6] for file in images.iterdir())
        if "-num_parts" in command:
            cases = cases[int(option("-part_id")) :: int(option("-num_parts"))]
        for case in cases:
            file = out / f"{case}.nii.gz"
            probabilities = file.with_name(f"{case}.npz")
            wanted = "--save_probabilities" in command
            if file.is_file() and (probabilities.is_file() or not wanted):
                continue
            labels = self.predict(int(images.parent.name[-1]), self.trainers.index(option("-tr")), case)
            write_image(labels, file)
            if wanted:
                np.savez(probabilities, probabilities=np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 0))


def write_training(dataset, trainer, dice, fold="0", cases=("lab_05",)):
    folder = Path(str(nnUNet_results)) / dataset / f"{trainer}__nnUNetPlans_cpu__2d" / f"fold_{fold}"
    summary = {
        "mean": {
            "1": {"Dice": dice, "n_ref": 5.0},
            "2": {"Dice": dice, "n_ref": 5.0},
            "3": {"Dice": 0.0, "n_ref": 0.0},
        },
        "metric_per_case": [{"reference_file": f"/x/{case}.nii.gz"} for case in cases],
    }
    files.write_json(folder / "validation" / "summary.json", summary)
    weights = {"weight": torch.full((1,), dice)}
    content = {"network_weights": weights, "current_epoch": 9, "_best_ema": 0.3, "logging": {"lrs": [0.1, 0.2]}}
    checkpoints.write(content, folder / "checkpoint_final.pth")
    return folder


@pytest.fixture(autouse=True)
def dataset(prepared, work):
    """The dataset of round 0; what rounds made of it is removed afterwards."""
    yield prepared("labels")
    for folder in [*work.glob("*/Dataset9*"), *(work / "results").glob("Dataset801*")]:
        shutil.rmtree(folder)
    for mark in (work / "raw").glob(".rounds_of_dataset_*"):
        mark.unlink()


@pytest.fixture
def make(tmp_path):
    def rounds(executor, parts=1, folder="work", **changes):
        settings = {
            "rounds": 2,
            "rules": SelectionRules(fraction=0.5),
            "consensus": "majority",
            "annotate": 2,
            "members": executor.trainers,
            "dataset_ids": tuple(range(901, 901 + changes.get("rounds", 2))),
        }
        settings |= changes
        return Rounds(
            RoundsSettings(dataset="Dataset801_labels", configuration="2d", plans="nnUNetPlans_cpu", **settings),
            tmp_path / folder,
            executor,
            parts,
            processes=1,
        )

    return rounds


def outcome(rounds):
    """What may not depend on kills."""
    keys = ("dataset", "validation", "accepted", "annotate", "remaining", "mean_score", "drift", "predicted")
    return rounds.manifest.stopped, [{key: of.get(key) for key in keys} for of in rounds.manifest.rounds]


def content_of(folder):
    """{path: bytes} of the files that do not hold times or paths."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for kind in ("scores/consensus", "scores/cases", "selection")
        for file in sorted(folder.glob(f"round_*/{kind}/**/*"))
        if file.is_file()
    }


# ------------------------------------------------------------------------------------------------------------- stopping


def test_stops_when_validation_falls_and_stays_stopped(make, monkeypatch):
    executor = FakeExecutor(dice=lambda number: 0.7 if number == 1 else 0.8)
    rounds = make(executor)
    # Killed after the training, before it is written down that it stopped.
    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "_stop", lambda self, reason: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rounds.run()
    reason = make(executor).run()
    assert reason.startswith("The members' mean validation Dice fell from 0.8000 to 0.7000 in round 1")
    more = {"rounds": 3, "dataset_ids": (901, 902, 903)}
    assert make(executor, **more).run() == reason
    assert len(make(executor, **more).manifest.rounds) == 2
    assert make(executor, max_drop=0.2, **more).run() == "All 3 rounds are done"


def test_a_class_that_no_validation_case_has_does_not_count(make):
    """Class 3 of the fake summaries has Dice 0 and no reference voxels."""
    rounds = make(FakeExecutor(dice=lambda number: 0.75), rounds=1)
    rounds.run()
    assert set(rounds.manifest.rounds[1]["validation"].values()) == {0.75}


def test_stops_when_nothing_is_accepted(make):
    rounds = make(FakeExecutor(), rules=SelectionRules(max_components={"ball": 0}))
    assert rounds.run() == "No case is accepted in round 1"
    assert len(rounds.manifest.rounds) == 2 and "remaining" not in rounds.manifest.rounds[1]


def test_stops_when_every_case_is_used(make):
    executor = FakeExecutor(trainers=STOCK)
    assert make(executor, rules=SelectionRules()).run() == "Every case has a pseudo label after round 1"
    trained = list(executor.ran)
    assert make(executor, rules=SelectionRules(), rounds=3).run() == "Every case has a pseudo label after round 1"
    assert executor.ran == trained


def test_members_that_learn_from_unlabeled_cases_are_not_trained_without(make):
    executor = FakeExecutor()
    reason = make(executor, rules=SelectionRules()).run()
    assert "nothing is left for nnUNetTrainerMeanTeacher_seed=1" in reason and "nnUNetv2_train Dataset901" in reason
    assert sum(name.startswith("train_") for name in executor.ran) == 2


def test_stops_when_a_class_is_lost_unless_overruled(make):
    def without_core(number, member, case):
        labels = predict(number, member, case)
        return np.minimum(labels, 1)

    executor = FakeExecutor(predict=without_core)
    assert "The classes drift in round 1: no case has core" in make(executor).run()
    assert make(executor).run().startswith("The classes drift")
    assert make(executor, allow_drift=True).run() == "All 2 rounds are done"


def test_a_case_in_which_all_members_miss_a_class_teaches_nothing(make):
    """The classes do not drift: the other cases have it."""

    def missing_core(number, member, case):
        return np.minimum(predict(number, member, case), 1 if case == "unl_01" else 2)

    rounds = make(FakeExecutor(predict=missing_core, trainers=STOCK), rules=SelectionRules(presence=0.95), annotate=1)
    assert rounds.run() == "No case is accepted in round 2"
    one, two = rounds.manifest.rounds[1:]
    assert one["remaining"] == 1 and "unl_01" not in one["accepted"] and two["accepted"] == []
    assert one["annotate"] == ["unl_01"] and "--presence 0.95" in one["select_command"]
    table = (rounds.folder / "round_1" / "selection" / "selection.csv").read_text()
    assert "core is absent, but 3 of 3 labeled cases have it" in table


@pytest.mark.parametrize("number", [1, 2])
def test_stops_when_a_class_shrinks(make, number):
    """Of a single class the share of the foreground would always be 1."""

    def shrinking(at, member, case):
        labels = predict(at, member, case)
        labels[labels.shape[0] // 2 - 1 :] *= at < number
        return labels * (np.indices(labels.shape)[2] < labels.shape[2] // 2) if at >= number else labels

    reason = make(FakeExecutor(predict=shrinking)).run()
    what = "the labeled cases" if number == 1 else "round 1"
    assert f"drift in round {number}" in reason and f"in {what} it has" in reason


# ----------------------------------------------------------------------------------------------------------- continuing


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_killed_at_every_file_it_comes_to_the_same_result(make, tmp_path, monkeypatch):
    """Dies once before and once after every file appears under its final name, and continues each time."""
    make(FakeExecutor()).run()
    expected, expected_files = outcome(make(FakeExecutor())), content_of(tmp_path / "work")
    for folder in [tmp_path / "work", *Dataset("Dataset801_labels").raw.parent.parent.glob("*/Dataset9*")]:
        shutil.rmtree(folder)
    shutil.rmtree(write_training("Dataset801_labels", MEMBERS[0], 0.5).parent.parent)
    seen = Counter()
    replace = files.os.replace

    def dying(source, target):
        seen[str(target)] += 1
        if seen[str(target)] == 1:
            raise Killed
        replace(source, target)
        if seen[str(target)] == 2:
            raise Killed

    killed = 0
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dying)
        while True:
            try:
                make(FakeExecutor()).run()
                break
            except Killed:
                killed += 1
    assert killed > 40 and any("manifest.json" in name for name in seen)
    assert outcome(make(FakeExecutor())) == expected
    assert content_of(tmp_path / "work") == expected_files
    assert not [f for f in tmp_path.rglob(".unfinished*")]


def test_a_failed_job_is_told_and_continued(make):
    executor = FakeExecutor()
    executor.failing = "seed=2"
    with pytest.raises(RuntimeError, match="the tail of the log"):
        make(executor).run()
    executor.failing = "predict_nnUNetTrainerMeanTeacher_seed=1"
    with pytest.raises(RuntimeError, match="the tail of the log"):
        make(executor).run()
    executor.failing = None
    rounds = make(executor)
    assert rounds.run() == "All 2 rounds are done"
    # The first member's training, finished before the second failed, is not run again.
    assert Counter(executor.ran)[f"train_{MEMBERS[0]}_fold0"] == 3


def test_a_missing_prediction_is_named(make):
    class Forgetful(FakeExecutor):
        def _predict(self, command):
            super()._predict(command)
            (Path(command[command.index("-o") + 1]) / "unl_01.nii.gz").unlink()

    with pytest.raises(RuntimeError, match="left no unl_01 in .*seed=1_fold0.\nThe end of .*round_1/logs"):
        make(Forgetful()).run()


def test_files_that_a_kill_cut_off_are_made_again(make, tmp_path):
    executor = FakeExecutor()
    executor.failing = "seed=2"
    write_training("Dataset801_labels", MEMBERS[1], 0.6)
    with pytest.raises(RuntimeError):
        make(executor, consensus="mean").run()
    folder = tmp_path / "work" / "round_1" / "members" / f"{MEMBERS[0]}_fold0"
    for name in ("unl_00.nii.gz", "unl_01.npz"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    fold = write_training("Dataset901_labels_round1", MEMBERS[0], 0.6)
    (fold / "validation" / "summary.json").write_text('{"mean": {"1"')
    executor.failing = None
    assert make(executor, consensus="mean").run() == "All 2 rounds are done"


def test_files_that_a_job_which_was_tried_again_cut_off_are_made_again(make, tmp_path):
    """Slurm ends an attempt while it writes; the next one, in the same call, takes the file for finished."""

    class Cutting(FakeExecutor):
        def _predict(self, command):
            super()._predict(command)
            file = Path(command[command.index("-o") + 1]) / "unl_00.nii.gz"
            if len(self.ran) == 4:
                file.write_bytes(file.read_bytes()[:100])

    assert make(Cutting()).run() == "All 2 rounds are done"


def test_classes_that_drift_in_small_steps(make):
    """No round changes a volume by more than 2, but all of them together by more than 3."""

    def shrinking(number, member, case):
        labels = predict(number, member, case)
        ball = np.flatnonzero(labels == 1)
        labels.flat[ball[int(0.6 ** (number - 1) * len(ball)) :]] = 0
        return labels

    executor = FakeExecutor(predict=shrinking)
    reason = make(executor, rounds=4, rules=SelectionRules(top=1), dataset_ids=(901, 902, 903, 904)).run()
    assert "drift in round 4: ball has" in reason and "in round 1 it has" in reason


def test_parts_share_a_prediction(make):
    executor = FakeExecutor()
    assert make(executor, parts=2, rounds=1).run() == "All 1 rounds are done"
    assert sum("part1" in name for name in executor.ran) == 2


# --------------------------------------------------------------------------------------------------------- the datasets


def test_real_cases_can_be_drawn_more_often(make):
    make(FakeExecutor(), rounds=1, repeat_real=3).run()
    (split,) = json.loads((Dataset("Dataset901_labels_round1").preprocessed / "splits_final.json").read_text())
    counts = Counter(split["train"])
    assert all(counts[case] == 3 for case in REAL) and len(counts) == 6
    assert sorted(counts.values()) == [1, 1, 1, 3, 3, 3]


def test_a_third_of_what_is_drawn_is_labeled(make):
    make(FakeExecutor(), rounds=1, rules=SelectionRules(threshold=0.0)).run()
    (split,) = json.loads((Dataset("Dataset901_labels_round1").preprocessed / "splits_final.json").read_text())
    counts = Counter(split["train"])
    pseudo, real = len(counts) - len(REAL), counts[REAL[0]]
    assert pseudo > 0 and all(counts[case] == real for case in REAL)
    assert real * len(REAL) >= sum(counts.values()) / 3 > (real - 1) * len(REAL) or real == 1


def test_cases_are_labeled_anew_in_each_round(make):
    """Round 2 sees all cases, and its labels take the place of round 1's."""

    def growing(number, member, case):
        labels = predict(number, member, case)
        if number == 1:
            # Half of the core.
            labels[:, :, :12][labels[:, :, :12] == 2] = 1
        return labels

    executor = FakeExecutor(predict=growing)
    rounds = make(executor, rounds=2, relabel=True, rules=SelectionRules(top=2))
    assert rounds.run() == "All 2 rounds are done"
    first, second = (set(of["accepted"]) for of in rounds.manifest.rounds[1:])
    assert len(first) == len(second) == 2
    dataset, setup = Dataset("Dataset902_labels_round2"), rounds.setup
    description = json.loads((dataset.raw / "dataset.json").read_text())
    assert set(description["pseudo_labels"]) == second
    assert {of["round"] for of in description["pseudo_labels"].values()} == {2}
    for case in second:
        stored = dataset.preprocessed / "nnUNetPlans_cpu_2d" / f"{case}.pkl"
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset.raw / "labelsTr" / f"{case}.nii.gz")))
        assert (label[:, :, :12] == 2).any()
        assert len(load_pickle(str(stored))["class_locations"][2]) == (label == 2).sum()
        assert list(setup.work.round(2).images.glob(f"{case}_*"))


def test_voxels_without_agreement_are_ignored_by_a_training(make):
    from nnunetv2.run.run_training import get_trainer_from_args

    make(FakeExecutor(), rounds=1, min_agreement=1.0).run()
    dataset = Dataset("Dataset901_labels_round1")
    assert dataset.json["labels"]["ignore"] == 3
    folder = dataset.preprocessed / "nnUNetPlans_cpu_2d"
    keys = {frozenset(load_pickle(str(file))["class_locations"]) for file in folder.glob("*.pkl")}
    # nnU-Net crops around annotated voxels, and looks for them under this key.
    assert keys == {frozenset({1, 2, (-1, 0, 1, 2)})}
    name = from_start("nnUNetTrainerMeanTeacher") + SHORT
    trainer = get_trainer_from_args(dataset.name, "2d", 0, name, "nnUNetPlans_cpu", False, torch.device("cpu"))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(3):
        assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_finetuning_starts_from_all_weights_of_the_round_before(make):
    started = []

    class Looking(FakeExecutor):
        def _train(self, command):
            if "round1" in command[1]:
                folder = Path(str(nnUNet_results)) / command[1]
                started.extend(folder.glob(f"{command[command.index('-tr') + 1]}__*/fold_0/*.pth"))
                assert "--c" in command
                contents.append(checkpoints.read(started[-1]))
            super()._train(command)

    contents = []
    make(Looking(), rounds=1, finetune=True).run()
    assert [file.name for file in started] == ["checkpoint_latest.pth"] * 2
    content = contents[0]
    assert content["current_epoch"] == 0 and content["logging"] == {"lrs": []} and content["_best_ema"] is None
    assert content["network_weights"]["weight"].item() == 0.5


def test_a_restarted_checkpoint_starts_a_training(started, tmp_path):
    name = from_start("nnUNetTrainerBCP") + SHORT
    trainer = started(name)
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.current_epoch = 1
    assert trainer.schedule.phase_2_start is not None
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    before = checkpoints.read(tmp_path / "checkpoint_final.pth")
    checkpoints.write(checkpoints.restarted(before), tmp_path / "checkpoint_latest.pth")
    again = started(name)
    again.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert again.current_epoch == 0 and again.schedule.phase_2_start is None and again.schedule.knows_classes
    for own, other in ((again.network, trainer.network), (again.companions, trainer.companions)):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters()))
    again.on_train_epoch_start()
    assert np.isfinite(again.train_step(next(again.dataloader_train))["loss"])


# ------------------------------------------------------------------------------------------------------------ bad input


def test_models_that_are_there_are_used_and_said(make, capsys):
    folder = write_training("Dataset801_labels", MEMBERS[0], 0.4)
    rounds = make(FakeExecutor(), rounds=1)
    rounds.run()
    assert f"{MEMBERS[0]}_fold0 is trained already, and is used as it is: {folder}" in capsys.readouterr().out
    assert rounds.manifest.rounds[0]["reused"] == [f"{MEMBERS[0]}_fold0"]
    assert rounds.manifest.rounds[0]["validation"][f"{MEMBERS[0]}_fold0"] == pytest.approx(0.4)


def test_models_that_were_validated_on_other_cases_are_refused(make):
    folder = write_training("Dataset801_labels", MEMBERS[0], 0.4, cases=("lab_03",))
    with pytest.raises(ValueError, match=f"other validation cases than fold 0 has. Move {folder} away"):
        make(FakeExecutor()).run()


def test_models_that_were_trained_on_labels_which_are_hidden_now_are_refused(make):
    folder = write_training("Dataset801_labels", MEMBERS[0], 0.4)
    content = checkpoints.read(folder / "checkpoint_final.pth")
    content[checkpoints.STATE_KEY] = {"trained_on": [*REAL, "lab_03"]}
    checkpoints.write(content, folder / "checkpoint_final.pth")
    executor = FakeExecutor()
    with pytest.raises(ValueError, match="checkpoint_final.pth was trained on lab_03, whose label fold 0 .* now hides"):
        make(executor).run()
    assert executor.ran == []
    content[checkpoints.STATE_KEY] = {"trained_on": REAL}
    checkpoints.write(content, folder / "checkpoint_final.pth")
    make(executor, rounds=1).run()


def test_changed_cases_are_refused(make):
    executor = FakeExecutor()
    executor.failing = "predict"
    with pytest.raises(RuntimeError):
        make(executor).run()
    raw = Dataset("Dataset801_labels").raw
    write_image(make_case(109)[0], raw / "imagesUn" / "unl_09_0000.nii.gz")
    try:
        with pytest.raises(ValueError, match="the case unl_09 is new as unlabeled"):
            make(executor)
    finally:
        (raw / "imagesUn" / "unl_09_0000.nii.gz").unlink()
    splits = Dataset("Dataset801_labels").preprocessed / "splits_final.json"
    before = splits.read_text()
    try:
        splits.write_text(before.replace('"lab_04"', '"lab_99"'))
        with pytest.raises(CaseError, match="hides lab_99"):
            make(executor)
        splits.write_text(json.dumps([{"train": REAL[:2], "val": ["lab_05"], "unlabeled": ["lab_03", "lab_04"]}]))
        with pytest.raises(ValueError, match="splits_final.json has changed"):
            make(executor)
    finally:
        splits.write_text(before)


def test_dataset_ids_of_finished_rounds_stay(make):
    make(FakeExecutor(), rounds=1, dataset_ids=(901,)).run()
    with pytest.raises(ValueError, match="The first rounds have the dataset ids 901"):
        make(FakeExecutor(), rounds=2, dataset_ids=(902, 903))
    assert make(FakeExecutor(), rounds=2, dataset_ids=(901, 903)).run() == "All 2 rounds are done"


def test_all_changed_arguments_are_named(make):
    make(FakeExecutor(), rounds=1).run()
    expected = 'max_components {}, not {"ball": 2}; fraction 0.5, not 0.4; metric "dice", not "iou". Continue'
    with pytest.raises(ValueError, match=re.escape(expected)):
        make(FakeExecutor(), rounds=1, rules=SelectionRules(fraction=0.4, max_components={"ball": 2}), metric="iou")


def test_a_call_that_waited_for_another_goes_on_from_there(make):
    """Both read the manifest when nothing was done."""
    first, second = make(FakeExecutor()), make(FakeExecutor())
    first.run("first call")
    executor = second.executor
    assert second.run("second call") == first.manifest.stopped and not executor.ran
    assert second.manifest.calls == ["first call"]


def test_labels_and_names_that_rounds_cannot_use_are_refused(make, work, monkeypatch):
    file = work / "preprocessed" / "Dataset801_labels" / "dataset.json"
    before = file.read_text()
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 1}, "regions_class_order": [1, 2]}
    try:
        file.write_text(json.dumps({**json.loads(before), **regions}))
        with pytest.raises(ValueError, match=r"dataset\.json: regions_class_order .*must be \[2, 1\]"):
            make(FakeExecutor())
    finally:
        file.write_text(before)
    long = "nnUNetTrainerMeanTeacher_ramp_up=0." + "1" * 190
    with pytest.raises(ValueError, match="characters too long"):
        make(FakeExecutor(trainers=(long, "nnUNetTrainer")), parts=100)


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
def test_a_link_whose_target_is_gone_stops_rounds_at_once(make, work, folder):
    file = work / "raw" / "Dataset801_labels" / folder / "far_0000.nii.gz"
    file.symlink_to("/not/mounted")
    try:
        with pytest.raises(CaseError, match="far_0000.nii.gz cannot be read: it links to /not/mounted"):
            make(FakeExecutor())
    finally:
        file.unlink()


def test_too_few_labeled_cases_for_nnunets_folds_are_told(work, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    raw = tmp_path / "Dataset950_few"
    for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        for i in range(4):
            write_image(make_case(i)[0], raw / folder / f"lab_0{i}{ending}.nii.gz")
    channels = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    files.write_json(raw / "dataset.json", channels)
    with pytest.raises(ValueError, match="Dataset950_few has 4 labeled cases, too few for the 5 folds .*splits_final"):
        read_cases(Dataset("Dataset950_few"), [0])


def test_one_call_at_a_time(make):
    executor = FakeExecutor()
    other = make(executor)
    seen = []

    def run_other(command):
        with pytest.raises(ValueError, match="Another call works on"):
            other.run()
        seen.append(command)
        FakeExecutor._train(executor, command)

    executor._train = run_other
    make(executor, rounds=2).run()
    assert seen


def test_no_free_dataset_id(monkeypatch):
    monkeypatch.setattr("pseudo_label.rounds.dataset_ids.used_ids", lambda owner: set(range(1, 998)))
    assert free_ids(5, 2, Path("work")) == [998, 999]
    with pytest.raises(ValueError, match="not 3 free dataset ids from 5"):
        free_ids(5, 3, Path("work"))


def test_planned_datasets_have_different_ids(monkeypatch):
    """Round 1 has its id, but has not built its dataset yet."""
    monkeypatch.setattr("pseudo_label.rounds.dataset_ids.used_ids", lambda owner: {5})
    names = planned_names("Dataset003_a_b", ["Dataset004_a_b_round1"], 3, (), Path("work"))
    assert names == ["Dataset004_a_b_round1", "Dataset006_a_b_round2", "Dataset007_a_b_round3"]
    names = planned_names("Dataset003_a_b", ["Dataset009_a_b_round1"], 2, (9, 8), Path("work"))
    assert names == ["Dataset009_a_b_round1", "Dataset008_a_b_round2"]


def test_two_work_folders_never_share_a_dataset(make, tmp_path, monkeypatch):
    """The second begins when the first has chosen the id of a dataset that it has not built yet."""
    seen = []

    class Meanwhile(FakeExecutor):
        def _predict(self, command):
            if not seen:
                seen.append(True)
                other = make(FakeExecutor(), folder="other", rounds=1, dataset_ids=())
                assert other.run() == "All 1 rounds are done"
                with pytest.raises(ValueError, match="The dataset id 901 is taken"):
                    make(FakeExecutor(), folder="third", rounds=1, dataset_ids=(901,))
                names.append(other.manifest.rounds[1]["dataset"])
            super()._predict(command)

    names = []
    monkeypatch.setattr(
        "pseudo_label.rounds.dataset_ids.free_ids", lambda first, number, owner: free_ids(901, number, owner)
    )
    rounds = make(Meanwhile(), rounds=1, dataset_ids=())
    rounds.run()
    names.append(rounds.manifest.rounds[1]["dataset"])
    assert sorted(names) == ["Dataset901_labels_round1", "Dataset902_labels_round1"]
    assert not list(Dataset("Dataset801_labels").raw.parent.glob(".rounds_of*"))


def test_ids_of_a_work_folder_that_is_gone_are_free(work, tmp_path):
    mark = work / "raw" / ".rounds_of_dataset_950"
    mark.symlink_to(tmp_path / "gone")
    assert 950 not in used_ids(tmp_path / "work")
    (tmp_path / "gone").mkdir()
    assert 950 in used_ids(tmp_path / "work") and 950 not in used_ids(tmp_path / "gone")
    assert not reserve_id(950, tmp_path / "work") and reserve_id(950, tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert reserve_id(950, tmp_path / "work") and mark.readlink() == tmp_path / "work"
    release_id(950)
    assert not mark.is_symlink()
