"""Images and label maps through nnU-Net's readers: every format, in every command."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import make_case, write_image
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from PIL import Image

from nnunet_semiseg import cli
from nnunet_semiseg.datasets import CaseError, orientation
from nnunet_semiseg.segmentations import (
    find_reader,
    geometry_difference,
    read_labels,
    read_voxels,
    write_labels,
    write_map,
)

# 10 x 6 x 5 voxels, 1500 mm3 if they are 5 x 1 x 1 mm.
BAR = np.zeros((14, 20, 20), dtype=np.uint8)
BAR[2:12, 3:9, 3:8] = 1
# Every axis and value is of its own.
LABELS = np.random.RandomState(0).randint(0, 3, (4, 5, 6)).astype(np.uint8)
TURNED = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 30], [0, 0, 0, 1]])


def reader_of(name):
    return recursive_find_reader_writer_by_name(name)


def nifti(file, array=LABELS, affine=TURNED):
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.T, affine), file)


def itk(file, array=LABELS):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 1.5, 3.0)[: array.ndim])
    image.SetOrigin((1.0, 2.0, 3.0)[: array.ndim])
    sitk.WriteImage(image, str(file))


def tiff3d(file, array=LABELS, spacing=(5.0, 1.0, 1.0)):
    file.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(file, array)
    if spacing:
        name = file.stem[:-5] if file.stem.endswith("_0000") else file.stem
        file.with_name(f"{name}.json").write_text(json.dumps({"spacing": spacing}))


def natural(file, **options):
    Image.fromarray(LABELS[0]).save(file, **options)


FORMATS = {
    "png": ("NaturalImage2DIO", "x.png", natural, (1, 1)),
    "png with resolution": ("NaturalImage2DIO", "x.png", lambda f: natural(f, dpi=(50, 50)), (1, 1)),
    "tif": ("NaturalImage2DIO", "x.tif", natural, (1, 1)),
    "tif with resolution": ("NaturalImage2DIO", "x.tif", lambda f: natural(f, dpi=(50, 50)), (1, 1)),
    "bmp": ("NaturalImage2DIO", "x.bmp", natural, (1, 1)),
    "3D tif": ("Tiff3DIO", "x.tif", tiff3d, (5, 1, 1)),
    "3D tiff": ("Tiff3DIO", "x.tiff", tiff3d, (5, 1, 1)),
    "nrrd": ("SimpleITKIO", "x.nrrd", itk, (3, 1.5, 0.5)),
    "mha": ("SimpleITKIO", "x.mha", itk, (3, 1.5, 0.5)),
    "2D mha": ("SimpleITKIO", "x.mha", lambda f: itk(f, LABELS[0]), (1.5, 0.5)),
    "gipl": ("SimpleITKIO", "x.gipl", itk, (3, 1.5, 0.5)),
    "nii.gz": ("SimpleITKIO", "x.nii.gz", nifti, (3, 2, 1.5)),
    "nii": ("NibabelIO", "x.nii", nifti, (3, 2, 1.5)),
    "nii.gz, nibabel": ("NibabelIO", "x.nii.gz", nifti, (3, 2, 1.5)),
    "nii.gz, reoriented": ("NibabelIOWithReorient", "x.nii.gz", nifti, (3, 1.5, 2)),
    "nii.gz, ITK reoriented": ("SimpleITKIOWithReorient", "x.nii.gz", nifti, (3, 1.5, 2)),
}
# The files' ending alone leads to another reader, which reads the same places.
BY_NAME = ("nii.gz, reoriented", "nii.gz, ITK reoriented")


@pytest.mark.parametrize("kind", FORMATS)
def test_labels_and_maps_are_read_and_written_as_nnunet_does(tmp_path, kind):
    name, file, make, spacing = FORMATS[kind]
    reader = reader_of(name)
    file = tmp_path / file
    make(file)
    expected, properties = reader().read_seg(str(file))
    for given in (reader,) if kind in BY_NAME else (reader, None):
        labels, geometry = read_labels(file, reader=given)
        assert labels.dtype == np.uint8 and np.array_equal(labels, expected[0].reshape(labels.shape))
        assert labels.ndim == len(spacing) and geometry.warning is None
        np.testing.assert_allclose(geometry.spacing, spacing, rtol=1e-6)
        np.testing.assert_allclose(geometry.properties["spacing"], properties["spacing"], rtol=1e-6)

        # What is written has the place of what was read, also for nnU-Net.
        out = tmp_path / str(given) / file.name
        write_labels(out, (labels > 1).astype(np.uint8), geometry)
        again, own = read_labels(out, frozenset({0, 1}), given)
        assert np.array_equal(again, labels > 1) and geometry_difference(geometry, own) is None
        seg, of_written = reader().read_seg(str(out))
        assert np.array_equal(seg, expected > 1)
        np.testing.assert_allclose(of_written["spacing"], properties["spacing"], rtol=1e-6)

        shares = np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape)
        ending = {".png": ".tif", ".bmp": ".tif"}.get(file.suffix, "".join(file.suffixes))
        out = tmp_path / str(given) / f"map{ending}"
        write_map(out, shares, geometry)
        read, own = read_voxels(out, given)
        assert np.array_equal(read[0], shares) and geometry_difference(geometry, own) is None
        assert not list(out.parent.glob(".unfinished*"))


def test_files_of_another_orientation_are_compared_where_they_are(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    nibabel.save(nibabel.as_closest_canonical(image), tmp_path / "b.nii.gz")
    for name in ("NibabelIOWithReorient", "SimpleITKIOWithReorient"):
        (a, first), (b, second) = (read_labels(tmp_path / f"{x}.nii.gz", reader=reader_of(name)) for x in "ab")
        assert np.array_equal(a, b) and geometry_difference(first, second) is None
        assert orientation(first.properties) == "RAS"
    (_, first), (_, second) = (read_labels(tmp_path / f"{x}.nii.gz", reader=reader_of("NibabelIO")) for x in "ab")
    assert geometry_difference(first, second).startswith("sizes")
    # Both libraries have the same positions.
    assert geometry_difference(first, read_labels(tmp_path / "a.nii.gz")[1]) is None


def test_one_bit_and_palette(tmp_path):
    mask = LABELS[0] > 0
    for ending in (".png", ".tif"):
        Image.fromarray(mask).save(tmp_path / f"bit{ending}")
        assert np.array_equal(read_labels(tmp_path / f"bit{ending}", frozenset({0, 1}))[0], mask)
    palette = Image.fromarray(LABELS[0]).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    with pytest.raises(CaseError, match="palette.png has several channels.*not a color or a palette"):
        read_labels(tmp_path / "palette.png")


def sheared(file, array=LABELS, origin=0.0):
    """Its direction cosines are rounded, which SimpleITK refuses."""
    affine = np.eye(4)
    affine[0, 1], affine[0, 3] = 0.02, origin
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.T, affine)
    image.set_qform(None, 0)
    image.set_sform(affine, 1)
    nibabel.save(image, file)


def test_a_geometry_that_simpleitk_refuses(tmp_path, capsys):
    labels = BAR
    sheared(tmp_path / "truth" / "x.nii.gz", labels)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "truth" / "x.nii.gz"))
    for member, shift in (("a", 0), ("b", 1)):
        sheared(tmp_path / member / "x.nii.gz", np.roll(labels, shift, 0))
    command = ["evaluate", "-g", str(tmp_path / "truth"), "-p", str(tmp_path / "b"), "--labels", "1", "-np", "1"]
    assert cli.main(command) == 0
    (record,) = json.loads((tmp_path / "b" / "evaluation.json").read_text())["metric_per_case"]
    assert record["metrics"]["1"]["HD"] == 1 and record["spacing"] == pytest.approx([1, 1, 1], rel=1e-3)
    score(tmp_path, "a", "b")
    written = nibabel.load(tmp_path / "scores" / "consensus" / "x.nii.gz")
    assert np.allclose(written.affine, nibabel.load(tmp_path / "a" / "x.nii.gz").affine)
    sheared(tmp_path / "b" / "x.nii.gz", labels, origin=5.0)
    assert cli.main(command) == 1
    assert "different geometry: origins (0, 0, 0) and (-5, 0, 0) mm" in capsys.readouterr().err


def score(folder, *members, options=()):
    from pseudo_label import cli as pseudo_label

    command = ["score", "-i", *(str(folder / m) for m in members), "-o", str(folder / "scores"), "-np", "1"]
    assert pseudo_label.main([*command, *map(str, options)]) == 0


def test_3d_tiff_is_evaluated_with_the_spacing_beside_it(tmp_path, capsys):
    tiff3d(tmp_path / "truth" / "x.tif", BAR)
    tiff3d(tmp_path / "prediction" / "x.tif", np.roll(BAR, 2, 0))
    command = ["evaluate", "-g", str(tmp_path / "truth"), "-p", str(tmp_path / "prediction"), "--labels", "1"]
    command += ["-np", "1"]
    assert cli.main(command) == 0
    result = json.loads((tmp_path / "prediction" / "evaluation.json").read_text())["metric_per_case"][0]
    assert result["spacing"] == [5, 1, 1] and result["metrics"]["1"]["HD"] == 10
    # The mantle of 8 of 10 slices, and not the ends.
    assert result["metrics"]["1"]["NSD"] == pytest.approx(0.84, abs=0.005)
    # As NIfTI with the same spacing, all numbers are the same.
    for name, labels in (("truth", BAR), ("prediction", np.roll(BAR, 2, 0))):
        write_image(labels, tmp_path / "nifti" / name / "x.nii.gz", (1.0, 1.0, 5.0))
    nifti_command = ["evaluate", "-g", str(tmp_path / "nifti" / "truth"), "-p", str(tmp_path / "nifti" / "prediction")]
    assert cli.main([*nifti_command, "--labels", "1", "-np", "1"]) == 0
    other = json.loads((tmp_path / "nifti" / "prediction" / "evaluation.json").read_text())["metric_per_case"][0]
    assert result["metrics"] == other["metrics"]
    # Without the files nnU-Net takes 1 mm, and so does this, with a warning.
    (tmp_path / "truth" / "x.json").unlink()
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert "different geometry: spacings 1 x 1 x 5 and 1 x 1 x 1 mm" in error or "1 x 1 x 1 and 1 x 1 x 5 mm" in error
    assert f"{tmp_path / 'truth' / 'x.json'} is missing" in error
    (tmp_path / "prediction" / "x.json").unlink()
    assert cli.main(command) == 0
    assert f"Warning: {tmp_path / 'truth' / 'x.json'} is missing" in capsys.readouterr().err
    (tmp_path / "truth" / "x.json").write_text('{"spacing": [5, 1]}')
    assert cli.main(command) == 1
    assert "x.json has the spacing [5, 1], not three positive numbers" in capsys.readouterr().err


def test_3d_tiff_through_score_select_and_pictures(tmp_path):
    from nnunet_semiseg.segmentations import Classes
    from pseudo_label import cli as pseudo_label
    from pseudo_label.pictures import case_picture

    for member, shift in (("a", 0), ("b", 0), ("c", 1)):
        tiff3d(tmp_path / member / "x.tif", np.roll(BAR, shift, 0))
    score(tmp_path, "a", "b", "c")
    scores = tmp_path / "scores"
    assert json.loads((scores / "cases" / "x.json").read_text())["classes"]["1"]["volume_mm3"] == 1500
    tiff3d(tmp_path / "images" / "x_0000.tif", BAR * 100)
    command = ["select", "-i", scores, "-o", tmp_path / "out", "--min-agreement", "0.9"]
    command += ["--annotate", "1", "--images", tmp_path / "images", "--threshold", "1"]
    assert pseudo_label.main([str(a) for a in command]) == 0
    assert json.loads((tmp_path / "out" / "annotate" / "imagesTr" / "x.json").read_text()) == {"spacing": [5, 1, 1]}
    assert json.loads((tmp_path / "out" / "annotate" / "labelsTr" / "x.json").read_text()) == {"spacing": [5, 1, 1]}
    command = command[:7] + ["--overwrite"]
    assert pseudo_label.main([str(a) for a in command]) == 0
    labels, geometry = read_labels(tmp_path / "out" / "labels" / "x.tif")
    assert geometry.spacing == (5, 1, 1) and (labels[2] == 2 * BAR[2]).all() and (labels[5] == BAR[5]).all()
    files = (tmp_path / "images" / "x_0000.tif", scores / "consensus" / "x.tif", scores / "disagreement" / "x.tif")
    assert case_picture(*files, Classes.from_labels([1])).startswith("data:image/png")


def test_probabilities_of_a_reader_that_reorients(tmp_path):
    """nnU-Net writes label maps in the image's orientation, and probabilities in that of the reader."""
    reader = reader_of("NibabelIOWithReorient")
    nifti(tmp_path / "image.nii.gz")
    labels, geometry = read_labels(tmp_path / "image.nii.gz", reader=reader)
    for i, member in enumerate("ab"):
        own = labels.copy()
        own[0, 0, 0] = i
        write_labels(tmp_path / member / "x.nii.gz", own, geometry)
        probabilities = np.moveaxis(np.eye(3, dtype=np.float32)[own], -1, 0)
        np.savez(tmp_path / member / "x.npz", probabilities=probabilities)
        (tmp_path / member / "plans.json").write_text('{"image_reader_writer": "NibabelIOWithReorient"}')
    assert find_reader(tmp_path / "a") is reader
    score(tmp_path, "a", "b")
    assert json.loads((tmp_path / "scores" / "score.json").read_text())["consensus"] == "mean"
    own = read_labels(tmp_path / "scores" / "consensus" / "x.nii.gz", reader=reader)[0]
    expected = labels.copy()
    expected[0, 0, 0] = 0
    assert np.array_equal(own, expected)


@pytest.mark.parametrize("name", ["SimpleITKIO", "NibabelIOWithReorient"])
def test_pictures_have_the_same_side_up_whatever_the_reader(tmp_path, name):
    from nnunet_semiseg.segmentations import Classes
    from pseudo_label.pictures import case_picture

    image, labels = make_case(3)
    pictures = []
    for affine in (np.diag([-1.0, -1.0, 2.0, 1.0]), np.diag([1.0, -1.0, 2.0, 1.0])):
        flip = slice(None, None, int(-affine[0, 0]))
        for kind, array in (("i", image), ("l", labels), ("d", np.zeros_like(image))):
            nifti(tmp_path / f"{kind}.nii.gz", array[:, :, flip], affine)
        files = [tmp_path / f"{kind}.nii.gz" for kind in "ild"]
        pictures.append(case_picture(*files, Classes.from_labels([1, 2]), reader_of(name)))
    assert pictures[0] == pictures[1]


# ------------------------------------------------------------------------------------------- datasets of other readers


@pytest.fixture
def own(prepared, work, tmp_path, monkeypatch):
    """``own(reader, ending)``: raw and preprocessed folders of a planned dataset, as if it had another reader."""
    name = prepared("labels")

    def make(reader, ending=".nii.gz", channels=1):
        for kind in ("raw", "preprocessed"):
            shutil.copytree(work / kind / name, tmp_path / kind / name)
            monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
        raw, preprocessed = tmp_path / "raw" / name, tmp_path / "preprocessed" / name
        plans = json.loads((preprocessed / "nnUNetPlans_cpu.json").read_text())
        configuration = plans["configurations"]["3d_fullres"]
        for key in ("normalization_schemes", "use_mask_for_norm"):
            configuration[key] = configuration[key] * channels
        properties = plans["foreground_intensity_properties_per_channel"]
        plans["foreground_intensity_properties_per_channel"] = {str(i): properties["0"] for i in range(channels)}
        change(preprocessed / "nnUNetPlans_cpu.json", **{**plans, "image_reader_writer": reader})
        for folder in (raw, preprocessed):
            names = {str(i): f"MRI {i}" for i in range(channels)}
            change(folder / "dataset.json", file_ending=ending, channel_names=names)
        return raw, preprocessed

    return make


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def preprocess():
    return cli.main(["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "3d_fullres", "-np", "1", "--overwrite"])


def doctor(capsys):
    capsys.readouterr()
    cli.main(["doctor", "-d", "801"])
    return capsys.readouterr().out


def turned(file, seed):
    """Of an unlabeled case, in the orientation RAS."""
    nifti(file, make_case(seed)[0], np.eye(4))


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient", "NibabelIO"])
def test_only_a_reader_that_does_not_reorient_warns_of_orientation(own, capfd, reader):
    raw, _ = own(reader)
    turned(raw / "imagesUn" / "odd_0000.nii.gz", 5)
    warned = "Reorient" not in reader
    assert ("imagesUn/odd: orientation RAS" in doctor(capfd)) is warned
    assert preprocess() == 0
    assert ("odd: orientation RAS, the labeled cases are LPS" in capfd.readouterr().err) is warned


def test_spacings_beside_3d_tiffs_are_part_of_the_images(own, capfd):
    raw, preprocessed = own("Tiff3DIO", ".tif")
    as_tiffs(raw)
    tiff3d(raw / "imagesUn" / "cell6_0000.tif", make_case(6)[0], (2.0, 1.0, 1.0))
    (raw / "imagesUn" / "unl_01.json").unlink()
    (raw / "imagesTr" / "lab_01.json").unlink()
    printed = doctor(capfd)
    for where, case in (("imagesUn", "unl_01"), ("imagesTr", "lab_01")):
        assert (
            f"{where}/{case}: {raw / where / f'{case}.json'} is missing, so the spacing of {case}_0000.tif" in printed
        )
    assert "cell6" not in printed and "does not end in" not in printed
    assert preprocess() == 0
    error = capfd.readouterr().err
    assert f"Warning: {raw / 'imagesUn' / 'unl_01.json'} is missing, so the spacing" in error
    store = next(p for p in preprocessed.glob("*3d_fullres*") if list(p.glob("cell6.pkl")))
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    # 16 slices of 2 mm, resampled to 1 mm.
    assert nnUNetDatasetBlosc2(str(store), ["cell6"]).load_case("cell6")[0].shape[1] == 32
    (raw / "imagesUn" / "cell6.json").rename(raw / "imagesUn" / "cel6.json")
    assert preprocess() == 1
    assert "cel6.json is the spacing of an image cel6_0000.tif, which is not there" in capfd.readouterr().err


def as_tiffs(raw):
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        for file in (raw / folder).iterdir():
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            file.unlink()
            tiff3d(file.with_name(file.name.replace(".nii.gz", ".tif")), voxels, (1, 1, 1))


def test_rounds_hand_spacings_on(own, tmp_path):
    from nnunet_semiseg.datasets import Dataset
    from pseudo_label.rounds import Rounds, RoundsSettings
    from pseudo_label.rounds.next_dataset import next_dataset
    from pseudo_label.rounds.scoring import link_labels_of_training_cases
    from pseudo_label.selection import SelectionRules

    raw, preprocessed = own("Tiff3DIO", ".tif")
    as_tiffs(raw)
    members = ("nnUNetTrainerMeanTeacher", "nnUNetTrainerMeanTeacher_seed=1")
    settings = RoundsSettings(raw.name, "3d_fullres", "nnUNetPlans_cpu", members, 1, SelectionRules())
    rounds = Rounds(settings, tmp_path / "rounds", None, 1, 1)
    assert rounds.setup.reader is reader_of("Tiff3DIO")
    labeled = link_labels_of_training_cases(rounds.setup)
    assert {p.name for p in labeled.iterdir()} == {f"lab_0{i}{e}" for i in range(3) for e in (".tif", ".json")}
    tiff3d(tmp_path / "labels" / "unl_00.tif", make_case(100)[1], (1, 1, 1))
    rounds.manifest.rounds = [{"dataset": raw.name, "steps": {}}, {"dataset": "Dataset950_next", "steps": {}}]
    following = next_dataset(rounds.round(1))
    following.pseudo["unl_00"] = tmp_path / "labels" / "unl_00.tif"
    following._build_raw(Dataset("Dataset950_next"))
    built = raw.with_name("Dataset950_next")
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        names = {p.name for p in (built / folder).iterdir()}
        cases = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        assert cases and len(names) == 2 * len(cases), names
        for case in cases:
            image = built / folder / (f"{case}.tif" if folder == "labelsTr" else f"{case}_0000.tif")
            assert image.is_file() and (built / folder / f"{case}.json").is_file()
    assert "unl_00" not in Dataset("Dataset950_next").images("imagesUn")


def test_another_origin_of_a_second_channel_reaches_doctor_and_preprocess(own, capfd):
    raw, _ = own("SimpleITKIO", channels=2)
    for folder in ("imagesTr", "imagesUn"):
        for file in list((raw / folder).iterdir()):
            shutil.copy(file, file.with_name(file.name.replace("_0000", "_0001")))
    moved = {"imagesTr": raw / "imagesTr" / "lab_01_0001.nii.gz", "imagesUn": raw / "imagesUn" / "new_0001.nii.gz"}
    shutil.copy(raw / "imagesUn" / "unl_00_0000.nii.gz", raw / "imagesUn" / "new_0000.nii.gz")
    shutil.copy(raw / "imagesUn" / "unl_00_0000.nii.gz", moved["imagesUn"])
    for file in moved.values():
        image = sitk.ReadImage(str(file))
        image.SetOrigin((7.0, 0.0, 0.0))
        sitk.WriteImage(image, str(file))
    printed = doctor(capfd)
    for where, case in (("imagesTr", "lab_01"), ("imagesUn", "new")):
        line = next(line for line in printed.splitlines() if f"{where}/{case}: " in line and "origin" in line)
        assert "Not all input images have the same origin! Origins: [(0.0, 0.0, 0.0), (7.0, 0.0, 0.0)]" in line
        assert str(raw / where / f"{case}_0000.nii.gz") in line
    assert printed.count("Not all input images") == 2
    assert preprocess() == 0
    assert "the same origin! Origins: [(0.0, 0.0, 0.0), (7.0, 0.0, 0.0)]" in capfd.readouterr().err


def test_transparency_among_rgb_images_is_named(own, capfd):
    raw, _ = own("NaturalImage2DIO", ".png", channels=3)
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        for file in (raw / folder).iterdir():
            file.unlink()
            mode = "L" if folder == "labelsTr" else "RGB"
            Image.new(mode, (24, 26)).save(file.with_name(file.name.replace(".nii.gz", ".png")))
    Image.new("RGBA", (24, 26)).save(raw / "imagesUn" / "clear_0000.png")
    message = (
        f"{raw / 'imagesUn' / 'clear_0000.png'} has 4 channels, the labeled cases have 3. Save it without transparency"
    )
    assert message in doctor(capfd)


def test_plans_with_a_reader_that_nnunet_does_not_have(own, capfd):
    _, preprocessed = own("MyReader")
    assert preprocess() == 1
    error = capfd.readouterr().err
    assert f"{preprocessed / 'nnUNetPlans_cpu.json'}: nnU-Net has no reader MyReader" in error
    assert error.count("\n") == 1
