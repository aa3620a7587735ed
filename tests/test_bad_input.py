"""Bad input gets one clear line that names the file or case and the cure, and nothing is lost."""

import json
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import SHORT, make_case, write_image
from test_frame import run_until

from nnunet_semiseg import checkpoints, cli
from nnunet_semiseg.data.unlabeled import store_folder, store_identifiers

PREPROCESS = ["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "3d_fullres", "-np", "1"]


@pytest.fixture
def raw(prepared, work):
    """The raw dataset; its imagesUn and store are put back afterwards."""
    folder = work / "raw" / prepared("labels")
    store = store_folder(work / "preprocessed" / folder.name / "nnUNetPlans_cpu_3d_fullres")
    for path in (folder / "imagesUn", store):
        shutil.copytree(path, path.with_name(path.name + ".kept"))
    yield folder
    for path in (folder / "imagesUn", store):
        shutil.rmtree(path, ignore_errors=True)
        path.with_name(path.name + ".kept").rename(path)


@pytest.fixture
def store(raw, work):
    return store_folder(work / "preprocessed" / raw.name / "nnUNetPlans_cpu_3d_fullres")


def with_nan(file):
    image = make_case(1)[0]
    image[0, 0, :3] = np.nan, np.inf, -np.inf
    write_image(image, file)


def four_d(file):
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(make_case(i)[0]) for i in range(3)]), str(file))


def cut_off(file):
    write_image(make_case(1)[0], file)
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    "write, complaint",
    [
        (with_nan, "bad_0000.nii.gz has 3 voxels that are NaN or infinite. Replace"),
        (four_d, "bad_0000.nii.gz holds 3 channel(s) or volumes, but the dataset has 1 channel(s). Split a 4D image"),
        (cut_off, "bad_0000.nii.gz cannot be read"),
        (lambda f: f.write_bytes(b""), "bad_0000.nii.gz cannot be read"),
    ],
)
def test_bad_image_is_named_and_the_others_are_done(raw, store, capfd, write, complaint):
    write(raw / "imagesUn" / "bad_0000.nii.gz")
    (store / "unl_02.pkl").unlink()
    assert cli.main(PREPROCESS) == 1
    assert complaint in capfd.readouterr().err
    assert store_identifiers(store) == [f"unl_{i:02d}" for i in range(4)]
    assert not list(store.glob("bad*")) and not list(store.parent.glob("*.unfinished"))


@pytest.mark.parametrize(
    "prepare, complaint",
    [
        (lambda un: shutil.rmtree(un), "imagesUn is missing. Put the unlabeled images there, named CASE_0000.nii.gz"),
        (lambda un: [f.unlink() for f in un.iterdir()], "imagesUn holds no images"),
        (
            lambda un: (un / "unl_00_0000.nii.gz").rename(un / "unl_00_0000.mha"),
            "unl_00_0000.mha does not end in .nii.gz",
        ),
        (
            lambda un: (un / "unl_00_0000.nii.gz").rename(un / "unl_00.nii.gz"),
            "unl_00.nii.gz is not named CASE_0000.nii.gz",
        ),
        (
            lambda un: shutil.copy(un / "unl_00_0000.nii.gz", un / "unl_00_0001.nii.gz"),
            "Case unl_00 in .* has the channels unl_00_0000.nii.gz, unl_00_0001.nii.gz, but the dataset has 1",
        ),
        (
            lambda un: shutil.copy(un / "unl_00_0000.nii.gz", un / "lab_02_0000.nii.gz"),
            "Case lab_02 is in imagesUn and also labeled",
        ),
    ],
)
def test_wrong_folder_stops_before_any_work(raw, store, capfd, prepare, complaint):
    import re

    prepare(raw / "imagesUn")
    before = sorted(store.iterdir())
    assert cli.main(PREPROCESS) == 1
    error = capfd.readouterr().err
    assert re.search(complaint, error) and error.count("\n") == 1
    assert sorted(store.iterdir()) == before


def test_odd_spacing_and_orientation_are_warned_of(raw, store, capfd):
    image = sitk.GetImageFromArray(make_case(5)[0])
    image.SetSpacing((1.0, 1.0, 8.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(raw / "imagesUn" / "odd_0000.nii.gz"))
    assert cli.main(PREPROCESS) == 0
    error = capfd.readouterr().err
    assert "odd: spacing 8 x 1 x 1 mm is far from the labeled cases'" in error
    assert "odd: orientation RAS, the labeled cases are LPS" in error


def test_unknown_plans_configuration_and_processes(raw, capfd):
    for arguments, complaint in (
        (
            ["preprocess", "-d", "801", "-p", "nnUNetPlans"],
            "nnUNetPlans.json is missing. Choose other plans with -p: nnUNetPlans_cpu",
        ),
        ([*PREPROCESS[:5], "-c", "3d_lowres"], "nnUNetPlans_cpu has no configuration 3d_lowres. It has 2d"),
        ([*PREPROCESS, "-np", "0"], "-np 0"),
    ):
        assert cli.main(arguments) == 1
        assert complaint in capfd.readouterr().err


def test_labels_un_is_never_opened(raw, store):
    """A folder of labels that cannot be read at all does not matter."""
    labels = raw / "labelsUn"
    labels.mkdir()
    try:
        for i in range(4):
            (labels / f"unl_{i:02d}.nii.gz").symlink_to("/nowhere")
        shutil.rmtree(store)
        assert cli.main(PREPROCESS) == 0
        assert len(store_identifiers(store)) == 4
    finally:
        shutil.rmtree(labels)


def test_killed_preprocessing_continues_with_what_is_missing(raw, store):
    """A kill leaves finished cases, a case without its properties, and a folder of unfinished files."""
    kept = (store / "unl_00.b2nd").stat().st_mtime_ns
    (store / "unl_01.pkl").unlink()
    for suffix in (".pkl", ".b2nd", "_seg.b2nd"):
        (store / f"unl_02{suffix}").unlink()
    unfinished = store.with_name(store.name + ".unfinished")
    unfinished.mkdir()
    (unfinished / "unl_02.b2nd").write_bytes(b"half")
    assert cli.main(PREPROCESS) == 0
    assert len(store_identifiers(store)) == 4 and not unfinished.exists()
    assert (store / "unl_00.b2nd").stat().st_mtime_ns == kept


def no_large_files():
    """Writing beyond 4 kB fails in this process, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    return limits


def test_full_disk_during_preprocessing_leaves_nothing_half_written(raw, store, capfd):
    shutil.rmtree(store)
    # Limits are inherited by the workers.
    limits = no_large_files()
    try:
        code = cli.main(PREPROCESS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    error = capfd.readouterr().err
    assert "case unl_00 could not be written to" in error and "MB are free there" in error
    assert not list(store.glob("*")) and not list(store.parent.glob("*.unfinished"))
    assert cli.main(PREPROCESS) == 0
    assert len(store_identifiers(store)) == 4


# ---------------------------------------------------------------------------------------------------- before training


def start(make_trainer, name="nnUNetTrainerMeanTeacher" + SHORT, **kwargs):
    make_trainer(name, **kwargs).on_train_start()


def test_no_unlabeled_cases(raw, store, work, make_trainer):
    splits = work / "preprocessed" / raw.name / "splits_final.json"
    original = splits.read_text()
    shutil.rmtree(store)
    try:
        splits.write_text(json.dumps([{"train": ["lab_00"], "val": ["lab_05"]}]))
        with pytest.raises(
            ValueError, match="no unlabeled cases for 3d_fullres.*nnunet_semiseg preprocess -d Dataset801"
        ):
            start(make_trainer, configuration="3d_fullres")
    finally:
        splits.write_text(original)


def test_cases_preprocessed_with_other_plans(raw, store, work, make_trainer, capfd):
    plans = work / "preprocessed" / raw.name / "nnUNetPlans_cpu.json"
    original = plans.read_text()
    changed = json.loads(original)
    changed["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    try:
        plans.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="unl_00 in .* other plans.*--overwrite"):
            start(make_trainer, configuration="3d_fullres")
        assert cli.main(PREPROCESS) == 1
        assert "--overwrite" in capfd.readouterr().err
    finally:
        plans.write_text(original)


@pytest.mark.parametrize(
    "split, complaint",
    [
        ({"train": ["lab_00"], "val": ["lab_05"], "unlabeled": ["lab_99"]}, "'unlabeled' names lab_99, which is not"),
        ({"train": ["gone"], "val": ["lab_05"]}, "'train' names gone, which is not"),
        ({"train": ["lab_00"], "val": ["lab_05"], "unlabeled": ["lab_05"]}, "lab_05 is in 'unlabeled' and in 'val'"),
        ({"train": [], "val": ["lab_05"]}, "Fold 0 has no labeled training cases"),
    ],
)
def test_splits_are_checked_before_training(prepared, work, make_trainer, split, complaint):
    file = work / "preprocessed" / prepared("labels") / "splits_final.json"
    original = file.read_text()
    try:
        file.write_text(json.dumps([split]))
        with pytest.raises(ValueError, match=complaint):
            start(make_trainer)
    finally:
        file.write_text(original)


@pytest.mark.parametrize("kind, named", [("labels", "core"), ("regions", "core")])
def test_class_in_no_labeled_case(prepared, work, make_trainer, kind, named):
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

    folder = work / "preprocessed" / prepared(kind) / "nnUNetPlans_cpu_2d"
    files = [folder / f"lab_{i:02d}.pkl" for i in range(3)]
    originals = [f.read_bytes() for f in files]
    try:
        for file in files:
            properties = load_pickle(str(file))
            key = next(k for k in properties["class_locations"] if k in (2, (2,)))
            properties["class_locations"][key] = []
            write_pickle(properties, str(file))
        with pytest.raises(ValueError, match=f"No labeled training case of fold 0 contains {named}.*--labeled-cases"):
            start(make_trainer, kind=kind)
        start(make_trainer, "nnUNetTrainerMeanTeacher_allow_absent_classes=true" + SHORT, kind=kind)
    finally:
        for file, original in zip(files, originals):
            file.write_bytes(original)


def test_results_folder_that_cannot_be_written(make_trainer, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("nnUNet_results", str(file))
    with pytest.raises(OSError, match="results folder cannot be written.*Set nnUNet_results"):
        make_trainer("nnUNetTrainerMeanTeacher")


def test_case_both_labeled_and_unlabeled(prepared, work, make_trainer):
    store = store_folder(work / "preprocessed" / prepared("labels") / "nnUNetPlans_cpu_2d")
    copies = []
    for suffix in (".pkl", ".b2nd", "_seg.b2nd"):
        copies.append(shutil.copy(store / f"unl_00{suffix}", store / f"lab_00{suffix}"))
    try:
        with pytest.raises(ValueError, match="Case lab_00 is both labeled and unlabeled"):
            start(make_trainer)
    finally:
        for copy in copies:
            Path(copy).unlink()


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_full_disk_during_a_checkpoint_keeps_the_last_one(make_trainer):
    trainer = make_trainer("nnUNetTrainerMeanTeacher" + SHORT)
    run_until(trainer, epoch=1)
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    before = file.read_bytes()
    limits = no_large_files()
    try:
        with pytest.raises(OSError, match="checkpoint_latest.pth could not be written.*free some space"):
            trainer.save_checkpoint(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and not list(file.parent.glob("*.tmp"))


def test_truncated_latest_checkpoint_falls_back_to_the_one_before(make_trainer):
    name = "nnUNetTrainerMeanTeacher" + SHORT.replace("2epochs", "3epochs")
    trainer = make_trainer(name)
    run_until(trainer, epoch=2)
    folder = Path(trainer.output_folder)
    latest = folder / "checkpoint_latest.pth"
    assert checkpoints.read(folder / "checkpoint_previous.pth")["current_epoch"] == 1
    # Where best is older than previous, previous is the better start.
    (folder / "checkpoint_best.pth").unlink()
    latest.write_bytes(latest.read_bytes()[: latest.stat().st_size // 2])
    resumed = make_trainer(name, continue_training=True)
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 1
    log = "".join(f.read_text() for f in folder.glob("training_log*"))
    assert "checkpoint_latest.pth is damaged" in log
    assert "Continuing from checkpoint_previous.pth instead, at epoch 1" in log
    assert (folder / "checkpoint_latest.pth.damaged").is_file() and not latest.exists()


def test_every_checkpoint_truncated(make_trainer):
    trainer = make_trainer("nnUNetTrainerMeanTeacher" + SHORT)
    run_until(trainer, epoch=1)
    for file in Path(trainer.output_folder).glob("checkpoint_*.pth"):
        file.write_bytes(file.read_bytes()[:100])
    resumed = make_trainer("nnUNetTrainerMeanTeacher" + SHORT, continue_training=True)
    with pytest.raises(checkpoints.CheckpointError, match="checkpoint_latest.pth is damaged"):
        resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))


def test_checkpoint_of_stock_nnunet_is_told_from_ours(make_trainer, tmp_path):
    stock = make_trainer("nnUNetTrainer")
    stock.initialize()
    stock.save_checkpoint(str(tmp_path / "stock.pth"))
    with pytest.raises(checkpoints.CheckpointError, match="-pretrained_weights"):
        make_trainer("nnUNetTrainerMeanTeacher").load_checkpoint(str(tmp_path / "stock.pth"))
