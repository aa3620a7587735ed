"""Rounds through the command line, with real trainings on tiny data; kills, changed arguments, bad input."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_semiseg.datasets import Dataset
from pseudo_label import cli

TINY = "_3epochs_num_iterations_per_epoch=12_num_val_iterations_per_epoch=1_save_every=1"
MEMBERS = [f"nnUNetTrainerMeanTeacher_warm_up=0{TINY}_seed={seed}" for seed in (1, 2)]
COMMON = ["rounds", "-c", "2d", "-p", "nnUNetPlans_cpu", "--devices", "cpu", "cpu", "-np", "1", "--disable_tta"]
# Networks that are trained for seconds miss the core.
RULES = ["--fraction", "0.5", "--presence", "off", "--allow-drift", "--max-drop", "1"]
UNLABELED = {"lab_03", "lab_04", "unl_00", "unl_01", "unl_02", "unl_03"}


def arguments(out, *more, members=MEMBERS, dataset="801"):
    return [*COMMON, "-d", dataset, "-o", str(out), "--members", *members, *RULES, *more]


def command(out, *more):
    return [sys.executable, "-m", "pseudo_label.cli", *arguments(out, *more)]


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


# Where the real run is killed, and how many seconds into the step: jobs need some to start.
KILLED = {"Round 0: train": 12.0, "Round 1: predict": 6.0, "Round 1: train": 12.0}


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """The work folder of two rounds with real trainings, killed and continued several times, and what was printed."""
    prepared("labels")
    out = tmp_path_factory.mktemp("rounds") / "work"
    printed, to_kill = [], dict(KILLED)
    for _ in range(len(KILLED) + 1):
        with subprocess.Popen(
            command(out, "--dataset-ids", "851", "852"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process:
            for line in process.stdout:
                printed.append(line)
                if line.strip() in to_kill:
                    time.sleep(to_kill.pop(line.strip()))
                    process.kill()
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0 and not to_kill, "".join(printed)
    return out, "".join(printed)


@pytest.mark.slow
def test_two_rounds_grow_the_labeled_set(finished):
    out, printed = finished
    rounds = manifest(out)["rounds"]
    assert [of["dataset"] for of in rounds] == [
        "Dataset801_labels",
        "Dataset851_labels_round1",
        "Dataset852_labels_round2",
    ]
    assert "Stopped: All 2 rounds are done" in printed
    first, second = (set(of["accepted"]) for of in rounds[1:])
    assert len(first) == 3 and len(second) == 1 and not first & second
    assert [of["remaining"] for of in rounds[1:]] == [3, 2]
    for of in rounds:
        assert set(of["validation"]) == {f"{member}_fold0" for member in MEMBERS}
        assert all(0 <= dice <= 1 for dice in of["validation"].values())


@pytest.mark.slow
def test_the_next_dataset_is_an_nnunet_dataset(finished):
    out, _ = finished
    rounds = manifest(out)["rounds"]
    accepted = set()
    for of in rounds[1:]:
        accepted |= set(of["accepted"])
        dataset = Dataset(of["dataset"])
        real = {"lab_00", "lab_01", "lab_02", "lab_05"}
        assert set(dataset.images("imagesTr")) == real | accepted
        assert set(dataset.images("imagesUn")) == UNLABELED - accepted
        assert set(dataset.labeled_cases()) == real | accepted
        assert dataset.json["numTraining"] == len(real | accepted)
        assert set(dataset.json["pseudo_labels"]) == accepted
        (split,) = json.loads((dataset.preprocessed / "splits_final.json").read_text())
        assert split["val"] == ["lab_05"]
        assert set(split["train"]) == {"lab_00", "lab_01", "lab_02"} | accepted
        assert all(file.is_symlink() for file in (dataset.raw / "imagesTr").iterdir())
        fingerprints = [d.preprocessed / "dataset_fingerprint.json" for d in (dataset, Dataset("Dataset801_labels"))]
        assert fingerprints[0].read_bytes() == fingerprints[1].read_bytes()


@pytest.mark.slow
def test_hidden_labels_are_never_used(finished):
    """The labels of lab_03 and lab_04 are in the first dataset, but what later rounds learn is the consensus."""
    out, _ = finished
    rounds = manifest(out)["rounds"]
    for number, of in enumerate(rounds[1:], 1):
        dataset = Dataset(of["dataset"])
        for case in of["accepted"]:
            consensus = sitk.ReadImage(str(out / f"round_{number}" / "scores" / "consensus" / f"{case}.nii.gz"))
            label = sitk.ReadImage(str(dataset.raw / "labelsTr" / f"{case}.nii.gz"))
            assert np.array_equal(sitk.GetArrayFromImage(consensus), sitk.GetArrayFromImage(label))
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    last = Dataset(rounds[-1]["dataset"]).preprocessed
    for case in {case for of in rounds[1:] for case in of["accepted"]}:
        _, seg, _, _ = nnUNetDatasetBlosc2(str(last / "nnUNetPlans_cpu_2d"), [case]).load_case(case)
        label = sitk.ReadImage(str(Dataset(rounds[-1]["dataset"]).raw / "labelsTr" / f"{case}.nii.gz"))
        assert np.array_equal(np.maximum(seg[:][0], 0), sitk.GetArrayFromImage(label))
    store = last / "nnUNetPlans_cpu_2d_unlabeled"
    for file in store.glob("*_seg.b2nd"):
        _, seg, _, _ = nnUNetDatasetBlosc2(str(store), [file.name[: -len("_seg.b2nd")]]).load_case(file.name[:6])
        assert seg[:].max() <= 0


@pytest.mark.slow
def test_the_same_command_again_does_nothing(finished):
    out, _ = finished
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and not file.is_symlink()}
    assert cli.main(arguments(out, "--dataset-ids", "851", "852")) == 0
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and not file.is_symlink()}
    assert before == after


@pytest.mark.slow
def test_changed_arguments_are_refused(finished, capsys):
    out, _ = finished
    before = (out / "manifest.json").read_text()
    assert cli.main(arguments(out, "--dataset-ids", "851", "852", "--finetune")) == 1
    assert "belongs to a call with finetune false, not true" in capsys.readouterr().err
    assert (out / "manifest.json").read_text() == before


def test_print_only_writes_nothing(prepared, tmp_path, capsys):
    prepared("labels")
    out = tmp_path / "work"
    assert cli.main(arguments(out, "--print-only", "--dataset-ids", "871", "872", "--threshold", "0.8")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (f"nnUNetv2_train Dataset801_labels 2d 0 -tr {MEMBERS[0]} -p nnUNetPlans_cpu --c -device cpu")
    scoring = f"pseudo_label score -d Dataset801_labels --labeled {out / 'labeled'} --metric dice -o"
    assert any(line.startswith(scoring) for line in lines)
    assert any("--threshold 0.8 --fraction 0.5" in line for line in lines)
    assert sum("Dataset872_labels_round2" in line for line in lines) == 3
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        ([], "--threshold 0.9 --presence 0.95"),
        (["--presence", "off"], "--threshold 0.9 --presence off"),
        (["--presence", "0.5", "--may-be-absent", "core"], "--threshold 0.9 --presence 0.5 --may-be-absent core"),
        (["--top", "3"], "--top 3 --presence 0.95"),
    ],
)
def test_rules_where_few_or_none_are_given(prepared, tmp_path, capsys, flags, rules):
    prepared("labels")
    given = [*COMMON, "-d", "801", "-o", str(tmp_path / "work"), "--members", *MEMBERS, *flags, "--print-only"]
    assert cli.main(given) == 0
    selections = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pseudo_label select")]
    assert len(selections) == 2 and all(f"selection {rules} --annotate" in line for line in selections)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"members": MEMBERS[:1]}, "One member agrees with itself"),
        ({"members": [MEMBERS[0]] * 2}, "is given twice"),
        ({"members": ["nnUNetTrainerNope", MEMBERS[0]]}, "no trainer nnUNetTrainerNope"),
        ({"members": ["nnUNetTrainerMeanTeacher_oops=1", MEMBERS[0]]}, "oops"),
        ({"members": [f"{MEMBERS[0]}:7", MEMBERS[1]]}, "there is no fold 7"),
        ({"members": [f"{MEMBERS[0]}:all", MEMBERS[1]]}, "no validation cases"),
        ({"flags": ["--dataset-ids", "801", "851"]}, "The dataset id 801 is taken"),
        ({"flags": ["--dataset-ids", "851"]}, "1 dataset ids for 2 rounds"),
        ({"flags": ["--dataset-ids", "881", "881"]}, "are not different numbers from 1 to 999"),
        ({"flags": ["--dataset-ids", "0", "1000"]}, "are not different numbers from 1 to 999"),
        ({"flags": ["--threshold", "2"]}, "2 is not between 0 and 1"),
        ({"flags": ["--class-threshold", "spleen=0.5"]}, "There is no class spleen. Classes: ball, core"),
        ({"flags": ["--rounds", "0"]}, "rounds is 0"),
        ({"flags": ["--devices", "gpu"]}, "no device 'gpu'"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_written(prepared, tmp_path, capsys, more, message):
    prepared("labels")
    out = tmp_path / "work"
    given = arguments(out, *more.get("flags", []), members=more.get("members", MEMBERS))
    assert cli.main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and error.count("\n") == 1
    assert not out.exists()
