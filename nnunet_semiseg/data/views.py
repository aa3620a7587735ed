"""A weak and a strong view of an unlabeled patch, from nnU-Net's own training transforms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

# {what a transform changes: its classes}.
_KINDS = {
    "geometry": (
        SpatialTransform,
        MirrorTransform,
        Rot90Transform,
        TransposeAxesTransform,
        Convert3DTo2DTransform,
        Convert2DTo3DTransform,
    ),
    "masking": (MaskImageTransform,),
    "intensity": (ImageOnlyTransform,),
    "targets": (SegOnlyTransform,),
}


def _parts(transform: BasicTransform) -> Sequence[BasicTransform]:
    """What a composed, random or chosen transform applies; nothing for any other."""
    if hasattr(transform, "transform"):
        return [transform.transform]
    return getattr(transform, "transforms", getattr(transform, "list_of_transforms", ()))


def _steps(transforms: ComposeTransforms, without: Sequence[BasicTransform]) -> Iterator[BasicTransform]:
    """One after the other, those of a composed one in a composed one as well."""
    for transform in transforms.transforms:
        if any(transform is other for other in without):
            continue
        if isinstance(transform, ComposeTransforms):
            yield from _steps(transform, without)
        else:
            yield transform


def _kind(transform: BasicTransform) -> str:
    """The key in ``_KINDS``.

    Raises:
        NotImplementedError: naming a transform that is of none, or of several.
    """
    name = type(transform).__name__
    kinds = {_kind(part) for part in _parts(transform)}
    if not kinds:
        kinds = {kind for kind, classes in _KINDS.items() if isinstance(transform, classes)}
    if len(kinds) == 1:
        return kinds.pop()
    reason = f"mixes {' and '.join(sorted(kinds))}" if kinds else "is neither geometry nor for images or targets alone"
    raise NotImplementedError(
        f"The training transform {name} {reason}, so it is unknown whether both views of an unlabeled patch share it. "
        "Derive it from ImageOnlyTransform, SegOnlyTransform or one of nnU-Net's geometric transforms; if it is for "
        "labeled patches alone, return it from target_transforms()"
    )


class TwoViewTransform(BasicTransform):
    """Draws the geometry once and the intensities twice: not at all (weak) and as nnU-Net does in training (strong).

    nnU-Net rotates by up to 180 degrees, so geometry drawn apart would put different tissue into the same voxel of
    the two views, and every loss that compares them would compare the wrong things. The transforms are taken from the
    trainer's own list, so that a trainer with other augmentation changes both halves of the batch.

    What changes targets has nothing to do here: transforms of segmentations alone, and ``of_targets``.

    The views come back stacked along the channels (weak first), because nnU-Net's loader carries one image per sample.

    Args:
        training_transforms: What ``get_training_transforms`` returns.
        strength: Of the strong view: "none" as the weak one, "nnunet" as in training, "strong" with
            ``strong_intensities`` as well.
        of_targets: Those among the transforms that are for labeled patches, whatever they change.

    Raises:
        NotImplementedError: naming a transform of which it is not known whether the views share it.
    """

    def __init__(
        self,
        training_transforms: ComposeTransforms,
        strength: str = "nnunet",
        of_targets: Sequence[BasicTransform] = (),
    ):
        super().__init__()
        by_kind: dict[str, list[BasicTransform]] = {kind: [] for kind in _KINDS}
        for transform in _steps(training_transforms, of_targets):
            by_kind[_kind(transform)].append(transform)
        intensity = by_kind["intensity"]
        intensity = {"none": [], "nnunet": intensity, "strong": [*intensity, *strong_intensities()]}[strength]
        self.geometry = ComposeTransforms(by_kind["geometry"])
        self.masking = ComposeTransforms(by_kind["masking"])
        self.intensity = ComposeTransforms(intensity)
        self.transforms = (self.geometry, self.masking, self.intensity)

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict:
        """(C, *) image and the loader's (1, *) stand-in for a segmentation to (2 C, *) image and (1, *) of the same."""
        if self.masking.transforms:
            # Where nnU-Net normalizes inside the nonzero mask, the outside is exactly 0 and has to stay so. For
            # labeled cases the segmentation says where that is; here the image itself does.
            channels = self.masking.transforms[0].apply_to_channels
            segmentation = torch.where((image[channels] == 0).all(0, keepdim=True), -1, 0).to(segmentation.dtype)
        sample = self.geometry(image=image, segmentation=segmentation)
        weak = self.masking(**sample)["image"]
        strong = self.intensity(image=sample["image"].clone(), segmentation=sample["segmentation"])
        strong = self.masking(**strong)["image"]
        return {"image": torch.cat((weak, strong)), "segmentation": sample["segmentation"]}


def strong_intensities() -> list[BasicTransform]:
    """Changes that nearly every patch gets; nnU-Net's own leave a third of all patches as they are.

    Contrast about the patch's mean by 0.5 to 1.5 and brightness by 0.5 standard deviations of the normalized
    intensities for four in five patches; gamma, noise and blur for every second.
    """
    each = dict(synchronize_channels=False, p_per_channel=1)
    return [
        RandomTransform(ContrastTransform(BGContrast((0.5, 1.5)), preserve_range=False, **each), 0.8),
        RandomTransform(BrightnessAdditiveTransform(0.0, 0.5, **each), 0.8),
        RandomTransform(GammaTransform(BGContrast((0.5, 2.0)), p_invert_image=0, p_retain_stats=1, **each), 0.5),
        RandomTransform(GaussianNoiseTransform((0, 0.1), **each), 0.5),
        RandomTransform(GaussianBlurTransform((0.5, 1.0), synchronize_axes=False, **each), 0.5),
    ]


def fix_transform_arithmetic(transform: BasicTransform) -> None:
    """Make the transforms' arithmetic a function of the random numbers alone.

    nnU-Net's blur times two implementations while it runs and keeps the faster one; their results differ in the last
    bits, so a seeded run could not be repeated.
    """
    for part in _parts(transform):
        fix_transform_arithmetic(part)
    if hasattr(transform, "benchmark"):
        transform.benchmark = False
