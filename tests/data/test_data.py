"""Splits, the unlabeled store, two-view augmentation and random streams."""

import json

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from conftest import SHORT, make_case
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_semiseg import cli
from nnunet_semiseg.data.randomness import RandomStream, global_state, seed_everything, set_global_state
from nnunet_semiseg.data.splits import hidden_cases, hide_labels, make_folds
from nnunet_semiseg.data.unlabeled import UnlabeledDataset, store_folder, store_identifiers
from nnunet_semiseg.data.views import TwoViewTransform, fix_transform_arithmetic
from nnunet_semiseg.trainers.registry import find_trainer

CASES = [f"case_{i:02d}" for i in range(20)]


class TestSplits:
    @pytest.mark.parametrize("number", [2, 5])
    def test_folds_of_cases_are_nnunets(self, number):
        stock = generate_crossval_split(CASES, seed=12345, n_splits=number)
        expected = [{key: [str(case) for case in fold[key]] for key in ("train", "val")} for fold in stock]
        assert make_folds(reversed(CASES), number) == expected

    def test_a_patient_is_in_one_part_of_a_fold(self):
        patients = {case: case[-1] for case in CASES}
        folds = make_folds(CASES, 3, patients=patients)
        assert sorted(case for fold in folds for case in fold["val"]) == CASES
        for fold in folds:
            assert sorted(fold["train"] + fold["val"]) == CASES
            assert not {patients[case] for case in fold["train"]} & {patients[case] for case in fold["val"]}

    def test_folds_are_disjoint_and_validation_is_nnunets(self):
        splits = hide_labels(CASES, 3, None, folds=5, seed=12345)
        stock = generate_crossval_split(CASES, seed=12345, n_splits=5)
        for split, theirs in zip(splits, stock):
            assert len(split["train"]) == 3
            assert split["val"] == [str(c) for c in theirs["val"]]
            assert sorted(split["train"] + split["val"] + split["unlabeled"]) == CASES

    def test_a_larger_budget_contains_the_smaller_one(self):
        small, large = (hide_labels(CASES, n, None, 5, 1) for n in (2, 6))
        assert all(set(s["train"]) < set(g["train"]) for s, g in zip(small, large))

    def test_named_cases_are_labeled_in_every_fold(self):
        splits = hide_labels(CASES, None, ["case_03", "case_07"], folds=3, seed=0)
        assert [s["train"] for s in splits] == [["case_03", "case_07"]] * 3
        assert sorted(sum((s["val"] for s in splits), [])) == [c for c in CASES if c not in ("case_03", "case_07")]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((17, None, 5, 0), "--labeled 17 is more than the 16 training cases"),
            ((None, ["case_99"], 5, 0), "No labeled case is named case_99"),
            ((None, CASES[:18], 5, 0), "2 cases are left"),
        ],
    )
    def test_bad_budgets(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            hide_labels(CASES, *arguments)

    def test_a_fold_is_checked(self, tmp_path):
        file = tmp_path / "splits_final.json"
        assert hidden_cases(file, 0, CASES) == []
        file.write_text(json.dumps([{"train": ["case_00"], "val": ["case_01"], "unlabeled": ["case_02"]}]))
        assert hidden_cases(file, 0, CASES) == ["case_02"]
        with pytest.raises(ValueError, match="hides labels in 1 of 1 fold, and fold all would train on them"):
            hidden_cases(file, "all", CASES)
        with pytest.raises(ValueError, match="has 1 fold, there is no fold 1: .* Train fold 0, or write more folds"):
            hidden_cases(file, 1, CASES)
        file.write_text(json.dumps([{"train": ["case_00"], "val": ["case_01"]}]))
        # Nothing is hidden, so nnU-Net's own rules hold.
        assert hidden_cases(file, "all", CASES) == hidden_cases(file, 1, CASES) == []
        for split, message in (
            ({"train": ["case_77"], "val": []}, "'train' names case_77"),
            (
                {"train": ["case_00"], "val": ["case_01"], "unlabeled": ["case_01"]},
                "case_01 is in 'unlabeled' and in 'val'",
            ),
        ):
            file.write_text(json.dumps([split]))
            with pytest.raises(ValueError, match=message):
                hidden_cases(file, 0, CASES)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"train": ["case_00"], "val": ["case_01"]}', r"is an object; nnU-Net wants a list"),
        ("[]", "is empty; nnU-Net wants a list"),
        ('[["case_00"]]', r"fold 0 is not an object \{train: "),
        (
            '[{"training": ["case_00"], "validation": ["case_01"]}]',
            "fold 0 has no key 'train', only 'training', 'validation'. Rename the keys to 'train' and 'val'",
        ),
        ('[{"train": ["case_00"]}]', "fold 0 has no key 'val', only 'train'"),
        ('[{"train": "case_00", "val": []}]', "fold 0: 'train' is not a list of cases"),
        ('[{"train": [], "val": [], "unlabeled": {"case_00": 1}}]', "fold 0: 'unlabeled' is not a list of cases"),
        (
            '[{"train": [], "val": [], "unlabelled": ["case_00"]}]',
            "fold 0 has the key 'unlabelled', which hides nothing. Rename it to 'unlabeled'",
        ),
        ('[{"train": ["case_00", "ca', "is cut off or not valid JSON"),
    ],
)
def test_splits_that_cannot_be_read_name_the_file_and_the_key(tmp_path, text, complaint):
    file = tmp_path / "splits_final.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        hidden_cases(file, 0, CASES)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_split_command_refuses_then_backs_up(prepared, work, capsys):
    folder = work / "preprocessed" / prepared("labels")
    original = (folder / "splits_final.json").read_text()
    try:
        assert cli.main(["split", "-d", "801", "--labeled", "2", "--folds", "3"]) == 1
        assert "--overwrite" in capsys.readouterr().err
        assert (folder / "splits_final.json").read_text() == original
        assert cli.main(["split", "-d", "801", "--labeled", "2", "--folds", "3", "--overwrite"]) == 0
        assert len(json.loads((folder / "splits_final.json").read_text())) == 3
        (backup,) = folder.glob("splits_final.2*.json")
        assert backup.read_text() == original
        backup.unlink()
    finally:
        (folder / "splits_final.json").write_text(original)


class TestStore:
    def test_lies_beside_the_labeled_folder_with_nnunets_files(self, prepared, work):
        folder = work / "preprocessed" / prepared("labels") / "nnUNetPlans_cpu_2d"
        store = store_folder(folder)
        assert store.parent == folder.parent and store.name == "nnUNetPlans_cpu_2d_unlabeled"
        assert store_identifiers(store) == [f"unl_{i:02d}" for i in range(4)]
        assert len(list(store.iterdir())) == 12
        assert not list(folder.glob("unl_*"))

    def test_images_are_preprocessed_as_labeled_ones_are(self, prepared, work):
        """The same image, once as a labeled and once as an unlabeled case."""
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        from nnunet_semiseg.datasets import Dataset

        name = prepared("labels")
        raw = work / "raw" / name
        copy = raw / "imagesUn" / "copy_0000.nii.gz"
        copy.write_bytes((raw / "imagesTr" / "lab_00_0000.nii.gz").read_bytes())
        try:
            assert cli.main(["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "3d_fullres", "-np", "1"]) == 0
        finally:
            copy.unlink()
        folder = work / "preprocessed" / name / "nnUNetPlans_cpu_3d_fullres"
        labeled = nnUNetDatasetBlosc2(str(folder)).load_case("lab_00")[0][:]
        unlabeled = nnUNetDatasetBlosc2(str(store_folder(folder)), ["copy"]).load_case("copy")[0][:]
        assert np.array_equal(labeled, unlabeled)
        # The case is gone from imagesUn, so the next run removes it from the store.
        assert cli.main(["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "3d_fullres", "-np", "1"]) == 0
        assert "copy" not in store_identifiers(store_folder(folder))
        assert Dataset(name).labeled_cases() == [f"lab_{i:02d}" for i in range(6)]

    def test_dataset_gives_zeros_for_a_segmentation(self, prepared, work):
        folder = work / "preprocessed" / prepared("labels") / "nnUNetPlans_cpu_2d"
        dataset = UnlabeledDataset([(str(store_folder(folder)), ["unl_00"]), (str(folder), ["lab_03"])])
        for case in ("unl_00", "lab_03"):
            data, segmentation, previous, properties = dataset.load_case(case)
            assert segmentation.shape == (1, *data.shape[1:]) and not segmentation.any()
            assert previous is None and properties == {"class_locations": {}}


def training_transforms(mask=False, regions=None):
    return nnUNetTrainer.get_training_transforms(
        (24, 24), (-np.pi, np.pi), None, (0, 1), False, use_mask_for_norm=[mask], regions=regions
    )


class TargetTransform(SegOnlyTransform):
    """A user's own."""

    def _apply_to_segmentation(self, segmentation, **params):
        raise AssertionError("a target transform ran on an unlabeled patch")


class Both(BasicTransform):
    """One that may change image and segmentation."""


class TestTwoViews:
    def test_geometry_is_shared_and_only_the_strong_view_has_other_intensities(self):
        view = TwoViewTransform(training_transforms())
        view.intensity = lambda image, segmentation: {"image": image * 3 + 1, "segmentation": segmentation}
        x = torch.rand(2, 30, 30)
        for _ in range(20):
            result = view(image=x.clone(), segmentation=torch.zeros(1, 30, 30, dtype=torch.int16))
            weak, strong = result["image"].chunk(2)
            assert weak.shape == (2, 24, 24)
            torch.testing.assert_close(strong, weak * 3 + 1)

    def test_every_geometric_transform_of_nnunet_is_shared(self):
        view = TwoViewTransform(training_transforms(regions=[(1, 2), 2]))
        assert [type(t).__name__ for t in view.geometry.transforms] == ["SpatialTransform", "MirrorTransform"]
        assert all(type(t).__name__ == "RandomTransform" for t in view.intensity.transforms)
        assert len(view.intensity.transforms) == 7
        assert isinstance(view.geometry.transforms[-1], MirrorTransform)

    def test_transforms_of_targets_are_not_in_the_views_whoever_adds_them(self):
        transforms = training_transforms()
        transforms.transforms += [
            TargetTransform(),
            RandomTransform(TargetTransform()),
            ComposeTransforms([TargetTransform(), RemoveLabelTransform(1, 0)]),
        ]
        expected, found = (
            [[type(t) for t in part.transforms] for part in TwoViewTransform(made).transforms]
            for made in (training_transforms(), transforms)
        )
        assert found == expected

    def test_parts_of_transforms_are_told_apart_however_they_are_nested(self):
        mirror, noise, blur = MirrorTransform((0,)), GaussianNoiseTransform(), GaussianBlurTransform()
        nested = ComposeTransforms([RandomTransform(mirror), OneOfTransform([RandomTransform(noise), blur])])
        view = TwoViewTransform(ComposeTransforms([nested, TargetTransform()]))
        assert view.geometry.transforms == nested.transforms[:1] and view.intensity.transforms == nested.transforms[1:]
        fix_transform_arithmetic(view)
        assert blur.benchmark is False

    @pytest.mark.parametrize(
        "transform, complaint",
        [
            (Both(), "Both is neither geometry nor for images or targets alone"),
            (RandomTransform(Both()), "Both is neither geometry nor"),
            (
                OneOfTransform([GaussianNoiseTransform(), MirrorTransform((0,))]),
                "OneOfTransform mixes geometry and intensity",
            ),
        ],
    )
    def test_a_transform_of_which_nothing_is_known_is_refused(self, transform, complaint):
        transforms = training_transforms()
        transforms.transforms.append(transform)
        with pytest.raises(NotImplementedError, match=complaint) as error:
            TwoViewTransform(transforms)
        assert "target_transforms" in str(error.value) and "\n" not in str(error.value)

    def test_a_methods_transforms_of_targets_see_labeled_patches_alone(self, started, monkeypatch):
        seen = []

        class Marked(Both):
            """Of a kind that nobody knows."""

            def apply(self, data_dict, **params):
                seen.append(data_dict["segmentation"])
                return {**data_dict, "image": data_dict["image"] * 0 + 7}

        method = find_trainer("nnUNetTrainerMeanTeacher")
        monkeypatch.setattr(method, "target_transforms", lambda self: [Marked()])
        trainer = started("nnUNetTrainerMeanTeacher_warm_up=0" + SHORT)
        assert (next(trainer.dataloader_train)["data"] == 7).all()
        seen.clear()
        batch = trainer.draw_unlabeled()
        assert not seen and not (batch["weak"] == 7).any() and not (batch["strong"] == 7).any()

    def test_outside_of_the_nonzero_mask_stays_zero(self):
        seed_everything(0)
        view = TwoViewTransform(training_transforms(mask=True))
        x = torch.zeros(1, 30, 30)
        x[:, 8:22, 8:22] = torch.rand(1, 14, 14) + 1
        for _ in range(30):
            weak, strong = view(image=x.clone(), segmentation=torch.zeros(1, 30, 30))["image"].chunk(2)
            assert (strong == 0).float().mean() > 0.2
            outside = torch.nn.functional.max_pool2d((weak != 0).float()[None], 3, 1, 1)[0] == 0
            assert not strong[outside].any()

    def test_patch_larger_than_the_image_is_padded(self, started):
        trainer = started("nnUNetTrainerMeanTeacher_warm_up=0_1epochs_num_iterations_per_epoch=1")
        loader = trainer.dataloader_unlabeled.data_loader
        data, *_ = loader._data.load_case(loader._data.identifiers[0])
        loader.patch_size = tuple(2 * s for s in loader.patch_size)
        assert any(p > s for p, s in zip(loader.patch_size, data.shape[1:]))
        batch = loader.generate_train_batch()
        assert torch.isfinite(batch["weak"]).all() and batch["weak"].shape == batch["strong"].shape


class TestRandomness:
    def test_a_stream_leaves_the_global_generators_alone(self):
        seed_everything(3)
        expected = torch.rand(3), np.random.rand(3)
        seed_everything(3)
        stream = RandomStream(5)
        with stream:
            inside = torch.rand(4), np.random.rand(4)
        assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])
        with RandomStream(5):
            assert torch.equal(torch.rand(4), inside[0]) and np.array_equal(np.random.rand(4), inside[1])

    def test_states_survive_a_safe_checkpoint(self, tmp_path):
        stream = RandomStream(1)
        torch.save({"s": stream.state(), "g": global_state()}, tmp_path / "x")
        loaded = torch.load(tmp_path / "x", weights_only=True)
        with stream:
            expected = np.random.rand(2), torch.rand(2)
        there = RandomStream(2)
        there.set_state(loaded["s"])
        with there:
            assert np.array_equal(np.random.rand(2), expected[0]) and torch.equal(torch.rand(2), expected[1])
        expected = np.random.rand(2), torch.rand(2)
        set_global_state(loaded["g"])
        assert np.array_equal(np.random.rand(2), expected[0]) and torch.equal(torch.rand(2), expected[1])


def test_toy_cases_have_both_classes():
    for seed in range(6):
        assert set(np.unique(make_case(seed)[1])) == {0, 1, 2}
