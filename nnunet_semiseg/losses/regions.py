"""Certain and uncertain regions with unequal weights (Zhou et al. 2025)."""

from __future__ import annotations

import torch

from nnunet_semiseg.losses.pseudo_labels import OutputLoss
from nnunet_semiseg.networks.features import Outputs

URL, CRL, NONE = "url", "crl", "none"


class RegionLoss:
    """A segmentation loss that favors the uncertain region (URL, Eq. 7), the certain one (CRL, Eq. 8), or neither.

    * By default one loss with a weight for each voxel: 1 in the favored region, ``alpha`` in the other.
    * ``region_normalized``: L(favored region) + alpha L(other region), each normalized by its own size, as the
      equations can also be read. A voxel of the small uncertain region then weighs far more than one outside: with the
      99th percentile and alpha = 0.5, CRL gives it about 50 times the weight, which is the contrary of its purpose.

    Args:
        loss: Called as loss(outputs, hard, weight); DeeplySupervised or WeightedSegmentationLoss.
        region_normalized: See above.
    """

    def __init__(self, loss: OutputLoss, region_normalized: bool):
        self.loss, self.region_normalized = loss, region_normalized

    def weights(self, uncertain: torch.Tensor, favored: str, alpha: float, valid: torch.Tensor) -> torch.Tensor:
        """The (B, 1, *) weights of the default form; arguments as for a call."""
        if favored == NONE:
            return valid.float()
        return torch.where(uncertain if favored == URL else ~uncertain, 1.0, alpha) * valid

    def __call__(
        self,
        outputs: Outputs,
        hard: torch.Tensor,
        uncertain: torch.Tensor,
        favored: str,
        alpha: float,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            outputs: The network's output.
            hard: Labels or pseudo labels, full resolution.
            uncertain: (B, 1, *) bool.
            favored: "url", "crl" or "none".
            alpha: Weight of the region that is not favored; 0 removes it (Table 6).
            valid: (B, 1, *) bool, the voxels that count.
        """
        if not self.region_normalized or favored == NONE:
            return self.loss(outputs, hard, self.weights(uncertain, favored, alpha, valid))
        region = uncertain if favored == URL else ~uncertain
        other = self.loss(outputs, hard, valid & ~region) if alpha > 0 else 0.0
        return self.loss(outputs, hard, valid & region) + alpha * other
