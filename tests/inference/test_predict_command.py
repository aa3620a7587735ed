"""``nnunet_semiseg predict``: cases of a folder, what is done already, and what is refused."""

import json
import os

import nibabel
import numpy as np
import pytest
from small_models import volume, write_model, write_nifti

from nnunet_semiseg import cli


@pytest.fixture
def work(tmp_path):
    write_model(tmp_path / "model")
    for seed, case in enumerate("abc"):
        write_nifti(tmp_path / "in" / f"{case}_0000.nii.gz", volume((6, 20, 22), seed))
    return tmp_path


def predict(work, *more, out="out", model="model"):
    folders = ["-i", work / "in", "-o", work / out, "-m", work / model]
    return cli.main([str(word) for word in ["predict", *folders, "--runtime", "torch", "--threads", "1", *more]])


def maps(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.nii.gz")}


def test_cases_that_are_done_are_left(work, capsys):
    (work / "in" / "b_0000.nii.gz").write_bytes(b"no image")
    assert predict(work) == 1
    error = capsys.readouterr().err
    assert "b_0000.nii.gz cannot be read" in error and "1 of 3 cases could not be predicted" in error
    first = maps(work / "out")
    assert set(first) == {"a.nii.gz", "c.nii.gz"}
    assert {"predict.json", "plans.json", "dataset.json"} <= {file.name for file in (work / "out").iterdir()}
    write_nifti(work / "in" / "b_0000.nii.gz", volume((6, 20, 22), 1))
    # An image that is newer than its label map is another one.
    os.utime(work / "in" / "c_0000.nii.gz", ns=(first["c.nii.gz"] + 10**9,) * 2)
    os.utime(work / "out" / "c.nii.gz", ns=(first["c.nii.gz"] - 10**9,) * 2)
    assert predict(work) == 0
    second = maps(work / "out")
    assert set(second) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
    assert second["a.nii.gz"] == first["a.nii.gz"] and second["c.nii.gz"] > first["c.nii.gz"]
    assert len(np.unique(nibabel.load(work / "out" / "b.nii.gz").dataobj)) > 1


def test_other_settings_need_another_folder(work, capsys):
    assert predict(work) == 0
    before = maps(work / "out")
    assert predict(work, "-step_size", "0.9") == 1
    assert "has label maps made with other step size (predict.json). Choose another -o" in capsys.readouterr().err
    write_model(work / "other", seed=1)
    assert predict(work, model="other") == 1
    assert "made with other models" in capsys.readouterr().err
    assert maps(work / "out") == before
    assert predict(work, "--overwrite", model="other") == 0
    assert all(time > before[name] for name, time in maps(work / "out").items())
    assert predict(work, model="other") == 0
    assert json.loads((work / "out" / "predict.json").read_text())["step_size"] == 0.5


def test_a_folder_of_somebody_else(work, capsys):
    (work / "out").mkdir()
    (work / "out" / "a.nii.gz").write_bytes(b"mine")
    assert predict(work) == 1
    assert "but no predict.json: they were not made here" in capsys.readouterr().err
    assert (work / "out" / "a.nii.gz").read_bytes() == b"mine"


def test_nothing_is_written_before_the_model_runs(work, capsys):
    assert predict(work, "-f", "7") == 1
    assert "has no fold 7" in capsys.readouterr().err
    assert predict(work, "--precision", "bf16") == 1
    assert "--precision bf16 is for --runtime openvino" in capsys.readouterr().err
    assert not (work / "out").exists()


def test_a_full_disk_in_the_middle_of_a_case(work, capsys, monkeypatch):
    real = nibabel.save

    def full(image, file):
        real(image, file)
        if "b.nii.gz" in str(file):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    assert predict(work) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {file.name for file in (work / "out").iterdir() if file.name.endswith(".gz")} == {"a.nii.gz", "c.nii.gz"}
