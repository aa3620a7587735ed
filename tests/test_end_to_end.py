"""A user's walk on the command line: train, kill, resume, predict from another folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_case, write_image

from nnunet_semiseg import checkpoints

BIN = Path(sys.executable).parent


def run(*command, cwd):
    result = subprocess.run([str(BIN / command[0]), *map(str, command[1:])], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_train_kill_resume_predict(prepared, work, tmp_path, monkeypatch):
    # With augmentation processes, as a user has them.
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    dataset = prepared("labels")
    trainer = (
        "nnUNetTrainerCoraNet_4epochs_num_iterations_per_epoch=4_num_val_iterations_per_epoch=1_save_every=1"
        "_pretraining=0.25_min_recall=0_relabel_every=2_unlabeled_foreground_sampling=0.5"
    )
    train = ["nnUNetv2_train", dataset, "2d", "0", "-tr", trainer, "-p", "nnUNetPlans_cpu", "-device", "cpu"]
    folder = work / "results" / dataset / f"{trainer}__nnUNetPlans_cpu__2d" / "fold_0"

    process = subprocess.Popen(
        [str(BIN / train[0]), *train[1:]],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.time() + 300
    while not (folder / "checkpoint_latest.pth").is_file():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = checkpoints.read(folder / "checkpoint_latest.pth")["current_epoch"]
    assert reached < 4

    printed = run(*train, "--c", cwd=tmp_path)
    assert f"Epoch {reached}" in printed and f"Epoch {reached - 1}\n" not in printed
    assert "Mean Validation Dice" in printed
    for name in ("checkpoint_final.pth", "progress.png", "progress_semiseg.png", "progress_semiseg.csv"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "checkpoint_latest.pth").exists()
    assert (folder / "progress_semiseg.csv").read_text().count("\n") == 5

    images, output = tmp_path / "images", tmp_path / "output"
    write_image(make_case(400)[0], images / "new_0000.nii.gz")
    run(
        "nnUNetv2_predict",
        "-d",
        dataset,
        "-c",
        "2d",
        "-f",
        "0",
        "-tr",
        trainer,
        "-p",
        "nnUNetPlans_cpu",
        "-device",
        "cpu",
        "-i",
        images,
        "-o",
        output,
        "-npp",
        "1",
        "-nps",
        "1",
        cwd=images,
    )
    prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "new.nii.gz")))
    assert prediction.shape == make_case(400)[0].shape and set(np.unique(prediction)) <= {0, 1, 2}
