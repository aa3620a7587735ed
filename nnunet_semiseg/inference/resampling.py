"""nnU-Net's resampling by scipy alone, and label maps at the image's resolution without resampling all logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# nnU-Net's ANISO_THRESHOLD.
ANISOTROPIC = 3
# sigmoid(x) > 0.5 in single precision, as nnU-Net decides about a region, needs a logit above this one.
REGION_LOGIT = 2.0**-23


@dataclass(frozen=True)
class Resampling:
    """A ``resampling_fn_...`` of a configuration with its ``..._kwargs``.

    Args:
        order: Of the splines; 1 is linear.
        order_z: Along an axis that is resampled separately.
        force_separate_z: True or False, or None to decide by the spacings.
        threshold: Ratio of spacings above which the coarsest axis is resampled separately.
        nothing: The image stays as it is.
    """

    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None = False
    threshold: float = ANISOTROPIC
    nothing: bool = False

    @classmethod
    def of(cls, configuration: dict, what: str) -> Resampling:
        """That of a configuration's ``resampling_fn_<what>``.

        Raises:
            NotImplementedError: if it is not nnU-Net's default one.
        """
        name, kwargs = configuration[f"resampling_fn_{what}"], dict(configuration[f"resampling_fn_{what}_kwargs"])
        if name == "no_resampling_hack":
            return cls(nothing=True)
        known = {
            "order": "order",
            "order_z": "order_z",
            "force_separate_z": "force_separate_z",
            "separate_z_anisotropy_threshold": "threshold",
        }
        is_seg = kwargs.pop("is_seg", False)
        if name != "resample_data_or_seg_to_shape" or is_seg or set(kwargs) - set(known):
            raise NotImplementedError(
                f"The plans resample with {name} ({kwargs}), which this runner does not know. Use nnUNetv2_predict"
            )
        return cls(**{known[key]: value for key, value in kwargs.items()})

    def separate_axis(self, spacing: Sequence[float], target: Sequence[float]) -> int | None:
        """The axis that is resampled on its own, or None."""
        if self.force_separate_z is False:
            return None
        if self.force_separate_z or _anisotropic(spacing, self.threshold):
            coarse = spacing
        elif _anisotropic(target, self.threshold):
            coarse = target
        else:
            return None
        axes = [axis for axis, s in enumerate(coarse) if max(coarse) / s == 1]
        # Two or three equal ones are not resampled separately.
        return axes[0] if len(axes) == 1 else None

    def linear(self, axis: int | None) -> bool:
        """Whether each new value is a weighted mean of its neighbors."""
        return self.order == 1 and (axis is None or self.order_z == 0)


def _anisotropic(spacing: Sequence[float], threshold: float) -> bool:
    return bool(np.max(spacing) / np.min(spacing) > threshold)


def new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """nnU-Net's ``compute_new_shape``."""
    return tuple(int(round(s / t * n)) for s, t, n in zip(spacing, target, shape))


def resample(
    data: np.ndarray, shape: Sequence[int], how: Resampling, spacing: Sequence[float], target: Sequence[float]
) -> np.ndarray:
    """nnU-Net's ``resample_data_or_seg_to_shape``, value for value.

    Args:
        data: (C, Z, Y, X).
        shape: New (Z, Y, X).
        spacing: In mm, of ``data``.
        target: In mm, of the result.

    Returns:
        (C, *shape) in the type of ``data``; ``data`` itself if it has that shape.
    """
    if how.nothing or data.shape[1:] == tuple(shape):
        return data
    axis = how.separate_axis(spacing, target)
    resampled = np.empty((len(data), *shape), dtype=data.dtype)
    for channel, out in zip(data, resampled):
        out[...] = _resample_channel(channel, shape, how, axis)
    return resampled


def _resample_channel(channel: np.ndarray, shape: Sequence[int], how: Resampling, axis: int | None) -> np.ndarray:
    """(Z, Y, X) to ``shape`` in double precision."""
    channel = channel.astype(np.float32, copy=False)
    if axis is None:
        return _resize(channel, shape, how.order)
    in_plane = [n for a, n in enumerate(shape) if a != axis]
    planes = np.stack([_resize(plane, in_plane, how.order) for plane in np.moveaxis(channel, axis, 0)], axis=axis)
    if planes.shape[axis] == shape[axis]:
        return planes
    if how.order_z == 0:
        return np.take(planes, _nearest(planes.shape[axis], shape[axis]), axis=axis)
    scale = [old / new for old, new in zip(planes.shape, shape)]
    where = np.stack([s * (grid + 0.5) - 0.5 for s, grid in zip(scale, np.indices(shape))])
    return ndimage.map_coordinates(planes, where, order=how.order_z, mode="nearest")


def _resize(image: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """``skimage.transform.resize(image, shape, order, mode="edge", anti_aliasing=False)`` without its imports.

    nnU-Net gives it images in double precision; scipy computes in that anyway, and single needs half the memory.
    """
    zoom = [1 / factor for factor in np.divide(image.shape, shape)]
    out = ndimage.zoom(image, zoom, output=np.float64, order=order, mode="nearest", grid_mode=True)
    return np.clip(out, image.min(), image.max(), out=out)


def _positions(old: int, new: int) -> np.ndarray:
    """Of the new voxels along an axis, in old voxels, as scipy computes them; the outermost ones lie outside."""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _nearest(old: int, new: int) -> np.ndarray:
    return np.floor(np.clip(_positions(old, new), 0, old - 1) + 0.5).astype(np.intp)


@dataclass(frozen=True)
class _Axis:
    """Cells between the old voxels along an axis, in which the new voxels lie.

    Args:
        below, above: The old voxels at both ends of each cell; beyond the first and the last one both are the same.
        cell: Of each new voxel.
        share: Of the old voxel above in each new one; 0 where voxels are taken as they are.
    """

    below: np.ndarray
    above: np.ndarray
    cell: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, old: int, new: int, nearest: bool) -> _Axis:
        itself = np.arange(old)
        if nearest or old == new:
            return cls(itself, itself, _nearest(old, new) if nearest else itself, np.zeros(new))
        position = _positions(old, new)
        lower = np.floor(position)
        edges = np.arange(old + 1)
        return cls(np.maximum(edges - 1, 0), np.minimum(edges, old - 1), lower.astype(np.intp) + 1, position - lower)

    @property
    def between(self) -> bool:
        """Whether any voxel lies between two old ones."""
        return bool(self.share.any())


def labels(
    values: np.ndarray,
    shape: Sequence[int],
    how: Resampling,
    spacing: Sequence[float],
    target: Sequence[float],
    regions: Sequence[int] | None = None,
    threshold: float = REGION_LOGIT,
) -> np.ndarray:
    """The label map that nnU-Net makes of ``resample(values, shape, ...)``.

    A linearly interpolated value is a weighted mean of the values at the corners of a cell. Where one class is the
    highest at all corners, it is the highest everywhere between them, and nothing has to be interpolated: this is left
    to the few cells in which classes meet, and to the classes that can win there.

    Args:
        values: (K, Z, Y, X) logits, or probabilities, in half or single precision.
        shape: New (Z, Y, X).
        how: Of the logits; anything but linear interpolation resamples one class after the other.
        spacing: In mm, of ``values``.
        target: In mm, of the label map.
        regions: For K regions, the label that each is painted with, in order; None for K classes.
        threshold: The value above which a voxel is in a region.

    Returns:
        (Z, Y, X) labels, uint8 or uint16.
    """
    axis = how.separate_axis(spacing, target)
    rule: _Classes | _Regions = _Regions(threshold) if regions else _Classes()
    if how.nothing or values.shape[1:] == tuple(shape):
        result, _ = rule.winners(values)
    elif how.linear(axis):
        axes = [_Axis.of(old, new, a == axis) for a, (old, new) in enumerate(zip(values.shape[1:], shape))]
        result = _sparse(values, axes, rule)
    else:
        painting = rule.painting(tuple(shape), values.dtype, len(values))
        for i, value in enumerate(values):
            painting.add(i, _resample_channel(value, shape, how, axis).astype(values.dtype))
        result = painting.winners
    if not regions:
        return result
    # In the winners of regions 0 is none of them, and i + 1 is region i.
    return np.array([0, *regions], dtype=_small_int(max(regions)))[result]


def _small_int(highest: int) -> type[np.unsignedinteger]:
    return np.uint8 if highest < 256 else np.uint16


def _ordered(values: np.ndarray) -> np.ndarray:
    """Integers in the order of floating point numbers: numpy has no fast comparison of half precision."""
    kind = np.dtype(f"i{values.itemsize}")
    bits = values.view(kind)
    # The other bits of a negative number count down. -0 is 0.
    return np.where(bits < 0, np.iinfo(kind).min - bits, bits)


def _values(ordered: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What ``_ordered`` was given, but for the sign of 0."""
    return np.where(ordered < 0, np.iinfo(ordered.dtype).min - ordered, ordered).view(dtype)


class _Painting:
    """The winners at some voxels, class by class or region by region, in order."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, count: int, threshold: float | None) -> None:
        self.winners = np.zeros(shape, dtype=_small_int(count))
        self._threshold = threshold
        # Of classes; the lowest number of all is none.
        self._best = np.full(shape, np.iinfo(f"i{dtype.itemsize}").min, dtype=f"i{dtype.itemsize}")

    def add(self, i: int, value: np.ndarray, where: np.ndarray | slice = slice(None)) -> None:
        """Class or region ``i`` has these values at the voxels ``where``, rounded as nnU-Net rounds them."""
        if self._threshold is not None:
            winners = self.winners[where]
            winners[value > value.dtype.type(self._threshold)] = i + 1
            self.winners[where] = winners
            return
        value, best, winners = _ordered(value), self._best[where], self.winners[where]
        higher = value > best
        winners[higher] = i
        self.winners[where] = winners
        self._best[where] = np.maximum(best, value)


class _Classes:
    """The first of the classes whose value is the highest."""

    def painting(self, shape: tuple[int, ...], dtype: np.dtype, count: int) -> _Painting:
        return _Painting(shape, dtype, count, None)

    def winners(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Z, Y, X) winners of (K, Z, Y, X) values, and where another class is so close that rounding can change it."""
        bits = np.dtype(f"i{values.itemsize}")
        # Value and class in one number, of which the highest is the winner: the first of equal ones.
        packed = np.dtype(f"i{2 * values.itemsize}")
        shift = 8 * values.itemsize
        winners = np.empty(values.shape[1:], dtype=_small_int(len(values)))
        margin = np.empty(values.shape[1:], dtype=np.float32)
        largest = 0.0
        # Slice by slice, which stays in the processor's cache.
        for z in range(values.shape[1]):
            best = second = np.full(values.shape[2:], np.iinfo(packed).min, dtype=packed)
            for i, value in enumerate(values[:, z]):
                number = (_ordered(value).astype(packed) << shift) + (len(values) - 1 - i)
                second = np.maximum(second, np.minimum(best, number))
                best = np.maximum(best, number)
            winners[z] = len(values) - 1 - (best & (2**shift - 1))
            high = _values((best >> shift).astype(bits), values.dtype).astype(np.float32)
            largest = max(largest, float(np.abs(high).max()))
            if len(values) > 1:
                margin[z] = high - _values((second >> shift).astype(bits), values.dtype).astype(np.float32)
            else:
                margin[z] = np.inf
        return winners, margin < self.slack(largest, values.dtype)

    @staticmethod
    def slack(largest: float, dtype: np.dtype) -> float:
        """Two values that are further apart than this are different ones once they are rounded."""
        return 2 * float(np.spacing(dtype.type(largest)))

    def contenders(self, corners: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """(K, cells) bool: which classes can win in a cell, of (corners, K, cells) values."""
        # Some class is at least this high everywhere in the cell.
        reached = corners.min(0).max(0)
        return corners.max(0) >= reached - self.slack(float(np.abs(corners).max()), dtype)


@dataclass(frozen=True)
class _Regions:
    """1 + the last region that has a value above the threshold; 0 if none has."""

    threshold: float

    def painting(self, shape: tuple[int, ...], dtype: np.dtype, count: int) -> _Painting:
        return _Painting(shape, dtype, count, self.threshold)

    def winners(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        painting = self.painting(values.shape[1:], values.dtype, len(values))
        for i, value in enumerate(values):
            painting.add(i, value)
        # What is above the threshold everywhere around stays above it.
        return painting.winners, np.zeros(values.shape[1:], dtype=bool)

    def contenders(self, corners: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return corners.max(0) > dtype.type(self.threshold)


def _sparse(values: np.ndarray, axes: Sequence[_Axis], rule: _Classes | _Regions) -> np.ndarray:
    """Winners of linearly interpolated values; only where they are not the same all around is anything interpolated.

    Args:
        values: (K, Z, Y, X).
        axes: Of the result.
    """
    winners, unsure = rule.winners(values)
    low = high = winners
    for axis, along in enumerate(axes):
        if along.between:
            low = np.minimum(np.take(low, along.below, axis), np.take(low, along.above, axis))
            high = np.maximum(np.take(high, along.below, axis), np.take(high, along.above, axis))
            unsure = np.take(unsure, along.below, axis) | np.take(unsure, along.above, axis)
    # One number more than there are winners stands for the cells to look at.
    mixed = len(values) + 1
    cells = np.where((low != high) | unsure, mixed, low.astype(_small_int(mixed)))
    del winners, low, high, unsure

    along_z, along_y, along_x = axes
    result = np.empty([len(axis.cell) for axis in axes], dtype=cells.dtype)
    for z, layer in enumerate(cells):
        slices = np.flatnonzero(along_z.cell == z)
        if not len(slices):
            continue
        plane = layer[:, along_x.cell][along_y.cell]
        result[slices] = plane
        y, x = np.nonzero(plane == mixed)
        if not len(y):
            continue
        places = np.flatnonzero(layer == mixed)
        numbers = np.empty(layer.size, dtype=np.int32)
        numbers[places] = np.arange(len(places))
        cell = numbers[along_y.cell[y] * layer.shape[1] + along_x.cell[x]]
        corners = _corners(values, z, np.divmod(places, layer.shape[1]), axes)
        contenders = rule.contenders(corners.reshape(-1, *corners.shape[2:]), values.dtype)
        down, right = along_y.share[y], along_x.share[x]
        running = [(i, np.flatnonzero(contender[cell])) for i, contender in enumerate(contenders)]
        for s in slices:
            share = along_z.share[s]
            weighted = [(1 - share) * corners[0], share * corners[1]] if share else [corners[0]]
            painting = rule.painting(cell.shape, values.dtype, len(values))
            for i, where in running:
                if len(where):
                    of_class = [corner[i] for around in weighted for corner in around]
                    value = _interpolate(of_class, cell[where], down[where], right[where])
                    painting.add(i, value.astype(values.dtype), where)
            result[s, y, x] = painting.winners
    return result


def _interpolate(corners: Sequence[np.ndarray], cell: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sums over the corners of cells, in the order in which scipy adds them up, to the last bit.

    Args:
        corners: Four or eight, of (cells,) values that are weighted along z.
        cell: (n,) of each voxel.
        down, right: (n,) its share of the next y and x.
    """
    left, up = 1 - right, 1 - down
    total = np.zeros(len(cell))
    for place, corner in enumerate(corners):
        value = corner[cell]
        value *= down if place & 2 else up
        value *= right if place & 1 else left
        total += value
    return total


def _corners(values: np.ndarray, z: int, places: tuple[np.ndarray, np.ndarray], axes: Sequence[_Axis]) -> np.ndarray:
    """The values around cells, in double precision.

    Args:
        values: (K, Z, Y, X).
        z: The layer of the cells.
        places: Their (n,) y and x in that layer.

    Returns:
        (1 or 2 slices, 4 corners, K, n); the corners are those below, above in x, above in y, and above in both.
    """
    along_z, along_y, along_x = axes
    y, x = places
    rows, columns = (along_y.below[y], along_y.above[y]), (along_x.below[x], along_x.above[x])
    slices = (along_z.below[z], along_z.above[z]) if along_z.between else (along_z.below[z],)
    corners = np.empty((len(slices), 4, len(values), len(y)))
    for around, at in zip(corners, slices):
        for i, corner in enumerate(around):
            corner[...] = values[:, at, rows[i // 2], columns[i % 2]]
    return corners
