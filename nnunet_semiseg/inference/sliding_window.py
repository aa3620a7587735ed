"""nnU-Net's sliding window in numpy: the same sums, rounded to half precision at the same places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

_SMALLEST_NORMAL = np.float32(2.0**-14)
_TOO_LARGE = 65520
# Numbers that are added up at a time.
_CACHED = 2**16

# Yields the (1, K, *patch) logits of (1, C, *patch) windows in order. A result is overwritten by the next but one.
Network = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


def gaussian(patch: Sequence[int]) -> np.ndarray:
    """nnU-Net's weights of a window's voxels, in half precision: 10 in its middle, never 0."""
    weights = np.zeros(patch)
    weights[tuple(n // 2 for n in patch)] = 1
    weights = gaussian_filter(weights, [n / 8 for n in patch], 0, mode="constant", cval=0)
    weights /= np.max(weights) / 10
    half = weights.astype(np.float16)
    half[half == 0] = half[half > 0].min()
    return half


def starts(size: int, patch: int, step: float) -> list[int]:
    """Where windows start along an axis."""
    count = int(np.ceil((size - patch) / (patch * step))) + 1
    stride = (size - patch) / (count - 1) if count > 1 else 0
    return [int(np.round(stride * i)) for i in range(count)]


def windows(shape: Sequence[int], patch: Sequence[int], step: float) -> list[tuple[slice | int, ...]]:
    """Of an image (Z, Y, X), in nnU-Net's order; for 2D patches in every slice."""
    places = [starts(n, p, step) for n, p in zip(shape[-len(patch) :], patch)]
    each = [tuple(slice(s, s + p) for s, p in zip(place, patch)) for place in itertools.product(*places)]
    if len(patch) == len(shape):
        return list(each)
    return [(z, *window) for z in range(shape[0]) for window in each]


def logits(
    data: np.ndarray,
    network: Network,
    outputs: int,
    patch: Sequence[int],
    step: float = 0.5,
    mirroring_axes: Sequence[int] | None = None,
) -> np.ndarray:
    """The mean of a network's logits over all windows.

    Args:
        data: (C, Z, Y, X) float32; it is padded with 0 if it is smaller than a window.
        outputs: Classes or regions K.
        patch: Of the network, 2D or 3D.
        step: Between windows, as a share of them.
        mirroring_axes: Axes of the patch along all combinations of which each window is predicted, too.

    Returns:
        (K, Z, Y, X) float16, the same as nnU-Net's for the same network.

    Raises:
        ValueError: if a logit is too large for half precision.
    """
    shape = np.array(data.shape[1:])
    missing = np.maximum(np.array([0] * (len(shape) - len(patch)) + list(patch)) - shape, 0)
    back = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape))
    if missing.any():
        data = np.pad(data, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    weights = gaussian(patch).astype(np.float32)
    # Numbers of half precision: those of single precision are faster, as long as each sum is rounded.
    total = np.zeros((outputs, *data.shape[1:]), dtype=np.float32)
    count = np.zeros((1, *data.shape[1:]), dtype=np.float32)
    places = windows(data.shape[1:], patch, step)
    flips = _flips(mirroring_axes)
    predicted = network(
        np.ascontiguousarray(np.flip(data[tuple([slice(None), *place])][None], flip))
        for place in places
        for flip in flips
    )
    for place in places:
        prediction = next(predicted)[0]
        if len(flips) > 1:
            prediction = prediction.copy()
            for flip in flips[1:]:
                prediction += np.flip(next(predicted)[0], tuple(axis - 1 for axis in flip))
            prediction /= len(flips)
        _add(total, place, prediction, weights)
        _add(count, place, np.ones((1, *patch), dtype=np.float32), weights)
    inside = (slice(None), *back)
    total, count = total[inside], count[inside]
    result = np.empty(total.shape, dtype=np.float16)
    for sums, half in zip(total, result):
        # A sum this large is infinite in half precision.
        if not np.abs(sums).max() < _TOO_LARGE:
            raise ValueError("its logits are infinite or no numbers in half precision, in which nnU-Net adds them up")
        half[...] = sums / count[0]
    return result


def _add(total: np.ndarray, place: tuple[slice | int, ...], values: np.ndarray, weights: np.ndarray) -> None:
    """Add (K, *patch) weighted values at a place of (K, Z, Y, X), rounding each sum to half precision."""
    # A few rows at a time, which stay in the processor's cache.
    rows = max(1, _CACHED // weights[0].size)
    for sums, of_class in zip(total, values):
        there = sums[place]
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            new = of_class[part] * weights[part]
            new += there[part]
            round_to_half(new)
            there[part] = new


def round_to_half(values: np.ndarray) -> None:
    """Round single precision to the nearest number of half precision, in place; ties to even.

    Numbers that are too large for half precision are left as large as they are.
    """
    small = np.abs(values) < _SMALLEST_NORMAL
    if small.any():
        # Below, numbers of half precision are equally far apart, as those of single precision are next to 0.75.
        rounded = (values + np.float32(0.75)) - np.float32(0.75)
    # Half precision has 13 bits less.
    bits = values.view(np.int32)
    odd = bits >> 13
    odd &= 1
    odd += 0xFFF
    bits += odd
    bits &= ~0x1FFF
    if small.any():
        np.copyto(values, rounded, where=small)


def _flips(axes: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The axes of (1, C, *patch) along which a window is mirrored each time; first none."""
    axes = [axis + 2 for axis in axes or ()]
    return [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]


def mean(predictions: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of the folds' (K, Z, Y, X) float16 logits, rounded after each addition as nnU-Net does."""
    predictions = iter(predictions)
    total = next(predictions)
    count = 1
    for prediction in predictions:
        total += prediction
        count += 1
    if count > 1:
        total /= count
    return total
