"""What a network labels with certainty: CoraNet's two heads, and the estimators that its Table VI compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nnunet_semiseg.losses.uncertainty import agreement, small_deviation

if TYPE_CHECKING:
    from nnunet_semiseg.trainers.methods.coranet import nnUNetTrainerCoraNet

# Table VI: a confidence above 0.8 (test-time augmentation, MC dropout) or a standard deviation below 0.001 is certain.
CERTAIN_CONFIDENCE = 0.8
CERTAIN_DEVIATION = 0.001
DROPOUT = 0.5

Labeled = tuple[torch.Tensor, torch.Tensor]

# Each function takes CoraNet's trainer and (B, channels, *) patches, and returns (B, C, *) probabilities and a
# (B, 1, *) bool mask of the voxels whose label is certain.


def by_cost(trainer: nnUNetTrainerCoraNet, data: torch.Tensor) -> Labeled:
    """Both cost-sensitive heads decide alike."""
    probabilities, heads = trainer.probabilities_and_heads(data)
    return probabilities, agreement(heads["conservative"], heads["radical"])


def by_test_time_augmentation(trainer: nnUNetTrainerCoraNet, data: torch.Tensor) -> Labeled:
    """The mean over random flips and, in 2D, zooms by 0.8 to 1.1 is confident."""
    probabilities = torch.zeros((), device=data.device)
    for _ in range(trainer.options.passes):
        with trainer.random_stream:
            axes = [axis + 2 for axis in trainer.inference_allowed_mirroring_axes or () if torch.rand(()) < 0.5]
            zoom = float(torch.empty(()).uniform_(0.8, 1.1)) if data.ndim == 4 else 1.0
        p = trainer.labels.probabilities(trainer.logits(trainer.labeling, zoomed(data.flip(axes), zoom)))
        probabilities = probabilities + zoomed(p, 1 / zoom).flip(axes)
    return _by_mean(trainer, probabilities / trainer.options.passes)


def by_dropout(trainer: nnUNetTrainerCoraNet, data: torch.Tensor) -> Labeled:
    """The mean over passes with dropout is confident."""
    probabilities = torch.zeros((), device=data.device)
    for _ in range(trainer.options.passes):
        with trainer.random_stream:
            probabilities = probabilities + trainer.probabilities_with_dropout(data)
    return _by_mean(trainer, probabilities / trainer.options.passes)


def by_deviation(trainer: nnUNetTrainerCoraNet, data: torch.Tensor) -> Labeled:
    """A head predicts a small standard deviation of the logits."""
    probabilities, heads = trainer.probabilities_and_heads(data)
    return probabilities, small_deviation(F.softplus(heads["deviation"].float()), CERTAIN_DEVIATION)


def _by_mean(trainer: nnUNetTrainerCoraNet, probabilities: torch.Tensor) -> Labeled:
    return probabilities, trainer.labels.confidence(probabilities) > CERTAIN_CONFIDENCE


# By the values of the option ``uncertainty``.
LABEL_BY = {
    "cost": by_cost,
    "tta": by_test_time_augmentation,
    "mcdropout": by_dropout,
    "aleatoric": by_deviation,
}


def zoomed(image: torch.Tensor, zoom: float) -> torch.Tensor:
    """(B, C, Y, X) zoomed about its center, on the same grid; border values continue outside."""
    if zoom == 1.0:
        return image
    theta = torch.tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]], device=image.device).expand(len(image), 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
