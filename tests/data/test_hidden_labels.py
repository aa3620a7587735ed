"""Every path that reaches labels asks what is hidden, whatever a user types.

* A trainer of any kind, also one with weight 0, on a missing fold or ``all``, with ``--val``, ``--c`` or
  ``-pretrained_weights``: the trainer's constructor.
* Its labeled batches, classes and validation cases: ``do_split``.
* Its unlabeled batches: ``UnlabeledDataset`` (test_frame.py, with sentinels in the hidden labels).
* Weights that learned from labels which are hidden now, after another ``split``: ``load_checkpoint`` (``--c``,
  ``--val``), and the models that rounds find (test_rounds_steps.py).
* ``pseudo_label rounds``, members, volumes and the next dataset: ``read_cases`` (test_rounds.py).
* ``pseudo_label score -d``, volumes of the labeled cases, by default and with ``--labeled`` on a folder of the dataset:
  ``all_hidden_cases``.
* ``nnunet_semiseg doctor`` reports each fold and reads no labels.
* Fingerprint and plans, and trainers that are not of this package, cannot be guarded: docs/data.md says so.
"""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SHORT, make_case, write_image

from nnunet_semiseg import cli
from nnunet_semiseg.trainers.registry import TRAINERS
from pseudo_label import cli as pseudo_label_cli

MISSING = "splits_final.json has 1 fold, there is no fold 1: nnU-Net would train it on a random part of all labels"
ALL = "splits_final.json hides labels in 1 of 1 fold, and fold all would train on them. Train fold 0"


def results_of(work, name):
    return work / "results" / "Dataset801_labels" / f"{name}__nnUNetPlans_cpu__2d"


@pytest.mark.parametrize("fold, complaint", [(1, MISSING), ("all", ALL)])
@pytest.mark.parametrize("name", [*TRAINERS, "nnUNetTrainerMeanTeacher_consistency_weight=0"])
def test_no_trainer_starts_on_a_fold_that_shows_hidden_labels(make_trainer, work, name, fold, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_trainer(f"{name}_seed=99", fold=fold)
    assert not results_of(work, f"{name}_seed=99").exists(), "nothing is made for a training that cannot be"


@pytest.mark.parametrize("how", [dict(only_run_validation=True), dict(continue_training=True), dict(pretrained=True)])
@pytest.mark.parametrize("fold, complaint", [("1", MISSING), ("all", ALL)])
def test_other_ways_into_a_training_are_no_way_around(prepared, work, tmp_path, how, fold, complaint):
    from nnunetv2.run.run_training import run_training

    prepared("labels")
    if how.pop("pretrained", False):
        torch.save({"network_weights": {}}, tmp_path / "weights.pth")
        how = dict(pretrained_weights=str(tmp_path / "weights.pth"))
    name = f"nnUNetTrainerMeanTeacher_consistency_weight=0{SHORT}"
    with pytest.raises(ValueError, match=complaint):
        run_training(
            *("801", "2d", fold, name, "nnUNetPlans_cpu"),
            device=torch.device("cpu"),
            export_validation_probabilities=False,
            **how,
        )


def test_a_split_that_changes_after_the_start_is_checked_again(make_trainer, splits):
    trainer = make_trainer(f"nnUNetTrainerMeanTeacher_consistency_weight=0{SHORT}")
    splits([{"train": ["lab_00"], "val": ["lab_01"], "unlabeled": ["lab_00"]}])
    with pytest.raises(ValueError, match="lab_00 is in 'unlabeled' and in 'train'"):
        trainer.on_train_start()


@pytest.mark.parametrize(
    "split, complaint",
    [
        (
            {"train": ["lab_01", "lab_02"], "val": ["lab_05"], "unlabeled": ["lab_00"]},
            "lab_00, whose label fold 0 .* now hides",
        ),
        ({"train": ["lab_01", "lab_02"], "val": ["lab_00"]}, "lab_00, on which fold 0 .* now validates"),
        ({"train": ["lab_01", "lab_02"], "val": ["lab_05"]}, None),
        # nnU-Net permits it.
        ({"train": ["lab_00", "lab_01", "lab_02"], "val": ["lab_00"]}, None),
    ],
)
def test_weights_that_know_a_label_which_is_hidden_now_are_not_loaded(
    started, make_trainer, splits, tmp_path, split, complaint
):
    name, file = f"nnUNetTrainerMeanTeacher_consistency_weight=0{SHORT}", str(tmp_path / "checkpoint_latest.pth")
    started(name).save_checkpoint(file)
    splits([split])
    again = make_trainer(name)
    if complaint is None:
        again.load_checkpoint(file)
        again.on_train_start()
        again.save_checkpoint(file)
        # What it has seen before counts as well.
        splits([{"train": ["lab_01"], "val": ["lab_05"], "unlabeled": ["lab_00"]}])
        again, complaint = make_trainer(name), "lab_00, whose label fold 0 .* now hides"
    with pytest.raises(ValueError, match=f"checkpoint_latest.pth was trained on {complaint}.*without --c"):
        again.load_checkpoint(file)


def test_rounds_refuse_a_missing_fold(prepared, tmp_path, capsys):
    prepared("labels")
    command = ["rounds", "-d", "801", "-c", "2d", "-p", "nnUNetPlans_cpu", "-o", str(tmp_path / "out")]
    members = ["nnUNetTrainerMeanTeacher", "nnUNetTrainerMeanTeacher:3"]
    assert pseudo_label_cli.main([*command, "--threshold", "0.9", "--members", *members]) == 1
    assert "splits_final.json has 1 fold, there is no fold 3" in capsys.readouterr().err


@pytest.fixture
def score(prepared, tmp_path):
    """``score(*flags)``: the exit code of ``pseudo_label score -d 801``; its output is ``tmp_path / "scores"``."""
    prepared("labels")
    for member in "ab":
        labels = make_case(50)[1]
        labels[0, 0, 0] = ord(member) % 2
        write_image(labels, tmp_path / member / "case.nii.gz")

    def run(*flags):
        command = ["score", "-i", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "scores"), "-d", "801"]
        return pseudo_label_cli.main([*command, "-np", "1", *map(str, flags)])

    return run


@pytest.mark.parametrize(
    "folder", [None, "raw/Dataset801_labels/labelsTr", "preprocessed/Dataset801_labels/gt_segmentations"]
)
def test_score_compares_with_the_volumes_of_visible_labels_only(score, work, tmp_path, folder):
    """The label maps of lab_03 and lab_04 are hidden; here they cannot even be read."""
    labels = work / (folder or "raw/Dataset801_labels/labelsTr")
    hidden = {file: file.read_bytes() for file in (labels / "lab_03.nii.gz", labels / "lab_04.nii.gz")}
    out = tmp_path / "scores"
    try:
        for file in hidden:
            file.write_bytes(b"")
        assert score(*(["--labeled", labels] if folder else [])) == 0
    finally:
        for file, content in hidden.items():
            file.write_bytes(content)
    visible = [labels / f"lab_{i:02d}.nii.gz" for i in (0, 1, 2, 5)]
    volumes = [(sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == 1).sum() for file in visible]
    agreed = (sitk.GetArrayFromImage(sitk.ReadImage(str(out / "consensus" / "case.nii.gz"))) == 1).sum()
    row = (out / "scores.csv").read_text().splitlines()[1].split(",")
    assert row[1] == "ball"
    assert float(row[8]) == pytest.approx((agreed - np.mean(volumes)) / np.std(volumes, ddof=1), abs=1e-4)


def test_score_where_all_labels_are_hidden_by_some_fold(score, splits, tmp_path, capsys):
    """As ``split`` makes five folds: nothing would be compared, and no class would have to be present."""
    splits(
        [
            {"train": ["lab_00", "lab_01"], "val": ["lab_05"], "unlabeled": ["lab_02", "lab_03", "lab_04"]},
            {"train": ["lab_01", "lab_02"], "val": ["lab_04"], "unlabeled": ["lab_00", "lab_03", "lab_05"]},
        ]
    )
    assert score() == 1
    error = capsys.readouterr().err
    assert "splits_final.json hide 5 of 6 labeled cases" in error and "--fold" in error and error.count("\n") == 1
    assert not (tmp_path / "scores").exists()
    assert score("--fold", 0) == 0
    volumes = json.loads((tmp_path / "scores" / "labeled_volumes.json").read_text())
    assert list(volumes) == ["lab_00", "lab_01", "lab_05"]
    assert score("--fold", 0, 2, "--overwrite") == 1
    assert "splits_final.json has 2 folds, there is no fold 2" in capsys.readouterr().err


def test_a_fold_says_nothing_without_a_dataset(tmp_path, capsys):
    for member in "ab":
        write_image(make_case(ord(member))[1], tmp_path / member / "case.nii.gz")
    command = ["score", "-i", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "scores"), "--fold", "0"]
    assert pseudo_label_cli.main(command) == 1
    assert "--fold needs -d" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, cure", [("{}", "Write the splits again"), ('[{"training": [], "validation": []}]', "Rename the")]
)
def test_doctor_reports_splits_that_cannot_be_read(splits, capsys, content, cure):
    splits(content)
    assert cli.main(["doctor", "-d", "801"]) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM" in printed and "splits_final.json" in printed and cure in printed
