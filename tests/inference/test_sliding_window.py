"""The sliding window against nnU-Net's."""

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from small_models import stock, volume, write_model

from nnunet_semiseg.inference import sliding_window


def as_function(network):
    """A network of torch as ``sliding_window.Network``."""

    def run(windows):
        for window in windows:
            with torch.inference_mode():
                yield network(torch.from_numpy(window)).numpy()

    return run


@pytest.mark.parametrize("patch", [(8, 16, 16), (20, 12), (64, 96, 96)])
def test_weights(patch):
    theirs = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=torch.device("cpu")).numpy()
    np.testing.assert_array_equal(sliding_window.gaussian(patch), theirs)


def test_places():
    for size in range(16, 60):
        for step in (0.3, 0.5, 1):
            assert [sliding_window.starts(size, 16, step)] == compute_steps_for_sliding_window((size,), (16,), step)


@pytest.mark.parametrize("dim, shape", [(3, (13, 30, 37)), (3, (5, 10, 40)), (2, (4, 21, 37)), (2, (3, 9, 10))])
@pytest.mark.parametrize("mirroring", [False, True])
def test_logits(tmp_path, dim, shape, mirroring):
    folder = write_model(tmp_path / "model", dim=dim)
    theirs = stock(folder, mirroring=mirroring, step=0.4)
    data = volume(shape).astype(np.float32)[None] / 50
    expected = theirs.predict_logits_from_preprocessed_data(torch.from_numpy(data)).numpy()
    own = sliding_window.logits(
        data,
        as_function(theirs.network.eval()),
        4,
        (8, 16, 16)[-dim:],
        0.4,
        tuple(range(dim)) if mirroring else None,
    )
    assert own.dtype == expected.dtype
    np.testing.assert_array_equal(own, expected)


def test_sums_are_rounded_to_half_precision():
    every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    between = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    up, down = np.nextafter(between, np.float32(1e9)), np.nextafter(between, np.float32(-1e9))
    values = np.concatenate([every, between, up, down])
    expected = values.astype(np.float16).astype(np.float32)
    sliding_window.round_to_half(values)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_of_folds(count):
    random = np.random.RandomState(0)
    predictions = [random.normal(0, 9, (3, 4, 5, 6)).astype(np.float16) for _ in range(count)]
    theirs = torch.from_numpy(predictions[0].copy())
    for prediction in predictions[1:]:
        theirs += torch.from_numpy(prediction)
    if count > 1:
        theirs /= count
    np.testing.assert_array_equal(sliding_window.mean(iter(predictions)), theirs.numpy())


@pytest.mark.parametrize("logit", [np.inf, np.nan, 7e4])
def test_logits_beyond_half_precision(logit):
    def network(windows):
        for window in windows:
            yield np.full((1, 2, *window.shape[2:]), logit, dtype=np.float32)

    with pytest.raises(ValueError, match="infinite or no numbers in half precision"):
        sliding_window.logits(np.zeros((1, 4, 4, 4), dtype=np.float32), network, 2, (4, 4, 4))
