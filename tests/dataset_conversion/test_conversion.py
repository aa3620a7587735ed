"""``convert``: folders and tables, who is labeled, archives, bad input, stopping and continuing."""

import csv
import io
import json
import resource
import shutil
import signal
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import REPOSITORY, make_case, write_image

from dataset_conversion import Dataset999_generic
from dataset_conversion import convert as command
from dataset_conversion.common import Case, Download, _put
from nnunet_semiseg import cli
from nnunet_semiseg.datasets import Dataset
from nnunet_semiseg.segmentations import find_files

LABELS = ["--channels", "MRI", "--labels", "ball=1", "core=2"]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """nnU-Net's folders, empty; returns that of raw data."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw"


@pytest.fixture
def download(tmp_path):
    """images and labels of six cases, two of each of the patients a, b and c."""
    for i, name in enumerate(("a_1", "a_2", "b_1", "b_2", "c_1", "c_2")):
        image, label = make_case(i, shape=(6, 18, 17))
        write_image(image, tmp_path / "download" / "images" / f"{name}_0000.nii.gz", (1.0, 1.5, 2.0))
        write_image(label, tmp_path / "download" / "labels" / f"{name}.nii.gz", (1.0, 1.5, 2.0))
    return tmp_path / "download"


def convert(name, *arguments, processes=1):
    return cli.main(["convert", name, *map(str, arguments), "-np", str(processes)])


def generic(download, *arguments, **options):
    return convert("generic", "-i", download, "-d", "501", *LABELS, *arguments, **options)


def voxels(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def names(folder):
    return sorted(find_files(folder)) if folder.is_dir() else []


def table(dataset):
    with open(dataset / "conversion.csv", newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


# ------------------------------------------------------------------------------------------------ folders and tables


def test_folders_become_a_dataset_that_nnunet_accepts(raw, download, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    assert generic(download) == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == ["a_1", "a_2", "b_1", "b_2", "c_1", "c_2"]
    assert not (dataset / "imagesUn").exists() and not (dataset / "imagesTs").exists()
    for kind, end in (("images", "_0000"), ("labels", "")):
        copied, original = (f / f"b_2{end}.nii.gz" for f in (dataset / f"{kind}Tr", download / kind))
        assert copied.read_bytes() == original.read_bytes() and not copied.is_symlink()
    verify_dataset_integrity(str(dataset), num_processes=1)
    assert sorted(p.name for p in raw.iterdir()) == ["Dataset501_generic"]

    # The table tells what is in the files.
    label = voxels(download / "labels" / "b_2.nii.gz")
    row = table(dataset)["b_2"]
    assert row["size_xyz"] == "17x18x6" and row["spacing_xyz_mm"] == "1x1.5x2" and row["folder"] == "imagesTr"
    assert float(row["share of core"]) == pytest.approx((label == 2).sum() / label.size, rel=1e-4)
    printed = capsys.readouterr().out
    assert "| imagesTr | 6 | 6 | 17 x 18 x 6 | 1 x 1.5 x 2 |" in printed
    assert "| 1 | ball | 6 of 6 |" in printed


def test_linked_files_are_the_originals(raw, download):
    before = {file: file.read_bytes() for file in download.rglob("*.nii.gz")}
    assert generic(download, "--link") == 0
    dataset = raw / "Dataset501_generic"
    for file in [*(dataset / "imagesTr").iterdir(), *(dataset / "labelsTr").iterdir()]:
        assert file.is_symlink() and file.resolve() in before
    assert before == {file: file.read_bytes() for file in download.rglob("*.nii.gz")}


def test_labels_are_renamed_by_name_and_only_changed_files_are_copied(raw, download):
    label = voxels(download / "labels" / "a_1.nii.gz")
    write_image(label.astype(np.float64) * 10, download / "labels" / "a_1.nii.gz", (1.0, 1.5, 2.0))
    assert convert(
        "generic", "-i", download, "-d", 7, "--channels", "CT", "--labels", "core=2,20", "ball=1,10", "--link"
    ) == 0  # fmt: skip
    dataset = raw / "Dataset007_generic"
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "core": 1, "ball": 2}
    assert description["channel_names"] == {"0": "CT"} and description["numTraining"] == 6
    for case, old in (("a_1", label), ("a_2", voxels(download / "labels" / "a_2.nii.gz"))):
        new = voxels(dataset / "labelsTr" / f"{case}.nii.gz")
        assert new.dtype == np.uint8
        assert np.array_equal(new == 1, old == 2) and np.array_equal(new == 2, old == 1)
        assert (dataset / "imagesTr" / f"{case}_0000.nii.gz").is_symlink()
        assert not (dataset / "labelsTr" / f"{case}.nii.gz").is_symlink()


def test_any_format_two_channels_and_dates_that_are_no_channels(raw, tmp_path):
    image, label = make_case(3, shape=(5, 17, 16))
    for channel in range(2):
        write_image(image + channel, tmp_path / "d" / "images" / f"scan_2019_000{channel}.mha", (0.5, 0.6, 3.0))
    write_image(label.astype(np.int16), tmp_path / "d" / "labels" / "scan_2019.nrrd", (0.5, 0.6, 3.0))
    assert convert("generic", "-i", tmp_path / "d", "-d", 501, *LABELS[2:], "--channels", "T1", "T2") == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "imagesTr") == ["scan_2019_0000", "scan_2019_0001"]
    second = sitk.ReadImage(str(dataset / "imagesTr" / "scan_2019_0001.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(second), image + 1)
    assert second.GetSpacing() == pytest.approx((0.5, 0.6, 3.0))
    assert np.array_equal(voxels(dataset / "labelsTr" / "scan_2019.nii.gz"), label)


@pytest.mark.parametrize("ending", [".hdr", ".nhdr", ".gipl", ".vtk", ".mnc", ".NRRD"])
def test_further_formats_that_simpleitk_reads(raw, tmp_path, ending):
    image, label = make_case(3, shape=(5, 17, 16))
    for array, kind in ((image, "images"), (label, "labels")):
        file = tmp_path / "d" / kind / f"scan_2019{ending.lower()}"
        write_image(array, file, (0.5, 0.6, 3.0))
        file.rename(file.with_name(f"scan_2019{ending}"))
    assert convert("generic", "-i", tmp_path / "d", "-d", 501, *LABELS) == 0
    dataset = raw / "Dataset501_generic"
    assert np.array_equal(voxels(dataset / "imagesTr" / "scan_2019_0000.nii.gz"), image)
    assert np.array_equal(voxels(dataset / "labelsTr" / "scan_2019.nii.gz"), label)


def test_nifti_in_upper_case_is_refused_because_a_part_could_be_missing(raw, download, capsys):
    for file in (download / "images").iterdir():
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    assert generic(download) == 1
    file = download / "images" / "a_1_0000.NII.GZ"
    assert f"Error: {file} must be named a_1_0000.nii.gz" in capsys.readouterr().err


def test_color_pictures_have_three_channels(raw, tmp_path):
    color = np.random.RandomState(0).randint(0, 255, (12, 14, 3)).astype(np.uint8)
    (tmp_path / "d" / "images").mkdir(parents=True)
    sitk.WriteImage(sitk.GetImageFromArray(color, isVector=True), str(tmp_path / "d" / "images" / "picture.png"))
    write_image((color[..., 0] > 99).astype(np.uint8), tmp_path / "d" / "labels" / "picture.png", (1.0, 1.0))
    channels = ["--channels", "red", "green", "blue"]
    assert convert("generic", "-i", tmp_path / "d", "-d", 501, "--labels", "bright=1", *channels) == 0
    for i in range(3):
        file = raw / "Dataset501_generic" / "imagesTr" / f"picture_000{i}.nii.gz"
        assert np.array_equal(voxels(file), color[..., i])


def test_table_names_cases_patients_labels_and_splits(raw, download, tmp_path):
    rows = ["case,patient,image,label,split", "x,P,images/a_1_0000.nii.gz,labels/a_1.nii.gz,",
            f"y,P,{download / 'images' / 'a_2_0000.nii.gz'},,train",
            ",,images/b_1_0000.nii.gz,labels/b_1.nii.gz,validation", "z,R,images/c_1_0000.nii.gz,,test"]  # fmt: skip
    (tmp_path / "cases.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    assert generic(download, "--csv", tmp_path / "cases.csv") == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == ["b_1", "x"] and names(dataset / "imagesUn") == ["y_0000"]
    assert names(dataset / "imagesTs") == ["z_0000"] and not (dataset / "labelsTs").exists()
    assert table(dataset)["y"]["patient"] == "P"
    folds = json.loads((raw.parent / "preprocessed" / "Dataset501_generic" / "splits_final.json").read_text())
    assert folds == [{"train": ["x"], "val": ["b_1"]}]

    (tmp_path / "cases.csv").write_text("case,image\nx,images/none.nii.gz\n")
    with pytest.raises(ValueError, match=r"cases\.csv, line 2: .*none\.nii\.gz"):
        generic_cases(download, tmp_path / "cases.csv")


def test_a_table_that_is_not_utf_8_is_named(raw, download, tmp_path, capsys):
    (tmp_path / "cases.csv").write_text("case,image\nm\xfcller,images/a_1_0000.nii.gz\n", encoding="latin-1")
    assert generic(download, "--csv", tmp_path / "cases.csv") == 1
    assert f"{tmp_path / 'cases.csv'} is not UTF-8 text" in capsys.readouterr().err


def test_a_link_whose_target_is_gone_is_a_case_and_a_hidden_file_is_none(raw, download, capsys):
    (download / "images" / "._a_1_0000.nii.gz").write_bytes(b"macOS")
    (download / "labels" / "._a_1.nii.gz").write_bytes(b"macOS")
    (download / "images" / "d_1_0000.nii.gz").symlink_to("/not/mounted")
    assert generic(download) == 1
    error = capsys.readouterr().err
    assert "d_1_0000.nii.gz cannot be read: it links to /not/mounted, which is gone" in error
    assert "1 of 7 cases could not be converted" in error


def test_channels_of_a_table_go_by_their_numbers(download, tmp_path):
    # A column that only begins with image is none.
    (tmp_path / "cases.csv").write_text(
        "image_id,image10,image2,image\n7,images/c_1_0000.nii.gz,images/b_1_0000.nii.gz,images/a_1_0000.nii.gz\n"
    )
    (case,) = generic_cases(download, tmp_path / "cases.csv")
    assert [file.name[0] for file in case.images] == ["a", "b", "c"]


def generic_cases(download, table):
    from dataset_conversion.Dataset999_generic import cases

    class Arguments:
        csv, patient, labels = table, None, [("ball", (1,))]

    return cases(Download(download, download.parent / "unpacked"), Arguments)


def volumes(folder, *files):
    for i, file in enumerate(files):
        image, label = make_case(i)
        write_image(np.minimum(label, 1) if "seg" in file or "labels" in file else image, folder / file)


@pytest.mark.parametrize(
    "channels, images, labels, cases",
    [
        # The labels have the number, too.
        (1, ["case_0000", "case_0001"], ["case_0000", "case_0001"], {"case_0000": 1, "case_0001": 1}),
        (2, ["case_0000", "case_0001"], ["case_0000"], {"case_0000": 1, "case_0001": 1}),
        # More numbers than channels.
        (1, ["case_0000", "case_0001"], ["other"], {"case_0000": 1, "case_0001": 1, "other": 1}),
        (2, ["case_0000", "case_0001"], ["case"], {"case": 2}),
        (1, ["case_0000", "scan_2019"], ["case", "scan_2019"], {"case": 1, "scan_2019": 1}),
    ],
)
def test_a_number_is_a_channel_or_a_part_of_the_name(tmp_path, channels, images, labels, cases):
    from dataset_conversion.Dataset999_generic import cases as read

    images = [*images, *({"other"} & set(labels))]
    volumes(tmp_path, *(f"images/{i}.nii.gz" for i in images), *(f"labels/{i}.nii.gz" for i in labels))
    arguments = dict(csv=None, patient=None, labels=[("ball", (1,))], channels=["MRI"] * channels)
    arguments |= dict(images=["images"], segmentations="labels")
    found = read(Download(tmp_path, tmp_path / "unpacked"), Namespace(**arguments))
    assert {case.name: len(case.images) for case in found} == cases
    assert {case.name for case in found if case.label} == set(labels)


@pytest.mark.parametrize(
    ("images", "labels", "cases", "labeled"),
    [
        # Each has one number: that of the channel, whether labels have it as well or not.
        ("a_0000 b_0000", "a_0000 b_0000", "a b", "a b"),
        ("a_0000 b_0000", "a b", "a b", "a b"),
        # A second channel that is not named is said when the case is converted.
        ("a_0000 a_0001", "a", "a a", "a"),
        ("a_0000 a_0001 b_0000", "a_0001 b", "a_0000 a_0001 b", "a_0001 b"),
    ],
)
def test_numbers_of_each_case_on_their_own(tmp_path, images, labels, cases, labeled):
    volumes(tmp_path, *(f"images/{i}.nii.gz" for i in images.split()), *(f"labels/{i}.nii.gz" for i in labels.split()))
    arguments = Namespace(csv=None, patient=None, labels=[("ball", (1,))], channels=["MRI"], images=["images"])
    arguments.segmentations = "labels"
    found = Dataset999_generic.cases(Download(tmp_path, tmp_path / "unpacked"), arguments)
    assert [case.name for case in found for _ in case.images] == cases.split()
    assert [case.name for case in found if case.label] == labeled.split()
    assert command._checked(found) == found


@pytest.mark.parametrize("by_table", [False, True])
def test_cases_that_are_numbered_from_0000(raw, tmp_path, by_table):
    """Up to a dataset that nnU-Net and this package read."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder, numbered = tmp_path / "download", [f"case_{i:04d}" for i in range(3)]
    volumes(folder, *(f"images/{name}.nii.gz" for name in numbered))
    volumes(folder, *(f"labels/{name}.nii.gz" for name in numbered[:2]))
    rows = ["image;label", *(f"images/{name}.nii.gz;labels/{name}.nii.gz" for name in numbered)]
    rows[-1] = rows[-1].partition(";")[0] + ";"
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    assert generic(folder, *(["--csv", tmp_path / "cases.csv"] if by_table else [])) == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == numbered[:2] and names(dataset / "imagesUn") == ["case_0002_0000"]
    assert np.array_equal(voxels(dataset / "imagesTr" / "case_0001_0000.nii.gz"), make_case(1)[0])
    verify_dataset_integrity(str(dataset), num_processes=1)
    assert list(Dataset("Dataset501_generic").images("imagesTr")) == numbered[:2]


def test_folders_of_images_that_are_no_dicom_series_are_told_from_them(raw, tmp_path, capsys):
    volumes(tmp_path / "download", "p_1/imaging.nii.gz", "p_1/segmentation.nii.gz", "labels/p_1.nii.gz")
    shutil.move(tmp_path / "download" / "p_1", tmp_path / "download" / "images" / "p_1")
    assert generic(tmp_path / "download") == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1
    assert "Give patterns: --images '*/imaging.nii.gz', and --segmentations as well" in error


def test_hidden_folders_are_no_cases(raw, tmp_path):
    files = ("imaging.nii.gz", "segmentation.nii.gz")
    volumes(tmp_path / "download", *(f"{folder}/{file}" for folder in ("p_1", ".trash", "__MACOSX") for file in files))
    assert generic(tmp_path / "download", "--images", "*/imaging.nii.gz", "--segmentations", "*/segm*.nii.gz") == 0
    assert names(raw / "Dataset501_generic" / "labelsTr") == ["p_1"]


@pytest.mark.parametrize("around", ["", "kits/"])
def test_a_folder_for_each_case(raw, tmp_path, capsys, around):
    folder = tmp_path / "download"
    volumes(
        folder / around,
        "p_1/imaging.nii.gz",
        "p_1/segmentation.nii.gz",
        "p_2/imaging.nii.gz",
        "p_2/segmentation.nii.gz",
    )
    volumes(folder / around, "p_3/imaging.nii.gz", "p_3/._imaging.nii.gz")
    patterns = ["--images", "*/imaging.nii.gz", "--segmentations", "*/segmentation.nii.gz"]
    arguments = ["-i", folder, "-d", "501", "--channels", "CT", "--labels", "ball=1"]
    assert convert("generic", *arguments, *patterns) == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == ["p_1", "p_2"] and names(dataset / "imagesUn") == ["p_3_0000"]


@pytest.mark.parametrize(
    "patterns, complaint",
    [
        (["--images", "*/imaging.nii.gz"], "--segmentations one as well. Put them in quotation marks"),
        (["--images", "*/a.nii.gz", "*/b.nii.gz", "--segmentations", "*/s.nii.gz"], "for each of the 1 --channels"),
        (
            ["--images", "*/scan.nii.gz", "--segmentations", "*/segmentation.nii.gz"],
            "has nothing named */scan.nii.gz. It holds p_1/imaging.nii.gz and 1 more\n",
        ),
        (
            ["--images", "*/*.nii.gz", "--segmentations", "*/segmentation.nii.gz"],
            "are both case p_1. Give a pattern that fits one of them, or a table (--csv)",
        ),
        (["--images", "**/imaging.nii.gz", "--segmentations", "**/segmentation.nii.gz"], "Write * for each folder"),
        (["--images", "p_1/imaging*", "--segmentations", "*/s*"], "must end with the file ending"),
        (["--images", "images", "more"], "are several folders. Give one"),
    ],
)
def test_patterns_that_cannot_be_used(raw, tmp_path, capsys, patterns, complaint):
    volumes(tmp_path / "download", "p_1/imaging.nii.gz", "p_1/segmentation.nii.gz")
    arguments = ["-i", tmp_path / "download", "-d", "501", "--channels", "CT", "--labels", "ball=1", *patterns]
    assert convert("generic", *arguments) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, images, segmentations, cases, labeled",
    [
        # Wildcards in several folders.
        ("A/p_1/i.nii.gz A/p_1/seg.nii.gz B/p_1/i.nii.gz", "*/*/i.nii.gz", "*/*/seg.nii.gz", "A_p_1 B_p_1", "A_p_1"),
        ("A/img/1/i.nii.gz A/lab/1/seg.nii.gz", "*/img/*/i.nii.gz", "*/lab/*/seg.nii.gz", "A_1", "A_1"),
        # In the name of the file only.
        (
            "images/a_mr.nii.gz images/b_mr.nii.gz labels/a_seg.nii.gz",
            "images/*_mr.nii.gz",
            "labels/*_seg.nii.gz",
            "a b",
            "a",
        ),
        ("i/img_07.nii.gz l/seg_07.nii.gz", "i/img_0[0-9].nii.gz", "l/seg_0[0-9].nii.gz", "7", "7"),
        ("p_1/p_1_mr.nii.gz p_1/p_1_seg.nii.gz", "*/*_mr.nii.gz", "*/*_seg.nii.gz", "p_1", "p_1"),
        # All folders in the download count, without hidden ones.
        (
            "part1/p_1/i.nii.gz part1/p_1/seg.nii.gz part2/p_2/i.nii.gz part2/p_2/seg.nii.gz .trash/p_3/i.nii.gz",
            "*/i.nii.gz",
            "*/seg.nii.gz",
            "p_1 p_2",
            "p_1 p_2",
        ),
        # Where it lies does not matter to an absolute one.
        (".d/p_1/i.nii.gz .d/p_1/seg.nii.gz", "{}/.d/*/i.nii.gz", "{}/.d/*/seg.nii.gz", "p_1", "p_1"),
    ],
)
def test_the_case_is_what_the_wildcards_stand_for(tmp_path, files, images, segmentations, cases, labeled):
    folder = tmp_path / "download"
    volumes(folder, *files.split())
    arguments = Namespace(csv=None, patient=None, labels=[("ball", (1,))], channels=["MRI"])
    arguments.images, arguments.segmentations = [images.format(folder)], segmentations.format(folder)
    found = Dataset999_generic.cases(Download(folder, tmp_path / "unpacked"), arguments)
    assert [case.name for case in found] == cases.split()
    assert [case.name for case in found if case.label] == labeled.split()


def test_a_pattern_reaches_folders_and_all_archives(raw, tmp_path):
    volumes(tmp_path / "packed", "p_1/i.nii.gz", "p_1/seg.nii.gz", "p_2/i.nii.gz", "p_2/seg.nii.gz")
    volumes(tmp_path / "download", "p_3/i.nii.gz")
    for case in ("p_1", "p_2"):
        with zipfile.ZipFile(tmp_path / "download" / f"part_{case}.zip", "w") as archive:
            for file in ("i.nii.gz", "seg.nii.gz"):
                archive.write(tmp_path / "packed" / case / file, f"{case}/{file}")
    assert generic(tmp_path / "download", "--images", "*/i.nii.gz", "--segmentations", "*/seg.nii.gz") == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == ["p_1", "p_2"] and names(dataset / "imagesUn") == ["p_3_0000"]


@pytest.mark.parametrize(
    "content, says",
    [
        ((), "It is empty"),
        (("notes.txt", "z.txt"), "It holds notes.txt and 1 more"),
        ((".a", "z.txt"), "It holds z.txt and 1 more"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(raw, tmp_path, capsys, content, says):
    for folder in ("images", "labels"):
        (tmp_path / "download" / folder).mkdir(parents=True)
    for name in content:
        (tmp_path / "download" / "images" / name).write_text("")
    assert generic(tmp_path / "download") == 1
    error = capsys.readouterr().err
    assert says in error and len(error) < 300


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_with_other_separators(download, tmp_path, separator):
    lines = ["image,case,label", "images/a_1_0000.nii.gz,a,labels/a_1.nii.gz"]
    (tmp_path / "cases.csv").write_text("\n".join(lines).replace(",", separator))
    (case,) = generic_cases(download, tmp_path / "cases.csv")
    assert case.name == "a" and case.label.name == "a_1.nii.gz"


# ------------------------------------------------------------------------------------------------- who is labeled


def case(name, label=True, split="train"):
    return Case(name, name.partition("_")[0], (Path(f"{name}.nii.gz"),), Path(__file__) if label else None, split)


CASES = [case("b_1"), case("b_2"), case("a_1"), case("c_1", split="validation"), case("d_1", split="test"),
         case("e_1", label=False), case("f_1", split=None)]  # fmt: skip


def test_first_patients_in_order_are_labeled_with_all_their_cases():
    parts = command.assign(CASES, 1, {})
    assert parts == {"b_1": "labeled", "b_2": "labeled", "a_1": "unlabeled", "c_1": "validation", "d_1": "test",
                     "e_1": "unlabeled"}  # fmt: skip
    assert command.assign(CASES, None, {})["a_1"] == "labeled"
    assert command.assign(CASES, 2, {})["a_1"] == "labeled"


@pytest.mark.parametrize("entries", (["a"], ["a_1"]))
def test_lists_name_cases_or_patients_and_go_before_the_published_split(entries):
    lists = {"labeled": entries, "validation": ["b"], "test": []}
    parts = command.assign(CASES, None, lists)
    assert parts["b_1"] == parts["b_2"] == parts["c_1"] == "validation" and parts["a_1"] == "labeled"
    assert parts["d_1"] == "test" and "f_1" not in parts
    # With a list of training cases, only what is listed counts.
    parts = command.assign(CASES, None, {**lists, "train": ["e", "a"]})
    assert parts == {"a_1": "labeled", "e_1": "unlabeled", "b_1": "validation", "b_2": "validation"}


@pytest.mark.parametrize(
    "num_labeled, lists, message",
    [
        (0, {}, "--labeled 0: there are 2 training patients"),
        (3, {}, "--labeled 3: there are 2"),
        (None, {"labeled": ["nobody"]}, "'labeled' has nobody"),
        (None, {"labeled": ["b"], "validation": ["b_1"]}, "Case b_1 is in the lists of train and of validation"),
        (None, {"labeled": ["b_1"], "validation": ["b_2"]}, "Patient b is in two splits: b_1 in train, b_2 in val"),
        (None, {"labeled": ["a"], "test": ["b_2"]}, "Patient b is in two splits"),
        (None, {"labeled": ["e_1"]}, r"Case e_1 \(e_1.nii.gz\) has no label, but is to be in labeled"),
        (None, {"labeled": ["a"], "validation": ["e"]}, "Case e_1 .* is to be in validation"),
        (None, {"labeled": []}, "No training case would be labeled"),
    ],
)
def test_impossible_splits_are_refused(num_labeled, lists, message):
    with pytest.raises(ValueError, match=message):
        command.assign(CASES, num_labeled, lists)


def test_budget_is_a_path_of_keys_in_a_file(raw, download, tmp_path):
    lists = {"set": {"few": ["b"], "more": ["b", "c_1"], "validation": ["a_1", "a_2"], "note": "text"}}
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    arguments = ["--patient", "^[a-c]", "--splits", tmp_path / "lists.json"]
    assert generic(download, *arguments, "--budget", "set/few") == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == ["a_1", "a_2", "b_1", "b_2"]
    assert names(dataset / "imagesUn") == ["c_1_0000", "c_2_0000"]
    folds = json.loads((raw.parent / "preprocessed" / "Dataset501_generic" / "splits_final.json").read_text())
    assert folds == [{"train": ["b_1", "b_2"], "val": ["a_1", "a_2"]}]
    # The shares of withheld labels are nowhere.
    assert [row["share of ball"] for row in table(dataset).values() if row["folder"] == "imagesUn"] == ["", ""]


@pytest.mark.parametrize(
    "budget, message",
    [
        ("set/none", "has no set/none: where none should be, it has few, note"),
        ("set/few/x", "where x should be, it has a list"),
        ("set", "set is not a list of cases or patients"),
        ("set/note", "set/note is not a list"),
        (None, "--budget NAME and --splits JSON go together"),
    ],
)
def test_bad_budgets(raw, download, tmp_path, capsys, budget, message):
    (tmp_path / "lists.json").write_text(json.dumps({"set": {"few": ["b"], "note": "text"}}))
    arguments = ["--budget", budget] if budget else []
    assert generic(download, "--splits", tmp_path / "lists.json", *arguments) == 1
    assert message in capsys.readouterr().err and not raw.exists()


def test_folds_are_drawn_by_patient_where_a_patient_has_several_cases():
    labeled = {f"{p}_{i}": case(f"{p}_{i}") for p in "abcdefg" for i in range(2)}
    folds = command.splits_of(labeled, dict.fromkeys(labeled, "labeled"))
    assert len(folds) == 5 and sorted(name for fold in folds for name in fold["val"]) == sorted(labeled)
    for fold in folds:
        assert not {n[0] for n in fold["train"]} & {n[0] for n in fold["val"]}
        assert sorted(fold["train"] + fold["val"]) == sorted(labeled)
    # nnU-Net's own folds do for one case of each of five patients.
    assert command.splits_of(labeled, dict.fromkeys([f"{p}_0" for p in "abcde"], "labeled")) is None


@pytest.mark.parametrize("labeled, folds", [(["a_0", "b_0", "b_1", "c_0"], 3), (["a_0", "b_0"], 2)])
def test_fewer_than_five_patients_have_folds_although_nnunet_makes_none(labeled, folds):
    cases = {name: case(name) for name in labeled}
    found = command.splits_of(cases, dict.fromkeys(cases, "labeled"))
    assert len(found) == folds and sorted(name for fold in found for name in fold["val"]) == labeled
    assert all(fold["train"] and not {n[0] for n in fold["train"]} & {n[0] for n in fold["val"]} for fold in found)


def test_one_patient_is_for_training_and_validation_and_it_is_said(raw, download, capsys):
    assert generic(download, "--patient", "^[a-c]", "--labeled", 1) == 0
    folds = json.loads((raw.parent / "preprocessed" / "Dataset501_generic" / "splits_final.json").read_text())
    assert folds == [{"train": ["a_1", "a_2"], "val": ["a_1", "a_2"]}]
    assert "One patient is labeled, a, who is for validation, too" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- bad input


def damage(file):
    file.write_bytes(file.read_bytes()[:-300])


def rewrite(change):
    return lambda file: write_image(change(voxels(file)), file, (1.0, 1.5, 2.0))


def moved(file):
    image = sitk.ReadImage(str(file))
    image.SetOrigin((0.0, 40.0, 0.0))
    sitk.WriteImage(image, str(file))


def with_nan(file):
    write_image(np.where(voxels(file) > 200, np.nan, 1).astype(np.float32), file)


BAD_FILES = {
    "damaged image": ("images/b_1_0000.nii.gz", damage, "cannot be read"),
    "no numbers": ("images/b_1_0000.nii.gz", with_nan, "voxels that are NaN"),
    "4D": ("images/b_1_0000.nii.gz", lambda f: write_image_4d(f), "is 4D"),
    "damaged label": ("labels/b_1.nii.gz", damage, "cannot be read"),
    "fractions": ("labels/b_1.nii.gz", rewrite(lambda v: v / 2.0), "has fractions"),
    "unknown label": ("labels/b_1.nii.gz", rewrite(lambda v: v + 7 * (v == 2)), "label 9, but only 0, 1, 2"),
    "another size": ("labels/b_1.nii.gz", rewrite(lambda v: v[:-1]), "differ in geometry: sizes 17 x 18 x 6"),
    "another place": ("labels/b_1.nii.gz", moved, "differ in geometry: origins"),
}


def write_image_4d(file):
    sitk.WriteImage(sitk.JoinSeries([sitk.Image(4, 5, 6, sitk.sitkInt16)] * 3), str(file))


def counted(monkeypatch):
    """The names of the cases that are converted from now on."""
    original, converted = command.convert_case, []

    def convert_case(case, *arguments):
        converted.append(case.name)
        original(case, *arguments)

    monkeypatch.setattr(command, "convert_case", convert_case)
    return converted


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_named_and_mended_later(raw, download, capsys, monkeypatch, kind):
    name, spoil, message = BAD_FILES[kind]
    file = download / name
    good = file.read_bytes()
    spoil(file)
    assert generic(download) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("Error")]
    assert len(lines) == 1 and str(file) in lines[0] and message in lines[0]
    assert "1 of 6 cases could not be converted" in error
    # No dataset yet, and nothing that looks like one to nnU-Net; the other cases are done.
    assert [p.name for p in raw.iterdir()] == [".unfinished-Dataset501_generic"]
    records = raw / ".unfinished-Dataset501_generic" / "records"
    assert sorted(f.name for f in records.iterdir()) == [f"{c}.json" for c in ("a_1", "a_2", "b_2", "c_1", "c_2")]

    # Only the bad case is done again.
    file.write_bytes(good)
    converted = counted(monkeypatch)
    assert generic(download) == 0 and converted == ["b_1"]
    assert len(names(raw / "Dataset501_generic" / "labelsTr")) == 6
    assert sorted(p.name for p in raw.iterdir()) == ["Dataset501_generic"]


def test_input_that_cannot_be_converted_is_one_line(raw, download, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "raw" / "Dataset502_other").mkdir(parents=True)
    (tmp_path / "preprocessed" / "Dataset503_other").mkdir(parents=True)
    for arguments, message in (
        (["ACDC", "-i", tmp_path / "nowhere", "-d", 501], "nowhere is neither a folder nor one of the archives"),
        (["ACDC", "-i", tmp_path / "empty", "-d", 501], "it is not ACDC"),
        (["LA2018", "-i", tmp_path / "empty", "-d", 501], "it is not the left atrium data"),
        (["PancreasCT", "-i", tmp_path / "empty", "-d", 501], "it is not Pancreas-CT"),
        (["York", "-i", tmp_path / "empty", "-d", 501], "it is not the York"),
        (["FLARE22", "-i", tmp_path / "empty", "-d", 501], "it is not the FLARE22"),
        (["FLARE23", "-i", tmp_path / "empty", "-d", 501], "it is not the FLARE23"),
        (["generic", "-i", tmp_path / "empty", "-d", 501, *LABELS], "has no images"),
        (["generic", "-i", download, "-d", 502, *LABELS], "The id 502 is taken by"),
        (["generic", "-i", download, "-d", 503, *LABELS], "The id 503 is taken by"),
        (["generic", "-i", download, "-d", 0, *LABELS], "neither an id from 1 to 999 nor a name"),
        (["generic", "-i", download, "-d", "Data", *LABELS], "neither an id from 1 to 999 nor a name"),
        (["generic", "-i", download, "-d", 501, *LABELS, "--patient", "p("], "is not a regular expression"),
        (["generic", "-i", download, "-d", 501, *LABELS, "ball=3"], "--labels has a class or a value twice"),
        (["generic", "-i", download, "-d", 501, *LABELS, "again=1"], "--labels has a class or a value twice"),
        (["generic", "-i", download, "-d", 501, *LABELS, "background=4"], "or background, which is 0"),
        (["generic", "-i", download, "-d", 501, *LABELS, "ignore=4", "x=5"], "ignore must be the last"),
        (["generic", "-i", download, "-d", 501, *LABELS, "--images", "labels", "--patient", "z"], "matches nothing"),
    ):
        assert convert(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and error.count("\n") == 1 and message in error, error
    assert sorted(p.name for p in raw.iterdir()) == ["Dataset502_other"]


def test_label_without_image_and_missing_folders_setting(raw, download, capsys, monkeypatch):
    (download / "images" / "b_1_0000.nii.gz").unlink()
    assert generic(download) == 1
    assert f"{download / 'labels' / 'b_1.nii.gz'} has no image in" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_raw")
    assert generic(download) == 1
    assert "nnUNet_raw is not set" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["liver", "liver=x", "=1", "liver=0", "liver=1,0", "*/segmentation.nii.gz"])
def test_labels_that_are_no_names_and_values(raw, download, capsys, bad):
    with pytest.raises(SystemExit):
        convert("generic", "-i", download, "-d", 501, "--channels", "CT", "--labels", bad)
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_names_that_nnunet_would_misread_and_double_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be called 'x_0000'"):
        command._checked([case("x_0000")])
    with pytest.raises(ValueError, match="b_1.nii.gz and b_1.nii.gz are both case b_1"):
        command._checked([case("b_1"), case("b_1")])


def test_existing_dataset_is_never_touched(raw, download, capsys):
    assert generic(download) == 0
    before = {f: f.stat().st_mtime_ns for f in raw.rglob("*")}
    assert generic(download, "--labeled", 2) == 1
    assert "The id 501 is taken by" in capsys.readouterr().err
    assert before == {f: f.stat().st_mtime_ns for f in raw.rglob("*")}


def test_folds_of_another_dataset_are_never_overwritten(raw, download, tmp_path, capsys):
    file = tmp_path / "preprocessed" / "Dataset501_generic" / "splits_final.json"
    file.parent.mkdir(parents=True)
    file.write_text('[{"train": ["x"], "val": ["y"]}]')
    assert generic(download, "--patient", "^[a-c]") == 1
    assert f"{file} is of another dataset" in capsys.readouterr().err
    assert file.read_text() == '[{"train": ["x"], "val": ["y"]}]'


def test_same_voxels_under_two_names_are_reported(raw, download, capsys):
    (download / "images" / "c_2_0000.nii.gz").write_bytes((download / "images" / "a_1_0000.nii.gz").read_bytes())
    assert generic(download, "--labeled", 2) == 0
    assert "the images of a_1 (labeled) and c_2 (unlabeled) are the same" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- stop and continue


def content(folder):
    return {
        str(f.relative_to(folder)): voxels(f).tobytes() if f.name.endswith(".nii.gz") else f.read_bytes()
        for f in folder.rglob("*") if f.is_file()
    }  # fmt: skip


def test_interrupted_run_continues_and_processes_do_not_matter(raw, download, tmp_path, monkeypatch):
    original, converted = command.convert_case, []

    def interrupted(case, *arguments):
        if len(converted) == 2:
            raise KeyboardInterrupt
        original(case, *arguments)
        converted.append(case.name)

    monkeypatch.setattr(command, "convert_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generic(download, "--labeled", 3)
    assert [p.name for p in raw.iterdir()] == [".unfinished-Dataset501_generic"]
    # What a process leaves that is killed while it writes.
    leftover = raw / ".unfinished-Dataset501_generic" / "dataset" / "imagesTr" / ".unfinished-77-b_1_0000.nii.gz"
    leftover.write_bytes(b"half")

    monkeypatch.setattr(command, "convert_case", original)
    others = counted(monkeypatch)
    assert generic(download, "--labeled", 3) == 0
    assert sorted(converted + others) == ["a_1", "a_2", "b_1", "b_2", "c_1", "c_2"]
    monkeypatch.setattr(command, "convert_case", original)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw2"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed2"))
    assert generic(download, "--labeled", 3, processes=2) == 0
    assert content(raw) == content(tmp_path / "raw2")


def test_other_arguments_start_over(raw, download):
    damage(download / "images" / "c_2_0000.nii.gz")
    assert generic(download, "--labeled", 5) == 1
    write_image(make_case(9, shape=(6, 18, 17))[0], download / "images" / "c_2_0000.nii.gz", (1.0, 1.5, 2.0))
    assert generic(download, "--labeled", 2) == 0
    dataset = raw / "Dataset501_generic"
    assert names(dataset / "labelsTr") == ["a_1", "a_2"]
    assert names(dataset / "imagesUn") == [f"{name}_0000" for name in ("b_1", "b_2", "c_1", "c_2")]


def test_changed_and_removed_cases_are_not_kept(raw, download, monkeypatch):
    damage(download / "images" / "c_2_0000.nii.gz")
    assert generic(download, "--patient", "^[a-c]") == 1
    # Another patient for the case c_1, another image for a_2, and no b_1 any more.
    write_image(make_case(9, shape=(6, 18, 17))[0], download / "images" / "a_2_0000.nii.gz", (1.0, 1.5, 2.0))
    for file in ("images/b_1_0000.nii.gz", "labels/b_1.nii.gz", "images/c_2_0000.nii.gz", "labels/c_2.nii.gz"):
        (download / file).unlink()
    converted = counted(monkeypatch)
    assert generic(download, "--patient", "^[ab]|1$") == 0
    dataset = raw / "Dataset501_generic"
    assert converted == ["a_2", "c_1"] and names(dataset / "labelsTr") == ["a_1", "a_2", "b_2", "c_1"]
    assert names(dataset / "imagesTr") == [f"{name}_0000" for name in ("a_1", "a_2", "b_2", "c_1")]
    image = dataset / "imagesTr" / "a_2_0000.nii.gz"
    assert np.array_equal(voxels(image), voxels(download / "images" / "a_2_0000.nii.gz"))
    assert table(dataset)["c_1"]["patient"] == "1"


def test_full_disk_leaves_no_half_of_an_image(tmp_path):
    # SimpleITK cuts NIfTI without a word.
    image = sitk.GetImageFromArray(np.random.RandomState(0).rand(9, 18, 17))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="x_0000.nii.gz could not be written .*free some space"):
            _put(tmp_path / "x_0000.nii.gz", None, tmp_path / "unpacked", False, image)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    _put(tmp_path / "x_0000.nii.gz", None, tmp_path / "unpacked", False, image)
    assert np.array_equal(voxels(tmp_path / "x_0000.nii.gz"), sitk.GetArrayFromImage(image))


# ------------------------------------------------------------------------------------------------------- archives


def pack(folder, archive):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive, "w") as file:
            for f in files:
                file.write(f, f.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:gz") as file:
            for f in files:
                file.add(f, f.relative_to(folder.parent))
    return archive


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_archives_are_read_in_place_of_folders(raw, download, tmp_path, ending):
    archive = pack(download, tmp_path / f"all{ending}")
    assert generic(archive, "--labeled", 2, "--link") == 0
    dataset = raw / "Dataset501_generic"
    image = dataset / "imagesUn" / "c_2_0000.nii.gz"
    assert np.array_equal(voxels(image), voxels(download / "images" / "c_2_0000.nii.gz"))
    # Nothing else is left, and what was unpacked belongs to the dataset.
    assert [p.name for p in raw.iterdir()] == ["Dataset501_generic"] and not image.is_symlink()


def test_archives_in_a_folder_and_in_each_other_are_unpacked_once(tmp_path, download, capsys):
    folder = tmp_path / "together"
    folder.mkdir()
    inner = pack(download / "images", tmp_path / "images.zip")
    with zipfile.ZipFile(folder / "outer.zip", "w") as file:
        file.write(inner, "part/images.zip")
        file.writestr("__MACOSX/part/._a_1_0000.nii.gz", "what macOS adds")
    pack(download / "labels", folder / "labels.tar.gz")
    # This one was unpacked by hand, and left there.
    pack(download / "labels", folder / "again.zip")
    (folder / "again").mkdir()
    (download / "labels").rename(folder / "again" / "labels")
    for _ in range(2):
        found = Download(folder, tmp_path / "unpacked").find("*_1_0000.nii.gz")
        assert [f.name for f in found] == ["a_1_0000.nii.gz", "b_1_0000.nii.gz", "c_1_0000.nii.gz"]
        labels = Download(folder, tmp_path / "unpacked").find("a_1.nii.gz")
        assert [f.relative_to(tmp_path).parts[0] for f in labels] == ["together", "unpacked"]
    assert capsys.readouterr().err.count("unpacking again.zip") == 0


def test_leftovers_of_another_download_are_not_mixed_in(raw, download, tmp_path):
    wrong = pack(download / "labels", tmp_path / "another.zip")
    assert generic(wrong) == 1
    with zipfile.ZipFile(tmp_path / "right.zip", "w") as file:
        for kind, end in (("images", "_0000"), ("labels", "")):
            file.write(download / kind / f"a_1{end}.nii.gz", f"{kind}/a_1{end}.nii.gz")
    assert generic(tmp_path / "right.zip") == 0
    assert names(raw / "Dataset501_generic" / "labelsTr") == ["a_1"]


def test_archive_downloaded_again_is_read_again(raw, download, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    old = download / "images" / "b_1_0000.nii.gz"
    good = old.read_bytes()
    damage(old)
    pack(download / "images", folder / "images.zip")
    pack(download / "labels", folder / "labels.tar.gz")
    assert generic(folder) == 1 and "b_1_0000.nii.gz cannot be read" in capsys.readouterr().err
    old.write_bytes(good)
    # Cases that a new archive no longer has are gone, too; only this one is unpacked again.
    for name in ("images/c_2_0000.nii.gz", "labels/c_2.nii.gz"):
        (download / name).unlink()
    pack(download / "images", folder / "images.zip")
    assert generic(folder) == 1 and "labels/c_2.nii.gz has no image in" in capsys.readouterr().err
    pack(download / "labels", folder / "labels.tar.gz")
    assert generic(folder) == 0 and "unpacking images.zip" not in capsys.readouterr().err
    assert names(raw / "Dataset501_generic" / "labelsTr") == ["a_1", "a_2", "b_1", "b_2", "c_1"]


def test_inner_archive_that_changed_is_read_again(tmp_path):
    for content in ("old", "new, and longer"):
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as file:
            file.writestr("part/file.txt", content)
        with zipfile.ZipFile(tmp_path / "outer.zip", "w") as file:
            file.writestr("inner.zip", inner.getvalue())
        (found,) = Download(tmp_path / "outer.zip", tmp_path / "unpacked").find("file.txt")
        assert found.read_text() == content


def test_archive_that_was_unpacked_in_part_beside_itself_is_unpacked(tmp_path, download, capsys):
    folder = tmp_path / "in"
    shutil.copytree(download / "labels", folder / "labels")
    pack(download / "labels", folder / "labels.zip")
    (folder / "labels" / "c_2.nii.gz").unlink()
    found = Download(folder, tmp_path / "unpacked").find("c_2.nii.gz")
    assert [f.relative_to(tmp_path).parts[0] for f in found] == ["unpacked"]
    assert f"only 5 of the 6 files of {folder / 'labels.zip'} are unpacked beside it" in capsys.readouterr().err


@pytest.mark.parametrize("method, bit", [(9, 0), (zipfile.ZIP_STORED, 1)], ids=["Deflate64", "encrypted"])
def test_archive_that_python_cannot_unpack_is_named(raw, tmp_path, capsys, method, bit):
    archive = tmp_path / "in" / "images.zip"
    archive.parent.mkdir()
    zip_with("images/a.nii.gz")(archive)
    content = bytearray(archive.read_bytes())
    # Flags and method, in the local header and in the table of contents.
    for start in (6, content.index(b"PK\1\2") + 8):
        content[start], content[start + 2] = bit, method
    archive.write_bytes(content)
    assert generic(archive.parent) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("Error"))
    assert f"{archive} cannot be unpacked" in line and "with another program" in line


def tar_with(member, data=b"evil"):
    def write(archive):
        with tarfile.open(archive, "w") as file:
            member.size = len(data) if member.isreg() else 0
            file.addfile(member, io.BytesIO(data))

    return write


def zip_with(name):
    def write(archive):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, "evil")

    return write


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    "ending, write, message",
    [
        (".zip", zip_with("../../evil.txt"), "holds ../../evil.txt, which would land outside"),
        (".tar", tar_with(tarfile.TarInfo("../evil.txt")), "holds ../evil.txt, which would land outside"),
        (".tar", tar_with(tarfile.TarInfo("/tmp/evil_of_test_conversion.txt")), "which would land outside"),
        (".tar", tar_with(link("images", "/etc")), "holds the link or device images"),
        (".zip", lambda archive: archive.write_bytes(b"PK not a zip"), "is damaged"),
        (".tar.gz", lambda archive: archive.write_bytes(b"\x1f\x8b not a tar"), "is damaged"),
    ],
)
def test_archive_never_writes_outside(raw, tmp_path, capsys, ending, write, message):
    archive = tmp_path / "in" / f"archive{ending}"
    archive.parent.mkdir()
    write(archive)
    assert generic(archive) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"Error: {archive}") and message in lines[-1]
    assert (
        not [f for f in tmp_path.rglob("*") if "evil" in f.name]
        and not Path("/tmp/evil_of_test_conversion.txt").exists()
    )
    assert not list(raw.glob("Dataset*"))


def test_every_data_set_has_its_section_in_the_docs():
    text = (REPOSITORY / "docs" / "conversion.md").read_text()
    for name, module in command._modules().items():
        assert f"nnunet_semiseg convert {name} -i" in text
        for part in module.SOURCE.reference.split("; cite ")[:1]:
            assert part in text
