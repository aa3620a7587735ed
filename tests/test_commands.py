"""The commands: trainers, doctor, export, and reading checkpoints safely."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import REPOSITORY, SHORT, make_case, write_image

from nnunet_semiseg import checkpoints, cli
from nnunet_semiseg.commands.trainers import step_cost
from nnunet_semiseg.trainers.options import described
from nnunet_semiseg.trainers.registry import TRAINERS


def test_docs_of_the_trainers_are_current(capsys):
    assert cli.main(["trainers", "--markdown"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "docs" / "trainers.md").read_text(), (
        "run: nnunet_semiseg trainers --markdown > docs/trainers.md"
    )


def test_the_readme_has_a_line_for_each_trainer(capsys):
    assert cli.main(["trainers", "--overview"]) == 0
    assert capsys.readouterr().out in (REPOSITORY / "README.md").read_text(), "run: nnunet_semiseg trainers --overview"


@pytest.mark.parametrize(
    "method, expected",
    [
        ("EntropyMinimization", 2),
        ("MeanTeacher", 2.33),
        ("UAMT", 4.67),
        ("CPS", 4.67),
        ("DTML", 4),
        ("DualStream", 6.5),
    ],
)
def test_cost_of_a_step_is_near_the_measured_one(method, expected):
    assert step_cost(TRAINERS[f"nnUNetTrainer{method}"]) == pytest.approx(expected, abs=0.01)
    table = (REPOSITORY / "docs" / "results.md").read_text().split("## Cost of a step")[1].split("\n## ")[0]
    row = next(line for line in table.splitlines() if line.startswith(f"| {method}") and line.count("|") == 6)
    assert step_cost(TRAINERS[f"nnUNetTrainer{method}"]) == pytest.approx(float(row.split("|")[3]), rel=0.06)


def test_table_of_trainers_has_every_option(capsys):
    assert cli.main(["trainers", "--all"]) == 0
    printed = capsys.readouterr().out
    for name, trainer in TRAINERS.items():
        assert name in printed and trainer.use_when in printed
        for row in described(trainer.Options):
            assert row["name"] in printed and row["meaning"] in printed
    assert cli.main(["trainers", "nnUNetTrainerNone"]) == 1


def test_the_short_table_leaves_ablations_out_and_says_so(capsys):
    assert cli.main(["trainers", "nnUNetTrainerCoraNet"]) == 0
    short = capsys.readouterr().out
    options = described(TRAINERS["nnUNetTrainerCoraNet"].Options)
    assert {row["ablation"] for row in options} == {True, False}
    for row in options:
        assert (f"  {row['name']} " in short) == (not row["ablation"]), row["name"]
    assert "--all lists" in short and len(short.splitlines()) < 45


def test_cli_errors_are_one_line(capsys, work):
    assert cli.main(["preprocess", "-d", "777"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: There is no dataset 777") and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def trained(prepared, work):
    """``trained(trainer, kind, configuration)``: model folder of a run through nnU-Net's own run_training."""
    from nnunetv2.run.run_training import run_training

    done = {}

    def train(trainer, kind, configuration):
        key = trainer, kind, configuration
        if key not in done:
            dataset = prepared(kind)
            # nnU-Net takes the device's threads from its entry point, not from here.
            run_training(dataset, configuration, 0, trainer, "nnUNetPlans_cpu", device=torch.device("cpu"))
            done[key] = work / "results" / dataset / f"{trainer}__nnUNetPlans_cpu__{configuration}"
        return done[key]

    return train


def predict(model, images, output, code="", **environment):
    """Stock nnUNetv2_predict_from_modelfolder in a fresh process and another folder."""
    script = (
        f"{code}\nfrom nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main\nmain()"
    )
    arguments = ["-i", images, "-o", output, "-m", model, "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=output.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


# Makes the project impossible to import, as on a machine that does not have it.
HIDDEN = """
import os, sys
os.environ.pop("nnUNet_extTrainer", None)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunet_semiseg":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
for name in [m for m in sys.modules if m.startswith("nnunet_semiseg")]:
    del sys.modules[name]
"""


@pytest.mark.slow
# In processes of its own, so not for every trainer; test_methods.py exports all of them.
@pytest.mark.parametrize("name", ["nnUNetTrainerMeanTeacher", "nnUNetTrainerCoraNet"])
@pytest.mark.parametrize("kind, configuration", [("labels", "2d"), ("regions", "3d_fullres")])
def test_export_predicts_the_same_voxels_without_this_project(trained, tmp_path, name, kind, configuration):
    model = trained(name + SHORT, kind, configuration)
    images = tmp_path / "images"
    write_image(make_case(200)[0], images / "new_0000.nii.gz")
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    result = predict(model, images, ours)
    assert result.returncode == 0, result.stderr

    exported = tmp_path / "exported"
    assert cli.main(["export", "-i", str(model), "-o", str(exported)]) == 0
    checkpoint = checkpoints.read(exported / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert set(checkpoint) == {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}
    result = predict(exported, images, plain, HIDDEN)
    assert result.returncode == 0, result.stderr
    segmentations = [sitk.GetArrayFromImage(sitk.ReadImage(str(f / "new.nii.gz"))) for f in (ours, plain)]
    assert np.array_equal(*segmentations)
    # Hiding does hide: the trainer's own folder cannot be used there.
    assert "Could not find requested nnunet trainer" in predict(model, images, tmp_path / "x", HIDDEN).stderr


@pytest.mark.slow
def test_export_as_zip_is_what_nnunet_installs(trained, tmp_path):
    """Under the model's own name, by which nnUNetv2_predict finds it without this project."""
    model = trained("nnUNetTrainerMeanTeacher" + SHORT, "labels", "2d")
    assert cli.main(["export", "-i", str(model), "-o", str(tmp_path / "model"), "--zip"]) == 0
    script = "from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point as main; main()"
    results = tmp_path / "results"
    results.mkdir()
    environment = {**os.environ, "nnUNet_results": str(results)}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.zip")], env=environment, check=True, capture_output=True
    )
    installed = results / model.parent.name / model.name
    assert (installed / "fold_0" / "checkpoint_final.pth").is_file() and (installed / "plans.json").is_file()

    write_image(make_case(200)[0], tmp_path / "images" / "new_0000.nii.gz")
    script = f"{HIDDEN}\nfrom nnunetv2.inference.predict_from_raw_data import predict_entry_point as main\nmain()"
    trainer, plans, configuration = model.name.split("__")
    arguments = f"-d {model.parent.name} -tr {trainer} -p {plans} -c {configuration} -f 0 -device cpu -npp 1 -nps 1"
    subprocess.run(
        [sys.executable, "-c", script, *arguments.split(), "-i", tmp_path / "images", "-o", tmp_path / "predicted"],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "predicted" / "new.nii.gz").is_file()
    assert len(zipfile.ZipFile(tmp_path / "model.zip").namelist()) == 4


def test_export_of_wrong_input(trained, tmp_path, capsys):
    model = trained("nnUNetTrainerMeanTeacher" + SHORT, "labels", "2d")
    for arguments, message in (
        (["-i", str(tmp_path), "-o", str(tmp_path / "o")], "has no plans.json"),
        (["-i", str(model), "-o", str(tmp_path)], "exists"),
        (["-i", str(model), "-o", str(tmp_path / "o"), "-chk", "checkpoint_worst.pth"], "No fold of"),
    ):
        assert cli.main(["export", *arguments]) == 1
        assert message in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = broken / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:-5000])
    assert cli.main(["export", "-i", str(broken), "-o", str(tmp_path / "o")]) == 1
    assert "checkpoint_final.pth is damaged" in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob("*.tmp"))


class Bomb:
    def __reduce__(self):
        return (exec, ("open('exploded', 'w').close()",))


def test_crafted_checkpoint_runs_no_code(trained, tmp_path, monkeypatch, capsys, make_trainer):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(trained("nnUNetTrainerMeanTeacher" + SHORT, "labels", "2d"), model)
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = checkpoints.read(file)
    torch.save({**checkpoint, "extra": Bomb()}, file)
    assert cli.main(["export", "-i", str(model), "-o", str(tmp_path / "o")]) == 1
    assert "could run foreign code" in capsys.readouterr().err
    trainer = make_trainer("nnUNetTrainerMeanTeacher" + SHORT)
    with pytest.raises(checkpoints.CheckpointError, match="foreign code"):
        trainer.load_checkpoint(str(file))
    assert not Path("exploded").exists()
    # The test's bomb does work where pickle is trusted.
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()


# ------------------------------------------------------------------------------------------------------------ doctor


def test_doctor_finds_everything_in_order(prepared, capsys):
    prepared("labels")
    assert cli.main(["doctor", "-d", "801", "--trainers"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "nnunetv2 2.8",
        "torchvision",
        "nnUNet_results = ",
        "nnUNetTrainerCoraNet: ",
        "6 labeled cases",
        "4 unlabeled cases, 1 channel(s)",
        "nnUNetPlans_cpu 2d: 4 unlabeled cases preprocessed",
        "fold 0: 2 cases with hidden labels",
        "No problems.",
    ):
        assert expected in printed, printed


def test_doctor_prints_the_dataset_first_and_trainers_in_one_line(prepared, capsys):
    prepared("labels")
    capsys.readouterr()
    assert cli.main(["doctor", "-d", "801"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Dataset Dataset801_labels\n")
    trainers = printed[printed.index("\nTrainers\n") :].splitlines()[2:]
    assert len(trainers) == 2 and f"nnU-Net finds {len(TRAINERS)} of {len(TRAINERS)}" in trainers[0]


@pytest.fixture
def own(prepared, work, tmp_path, monkeypatch):
    """Raw and preprocessed folders of a planned dataset that a test may change."""
    name = prepared("labels")
    for kind in ("raw", "preprocessed"):
        shutil.copytree(work / kind / name, tmp_path / kind / name)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    return tmp_path / "raw" / name, tmp_path / "preprocessed" / name


def doctor(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(["doctor", "-d", "801", *arguments])
    return code, capsys.readouterr().out


def leak(raw, labeled="lab_01"):
    """A labeled scan among the unlabeled ones, under another name."""
    shutil.copy(raw / "imagesTr" / f"{labeled}_0000.nii.gz", raw / "imagesUn" / "scan_0000.nii.gz")


def files_elsewhere(raw, preprocessed):
    """dataset.json says where the labeled cases are."""
    (raw / "imagesTr").rename(raw / "scans")
    (raw / "labelsTr").rename(raw / "masks")
    content = json.loads((raw / "dataset.json").read_text())
    content["dataset"] = {
        f"lab_{i:02d}": {"images": [f"scans/lab_{i:02d}_0000.nii.gz"], "label": f"masks/lab_{i:02d}.nii.gz"}
        for i in range(6)
    }
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(content))


def test_doctor_finds_a_leak_where_dataset_json_lists_the_files(own, capsys):
    raw, preprocessed = own
    leak(raw)
    files_elsewhere(raw, preprocessed)
    code, printed = doctor(capsys)
    assert code == 1 and "imagesUn/scan has the same voxels as imagesTr/lab_01" in printed
    (raw / "scans" / "lab_03_0000.nii.gz").unlink()
    code, printed = doctor(capsys)
    assert "lab_03_0000.nii.gz is missing" in printed and "imagesUn/scan has the same voxels" in printed
    assert "Not checked: the images of 1 case(s)." in printed


def test_preprocess_compares_orientation_where_dataset_json_lists_the_files(own, capfd):
    raw, preprocessed = own
    files_elsewhere(raw, preprocessed)
    image = sitk.GetImageFromArray(make_case(5)[0])
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(raw / "imagesUn" / "odd_0000.nii.gz"))
    command = ["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "2d", "-np", "1"]
    assert cli.main(command) == 0
    assert "odd: orientation RAS, the labeled cases are LPS" in capfd.readouterr().err
    shutil.rmtree(raw / "scans")
    (raw / "imagesUn" / "odd_0000.nii.gz").rename(raw / "imagesUn" / "even_0000.nii.gz")
    assert cli.main(command) == 0
    error = capfd.readouterr().err
    assert "orientations are not compared with the labeled cases'" in error and "lab_00_0000.nii.gz is missing" in error


def test_doctor_finds_a_leak_beside_an_extra_channel(own, capsys):
    raw, _ = own
    leak(raw)
    shutil.copy(raw / "imagesTr" / "lab_01_0000.nii.gz", raw / "imagesTr" / "lab_01_0001.nii.gz")
    code, printed = doctor(capsys)
    assert code == 1
    assert "lab_01 in" in printed and "has the channels lab_01_0000.nii.gz, lab_01_0001.nii.gz" in printed
    assert "imagesUn/scan has the same voxels as imagesTr/lab_01" in printed
    assert "2 problem(s)." in printed


def test_doctor_says_what_it_could_not_check(own, capsys):
    raw, preprocessed = own
    shutil.rmtree(raw / "imagesTr")
    code, printed = doctor(capsys)
    assert code == 1 and "imagesTr is missing" in printed
    assert "1 problem(s). Not checked: labeled scans among the unlabeled ones, spacing, orientation" in printed
    (preprocessed / "dataset_fingerprint.json").write_text('{"spac')
    code, printed = doctor(capsys)
    assert "dataset_fingerprint.json is cut off" in printed and "; spacing." in printed
    (preprocessed / "nnUNetPlans_cpu.json").unlink()
    code, printed = doctor(capsys)
    assert "the dataset is not planned" in printed and "nnUNetv2_plan_and_preprocess -d 801" in printed


def test_doctor_names_hidden_files_and_links_whose_target_is_gone(own, capsys):
    raw, _ = own
    (raw / "imagesTr" / "._lab_00_0000.nii.gz").write_bytes(b"macOS")
    (raw / "labelsTr" / "._lab_00.nii.gz").write_bytes(b"macOS")
    (raw / "imagesUn" / "._unl_00_0000.nii.gz").write_bytes(b"macOS")
    for folder in ("imagesTr", "imagesUn"):
        (raw / folder / "far_0000.nii.gz").symlink_to("/not/mounted/far.nii.gz")
    code, printed = doctor(capsys)
    assert code == 1 and "nnU-Net takes the hidden file" in printed
    assert printed.count("far_0000.nii.gz cannot be read: it links to /not/mounted/far.nii.gz") == 2
    assert printed.count("._") == 1 and "6 labeled cases" in printed


def test_preprocess_fails_on_a_link_whose_target_is_gone(own, capfd):
    raw, preprocessed = own
    (raw / "imagesUn" / "far_0000.nii.gz").symlink_to("/not/mounted/far.nii.gz")
    (raw / "imagesUn" / "._unl_00_0000.nii.gz").write_bytes(b"macOS")
    (preprocessed / "nnUNetPlans_cpu_2d_unlabeled" / "unl_01.pkl").unlink()
    assert cli.main(["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "2d", "-np", "1"]) == 1
    error = capfd.readouterr().err
    assert "far_0000.nii.gz cannot be read: it links to /not/mounted/far.nii.gz, which is gone" in error
    assert (preprocessed / "nnUNetPlans_cpu_2d_unlabeled" / "unl_01.pkl").is_file()


def test_plans_of_any_name_are_plans(own, capsys):
    _, preprocessed = own
    (preprocessed / "nnUNetPlans_cpu.json").rename(preprocessed / "tiny.json")
    for arguments in ((), ("-p", "tiny")):
        code, printed = doctor(capsys, *arguments)
        assert code == 0 and "tiny 2d: 4 unlabeled cases preprocessed" in printed, printed
    assert cli.main(["preprocess", "-d", "801", "-p", "tinny"]) == 1
    assert "Choose other plans with -p: tiny," in capsys.readouterr().err


def test_doctor_reports_an_order_of_regions_that_swaps_labels(own, capsys):
    raw, preprocessed = own
    content = json.loads((raw / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "whole": [1, 2], "core": 1}, "regions_class_order": [1, 2]}
    (preprocessed / "dataset.json").write_text(json.dumps(content))
    code, printed = doctor(capsys)
    assert code == 1 and "label 1 becomes 2, label 2 becomes 1. For these regions it must be [2, 1]" in printed


def test_doctor_says_that_a_variable_has_quotation_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", f'"{tmp_path}"')
    code, printed = doctor(capsys)
    assert code == 1
    assert printed.count("including quotation marks") == 2 and "et it without them" in printed


def test_doctor_wants_no_unlabeled_images_where_labels_are_hidden(prepared, work, capsys, tmp_path):
    unlabeled = work / "raw" / prepared("labels") / "imagesUn"
    splits = work / "preprocessed" / prepared("labels") / "splits_final.json"
    before = splits.read_text()
    shutil.move(unlabeled, tmp_path / "imagesUn")
    try:
        assert cli.main(["doctor", "-d", "801"]) == 0
        assert "fold 0: 2 cases with hidden labels" in capsys.readouterr().out
        folds = [{key: fold[key] for key in ("train", "val")} for fold in json.loads(before)]
        splits.write_text(json.dumps(folds))
        assert cli.main(["doctor", "-d", "801"]) == 1
        assert "imagesUn is missing" in capsys.readouterr().out
    finally:
        splits.write_text(before)
        shutil.move(tmp_path / "imagesUn", unlabeled)


def test_doctor_names_each_bad_case_and_its_cure(prepared, work, capsys):
    raw = work / "raw" / prepared("labels")
    unlabeled = raw / "imagesUn"
    image = make_case(300)[0]
    bad = {
        # The voxels of lab_01 under another name, type and compression.
        "renamed": lambda f: write_image(
            sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "imagesTr" / "lab_01_0000.nii.gz"))).astype(np.float64), f
        ),
        "thick": lambda f: write_image(image, f, (1.0, 1.0, 9.0)),
        "bright": lambda f: write_image(image * 1000, f),
        "broken": lambda f: f.write_bytes(b"not an image"),
    }
    for name, write in bad.items():
        write(unlabeled / f"{name}_0000.nii.gz")
    try:
        assert cli.main(["doctor", "-d", "801"]) == 1
        printed = capsys.readouterr().out
    finally:
        for name in bad:
            (unlabeled / f"{name}_0000.nii.gz").unlink()
    assert "imagesUn/renamed has the same voxels as imagesTr/lab_01" in printed
    assert "remove renamed from imagesUn" in printed
    assert "imagesUn/thick: spacing 9 x 1 x 1 mm is far" in printed
    assert "imagesUn/bright: median intensity" in printed
    assert "broken_0000.nii.gz cannot be read" in printed
    assert "2 problem(s)" in printed


def test_doctor_without_folders_and_discovery(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    script = (
        "import os, sys; os.environ.pop('nnUNet_extTrainer', None)\n"
        "from nnunet_semiseg.cli import main; sys.exit(main(['doctor']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1
    assert result.stdout.count("is not set") == 3
    assert "export nnUNet_raw=" in result.stdout and "export nnUNet_extTrainer=" in result.stdout
    assert "4 problem(s)" in result.stdout


def test_doctor_reports_splits_that_name_unknown_cases(prepared, work, capsys):
    file = work / "preprocessed" / prepared("labels") / "splits_final.json"
    original = file.read_text()
    try:
        file.write_text(json.dumps([{"train": ["lab_00"], "val": ["gone"]}]))
        assert cli.main(["doctor", "-d", "801"]) == 1
        assert "'val' names gone" in capsys.readouterr().out
    finally:
        file.write_text(original)
