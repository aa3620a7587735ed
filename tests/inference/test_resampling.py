"""Resampling and label maps against nnU-Net's own functions."""

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import gaussian_filter

from nnunet_semiseg.inference import resampling
from nnunet_semiseg.inference.resampling import Resampling

FINE, FLAT, THICK = (1.0, 1.0, 1.0), (1.0, 4.0, 1.0), (5.0, 1.0, 1.2)


def smooth(count, shape, sigma=1.5, seed=0, dtype=np.float16):
    random = np.random.RandomState(seed)
    values = np.stack([gaussian_filter(random.normal(size=shape), sigma) for _ in range(count)])
    return (5 * values / values.std()).astype(dtype)


def nnunet(values, shape, how, spacing, target):
    return default_resampling.resample_data_or_seg_to_shape(
        values, shape, spacing, target, order=how.order, order_z=how.order_z, force_separate_z=how.force_separate_z
    )


def nnunet_labels(values, shape, how, spacing, target, regions=None):
    names = {"background": 0, **{f"class {i}": i for i in range(1, len(values))}}
    if regions:
        names = {
            "background": 0,
            **{f"region {i}": [*range(i, len(values) + 1), 99] for i in range(1, len(values) + 1)},
        }
    manager = LabelManager(names, regions)
    return manager.convert_logits_to_segmentation(nnunet(values, shape, how, spacing, target))


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("separate", [False, None, True])
@pytest.mark.parametrize("spacing, target", [(FINE, FINE), (FLAT, FINE), (FINE, THICK), (THICK, FINE)])
def test_images_are_resampled_to_the_same_numbers(order, separate, spacing, target):
    how = Resampling(order, 0, separate)
    image = smooth(2, (9, 14, 11), dtype=np.float32)
    for shape in [(9, 14, 11), (12, 14, 20), (5, 21, 8), (9, 6, 17), (1, 3, 30)]:
        own = resampling.resample(image, shape, how, spacing, target)
        theirs = nnunet(image, shape, how, spacing, target)
        assert own.dtype == theirs.dtype
        np.testing.assert_array_equal(own, theirs)


def test_a_separate_axis_can_be_interpolated():
    image, how = smooth(1, (6, 14, 11), dtype=np.float32), Resampling(3, 1, None)
    own = resampling.resample(image, (15, 10, 12), how, THICK, FINE)
    np.testing.assert_array_equal(own, nnunet(image, (15, 10, 12), how, THICK, FINE))


def test_shapes_are_nnunets():
    random = np.random.RandomState(0)
    for _ in range(50):
        shape, spacing, target = random.randint(1, 99, 3), random.uniform(0.3, 5, 3), random.uniform(0.3, 5, 3)
        own = resampling.new_shape(shape, spacing, target)
        assert own == tuple(default_resampling.compute_new_shape(shape, spacing, target))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("spacing, target", [(FINE, FINE), (FLAT, FINE), (FINE, THICK)])
@pytest.mark.parametrize("seed", range(4))
def test_label_maps_are_those_of_all_logits(regions, spacing, target, seed):
    random = np.random.RandomState(seed)
    count = random.randint(2, 6)
    values = smooth(count, random.randint(5, 20, 3), (0.3, 1, 2, 4)[seed], seed)
    if seed == 1:
        # Many classes are equally high.
        values = np.round(values)
    order = random.permutation(np.arange(1, count + 1)).tolist() if regions else None
    how = Resampling(1, 0, None)
    for _ in range(4):
        shape = tuple(random.randint(3, 40, 3).tolist())
        own = resampling.labels(values, shape, how, spacing, target, order)
        assert own.dtype == np.uint8
        np.testing.assert_array_equal(own, nnunet_labels(values, shape, how, spacing, target, order))


def test_classes_that_meet_far_from_zero():
    """Their logits differ by as little as half precision can tell, and rounding makes them equal."""
    random = np.random.RandomState(0)
    low = random.uniform(-1, 60, (1, 8, 9, 7)).astype(np.float16)
    values = np.concatenate([low, np.nextafter(low, np.float16(99)), low])
    values[2, :4] = values[0, :4] - 1
    how = Resampling(1, 0, False)
    own = resampling.labels(values, (21, 30, 19), how, FINE, FINE)
    np.testing.assert_array_equal(own, nnunet_labels(values, (21, 30, 19), how, FINE, FINE))
    assert 0 < (own == 0).sum() < own.size


@pytest.mark.parametrize("how", [Resampling(3, 0, None), Resampling(0, 0, False), Resampling(1, 1, True)])
@pytest.mark.parametrize("order", [None, [2, 1, 3]])
def test_other_settings_resample_all_logits(how, order):
    values = smooth(3, (8, 9, 7))
    own = resampling.labels(values, (13, 8, 12), how, THICK, FINE, order)
    np.testing.assert_array_equal(own, nnunet_labels(values, (13, 8, 12), how, THICK, FINE, order))


def test_single_precision_and_more_than_255_labels():
    values = smooth(2, (5, 6, 7), dtype=np.float32)
    own = resampling.labels(values, (9, 9, 9), Resampling(1), FINE, FINE)
    np.testing.assert_array_equal(own, resampling.resample(values, (9, 9, 9), Resampling(1), FINE, FINE).argmax(0))
    values = smooth(300, (4, 5, 6))
    own = resampling.labels(values, (7, 9, 8), Resampling(1), FINE, FINE)
    assert own.dtype == np.uint16
    np.testing.assert_array_equal(own, nnunet_labels(values, (7, 9, 8), Resampling(1), FINE, FINE))


def test_the_logit_of_a_region_is_nnunets():
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)].reshape(1, 1, 1, -1)
    theirs = LabelManager({"background": 0, "one": [1, 2]}, [1]).convert_logits_to_segmentation(values)
    own = resampling.labels(values, values.shape[1:], Resampling(1), FINE, FINE, [1])
    # Vector units round the sigmoid of the smallest numbers in their own way.
    sure = np.abs(values[0]) > 2.0**-21
    np.testing.assert_array_equal(own[sure], theirs[sure])


def test_plans_with_another_resampling_are_refused():
    plans = {"resampling_fn_data": "resample_torch_fornnunet", "resampling_fn_data_kwargs": {"is_seg": False}}
    with pytest.raises(NotImplementedError, match="resample_torch_fornnunet.*nnUNetv2_predict"):
        Resampling.of(plans, "data")
    plans = {"resampling_fn_data": "no_resampling_hack", "resampling_fn_data_kwargs": {}}
    image = smooth(1, (3, 4, 5))
    assert resampling.resample(image, (9, 9, 9), Resampling.of(plans, "data"), FINE, FINE) is image
