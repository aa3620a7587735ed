"""Signed distances against geometry, against full-volume transforms, and on their way through nnU-Net's loader."""

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from conftest import DATASETS, make_case
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.special import expit

from nnunet_semiseg.data import signed_distance as module
from nnunet_semiseg.data.randomness import global_state, seed_everything, set_global_state
from nnunet_semiseg.data.signed_distance import SignedDistanceTransform, signed_distance
from nnunet_semiseg.data.views import fix_transform_arithmetic


@pytest.fixture(params=["scipy", "edt"])
def phi(request):
    """``phi(masks, spacing, max_distance)`` of either backend."""
    if request.param == "edt":
        pytest.importorskip("edt")
    return lambda *arguments: signed_distance(*arguments, backend=request.param)


def grid(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))


def column(values, ndim=3):
    """One value per axis, to be combined with a ``grid``."""
    return np.reshape(np.asarray(values, dtype=float), (-1, *[1] * ndim))


def box_mask(shape, low, high):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(low, high))] = True
    return mask


def box_distance(shape, low, high, spacing):
    """Signed distance in mm to a box of the voxels low..high, of which every face in the patch is half of the smallest
    spacing before the nearest voxel's center. Faces on the border of the patch are none."""
    x = grid(shape)
    below, above = (column(low) - x) * column(spacing), (x - column(high)) * column(spacing)
    outside = np.sqrt((np.maximum(np.maximum(below, above), 0) ** 2).sum(0))
    # A voxel inside reaches the other kind one voxel beyond a face.
    depth = [np.full(shape, np.inf)]
    for axis in range(3):
        if low[axis] > 0:
            depth.append(spacing[axis] - below[axis])
        if high[axis] < shape[axis] - 1:
            depth.append(spacing[axis] - above[axis])
    half = min(spacing) / 2
    return np.where(outside > 0, outside - half, half - np.min(depth, axis=0))


def blobs(random, shape, fraction, sigma=2.0):
    noise = gaussian_filter(random.normal(size=shape), sigma)
    return noise > np.quantile(noise, 1 - fraction)


def literal(masks, spacing, max_distance):
    """Two transforms of the full volume per mask."""
    half = min(spacing) / 2
    result = []
    for mask in masks:
        if mask.all() or not mask.any():
            result.append(np.full(mask.shape, -1.0 if mask.any() else 1.0))
            continue
        outside = distance_transform_edt(~mask, sampling=spacing) - half
        inside = distance_transform_edt(mask, sampling=spacing) - half
        result.append(np.clip(np.where(mask, -inside, outside) / max_distance, -1, 1))
    return np.array(result)


def dice(probability, mask):
    return 2 * (probability * mask).sum() / (probability.sum() + mask.sum())


@pytest.mark.parametrize("max_distance", [6.0, 30.0])
def test_sphere(phi, max_distance):
    shape, center, radius = (44, 48, 46), (21.3, 24.1, 22.6), 13.4
    to_surface = np.sqrt(((grid(shape) - column(center)) ** 2).sum(0)) - radius
    value = phi([to_surface < 0], (1, 1, 1), max_distance)[0]
    assert value.dtype == np.float32
    assert np.array_equal(value < 0, to_surface < 0)
    assert max_distance * np.abs(value - np.clip(to_surface / max_distance, -1, 1)).max() < 0.6


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.8, 1.25), (0.5, 2.0, 0.9)])
@pytest.mark.parametrize("max_distance", [2.0, 7.0, 100.0])
def test_box_with_edges_and_corners(phi, spacing, max_distance):
    shape, low, high = (14, 22, 19), (4, 5, 9), (9, 13, 12)
    expected = np.clip(box_distance(shape, low, high, spacing) / max_distance, -1, 1)
    value = phi([box_mask(shape, low, high)], spacing, max_distance)[0]
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_box_in_numbers(phi):
    """A few voxels by hand: beyond an edge, a corner and a face, on either side of a face, in the middle."""
    value = 20 * phi([box_mask((12, 12, 12), (2, 3, 4), (6, 7, 8))], (1, 1, 1), 20.0)[0]
    assert value[4, 10, 11] == pytest.approx(np.hypot(3, 3) - 0.5, abs=1e-5)
    assert value[9, 11, 6] == pytest.approx(5 - 0.5, abs=1e-5)
    assert value[8, 10, 2] == pytest.approx(np.sqrt(17) - 0.5, abs=1e-5)
    assert value[10, 5, 6] == pytest.approx(4 - 0.5, abs=1e-5)
    assert value[7, 5, 6] == pytest.approx(0.5, abs=1e-5)
    assert value[6, 5, 6] == pytest.approx(-0.5, abs=1e-5)
    assert value[4, 5, 6] == pytest.approx(-2.5, abs=1e-5)


def test_the_border_of_the_patch_is_no_boundary(phi):
    """A slab over the whole of two axes, from the border of the third: only its one face counts."""
    shape, spacing, max_distance = (10, 16, 12), (2.0, 1.5, 1.0), 8.0
    mask = box_mask(shape, (0, 0, 0), (9, 6, 11))
    y = grid(shape)[1]
    expected = np.where(y <= 6, 0.5 - (7 - y) * 1.5, (y - 6) * 1.5 - 0.5) / max_distance
    value = phi([mask, mask[:, ::-1]], spacing, max_distance)
    np.testing.assert_allclose(value[0], np.clip(expected, -1, 1), atol=1e-6)
    np.testing.assert_allclose(value[1], value[0][:, ::-1], atol=1e-6)
    # A box in a corner: three faces of six.
    low, high = (0, 0, 5), (4, 7, 11)
    expected = np.clip(box_distance(shape, low, high, spacing) / max_distance, -1, 1)
    np.testing.assert_allclose(phi([box_mask(shape, low, high)], spacing, max_distance)[0], expected, atol=1e-6)


@pytest.mark.parametrize("max_distance", [3.0, 50.0])
def test_two_components(phi, max_distance):
    shape, spacing = (12, 14, 40), (1.0, 1.5, 0.8)
    boxes = [((3, 4, 3), (7, 9, 8)), ((4, 2, 25), (9, 6, 33))]
    mask = np.logical_or(*(box_mask(shape, *box) for box in boxes))
    expected = np.minimum(*(box_distance(shape, *box, spacing) for box in boxes)) / max_distance
    np.testing.assert_allclose(phi([mask], spacing, max_distance)[0], np.clip(expected, -1, 1), atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 9), (5, 7, 9)])
def test_empty_and_full(phi, shape):
    one_voxel = np.zeros(shape, dtype=bool)
    one_voxel[(2,) * len(shape)] = True
    spacing, empty = (1.0,) * len(shape), np.zeros(shape, dtype=bool)
    value = phi([empty, ~empty, one_voxel, ~one_voxel], spacing, 4.0)
    assert (value[0] == 1).all()
    assert (value[1] == -1).all()
    assert np.array_equal(value[3], -value[2])
    assert phi(np.zeros((0, *shape), dtype=bool), spacing, 4.0).shape == (0, *shape)


def test_two_dimensions(phi):
    shape, spacing, max_distance = (40, 36), (1.0, 1.0), 9.0
    to_circle = np.sqrt(((grid(shape) - column((18.2, 20.7), 2)) ** 2).sum(0)) - 11.3
    value = phi([to_circle < 0], spacing, max_distance)[0]
    assert max_distance * np.abs(value - np.clip(to_circle / max_distance, -1, 1)).max() < 0.6
    # Spacing of a half plane's normal axis.
    half_plane = np.broadcast_to(np.arange(36) < 12, shape)
    expected = np.where(half_plane, 0.5 - (12 - np.arange(36)) * 3.0, (np.arange(36) - 11) * 3.0 - 0.5) / max_distance
    np.testing.assert_allclose(phi([half_plane], (1.0, 3.0), max_distance)[0], np.clip(expected, -1, 1), atol=1e-6)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 1.2)])
@pytest.mark.parametrize("max_distance", [4.0, 25.0])
def test_the_cut_does_not_matter_where_the_boundary_is_in_the_patch(phi, spacing, max_distance):
    random = np.random.RandomState(3)
    shape = (30, 44, 40)
    masks = np.array([blobs(random, shape, f, 3.0) for f in (0.05, 0.3, 0.6)])
    whole = phi(masks, spacing, max_distance)
    other_side = np.array([distance_transform_edt(m, spacing) + distance_transform_edt(~m, spacing) for m in masks])
    compared = 0
    for low, high in (((5, 4, 6), (22, 30, 33)), ((0, 10, 12), (14, 28, 30)), ((11, 20, 0), (19, 44, 21))):
        cut = (slice(None), *(slice(a, b) for a, b in zip(low, high)))
        part = phi(masks[cut], spacing, max_distance)
        x = grid(shape)
        to_the_cut = np.full(shape, np.inf)
        for axis in range(3):
            if low[axis] > 0:
                to_the_cut = np.minimum(to_the_cut, (x[axis] - low[axis] + 1) * spacing[axis])
            if high[axis] < shape[axis]:
                to_the_cut = np.minimum(to_the_cut, (high[axis] - x[axis]) * spacing[axis])
        settled = (other_side < to_the_cut)[cut]
        compared += settled.mean() / 3
        np.testing.assert_allclose(part[settled], whole[cut][settled], atol=1e-6)
        # Elsewhere the boundary is farther away than the patch can tell, never nearer.
        assert (np.abs(part) >= np.abs(whole[cut]) - 1e-6).all()
        assert np.array_equal(part < 0, masks[cut])
    assert compared > 0.3


@pytest.mark.parametrize("ndim", [2, 3])
def test_equals_transforms_of_the_full_volume(phi, ndim):
    random = np.random.RandomState(ndim)
    for _ in range(30):
        shape = tuple(random.randint(1, 30 if ndim == 3 else 60, ndim))
        spacing = tuple(np.exp(random.uniform(-1.2, 1.4, ndim)))
        masks = np.array([blobs(random, shape, f, random.uniform(0.3, 4)) for f in random.uniform(0, 1, 4)])
        # One voxel, and all but one.
        single = np.zeros(shape, dtype=bool)
        single[tuple(random.randint(s) for s in shape)] = True
        masks = np.array([*masks, single, ~single])
        for max_distance in (0.1, min(spacing), max(spacing) * random.uniform(0.5, 8), 1000.0):
            expected = literal(masks, spacing, max_distance)
            np.testing.assert_allclose(phi(masks, spacing, max_distance), expected, atol=2e-6)


def test_memory_order_does_not_matter(phi):
    masks = np.array([blobs(np.random.RandomState(i), (9, 14, 17), 0.2) for i in range(2)])
    spacing = (3.0, 0.7, 1.1)
    expected = literal(masks, spacing, 6.0)
    for same in (np.asfortranarray(masks), masks.astype(np.uint8), np.repeat(masks, 2, axis=3)[..., ::2]):
        before = same.copy()
        np.testing.assert_allclose(phi(same, spacing, 6.0), expected, atol=2e-6)
        assert np.array_equal(same, before)


@pytest.mark.parametrize("spacing, max_distance", [((1.0, 1.0, 1.0), 10.0), ((3.0, 0.8, 0.8), 40.0), ((1, 2, 3), 0.2)])
def test_a_steep_sigmoid_gives_the_mask_back(phi, spacing, max_distance):
    random = np.random.RandomState(0)
    masks = np.array([blobs(random, (20, 24, 28), f) for f in (0.01, 0.1, 0.5)])
    value = phi(masks, spacing, max_distance)
    for mask, v in zip(masks, value):
        assert dice(expit(-1500 * v), mask) > 0.99
        assert dice(expit(1500 * v), mask) < 0.1


def test_bad_input(monkeypatch):
    masks = np.zeros((2, 4, 5, 6), dtype=bool)
    for spacing, max_distance, message in (
        ((1, 1), 3.0, "3 spatial axes"),
        ((1, 1, 1, 1), 3.0, "3 spatial axes"),
        ((1, 0, 1), 3.0, "positive number per axis"),
        ((1, -1, 1), 3.0, "positive number per axis"),
        ((1, 1, float("nan")), 3.0, "positive number per axis"),
        ((), 3.0, "positive number per axis"),
        ((1, 1, 1), 0.0, "max_distance has to be a positive"),
        ((1, 1, 1), -2.0, "max_distance has to be a positive"),
        ((1, 1, 1), float("inf"), "max_distance has to be a positive"),
        ((1, 1, 1), float("nan"), "max_distance has to be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            signed_distance(masks, spacing, max_distance)
        if "spatial axes" not in message:
            with pytest.raises(ValueError, match=message):
                SignedDistanceTransform(2, False, None, spacing, max_distance)
    with pytest.raises(ValueError, match="'scikit' is neither"):
        signed_distance(masks, (1, 1, 1), 3.0, backend="scikit")
    monkeypatch.setattr(module, "edt", None)
    with pytest.raises(ValueError, match="is not installed"):
        signed_distance(masks, (1, 1, 1), 3.0, backend="edt")


def check_known(distance, masks, ignored, spacing, max_distance):
    """A distance is known where it is the same with none and with all of the ignored voxels in the class.

    Those two are its bounds: the more voxels a class has, the nearer it is from outside, and the farther from inside is
    what is not in it. Where both are equal because an ignored voxel is exactly as near as the boundary, NaN will do.
    """
    least = literal(masks & ~ignored, spacing, max_distance)
    most = literal(masks | ignored, spacing, max_distance)
    known = np.isfinite(distance)
    assert not known[:, ignored].any()
    np.testing.assert_allclose(distance[known], least[known], atol=1e-6)
    np.testing.assert_allclose(distance[known], most[known], atol=1e-6)
    if ignored.any():
        nearest = distance_transform_edt(~ignored, sampling=spacing)
        boundary = np.abs(least) * max_distance + min(spacing) / 2
        assert (np.isclose(least, most, atol=1e-6) & ~known <= (np.abs(nearest - boundary) < 1e-4)).all()
    else:
        assert known.all()


class TestTransform:
    """What the transform makes of nnU-Net's forms of a target."""

    labels = torch.from_numpy(np.random.RandomState(0).choice([0, 0, 1, 2, 3, 4], (1, 6, 9, 8))).to(torch.int16)

    def test_labels(self):
        """Three classes; label 4 is ignored."""
        transform = SignedDistanceTransform(3, False, 4, (2.0, 1.0, 1.0), 4.0)
        image = torch.rand(1, 6, 9, 8)
        sample = transform(image=image, segmentation=self.labels)
        target, distance = sample["segmentation"]
        assert sample["image"] is image and target is self.labels
        assert distance.dtype == torch.float32 and distance.shape == (3, 6, 9, 8)
        masks = np.array([self.labels[0].numpy() == c for c in (1, 2, 3)])
        check_known(distance.numpy(), masks, self.labels[0].numpy() == 4, (2.0, 1.0, 1.0), 4.0)

    def test_partly_annotated(self):
        """Slices without annotation beside annotated ones, an object in both."""
        labels = torch.zeros((1, 10, 20, 16), dtype=torch.int16)
        labels[:, 2:8, 5:15, 4:12] = 1
        labels[:, 6:] = 2
        transform = SignedDistanceTransform(1, False, 2, (1.0, 1.0, 1.0), 4.0)
        _, distance = transform(segmentation=labels)["segmentation"]
        check_known(distance.numpy(), labels.numpy() == 1, labels[0].numpy() == 2, (1.0, 1.0, 1.0), 4.0)
        known = distance[0, :6].isfinite()
        # In the last annotated slices a voxel is known where the object's edge is nearer than the first one without.
        assert known.float().mean() > 0.5 and not known[4:, 7:13, 6:10].any() and known[4, 5, 6]

    @pytest.mark.parametrize("ignore", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
    def test_regions(self, ignore, dtype):
        regions = torch.stack([self.labels[0] >= 1, self.labels[0] == 2] + ignore * [self.labels[0] == 4]).to(dtype)
        transform = SignedDistanceTransform(2, True, None, (2.0, 1.0, 1.0), 4.0)
        target, distance = transform(segmentation=regions)["segmentation"]
        assert target is regions
        ignored = (self.labels[0] == 4).numpy() & ignore
        check_known(distance.numpy(), regions[:2].numpy() > 0, ignored, (2.0, 1.0, 1.0), 4.0)

    def test_deep_supervision(self):
        scales = [self.labels, self.labels[:, :, ::2, ::2], self.labels[:, ::2, ::4, ::4]]
        given = list(scales)
        result = SignedDistanceTransform(3, False, None, (1.0, 1.0, 1.0), 4.0)(segmentation=given)["segmentation"]
        assert len(given) == 3 and len(result) == 4
        assert all(a is b for a, b in zip(result, scales))
        assert result[-1].shape == (3, 6, 9, 8)

    def test_a_target_that_fits_no_number_of_classes(self):
        with pytest.raises(ValueError, match="one channel, not 3"):
            SignedDistanceTransform(3, False, None, (1.0, 1.0), 4.0)(segmentation=torch.zeros(3, 5, 5))
        with pytest.raises(ValueError, match="has 3 or, with ignore, 4 channels, not 2"):
            SignedDistanceTransform(3, True, None, (1.0, 1.0), 4.0)(segmentation=torch.zeros(2, 5, 5))


SPACING = (3.0, 1.0, 1.5)


class MemoryDataset:
    """Cases in memory, with the part of a dataset's interface that the loader asks for."""

    identifiers = ("case_0", "case_1", "case_2")

    def __init__(self, labels, ignore):
        self.labels, self.ignore = labels, ignore

    def load_case(self, identifier):
        image, segmentation = make_case(int(identifier[-1]), ignore=self.ignore)
        segmentation = segmentation[None].astype(np.int16)
        every = tuple([-1, *self.labels.all_labels])
        locations = {label: np.argwhere(segmentation == label) for label in (1, 2)}
        return image[None], segmentation, None, {"class_locations": {**locations, every: locations[1]}}


def make_loader(kind, ndim, deep_supervision, max_distance):
    """nnU-Net's loader and training transforms; the signed distance after them, unless max_distance is None."""
    _, names, order = DATASETS[kind]
    labels = LabelManager(names, order)
    patch_size = (8, 16, 14)[-ndim:]
    regions = labels.foreground_regions if labels.has_regions else None
    transforms = nnUNetTrainer.get_training_transforms(
        patch_size,
        (-0.5, 0.5),
        [[1.0] * ndim, [0.5] * ndim] if deep_supervision else None,
        tuple(range(ndim)),
        False,
        regions=regions,
        ignore_label=labels.ignore_label,
    )
    if max_distance is not None:
        num_foreground = labels.num_segmentation_heads - (not labels.has_regions)
        distance = SignedDistanceTransform(
            num_foreground, labels.has_regions, labels.ignore_label, SPACING[-ndim:], max_distance
        )
        transforms = ComposeTransforms([*transforms.transforms, distance])
    dataset = MemoryDataset(labels, labels.has_ignore_label)
    fix_transform_arithmetic(transforms)
    return nnUNetDataLoader(dataset, 2, patch_size, patch_size, labels, 1.0, transforms=transforms)


def check_batch(distance, target, kind, spacing, max_distance):
    """A batch's distances against its full-resolution target, of a dataset of two classes or regions."""
    target = target.numpy()
    if kind.startswith("regions"):
        masks, ignored = target[:, :2].astype(bool), target[:, 2:].any(1)
    else:
        masks, ignored = np.concatenate([target == 1, target == 2], axis=1), target[:, 0] == 3
    assert masks.any() and (kind.endswith("ignore") or not ignored.any())
    assert distance.dtype == torch.float32 and distance.shape == masks.shape
    for d, m, i in zip(distance.numpy(), masks, ignored):
        check_known(d, m, i, spacing, max_distance)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("kind", list(DATASETS))
def test_through_nnunets_loader(kind, deep_supervision, ndim):
    """The batch has the distance as last target; all else is what it is without."""
    state = global_state()
    try:
        batches = []
        for max_distance in (None, 5.0):
            loader = make_loader(kind, ndim, deep_supervision, max_distance)
            seed_everything(11)
            batches.append(next(loader))
    finally:
        set_global_state(state)
    stock, ours = batches
    assert torch.equal(stock["data"], ours["data"])
    expected = stock["target"] if deep_supervision else [stock["target"]]
    *targets, distance = ours["target"]
    assert len(targets) == len(expected) == 1 + deep_supervision
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, targets))
    check_batch(distance, targets[0], kind, SPACING[-ndim:], 5.0)


def test_through_background_processes():
    loader = make_loader("ignore", 3, True, 5.0)
    augmenter = NonDetMultiThreadedAugmenter(loader, None, num_processes=1, num_cached=1, seeds=[5], wait_time=0.002)
    try:
        full, half, distance = next(augmenter)["target"]
    finally:
        augmenter._finish()
    assert half.shape != full.shape and half.dtype == full.dtype
    check_batch(distance, full, "ignore", SPACING, 5.0)
