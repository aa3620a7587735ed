"""nnU-Net's own segmentation losses, with a weight for every voxel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from torch.nn.functional import binary_cross_entropy_with_logits as binary_ce

from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.networks.features import Outputs

# Of (logits, hard, weight); the other of a network's output, with the others at full resolution.
VoxelLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OutputLoss = Callable[[Outputs, torch.Tensor, torch.Tensor], torch.Tensor]


class WeightedSegmentationLoss:
    """Cross-entropy plus soft Dice, each voxel with its weight.

    * Cross-entropy: sum(w ce) / sum(w); for regions, the binary one, averaged over regions, or summed if there is an
      ignore label, as nnU-Net does it.
    * Dice: every sum over voxels is weighted, as nnU-Net's ``loss_mask`` does it.

    A mask is a weight of 0 and 1; weights that are all equal give nnU-Net's own loss.

    Args:
        labels: How the dataset's logits are read.
        batch_dice: As in the plans: Dice over the batch rather than per sample.
        ce_weight, dice_weight: Weights of the two parts; 0 leaves a part out.
    """

    def __init__(self, labels: LabelAdapter, batch_dice: bool, ce_weight: float = 1.0, dice_weight: float = 1.0):
        self.ce_weight, self.dice_weight = ce_weight, dice_weight
        self.has_regions = labels.has_regions
        self.sums_regions = labels.ignore_label is not None
        nonlinearity = torch.sigmoid if labels.has_regions else softmax_helper_dim1
        # As nnU-Net's, a Dice over the batch is one over all ranks.
        self.dice = MemoryEfficientSoftDiceLoss(
            nonlinearity, batch_dice=batch_dice, do_bg=labels.has_regions, smooth=1e-5, ddp=dist.is_initialized()
        )
        self.ce = RobustCrossEntropyLoss(reduction="none")

    def __call__(self, logits: torch.Tensor, hard: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (B, C, *).
            hard: Labels or pseudo labels as LabelAdapter's hard predictions: (B, 1, *) int64 or (B, R, *) bool.
            weight: (B, 1, *) bool or float, not negative. Where it is 0, labels and logits do not matter.

        Returns:
            A scalar, whose gradient is 0 if all weights are 0. With ``batch_dice`` all ranks have to call it equally
            often.
        """
        logits, weight = logits.float(), weight.float()
        total = weight.sum()
        if total == 0 and not (self.dice.ddp and self.dice.batch_dice):
            return logits.sum() * 0.0
        loss = logits.new_zeros(())
        if self.ce_weight > 0:
            total = total.clamp(min=1e-8)
            if not self.has_regions:
                ce = (self.ce(logits, hard)[:, None] * weight).sum() / total
            elif self.sums_regions:
                ce = (binary_ce(logits, hard.float(), reduction="none") * weight).sum() / total
            else:
                # In this order it is nnU-Net's to the last bit where weights are equal, the gradient as well.
                ce = binary_ce(logits, hard.float(), weight.expand_as(logits)) * (weight.numel() / total)
            loss = self.ce_weight * ce
        if self.dice_weight > 0:
            loss = loss + self.dice_weight * self.dice(logits, hard, loss_mask=weight)
        return loss


class DeeplySupervised:
    """A loss of (logits, hard, weight) at every decoder resolution, weighted as nnU-Net weights them.

    Labels and weights are brought to each resolution from the full one, with the same nearest voxels, so that what is
    mixed or masked at full resolution stays in correspondence.

    Args:
        loss: Called with the arguments of WeightedSegmentationLoss.
        weight_factors: One weight per resolution, full resolution first.
    """

    def __init__(self, loss: VoxelLoss, weight_factors: Iterable[float]):
        self.loss = loss
        self.weight_factors = tuple(weight_factors)

    def __call__(self, outputs: Outputs, hard: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``outputs``: a network's output, a list with deep supervision; the others at full resolution."""
        if isinstance(outputs, torch.Tensor):
            return self.loss(outputs, hard, weight)
        total = hard.new_zeros((), dtype=torch.float32)
        for factor, logits in zip(self.weight_factors, outputs):
            if factor == 0:
                continue
            size = logits.shape[2:]
            total = total + factor * self.loss(logits, _nearest(hard, size), _nearest(weight, size))
        return total


def _nearest(tensor: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Resampled as nnU-Net resamples its targets for deep supervision; the type stays."""
    if tensor.shape[2:] == size:
        return tensor
    return F.interpolate(tensor.float(), size, mode="nearest-exact").to(tensor.dtype)
