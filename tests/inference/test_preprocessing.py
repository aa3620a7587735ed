"""Preprocessing against nnU-Net's DefaultPreprocessor, number for number."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from small_models import CLASSES, plans_of, volume

from nnunet_semiseg.inference.model import Model
from nnunet_semiseg.inference.preprocessing import nonzero_box, preprocess


def model_of(plans):
    names = plans["configurations"]["base"]["normalization_schemes"]
    dataset_json = {"channel_names": dict(enumerate(names)), "labels": CLASSES, "file_ending": ".nii.gz"}
    name = next(name for name in plans["configurations"] if name != "base")
    return Model(Path(), name, plans, dataset_json, (), None)


def compare(plans, data, spacing=(3.0, 1.0, 1.2)):
    model = model_of(plans)
    properties = {"spacing": list(spacing)}
    manager = PlansManager(deepcopy(plans))
    theirs, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        data.copy(), None, properties, manager, manager.get_configuration(model.name), model.dataset_json
    )
    own = preprocess(data.copy(), spacing, model)
    np.testing.assert_array_equal(own.data, theirs)
    assert own.data.dtype == theirs.dtype == np.float32
    assert own.full == properties["shape_before_cropping"]
    assert own.cropped == properties["shape_after_cropping_and_before_resampling"]
    assert [[part.start, part.stop] for part in own.box] == properties["bbox_used_for_cropping"]


SCHEMES = ("ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_every_scheme(masked, dim):
    data = np.stack([volume((9, 24, 20), seed) for seed in range(4)]).astype(np.float32)
    # Each has its own holes.
    data[0, 4, 8:12, 8:12] = 0
    compare(plans_of(dim, schemes=SCHEMES, masked=masked), data)


def test_holes_are_inside():
    image = volume((9, 24, 20)).astype(np.float32)[None]
    image[0, 4:6, 10:13, 9:12] = 0
    compare(plans_of(masked=True), image)


@pytest.mark.parametrize("transpose, back", [([1, 0, 2], [1, 0, 2]), ([2, 0, 1], [1, 2, 0])])
def test_axes_in_the_order_of_the_plans(transpose, back):
    for dim in (2, 3):
        plans = plans_of(dim, transpose=transpose, back=back)
        compare(plans, volume((9, 24, 20)).astype(np.float32)[None])


@pytest.mark.parametrize("spacing", [(9.0, 1.0, 1.0), (1.0, 1.0, 6.0), (2.0, 1.5, 1.5)])
def test_thick_slices_and_nothing_to_resample(spacing):
    compare(plans_of(), volume((9, 24, 20)).astype(np.float32)[None], spacing)


def test_colors_and_an_empty_image():
    colors = np.random.RandomState(0).randint(0, 256, (1, 4, 20, 18)).astype(np.float32)
    plans = plans_of(2, schemes=["RGBTo01Normalization"])
    compare(plans, colors)
    with pytest.raises(ValueError, match="intensities -1 to 255 are not those of an RGB image"):
        preprocess(np.where(colors > 0, colors, -1), (1, 1, 1), model_of(plans))
    empty = np.zeros((1, 4, 20, 18), dtype=np.float32)
    assert nonzero_box(empty) == (slice(0, 4), slice(0, 20), slice(0, 18))
    compare(plans_of(2), empty)
