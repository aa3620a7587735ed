"""Whole predictions against nnUNetv2_predict, and what is refused."""

import json
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from small_models import CLASSES, REGIONS, open_with, stock, stock_labels, volume, write_model, write_nifti

from nnunet_semiseg.files import CaseError
from nnunet_semiseg.inference import machine, openvino_runtime, predictor, torch_runtime
from nnunet_semiseg.inference.model import converted

needs_openvino = pytest.mark.skipif(not openvino_runtime.available(), reason="OpenVINO is not installed")
RUNTIMES = ["torch", pytest.param("openvino", marks=needs_openvino)]


def labels_of(file):
    return np.asarray(nibabel.load(file).dataobj).T


def compare(folder, files, out, runtime, mirroring=False, step=0.5, folds=None):
    expected = stock_labels(folder, files, out / "stock", mirroring=mirroring, step=step, folds=folds)
    own = open_with(folder, runtime, mirroring=mirroring, step=step, folds=folds)
    own.predict(files[0].name.removesuffix("_0000.nii.gz"), files, out / "own.nii.gz")
    result = labels_of(out / "own.nii.gz")
    assert len(np.unique(expected)) > 2 and result.dtype == expected.dtype
    # OpenVINO adds up in another order.
    assert (result != expected).sum() <= (0 if runtime == "torch" else 5)
    np.testing.assert_allclose(nibabel.load(out / "own.nii.gz").affine, nibabel.load(files[0]).affine, atol=1e-4)


SETTINGS = {
    "3d": dict(),
    "2d": dict(dim=2),
    "regions": dict(labels=REGIONS),
    "axes": dict(transpose=[1, 0, 2], back=[1, 0, 2], reader="NibabelIOWithReorient"),
    "2d_axes_regions": dict(dim=2, labels=REGIONS, transpose=[1, 2, 0], back=[2, 0, 1], reader="NibabelIO"),
    "channels": dict(schemes=("CTNormalization", "ZScoreNormalization"), masked=True),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_voxels_of_nnunetv2_predict(tmp_path, runtime, name):
    folder = write_model(tmp_path / "model", **SETTINGS[name])
    channels = len(SETTINGS[name].get("schemes", "1"))
    image = volume((9, 40, 44))
    files = [
        write_nifti(tmp_path / f"in/a_000{i}.nii.gz", image * (i + 1) // 2, (3.0, 1.0, 1.1)) for i in range(channels)
    ]
    compare(folder, files, tmp_path, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_folds_mirroring_and_step(tmp_path, runtime):
    folder = write_model(tmp_path / "model", folds=("0", "2", "all"))
    files = [write_nifti(tmp_path / "in/a_0000.nii.gz", volume((7, 30, 33)), (3.0, 1.0, 1.1))]
    compare(folder, files, tmp_path, runtime, mirroring=True, step=0.7)
    compare(folder, files, tmp_path, runtime, folds=["all"])
    assert [file.parent.name for file in predictor.open_model(folder).checkpoints] == ["fold_0", "fold_2"]


@needs_openvino
def test_bfloat16_is_close(tmp_path):
    folder = write_model(tmp_path / "model")
    data = volume((9, 40, 44)).astype(np.float32)[None]
    exact = open_with(folder).labels(data.copy(), (2.0, 1.5, 1.5))
    try:
        close = open_with(folder, precision="bf16").labels(data, (2.0, 1.5, 1.5))
    except NotImplementedError as error:
        assert "has no bfloat16. Use --precision f32" in str(error)
    else:
        assert (close == exact).mean() > 0.97


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_models_are_averaged_by_their_probabilities(tmp_path, runtime, labels):
    folders = [write_model(tmp_path / f"model_{seed}", labels, seed=seed) for seed in range(2)]
    data = volume((9, 40, 44)).astype(np.float32)[None]
    spacing = (2.0, 1.5, 1.5)
    together = open_with(folders, runtime)
    case = predictor.preprocess(data.copy(), spacing, together.model)
    means = together.values(case.data)
    manager = stock(folders[0]).label_manager
    expected = 0
    for folder in folders:
        logits = stock(folder).predict_logits_from_preprocessed_data(torch.from_numpy(case.data))
        expected = expected + manager.apply_inference_nonlin(logits).numpy() / 2
    np.testing.assert_allclose(means, expected, atol=2e-3 if runtime == "openvino" else 1e-6)
    # At the network's spacing there is nothing to resample.
    own = together.labels(data, spacing)[case.box]
    assert (own != manager.convert_probabilities_to_segmentation(means)).sum() == 0


def test_a_model_without_torch_or_nnunet(tmp_path):
    """Once it is converted; in a fresh process in which importing them fails."""
    pytest.importorskip("openvino")
    folder = write_model(tmp_path / "model")
    files = [write_nifti(tmp_path / "in/a_0000.nii.gz", volume((7, 30, 33)), (3.0, 1.0, 1.1))]
    open_with(folder).predict("a", files, tmp_path / "here.nii.gz")
    # All that an image for a challenge needs.
    (folder / "fold_0" / "checkpoint_final.pth").unlink()
    script = (
        "import sys\n"
        "for name in ('torch', 'nnunetv2', 'SimpleITK', 'skimage', 'pandas', 'openvino_telemetry'):\n"
        "    sys.modules[name] = None\n"
        "from nnunet_semiseg import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "predict", "-m", folder, "-i", tmp_path / "in", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(labels_of(tmp_path / "out" / "a.nii.gz"), labels_of(tmp_path / "here.nii.gz"))
    assert not (tmp_path / "home").exists()


@needs_openvino
def test_a_converted_network_of_another_checkpoint_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    predictor.convert(predictor.open_model(folder))
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    assert openvino_runtime.facts(checkpoint)["mirroring_axes"] == [0, 1, 2]
    other = write_model(tmp_path / "other", seed=1)
    shutil.copyfile(other / "fold_0" / "checkpoint_final.pth", checkpoint)
    with pytest.raises(ValueError, match="checkpoint_final.xml was converted from another checkpoint"):
        predictor.open_model(folder)
    converted(checkpoint).write_text("<net/>")
    with pytest.raises(ValueError, match="checkpoint_final.xml is no network that was converted here"):
        predictor.open_model(folder)


@needs_openvino
def test_damaged_weights_and_a_full_disk_at_conversion(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    model = predictor.open_model(folder)
    openvino = openvino_runtime.import_openvino()
    with monkeypatch.context() as patch:

        def full(model, path, **kwargs):
            with open(path, "w") as stream:
                stream.write("half")
            raise RuntimeError("No space left on device")

        patch.setattr(openvino, "save_model", full)
        with pytest.raises(OSError, match="checkpoint_final.xml could not be written .*No space left"):
            predictor.convert(model)
    assert [file.name for file in (folder / "fold_0").iterdir()] == ["checkpoint_final.pth"]
    predictor.convert(model)
    converted(model.checkpoints[0]).with_suffix(".bin").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint_final.xml cannot be used .*convert again"):
        open_with(folder)


def change(file, **new):
    content = json.loads(file.read_text())
    content.update(new)
    file.write_text(json.dumps(content))


def test_what_is_no_plain_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        predictor.open_model(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no plans.json, so it is no model folder"):
        predictor.open_model(tmp_path / "empty")
    folder = write_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no fold 3 with checkpoint_final.pth. It has folds 0"):
        predictor.open_model(folder, ["3"])
    with pytest.raises(FileNotFoundError, match="no fold with best.pth. It has fold_0/checkpoint_final.pth"):
        predictor.open_model(folder, None, "best.pth")
    plans = json.loads((folder / "plans.json").read_text())

    def with_configuration(**new):
        configurations = {**plans["configurations"]}
        configurations["3d_fullres"] = {**configurations["3d_fullres"], **new}
        change(folder / "plans.json", configurations=configurations)

    for new, message in (
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({"preprocessor_name": "MyPreprocessor"}, "preprocessed with MyPreprocessor"),
        ({"normalization_schemes": ["MyNormalization"]}, "normalizes with MyNormalization"),
        ({"resampling_fn_data": "resample_torch_fornnunet"}, "resample with resample_torch_fornnunet"),
    ):
        with_configuration(**new)
        with pytest.raises(NotImplementedError, match=message):
            predictor.open_model(folder)
    with_configuration(normalization_schemes=["NoNormalization"] * 2)
    with pytest.raises(ValueError, match="plans.json has 2 channels, dataset.json 1"):
        predictor.open_model(folder)
    with_configuration(inherits_from="missing")
    with pytest.raises(ValueError, match="plans.json has no configuration missing"):
        predictor.open_model(folder)
    change(folder / "plans.json", **plans)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:4000])
    with pytest.raises(RuntimeError, match="checkpoint_final.pth is damaged"):
        predictor.open_model(folder)


def test_models_that_do_not_go_together(tmp_path):
    first = write_model(tmp_path / "first")
    for name, more, message in (
        ("2d", dict(dim=2), "2d is of configuration 2d, but .*first of 3d_fullres"),
        ("fine", dict(spacing=(1.0, 1.0, 1.0)), "fine has other plans than .*first: they differ in spacing"),
        ("regions", dict(labels=REGIONS), "regions has other labels than"),
    ):
        with pytest.raises(ValueError, match=message):
            open_with([first, write_model(tmp_path / name, **more)], "torch")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(runtime="torch", precision="bf16"), "--precision bf16 is for --runtime openvino"),
        (dict(runtime="openvino", device="cuda"), "-device cuda is for --runtime torch"),
        (dict(step=0), "-step_size 0 is not a share of a window"),
        (dict(threads=0), "--threads 0 is not a number of threads"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        predictor.Settings(**settings).check()


def test_a_machine_that_is_too_small(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    file = write_nifti(tmp_path / "in/a_0000.nii.gz", volume((7, 30, 33)))
    own = open_with(folder, "torch")
    monkeypatch.setattr(machine, "free_memory", lambda: 1e5)
    with pytest.raises(CaseError, match=r"Case a of 7 x 30 x 33 voxels needs about 0.0 GB of memory, and 0.0 GB are"):
        own.predict("a", [file], tmp_path / "a.nii.gz")
    assert not (tmp_path / "a.nii.gz").exists()
    # 26 million voxels to 2.7 million of 4 classes.
    own = own.memory((100, 512, 512), (2.5, 0.6, 0.6))
    assert 0.5e9 < own < 1.5e9


def test_no_gpu_and_no_bfloat16(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="torch finds no GPU here. Use -device cpu"):
        open_with(folder, "torch", device="cuda")
    openvino = pytest.importorskip("openvino")

    class Old:
        def get_property(self, device, name):
            return {"OPTIMIZATION_CAPABILITIES": ["FP32"], "FULL_DEVICE_NAME": "Old processor "}[name]

    monkeypatch.setattr(openvino, "Core", Old)
    with pytest.raises(NotImplementedError, match=r"\(Old processor\) has no bfloat16. Use --precision f32"):
        open_with(folder, precision="bf16")


def test_openvino_is_not_there(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(NotImplementedError, match=r"OpenVINO cannot be imported.*nnunet-semiseg\[openvino\]"):
        open_with(folder)


def test_a_trainer_that_is_not_installed(tmp_path):
    folder = write_model(tmp_path / "model")
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainerNobody"}, file)
    model = predictor.open_model(folder)
    with pytest.raises(NotImplementedError, match="trained by nnUNetTrainerNobody, which is not installed here"):
        torch_runtime.build(model)
