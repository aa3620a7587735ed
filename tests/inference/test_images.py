"""Reading against nnU-Net's readers, and label maps in the geometry of their image."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunet_semiseg.files import CaseError
from nnunet_semiseg.inference import images

READERS = {
    "NibabelIO": NibabelIO,
    "NibabelIOWithReorient": NibabelIOWithReorient,
    "SimpleITKIO": SimpleITKIO,
    "SimpleITKIOWithReorient": SimpleITKIOWithReorient,
}


def oblique(spacing=(0.7, 1.3, 4.0), axes=(2, 0, 1)):
    """(4, 4): turned by some degrees, with axes in another order and one mirrored."""
    turn = np.deg2rad(12)
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1, -1, 1])[:, axes] @ np.diag(spacing)
    affine[:3, 3] = (-11.5, 20, 3.25)
    return affine


def write(file, voxels, affine, codes=(1, 1), scaling=None):
    """(X, Y, Z) voxels; codes of qform and sform."""
    nifti = nibabel.Nifti1Image(voxels, affine)
    for code, set_form in zip(codes, (nifti.set_qform, nifti.set_sform)):
        set_form(affine if code else None, code)
    if scaling:
        nifti.header.set_slope_inter(*scaling)
    nibabel.save(nifti, file)
    return file


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("kind, scaling", [*((kind, None) for kind in ("i2", "u1", "f4", "f8")), ("i2", (0.37, -3.3))])
def test_voxels_spacing_and_geometry(tmp_path, reader, codes, kind, scaling):
    random = np.random.RandomState(0)
    voxels = random.uniform(0, 200, (5, 6, 7)).astype(kind)
    file = write(tmp_path / "a_0000.nii.gz", voxels, oblique(), codes, scaling)
    expected, properties = READERS[reader]().read_images([str(file)])
    image = images.read([file], reader, 1)
    np.testing.assert_array_equal(image.data, expected)
    assert image.data.dtype == expected.dtype and image.spacing == tuple(properties["spacing"])
    header = images.shape_of([file], reader)
    assert header in (None, (expected.shape[1:], image.spacing))
    labels = random.randint(0, 9, expected.shape[1:]).astype(np.uint8)
    images.write(tmp_path / "a.nii.gz", labels, image)
    READERS[reader]().write_seg(labels, str(tmp_path / "theirs.nii.gz"), properties)
    own, theirs, source = (sitk.ReadImage(str(tmp_path / f"{n}.nii.gz")) for n in ("a", "theirs", "a_0000"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(own), sitk.GetArrayFromImage(theirs))
    assert own.GetPixelID() == theirs.GetPixelID() == sitk.sitkUInt8
    for of in ("Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(own, f"Get{of}")(), getattr(source, f"Get{of}")(), atol=1e-4)
    if image.origin.header is not None:
        written = nibabel.load(tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(written.affine, nibabel.load(file).affine)
        assert written.header["scl_slope"] in (1, 0) or np.isnan(written.header["scl_slope"])


@pytest.mark.parametrize("ending, dim", [(".mha", 3), (".nrrd", 3), (".mha", 2), (".nii.gz", 2)])
def test_what_only_simpleitk_reads(tmp_path, ending, dim):
    voxels = np.random.RandomState(0).randint(0, 99, (4, 5, 6)[-dim:]).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 2.0, 3.0)[:dim])
    image.SetOrigin((1.0, -2.0, 3.0)[:dim])
    files = [tmp_path / f"a_000{i}{ending}" for i in range(2)]
    for file in files:
        sitk.WriteImage(image, str(file))
    expected, properties = SimpleITKIO().read_images([str(file) for file in files])
    read = images.read(files, "SimpleITKIO", 2)
    np.testing.assert_array_equal(read.data, expected)
    assert read.spacing == tuple(properties["spacing"])
    images.write(tmp_path / f"a{ending}", np.ones(expected.shape[1:], dtype=np.uint8), read)
    written = sitk.ReadImage(str(tmp_path / f"a{ending}"))
    assert (written.GetSize(), written.GetSpacing()) == (image.GetSize(), image.GetSpacing())
    assert written.GetOrigin() == image.GetOrigin()


def test_colors(tmp_path):
    from skimage.io import imread, imsave

    file = tmp_path / "a_0000.png"
    imsave(file, np.random.RandomState(0).randint(0, 255, (9, 8, 3)).astype(np.uint8), check_contrast=False)
    image = images.read([file], "NaturalImage2DIO", 3)
    assert image.data.shape == (3, 1, 9, 8)
    images.write(tmp_path / "a.png", np.ones((1, 9, 8), dtype=np.uint8), image)
    assert imread(tmp_path / "a.png").shape == (9, 8)


def test_many_labels(tmp_path):
    file = write(tmp_path / "a_0000.nii.gz", np.zeros((3, 4, 5), dtype=np.int16), oblique())
    images.write(tmp_path / "a.nii.gz", np.full((5, 4, 3), 300, dtype=np.uint16), images.read([file], "NibabelIO", 1))
    assert np.all(np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj) == 300)


def test_bad_images_are_named(tmp_path):
    good = write(tmp_path / "good_0000.nii.gz", np.ones((3, 4, 5), dtype=np.int16), np.eye(4))
    cut = tmp_path / "cut_0000.nii.gz"
    cut.write_bytes(good.read_bytes()[:-40])
    series = write(tmp_path / "series_0000.nii.gz", np.ones((3, 4, 5, 2), dtype=np.int16), np.eye(4))
    nan = write(tmp_path / "nan_0000.nii.gz", np.full((3, 4, 5), np.nan, dtype=np.float32), np.eye(4))
    other = write(tmp_path / "other_0000.nii.gz", np.ones((3, 4, 6), dtype=np.int16), np.eye(4))
    for files, channels, message in (
        ([cut], 1, "cut_0000.nii.gz cannot be read.*Copy"),
        ([series], 1, "series_0000.nii.gz is 4D. Split"),
        ([nan], 1, "nan_0000.nii.gz has voxels that are NaN or infinite"),
        ([good, other], 2, "other_0000.nii.gz has another size or spacing than good_0000.nii.gz"),
        ([good], 2, "good_0000.nii.gz holds 1 channel"),
        ([tmp_path / "gone_0000.nii.gz"], 1, "gone_0000.nii.gz is missing"),
    ):
        with pytest.raises(CaseError, match=message):
            images.read(files, "NibabelIO", channels)
    with pytest.raises(NotImplementedError, match="read images with MyIO, which this runner does not know"):
        images.read([good], "MyIO", 1)


def test_cases_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        images.find_cases(tmp_path / "none", ".nii.gz")
    for name in ("b_1_0000.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz", "._a_0000.nii.gz", "dataset.json", "a.nii.gz"):
        (tmp_path / name).touch()
    found = images.find_cases(tmp_path, ".nii.gz")
    assert {case: [file.name for file in files] for case, files in found.items()} == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b_1": ["b_1_0000.nii.gz"],
    }
    images.check_channels("a", found["a"], 2, ".nii.gz")
    with pytest.raises(CaseError, match="Case a in .* has a_0000.nii.gz, a_0001.nii.gz, but the model wants a_0000"):
        images.check_channels("a", found["a"], 3, ".nii.gz")
    with pytest.raises(FileNotFoundError, match="no images named CASE_0000.mha"):
        images.find_cases(tmp_path, ".mha")
