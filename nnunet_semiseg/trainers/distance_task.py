"""The signed distance as a second task, for DTML and DTC."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.data.signed_distance import SignedDistanceTransform
from nnunet_semiseg.losses.distance import cross_task_error, mask_of_distance
from nnunet_semiseg.networks.features import Outputs, full_resolution
from nnunet_semiseg.trainers.frame import RampOptions, Unlabeled, Voxels
from nnunet_semiseg.trainers.frame.part import Part
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class DistanceOptions(RampOptions):
    consistency_weight: float = option(0.33, "largest weight of the cross-task consistency", low=0.0)
    steepness: float = option(
        1500.0, "k of the smooth mask sigmoid(-k z); hardly matters where z is learned from masks alone", low=1.0
    )
    distance_unit: str = option("mm", "unit of the signed distance, where it is learned", choices=("mm", "voxel"))
    max_distance: float = option(
        0.0, "distance that maps to 1, in that unit; 0: half of the patch's shortest side", low=0.0
    )


class DistanceTask(Part):
    """Mixin: signed distances of labeled patches, computed by the augmentation workers if a loss needs them."""

    def needs_distance(self) -> bool:
        """Whether a loss needs the signed distance of the labels."""
        raise NotImplementedError

    def target_transforms(self) -> list:
        if not self.needs_distance():
            return []
        configuration = self.configuration_manager
        in_mm = self.options.distance_unit == "mm"
        spacing = [float(s) if in_mm else 1.0 for s in configuration.spacing]
        shortest = min(side * s for side, s in zip(configuration.patch_size, spacing))
        return [
            SignedDistanceTransform(
                self.labels.num_foreground,
                self.labels.has_regions,
                self.labels.ignore_label,
                spacing,
                self.options.max_distance or shortest / 2,
            )
        ]

    def split_distance(self, target: Outputs) -> tuple[Outputs, torch.Tensor | None]:
        """The batch's target as nnU-Net's loss takes it, and the (B, K, *) signed distance or None."""
        if not self.needs_distance():
            return target, None
        *scales, distance = target
        return (scales if self.enable_deep_supervision else scales[0]), distance

    def targets(self, unlabeled: Unlabeled) -> Voxels:
        """The tasks are each other's target."""
        return {"valid": torch.ones_like(unlabeled.strong[:, :1], dtype=torch.bool)}

    def targets_of_labels(self, hard: torch.Tensor, valid: torch.Tensor) -> Voxels:
        return {"valid": valid}

    def consistency(self, outputs: Outputs, distances: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Cross-task error of a segmentation network's outputs and (B, K, *) distances over a (B, 1, *) bool mask."""
        masks = mask_of_distance(distances, self.options.steepness)
        probabilities = self.labels.probabilities(full_resolution(outputs))
        return cross_task_error(masks, self.labels.foreground_channels(probabilities), valid)
