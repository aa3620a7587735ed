"""``convert``: miniature copies of the official layouts, with what is odd about them."""

import csv
import json
import sys
import zipfile
from itertools import combinations

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import kept_language, write_image
from scipy.io import savemat

from dataset_conversion import Dataset027_ACDC as acdc
from dataset_conversion import Dataset501_LA2018 as la
from dataset_conversion import Dataset502_PancreasCT as pancreas
from dataset_conversion import Dataset503_York as york
from dataset_conversion import Dataset505_FLARE23 as flare23
from dataset_conversion.common import read_volume
from dataset_conversion.Dataset504_FLARE22 import ORGANS
from nnunet_semiseg import cli


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """nnU-Net's folders, empty; returns that of raw data."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw"


def convert(name, folder, *arguments):
    return cli.main(["convert", name, "-i", str(folder), "-d", "501", *map(str, arguments), "-np", "1"])


def read(file):
    return sitk.ReadImage(str(file))


def voxels(file):
    return sitk.GetArrayFromImage(read(file))


def names(folder):
    """Of the cases in imagesXX or labelsXX."""
    return sorted(f.name.removesuffix(".nii.gz").removesuffix("_0000") for f in folder.glob("*.nii.gz"))


def folds(raw, name):
    return json.loads((raw.parent / "preprocessed" / name / "splits_final.json").read_text())


def numbered(seed, shape=(4, 6, 5)):
    return np.random.RandomState(seed).randint(0, 200, shape).astype(np.uint8)


def write_h5(file, **arrays):
    h5py = pytest.importorskip("h5py")
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as content:
        for key, array in arrays.items():
            content[key] = array


# ------------------------------------------------------------------------------------------------------ LA 2018

SCANS = [*la.LABELED.split(), "ZZZZZZZZZZZZZZZZZZZZ", "TDDI6L3Y0L9VVFP9MNFS", *la.TEST.split()]


def test_la_as_the_challenge_gives_it(raw, tmp_path, capsys):
    folder = tmp_path / "2018_UTAH_MICCAI"
    for i, scan in enumerate([*SCANS, "4URSJYI2QUH1T5S5PP47"]):
        place = folder / ("Training Set" if scan in SCANS else "Testing Set") / scan
        write_image(numbered(i), place / "lgemri.nrrd")
        write_image((255 * (numbered(i) > 150)).astype(np.uint8), place / "laendo.nrrd")
        write_image((255 * (numbered(i) < 9)).astype(np.uint8), place / "lawall.nrrd")
    (folder / "Training Set" / SCANS[3] / "desktop.ini").write_text("[.ShellClassInfo]")
    (folder / "Unet.py").write_text("not data")
    # The label of a case that is not labeled is never opened.
    (folder / "Training Set" / SCANS[5] / "laendo.nrrd").write_text("nonsense")
    assert convert("LA2018", folder, "--labeled", 4) == 0
    dataset = raw / "Dataset501_LA2018"
    assert names(dataset / "labelsTr") == names(dataset / "imagesTr") == sorted(SCANS[:4])
    assert names(dataset / "imagesUn") == sorted(SCANS[4:18]) and not (dataset / "labelsUn").exists()
    assert names(dataset / "labelsTs") == names(dataset / "imagesTs") == sorted(la.TEST.split())
    for i, scan, part in ((2, SCANS[2], "Tr"), (37, SCANS[37], "Ts")):
        image = read(dataset / f"images{part}" / f"{scan}_0000.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(image), numbered(i))
        assert image.GetSpacing() == pytest.approx((0.625,) * 3)
        label = read(dataset / f"labels{part}" / f"{scan}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(label), numbered(i) > 150)
        assert label.GetSpacing() == pytest.approx((0.625,) * 3)
    printed = capsys.readouterr()
    assert "1 cases are in no list and are left out, such as 4URSJYI2QUH1T5S5PP47" in printed.out
    assert "38 x spacing of 1 mm in the header corrected to the published 0.625 mm" in printed.out
    assert "Warning" not in printed.err
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "left atrium": 1} and "Xiong" in description["reference"]


def test_la_lists_are_whole_and_of_the_paper():
    assert len(set(la.LABELED.split())) == 16 and len(set(la.TEST.split())) == 20
    assert not set(la.LABELED.split()) & set(la.TEST.split())


def test_la_incomplete_download_is_warned_of(raw, tmp_path, capsys):
    for scan in SCANS[1:6]:
        write_image(numbered(1), tmp_path / "in" / scan / "lgemri.nrrd")
        write_image((255 * (numbered(1) > 150)).astype(np.uint8), tmp_path / "in" / scan / "laendo.nrrd")
    (tmp_path / "in" / SCANS[1] / "laendo.nrrd").unlink()
    assert convert("LA2018", tmp_path / "in", "--labeled", 1) == 1
    error = capsys.readouterr().err.splitlines()
    assert f"Warning: 31 of the 36 names in the published lists are not in the download, such as {SCANS[0]}" in error[0]
    missing = tmp_path / "in" / SCANS[1] / "laendo.nrrd"
    assert error[1:] == [f"Error: {missing}, the label of case {SCANS[1]}, is missing"]


def test_la_as_h5_has_the_axes_of_nrrd_and_its_own_lists(raw, tmp_path):
    folder = tmp_path / "data"
    order = [SCANS[9], SCANS[0], SCANS[4], SCANS[30]]
    for i, scan in enumerate(order):
        array = numbered(i, (4, 6, 5)).astype(np.float32)
        # x, y, z, as the nrrd package reads them.
        write_h5(
            folder / "2018LA_Seg_Training Set" / scan / "mri_norm2.h5", image=array.T, label=(array > 99).T.astype("u1")
        )
    (folder / "train.list").write_text("\n".join(order[:3]) + "\n")
    (folder / "test.list").write_text(order[3])
    assert convert("LA2018", folder, "--labeled", 1) == 0
    dataset = raw / "Dataset501_LA2018"
    assert names(dataset / "labelsTr") == [SCANS[9]] and names(dataset / "imagesUn") == sorted(order[1:3])
    assert names(dataset / "labelsTs") == [SCANS[30]]
    image = read(dataset / "imagesTr" / f"{SCANS[9]}_0000.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(image), numbered(0).astype(np.float32))
    assert image.GetSpacing() == pytest.approx((0.625,) * 3)
    assert np.array_equal(voxels(dataset / "labelsTr" / f"{SCANS[9]}.nii.gz"), numbered(0) > 99)


def test_h5_files_that_cannot_be_read(raw, tmp_path, capsys, monkeypatch):
    for scan in SCANS[:3]:
        write_h5(tmp_path / "in" / scan / "mri_norm2.h5", image=numbered(1), label=numbered(1) > 99)
    file = tmp_path / "in" / SCANS[1] / "mri_norm2.h5"
    write_h5(file, image=numbered(1).astype(float), label=numbered(1) / 3.0)
    write_h5(tmp_path / "in" / SCANS[2] / "mri_norm2.h5", image=np.full((3, 3, 3), np.nan), label=np.ones((3, 3, 3)))
    assert convert("LA2018", tmp_path / "in") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(errors) == 2 and str(file) in "".join(errors) and "has fractions" in "".join(errors)
    assert f"{SCANS[2]}/mri_norm2.h5 has voxels that are NaN" in "".join(errors)
    file.write_bytes(b"not HDF5")
    write_h5(tmp_path / "in" / SCANS[2] / "mri_norm2.h5", image=numbered(1))
    assert convert("LA2018", tmp_path / "in") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(errors) == 2 and all("cannot be read" in line for line in errors)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert convert("LA2018", tmp_path / "in") == 1
    assert "needs h5py. Run pip install nnunet-semiseg[convert]" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- ACDC

# ED and ES of patient 90 are not in the order of the frames.
PATIENTS = {"patient099": (1, 3), "patient038": (1, 2), "patient090": (4, 2), "patient028": (1, 3),
            "patient011": (1, 2), "patient101": (1, 2)}  # fmt: skip


def write_acdc(folder):
    for patient, phases in PATIENTS.items():
        number = int(patient[-3:])
        place = folder / ("training" if number <= 100 else "testing") / patient
        frames = [numbered(100 * number + t).astype(np.int16) for t in range(1, 6)]
        for phase in phases:
            stem = place / f"{patient}_frame{phase:02d}"
            write_image(frames[phase - 1], stem.with_name(stem.name + ".nii.gz"), (1.5, 1.25, 10.0))
            write_image(frames[phase - 1] % 4, stem.with_name(stem.name + "_gt.nii.gz"), (1.5, 1.25, 10.0))
        volumes = []
        for frame in frames:
            volumes.append(sitk.GetImageFromArray(frame))
            volumes[-1].SetSpacing((1.5, 1.25, 10.0))
        sitk.WriteImage(sitk.JoinSeries(volumes), str(place / f"{patient}_4d.nii.gz"))
        (place / "Info.cfg").write_text(f"ED: {phases[0]}\nES: {phases[1]}\nGroup: DCM\nHeight: 184.0\nNbFrame: 5\n")
        (place / "MANDATORY_CITATION.md").write_text("cite")
    return folder


def test_acdc_as_the_challenge_gives_it(raw, tmp_path, capsys):
    folder = write_acdc(tmp_path / "ACDC" / "database")
    assert convert("ACDC", folder, "--labeled", 2, "--cine", "--link") == 0
    dataset = raw / "Dataset501_ACDC"
    # In the order of the published list, 99 and 38 are the first; each with both phases.
    labeled = ["patient038_ED", "patient038_ES", "patient099_ED", "patient099_ES"]
    assert names(dataset / "labelsTr") == sorted([*labeled, "patient028_ED", "patient028_ES"])
    assert folds(raw, "Dataset501_ACDC") == [{"train": labeled, "val": ["patient028_ED", "patient028_ES"]}]
    assert names(dataset / "labelsTs") == names(dataset / "imagesTs") == ["patient011_ED", "patient011_ES"]
    unlabeled = ["patient038_frame03", "patient038_frame04", "patient038_frame05", "patient090_ED", "patient090_ES",
                 "patient090_frame01", "patient090_frame03", "patient090_frame05", "patient099_frame02",
                 "patient099_frame04", "patient099_frame05"]  # fmt: skip
    assert names(dataset / "imagesUn") == unlabeled
    # Frames are counted from 1, and ED is what Info.cfg says.
    for case, frame in (("patient090_ED", 4), ("patient090_ES", 2), ("patient090_frame03", 3)):
        image = read(dataset / "imagesUn" / f"{case}_0000.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(image), numbered(9000 + frame))
        assert image.GetSpacing() == pytest.approx((1.5, 1.25, 10.0))
        assert (dataset / "imagesUn" / f"{case}_0000.nii.gz").is_symlink() == ("frame" not in case)
    assert np.array_equal(voxels(dataset / "labelsTr" / "patient099_ES.nii.gz"), numbered(9903) % 4)
    assert (dataset / "labelsTr" / "patient099_ES.nii.gz").is_symlink()
    assert "left out, such as patient101_ED" in capsys.readouterr().out
    with open(dataset / "conversion.csv", newline="") as stream:
        assert {row["patient"] for row in csv.DictReader(stream)} == set(PATIENTS) - {"patient101"}


def test_acdc_lists_are_those_of_the_papers():
    assert [list(acdc.SPLITS.values()).count(split) for split in ("train", "validation", "test")] == [70, 10, 20]
    assert set(acdc.SPLITS) == {f"patient{i:03d}" for i in range(1, 101)}
    assert list(acdc.SPLITS)[:7] == [f"patient{i:03d}" for i in (99, 38, 50, 100, 58, 21, 49)]


def test_acdc_with_missing_parts(raw, tmp_path, capsys):
    folder = write_acdc(tmp_path / "in") / "training" / "patient099"
    for file, message in (
        ("patient099_frame03_gt.nii.gz", "patient099_frame03_gt.nii.gz, the label of case patient099_ES, is missing"),
        ("patient099_frame03.nii.gz", f"patient099_frame03.nii.gz is missing, although {folder / 'Info.cfg'} says"),
        ("patient099_4d.nii.gz", "patient099_4d.nii.gz is missing or damaged"),
    ):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        assert convert("ACDC", tmp_path / "in", "--cine") == 1
        assert message in capsys.readouterr().err
        (folder / file).write_bytes(content)
    (folder / "Info.cfg").write_text("ED: 1\nGroup: DCM\n")
    assert convert("ACDC", tmp_path / "in") == 1
    assert f"{folder / 'Info.cfg'} does not say which frame is ES" in capsys.readouterr().err
    assert not list(raw.glob("Dataset*"))


def test_acdc_as_h5_volumes_and_slices(raw, tmp_path, capsys):
    data = tmp_path / "ACDC" / "data"
    for i, (patient, frame) in enumerate((p, f) for p in ("patient050", "patient002") for f in (1, 2)):
        array = numbered(i, (11, 6, 5))
        image, label = array / 255, array % 4
        if patient == "patient002":
            write_h5(data / f"{patient}_frame0{frame}.h5", image=image, label=label, scribble=label * 0 + 4)
        for z in range(11):
            file = data / "slices" / f"{patient}_frame0{frame}_slice_{z + 1}.h5"
            write_h5(file, image=image[z], label=label[z], scribble=label[z])
    assert convert("ACDC", tmp_path / "ACDC") == 0
    dataset = raw / "Dataset501_ACDC"
    assert names(dataset / "labelsTr") == ["patient002_ED", "patient002_ES", "patient050_ED", "patient050_ES"]
    assert folds(raw, "Dataset501_ACDC")[0]["val"] == ["patient002_ED", "patient002_ES"]
    # Slice 10 comes after slice 9, not after slice 1.
    for i, case in enumerate(("patient050_ED", "patient050_ES", "patient002_ED", "patient002_ES")):
        image = read(dataset / "imagesTr" / f"{case}_0000.nii.gz")
        assert np.allclose(sitk.GetArrayFromImage(image), numbered(i, (11, 6, 5)) / 255)
        assert image.GetSpacing() == pytest.approx((1.5, 1.5, 10.0))
        assert np.array_equal(voxels(dataset / "labelsTr" / f"{case}.nii.gz"), numbered(i, (11, 6, 5)) % 4)
    assert "4 x nominal spacing of 1.5 x 1.5 x 10 mm" in capsys.readouterr().out
    (data / "slices" / "patient050_frame01_slice_4.h5").unlink()
    assert convert("ACDC", tmp_path / "ACDC", "-d", 502) == 1
    assert "lacks slice 4 of patient050, frame 1" in capsys.readouterr().err
    assert convert("ACDC", tmp_path / "ACDC", "-d", 502, "--cine") == 1
    assert "Only that has all frames" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- Pancreas-CT

SHAPE = (24, 40, 36)


def abdomen(seed):
    """(CT in HU, mask) of an ellipsoid that is off the center, between others of other intensities."""
    random = np.random.RandomState(seed)
    position = np.stack(np.meshgrid(*[np.arange(s) / s for s in SHAPE], indexing="ij"), -1)
    image = np.full(SHAPE, -100.0)
    masks = []
    for center, hu in (((0.62, 0.4, 0.64), 90), ((0.3, 0.7, 0.3), 60), ((0.3, 0.3, 0.6), -20), ((0.7, 0.6, 0.3), 300)):
        axes = random.uniform(0.1, 0.2, 3)
        masks.append((((position - center + random.uniform(-0.03, 0.03, 3)) / axes) ** 2).sum(-1) < 1)
        image[masks[-1]] = hu
    return (image + random.normal(0, 15, SHAPE)).astype(np.int16), masks[0].astype(np.uint8)


@kept_language()
def write_series(array, folder, seed=0):
    """A DICOM series whose file names are in another order than the positions."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    order = np.random.RandomState(seed).permutation(len(array))
    for z, slice_voxels in enumerate(array):
        image = sitk.GetImageFromArray(slice_voxels)
        image.SetSpacing((0.8, 0.8))
        for tag, value in {
            "0008|0060": "CT", "0008|0018": f"1.2.3.{seed}.1.{z + 1}", "0020|000d": f"1.2.3.{seed}",
            "0020|000e": f"1.2.3.{seed}.1", "0020|0013": str(z + 1), "0020|0032": f"-10\\-20\\{1.5 * z - 100}",
            "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "1.5",
        }.items():  # fmt: skip
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"1-{order[z] + 1:03d}.dcm"))
        writer.Execute(image)


def write_pancreas(folder, numbers):
    for number in numbers:
        image, mask = abdomen(number)
        name = f"PANCREAS_{number:04d}"
        write_series(image, folder / "Pancreas-CT" / name / "11-24-2015-Pancreas" / "Pancreas-99667", number)
        # Rows in the file are those of the DICOM series, but the header says that they count to the front.
        affine = np.diag([-0.8, 0.8, 1.5, 1])
        file = folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz"
        file.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask.T.astype(np.float32), affine), file)


def test_pancreas_labels_are_put_into_the_orientation_of_the_series(raw, tmp_path, capsys):
    folder = tmp_path / "in"
    write_pancreas(folder, (1, 2, 13, 25, 63, 64))
    # Withdrawn: with images in old copies, with an empty folder in others, with the label in all.
    (folder / "Pancreas-CT" / "PANCREAS_0070").mkdir()
    labels = folder / "TCIA_pancreas_labels-02-05-2017"
    (labels / "label0070.nii.gz").write_bytes((labels / "label0025.nii.gz").read_bytes())
    # One that is stored in another way.
    mask = abdomen(2)[1]
    nibabel.save(nibabel.Nifti1Image(np.flip(mask, (0, 1)).T.copy(), np.eye(4)), labels / "label0002.nii.gz")
    assert convert("PancreasCT", folder, "--labeled", 2) == 0
    dataset = raw / "Dataset501_PancreasCT"
    assert names(dataset / "labelsTr") == ["PANCREAS_0001", "PANCREAS_0002"]
    assert names(dataset / "imagesUn") == ["PANCREAS_0013", "PANCREAS_0063"]
    assert names(dataset / "labelsTs") == ["PANCREAS_0064"]
    for part, number in (("Tr", 1), ("Tr", 2), ("Ts", 64)):
        image = read(dataset / f"images{part}" / f"PANCREAS_{number:04d}_0000.nii.gz")
        label = read(dataset / f"labels{part}" / f"PANCREAS_{number:04d}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(image), abdomen(number)[0])
        assert np.array_equal(sitk.GetArrayFromImage(label), abdomen(number)[1])
        for grid in (image, label):
            assert grid.GetSpacing() == pytest.approx((0.8, 0.8, 1.5))
            assert grid.GetOrigin() == pytest.approx((-10, -20, -100))
    printed = capsys.readouterr().out
    assert "2 x label rows as in the DICOM; its header ignored" in printed
    assert "1 x label flipped along z and y; its header ignored" in printed


FLIPS = [axes for count in range(4) for axes in combinations(range(3), count)]


@pytest.mark.parametrize("axes", FLIPS)
@pytest.mark.parametrize("contrast", [1, -1, 0.1])
def test_orientation_is_found_for_each_flip_and_any_contrast(axes, contrast):
    image, mask = abdomen(5)
    scores = pancreas.orientation_scores(contrast * image, np.flip(mask, axes) > 0)
    assert set(scores) == set(FLIPS)
    assert max(scores, key=scores.get) == axes
    assert scores[axes] > 1.3 * sorted(scores.values())[-2]


def test_orientation_score_is_the_mean_squared_cosine():
    # A plane image gradient along x: the score of a ball is the mean squared cosine over the sphere, 1/3, of a slab
    # that is perpendicular to it 1, of one that is parallel to it 0.
    z, y, x = np.meshgrid(*[np.arange(40.0)] * 3, indexing="ij")
    ball = (x - 20) ** 2 + (y - 19) ** 2 + (z - 21) ** 2 < 12**2
    for mask, expected in ((ball, 1 / 3), (abs(x - 20) < 5, 1), (abs(y - 20) < 5, 0)):
        scores = pancreas.orientation_scores(7 * x, mask)
        assert list(scores.values()) == pytest.approx([expected] * 8, abs=0.02)


def test_pancreas_label_of_another_case_and_broken_series(raw, tmp_path, capsys):
    write_pancreas(tmp_path / "in", (1, 2, 3))
    labels = tmp_path / "in" / "TCIA_pancreas_labels-02-05-2017"
    random = np.random.RandomState(1).rand(*SHAPE) > 0.9
    nibabel.save(nibabel.Nifti1Image(random.T.astype(np.uint8), np.eye(4)), labels / "label0001.nii.gz")
    nibabel.save(nibabel.Nifti1Image(abdomen(2)[1][1:].T.copy(), np.eye(4)), labels / "label0002.nii.gz")
    series = next((tmp_path / "in" / "Pancreas-CT" / "PANCREAS_0003").rglob("*.dcm")).parent
    (series / f"1-{np.random.RandomState(3).permutation(SHAPE[0])[10] + 1:03d}.dcm").unlink()
    assert convert("PancreasCT", tmp_path / "in") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(errors) == 3
    for error, file, message in zip(
        sorted(errors, key=lambda line: "label0002" in line or 2 * (str(series) in line)),
        (labels / "label0001.nii.gz", labels / "label0002.nii.gz", series),
        ("does not fit", "has the size (36, 40, 23)", "mm apart, the others 1.5 mm"),
    ):
        assert str(file) in error and message in error
    (labels / "label0002.nii.gz").unlink()
    assert convert("PancreasCT", tmp_path / "in") == 1
    assert "PANCREAS_0002 has no label0002.nii.gz" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- York


def inside(x, y, polygon):
    """Whether a ray to the right crosses the polygon an odd number of times."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]]):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2


def contour(center, radius):
    """65 rows (x, y) as MATLAB counts them: endocardium, zeros, epicardium."""
    angle = np.arange(32) / 32 * 2 * np.pi
    shape = np.stack([np.cos(angle), 1.4 * np.sin(angle)], 1) + 0.013
    return np.concatenate([center + radius * shape, [[0, 0]], center + 1.5 * radius * shape])


def write_york(folder, number, depth=3, frames=2):
    cells = np.empty((depth, frames), dtype=object)
    for z in range(depth):
        for t in range(frames):
            # The last slice has no contour, the last frame of patient 2 has none at all.
            drawn = z < depth - 1 and not (number == 2 and t == frames - 1)
            cells[z, t] = contour((14.2 + z, 10.1), 4 + t) if drawn else np.array([[-99999]])
    sequence = np.random.RandomState(number).randint(0, 2000, (24, 30, depth, frames)).astype(float)
    for kind in ("mrimages", "manual_seg"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    savemat(folder / "mrimages" / f"sol_yxzt_pat{number}.mat", {"sol_yxzt": sequence})
    savemat(folder / "manual_seg" / f"manual_seg_32points_pat{number}.mat", {"manual_seg_32points": cells})
    return sequence


def test_york_contours_become_masks(raw, tmp_path):
    sequences = {number: write_york(tmp_path / "in", number) for number in range(1, 11)}
    assert convert("York", tmp_path / "in", "--labeled", 3) == 0
    dataset = raw / "Dataset501_York"
    cases = {part: names(dataset / f"images{part}") for part in ("Tr", "Un", "Ts")}
    assert sorted(cases["Tr"] + cases["Un"] + cases["Ts"]) == [
        f"pat{p:02d}_t{t:02d}" for p in range(1, 11) for t in (1, 2)
    ]
    # By patient: 2 of 10 for testing, 3 labeled, and all time points of a patient together.
    patients = {part: {name[:5] for name in cases[part]} for part in cases}
    assert len(patients["Ts"]) == 2 and len(patients["Tr"]) == 3
    assert not patients["Ts"] & (patients["Tr"] | patients["Un"])
    for fold in folds(raw, "Dataset501_York"):
        assert not {name[:5] for name in fold["train"]} & {name[:5] for name in fold["val"]}
    # The frame without any contour has no label.
    part = next(part for part in cases if "pat02_t02" in cases[part])
    assert not (dataset / f"labels{part}" / "pat02_t02.nii.gz").exists()

    for case in cases["Tr"][:2]:
        number, frame = int(case[3:5]), int(case[7:9]) - 1
        image = voxels(dataset / "imagesTr" / f"{case}_0000.nii.gz")
        assert image.dtype == np.int16 and image.shape == (3, 24, 30)
        for z in range(3):
            assert np.array_equal(image[z], sequences[number][:, :, z, frame])
        expected = np.zeros((3, 24, 30))
        for z in range(2):
            polygon = contour((14.2 + z, 10.1), 4 + frame)[:32].tolist()
            for row in range(24):
                for column in range(30):
                    expected[z, row, column] = inside(column + 1, row + 1, polygon)
        assert expected.sum() > 50
        assert np.array_equal(voxels(dataset / "labelsTr" / f"{case}.nii.gz"), expected)


@pytest.mark.parametrize(
    "contours, message",
    [
        ([np.zeros((1, 1))] * 2, "contours of 2 slices, but the images have 3"),
        ([np.full((1, 1), -99999)] * 2 + [contour((40, 10), 5)], "the contour of slice 3 is not 32 points"),
        ([np.ones((20, 2))] * 3, "the contour of slice 1 is not 32 points"),
        ([np.ones((65, 3))] * 3, "the contour of slice 1 is not 32 points"),
        ([np.full((65, 2), np.nan)] * 3, "the contour of slice 1 is not 32 points"),
    ],
)
def test_york_contours_that_make_no_sense(tmp_path, contours, message):
    with pytest.raises(ValueError, match=f"pat1.mat.* {message}"):
        york.endocardium(contours, (3, 24, 30), tmp_path / "pat1.mat")


def test_york_files_that_are_missing_or_damaged(raw, tmp_path, capsys):
    for number in range(1, 4):
        write_york(tmp_path / "in", number)
    file = tmp_path / "in" / "mrimages" / "sol_yxzt_pat3.mat"
    file.write_bytes(file.read_bytes()[:-2000])
    assert convert("York", tmp_path / "in") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert errors and all(str(file) in line and "cannot be read" in line for line in errors)
    contours = tmp_path / "in" / "manual_seg" / "manual_seg_32points_pat2.mat"
    contours.unlink()
    assert convert("York", tmp_path / "in") == 1
    assert "sol_yxzt_pat2.mat has no contours: manual_seg_32points_pat2.mat is missing" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- FLARE


def organs(seed, missing=(), tumor=False):
    label = np.random.RandomState(seed).permutation(np.arange(120) % 14).reshape(4, 6, 5).astype(np.uint8)
    label[np.isin(label, missing)] = 0
    if tumor:
        label[0, 0, :3] = 14
    return label


def zipped(folder):
    """folder.zip in place of the folder, as the challenge gives it."""
    with zipfile.ZipFile(folder.with_name(folder.name + ".zip"), "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.relative_to(folder.parent))
            file.unlink()
    folder.rmdir()


def test_flare22_with_archives_as_the_challenge_gives_it(raw, tmp_path, capsys):
    training, tuning = tmp_path / "FLARE2022" / "Training", tmp_path / "FLARE2022" / "Tuning"
    labeled = training / "FLARE22_LabeledCase50"
    for i in range(1, 4):
        write_image(
            numbered(i).astype(np.int16), labeled / "images" / f"FLARE22_Tr_{i:04d}_0000.nii.gz", (0.8, 0.8, 2.5)
        )
        write_image(organs(i), labeled / "labels" / f"FLARE22_Tr_{i:04d}.nii.gz", (0.8, 0.8, 2.5))
        part = training / f"FLARE22_UnlabeledCase{1 if i < 3 else 3}-{2 if i < 3 else 4}"
        write_image(numbered(10 + i).astype(np.int16), part / f"Case_{i:05d}_0000.nii.gz")
    # Direction cosines that are not quite at right angles, which ITK refuses to read.
    affine = np.diag([-0.8, -0.8, 2.5, 1.0])
    affine[:3, :3] = np.array([[0.94, -0.34, 0], [0.34, 0.94, 0.01], [0, 0, 1]]) @ affine[:3, :3]
    odd = part.with_name("FLARE22_UnlabeledCase3-4") / "Case_00004_0000.nii.gz"
    nifti = nibabel.Nifti1Image(numbered(20).astype(np.int16).T, None)
    nifti.header.set_zooms((0.8, 0.8, 2.5))
    nifti.set_sform(affine, code=1)
    nifti.set_qform(None, code=0)
    nibabel.save(nifti, odd)
    with pytest.raises(RuntimeError, match="orthonormal"):
        read(odd)
    for folder in (labeled / "images", labeled / "labels", training / "FLARE22_UnlabeledCase1-2"):
        zipped(folder)
    for i in (1, 2):
        write_image(numbered(30 + i).astype(np.int16), tuning / "images" / f"FLARETs_{i:04d}_0000.nii.gz")
        # Other cases under the same names, without labels.
        write_image(numbered(40 + i).astype(np.int16), tuning.with_name("Testing") / f"FLARETs_{i:04d}_0000.nii.gz")
    write_image(organs(7), tuning / "labels" / "FLARETs_0001.nii.gz")

    assert convert("FLARE22", tmp_path / "FLARE2022", "--labeled", 2) == 0
    dataset = raw / "Dataset501_FLARE22"
    assert names(dataset / "labelsTr") == ["FLARE22_Tr_0001", "FLARE22_Tr_0002"]
    assert names(dataset / "imagesUn") == ["Case_00001", "Case_00002", "Case_00003", "Case_00004", "FLARE22_Tr_0003"]
    assert names(dataset / "imagesTs") == ["FLARETs_0001", "FLARETs_0002"]
    assert names(dataset / "labelsTs") == ["FLARETs_0001"]
    assert np.array_equal(voxels(dataset / "imagesTs" / "FLARETs_0002_0000.nii.gz"), numbered(32))
    assert np.array_equal(voxels(dataset / "labelsTr" / "FLARE22_Tr_0002.nii.gz"), organs(2))
    labels = json.loads((dataset / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, **{organ: i + 1 for i, organ in enumerate(ORGANS)}}
    assert labels["right kidney"] == 2 and labels["left kidney"] == 13 and labels["esophagus"] == 10
    # Repaired: the same voxels, in the place where the header had them.
    image = read(dataset / "imagesUn" / "Case_00004_0000.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(image), numbered(20))
    corner = image.TransformIndexToPhysicalPoint((4, 5, 3))
    assert np.diag([-1, -1, 1]) @ corner == pytest.approx(affine[:3, :3] @ (4, 5, 3), abs=0.05)
    assert "1 x direction cosines of Case_00004_0000.nii.gz made orthonormal" in capsys.readouterr().out
    # The download is as it was.
    assert sorted(f.name for f in labeled.iterdir()) == ["images.zip", "labels.zip"]


def test_flare22_without_a_label(raw, tmp_path, capsys):
    for i in range(1, 3):
        write_image(numbered(i), tmp_path / "in" / "images" / f"FLARE22_Tr_{i:04d}_0000.nii.gz")
    write_image(organs(1), tmp_path / "in" / "labels" / "FLARE22_Tr_0001.nii.gz")
    assert convert("FLARE22", tmp_path / "in") == 1
    assert "has FLARE22_Tr_0002 only as an image or only as a label" in capsys.readouterr().err


def test_flare23_uses_labels_with_all_organs_and_ignores_tumors(raw, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "MICCAI-FLARE23"
    labels = {1: organs(1), 2: organs(2, missing=(2, 9, 13)), 3: organs(3, tumor=True)}
    for i, label in labels.items():
        write_image(numbered(i).astype(np.int16), folder / "imagesTr2200" / f"FLARE23_{i:04d}_0000.nii.gz")
        write_image(label, folder / "labelsTr2200" / f"FLARE23_{i:04d}.nii.gz")
    # Without _0000, as some copies have it.
    write_image(numbered(4).astype(np.int16), folder / "unlabeledTr1800" / "FLARE23_2201.nii.gz")
    write_image(numbered(5).astype(np.int16), folder / "unlabeledTr1800" / "FLARE23_2202_0000.nii.gz")
    write_image(numbered(6).astype(np.int16), folder / "validation" / "FLARE23Ts_0001_0000.nii.gz")
    write_image(organs(6), folder / "validation-gt" / "FLARE23Ts_0001.nii.gz")
    assert convert("FLARE23", folder) == 0
    dataset = raw / "Dataset501_FLARE23"
    assert names(dataset / "labelsTr") == ["FLARE23_0001", "FLARE23_0003"]
    assert names(dataset / "imagesUn") == ["FLARE23_0002", "FLARE23_2201", "FLARE23_2202"]
    assert names(dataset / "labelsTs") == names(dataset / "imagesTs") == ["FLARE23Ts_0001"]
    assert np.array_equal(voxels(dataset / "labelsTr" / "FLARE23_0003.nii.gz"), labels[3])
    assert json.loads((dataset / "dataset.json").read_text())["labels"]["ignore"] == 14
    # All labels that cannot be read are named, and no other is read again.
    bad = [folder / "labelsTr2200" / f"FLARE23_{i:04d}.nii.gz" for i in (2, 3)]
    good = bad[1].read_bytes()
    for file in bad:
        file.write_bytes(b"no gzip")
    assert convert("FLARE23", folder, "-d", 502) == 1
    error = capsys.readouterr().err
    assert all(f"Error: {file} cannot be read" in error for file in bad) and "2 of 3 labels cannot be read" in error
    bad[1].write_bytes(good)
    read_again = []
    monkeypatch.setattr(flare23, "read_volume", lambda file, notes: read_again.append(file) or read_volume(file, notes))
    assert convert("FLARE23", folder, "-d", 502) == 1
    assert read_again == bad
    (folder / "imagesTr2200" / "FLARE23_0001_0000.nii.gz").unlink()
    assert convert("FLARE23", folder, "-d", 502) == 1
    assert "FLARE23_0001.nii.gz has no image FLARE23_0001_0000.nii.gz" in capsys.readouterr().err


def test_generic_reads_dicom_series(raw, tmp_path, capsys):
    image, mask = abdomen(1)
    write_series(image, tmp_path / "in" / "images" / "case_a", 1)
    # With folders for study and series, as archives have them.
    series = tmp_path / "in" / "images" / "case_b" / "study" / "series_1"
    write_series(image[::-1], series, 2)
    label = sitk.GetImageFromArray(mask)
    label.CopyInformation(
        sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "in" / "images" / "case_a")))
    )
    (tmp_path / "in" / "labels").mkdir()
    sitk.WriteImage(label, str(tmp_path / "in" / "labels" / "case_a.nrrd"))
    assert convert("generic", tmp_path / "in", "--labels", "organ=1", "--channels", "CT") == 0
    dataset = raw / "Dataset501_generic"
    assert np.array_equal(voxels(dataset / "imagesTr" / "case_a_0000.nii.gz"), image)
    assert np.array_equal(voxels(dataset / "imagesUn" / "case_b_0000.nii.gz"), image[::-1])
    assert np.array_equal(voxels(dataset / "labelsTr" / "case_a.nii.gz"), mask)
    write_series(image, series.with_name("series_2"), 3)
    assert convert("generic", tmp_path / "in", "-d", 502, "--labels", "organ=1", "--channels", "CT") == 1
    error = capsys.readouterr().err
    assert f"{series.parents[1]} has 2 folders with DICOM series, such as {series}. Keep one" in error
