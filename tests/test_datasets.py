"""dataset.json, plans, names and folders of a dataset: what is wrong there is said in one line."""

import json
import re
import shutil

import pytest

from nnunet_semiseg import cli
from nnunet_semiseg.datasets import Dataset, dataset_name, read_dataset_json
from nnunet_semiseg.segmentations import Classes

LABELS = {"background": 0, "ball": 1}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


V1 = {"name": "Heart", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "heart"}, "training": []}


@pytest.mark.parametrize(
    "content, message",
    [
        (json.dumps(V1), "of nnU-Net v1: .* nnUNetv2_convert_old_nnUNet_dataset"),
        (json.dumps({"channel_names": {"0": "CT"}, "labels": LABELS}), "has no key 'file_ending'"),
        (json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}), "has no key 'channel_names'"),
        (json.dumps({"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}), "has no key 'labels'"),
        (json.dumps({"channel_names": ["CT"], "labels": LABELS, "file_ending": ".png"}), "'channel_names' is"),
        (json.dumps({"channel_names": {"0": "CT"}, "labels": [1], "file_ending": ".png"}), "'labels' is"),
        ("[]", "has no keys"),
        ('{"labels": {"backgr', "is cut off"),
    ],
)
def test_dataset_json_is_checked_by_every_command(folders, capsys, content, message):
    raw = folders / "raw" / "Dataset650_A"
    raw.mkdir()
    (raw / "dataset.json").write_text(content)
    for arguments in (
        ("split", "-d", "650", "--labeled", "1"),
        ("evaluate", "-d", "650", "-g", str(raw), "-p", str(raw)),
    ):
        error = error_of(capsys, *arguments)
        assert str(raw / "dataset.json") in error
        assert re.search(message, error), error
    assert cli.main(["doctor", "-d", "650"]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_labels_are_all_that_predictions_need(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {**LABELS, "core": "2"}}))
    assert Classes.from_file(tmp_path / "dataset.json").values == ((1,), (2,))
    (tmp_path / "dataset.json").write_text(json.dumps(V1))
    with pytest.raises(ValueError, match="nnU-Net v1"):
        Classes.from_file(tmp_path / "dataset.json")


@pytest.mark.parametrize(
    "regions, order, message",
    [
        ({"whole": [1, 2], "core": 1}, [1, 2], r"label 1 becomes 2, label 2 becomes 1.*must be \[2, 1\]"),
        (
            {"whole": [1, 2, 3], "core": [1, 3], "enhancing": 3},
            [1, 2, 3],
            r"label 1 becomes 2, label 2 becomes 1.*must be \[2, 1, 3\]",
        ),
        ({"core": 2, "whole": [1, 2]}, [2, 1], "whole is the last region of labels 1, 2. List each region after"),
        ({"whole": [1, 2, 3], "core": 3}, [1, 3], "whole is the last region of labels 1, 2"),
        ({"whole": [1, 2], "core": 2}, [1, 7], "has 7, which no region contains"),
        ({"whole": [1, 2], "core": 2}, [1, 2], None),
        ({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3], None),
        ({"whole": [1, 2, 3], "core": [1, 3], "enhancing": 3}, [2, 1, 3], None),
        ({"whole": [1, 2], "core": 2, "ignore": 3}, [1, 2], None),
        ({"ball": 1, "core": 2}, None, None),
    ],
)
def test_order_of_regions_gives_the_labels_back(regions, order, message):
    classes = Classes.from_dataset_json({"labels": {"background": 0, **regions}, "regions_class_order": order})
    if message is None:
        classes.check_order("dataset.json")
    else:
        with pytest.raises(ValueError, match=f"^dataset.json: regions_class_order.*{message}"):
            classes.check_order("dataset.json")


def test_two_datasets_with_one_id_are_named(folders, capsys):
    for name in ("Dataset650_A", "Dataset650_B"):
        (folders / "raw" / name).mkdir()
    assert "There are 2 datasets 650: Dataset650_A, Dataset650_B" in error_of(capsys, "preprocess", "-d", "650")
    assert dataset_name("Dataset650_B") == "Dataset650_B"
    assert "There is no dataset 651" in error_of(capsys, "preprocess", "-d", "651")
    shutil.rmtree(folders / "raw" / "Dataset650_A")
    assert dataset_name("650") == "Dataset650_B"


@pytest.mark.parametrize("value, message", [('"/data/raw"', '"/data/raw", including quotation marks'), ("", "not set")])
def test_variables_are_checked(folders, monkeypatch, capsys, value, message):
    monkeypatch.setenv("nnUNet_raw", value)
    assert f"The variable nnUNet_raw is {message}" in error_of(capsys, "split", "-d", "650", "--labeled", "1")


def test_plans_are_checked(folders):
    folder = folders / "preprocessed" / "Dataset650_A"
    folder.mkdir()
    (folder / "tiny.json").write_text('{"configurations": {}}')
    (folder / "nnUNetPlans.json").write_text('{"configu')
    (folder / "dataset.json").write_text("{}")
    (folder / "._tiny.json").write_bytes(b"\xff")
    dataset = Dataset("Dataset650_A")
    assert dataset.plans_names() == ["nnUNetPlans", "tiny"]
    with pytest.raises(ValueError, match="nnUNetPlans.json is cut off.*nnUNetv2_plan_experiment -d 650"):
        dataset.plans("nnUNetPlans")
    with pytest.raises(ValueError, match="tiny.json has no key 'image_reader_writer'"):
        dataset.plans("tiny")


def test_hidden_files_are_no_cases(folders):
    raw = folders / "raw" / "Dataset650_A"
    for name in ("imagesTr/a_0000.png", "imagesTr/._a_0000.png", "labelsTr/a.png", "labelsTr/._a.png"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text("")
    (raw / "imagesTr" / "b_0000.png").symlink_to("/not/mounted")
    (raw / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".png"})
    )
    dataset = Dataset("Dataset650_A")
    assert dataset.labeled_cases() == ["a"]
    images, labels = raw / "imagesTr", raw / "labelsTr"
    assert dataset.labeled_files == {
        "a": ([images / "a_0000.png"], labels / "a.png"),
        "b": ([images / "b_0000.png"], labels / "b.png"),
    }


def test_entry_of_a_listed_case_is_checked(folders):
    raw = folders / "raw" / "Dataset650_A"
    raw.mkdir()
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".png", "dataset": {"a": {"images": []}}}
    (raw / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dataset.json: 'dataset' has no images and label of case a"):
        _ = Dataset("Dataset650_A").labeled_files
    with pytest.raises(FileNotFoundError, match="Every nnU-Net dataset needs one"):
        read_dataset_json(folders / "dataset.json")
