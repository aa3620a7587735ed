"""A weak and a strong view of an unlabeled patch, from nnU-Net's own training transforms."""

from __future__ import annotations

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
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
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from nnunet_semiseg.data.signed_distance import SignedDistanceTransform

_GEOMETRY = (
    SpatialTransform,
    MirrorTransform,
    Rot90Transform,
    TransposeAxesTransform,
    Convert3DTo2DTransform,
    Convert2DTo3DTransform,
)
_SEGMENTATION_ONLY = (
    RemoveLabelTansform,
    ConvertSegmentationToRegionsTransform,
    DownsampleSegForDSTransform,
    SignedDistanceTransform,
)


def _is_one_of(transform: BasicTransform, kinds: tuple) -> bool:
    """Whether the transform, or the one that a RandomTransform applies, is of these kinds."""
    return isinstance(getattr(transform, "transform", transform), kinds)


class TwoViewTransform(BasicTransform):
    """Draws the geometry once and the intensities twice: not at all (weak) and as nnU-Net does in training (strong).

    nnU-Net rotates by up to 180 degrees, so geometry drawn apart would put different tissue into the same voxel of
    the two views, and every loss that compares them would compare the wrong things. The transforms are taken from the
    trainer's own list, so that a trainer with other augmentation changes both halves of the batch.

    The views come back stacked along the channels (weak first), because nnU-Net's loader carries one image per sample.

    Args:
        training_transforms: What ``get_training_transforms`` returns.
        strength: Of the strong view: "none" as the weak one, "nnunet" as in training, "strong" with
            ``strong_intensities`` as well.
    """

    def __init__(self, training_transforms: ComposeTransforms, strength: str = "nnunet"):
        super().__init__()
        transforms = [t for t in training_transforms.transforms if not _is_one_of(t, _SEGMENTATION_ONLY)]
        intensity = [t for t in transforms if not _is_one_of(t, (*_GEOMETRY, MaskImageTransform))]
        intensity = {"none": [], "nnunet": intensity, "strong": [*intensity, *strong_intensities()]}[strength]
        self.geometry = ComposeTransforms([t for t in transforms if _is_one_of(t, _GEOMETRY)])
        self.masking = ComposeTransforms([t for t in transforms if _is_one_of(t, (MaskImageTransform,))])
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
    for part in getattr(transform, "transforms", []):
        fix_transform_arithmetic(part)
    if hasattr(transform, "transform"):
        fix_transform_arithmetic(transform.transform)
    if hasattr(transform, "benchmark"):
        transform.benchmark = False
