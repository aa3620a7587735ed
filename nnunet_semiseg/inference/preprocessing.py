"""nnU-Net's DefaultPreprocessor for images without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_fill_holes

from nnunet_semiseg.inference.model import Model
from nnunet_semiseg.inference.resampling import new_shape, resample


@dataclass(frozen=True)
class Preprocessed:
    """What the network sees of a case, and the way back to the image.

    Args:
        data: (C, Z, Y, X), axes in the order of the plans, normalized, at the spacing of the configuration.
        spacing: Of the image in mm, axes in the order of the plans.
        target: Of ``data`` in mm.
        full: Shape (Z, Y, X) of the image, axes in the order of the plans.
        box: The part of the image that ``data`` shows.
    """

    data: np.ndarray
    spacing: tuple[float, ...]
    target: tuple[float, ...]
    full: tuple[int, ...]
    box: tuple[slice, ...]

    @property
    def cropped(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.box)


def target_spacing(model: Model, spacing: Sequence[float]) -> tuple[float, ...]:
    """In mm, of what the network sees. In 2D, slices stay as far apart as they are.

    Args:
        spacing: Of the image, axes in the order of the plans.
    """
    target = model.configuration["spacing"]
    return tuple(target) if len(target) == len(spacing) else (spacing[0], *target)


def preprocess(data: np.ndarray, spacing: Sequence[float], model: Model) -> Preprocessed:
    """The same numbers as ``DefaultPreprocessor.run_case_npy``.

    Args:
        data: (C, Z, Y, X) float32 as a reader gave it; it is overwritten.
        spacing: In mm, (Z, Y, X).

    Raises:
        ValueError: if an image is not RGB where the plans say so.
    """
    forward = model.plans["transpose_forward"]
    data = data.transpose([0, *(axis + 1 for axis in forward)])
    own = tuple(float(spacing[axis]) for axis in forward)
    full = data.shape[1:]
    box = nonzero_box(data)
    data = data[tuple([slice(None), *box])]
    schemes = model.configuration["normalization_schemes"]
    masked = model.configuration["use_mask_for_norm"]
    inside = None
    if any(masked[c] and schemes[c] == "ZScoreNormalization" for c in range(len(data))):
        # Nothing else needs it: holes do not change the box.
        inside = binary_fill_holes((data != 0).any(0))
    for c, channel in enumerate(data):
        normalize(channel, schemes[c], model.intensities(c), inside if masked[c] else None)
    target = target_spacing(model, own)
    shape = new_shape(data.shape[1:], own, target)
    resampled = np.ascontiguousarray(resample(data, shape, model.resampling("data"), own, target))
    return Preprocessed(resampled, own, target, full, box)


def nonzero_box(data: np.ndarray) -> tuple[slice, ...]:
    """The smallest box with all that is not 0 in any channel of (C, Z, Y, X); everything if all is 0."""
    some = data[0] != 0
    for channel in data[1:]:
        some |= channel != 0
    box = []
    for axis in range(some.ndim):
        along = np.flatnonzero(some.any(tuple(a for a in range(some.ndim) if a != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1) if len(along) else slice(0, some.shape[axis]))
    return tuple(box)


def normalize(image: np.ndarray, scheme: str, intensities: dict, inside: np.ndarray | None) -> None:
    """Normalize one channel in place by one of nnU-Net's schemes.

    Args:
        image: (Z, Y, X) float32.
        intensities: Of the channel in the labeled cases, for CTNormalization.
        inside: (Z, Y, X) bool, the only voxels for ZScoreNormalization to see and to change; None for all.
    """
    epsilon = 1e-8
    if scheme == "CTNormalization":
        np.clip(image, intensities["percentile_00_5"], intensities["percentile_99_5"], out=image)
        image -= intensities["mean"]
        image /= max(intensities["std"], epsilon)
    elif scheme == "ZScoreNormalization" and inside is not None:
        values = image[inside]
        image[inside] = (values - values.mean()) / max(values.std(), epsilon)
    elif scheme == "ZScoreNormalization":
        mean, std = image.mean(), image.std()
        image -= mean
        image /= max(std, epsilon)
    elif scheme == "RescaleTo01Normalization":
        image -= image.min()
        image /= np.clip(image.max(), a_min=epsilon, a_max=None)
    elif scheme == "RGBTo01Normalization":
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"its intensities {image.min():g} to {image.max():g} are not those of an RGB image, 0 to 255, for "
                "which the model was trained. Convert it"
            )
        image /= 255.0
    elif scheme != "NoNormalization":
        raise NotImplementedError(f"The plans normalize with {scheme}, which this runner does not know")
