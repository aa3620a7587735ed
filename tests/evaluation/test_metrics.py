"""Metrics equal their definitions, read literally, and what other libraries compute with the same definitions."""

import importlib
import math
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, write_image
from scipy.ndimage import gaussian_filter

from nnunet_semiseg.evaluation.metrics import (
    DISTANCES,
    METRICS,
    OVERLAP,
    Rules,
    case_metrics,
    distance_metrics,
    overlap,
    surface_dice,
    surface_distances,
    surface_voxels,
)
from nnunet_semiseg.segmentations import Classes

SHAPE = (9, 13, 11)
ANISOTROPIC = (5.0, 1.3, 0.7)


@pytest.fixture
def check_metrics(monkeypatch):
    """The script of this name, which needs all of the libraries."""
    for library in ("medpy", "monai", "surface_distance"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return importlib.import_module("check_metrics")


def ball(shape, center, radius):
    return sum((x - c) ** 2 for x, c in zip(np.ogrid[tuple(map(slice, shape))], center)) < radius**2


def box(shape, *limits):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*limit) for limit in limits)] = True
    return mask


def blob(shape, seed):
    noise = gaussian_filter(np.random.RandomState(seed).normal(size=shape), 1.5)
    return noise > np.quantile(noise, 0.7)


def pairs(shape):
    """{name: (prediction, truth)}: random shapes, boxes, balls, at the image's border, single voxels."""
    n = len(shape)
    middle = tuple(s // 2 for s in shape)
    random = np.random.RandomState(0)
    inner = [(2, 6)] * n
    return {
        "random shapes": (blob(shape, 1), blob(shape, 2)),
        "noise": (random.rand(*shape) > 0.8, random.rand(*shape) > 0.7),
        "boxes": (box(shape, *[(2, 7)] * n), box(shape, *[(3, 6)] * (n - 1), (3, 9))),
        "balls": (ball(shape, middle, 3.5), ball(shape, [m + 1 for m in middle], 4)),
        "nested": (box(shape, *inner), box(shape, *[(1, 8)] * n)),
        "touching borders": (box(shape, (0, 4), *[(0, 99)] * (n - 1)), box(shape, (0, 6), *[(3, 99)] * (n - 1))),
        "touching corners": (box(shape, *inner), box(shape, *[(6, 9)] * n)),
        "whole image": (np.ones(shape, dtype=bool), box(shape, *inner)),
        "single voxels": (box(shape, *[(1, 2)] * n), box(shape, *[(s - 1, s) for s in shape])),
        "voxel and shape": (box(shape, *[(0, 1)] * n), blob(shape, 3)),
        "equal": (blob(shape, 4), blob(shape, 4)),
        "stray voxel": (ball(shape, middle, 3) | box(shape, *[(0, 1)] * n), ball(shape, middle, 3)),
    }


def ours(prediction, truth, spacing, tolerance):
    classes = Classes.from_labels([1])
    labels = (mask.astype(np.uint8) for mask in (truth, prediction))
    return case_metrics(*labels, spacing, classes, Rules((tolerance,)))["1"]


@pytest.mark.parametrize("name", pairs(SHAPE))
@pytest.mark.parametrize(
    "shape, spacing, tolerance",
    [(SHAPE, (1, 1, 1), 1), (SHAPE, ANISOTROPIC, 1.5), (SHAPE[:2], ANISOTROPIC[1:], 1.0)],
    ids=["isotropic", "anisotropic", "2D"],
)
def test_metrics_equal_those_of_other_libraries(check_metrics, name, shape, spacing, tolerance):
    prediction, truth = pairs(shape)[name]
    result = ours(prediction, truth, spacing, tolerance)
    compared = []
    for library, values in check_metrics.references(prediction, truth, spacing, tolerance).items():
        # MONAI and SimpleITK compute in single precision.
        tolerance_of = 1e-12 if library in ("MedPy", "surface-distance") else 1e-5
        for metric, value in values.items():
            assert result[metric] == pytest.approx(value, rel=tolerance_of, abs=tolerance_of), (library, metric)
            compared.append(metric)
    # Two independent implementations of each.
    assert all(compared.count(metric) >= 2 for metric in METRICS)


@pytest.mark.parametrize("value, ours", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, None)])
def test_a_value_that_is_none_is_no_agreement(check_metrics, value, ours):
    with pytest.raises(SystemExit, match="HD of MedPy is"):
        check_metrics.difference(value, ours, "HD of MedPy")
    assert check_metrics.difference(1.5, 1.0, "HD of MedPy") == 0.5


def test_check_names_a_prediction_without_ground_truth(check_metrics, tmp_path, monkeypatch):
    for file in ("truth/a.nii.gz", "prediction/a.nii.gz", "prediction/b.nii.gz"):
        write_image(blob(SHAPE, 1).astype(np.uint8), tmp_path / file)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "x": 1}}')
    arguments = [str(tmp_path / name) for name in ("truth", "prediction", "dataset.json")]
    monkeypatch.setattr(sys, "argv", ["check_metrics.py", *arguments])
    with pytest.raises(SystemExit, match="b.nii.gz has no ground truth in .*truth. Add it"):
        check_metrics.main()


def slow_surface(mask, ignored):
    """Indices of the mask's voxels that have a face neighbor outside mask and ignored, or outside the image."""
    surface = []
    for index in map(tuple, np.argwhere(mask)):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                neighbor = tuple(i + step * (a == axis) for a, i in enumerate(index))
                in_image = all(0 <= i < n for i, n in zip(neighbor, mask.shape))
                if not in_image or not (mask[neighbor] or ignored[neighbor]):
                    surface.append(index)
    return sorted(set(surface))


def slow_distances(points, others, spacing):
    return [min(math.dist(np.multiply(p, spacing), np.multiply(o, spacing)) for o in others) for p in points]


def slow_percentile(values, share):
    """Linear between the two nearest ranks."""
    values, rank = sorted(values), share * (len(values) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    return values[low] + (rank - low) * (values[high] - values[low])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), ANISOTROPIC])
@pytest.mark.parametrize("ignoring", [False, True])
@pytest.mark.parametrize("name", ["random shapes", "touching borders", "stray voxel"])
def test_distances_equal_the_definitions(name, ignoring, spacing):
    prediction, truth = pairs((6, 8, 7))[name]
    ignored = np.random.RandomState(5).rand(6, 8, 7) > (0.9 if ignoring else 1)
    prediction, truth = prediction & ~ignored, truth & ~ignored
    surfaces = [slow_surface(mask, ignored) for mask in (prediction, truth)]
    assert [list(map(tuple, np.argwhere(surface_voxels(m, ignored)))) for m in (prediction, truth)] == surfaces
    forth, back = slow_distances(*surfaces, spacing), slow_distances(*surfaces[::-1], spacing)
    result = distance_metrics(*surface_distances(prediction, truth, spacing, ignored))
    expected = {
        "HD": max(forth + back),
        "HD95": max(slow_percentile(forth, 0.95), slow_percentile(back, 0.95)),
        "ASSD": sum(forth + back) / (len(forth) + len(back)),
        "HD95_pooled": slow_percentile(forth + back, 0.95),
        "ASD": sum(forth) / len(forth),
    }
    assert result == pytest.approx(expected, rel=1e-12)
    assert ignored.any() == ignoring


def test_overlap_equals_the_definitions():
    prediction, truth = pairs(SHAPE)["random shapes"]
    voxels = list(zip(prediction.ravel().tolist(), truth.ravel().tolist()))
    tp, fp, fn = voxels.count((True, True)), voxels.count((True, False)), voxels.count((False, True))
    result = ours(prediction, truth, (1, 1, 1), 1)
    assert (result["TP"], result["FP"], result["FN"]) == (tp, fp, fn)
    assert (result["n_ref"], result["n_pred"]) == (tp + fn, tp + fp)
    assert result["Dice"] == pytest.approx(2 * tp / (tp + fp + tp + fn))
    assert result["Precision"] == pytest.approx(tp / (tp + fp)) and result["Recall"] == pytest.approx(tp / (tp + fn))
    # Not the recall, whose formula CoraNet's paper prints for it.
    assert result["Jaccard"] == pytest.approx(tp / (tp + fp + fn)) != result["Recall"]
    assert {name: result[name] for name in OVERLAP} == overlap(tp, fp, fn)


def test_surface_dice_of_slabs_is_one_from_their_distance_on():
    # Two slabs over the whole image, whose ends are 3 voxels of 0.7 mm apart.
    prediction, truth = box(SHAPE, (0, 99), (0, 99), (0, 4)), box(SHAPE, (0, 99), (0, 99), (0, 7))
    spacing = (2.0, 1.0, 0.7)
    assert surface_dice(prediction, truth, spacing, 2.1) == 1
    assert surface_dice(prediction, truth, spacing, 2.09) < 1
    # Files round spacings to single precision.
    assert surface_dice(prediction, truth, (2.0, 1.0, float(np.float32(0.7)) + 1e-8), 2.1) == 1
    assert surface_dice(truth, truth, spacing, 0) == 1


def test_classes_and_regions_are_measured_apart_and_wherever_they_are():
    random = np.random.RandomState(1)
    truth, prediction = (np.zeros((20, 24, 22), dtype=np.uint16) for _ in range(2))
    for label in (1, 2, 300):
        corner = random.randint(0, 11, 3)
        place = tuple(slice(c, c + s) for c, s in zip(corner, SHAPE))
        truth[place][blob(SHAPE, label)] = label
        prediction[place][blob(SHAPE, label + 1)] = label
    known = frozenset({0, 1, 2, 300})
    classes = Classes(("a", "b", "c", "both"), ((1,), (2,), (300,), (1, 300)), known=known)
    result = case_metrics(truth, prediction, ANISOTROPIC, classes, Rules((1.5, 1.5, 1.5, 4.0)))
    for name, values, tolerance in zip(classes.names, classes.values, (1.5, 1.5, 1.5, 4.0)):
        # On the whole image.
        masks = np.isin(prediction, values), np.isin(truth, values)
        expected = {
            **distance_metrics(*surface_distances(*masks, ANISOTROPIC)),
            "NSD": surface_dice(*masks, ANISOTROPIC, tolerance),
        }
        assert {metric: result[name][metric] for metric in expected} == pytest.approx(expected, rel=1e-12)
        assert result[name]["TP"] == (masks[0] & masks[1]).sum()


def test_unit_voxel_has_distances_in_voxels_and_surface_dice_in_mm():
    truth, prediction = (mask.astype(np.uint8) for mask in pairs(SHAPE)["random shapes"])
    classes = Classes.from_labels([1])
    voxel = case_metrics(truth, prediction, ANISOTROPIC, classes, Rules((2.0,), unit="voxel"))["1"]
    mm = case_metrics(truth, prediction, ANISOTROPIC, classes, Rules((2.0,)))["1"]
    ones = case_metrics(truth, prediction, (1, 1, 1), classes, Rules((2.0,)))["1"]
    assert {m: voxel[m] for m in DISTANCES} == {m: ones[m] for m in DISTANCES} != {m: mm[m] for m in DISTANCES}
    assert voxel["NSD"] == mm["NSD"] != ones["NSD"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_with_one_slice_is_no_axis(axis):
    masks = pairs(SHAPE[:2])["random shapes"]
    flat = ours(*masks, ANISOTROPIC[:2], 1.5)
    spacing = np.insert(ANISOTROPIC[:2], axis, 9.0)
    assert ours(*(np.expand_dims(mask, axis) for mask in masks), spacing, 1.5) == flat


@pytest.mark.parametrize(
    "unit, diagonal", [("mm", math.hypot(9 * 5, 13 * 1.3, 11 * 0.7)), ("voxel", math.hypot(*SHAPE))]
)
def test_classes_that_one_map_lacks(unit, diagonal):
    empty, full = np.zeros(SHAPE, dtype=np.uint8), blob(SHAPE, 1).astype(np.uint8)
    classes = Classes.from_labels([1])
    for truth, prediction in ((full, empty), (empty, full)):
        result = case_metrics(truth, prediction, ANISOTROPIC, classes, Rules((2.0,), unit=unit))["1"]
        assert all(result[metric] == 0 for metric in (*OVERLAP, "NSD"))
        assert [result[metric] for metric in DISTANCES] == pytest.approx([diagonal] * len(DISTANCES))
        result = case_metrics(truth, prediction, ANISOTROPIC, classes, Rules((2.0,), unit, one_empty="leave-out"))["1"]
        assert all(result[metric] == 0 for metric in (*OVERLAP, "NSD"))
        assert all(result[metric] is None for metric in DISTANCES)


def test_classes_that_both_maps_lack():
    empty, classes = np.zeros(SHAPE, dtype=np.uint8), Classes.from_labels([1])
    result = case_metrics(empty, empty, ANISOTROPIC, classes, Rules((2.0,)))["1"]
    assert all(result[metric] is None for metric in METRICS)
    result = case_metrics(empty, empty, ANISOTROPIC, classes, Rules((2.0,), both_empty="perfect"))["1"]
    assert all(result[metric] == (0 if metric in DISTANCES else 1) for metric in METRICS)


IGNORING = Classes(("a",), ((1,),), ignore=2, known=frozenset({0, 1, 2}))


def test_predictions_in_ignored_voxels_do_not_count():
    prediction, truth = (mask.astype(np.uint8) for mask in pairs(SHAPE)["random shapes"])
    ignored = blob(SHAPE, 7)
    truth[ignored] = 2
    results = []
    for inside in (0, 1, 2):
        prediction[ignored] = inside
        results.append(case_metrics(truth, prediction, ANISOTROPIC, IGNORING, Rules((1.0,)))["a"])
    assert results[0] == results[1] == results[2]
    agrees = ~ignored & (prediction == 1) & (truth == 1)
    assert results[0]["TP"] == agrees.sum()


def test_slices_that_are_not_annotated_are_no_surface():
    """With slices 1, 4 and 7 of 10 annotated, distances are those within a slice, not thinned out by its inside."""
    truth, prediction = (np.zeros((10, 16, 16), dtype=np.uint8) for _ in range(2))
    truth[:, 4:12, 2:12], prediction[:, 4:12, 5:15] = 1, 1
    slices = ours(prediction[0] > 0, truth[0] > 0, (1.0, 1.0), 1.5)
    truth[np.arange(10) % 3 != 1] = 2
    sparse = case_metrics(truth, prediction, (1.0, 1.0, 1.0), IGNORING, Rules((1.5,)))["a"]
    for metric in (*OVERLAP, *DISTANCES):
        assert sparse[metric] == pytest.approx(slices[metric])
    # The elements between two slices are slanted, so that corners have less of the area.
    assert sparse["NSD"] == pytest.approx(slices["NSD"], abs=0.05)
    as_background = case_metrics(
        np.where(truth == 2, 0, truth), prediction * (truth < 2), (1, 1, 1), IGNORING, Rules((1.5,))
    )
    assert as_background["a"]["ASSD"] < 0.7 * sparse["ASSD"] and as_background["a"]["NSD"] > sparse["NSD"] + 0.1


def test_a_class_enclosed_by_ignored_voxels_has_no_distance():
    truth = np.full(SHAPE, 2, dtype=np.uint8)
    truth[3:5, 3:5, 3:5] = 1
    result = case_metrics(truth, (truth == 1).astype(np.uint8), (1, 1, 1), IGNORING, Rules((1.0,)))["a"]
    assert result["Dice"] == 1 and all(result[metric] is None for metric in (*DISTANCES, "NSD"))
    # Nor to another mask that has a surface.
    prediction = (truth == 1).astype(np.uint8)
    truth[6:8, 3:5, 3:5], prediction[6, 3, 3] = 0, 1
    result = case_metrics(truth, prediction, (1, 1, 1), IGNORING, Rules((1.0,)))["a"]
    assert result["Recall"] == 1 and all(result[metric] is None for metric in (*DISTANCES, "NSD"))
