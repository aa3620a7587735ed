"""nnU-Net's own segmentation loss against pseudo labels, on a part of the voxels."""

from __future__ import annotations

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_semiseg.labels import LabelAdapter


class MaskedSegmentationLoss:
    """Cross-entropy plus ``dice_weight`` times soft Dice, both over the voxels of a mask only.

    nnU-Net's compound losses already leave out ignored voxels; the voxels outside of the mask are handed to them as
    ignored ones.

    Args:
        labels: How the dataset's logits are read.
        batch_dice: As in the plans: Dice over the batch rather than per sample.
        dice_weight: 0 is the cross-entropy alone.
    """

    def __init__(self, labels: LabelAdapter, batch_dice: bool, dice_weight: float):
        self.labels = labels
        self.dice_weight = dice_weight
        dice = dict(batch_dice=batch_dice, smooth=1e-5, do_bg=labels.has_regions, ddp=False)
        if labels.has_regions:
            self.loss = DC_and_BCE_loss(
                {}, dice, weight_dice=dice_weight, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss
            )
        else:
            self.loss = DC_and_CE_loss(
                dice,
                {},
                weight_dice=dice_weight,
                ignore_label=labels.num_outputs,
                dice_class=MemoryEfficientSoftDiceLoss,
            )

    def __call__(self, logits: torch.Tensor, hard: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (B, C, *) of the student.
            hard: The pseudo labels, in the form of nnU-Net's targets (see LabelAdapter).
            mask: (B, 1, *) bool, the voxels that count.

        Returns:
            A scalar; 0 with a graph for an empty mask.
        """
        if not mask.any():
            return logits.float().sum() * 0.0
        return self.loss(logits.float(), self.labels.masked_target(hard, mask))
